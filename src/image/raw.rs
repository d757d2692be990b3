//! A raw image: guest offsets are host offsets. OWNER: create helper

use std::ops::Range;
use std::sync::Arc;

use crate::format::GuestOffset;
use crate::storage::Storage;

use super::{Extent, Result};

/// A raw image. Its virtual size is the storage's length, rounded up to a sector as QEMU does.
#[derive(Debug)]
pub struct RawImage {
    storage: Arc<dyn Storage>,
}

impl RawImage {
    /// The raw image that is all of `storage`.
    ///
    /// # Errors
    /// As [`Storage::len`].
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self> {
        Ok(Self { storage })
    }

    /// The storage it lies on.
    #[must_use]
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// The virtual size in bytes.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        todo!()
    }

    /// Reads guest data; zeroes past the end.
    ///
    /// # Errors
    /// As [`Storage::read_at`].
    pub fn read_at(&self, _buf: &mut [u8], _offset: GuestOffset) -> Result<()> {
        todo!()
    }

    /// Writes guest data within the virtual size.
    ///
    /// # Errors
    /// As [`Storage::write_at`]; [`super::Error::Refused`] past the virtual size.
    pub fn write_at(&self, _buf: &[u8], _offset: GuestOffset) -> Result<()> {
        todo!()
    }

    /// Makes a range read as zeroes, by a hole where the storage can.
    ///
    /// # Errors
    /// As [`RawImage::write_at`].
    pub fn write_zeroes_at(&self, _offset: GuestOffset, _len: u64) -> Result<()> {
        todo!()
    }

    /// The extents of a range: `Data` and `Zero { host: Some }` by the storage's holes; never `Unallocated`.
    pub fn extents(&self, _range: Range<u64>) -> impl Iterator<Item = Result<Extent>> + '_ {
        std::iter::from_fn(|| todo!())
    }

    /// Changes the size.
    ///
    /// # Errors
    /// As [`Storage::set_len`].
    pub fn resize(&self, _size: u64) -> Result<()> {
        todo!()
    }

    /// Returns when what was written is durable.
    ///
    /// # Errors
    /// As [`Storage::sync`].
    pub fn flush(&self) -> Result<()> {
        todo!()
    }
}
