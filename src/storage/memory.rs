//! The storage in memory.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::{Error, FileId, MAX_LEN, Result, Storage};

/// The unit of allocation and of holes, in bytes, as on most file systems.
const CHUNK: u64 = 4096;
const CHUNK_BYTES: usize = 4096;

/// The value of [`FileId::device`] for memory. No device has this number.
const MEMORY_DEVICE: u64 = u64::MAX;

/// Sparse bytes in memory: holes take no memory, so that a storage of 2^63 - 1 bytes is as cheap as
/// an empty one.
///
/// It grows without limit ([`MemoryStorage::new`]), has a medium of a given size
/// ([`MemoryStorage::with_capacity_limit`]), or has a fixed length as a block device has
/// ([`MemoryStorage::fixed`]).
#[derive(Debug)]
pub struct MemoryStorage {
    name: String,
    id: FileId,
    /// The limit of the bytes of all chunks.
    limit: u64,
    fixed: bool,
    bytes: RwLock<Bytes>,
}

/// Chunks by their number. Behind `len` every byte of a chunk is zero, and no chunk starts there.
#[derive(Debug, Default)]
struct Bytes {
    len: u64,
    chunks: BTreeMap<u64, Box<[u8; CHUNK_BYTES]>>,
}

/// A part of a chunk that a range covers.
struct Piece {
    chunk: u64,
    /// The covered bytes of the chunk.
    within: Range<usize>,
    /// Their offset in a buffer for the whole range.
    at: usize,
}

#[expect(clippy::cast_possible_truncation, reason = "at most the length of a chunk, or of a buffer in memory")]
const fn small(n: u64) -> usize {
    n as usize
}

/// Returns the part of a chunk that is in a range. The range must touch the chunk.
fn piece(chunk: u64, range: &Range<u64>) -> Piece {
    let start = range.start.max(chunk * CHUNK);
    let end = range.end.min(chunk * CHUNK + CHUNK);
    Piece { chunk, within: small(start - chunk * CHUNK)..small(end - chunk * CHUNK), at: small(start - range.start) }
}

/// Returns the numbers of the chunks that a range touches.
fn chunks(range: &Range<u64>) -> Range<u64> {
    if range.is_empty() { 0..0 } else { range.start / CHUNK..range.end.div_ceil(CHUNK) }
}

impl Bytes {
    fn read(&self, buf: &mut [u8], range: &Range<u64>) {
        buf.fill(0);
        for (chunk, bytes) in self.chunks.range(chunks(range)) {
            let Piece { within, at, .. } = piece(*chunk, range);
            buf[at..at + within.len()].copy_from_slice(&bytes[within]);
        }
    }

    fn write(&mut self, buf: &[u8], range: &Range<u64>) {
        for Piece { chunk, within, at } in chunks(range).map(|chunk| piece(chunk, range)) {
            let bytes = self.chunks.entry(chunk).or_insert_with(|| Box::new([0; CHUNK_BYTES]));
            bytes[within.clone()].copy_from_slice(&buf[at..at + within.len()]);
        }
        self.len = self.len.max(range.end);
    }

    /// Releases the chunks within a range, and zeroes the covered parts of others.
    fn zero(&mut self, range: &Range<u64>) {
        let touched: Vec<u64> = self.chunks.range(chunks(range)).map(|(chunk, _)| *chunk).collect();
        for chunk in touched {
            let Piece { within, .. } = piece(chunk, range);
            if within.len() == CHUNK_BYTES {
                self.chunks.remove(&chunk);
            } else if let Some(bytes) = self.chunks.get_mut(&chunk) {
                bytes[within].fill(0);
            }
        }
    }

    fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.zero(&(len..self.len.next_multiple_of(CHUNK)));
        }
        self.len = len;
    }

    fn taken(&self) -> u64 {
        self.chunks.len() as u64 * CHUNK
    }

    /// Returns the bytes of the chunks that are missing in a range.
    fn missing(&self, range: &Range<u64>) -> u64 {
        let touched = chunks(range);
        let present = self.chunks.range(touched.clone()).count() as u64;
        (touched.end - touched.start - present).saturating_mul(CHUNK)
    }
}

impl Default for MemoryStorage {
    fn default() -> Self {
        Self::new("memory")
    }
}

