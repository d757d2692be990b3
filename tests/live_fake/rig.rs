//! A VM under a fake hypervisor, with a model of the contents of its snapshots and disks.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use qcow2_chain::live::fake::{FakeHypervisor, Fault};
use qcow2_chain::live::{FailureKind, Hypervisor, HypervisorError, LiveExecutor, OnTimeout};
use qcow2_chain::storage::{FileSystem, MemoryFileSystem};
use qcow2_chain::vm::{
    Catalogue, ContentDigest, Error, Executor, Model, Report, Result, SnapshotSet, Store, VerifyOptions,
};

use crate::support::lab::{Contents, Lab, LabShape, read};
use crate::support::rng::{Rng, seed};

/// A VM with its snapshot set and its hypervisor.
pub struct Rig {
    pub lab: Lab,
    pub fake: Arc<FakeHypervisor>,
    pub rng: Rng,
}

impl Rig {
    /// A running VM with two disks of random data.
    pub fn new() -> Self {
        let rig = Self::off(Arc::new(MemoryFileSystem::new()), Path::new("/vm"), LabShape::default(), Rng::new(seed()));
        rig.fake.start().expect("started");
        rig
    }

    /// A VM that is off.
    pub fn off(names: Arc<dyn FileSystem>, directory: &Path, shape: LabShape, mut rng: Rng) -> Self {
        let lab = Lab::new(Arc::clone(&names), directory, shape, &mut rng);
        let path = |volume: &String| (volume.clone(), lab.set.active_path(volume).expect("a volume"));
        let fake = Arc::new(FakeHypervisor::new(names, lab.now.keys().map(path)));
        Self { lab, fake, rng }
    }

    pub fn volumes(&self) -> Vec<String> {
        self.lab.now.keys().cloned().collect()
    }

    /// The set as a new process opens it.
    pub fn set_with(&self, executor: Arc<dyn Executor>) -> SnapshotSet {
        let set = SnapshotSet::load_in(Arc::clone(&self.lab.names), &self.lab.catalogue).expect("the catalogue reads");
        set.with_executor(executor).with_jobs(1)
    }

    /// A set whose catalogue fails at the save of this number, before or after it saved.
    pub fn flaky_set(&self, executor: Arc<dyn Executor>, fails_at: u32, saved: bool) -> SnapshotSet {
        let (names, path) = (Arc::clone(&self.lab.names), &self.lab.catalogue);
        let catalogue = Catalogue::new(Arc::clone(&names), path);
        let store = Flaky { catalogue, saves: AtomicU32::new(0), fails_at, saved };
        SnapshotSet::with_store(names, path, Arc::new(store)).with_executor(executor).with_jobs(1)
    }

    pub fn set_over(&self, hypervisor: Arc<dyn Hypervisor>) -> SnapshotSet {
        self.set_with(Arc::new(LiveExecutor::new(hypervisor)))
    }

    pub fn set(&self) -> SnapshotSet {
        self.set_over(self.fake.clone())
    }

    /// A set with a time limit of ten seconds for a merge.
    pub fn hasty_set(&self, then: OnTimeout) -> SnapshotSet {
        self.set_with(Arc::new(LiveExecutor::new(self.fake.clone()).with_timeout(Duration::from_secs(10), then)))
    }

    /// Writes to all disks as the guest does.
    pub fn write_all(&mut self) {
        for volume in self.volumes() {
            write(&self.fake, &volume, self.lab.now.get_mut(&volume).unwrap(), &mut self.rng);
        }
    }

    pub fn create(&mut self, name: &str) {
        self.set().create(name, &Default::default()).expect("created");
        self.lab.taken.insert(name.to_owned(), self.lab.now.clone());
        self.write_all();
    }

    pub fn try_delete(&self, name: &str) -> Result<Report> {
        self.set().delete(name, &Default::default(), &())
    }

    /// The names of a disk's files by the hypervisor.
    pub fn chain(&self, volume: &str) -> Vec<String> {
        self.fake.files(volume).iter().map(|path| path.file_name().unwrap().to_string_lossy().into_owned()).collect()
    }

    /// The active file of a volume by the catalogue.
    pub fn active(&self, volume: &str) -> PathBuf {
        self.set().active_path(volume).expect("a volume")
    }

    /// The file of a volume above the file that a snapshot froze, towards the active file.
    pub fn overlay_of(&self, volume: &str, snapshot: &str) -> PathBuf {
        let model = self.lab.model();
        let id = model.find(snapshot).expect("a snapshot").id;
        let above = model.snapshots.values().find(|other| other.parent == Some(id));
        above.map_or_else(|| self.active(volume), |other| self.path(&other.files[volume].file.path))
    }

    /// Starts a VM that is off, with the files that the catalogue names.
    pub fn start(&self) {
        self.define();
        self.fake.start().expect("started");
    }

    /// Changes the definition as a manager does after an operation on a VM that is off.
    pub fn define(&self) {
        for volume in self.lab.model().volumes {
            self.fake.define(&volume.name, self.path(&volume.active.file.path)).expect("defined");
        }
    }

    /// Checks everything after the deletion of a snapshot.
    pub fn settled_without(&mut self, name: &str) {
        self.lab.taken.remove(name);
        self.settled();
    }

    /// No operation is pending; catalogue, headers, directory, hypervisor and contents agree.
    pub fn settled(&self) {
        self.check().unwrap_or_else(|wrong| panic!("{wrong}"));
    }

