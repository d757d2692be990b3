//! Access to bytes ([`Storage`]) and to directories ([`FileSystem`]).
//!
//! This tier does not know qcow2. All other tiers access bytes and directories through these two
//! traits, so that an image can be stored on anything, and so that tests can record every write,
//! sync and rename and replay any crash.
//!
//! | type | use |
//! |---|---|
//! | [`FileStorage`] | a file or block device, with QEMU's image locks ([`LockMode`]) |
//! | [`MappedStorage`] | a file without writers, mapped for reading |
//! | [`MemoryStorage`] | sparse memory, optionally limited or of fixed length, for tests |
//! | [`ReadOnlyStorage`] | a read-only handle of any storage |
//! | [`HostFileSystem`] | the file systems of the operating system |
//! | [`MemoryFileSystem`] | a directory tree of [`MemoryStorage`]s |
//!
//! # Implementing a storage
//! A [`Storage`] needs six methods: [`name`](Storage::name), [`read_at`](Storage::read_at),
//! [`write_at`](Storage::write_at), [`len`](Storage::len), [`set_len`](Storage::set_len) and
//! [`sync`](Storage::sync). Their contract:
//!
//! - A read or write is complete or an error. Reads past the end give zeroes without an error.
//!   Writes past the end grow the storage, and the gap reads as zeroes. A medium that cannot grow
//!   returns `true` from [`is_fixed_size`](Storage::is_fixed_size), [`Error::NoSpace`] for a write
//!   past its end, and [`Error::Unsupported`] for a change of its length.
//! - Offsets and lengths need no alignment. A medium with sectors reads, modifies and writes them
//!   by itself. No byte outside of the range ever changes, not even by a crash.
//! - Methods are called from many threads at once. A read that begins after a write has returned
//!   sees the write. Concurrent writes never overlap, but may be adjacent.
//! - After `Ok` of `sync`, every write that had returned before is durable, including the length.
//!   After a failed `sync` the storage returns [`Error::Poisoned`] for every change.
//! - After a failed write the bytes of its range may be old, new or mixed. No other byte has
//!   changed.
//! - [`Error::NoSpace`] means that the operation can succeed when there is more space: callers wait
//!   and try again.
//!
//! The methods with a default serve speed, properties that only the medium knows, and safety
//! ([`file_id`](Storage::file_id) finds loops in a chain, [`is_read_only`](Storage::is_read_only)
//! refuses early). Every default is correct, but may be slow or return no information.
//!
//! ```
//! use std::sync::Mutex;
//!
//! use qcow2_chain::storage::{Error, MemoryStorage, Result, Storage, zero_range};
//!
//! /// Counts the bytes that are written.
//! #[derive(Debug)]
//! struct Counting<S> {
//!     inner: S,
//!     written: Mutex<u64>,
//! }
//!
//! impl<S: Storage> Storage for Counting<S> {
//!     fn name(&self) -> &str {
//!         self.inner.name()
//!     }
//!     fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
//!         self.inner.read_at(buf, offset)
//!     }
//!     fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
//!         self.inner.write_at(buf, offset)?;
//!         *self.written.lock().unwrap() += buf.len() as u64;
//!         Ok(())
//!     }
//!     fn len(&self) -> Result<u64> {
//!         self.inner.len()
//!     }
//!     fn set_len(&self, len: u64) -> Result<()> {
//!         self.inner.set_len(len)
//!     }
//!     fn sync(&self) -> Result<()> {
//!         self.inner.sync()
//!     }
//! }
//!
//! let storage = Counting { inner: MemoryStorage::new("disk"), written: Mutex::new(0) };
//! storage.write_at(b"hello", 1 << 40)?;
//! // It has no method to zero a range, so that zeroes are written.
//! assert!(matches!(storage.zero_range(0..100), Err(Error::Unsupported { .. })));
//! zero_range(&storage, (1 << 40)..(1 << 40) + 4)?;
//! let mut buf = [0; 6];
//! storage.read_at(&mut buf, 1 << 40)?;
//! assert_eq!(&buf, b"\0\0\0\0o\0");
//! assert_eq!(*storage.written.lock().unwrap(), 9);
//! # Ok::<(), Error>(())
//! ```
//!
//! # Implementing a file system
//! A [`FileSystem`] is needed to open images by the names in other images, and to create, rename
//! and remove files. `open` takes the locks of [`Access::lock`] before a byte is read, or returns
//! [`Error::Unsupported`] if the medium has no locks. It enforces [`Access::beneath`] or refuses.
//! `rename` replaces its target in one step: after a crash the name leads to the old file or to the
//! new one.

