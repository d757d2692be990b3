//! A file or block device.

use std::path::{Path, PathBuf};

use super::{Access, Result, Storage};

/// A regular file or block device with its image locks.
#[derive(Debug)]
pub struct FileStorage {
    _file: std::fs::File,
    _path: PathBuf,
}

/// OWNER: remove or make useful.
#[derive(Debug)]
pub struct OpenFile;

impl FileStorage {
    /// Opens an existing file.
    ///
    /// # Errors
    /// As [`super::Names::open`].
    pub fn open(_path: impl AsRef<Path>, _access: &Access) -> Result<Self> {
        todo!()
    }

    /// Creates a new file, which must not exist, with a writer's locks.
    ///
    /// # Errors
    /// As [`super::Names::create_new`].
    pub fn create_new(_path: impl AsRef<Path>) -> Result<Self> {
        todo!()
    }
}

impl Storage for FileStorage {
    fn name(&self) -> &str {
        todo!()
    }
    fn read_at(&self, _buf: &mut [u8], _offset: u64) -> Result<()> {
        todo!()
    }
    fn write_at(&self, _buf: &[u8], _offset: u64) -> Result<()> {
        todo!()
    }
    fn len(&self) -> Result<u64> {
        todo!()
    }
    fn set_len(&self, _len: u64) -> Result<()> {
        todo!()
    }
    fn sync(&self) -> Result<()> {
        todo!()
    }
}
