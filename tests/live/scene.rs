//! A VM with snapshots that writes all the time: the steps and states of the acceptance table on a
//! real guest.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qcow2_chain::vm::{
    AdoptOptions, Error, Executor, MergeOptions, Report, SnapshotOptions, SnapshotSet, State, VolumeSpec,
};
use tempfile::TempDir;

use crate::content::Content;
use crate::guest::{Agent, Guest};
use crate::hypervisor::{Hypervisor, run};
use crate::lab::{Lab, chain, text};
use crate::states::state;

/// Numbers of records by disk.
type Records = BTreeMap<String, BTreeSet<u64>>;

/// A VM, and the model of its content.
pub struct Scene<'h> {
    pub guest: Guest<'h>,
    pub set: SnapshotSet,
    pub lab: Lab,
    /// The fsynced records at each snapshot.
    taken: BTreeMap<String, Records>,
    /// The records that the last revert left, and the number of all records at that time.
    reverted: (Records, usize),
    /// The recorded paths of each volume's files in order of creation: f0, f1, ...
    files: BTreeMap<String, Vec<String>>,
    /// The content of each snapshot when it was taken, as raw images.
    kept: TempDir,
}

/// A function that creates the executor for a domain.
pub type MakeExecutor = fn(&Hypervisor, &str) -> Arc<dyn Executor>;

impl<'h> Scene<'h> {
    /// Starts a guest of this name with these disks, and its writer.
    pub fn start(hypervisor: &'h Hypervisor, name: &str, targets: &[&str], executor: MakeExecutor) -> Self {
        Self::start_with(hypervisor, name, (targets, &[]), Agent::Running, executor)
    }

    /// Starts a guest with this agent, and with disks that are added while it runs.
    pub fn start_with(
        hypervisor: &'h Hypervisor,
        name: &str,
        (targets, added): (&[&str], &[&str]),
        agent: Agent,
        executor: MakeExecutor,
    ) -> Self {
        let lab = Lab::new();
        let image = |target: &str| lab.disk(&format!("{target}.qcow2"));
        let first: Vec<(&str, PathBuf)> = targets.iter().map(|target| (*target, image(target))).collect();
        let later: Vec<(&str, PathBuf)> = added.iter().map(|target| (*target, image(target))).collect();
        let specs: Vec<VolumeSpec> =
            first.iter().chain(&later).map(|(target, image)| VolumeSpec::new(*target, image)).collect();
        let disks: Vec<(&str, &Path)> = first.iter().map(|(target, image)| (*target, image.as_path())).collect();
        let mut guest = Guest::define(hypervisor, name, agent, &disks);
        guest.boot();
        for (target, image) in &later {
            guest.hot_add(target, image);
        }
        let set = SnapshotSet::adopt(lab.path().join("vm.json"), &specs, &AdoptOptions::default()).unwrap();
        let set = set.with_executor(executor(hypervisor, name));
        guest.start_writer();
        guest.wait_for_records(specs.len() * 3);
        let (taken, files, kept) = (BTreeMap::new(), BTreeMap::new(), tempfile::tempdir().unwrap());
        let mut scene = Self { guest, set, lab, taken, reverted: (Records::new(), 0), files, kept };
        scene.number_files();
        scene
    }

    /// Takes a snapshot. It must hold all records that were fsynced before, on all disks up to the
    /// same moment.
    pub fn create(&mut self, name: &str, quiesce: bool) -> Report {
        let options = SnapshotOptions::default().with_quiesce(quiesce);
        let before = self.fsynced();
        let report = self.set.create(name, &options).unwrap_or_else(|error| panic!("create {name}: {error}"));
        self.taken(name, before);
        report
    }

    /// Checks a new snapshot and keeps its content. `before`: the records that were fsynced before
    /// it.
    fn taken(&mut self, name: &str, before: Records) {
        let mut last = Vec::new();
        for volume in self.volumes() {
            let image = self.set.snapshot_path(name, &volume).unwrap();
            let raw = self.kept(name, &volume);
            run("qemu-img", &["convert", "-U", "-O", "raw", text(&image), text(&raw)]);
            let content = Content::read(&image, &volume);
            content.assert_holds(before.get(&volume).into_iter().flatten().copied());
            last.extend(content.last());
        }
        let (low, high) = (last.iter().min().unwrap(), last.iter().max().unwrap());
        assert!(high - low <= 2 * last.len() as u64, "{name}: not at one instant: {last:?}");
        self.taken.insert(name.to_owned(), before);
        self.number_files();
    }

    /// Takes several snapshots.
    pub fn create_all(&mut self, names: &[&str], quiesce: bool) {
        for name in names {
            self.create(name, quiesce);
        }
    }

    /// Powers off, reverts, and boots.
    pub fn revert(&mut self, name: &str) -> Report {
        self.guest.power_off();
        let report = self.revert_stopped(name).unwrap_or_else(|error| panic!("revert {name}: {error}"));
        self.boot();
        report
    }