    pub fn check(&self) -> Result<(), String> {
        self.lab.check()?;
        self.check_against(&self.lab.now, true)
    }

    /// As [`Rig::check`], with other contents of the disks. `deep` reads all snapshots and checks
    /// all clusters.
    pub fn check_against(&self, now: &Contents, deep: bool) -> Result<(), String> {
        let said = |error: Error| error.to_string();
        let set = self.set();
        let found = set.verify(&VerifyOptions::default().with_deep(deep).with_digests(deep), &()).map_err(said)?;
        if !found.is_sound() {
            return Err(format!("{:?}", found.problems));
        }
        if deep {
            self.check_digests(&found.digests, now)?;
        }
        self.check_files(&set, now)
    }

    fn check_digests(&self, digests: &[ContentDigest], now: &Contents) -> Result<(), String> {
        let read: BTreeMap<_, _> = digests.iter().map(|one| ((one.snapshot.as_deref(), &*one.volume), one)).collect();
        let taken = self.lab.taken.iter().map(|(name, contents)| (Some(name.as_str()), contents));
        let mut expected = 0;
        for (snapshot, contents) in taken.chain([(None, now)]) {
            for (volume, content) in contents {
                expected += 1;
                let as_expected = read
                    .get(&(snapshot, volume))
                    .is_some_and(|one| (one.size, one.crc32) == (content.len() as u64, crc32fast::hash(content)));
                if !as_expected {
                    return Err(format!("{volume} of {snapshot:?} reads otherwise"));
                }
            }
        }
        if read.len() != expected {
            return Err(format!("{} contents, not {expected}", read.len()));
        }
        Ok(())
    }

    /// Compares the directory and the VM with the records.
    fn check_files(&self, set: &SnapshotSet, now: &Contents) -> Result<(), String> {
        let model = set.model().map_err(|error| error.to_string())?;
        let mut recorded: Vec<PathBuf> = model.records().map(|(_, _, record)| self.path(&record.file.path)).collect();
        recorded.extend([self.lab.catalogue.clone(), self.path("vm.json.lock")]);
        recorded.sort();
        let there = self.lab.names.list(self.lab.catalogue.parent().unwrap()).map_err(|error| error.to_string())?;
        if there != recorded {
            return Err(format!("files {there:?}, recorded {recorded:?}"));
        }
        for volume in &model.volumes {
            let name = &volume.name;
            if !self.fake.is_running() && read(&self.lab.open_as_qemu(name, false)?)? != now[name] {
                return Err(format!("{name} would read otherwise"));
            }
            let files = self.fake.files(name);
            let mut active: Vec<_> = model.active_chain(volume).iter().map(|file| self.path(&file.path)).collect();
            if !self.fake.is_running() {
                active.truncate(1);
            } else if self.fake.read(name, 0, now[name].len()).ok().as_ref() != Some(&now[name]) {
                return Err(format!("the VM reads {name} otherwise"));
            }
            if files != active {
                return Err(format!("{name}: the VM has {files:?}, the catalogue {active:?}"));
            }
            if self.fake.has_job(name) {
                return Err(format!("{name}: a job is left"));
            }
        }
        if self.fake.is_frozen() { Err("the guest is left frozen".to_owned()) } else { Ok(()) }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.lab.catalogue.with_file_name(name)
    }

    /// Every fault has occurred.
    pub fn assert_all_injected(&self) {
        assert_eq!(self.fake.pending_faults(), Vec::<Fault>::new());
    }
}

/// A catalogue that fails once, before or after it saved.
#[derive(Debug)]
pub struct Flaky {
    catalogue: Catalogue,
    saves: AtomicU32,
    fails_at: u32,
    saved: bool,
}

impl Store for Flaky {
    fn load(&self) -> Result<Model> {
        self.catalogue.load()
    }

    fn save(&self, model: &Model) -> Result<()> {
        let fails = self.saves.fetch_add(1, Ordering::SeqCst) == self.fails_at;
        if !fails || self.saved {
            self.catalogue.save(model)?;
        }
        let file = self.catalogue.path().display().to_string();
        if fails { Err(Error::Catalogue { file, why: "it could not be saved".to_owned() }) } else { Ok(()) }
    }

    fn settle(&self) -> Result<()> {
        self.catalogue.settle()
    }
}

/// The last component of a path.
pub fn name(path: &Path) -> String {
    path.file_name().expect("a name").to_string_lossy().into_owned()
}

/// Writes to a random range of a disk as the guest does.
pub fn write(fake: &FakeHypervisor, disk: &str, content: &mut [u8], rng: &mut Rng) {
    let range = rng.range(content.len() as u64, 512);
    let part = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
    let bytes = rng.bytes(part.len());
    fake.write(disk, range.start, &bytes).expect("written");
    content[part].copy_from_slice(&bytes);
}

/// The kind of the hypervisor's failure that caused an error.
pub fn kind(error: &Error) -> Option<FailureKind> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(at) = cause {
        if let Some(found) = at.downcast_ref::<HypervisorError>() {
            return Some(found.kind);
        }
        cause = at.source();
    }
    None
}

/// The cause of an incomplete operation, and the volumes that are done and left.
pub fn incomplete(error: Error) -> (Error, Vec<String>, Vec<String>) {
    match error {
        Error::Incomplete { source, done, left, .. } => (*source, done, left),
        other => panic!("not incomplete: {other:?}"),
    }
}
