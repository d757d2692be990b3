//! Where images lie: the seam for bytes ([`Storage`]) and the seam for names ([`Names`]).
//!
//! Nothing here knows qcow2. Everything above reaches bytes and names through these two traits only, so that an image can
//! lie on anything, and so that tests can record every write, sync and rename and replay any crash.

mod beneath;
#[cfg(feature = "test-utils")]
pub mod crash;
mod error;
mod file;
mod lock;
mod map;
mod memory;
mod memory_names;
mod names;
mod read_only;
mod sys;

use std::fmt;
use std::ops::Range;

pub use error::{Error, Result};
pub use file::FileStorage;
pub use lock::{LockMode, Permission};
pub use map::MappedStorage;
pub use memory::MemoryStorage;
pub use memory_names::MemoryNames;
pub use names::{Access, HostNames, Names, Resolved};
pub use read_only::ReadOnlyStorage;

/// No file has a byte at or behind this offset: kernels count in signed 64 bits.
const MAX_LEN: u64 = i64::MAX.unsigned_abs();

/// What tells one file from another, whatever name it was reached by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId {
    /// The device, or a number for the memory that holds it.
    pub device: u64,
    /// The file's number on its device.
    pub inode: u64,
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
