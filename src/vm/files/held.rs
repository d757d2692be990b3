//! The files that an operation holds locked.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{VolumeFiles, in_use};
use crate::storage::{self, Access, LockMode, Storage};
use crate::vm::{Refusal, Result};

/// Files that stay open and locked from the preflight to the end of an operation.
///
/// Each is opened once: a held file that is opened through [`VolumeFiles`] is the same handle,
/// since a second one would conflict with the lock of the first.
#[derive(Debug, Default)]
pub(in crate::vm) struct HeldFiles(Mutex<BTreeMap<PathBuf, Held>>);

#[derive(Clone, Debug)]
struct Held {
    storage: Arc<dyn Storage>,
    write: bool,
}

/// The result of holding a file.
#[derive(Debug)]
pub(in crate::vm) enum Hold {
    /// The file is locked and open for writing.
    Writable,
    /// The file is locked and open for reading: the reason why it may not be written.
    ReadOnly(String),
    /// Another program reads the file, so that only a reader's lock could be taken: that lock.
    Shared(String),
}

impl HeldFiles {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<PathBuf, Held>> {
        // A map of handles is consistent whenever its lock is free: no code that can panic runs
        // between two changes.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the handle of a held file. `None` if the file is not held; an error if it is to be
    /// written and is held for reading.
    pub(super) fn get(&self, path: &Path, write: bool) -> Option<storage::Result<Arc<dyn Storage>>> {
        let held = self.lock().get(path).cloned()?;
        if write && !held.write {
            return Some(Err(storage::Error::ReadOnly { name: path.display().to_string() }));
        }
        Some(Ok(held.storage))
    }

    /// Returns the handle of a held file, if it is held.
    pub(in crate::vm) fn storage(&self, path: &Path) -> Option<Arc<dyn Storage>> {
        self.lock().get(path).map(|held| Arc::clone(&held.storage))
    }

    /// Releases a file.
    pub(in crate::vm) fn release(&self, path: &Path) {
        self.lock().remove(path);
    }

    fn insert(&self, path: &Path, storage: Arc<dyn Storage>, write: bool) {
        self.lock().insert(path.to_owned(), Held { storage, write });
    }
}

impl VolumeFiles {
    /// Holds a file that the operation will write, relink or remove: no other program may use it
    /// until the operation ends.
    ///
    /// # Errors
    /// [`Refusal::InUse`]: another program writes it. Any error of opening it.
    pub(in crate::vm) fn hold(&self, recorded: &str) -> Result<Hold> {
        let path = self.path(recorded);
        if let Some(held) = self.held.get(&path, false) {
            held?;
            let writable = self.held.get(&path, true).is_some_and(|held| held.is_ok());
            return Ok(if writable { Hold::Writable } else { Hold::ReadOnly("it is open for reading".to_owned()) });
        }
        let denied = match self.file_system.open(&path, &Access::write()) {
            Ok(storage) => return Ok(self.keep(&path, storage)),
            Err(storage::Error::Busy { held, .. }) => return self.hold_shared(&path, held),
            Err(storage::Error::Io { source, .. }) if is_denied(&source) => source.to_string(),
            Err(error) => return Err(error.into()),
        };
        match self.file_system.open(&path, &Access::read().with_lock(LockMode::Write)) {
            Ok(storage) => {
                self.held.insert(&path, storage, false);
                Ok(Hold::ReadOnly(denied))
            }
            Err(storage::Error::Busy { held, .. }) => self.hold_shared(&path, held),
            Err(error) => Err(error.into()),
        }
    }

    /// Keeps a handle that is open for writing.
    fn keep(&self, path: &Path, storage: Arc<dyn Storage>) -> Hold {
        let read_only = is_read_only(&*storage);
        self.held.insert(path, storage, !read_only);
        if read_only { Hold::ReadOnly(READ_ONLY.to_owned()) } else { Hold::Writable }
    }

    /// Returns the reason why a file may not be written, without a lock: a running VM has it open.
    pub(in crate::vm) fn unwritable(&self, recorded: &str) -> Result<Option<String>> {
        match self.file_system.open(&self.path(recorded), &Access::write().with_lock(LockMode::None)) {
            Ok(storage) => Ok(is_read_only(&*storage).then(|| READ_ONLY.to_owned())),
            Err(storage::Error::Io { source, .. }) if is_denied(&source) => Ok(Some(source.to_string())),
            Err(error) => Err(error.into()),
        }
    }

    /// Holds a file that another program reads, if that is all that it does.
    fn hold_shared(&self, path: &Path, held: String) -> Result<Hold> {
        let storage = self.file_system.open(path, &Access::read()).map_err(in_use)?;
        self.held.insert(path, storage, false);
        Ok(Hold::Shared(held))
    }

    /// Refuses a file that another program writes.
    pub(in crate::vm) fn refuse_writer(&self, recorded: &str) -> Result<()> {
        let path = self.path(recorded);
        if self.held.storage(&path).is_some() {
            return Ok(());
        }
        match self.file_system.open(&path, &Access::read()) {
            Ok(_) => Ok(()),
            Err(storage::Error::Busy { name, held }) => Err(Refusal::InUse { path: name, held }.into()),
            Err(error) => Err(error.into()),
        }
    }
}

/// The reason why a file with a mode that forbids writing is not written.
const READ_ONLY: &str = "it is read-only";

/// Returns true if a file may not be written. A mode without any permission to write counts also
/// for a process that may override it.
fn is_read_only(storage: &dyn Storage) -> bool {
    let mode = storage.as_file().and_then(|file| file.metadata().ok()).map(|metadata| metadata.permissions());
    storage.is_read_only() || mode.is_some_and(|mode| mode.readonly())
}

fn is_denied(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem)
}