#[cfg(unix)]
mod attributes;
mod beneath;
#[cfg(feature = "test-utils")]
pub mod crash;
mod error;
#[cfg(feature = "test-utils")]
pub mod fault;
mod file;
mod file_system;
mod lock;
mod map;
mod memory;
mod memory_file_system;
mod read_only;
mod sys;
mod whole;

use std::fmt;
use std::ops::Range;

pub use error::{Error, Result};
pub use file::FileStorage;
pub use file_system::{Access, Attributes, EntryKind, FileSystem, HostFileSystem, ListedFile, Resolved};
pub use lock::{LockMode, Permission};
pub use map::MappedStorage;
pub use memory::MemoryStorage;
pub use memory_file_system::MemoryFileSystem;
pub use read_only::ReadOnlyStorage;

/// The largest length of a file, in bytes: kernels use signed 64-bit offsets.
const MAX_LEN: u64 = i64::MAX.unsigned_abs();

/// The identity of a file, independent of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "json", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "kebab-case"))]
pub struct FileId {
    /// The device number, or a constant for files in memory.
    pub device: u64,
    /// The file's number on its device.
    pub inode: u64,
}

/// The metadata by which a change of a file is noticed that its content digest does not cover.
///
/// Two equal stamps prove nothing: file systems round times, and a program can set
/// [`FileStamp::modified`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "json", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "kebab-case"))]
pub struct FileStamp {
    /// The file's number on its file system.
    pub inode: u64,
    /// The length, in bytes.
    pub len: u64,
    /// The time of the last change of the content, in nanoseconds since 1970 (UTC), saturating.
    pub modified: i64,
    /// The time of the last change of content or metadata, in nanoseconds since 1970 (UTC),
    /// saturating.
    pub changed: i64,
}

/// Returns the number of files that this process may still open, or `None` where that is unknown.
///
/// This is the soft limit of open descriptors minus those in use. Other threads can open files at
/// any time, so that the number is an estimate.
#[must_use]
pub fn descriptors_left() -> Option<u64> {
    sys::descriptors_left()
}

/// Bytes at offsets: a file, a block device, memory, or an implementation of the caller.
///
/// All methods take `&self` and may be called from many threads. Reads and writes are complete or
/// an error, never short. By default, optional operations return [`Error::Unsupported`], and
/// callers use a fallback.
pub trait Storage: Send + Sync + fmt::Debug {
    /// Returns the name for error messages, usually the path.
    fn name(&self) -> &str;

    /// Fills `buf` from `offset`. Bytes past the end read as zeroes, because the tail of an image
    /// may never have been written.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// Writes all of `buf` at `offset`. The storage grows if it ends earlier.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::NoSpace`], [`Error::ReadOnly`].
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()>;

    /// Returns the length, in bytes.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn len(&self) -> Result<u64>;

    /// Truncates or extends the storage. Added bytes read as zeroes.
    ///
    /// # Errors
    /// - [`Error::Io`], [`Error::NoSpace`], [`Error::ReadOnly`].
    /// - [`Error::Unsupported`]: the storage has a fixed size.
    fn set_len(&self, len: u64) -> Result<()>;

    /// Makes all earlier writes durable. After a failure the storage refuses all changes: the
    /// system may have discarded data, and a retry would not report it.
    ///
    /// # Errors
    /// [`Error::Io`] for the failure, [`Error::Poisoned`] from then on.
    fn sync(&self) -> Result<()>;

    /// Returns `true` if the length is 0.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Returns `true` if the storage refuses writes.
    fn is_read_only(&self) -> bool {
        false
    }

    /// Returns `true` if writes past the end cannot grow the storage (a block device).
    fn is_fixed_size(&self) -> bool {
        false
    }

    /// Returns the identity of the file behind this storage, if there is one.
    fn file_id(&self) -> Option<FileId> {
        None
    }