impl MemoryStorage {
    /// Returns an empty storage of this name.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        // A unique number, so that one storage with two names is recognised.
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let id = FileId { device: MEMORY_DEVICE, inode: NEXT.fetch_add(1, Ordering::Relaxed) };
        Self { name: name.into(), id, limit: u64::MAX, fixed: false, bytes: RwLock::default() }
    }

    /// Sets the identity. Default: one that no other storage has.
    ///
    /// Storages with one identity count as one file, so that a copy can stand for the original, as
    /// an inode keeps its number over a restart.
    #[must_use]
    pub fn with_file_id(mut self, id: FileId) -> Self {
        self.id = id;
        self
    }

    /// Returns a copy with the same name, content and identity. It grows without limit.
    #[must_use]
    pub fn copy(&self) -> Self {
        Self::with_bytes(self.name.clone(), self.to_vec()).with_file_id(self.id)
    }

    /// Returns a storage of this name and content.
    #[must_use]
    pub fn with_bytes(name: impl Into<String>, bytes: impl AsRef<[u8]>) -> Self {
        let storage = Self::new(name);
        let bytes = bytes.as_ref();
        storage.bytes_mut().write(bytes, &(0..bytes.len() as u64));
        storage
    }

    /// Returns an empty storage on a medium of `limit` bytes, which fails with [`Error::NoSpace`]
    /// when it is full. Space is allocated in units of 4096 bytes.
    #[must_use]
    pub fn with_capacity_limit(name: impl Into<String>, limit: u64) -> Self {
        Self { limit, ..Self::new(name) }
    }

    /// Returns a storage of fixed length in bytes, like a block device: it reads as zeroes, does
    /// not grow, and has no holes. A length over 2^63 - 1 is reduced to that.
    #[must_use]
    pub fn fixed(name: impl Into<String>, len: u64) -> Self {
        let storage = Self { fixed: true, ..Self::new(name) };
        storage.bytes_mut().len = len.min(MAX_LEN);
        storage
    }

    /// Returns a copy of the content, with holes as zeroes. The length ([`Storage::len`]) must fit
    /// into memory.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let bytes = self.bytes();
        let mut all = vec![0; usize::try_from(bytes.len).unwrap_or(usize::MAX)];
        bytes.read(&mut all, &(0..bytes.len));
        all
    }

    fn bytes(&self) -> RwLockReadGuard<'_, Bytes> {
        self.bytes.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn bytes_mut(&self) -> RwLockWriteGuard<'_, Bytes> {
        self.bytes.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn no_space(&self, need: u64) -> Error {
        Error::NoSpace { name: self.name.clone(), need }
    }

    /// Refuses an end past the largest or fixed length.
    fn may_reach(&self, bytes: &Bytes, end: u64, need: u64) -> Result<()> {
        if end > MAX_LEN || (self.fixed && end > bytes.len) { Err(self.no_space(need)) } else { Ok(()) }
    }

    /// Refuses a range if the medium has no space for its missing chunks.
    fn may_take(&self, bytes: &Bytes, range: &Range<u64>) -> Result<()> {
        let room = self.limit.saturating_sub(bytes.taken());
        if self.limit < u64::MAX && bytes.missing(range) > room {
            return Err(self.no_space(range.end - range.start));
        }
        Ok(())
    }
}

impl Storage for MemoryStorage {
    fn name(&self) -> &str {
        &self.name
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let end = offset.saturating_add(buf.len() as u64);
        self.bytes().read(buf, &(offset..end));
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        if buf.is_empty() {
            return Ok(());
        }
        let len = buf.len() as u64;
        let range = offset..offset.saturating_add(len);
        let mut bytes = self.bytes_mut();
        self.may_reach(&bytes, range.end, len)?;
        self.may_take(&bytes, &range)?;
        bytes.write(buf, &range);
        Ok(())
    }