    /// Reverts without powering off.
    pub fn revert_stopped(&mut self, name: &str) -> Result<Report, Error> {
        let report = self.set.revert(name, &MergeOptions::default(), &())?;
        self.reverted = (self.taken[name].clone(), self.guest.records().len());
        self.number_files();
        Ok(report)
    }

    /// Deletes a snapshot.
    pub fn delete(&mut self, name: &str) -> Report {
        self.try_delete(name).unwrap_or_else(|error| panic!("delete {name}: {error}"))
    }

    /// Deletes a snapshot; it may fail.
    pub fn try_delete(&mut self, name: &str) -> Result<Report, Error> {
        self.set.delete(name, &MergeOptions::default(), &())
    }

    /// Changes the size of a volume, in MiB.
    pub fn resize(&mut self, volume: &str, mib: u64) -> Report {
        self.set.resize(volume, mib << 20, false).unwrap_or_else(|error| panic!("resize {volume}: {error}"))
    }

    /// Boots the guest on the active files, and starts its writer.
    pub fn boot(&mut self) {
        let images: Vec<(String, PathBuf)> = self.active().into_iter().collect();
        let disks: Vec<(&str, &Path)> = images.iter().map(|(name, image)| (name.as_str(), image.as_ref())).collect();
        self.guest.redefine(&disks);
        self.guest.boot();
        self.guest.start_writer();
    }

    /// Returns the fsynced records, without those that a revert discarded.
    pub fn fsynced(&self) -> Records {
        let (mut records, since) = (self.reverted.0.clone(), self.reverted.1);
        for record in self.guest.records().into_iter().skip(since) {
            records.entry(record.serial).or_default().insert(record.number);
        }
        records
    }

    /// Checks everything: the state of each volume, headers, domain, contents of snapshots, and
    /// files. The guest may run.
    pub fn check(&self, expected: &str) {
        assert_eq!(self.states(), vec![expected; self.files.len()]);
        let model = self.set.model().unwrap();
        let mut images = BTreeSet::new();
        for volume in &model.volumes {
            let active: Vec<PathBuf> =
                model.active_chain(volume).iter().map(|file| self.set.files().path(&file.path)).collect();
            assert_eq!(chain(&active[0]), active, "{}: headers", volume.name);
            // The definition of a domain that is off is changed by `boot`.
            if self.guest.runs() {
                assert_eq!(self.guest.images()[&volume.name], active[0], "{}: domblklist", volume.name);
            }
            images.extend(active);
            for snapshot in model.snapshots.values() {
                // A snapshot that is being merged may have lost its file of this volume.
                let Some(record) = snapshot.files.get(&volume.name) else { continue };
                let image = self.set.files().path(&record.file.path);
                if snapshot.state == State::Ready {
                    self.assert_unchanged(&snapshot.name, &volume.name, &image);
                }
                images.insert(image);
            }
        }
        assert_eq!(self.images(), images, "the files of the directory are the recorded ones");
        if self.guest.runs() {
            self.guest.assert_chains();
            // The writer continues.
            self.guest.wait_for_records(self.files.len());
        }
    }

    /// Powers off, and checks that every image is clean and every volume holds the fsynced records.
    pub fn end(mut self) {
        if self.guest.runs() {
            self.guest.stop_writer();
            self.guest.tell("verify");
            self.guest.power_off();
        }
        let fsynced = self.fsynced();
        for image in self.images() {
            run("qemu-img", &["check", "-q", text(&image)]);
        }
        for (volume, image) in self.active() {
            Content::read(&image, &volume).assert_holds(fsynced[&volume].iter().copied());
        }
    }

    /// Returns the state of each volume in the notation of the table.
    pub fn states(&self) -> Vec<String> {
        let model = self.set.model().unwrap();
        model.volumes.iter().map(|volume| state(&model, volume, &self.files[&volume.name])).collect()
    }

    /// Returns the volumes, which have the names of the disks.
    pub fn volumes(&self) -> Vec<String> {
        self.files.keys().cloned().collect()
    }

    fn active(&self) -> BTreeMap<String, PathBuf> {
        self.volumes().into_iter().map(|volume| (volume.clone(), self.set.active_path(&volume).unwrap())).collect()
    }

    /// Returns all files of the directory but the catalogue and its companions.
    fn images(&self) -> BTreeSet<PathBuf> {
        let catalogue = ["vm.json", "vm.json.lock", "vm.json.journal"].map(|name| self.lab.path().join(name));
        self.lab.files().into_iter().filter(|file| !catalogue.contains(file)).collect()
    }

    fn kept(&self, snapshot: &str, volume: &str) -> PathBuf {
        self.kept.path().join(format!("{snapshot}-{volume}"))
    }

    fn assert_unchanged(&self, snapshot: &str, volume: &str, image: &Path) {
        let kept = self.kept(snapshot, volume);
        run("qemu-img", &["compare", "-q", "-U", "-f", "raw", "-F", "qcow2", text(&kept), text(image)]);
    }

    fn number_files(&mut self) {
        for volume in self.set.model().unwrap().volumes {
            let files = self.files.entry(volume.name).or_default();
            if !files.contains(&volume.active.file.path) {
                files.push(volume.active.file.path);
            }
        }
    }
}
