//! A VM under a fake hypervisor, with a model of what its snapshots and disks must read as.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use qcow2_chain::live::fake::{FakeHypervisor, Turn};
use qcow2_chain::live::{FailureKind, Hypervisor, HypervisorError, Live, OnTimeout};
use qcow2_chain::storage::{MemoryNames, Names};
use qcow2_chain::vm::{Error, Executor, Report, Result, SnapshotSet, VerifyOptions};

use crate::support::lab::{Lab, LabShape};
use crate::support::rng::{Rng, seed};

/// The VM.
pub struct Rig {
    pub lab: Lab,
    pub fake: Arc<FakeHypervisor>,
    pub rng: Rng,
}

impl Rig {
    /// A running VM with two disks of noise.
    pub fn new() -> Self {
        let rig = Self::off(Arc::new(MemoryNames::new()), Path::new("/vm"), LabShape::default(), Rng::new(seed()));
        rig.fake.start().expect("started");
        rig
    }

    /// One that is off.
    pub fn off(names: Arc<dyn Names>, directory: &Path, shape: LabShape, mut rng: Rng) -> Self {
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

    pub fn set_over(&self, hypervisor: Arc<dyn Hypervisor>) -> SnapshotSet {
        self.set_with(Arc::new(Live::new(hypervisor)))
    }

    pub fn set(&self) -> SnapshotSet {
        self.set_over(self.fake.clone())
    }

    /// One that waits ten seconds for a merge.
    pub fn hasty_set(&self, then: OnTimeout) -> SnapshotSet {
        self.set_with(Arc::new(Live::new(self.fake.clone()).with_timeout(Duration::from_secs(10), then)))
    }

    /// The guest writes to all disks.
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

    /// The names of a disk's files as the hypervisor has them.
    pub fn chain(&self, volume: &str) -> Vec<String> {
        self.fake.files(volume).iter().map(|path| path.file_name().unwrap().to_string_lossy().into_owned()).collect()
    }

    /// Starts a VM that is off, with the files that the catalogue names.
    pub fn start(&self) {
        self.define();
        self.fake.start().expect("started");
    }

    /// What a manager does after a change to a VM that is off.
    pub fn define(&self) {
        for volume in self.volumes() {
            self.fake.define(&volume, self.lab.set.active_path(&volume).unwrap()).expect("defined");
        }
    }

    /// The snapshot is deleted, and so it must read.
    pub fn settled_without(&mut self, name: &str) {
        self.lab.taken.remove(name);
        self.settled();
    }

    /// Nothing is under way; catalogue, headers, directory, hypervisor and contents agree.
    pub fn settled(&self) {
        self.check().unwrap_or_else(|wrong| panic!("{wrong}"));
    }

    pub fn check(&self) -> Result<(), String> {
        self.check_against(&self.lab.now)
    }

    /// As [`Rig::check`], with other contents of the disks.
    pub fn check_against(&self, now: &crate::support::lab::Contents) -> Result<(), String> {
        let said = |error: Error| error.to_string();
        let set = self.set();
        let pending = set.pending().map_err(said)?;
        if pending.is_some() {
            return Err(format!("not settled: {pending:?}"));
        }
        let found = set.verify(&VerifyOptions::default().with_deep(true), &()).map_err(said)?;
        if !found.is_sound() {
            return Err(format!("{:?}", found.problems));
        }
        self.lab.check_against(&self.lab.taken, now)?;
        self.lab.check_files(true)?;
        for volume in self.volumes() {
            let active = set.active_path(&volume).map_err(said)?;
            if self.fake.files(&volume)[0] != active {
                return Err(format!("{volume}: the VM has {:?}, the catalogue {active:?}", self.fake.files(&volume)));
            }
            if self.fake.has_job(&volume) {
                return Err(format!("{volume}: a job is left"));
            }
        }
        if self.fake.is_frozen() { Err("the guest is left frozen".to_owned()) } else { Ok(()) }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.lab.catalogue.with_file_name(name)
    }

    /// Every turn was taken.
    pub fn all_played(&self) {
        assert_eq!(self.fake.unplayed(), Vec::<Turn>::new());
    }
}

/// The guest writes somewhere in a disk.
pub fn write(fake: &FakeHypervisor, disk: &str, content: &mut [u8], rng: &mut Rng) {
    let range = rng.range(content.len() as u64, 512);
    let part = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
    let bytes = rng.bytes(part.len());
    fake.write(disk, range.start, &bytes).expect("written");
    content[part].copy_from_slice(&bytes);
}

/// What kind of failure of the hypervisor is behind an error.
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

/// The cause of an incomplete operation, and its volumes done and left.
pub fn incomplete(error: Error) -> (Error, Vec<String>, Vec<String>) {
    match error {
        Error::Incomplete { source, done, left, .. } => (*source, done, left),
        other => panic!("not incomplete: {other:?}"),
    }
}
