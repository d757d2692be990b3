//! A read-only handle of any storage.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use super::{Error, FileId, FileStamp, LockMode, Result, Storage};

/// A handle that refuses every change. Other handles of the same storage may write.
#[derive(Clone, Debug)]
pub struct ReadOnlyStorage {
    inner: Arc<dyn Storage>,
}

impl ReadOnlyStorage {
    /// Wraps a storage.
    #[must_use]
    pub fn new(inner: Arc<dyn Storage>) -> Self {
        Self { inner }
    }

    fn refuse<T>(&self) -> Result<T> {
        Err(Error::ReadOnly { name: self.name().to_owned() })
    }
}

impl Storage for ReadOnlyStorage {
    fn name(&self) -> &str {
        self.inner.name()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.inner.read_at(buf, offset)
    }
    fn write_at(&self, _buf: &[u8], _offset: u64) -> Result<()> {
        self.refuse()
    }
    fn len(&self) -> Result<u64> {
        self.inner.len()
    }
    fn set_len(&self, _len: u64) -> Result<()> {
        self.refuse()
    }
    fn sync(&self) -> Result<()> {
        self.inner.sync()
    }
    fn is_read_only(&self) -> bool {
        true
    }
    fn is_fixed_size(&self) -> bool {
        self.inner.is_fixed_size()
    }
    fn file_id(&self) -> Option<FileId> {
        self.inner.file_id()
    }
    fn stamp(&self) -> Result<Option<FileStamp>> {
        self.inner.stamp()
    }
    fn zero_range(&self, _range: Range<u64>) -> Result<()> {
        self.refuse()
    }
    fn punch_range(&self, _range: Range<u64>) -> Result<()> {
        self.refuse()
    }
    fn allocate_range(&self, _range: Range<u64>) -> Result<()> {
        self.refuse()
    }
    fn copy_from(&self, _source: &dyn Storage, _from: u64, _to: u64, _len: u64) -> Result<u64> {
        self.refuse()
    }
    fn write_bulk_at(&self, _buf: &[u8], _offset: u64) -> Result<()> {
        self.refuse()
    }
    fn will_not_need(&self, range: Range<u64>) {
        self.inner.will_not_need(range);
    }
    fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>> {
        self.inner.next_data(offset)
    }
    fn allocated_len(&self) -> Result<Option<u64>> {
        self.inner.allocated_len()
    }
    fn free_space(&self) -> Result<Option<u64>> {
        self.inner.free_space()
    }
    fn set_lock(&self, mode: LockMode) -> Result<()> {
        self.inner.set_lock(mode)
    }
    fn as_file(&self) -> Option<&File> {
        self.inner.as_file()
    }
}

#[cfg(test)]
mod tests {
    use super::super::MemoryStorage;
    use super::*;

    #[test]
    fn read_only_handle_forwards_reads_and_refuses_changes() {
        let memory = Arc::new(MemoryStorage::with_bytes("m", b"0123456789"));
        let reader = ReadOnlyStorage::new(memory.clone());
        let refused = [
            reader.write_at(b"x", 0),
            reader.set_len(1),
            reader.zero_range(0..1),
            reader.punch_range(0..1),
            reader.allocate_range(0..1),
            reader.copy_from(&*memory, 0, 0, 1).map(|_| ()),
        ];
        for result in refused {
            assert!(matches!(result, Err(Error::ReadOnly { .. })), "{result:?}");
        }
        assert_eq!(memory.to_vec(), b"0123456789");
        let mut buf = [0; 3];
        reader.read_at(&mut buf, 8).unwrap();
        assert_eq!(&buf, b"89\0");
        reader.sync().unwrap();
        assert!(reader.is_read_only() && !reader.is_fixed_size() && reader.as_file().is_none());
        assert_eq!((reader.name(), reader.len().unwrap()), ("m", 10));
        assert_eq!(reader.file_id(), memory.file_id());
        assert_eq!(reader.next_data(3).unwrap(), Some(3..10));
        assert_eq!(reader.allocated_len().unwrap(), memory.allocated_len().unwrap());
        assert_eq!(reader.free_space().unwrap(), None);
        assert!(matches!(reader.set_lock(LockMode::Read), Err(Error::Unsupported { .. })));
    }
}
