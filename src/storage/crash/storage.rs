//! The recording storage.

use std::ops::Range;
use std::sync::Arc;

use super::Recorder;
use super::log::{Piece, SECTOR, Synced};
use crate::storage::{Error, FileId, FileStamp, MemoryStorage, Result, Storage};

/// A file in memory that records its changes.
#[derive(Debug)]
pub struct RecordingStorage {
    number: usize,
    inner: Arc<MemoryStorage>,
    recorder: Arc<Recorder>,
}

impl RecordingStorage {
    pub(super) fn new(number: usize, inner: Arc<MemoryStorage>, recorder: Arc<Recorder>) -> Self {
        Self { number, inner, recorder }
    }

    /// Returns the change that a write causes on the medium: whole sectors with their present
    /// content, or only the written bytes for a file that tears.
    fn written(&self, offset: u64, len: usize, torn: bool) -> Result<Piece> {
        let (mut start, mut end) = (offset, offset + len as u64);
        if !torn {
            start &= !(SECTOR as u64 - 1);
            end = end.next_multiple_of(SECTOR as u64).min(self.inner.len()?);
        }
        let mut data = vec![0; index(end.saturating_sub(start))];
        self.inner.read_at(&mut data, start)?;
        Ok(Piece::Write { at: index(start), data })
    }

    /// Refuses operations within the kernel unless [`super::RecorderOptions::in_kernel`] is set.
    fn check_in_kernel(&self, what: &'static str) -> Result<()> {
        if self.recorder.options.in_kernel { Ok(()) } else { Err(Error::unsupported(self.name(), what)) }
    }
}

impl Storage for RecordingStorage {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.recorder.record_piece(self.number, |torn| {
            self.inner.write_at(buf, offset)?;
            if buf.is_empty() { Ok(None) } else { self.written(offset, buf.len(), torn).map(Some) }
        })
    }

    fn len(&self) -> Result<u64> {
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.recorder.record_piece(self.number, |_| {
            self.inner.set_len(len)?;
            Ok(Some(Piece::SetLen(index(len))))
        })
    }

    fn sync(&self) -> Result<()> {
        self.recorder.record_sync(Synced::File(self.number));
        Ok(())
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

    fn zero_range(&self, range: Range<u64>) -> Result<()> {
        self.check_in_kernel("zeroing a range")?;
        self.recorder.record_piece(self.number, |_| {
            self.inner.zero_range(range.clone())?;
            Ok((!range.is_empty()).then(|| Piece::Zero(index(range.start)..index(range.end))))
        })
    }

    fn punch_range(&self, range: Range<u64>) -> Result<()> {
        self.recorder.record_piece(self.number, |_| {
            let end = range.end.min(self.inner.len()?);
            self.inner.punch_range(range.start..end)?;
            Ok((range.start < end).then(|| Piece::Punch(index(range.start)..index(end))))
        })
    }

    fn allocate_range(&self, range: Range<u64>) -> Result<()> {
        self.check_in_kernel("reserving blocks")?;
        self.recorder.record_piece(self.number, |_| {
            let grows = self.inner.len()? < range.end && !range.is_empty();
            self.inner.allocate_range(range.clone())?;
            Ok(grows.then(|| Piece::SetLen(index(range.end))))
        })
    }

    fn copy_from(&self, source: &dyn Storage, from: u64, to: u64, len: u64) -> Result<u64> {
        self.check_in_kernel("copying in the kernel")?;
        let len = len.min(source.len()?.saturating_sub(from));
        let mut bytes = vec![0; index(len)];
        source.read_at(&mut bytes, from)?;
        self.write_at(&bytes, to)?;
        Ok(len)
    }

    fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>> {
        // Without operations in the kernel the storage knows no holes.
        if self.recorder.options.in_kernel {
            return self.inner.next_data(offset);
        }
        let len = self.inner.len()?;
        Ok((offset < len).then_some(offset..len))
    }
}

pub(super) fn index(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}