    /// Returns the stamp of the file behind this storage, or `None` for block devices and where
    /// there is none.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn stamp(&self) -> Result<Option<FileStamp>> {
        Ok(None)
    }

    /// Makes a range read as zeroes, and keeps or releases its blocks. The storage grows if it ends
    /// earlier.
    ///
    /// # Errors
    /// - [`Error::Unsupported`] by default. [`zero_range`] is the fallback.
    /// - As [`Storage::write_at`].
    fn zero_range(&self, _range: Range<u64>) -> Result<()> {
        Err(Error::unsupported(self.name(), "zeroing a range"))
    }

    /// Releases the blocks of a range, which then reads as zeroes.
    ///
    /// # Errors
    /// [`Error::Unsupported`] by default.
    fn punch_range(&self, _range: Range<u64>) -> Result<()> {
        Err(Error::unsupported(self.name(), "punching a hole"))
    }

    /// Reserves blocks for a range. The storage grows if it ends earlier.
    ///
    /// # Errors
    /// [`Error::Unsupported`] by default.
    fn allocate_range(&self, _range: Range<u64>) -> Result<()> {
        Err(Error::unsupported(self.name(), "reserving blocks"))
    }

    /// Copies `len` bytes from `source` within the kernel, and shares blocks where the file system
    /// can. Returns the bytes copied, which are fewer than `len` if `source` ends earlier.
    ///
    /// # Errors
    /// - [`Error::Unsupported`]: one of the two has no file of this kernel. This is the default.
    /// - As [`Storage::write_at`].
    fn copy_from(&self, _source: &dyn Storage, _from: u64, _to: u64, _len: u64) -> Result<u64> {
        Err(Error::unsupported(self.name(), "copying in the kernel"))
    }

    /// Returns `true` if [`Storage::copy_from`] is cheaper than reading and writing: blocks are
    /// shared, or a server copies them.
    fn prefers_copy_from(&self, _source: &dyn Storage) -> bool {
        false
    }

    /// Writes as [`Storage::write_at`] does, for large data that is not read soon: a storage may
    /// bypass its cache. This takes effect if memory address, length and offset are multiples of
    /// 4096 bytes.
    ///
    /// # Errors
    /// As [`Storage::write_at`].
    fn write_bulk_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.write_at(buf, offset)
    }

    /// Advises the storage that a range is not read or written soon. A cache may write it out and
    /// drop it. This is no barrier.
    fn will_not_need(&self, _range: Range<u64>) {}

    /// Returns the first run of data at or behind `offset`, or `None` if only holes follow. A
    /// storage without knowledge of holes returns all as data.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>> {
        let len = self.len()?;
        Ok((offset < len).then_some(offset..len))
    }

    /// Returns the bytes that the storage occupies on its medium, if known.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn allocated_len(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    /// Returns the free bytes on the medium of the storage, if known.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn free_space(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    /// Changes the image locks that are held. If the new locks cannot be taken, the old ones are
    /// kept throughout.
    ///
    /// # Errors
    /// - [`Error::Unsupported`] by default.
    /// - [`Error::Busy`]: another program's locks forbid it.
    fn set_lock(&self, _wanted: LockMode) -> Result<()> {
        Err(Error::unsupported(self.name(), "changing image locks"))
    }

    /// Returns the file of the operating system behind this storage, for copies within the kernel
    /// and for access rights.
    fn as_file(&self) -> Option<&std::fs::File> {
        None
    }
}

/// The zeroes that one call writes where the storage cannot zero a range by itself.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Makes a range read as zeroes on any storage: by [`Storage::zero_range`] if supported, or by
/// writing zeroes.
///
/// # Errors
/// As [`Storage::write_at`].
pub fn zero_range(storage: &dyn Storage, range: Range<u64>) -> Result<()> {
    match storage.zero_range(range.clone()) {
        Err(Error::Unsupported { .. }) => {}
        done => return done,
    }
    write_zeroes(storage, range)
}

