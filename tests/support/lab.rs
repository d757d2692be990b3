//! A VM with small volumes on any file system, and the content that each snapshot and volume must have.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qcow2_chain::chain::{Chain, ChainOptions, Format, Policy};
use qcow2_chain::format::{ClusterBits, GuestOffset};
use qcow2_chain::image::{CheckOptions, CreateOptions, Image, check};
use qcow2_chain::storage::{Access, FileSystem, LockMode};
use qcow2_chain::vm::{
    AdoptOptions, Catalogue, Dependent, FileRef, Model, OverlayShape, SnapshotSet, State, Store as _, VolumeSpec,
};

use super::rng::Rng;

/// The content of volumes, by name.
pub type Contents = BTreeMap<String, Vec<u8>>;

/// A VM, and its expected contents.
#[derive(Debug)]
pub struct Lab {
    pub names: Arc<dyn FileSystem>,
    pub catalogue: PathBuf,
    pub set: SnapshotSet,
    /// The contents of the volumes at each listed snapshot, by its name.
    pub taken: BTreeMap<String, Contents>,
    /// The present contents of the volumes.
    pub now: Contents,
    /// The files in the directory that the set does not record, except for catalogue and journal.
    pub outside: Vec<PathBuf>,
}

/// The properties of a lab's images.
#[derive(Clone, Copy, Debug)]
pub struct LabShape {
    pub volumes: usize,
    pub size: u64,
    pub cluster_bits: u32,
    pub extended_l2: bool,
    /// If set, the first volume is a raw file at first.
    pub raw: bool,
}

impl Default for LabShape {
    fn default() -> Self {
        Self { volumes: 2, size: 24 << 10, cluster_bits: 9, extended_l2: false, raw: false }
    }
}

impl Lab {
    /// Creates a VM in a directory, whose volumes are full of random data.
    pub fn new(names: Arc<dyn FileSystem>, directory: &Path, shape: LabShape, rng: &mut Rng) -> Self {
        let bits = ClusterBits::new(shape.cluster_bits).expect("a size that QEMU takes");
        let overlay = OverlayShape { cluster_bits: shape.cluster_bits, extended_l2: shape.extended_l2 };
        let mut specs = Vec::new();
        let mut now = Contents::new();
        for number in 0..shape.volumes {
            let name = format!("vd{}", char::from(b'a' + u8::try_from(number).unwrap()));
            let path = directory.join(format!("{name}.img"));
            let content = rng.bytes(usize::try_from(shape.size).unwrap());
            let storage = names.create_new(&path).expect("a new file");
            let raw = shape.raw && number == 0;
            if raw {
                storage.write_at(&content, 0).expect("written");
                storage.sync().expect("synced");
            } else {
                let options =
                    CreateOptions::new(shape.size).with_cluster_bits(bits).with_extended_l2(shape.extended_l2);
                let image = Image::create(storage, &options).expect("an image");
                image.write_at(&content, GuestOffset::ZERO).expect("written");
                image.close().expect("closed");
            }
            let format = if raw { Format::Raw } else { Format::Qcow2 };
            specs.push(VolumeSpec::new(&name, path).with_format(format).with_overlay(overlay));
            now.insert(name, content);
        }
        names.sync_dir(directory).expect("synced");
        let catalogue = directory.join("vm.json");
        let set =
            SnapshotSet::adopt_in(Arc::clone(&names), &catalogue, &specs, &AdoptOptions::default()).expect("taken in");
        Self { names, catalogue, set, taken: BTreeMap::new(), now, outside: Vec::new() }
    }

    /// Returns a lab with these expectations on a file system with the same files.
    pub fn on(&self, names: Arc<dyn FileSystem>) -> Result<Self, String> {
        let set = SnapshotSet::load_in(Arc::clone(&names), &self.catalogue).map_err(|error| error.to_string())?;
        let set = set.with_jobs(1);
        let (catalogue, taken, now) = (self.catalogue.clone(), self.taken.clone(), self.now.clone());
        Ok(Self { names, catalogue, set, taken, now, outside: self.outside.clone() })
    }

    pub fn model(&self) -> Model {
        self.set.model().expect("the catalogue reads")
    }

    /// Replaces the catalogue.
    pub fn save(&self, model: &Model) {
        Catalogue::new(Arc::clone(&self.names), &self.catalogue).save(model).expect("saved");
    }

    /// Reads a recorded file through its backing files, by the headers alone.
    pub fn read_file(&self, file: &FileRef) -> Result<Vec<u8>, String> {
        read(&self.open_by_headers(&file.path, file.format, false)?)
    }

