//! Scenarios in the notation of the acceptance table: steps such as `create s1`, states such as `s1(R*)=f0; f1<-f0`.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use qcow2_chain::storage::HostFileSystem;
use qcow2_chain::vm::{Report, SnapshotOptions};

use super::judge::Judge;
use super::lab::{Lab, LabShape};
use super::qemu::Qemu;
use super::ram;
use super::rng::{Rng, seed};
use super::states::state;

/// One step: its row of the table, the operation, and the state afterwards.
pub type Step = (&'static str, &'static str, &'static str);

/// A VM on files of the host.
pub struct Scene {
    pub lab: Lab,
    pub judge: Judge,
    rng: Rng,
    /// The paths of each volume's files in order of creation: f0, f1, ...
    files: BTreeMap<String, Vec<String>>,
    _dir: tempfile::TempDir,
}

/// One volume and three, standard and extended L2 entries, raw and qcow2 first files.
pub const SHAPES: [LabShape; 4] = [
    LabShape { volumes: 1, size: 96 << 10, cluster_bits: 12, extended_l2: false, raw: false },
    LabShape { volumes: 1, size: 96 << 10, cluster_bits: 14, extended_l2: true, raw: true },
    LabShape { volumes: 3, size: 48 << 10, cluster_bits: 9, extended_l2: false, raw: true },
    LabShape { volumes: 3, size: 96 << 10, cluster_bits: 14, extended_l2: true, raw: false },
];

/// Runs a scenario on VMs of all shapes.
pub fn on_all_shapes(scenario: impl Fn(&mut Scene)) {
    let Some(qemu) = Qemu::find() else { return };
    for shape in SHAPES {
        let mut scene = Scene::new(qemu, shape);
        scenario(&mut scene);
        scene.end();
    }
}

/// Runs a script up to the end of a row, and verifies the files after each step of that row.
pub fn row(script: &[Step], row: &str) {
    assert!(script.iter().any(|step| step.0 == row), "no row {row}");
    on_all_shapes(|scene| {
        let last = script.iter().rposition(|step| step.0 == row).unwrap();
        for &(of, what, state) in &script[..=last] {
            scene.act(what);
            assert_eq!(scene.states(), vec![state; scene.files.len()], "{of}: {what}");
            if of == row {
                scene.verify(what);
            }
        }
    });
}

impl Scene {
    pub fn new(qemu: Qemu, shape: LabShape) -> Self {
        let dir = ram::dir();
        let mut rng = Rng::new(seed());
        let lab = Lab::new(Arc::new(HostFileSystem), dir.path(), shape, &mut rng);
        let mut scene = Self { lab, judge: Judge::new(qemu), rng, files: BTreeMap::new(), _dir: dir };
        scene.number_files();
        scene
    }

    pub fn dir(&self) -> &Path {
        self._dir.path()
    }

    pub fn volumes(&self) -> Vec<String> {
        self.lab.now.keys().cloned().collect()
    }

    /// Writes to all volumes as the guest, then does the operation.
    pub fn act(&mut self, what: &str) -> Report {
        self.lab.write_all(&mut self.rng);
        let words: Vec<&str> = what.split(' ').collect();
        let set = &self.lab.set;
        let report = match words[..] {
            ["create", name] => set.create(name, &SnapshotOptions::default()),
            ["create", name, "quiesced"] => set.create(name, &SnapshotOptions::default().with_quiesce(true)),
            ["revert", name] => set.revert(name, &Default::default(), &()),
            ["delete", name] => set.delete(name, &Default::default(), &()),
            ["resize", volume, kib] => set.resize(volume, kib.parse::<u64>().unwrap() << 10, true),
            _ => panic!("no such step: {what}"),
        };
        let report = report.unwrap_or_else(|error| panic!("{what}: {error}"));
        self.note(&words);
        self.number_files();
        report
    }

    /// Changes the expectations to those after an operation.
    fn note(&mut self, words: &[&str]) {
        let name = words[1].to_owned();
        match words[0] {
            "create" => drop(self.lab.taken.insert(name, self.lab.now.clone())),
            "revert" => self.lab.now.clone_from(&self.lab.taken[&name]),
            "delete" => drop(self.lab.taken.remove(&name)),
            _ => {
                let kib: usize = words[2].parse().unwrap();
                self.lab.now.get_mut(&name).expect("a volume").resize(kib << 10, 0);
            }
        }
    }

    fn number_files(&mut self) {
        for volume in self.lab.model().volumes {
            let files = self.files.entry(volume.name).or_default();
            if !files.contains(&volume.active.file.path) {
                files.push(volume.active.file.path);
            }
        }
    }

    /// Does an operation, and asserts that all volumes have this state and that all files are sound.
    pub fn step(&mut self, what: &str, state: &str) -> Report {
        let report = self.act(what);
        assert_eq!(self.states(), vec![state; self.files.len()], "{what}");
        self.verify(what);
        report
    }

    /// Asserts contents, records, headers and directory by this crate, and files by QEMU.
    pub fn verify(&mut self, what: &str) {
        self.lab.check().unwrap_or_else(|wrong| panic!("{what}: {wrong}"));
        self.judge.judge(&self.lab.set);
    }

    /// Asserts, at the end of a scenario, that QEMU reads the expected contents.
    pub fn end(&self) {
        for (volume, content) in &self.lab.now {
            self.judge.assert_content(&self.lab.set, volume, content);
        }
    }

    /// Returns the state of each volume in the notation of the table.
    pub fn states(&self) -> Vec<String> {
        let model = self.lab.model();
        model.volumes.iter().map(|volume| state(&model, volume, &self.files[&volume.name])).collect()
    }
}
