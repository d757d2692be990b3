//! Where images lie: the seam for bytes ([`Storage`]) and the seam for names ([`FileSystem`]).
//!
//! Nothing here knows qcow2. Everything above reaches bytes and names through these two traits only, so that an image can
//! lie on anything, and so that tests can record every write, sync and rename and replay any crash.
//!
//! | | what it is |
//! |---|---|
//! | [`FileStorage`] | a file or block device, with QEMU's image locks ([`LockMode`]) |
//! | [`MappedStorage`] | a file that nobody writes, mapped for reading |
//! | [`MemoryStorage`] | sparse memory; it can be limited or of fixed length, for tests |
//! | [`ReadOnlyStorage`] | any of them, for reading only |
//! | [`HostFileSystem`] | the operating system's names |
//! | [`MemoryFileSystem`] | names of [`MemoryStorage`]s |
//!
//! # A storage of one's own
//! Six methods make a [`Storage`]: [`name`](Storage::name), [`read_at`](Storage::read_at), [`write_at`](Storage::write_at),
//! [`len`](Storage::len), [`set_len`](Storage::set_len) and [`sync`](Storage::sync). What they must keep:
//!
//! - A read or a write is whole or an error. Reads past the end give zeroes and no error; writes past the end grow the
//!   storage, and the gap reads as zeroes. A medium that cannot grow says so by
//!   [`is_fixed_size`](Storage::is_fixed_size), answers a write past its end with [`Error::NoSpace`] and a change of its
//!   length with [`Error::Unsupported`].
//! - Any offset and any length may come, aligned or not. A medium with sectors reads, alters and writes by itself, so that no
//!   byte outside the range ever changes, in a crash neither.
//! - Methods come from many threads at once. A write is seen by every read that begins after it has returned. Two writes
//!   to the same bytes at once never happen; to neighbouring bytes they do.
//! - After `Ok` of `sync`, everything whose write had returned before is durable, its length included. After a failed
//!   `sync` the storage answers [`Error::Poisoned`] to every change for ever.
//! - After a failed write the bytes of its range may be old, new or mixed. No other byte has changed.
//! - [`Error::NoSpace`] is for what more room would cure: callers wait for it and try again.
//!
//! The methods with a default are for speed, for what only the medium knows, and for safety
//! ([`file_id`](Storage::file_id) finds loops in a chain, [`is_read_only`](Storage::is_read_only) refuses early).
//! A default is never wrong, only slow or without an answer.
//!
//! ```
//! use std::sync::Mutex;
//!
//! use qcow2_chain::storage::{Error, MemoryStorage, Result, Storage, zero_range};
//!
//! /// Tells how many bytes were written.
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
//! // It does not say that it can zero a range, so that zeroes are written.
//! assert!(matches!(storage.zero_range(0..100), Err(Error::Unsupported { .. })));
//! zero_range(&storage, (1 << 40)..(1 << 40) + 4)?;
//! let mut buf = [0; 6];
//! storage.read_at(&mut buf, 1 << 40)?;
//! assert_eq!(&buf, b"\0\0\0\0o\0");
//! assert_eq!(*storage.written.lock().unwrap(), 9);
//! # Ok::<(), Error>(())
//! ```
//!
//! # Names of one's own
//! [`FileSystem`] is to be implemented where images are opened by the names that other images hold, or where files are created,
//! swapped and removed. `open` takes the locks of [`Access::lock`] before a byte is read (or answers
//! [`Error::Unsupported`], if the medium has none and they were asked for), and keeps [`Access::beneath`] or refuses.
//! `rename` replaces its target in one step: after a crash the name leads to the old file or to the new one.

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

/// No file has a byte at or behind this offset: kernels count in signed 64 bits.
const MAX_LEN: u64 = i64::MAX.unsigned_abs();

/// What tells one file from another, whatever name it was reached by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "json", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "kebab-case"))]
pub struct FileId {
    /// The device, or a number for the memory that holds it.
    pub device: u64,
    /// The file's number on its device.
    pub inode: u64,
}

/// The metadata by which a change of a file is noticed that its content digest does not cover.
///
/// Two equal stamps prove nothing: file systems round times, and a program can set [`FileStamp::modified`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "json", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "kebab-case"))]
pub struct FileStamp {
    /// The file's number on its file system.
    pub inode: u64,
    /// The length, in bytes.
    pub len: u64,
    /// The time of the last change of the content, in nanoseconds since 1970 (UTC), saturating.
    pub modified: i64,
    /// The time of the last change of content or metadata, in nanoseconds since 1970 (UTC), saturating.
    pub changed: i64,
}

/// Returns the number of files that this process may still open, or `None` where that is unknown.
///
/// This is the soft limit of open descriptors minus those in use. Other threads can open files at any time, so that the
/// number is an estimate.
#[must_use]
pub fn descriptors_left() -> Option<u64> {
    sys::descriptors_left()
}

/// Bytes at positions: a file, a block device, memory, or whatever a caller has.
///
/// All methods take `&self` and may be called from many threads. Reads and writes are whole or an error, never short.
/// The methods with a default say that the storage cannot do it ([`Error::Unsupported`]); callers of these fall back.
pub trait Storage: Send + Sync + fmt::Debug {
    /// What error messages call it: usually the path.
    fn name(&self) -> &str;

    /// Fills `buf` from `offset`. Bytes past the end read as zeroes, as an image's tail may be a hole never written.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// Writes all of `buf` at `offset`, growing the storage where it ends before.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::NoSpace`], [`Error::ReadOnly`].
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()>;

    /// The length in bytes.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn len(&self) -> Result<u64>;