    /// Opens a volume's active file as QEMU does: by the headers alone.
    pub fn open_as_qemu(&self, volume: &str, writable: bool) -> Result<Chain, String> {
        let model = self.set.model().map_err(|error| error.to_string())?;
        let active = &model.volume(volume).ok_or("no such volume")?.active.file;
        self.open_by_headers(&active.path, active.format, writable)
    }

    fn open_by_headers(&self, path: &str, format: Format, writable: bool) -> Result<Chain, String> {
        let path = self.set.files().path(path);
        let options = ChainOptions::default().with_policy(Policy::Any).with_format(format);
        let options = options.with_writable(usize::from(writable));
        Chain::open_in(&self.names, &path, &options).map_err(|error| format!("{}: {error}", path.display()))
    }

    /// Writes random ranges of a volume, as its guest.
    pub fn write(&mut self, volume: &str, rng: &mut Rng) {
        let chain = self.open_as_qemu(volume, true).expect("the volume opens");
        let content = self.now.get_mut(volume).expect("a volume");
        for _ in 0..rng.within(1..4) {
            let range = rng.range(content.len() as u64, 512);
            let (at, len) = (GuestOffset::new(range.start), range.end - range.start);
            let part = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
            if rng.chance(1, 4) {
                chain.write_zeroes_at(at, len).expect("zeroed");
                content[part].fill(0);
            } else {
                let bytes = rng.bytes(part.len());
                chain.write_at(&bytes, at).expect("written");
                content[part].copy_from_slice(&bytes);
            }
        }
        chain.close().expect("closed");
    }

    pub fn write_all(&mut self, rng: &mut Rng) {
        for volume in self.now.keys().cloned().collect::<Vec<_>>() {
            self.write(&volume, rng);
        }
    }

    pub fn create(&mut self, name: &str) {
        self.set.create(name, &Default::default()).expect("created");
        self.taken.insert(name.to_owned(), self.now.clone());
    }

    pub fn revert(&mut self, name: &str) {
        self.set.revert(name, &Default::default(), &()).expect("reverted");
        self.now = self.taken[name].clone();
    }

    pub fn delete(&mut self, name: &str) {
        self.set.delete(name, &Default::default(), &()).expect("deleted");
        self.taken.remove(name);
    }

    pub fn resize(&mut self, volume: &str, size: u64) {
        self.set.resize(volume, size, true).expect("resized");
        self.now.get_mut(volume).expect("a volume").resize(usize::try_from(size).unwrap(), 0);
    }

    /// Checks that a VM could start: every path in the catalogue exists, and every volume has its content by the headers
    /// alone.
    pub fn can_start(&self, now: &Contents) -> Result<(), String> {
        let model = self.set.model().map_err(|error| error.to_string())?;
        for (_, _, record) in model.records() {
            let path = self.set.files().path(&record.file.path);
            if !self.names.exists(&path).map_err(|error| error.to_string())? {
                return Err(format!("{} is in the catalogue and does not exist", path.display()));
            }
        }
        for (volume, expected) in now {
            if read(&self.open_as_qemu(volume, false)?)? != *expected {
                return Err(format!("volume {volume} reads otherwise"));
            }
        }
        Ok(())
    }

    /// Checks contents, headers and directory, and that no image has corruptions or leaks.
    pub fn check(&self) -> Result<(), String> {
        self.check_against(self)?;
        self.check_files(true)
    }

    /// Checks that volumes, snapshots and directory are those of `expected`, and that records and headers agree.
    pub fn check_against(&self, expected: &Self) -> Result<(), String> {
        let taken = &expected.taken;
        self.can_start(&expected.now)?;
        let model = self.set.model().map_err(|error| error.to_string())?;
        let ready: Vec<_> = model.snapshots.values().filter(|s| s.state != State::Hidden).collect();
        if ready.iter().map(|s| &s.name).collect::<Vec<_>>() != sorted_by_id(&model, taken)? {
            return Err(format!("the snapshots are {:?}", ready.iter().map(|s| &s.name).collect::<Vec<_>>()));
        }
        for snapshot in ready {
            for (volume, expected) in &taken[&snapshot.name] {
                let chain = self.set.open(&snapshot.name, volume).map_err(|error| error.to_string())?;
                if read(&chain)? != *expected {
                    return Err(format!("{volume} of snapshot {} reads otherwise", snapshot.name));
                }
            }
        }
        if !model.overdue().is_empty() {
            return Err("a hidden snapshot is overdue".to_owned());
        }
        self.check_directory(&model, &expected.outside)
    }