/// Writes zeroes as data over a range, so that its blocks are allocated.
///
/// # Errors
/// As [`Storage::write_at`].
pub fn write_zeroes(storage: &dyn Storage, range: Range<u64>) -> Result<()> {
    let mut at = range.start;
    while at < range.end {
        let len = usize::try_from(range.end - at).unwrap_or(usize::MAX).min(ZEROES.len());
        storage.write_at(&ZEROES[..len], at)?;
        at += len as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// A storage with the required methods only, which records the ranges that are written.
    #[derive(Debug, Default)]
    struct Plain(MemoryStorage, Mutex<Vec<Range<u64>>>);

    impl Storage for Plain {
        fn name(&self) -> &'static str {
            "plain"
        }
        fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
            self.0.read_at(buf, offset)
        }
        fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
            self.1.lock().unwrap().push(offset..offset + buf.len() as u64);
            self.0.write_at(buf, offset)
        }
        fn len(&self) -> Result<u64> {
            self.0.len()
        }
        fn set_len(&self, len: u64) -> Result<()> {
            self.0.set_len(len)
        }
        fn sync(&self) -> Result<()> {
            self.0.sync()
        }
    }

    #[test]
    fn zero_range_falls_back_to_writing_zeroes() {
        let plain = Plain::default();
        plain.0.write_at(&vec![1; 150_000], 0).unwrap();
        zero_range(&plain, 10..140_010).unwrap();
        #[expect(clippy::reversed_empty_ranges, reason = "a reversed range writes nothing")]
        zero_range(&plain, 9..3).unwrap();
        let mut model = vec![1; 150_000];
        model[10..140_010].fill(0);
        assert_eq!(plain.0.to_vec(), model);
        assert_eq!(*plain.1.lock().unwrap(), [10..65_546, 65_546..131_082, 131_082..140_010]);
    }

    #[test]
    fn zero_range_uses_the_storage_where_supported() {
        let memory = MemoryStorage::with_bytes("m", [1; 8192]);
        zero_range(&memory, 0..8192).unwrap();
        assert_eq!(memory.allocated_len().unwrap(), Some(0));
        let full = MemoryStorage::fixed("m", 10);
        assert!(matches!(zero_range(&full, 5..11), Err(Error::NoSpace { .. })));
    }

    #[test]
    fn storage_defaults_return_no_information() {
        let plain = Plain::default();
        plain.write_at(b"hello", 0).unwrap();
        assert!(!plain.is_empty().unwrap() && !plain.is_read_only() && !plain.is_fixed_size());
        assert_eq!((plain.file_id(), plain.allocated_len().unwrap(), plain.free_space().unwrap()), (None, None, None));
        assert_eq!((plain.next_data(2).unwrap(), plain.next_data(5).unwrap()), (Some(2..5), None));
        assert!(plain.as_file().is_none());
        let refused = [
            plain.zero_range(0..1),
            plain.punch_range(0..1),
            plain.allocate_range(0..1),
            plain.copy_from(&MemoryStorage::new("m"), 0, 0, 1).map(|_| ()),
            plain.set_lock(LockMode::None),
        ];
        for result in refused {
            assert!(matches!(result, Err(Error::Unsupported { .. })), "{result:?}");
        }
    }

    #[test]
    fn error_converts_to_io_error_of_its_kind() {
        use std::io::{Error as IoError, ErrorKind};
        let io = |kind: ErrorKind| Error::io("disk", "write 5 bytes at offset 7", 5, kind.into());
        for kind in [ErrorKind::StorageFull, ErrorKind::QuotaExceeded, ErrorKind::FileTooLarge] {
            assert!(matches!(io(kind), Error::NoSpace { need: 5, .. }));
        }
        let error = io(ErrorKind::PermissionDenied);
        assert_eq!(error.to_string(), "disk: cannot write 5 bytes at offset 7");
        assert!(std::error::Error::source(&error).is_some());
        let error = IoError::from(error);
        assert_eq!(error.kind(), ErrorKind::PermissionDenied);
        assert_eq!(error.to_string(), "disk: cannot write 5 bytes at offset 7");
        let name = || "disk".to_owned();
        for (error, kind) in [
            (io(ErrorKind::StorageFull), ErrorKind::StorageFull),
            (Error::Busy { name: name(), held: name() }, ErrorKind::ResourceBusy),
            (Error::ReadOnly { name: name() }, ErrorKind::ReadOnlyFilesystem),
            (Error::unsupported("disk", "x"), ErrorKind::Unsupported),
            (Error::Refused { name: name(), why: name() }, ErrorKind::PermissionDenied),
            (Error::Poisoned { name: name() }, ErrorKind::Other),
        ] {
            assert_eq!(IoError::from(error).kind(), kind);
        }
    }
}