    fn len(&self) -> Result<u64> {
        Ok(self.bytes().len)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        let mut bytes = self.bytes_mut();
        if self.fixed && len != bytes.len {
            return Err(Error::unsupported(&self.name, "changing a fixed length"));
        }
        self.may_reach(&bytes, len, len)?;
        bytes.set_len(len);
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn is_fixed_size(&self) -> bool {
        self.fixed
    }

    fn file_id(&self) -> Option<FileId> {
        Some(self.id)
    }

    fn zero_range(&self, range: Range<u64>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let mut bytes = self.bytes_mut();
        self.may_reach(&bytes, range.end, range.end - range.start)?;
        bytes.zero(&range);
        bytes.len = bytes.len.max(range.end);
        Ok(())
    }

    fn punch_range(&self, range: Range<u64>) -> Result<()> {
        let mut bytes = self.bytes_mut();
        let range = range.start..range.end.min(bytes.len);
        if !range.is_empty() {
            bytes.zero(&range);
        }
        Ok(())
    }

    fn allocate_range(&self, range: Range<u64>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let mut bytes = self.bytes_mut();
        self.may_reach(&bytes, range.end, range.end - range.start)?;
        self.may_take(&bytes, &range)?;
        bytes.len = bytes.len.max(range.end);
        if self.limit < u64::MAX {
            // Only a limited medium reserves chunks. `may_take` has bounded their number.
            for chunk in chunks(&range) {
                bytes.chunks.entry(chunk).or_insert_with(|| Box::new([0; CHUNK_BYTES]));
            }
        }
        Ok(())
    }

    fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>> {
        let bytes = self.bytes();
        if offset >= bytes.len {
            return Ok(None);
        }
        if self.fixed {
            return Ok(Some(offset..bytes.len));
        }
        let mut numbers = bytes.chunks.range(offset / CHUNK..).map(|(chunk, _)| *chunk);
        let Some(first) = numbers.next() else {
            return Ok(None);
        };
        let mut end = first + 1;
        while numbers.next() == Some(end) {
            end += 1;
        }
        Ok(Some((first * CHUNK).max(offset)..(end * CHUNK).min(bytes.len)))
    }

    fn allocated_len(&self) -> Result<Option<u64>> {
        if self.fixed { Ok(None) } else { Ok(Some(self.bytes().taken())) }
    }

    fn free_space(&self) -> Result<Option<u64>> {
        if self.fixed || self.limit == u64::MAX {
            return Ok(None);
        }
        Ok(Some(self.limit.saturating_sub(self.bytes().taken())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(storage: &dyn Storage, offset: u64, len: usize) -> Vec<u8> {
        let mut buf = vec![0xee; len];
        storage.read_at(&mut buf, offset).unwrap();
        buf
    }

    #[test]
    fn memory_equals_a_vector_of_bytes() {
        let storage = MemoryStorage::with_bytes("m", [1; 5000]);
        assert_eq!(storage.to_vec(), [1; 5000]);
        storage.write_at(&[2; 5000], 4000).unwrap();
        let mut model = vec![1; 4000];
        model.extend([2; 5000]);
        assert_eq!(storage.to_vec(), model);
        assert_eq!(read(&storage, 8998, 4), [2, 2, 0, 0]);
        assert_eq!(read(&storage, u64::MAX - 1, 4), [0; 4]);
        storage.set_len(4001).unwrap();
        storage.set_len(9000).unwrap();
        model[4001..].fill(0);
        assert_eq!(storage.to_vec(), model);
        storage.write_at(&[], 1 << 40).unwrap();
        assert_eq!(storage.len().unwrap(), 9000);
    }

    #[test]
    fn holes_take_no_memory() {
        let storage = MemoryStorage::new("m");
        storage.set_len(64 << 40).unwrap();
        assert_eq!(storage.next_data(0).unwrap(), None);
        storage.write_at(b"far", 60 << 40).unwrap();
        storage.write_at(&[1; 8192], 4096).unwrap();
        assert_eq!(storage.allocated_len().unwrap(), Some(3 * 4096));
        assert_eq!(storage.next_data(0).unwrap(), Some(4096..12288));
        assert_eq!(storage.next_data(5000).unwrap(), Some(5000..12288));
        assert_eq!(storage.next_data(12288).unwrap(), Some(60 << 40..(60 << 40) + 4096));
        storage.punch_range(0..1 << 60).unwrap();
        assert_eq!(storage.len().unwrap(), 64 << 40);
        assert_eq!(storage.allocated_len().unwrap(), Some(0));
        storage.set_len(MAX_LEN).unwrap();
        assert!(matches!(storage.set_len(MAX_LEN + 1), Err(Error::NoSpace { .. })));
        assert!(matches!(storage.write_at(b"x", MAX_LEN), Err(Error::NoSpace { .. })));
        assert!(matches!(storage.write_at(b"x", u64::MAX), Err(Error::NoSpace { .. })));
        storage.write_at(b"x", MAX_LEN - 1).unwrap();
        assert_eq!(storage.next_data(5).unwrap(), Some(MAX_LEN - CHUNK + 1..MAX_LEN));
        storage.set_len(1).unwrap();
        assert_eq!(storage.allocated_len().unwrap(), Some(0));
    }

    #[test]
    fn punched_and_zeroed_ranges_read_as_zeroes() {
        let storage = MemoryStorage::with_bytes("m", [1; 16384]);
        storage.punch_range(4000..8300).unwrap();
        storage.zero_range(16380..16400).unwrap();
        let mut model = vec![1; 16400];
        model[4000..8300].fill(0);
        model[16380..].fill(0);
        assert_eq!(storage.to_vec(), model);
        assert_eq!(storage.allocated_len().unwrap(), Some(3 * 4096));
        #[expect(clippy::reversed_empty_ranges, reason = "a caller's mistake changes nothing")]
        let backwards = 9..3;
        storage.zero_range(backwards.clone()).unwrap();
        storage.punch_range(backwards).unwrap();
        assert_eq!(storage.to_vec(), model);
    }

    #[test]
    fn full_medium_fails_without_change() {
        let storage = MemoryStorage::with_capacity_limit("m", 3 * 4096);
        storage.set_len(1 << 40).unwrap();
        storage.write_at(&[1; 4096], 0).unwrap();
        assert_eq!(storage.free_space().unwrap(), Some(2 * 4096));
        assert!(matches!(storage.write_at(&[2; 3 * 4096], 4095), Err(Error::NoSpace { need: 12288, .. })));
        assert_eq!(read(&storage, 4094, 4), [1, 1, 0, 0]);
        storage.write_at(&[2; 8192], 4096).unwrap();
        assert!(matches!(storage.allocate_range(1 << 30..1 << 31), Err(Error::NoSpace { .. })));
        storage.write_at(&[3; 3 * 4096], 0).unwrap();
        storage.punch_range(0..4096).unwrap();
        storage.allocate_range(8 << 30..(8 << 30) + 1).unwrap();
        assert_eq!(storage.free_space().unwrap(), Some(0));
        assert!(storage.write_at(&[4; 1], 0).is_err());
        storage.write_at(&[4; 1], 8 << 30).unwrap();
    }

    #[test]
    fn fixed_length_is_kept() {
        let storage = MemoryStorage::fixed("m", 10_000);
        assert!(storage.is_fixed_size());
        storage.write_at(&[1; 10], 9990).unwrap();
        assert!(matches!(storage.write_at(&[1; 11], 9990), Err(Error::NoSpace { need: 11, .. })));
        assert!(matches!(storage.zero_range(9990..10_001), Err(Error::NoSpace { .. })));
        assert!(matches!(storage.set_len(9999), Err(Error::Unsupported { .. })));
        storage.set_len(10_000).unwrap();
        assert_eq!(storage.next_data(3).unwrap(), Some(3..10_000));
        assert_eq!(storage.next_data(10_000).unwrap(), None);
    }

    #[test]
    fn every_storage_has_its_own_identity() {
        let [a, b] = [MemoryStorage::new("m"), MemoryStorage::new("m")];
        assert_eq!(a.file_id(), a.file_id());
        assert_ne!(a.file_id(), b.file_id());
    }

    #[test]
    fn threads_share_one_storage() {
        let storage = MemoryStorage::new("m");
        std::thread::scope(|scope| {
            for thread in 0..4_u8 {
                let storage = &storage;
                scope.spawn(move || {
                    for round in 0..100_u64 {
                        let at = (round * 4 + u64::from(thread)) * 1000;
                        storage.write_at(&[thread + 1; 1000], at).unwrap();
                        assert_eq!(read(storage, at, 1000), [thread + 1; 1000]);
                    }
                });
            }
        });
        let bytes = storage.to_vec();
        assert!(bytes.chunks(1000).enumerate().all(|(n, piece)| piece.iter().all(|b| usize::from(*b) == n % 4 + 1)));
    }
}
