//! The lock of a VM: one operation at a time. It is a lock of the operating system on a separate
//! file, and ends with the process that holds it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};

use crate::storage::{self, Access, FileSystem, Storage};
use crate::vm::{Refusal, Result};

/// Admits one operation on a VM. The lock of a killed process is released by the operating system.
/// The file is never removed: otherwise two processes could lock two files of the same name.
#[derive(Debug)]
pub(in crate::vm) struct VmLock {
    file_system: Arc<dyn FileSystem>,
    path: PathBuf,
    /// Excludes other threads if the file system's locks have no effect, as in memory.
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
    /// Creates the lock on the file at `path`. Opens nothing.
    pub(in crate::vm) fn new(file_system: Arc<dyn FileSystem>, path: PathBuf) -> Self {
        Self { file_system, path, inside: Mutex::default() }
    }

    /// Takes the lock, without waiting.
    ///
    /// # Errors
    /// [`Refusal::Locked`]: another operation holds it. Any error of opening the file.
    pub(in crate::vm) fn take(&self) -> Result<VmLockGuard<'_>> {
        let refused = || Refusal::Locked { path: self.path.display().to_string() };
        let inside = match self.inside.try_lock() {
            Ok(guard) => guard,
            // The state of an operation that panicked is in its journal, not in memory.
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

fn open_or_create(file_system: &dyn FileSystem, path: &Path) -> storage::Result<Arc<dyn Storage>> {
    let is = |error: &storage::Error, kind| matches!(error, storage::Error::Io { source, .. } if source.kind() == kind);
    match file_system.open(path, &Access::write()) {
        Err(error) if is(&error, io::ErrorKind::NotFound) => match file_system.create_new(path) {
            Err(error) if is(&error, io::ErrorKind::AlreadyExists) => file_system.open(path, &Access::write()),
            done => done,
        },
        done => done,
    }
}