    /// Checks that the directory has the recorded files and `outside`, and that the headers agree with the records.
    fn check_directory(&self, model: &Model, outside: &[PathBuf]) -> Result<(), String> {
        let directory = self.catalogue.parent().expect("a directory");
        let mut there: Vec<PathBuf> = self.names.list(directory).map_err(|error| error.to_string())?;
        let ours = |path: &PathBuf| path.file_name().is_none_or(|name| !name.to_string_lossy().starts_with("vm.json"));
        there.retain(ours);
        let mut recorded: Vec<PathBuf> = outside.to_vec();
        for (volume, on, record) in model.records() {
            recorded.push(self.set.files().path(&record.file.path));
            let chain = self.open_by_headers(&record.file.path, record.file.format, false)?;
            let below = model.files_from(on, volume);
            let found: Vec<_> = chain.layers()[1..].iter().map(|layer| layer.path.clone()).collect();
            let expected: Vec<_> = below.iter().map(|file| self.set.files().path(&file.path)).collect();
            if found != expected {
                return Err(format!("{} is backed by {found:?}, recorded is {expected:?}", record.file));
            }
        }
        recorded.sort();
        if there != recorded {
            return Err(format!("files {there:?}, recorded {recorded:?}"));
        }
        Ok(())
    }

    /// Checks that no recorded image has corruptions, nor leaks if `leaks` is set.
    pub fn check_files(&self, leaks: bool) -> Result<(), String> {
        let model = self.set.model().map_err(|error| error.to_string())?;
        for (_, _, record) in model.records().filter(|(_, _, record)| record.file.format == Format::Qcow2) {
            let path = self.set.files().path(&record.file.path);
            let storage =
                self.names.open(&path, &Access::read().with_lock(LockMode::None)).map_err(|e| e.to_string())?;
            let report = check(&*storage, &CheckOptions::default()).map_err(|error| error.to_string())?;
            if (report.corruptions, report.check_errors) != (0, 0) || (leaks && report.leaks > 0) {
                return Err(format!("{}: {report:?}", path.display()));
            }
        }
        Ok(())
    }

    /// Does a random operation, and returns its description.
    pub fn random_step(&mut self, rng: &mut Rng, number: usize) -> String {
        let known: Vec<String> = self.taken.keys().cloned().collect();
        match rng.within(0..10) {
            0..4 => {
                let name = format!("s{number}");
                self.create(&name);
                format!("create {name}")
            }
            4..6 if !known.is_empty() => {
                let name = rng.pick(&known);
                self.revert(&name);
                format!("revert {name}")
            }
            6..9 if !known.is_empty() => {
                let name = rng.pick(&known);
                self.delete(&name);
                format!("delete {name}")
            }
            _ => {
                let volume = rng.pick(&self.now.keys().cloned().collect::<Vec<_>>());
                let size = rng.within(20..60) * 512;
                self.resize(&volume, size);
                format!("resize {volume} {size}")
            }
        }
    }
}

/// Returns the names of the expected snapshots in the order of the model.
fn sorted_by_id<'a>(model: &'a Model, taken: &BTreeMap<String, Contents>) -> Result<Vec<&'a String>, String> {
    let names: Vec<_> = model.snapshots.values().filter(|s| taken.contains_key(&s.name)).map(|s| &s.name).collect();
    let distinct: std::collections::BTreeSet<_> = names.iter().collect();
    if distinct.len() == taken.len() { Ok(names) } else { Err(format!("snapshots are missing: {names:?}")) }
}

/// Reads a whole chain.
pub fn read(chain: &Chain) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0xee; usize::try_from(chain.virtual_size()).map_err(|error| error.to_string())?];
    chain.read_at(&mut bytes, GuestOffset::ZERO).map_err(|error| error.to_string())?;
    Ok(bytes)
}

/// Returns the names of a snapshot's dependents; `VOL` for the active files.
pub fn deps(model: &Model, name: &str) -> Vec<String> {
    let Some(snapshot) = model.snapshots.values().find(|snapshot| snapshot.name == name) else { return Vec::new() };
    let of = |dep: Dependent| match dep {
        Dependent::Volumes => "VOL".to_owned(),
        Dependent::Snapshot(id) => model.snapshots[&id].name.clone(),
    };
    model.deps(snapshot.id).into_iter().map(of).collect()
}
