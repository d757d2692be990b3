//! A file system that records the paths that are opened.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use qcow2_chain::storage::{Access, Attributes, EntryKind, FileSystem, MemoryFileSystem, Resolved, Result, Storage};

/// A file system in memory that records every opened path and refuses changes.
#[derive(Debug, Default)]
pub struct WatchedFileSystem {
    /// The files.
    pub files: MemoryFileSystem,
    opened: Mutex<Vec<PathBuf>>,
}

impl WatchedFileSystem {
    /// Returns the paths that were opened, as they were given.
    pub fn opened(&self) -> Vec<PathBuf> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl FileSystem for WatchedFileSystem {
    fn open(&self, path: &Path, access: &Access) -> Result<Arc<dyn Storage>> {
        let storage = self.files.open(path, access)?;
        self.opened.lock().unwrap_or_else(PoisonError::into_inner).push(path.to_owned());
        Ok(storage)
    }

    fn create_new(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        panic!("{} is created", path.display());
    }

    fn create_new_like(&self, path: &Path, _model: &dyn Storage, _attributes: Attributes) -> Result<Arc<dyn Storage>> {
        panic!("{} is created", path.display());
    }

    fn check_create_like(&self, directory: &Path, model: &dyn Storage) -> Result<()> {
        self.files.check_create_like(directory, model)
    }

    fn rename(&self, from: &Path, _to: &Path) -> Result<()> {
        panic!("{} is renamed", from.display());
    }

    fn unlink(&self, path: &Path) -> Result<()> {
        panic!("{} is removed", path.display());
    }

    fn sync_dir(&self, directory: &Path) -> Result<()> {
        self.files.sync_dir(directory)
    }

    fn list(&self, directory: &Path) -> Result<Vec<PathBuf>> {
        self.files.list(directory)
    }

    fn exists(&self, path: &Path) -> Result<bool> {
        self.files.exists(path)
    }

    fn entry(&self, path: &Path) -> Result<EntryKind> {
        self.files.entry(path)
    }

    fn is_memory_backed(&self, directory: &Path) -> Result<bool> {
        self.files.is_memory_backed(directory)
    }

    fn resolve(&self, path: &Path) -> Result<Resolved> {
        self.files.resolve(path)
    }
}
