//! A storage that keeps back the beginning of what is written to it: until the end, it holds no valid image.

use std::fs::File;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use crate::storage::{FileId, LockMode, Result, Storage};

/// How much is kept back: the sector that says that this is an image.
const HEAD: usize = 512;

/// A storage whose first sector is written last. Zeroes are no header and are not kept back: on a device they are what
/// takes away the image that was there before.
#[derive(Debug)]
pub(super) struct HeaderLast {
    inner: Arc<dyn Storage>,
    /// What was written to the first sector, as long as that is kept back.
    head: Mutex<Option<[u8; HEAD]>>,
}

impl HeaderLast {
    pub(super) fn new(inner: Arc<dyn Storage>) -> Self {
        Self { inner, head: Mutex::new(Some([0; HEAD])) }
    }

    /// Writes what was kept back, now that all else is durable. Durable on return; from now on nothing is kept back.
    pub(super) fn write(&self) -> Result<()> {
        let mut head = self.head.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bytes) = *head {
            self.inner.write_at(&bytes, 0)?;
            *head = None;
        }
        self.inner.sync()
    }

    /// Does something to the part of a range that is kept back. Returns the length of that part.
    fn kept(&self, offset: u64, len: usize, act: impl FnOnce(&mut [u8])) -> usize {
        let Some(at) = usize::try_from(offset).ok().filter(|at| *at < HEAD) else { return 0 };
        let mut head = self.head.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(head) = head.as_mut() else { return 0 };
        let end = at.saturating_add(len).min(HEAD);
        act(&mut head[at..end]);
        end - at
    }
}

impl Storage for HeaderLast {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.inner.read_at(buf, offset)?;
        let len = buf.len();
        self.kept(offset, len, |head| buf[..head.len()].copy_from_slice(head));
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let mut is_zero = false;
        let kept = self.kept(offset, buf.len(), |head| {
            head.copy_from_slice(&buf[..head.len()]);
            is_zero = head.iter().all(|byte| *byte == 0);
        });
        if is_zero {
            return self.inner.write_at(buf, offset);
        }
        let rest = &buf[kept..];
        if rest.is_empty() { Ok(()) } else { self.inner.write_at(rest, offset + kept as u64) }
    }

    fn len(&self) -> Result<u64> {
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.inner.set_len(len)
    }

    fn sync(&self) -> Result<()> {
        self.inner.sync()
    }

    fn is_read_only(&self) -> bool {
        self.inner.is_read_only()
    }

    fn is_fixed_size(&self) -> bool {
        self.inner.is_fixed_size()
    }

    fn file_id(&self) -> Option<FileId> {
        self.inner.file_id()
    }

    fn zero_range(&self, range: Range<u64>) -> Result<()> {
        self.inner.zero_range(range.clone())?;
        self.forget(range);
        Ok(())
    }

    fn punch_range(&self, range: Range<u64>) -> Result<()> {
        self.inner.punch_range(range.clone())?;
        self.forget(range);
        Ok(())
    }

    fn allocate_range(&self, range: Range<u64>) -> Result<()> {
        self.inner.allocate_range(range)
    }

    fn copy_from(&self, source: &dyn Storage, from: u64, to: u64, len: u64) -> Result<u64> {
        self.inner.copy_from(source, from, to, len)
    }

    fn prefers_copy_from(&self, source: &dyn Storage) -> bool {
        self.inner.prefers_copy_from(source)
    }

    fn write_bulk_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let kept = self.kept(offset, buf.len(), |head| head.copy_from_slice(&buf[..head.len()]));
        if kept == 0 { self.inner.write_bulk_at(buf, offset) } else { self.write_at(buf, offset) }
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

    fn set_lock(&self, wanted: LockMode) -> Result<()> {
        self.inner.set_lock(wanted)
    }

    fn as_file(&self) -> Option<&File> {
        self.inner.as_file()
    }
}

impl HeaderLast {
    /// A range was made zero.
    fn forget(&self, range: Range<u64>) {
        let len = usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(usize::MAX);
        self.kept(range.start, len, |head| head.fill(0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;

    #[test]
    fn the_first_sector_comes_last() {
        let memory = Arc::new(MemoryStorage::new("m"));
        let storage = HeaderLast::new(memory.clone());
        storage.write_at(&[7; 1000], 0).unwrap();
        storage.write_at(&[8; 20], 500).unwrap();
        let mut whole = vec![7; 1000];
        whole[500..520].fill(8);
        let mut read = vec![1; 1000];
        storage.read_at(&mut read, 0).unwrap();
        assert!(read == whole);
        read[..10].fill(1);
        storage.read_at(&mut read[400..700], 400).unwrap();
        assert!(read[400..700] == whole[400..700]);

        let mut without = whole.clone();
        without[..HEAD].fill(0);
        assert!(memory.to_vec() == without);
        storage.write().unwrap();
        assert!(memory.to_vec() == whole);
        storage.write_at(&[9], 3).unwrap();
        assert_eq!(memory.to_vec()[3], 9);
    }

    #[test]
    fn zeroes_are_written_at_once() {
        let memory = Arc::new(MemoryStorage::with_bytes("m", [7; 1000]));
        let storage = HeaderLast::new(memory.clone());
        crate::storage::write_zeroes(&storage, 0..600).unwrap();
        assert!(memory.to_vec()[..600].iter().all(|byte| *byte == 0));
        storage.write_at(&[8; 512], 0).unwrap();
        assert_eq!(memory.to_vec()[0], 0);
        storage.write().unwrap();
        assert!(memory.to_vec()[..512] == [8; 512]);
    }

    #[test]
    fn zeroes_count_too() {
        let storage = HeaderLast::new(Arc::new(MemoryStorage::new("m")));
        storage.write_at(&[7; 1000], 0).unwrap();
        storage.zero_range(100..600).unwrap();
        let mut read = vec![1; 1000];
        storage.read_at(&mut read, 0).unwrap();
        assert!(read[..100].iter().all(|byte| *byte == 7) && read[600..].iter().all(|byte| *byte == 7));
        assert!(read[100..600].iter().all(|byte| *byte == 0));
    }
}