    /// Cuts or grows the storage; what is new reads as zeroes.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::NoSpace`], [`Error::ReadOnly`], [`Error::Unsupported`] on a container of fixed size.
    fn set_len(&self, len: u64) -> Result<()>;

    /// Returns when all that was written before is durable. After a failure nothing more is accepted: what the system
    /// still held may be lost, and no retry can tell.
    ///
    /// # Errors
    /// [`Error::Io`] once, then [`Error::Poisoned`].
    fn sync(&self) -> Result<()>;

    /// Whether the storage has no bytes.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Whether writes are refused.
    fn is_read_only(&self) -> bool {
        false
    }

    /// Whether the storage cannot grow by being written past its end (a block device, a volume).
    fn is_fixed_size(&self) -> bool {
        false
    }

    /// What tells this storage from others, if anything does.
    fn file_id(&self) -> Option<FileId> {
        None
    }

    /// Returns the stamp of the file behind this storage, or `None` for block devices and where there is none.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn stamp(&self) -> Result<Option<FileStamp>> {
        Ok(None)
    }

    /// Makes a range read as zeroes, keeping or giving back its blocks, and growing the storage where it ends before.
    ///
    /// # Errors
    /// [`Error::Unsupported`] by default; see [`zero_range`] for the fallback.
    fn zero_range(&self, _range: Range<u64>) -> Result<()> {
        Err(Error::unsupported(self.name(), "zeroing a range"))
    }

    /// Gives the blocks of a range back to the file system; it then reads as zeroes.
    ///
    /// # Errors
    /// [`Error::Unsupported`] by default.
    fn punch_range(&self, _range: Range<u64>) -> Result<()> {
        Err(Error::unsupported(self.name(), "punching a hole"))
    }

    /// Reserves blocks for a range, growing the storage where it ends before.
    ///
    /// # Errors
    /// [`Error::Unsupported`] by default.
    fn allocate_range(&self, _range: Range<u64>) -> Result<()> {
        Err(Error::unsupported(self.name(), "reserving blocks"))
    }

    /// Copies `len` bytes from `source` without passing them through this program, sharing blocks where the file system
    /// can. Returns how many were copied: less than `len` where `source` ends before.
    ///
    /// # Errors
    /// [`Error::Unsupported`] by default and where the two do not lie on one kernel.
    fn copy_from(&self, _source: &dyn Storage, _from: u64, _to: u64, _len: u64) -> Result<u64> {
        Err(Error::unsupported(self.name(), "copying in the kernel"))
    }

    /// Whether [`Storage::copy_from`] costs less than reading and writing: blocks are shared, or a server copies them.
    fn prefers_copy_from(&self, _source: &dyn Storage) -> bool {
        false
    }

    /// As [`Storage::write_at`], for much data that nobody is about to read: a storage may go around its cache.
    /// That pays for buffers that start at a multiple of 4096 in memory, of whole 4096 bytes, at such offsets.
    ///
    /// # Errors
    /// As [`Storage::write_at`].
    fn write_bulk_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.write_at(buf, offset)
    }

    /// Hears that a range is not about to be read or written again. What a cache holds of it may go: to the medium where
    /// that does not have it yet. Promises nothing, and orders nothing.
    fn will_not_need(&self, _range: Range<u64>) {}

    /// The first run of data at or behind `offset`, or `None` where only holes follow. A storage that does not know
    /// holes says that all is data.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>> {
        let len = self.len()?;
        Ok((offset < len).then_some(offset..len))
    }

    /// The bytes that the storage occupies on its medium, if known.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn allocated_len(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    /// The bytes that could still be written where this storage lies, if known.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn free_space(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    /// Changes the image locks that are held. Where the new ones cannot be had, the old ones were never let go.
    ///
    /// # Errors
    /// [`Error::Unsupported`] by default, [`Error::Busy`] where another program's locks forbid it.
    fn set_lock(&self, _wanted: LockMode) -> Result<()> {
        Err(Error::unsupported(self.name(), "changing image locks"))
    }

    /// The operating system's file behind this storage, for in-kernel copies and for what only it can do.
    fn as_file(&self) -> Option<&std::fs::File> {
        None
    }
}

/// The largest buffer of zeroes written at once where the storage cannot zero a range by itself.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Makes a range read as zeroes on any storage: by [`Storage::zero_range`] where it can, else by writing zeroes.
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

/// Writes zeroes as data over a range, so that its blocks are there.
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

    /// A storage with the required methods only. It notes where it was written.
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
    fn a_range_is_zeroed_by_writing_where_nothing_better_is_known() {
        let plain = Plain::default();
        plain.0.write_at(&vec![1; 150_000], 0).unwrap();
        zero_range(&plain, 10..140_010).unwrap();
        #[expect(clippy::reversed_empty_ranges, reason = "a caller's mistake writes nothing")]
        zero_range(&plain, 9..3).unwrap();
        let mut model = vec![1; 150_000];
        model[10..140_010].fill(0);
        assert_eq!(plain.0.to_vec(), model);
        assert_eq!(*plain.1.lock().unwrap(), [10..65_546, 65_546..131_082, 131_082..140_010]);
    }

    #[test]
    fn a_range_is_zeroed_by_the_storage_where_it_can() {
        let memory = MemoryStorage::with_bytes("m", [1; 8192]);
        zero_range(&memory, 0..8192).unwrap();
        assert_eq!(memory.allocated_len().unwrap(), Some(0));
        let full = MemoryStorage::fixed("m", 10);
        assert!(matches!(zero_range(&full, 5..11), Err(Error::NoSpace { .. })));
    }

    #[test]
    fn defaults_claim_nothing() {
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
    fn errors_keep_their_kind_for_callers_of_io() {
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
