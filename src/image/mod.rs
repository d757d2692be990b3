//! One image file: open, create, read, write, zero, discard, resize, extents, check, repair.
//!
//! Knows nothing of other images: where an overlay has nothing of its own, the caller reads on (see [`Backing`]).

mod check;
mod compressed;
mod create;
mod error;
mod extents;
mod open;
mod raw;
mod tables;

use std::sync::Arc;

use crate::format::{Geometry, GuestOffset, HeaderCluster};
use crate::storage::Storage;

pub use check::{CheckOptions, CheckReport, Finding, Fix, Severity, check};
pub use create::{CreateOptions, Preallocation};
pub use error::{Error, Result};
pub use extents::{Extent, ExtentKind, Extents};
pub use open::OpenOptions;
pub use raw::RawImage;

/// What lies beneath an overlay, for the part of a cluster that a write does not cover.
pub trait Backing: Send + Sync {
    /// Fills `buf` with what the guest would read at `offset` if the overlay did not exist; zeroes past the end.
    ///
    /// # Errors
    /// Whatever keeps the bytes from being read.
    fn read_at(&self, buf: &mut [u8], offset: GuestOffset) -> Result<()>;
}

/// How [`Image::resize`] goes about it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ResizeOptions {
    /// Allows the image to become smaller: what lies behind the new end is lost.
    pub shrink: bool,
    /// What to allocate for the new part when growing.
    pub preallocation: Preallocation,
}

/// An open qcow2 image. All methods take `&self`: an `Arc<Image>` serves many threads.
#[derive(Debug)]
pub struct Image {
    storage: Arc<dyn Storage>,
}

impl Image {
    /// Opens an image that lies on `storage`.
    ///
    /// # Errors
    /// Fill in.
    pub fn open(_storage: Arc<dyn Storage>, _options: &OpenOptions) -> Result<Self> {
        todo!()
    }

    /// Creates a new image on an empty `storage` and opens it for writing. Everything is durable on return.
    ///
    /// # Errors
    /// Fill in.
    pub fn create(storage: Arc<dyn Storage>, options: &CreateOptions) -> Result<Self> {
        create::lay_out(&*storage, options)?;
        Self::open(storage, &OpenOptions::default().with_write(true))
    }

    /// Makes durable what was written and ends the use of the image.
    ///
    /// # Errors
    /// As [`Image::flush`].
    pub fn close(self) -> Result<()> {
        todo!()
    }

    /// Returns when everything written before is durable: data, refcounts, mappings, in this order.
    ///
    /// # Errors
    /// Fill in.
    pub fn flush(&self) -> Result<()> {
        todo!()
    }

    /// The storage it lies on.
    #[must_use]
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// What messages call it.
    #[must_use]
    pub fn name(&self) -> &str {
        self.storage.name()
    }

    /// The header, its extensions and the backing file's name, as they are now.
    #[must_use]
    pub fn header(&self) -> HeaderCluster {
        todo!()
    }

    /// The geometry; fixed for the life of the image.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        todo!()
    }

    /// The virtual size in bytes.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        todo!()
    }

    /// Whether writes are refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        todo!()
    }

    /// Whether guest data can be read and written at all.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for encrypted images and those with an external data file.
    pub fn data_access(&self) -> Result<()> {
        todo!()
    }

    /// Reads guest data of an image that needs no other.
    ///
    /// # Errors
    /// [`Error::Refused`] where the range reaches into the backing file.
    pub fn read_at(&self, _buf: &mut [u8], _offset: GuestOffset) -> Result<()> {
        todo!()
    }

    /// Reads what this image itself holds of a range. Parts that it does not hold are left as they are in `buf` and
    /// pushed to `holes` as (start in `buf`, length), in order. Past the virtual size the image holds nothing.
    ///
    /// # Errors
    /// Fill in.
    pub fn read_present(&self, _buf: &mut [u8], _offset: GuestOffset, _holes: &mut Vec<(usize, usize)>) -> Result<()> {
        todo!()
    }

    /// Writes guest data to an image that needs no other: no backing file, or all touched clusters whole or present.
    ///
    /// # Errors
    /// Fill in.
    pub fn write_at(&self, _buf: &[u8], _offset: GuestOffset) -> Result<()> {
        todo!()
    }

    /// Writes guest data to an overlay; what a touched cluster lacks is taken from `backing`.
    ///
    /// # Errors
    /// Fill in.
    pub fn write_at_over(&self, _buf: &[u8], _offset: GuestOffset, _backing: &dyn Backing) -> Result<()> {
        todo!()
    }

    /// Makes a range read as zeroes.
    ///
    /// # Errors
    /// Fill in.
    pub fn write_zeroes_at(&self, _offset: GuestOffset, _len: u64) -> Result<()> {
        todo!()
    }

    /// As [`Image::write_zeroes_at`] for an overlay.
    ///
    /// # Errors
    /// Fill in.
    pub fn write_zeroes_at_over(&self, _offset: GuestOffset, _len: u64, _backing: &dyn Backing) -> Result<()> {
        todo!()
    }

    /// Says that a range is no longer needed. Whole clusters in it are given back and read as zeroes afterwards
    /// (version 2 with a backing file: left as they are).
    ///
    /// # Errors
    /// Fill in.
    pub fn discard_at(&self, _offset: GuestOffset, _len: u64) -> Result<()> {
        todo!()
    }

    /// What the image holds of a guest range, coalesced and lazily.
    #[must_use]
    pub fn extents(&self, _range: std::ops::Range<u64>) -> Extents<'_> {
        todo!()
    }

    /// Changes the virtual size, which must be a multiple of 512.
    ///
    /// # Errors
    /// Fill in.
    pub fn resize(&self, _size: u64, _options: &ResizeOptions) -> Result<()> {
        todo!()
    }

    /// Points the image at another backing file, or at none, without looking at either (`rebase -u`). `format` is the
    /// backing format extension's value.
    ///
    /// # Errors
    /// [`Error::Limit`] where the name does not fit the first cluster.
    pub fn set_backing_file(&self, _name: Option<&[u8]>, _format: Option<&[u8]>) -> Result<()> {
        todo!()
    }

    /// The internal snapshots.
    ///
    /// # Errors
    /// [`Error::Corrupt`].
    pub fn snapshots(&self) -> Result<Vec<crate::format::SnapshotEntry>> {
        tables::read_snapshots(&*self.storage, &self.header().header, &crate::format::Limits::default())
    }

    /// The bitmap directory; empty where there are no bitmaps.
    ///
    /// # Errors
    /// [`Error::Corrupt`].
    pub fn bitmaps(&self) -> Result<Vec<crate::format::BitmapDirectoryEntry>> {
        tables::read_bitmap_directory(&*self.storage, &self.header())
    }
}
