//! The seam for names: open, create, rename, unlink, and the sync of a directory.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{LockMode, Result, Storage};

/// How a storage is opened by name.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Access {
    /// Whether it will be written.
    pub write: bool,
    /// Which of QEMU's image locks to take before anything is read.
    pub lock: LockMode,
    /// Where given, the name is resolved so that it cannot leave this directory: no absolute path, no `..` out of it,
    /// no symbolic link, no magic link.
    pub beneath: Option<PathBuf>,
}

impl Access {
    /// Reading only, with the locks that QEMU takes for a backing file.
    #[must_use]
    pub fn read() -> Self {
        Self { write: false, lock: LockMode::Read, beneath: None }
    }

    /// Reading and writing, with the locks that QEMU takes for a disk in use.
    #[must_use]
    pub fn write() -> Self {
        Self { write: true, lock: LockMode::Write, beneath: None }
    }

    /// The same with other locks.
    #[must_use]
    pub fn with_lock(mut self, lock: LockMode) -> Self {
        self.lock = lock;
        self
    }

    /// The same, kept beneath a directory.
    #[must_use]
    pub fn with_beneath(mut self, directory: impl Into<PathBuf>) -> Self {
        self.beneath = Some(directory.into());
        self
    }
}

/// Names of storages: a file system, or a test's model of one.
///
/// A name is durable only after [`Names::sync_dir`] of its directory; bytes only after [`Storage::sync`].
pub trait Names: Send + Sync + fmt::Debug {
    /// Opens an existing regular file or block device.
    ///
    /// # Errors
    /// [`super::Error::Io`] where it does not exist, [`super::Error::Busy`] where its locks are held,
    /// [`super::Error::Refused`] where it leaves `access.beneath` or is no regular file or block device.
    fn open(&self, path: &Path, access: &Access) -> Result<Arc<dyn Storage>>;

    /// Creates a new, empty file for writing, with a writer's locks.
    ///
    /// # Errors
    /// [`super::Error::Io`] where the name is taken.
    fn create_new(&self, path: &Path) -> Result<Arc<dyn Storage>>;

    /// Gives a file another name in one step, replacing what had it.
    ///
    /// # Errors
    /// [`super::Error::Io`].
    fn rename(&self, from: &Path, to: &Path) -> Result<()>;

    /// Takes a name away.
    ///
    /// # Errors
    /// [`super::Error::Io`].
    fn unlink(&self, path: &Path) -> Result<()>;

    /// Returns when the names in a directory are durable.
    ///
    /// # Errors
    /// [`super::Error::Io`].
    fn sync_dir(&self, directory: &Path) -> Result<()>;

    /// The names of the files in a directory, sorted.
    ///
    /// # Errors
    /// [`super::Error::Io`].
    fn list(&self, directory: &Path) -> Result<Vec<PathBuf>>;

    /// Whether a name exists.
    ///
    /// # Errors
    /// [`super::Error::Io`] where that cannot be told.
    fn exists(&self, path: &Path) -> Result<bool>;
}

/// The operating system's file names.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostNames;
