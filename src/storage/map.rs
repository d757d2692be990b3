//! A read-only memory map of a file: the only unsafe code of the default library.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use memmap2::{Mmap, MmapOptions};

use super::{Access, Error, FileId, FileStamp, FileStorage, LockMode, Result, Storage};

/// A file that is mapped for reading: each read copies from the page cache, without a system call.
///
/// The file must not be written while it is mapped. [`LockMode::Read`] is held during the life of
/// the map to ensure it. If a program ignores QEMU's locks and **truncates the file**, a read of
/// the lost pages ends this process with `SIGBUS`, and so does a read error of the medium. Where
/// that risk is not acceptable, use [`FileStorage`], which returns zeroes or an error.
#[derive(Debug)]
pub struct MappedStorage {
    file: FileStorage,
    /// `None` for an empty file, which cannot be mapped.
    map: Option<Mmap>,
}

impl MappedStorage {
    /// Opens and maps an existing file. Data that is appended to it later reads as zeroes.
    ///
    /// # Errors
    /// - As [`super::FileSystem::open`].
    /// - [`Error::Refused`]: `access` is not for reading with [`LockMode::Read`].
    /// - [`Error::Unsupported`]: the platform has no image locks, or the file does not fit into the
    ///   address space.
    pub fn open(path: impl AsRef<Path>, access: &Access) -> Result<Self> {
        if access.write || access.lock != LockMode::Read {
            return Err(Error::Refused {
                name: path.as_ref().display().to_string(),
                why: "only a file that nobody writes is mapped: reading, under a reader's locks".to_owned(),
            });
        }
        let file = FileStorage::open(path, access)?;
        let len = file.len()?;
        let map = match usize::try_from(len) {
            Ok(0) => None,
            Ok(len) if isize::try_from(len).is_ok() => Some(map(&file, len)?),
            _ => return Err(Error::unsupported(file.name(), format!("mapping {len} bytes"))),
        };
        Ok(Self { file, map })
    }
}

#[expect(unsafe_code, reason = "mapping a file is unsafe by nature, see the argument below")]
fn map(file: &FileStorage, len: usize) -> Result<Mmap> {
    let handle = file.as_file().ok_or_else(|| Error::unsupported(file.name(), "mapping"))?;
    // SAFETY: The bytes behind a `&[u8]` must not change or vanish. They do not while every writer
    // honours QEMU's locks: `MappedStorage` holds a reader's locks, which forbid writes and changes
    // of length to others, until the map is dropped. No slice of the map leaves this file:
    // `read_at` copies bytes, of which every value is valid. A writer that ignores the locks can
    // cause mixed bytes, as with `read`, or SIGBUS by truncating the file, which is documented on
    // `MappedStorage`.
    unsafe { MmapOptions::new().len(len).map(handle) }
        .map_err(|error| Error::io(file.name(), format!("map {len} bytes"), 0, error))
}

impl Storage for MappedStorage {
    fn name(&self) -> &str {
        self.file.name()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let bytes = self.map.as_deref().unwrap_or_default();
        let rest = usize::try_from(offset).ok().and_then(|at| bytes.get(at..)).unwrap_or_default();
        let have = rest.len().min(buf.len());
        buf[..have].copy_from_slice(&rest[..have]);
        buf[have..].fill(0);
        Ok(())
    }

    fn write_at(&self, _buf: &[u8], _offset: u64) -> Result<()> {
        Err(Error::ReadOnly { name: self.name().to_owned() })
    }

    /// Returns the length at the time of mapping.
    fn len(&self) -> Result<u64> {
        Ok(self.map.as_ref().map_or(0, |map| map.len() as u64))
    }

    fn set_len(&self, _len: u64) -> Result<()> {
        Err(Error::ReadOnly { name: self.name().to_owned() })
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn is_fixed_size(&self) -> bool {
        self.file.is_fixed_size()
    }

    fn file_id(&self) -> Option<FileId> {
        self.file.file_id()
    }

    fn stamp(&self) -> Result<Option<FileStamp>> {
        self.file.stamp()
    }

    fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>> {
        self.file.next_data(offset)
    }

    fn allocated_len(&self) -> Result<Option<u64>> {
        self.file.allocated_len()
    }

    fn free_space(&self) -> Result<Option<u64>> {
        self.file.free_space()
    }

    fn as_file(&self) -> Option<&File> {
        self.file.as_file()
    }
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;

    #[test]
    fn map_reads_as_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        std::fs::write(&path, b"0123456789").unwrap();
        let map = MappedStorage::open(&path, &Access::read()).unwrap();
        let mut buf = [0xee; 6];
        map.read_at(&mut buf, 7).unwrap();
        assert_eq!(&buf, b"789\0\0\0");
        for offset in [10, 11, u64::MAX] {
            map.read_at(&mut buf, offset).unwrap();
            assert_eq!(buf, [0; 6]);
        }
        assert_eq!(map.len().unwrap(), 10);
        assert!(map.is_read_only() && !map.is_fixed_size());
        assert!(matches!(map.write_at(b"x", 0), Err(Error::ReadOnly { .. })));
        assert!(matches!(map.set_len(0), Err(Error::ReadOnly { .. })));
        assert!(matches!(map.zero_range(0..1), Err(Error::Unsupported { .. })));
        map.sync().unwrap();
        assert_eq!(map.next_data(4).unwrap(), Some(4..10));
        assert!(map.allocated_len().unwrap().is_some() && map.free_space().unwrap().is_some());
        assert!(map.file_id().is_some() && map.as_file().is_some());
    }

    #[test]
    fn map_of_empty_file_is_empty() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        std::fs::write(&path, b"").unwrap();
        let map = MappedStorage::open(&path, &Access::read()).unwrap();
        let mut buf = [0xee; 2];
        map.read_at(&mut buf, 0).unwrap();
        assert_eq!((buf, map.is_empty().unwrap()), ([0; 2], true));
    }

    #[test]
    fn map_excludes_writers() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        std::fs::write(&path, b"0123456789").unwrap();
        for access in [Access::write(), Access::read().with_lock(LockMode::None)] {
            assert!(matches!(MappedStorage::open(&path, &access), Err(Error::Refused { .. })));
        }
        let map = MappedStorage::open(&path, &Access::read()).unwrap();
        assert!(matches!(FileStorage::open(&path, &Access::write()), Err(Error::Busy { .. })));
        drop(map);
        let writer = FileStorage::open(&path, &Access::write()).unwrap();
        assert!(matches!(MappedStorage::open(&path, &Access::read()), Err(Error::Busy { .. })));
        drop(writer);
    }
}
