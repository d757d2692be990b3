//! One operation on a VM at a time: an OS lock on a file of its own, which ends with the process that holds it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};

use crate::storage::{self, Access, FileSystem, Storage};
use crate::vm::{Refusal, Result};

/// Lets one operation on a VM in. Nobody has to clean up behind a process that was killed: its lock is gone with it. The file
/// stays, as two processes could otherwise lock two files of one name.
#[derive(Debug)]
pub(in crate::vm) struct VmLock {
    file_system: Arc<dyn FileSystem>,
    path: PathBuf,
    /// For names whose locks lock nothing, such as those in memory.
    inside: Mutex<()>,
}

/// The right to operate on a VM.
#[must_use = "the lock ends with its guard"]
#[derive(Debug)]
pub(in crate::vm) struct VmLockGuard<'a> {
    _inside: MutexGuard<'a, ()>,
    _file: Arc<dyn Storage>,
}

impl VmLock {
    pub(in crate::vm) fn new(file_system: Arc<dyn FileSystem>, path: PathBuf) -> Self {
        Self { file_system, path, inside: Mutex::default() }
    }

    /// Takes the lock or is refused; does not wait.
    pub(in crate::vm) fn take(&self) -> Result<VmLockGuard<'_>> {
        let refused = || Refusal::Locked { path: self.path.display().to_string() };
        let inside = match self.inside.try_lock() {
            Ok(guard) => guard,
            // Whoever panicked left everything on disk, where the journal tells of it.
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(refused().into()),
        };
        match open_or_create(&*self.file_system, &self.path) {
            Ok(file) => Ok(VmLockGuard { _inside: inside, _file: file }),
            Err(storage::Error::Busy { .. }) => Err(refused().into()),
            Err(error) => Err(error.into()),
        }
    }
}

fn open_or_create(names: &dyn FileSystem, path: &Path) -> storage::Result<Arc<dyn Storage>> {
    let is = |error: &storage::Error, kind| matches!(error, storage::Error::Io { source, .. } if source.kind() == kind);
    match names.open(path, &Access::write()) {
        Err(error) if is(&error, io::ErrorKind::NotFound) => match names.create_new(path) {
            Err(error) if is(&error, io::ErrorKind::AlreadyExists) => names.open(path, &Access::write()),
            done => done,
        },
        done => done,
    }
}
