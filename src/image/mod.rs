//! One image file: open, create, read, write, zero, discard, resize, extents, check, repair.
//!
//! Knows nothing of other images: where an overlay has nothing of its own, the caller reads on (see [`Backing`]).

mod bitmaps;
mod bulk;
mod cache;
mod check;
mod compressed;
mod compressed_write;
mod create;
mod error;
mod extents;
mod flush;
mod header_change;
mod open;
mod overlap;
mod raw;
mod read;
mod refcounts;
mod resize;
mod state;
mod table_count;
mod tables;
mod write;
mod zero;

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::ThreadId;

use crate::format::{
    BitmapDirectoryEntry, CryptMethod, Geometry, GuestOffset, HeaderCluster, IncompatibleFeatures, SnapshotEntry,
};
use crate::storage::Storage;

pub(crate) use bulk::{Needs, Placement};
pub use check::{CheckOptions, CheckReport, Finding, Fix, Severity, check};
pub(crate) use compressed::compress;
pub use create::{CreateOptions, Preallocation};
pub use error::{Error, Result};
pub use extents::{Extent, ExtentKind, Extents};
pub use open::OpenOptions;
pub use raw::RawImage;
pub use resize::ResizeOptions;
use state::State;
pub(crate) use zero::Space;

/// Why an image is not written by others while a merge is under way.
const IN_A_MERGE: &str = "it is being merged, and is not written by anybody else until that is done";

/// What lies beneath an overlay, for the part of a cluster that a write does not cover.
pub trait Backing: Send + Sync {
    /// Fills `buf` with what the guest would read at `offset` if the overlay did not exist; zeroes past the end.
    ///
    /// # Errors
    /// Whatever keeps the bytes from being read.
    fn read_at(&self, buf: &mut [u8], offset: GuestOffset) -> Result<()>;
}

/// The backing of a caller who brought none: an overlay that needs it is told so.
struct NoBacking<'a>(&'a str);

impl Backing for NoBacking<'_> {
    fn read_at(&self, _buf: &mut [u8], offset: GuestOffset) -> Result<()> {
        Err(Error::refused(self.0, format!("the backing file is needed at guest offset {offset}; use the chain")))
    }
}

/// An open qcow2 image. All methods take `&self`: an `Arc<Image>` serves many threads.
///
/// Mappings and refcounts that change are written by [`Image::flush`] and [`Image::close`], in an order that leaves a valid
/// image at every instant; an image that is dropped without either has its data but not its new mappings.
pub struct Image {
    storage: Arc<dyn Storage>,
    geometry: Geometry,
    writable: bool,
    poisoned: AtomicBool,
    /// The thread that merges this image, if one does: nobody else writes meanwhile.
    reserved: Mutex<Option<ThreadId>>,
    state: Box<RwLock<State>>,
}

/// Keeps all threads but this one from writing an image, until it is dropped.
#[derive(Debug)]
#[must_use = "the image can be written again when this is dropped"]
pub(crate) struct Reservation<'a>(&'a Image);

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        *self.0.reserved() = None;
    }
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Image");
        out.field("name", &self.name()).field("geometry", &self.geometry).field("writable", &self.writable);
        out.finish_non_exhaustive()
    }
}

impl Image {
    /// Creates a new image on an empty `storage` and opens it for writing. Everything is durable on return.
    ///
    /// # Errors
    /// [`Error::Refused`] and [`Error::Limit`] for options that the format cannot express, [`Error::Storage`].
    pub fn create(storage: Arc<dyn Storage>, options: &CreateOptions) -> Result<Self> {
        create::lay_out(&*storage, options)?;
        Self::open(storage, &OpenOptions::default().with_write(true))
    }

    /// Makes durable what was written and ends the use of the image.
    ///
    /// # Errors
    /// As [`Image::flush`].
    pub fn close(self) -> Result<()> {
        if self.writable { self.flush() } else { Ok(()) }
    }

    /// Returns when everything written before is durable: data, refcounts, mappings, in this order.
    ///
    /// # Errors
    /// [`Error::Storage`]. After [`crate::storage::Error::NoSpace`] the flush may be tried again when there is room; after
    /// a failed sync the handle is of no more use.
    pub fn flush(&self) -> Result<()> {
        if !self.writable {
            return Ok(());
        }
        self.check_poison()?;
        // Where only data was written, readers and writers go on while it is made durable.
        if self.shared(|state| {
            if state.is_dirty() { Ok(false) } else { state.storage.sync().map(|()| true).map_err(Error::from) }
        })? {
            return Ok(());
        }
        self.exclusive(State::flush)
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
        self.peek(|state| state.header.clone())
    }

    /// The geometry; fixed for the life of the image.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The virtual size in bytes.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.peek(|state| state.header.header.virtual_size())
    }

    /// Whether writes are refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        !self.writable
    }

    /// Whether guest data can be read and written at all.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for encrypted images and those with an external data file.
    pub fn data_access(&self) -> Result<()> {
        let (crypt, data_file) = self.peek(|state| {
            let header = &state.header.header;
            (header.crypt_method, header.incompatible_features.has(IncompatibleFeatures::DATA_FILE))
        });
        if crypt != CryptMethod::None {
            return Err(Error::unsupported(self.name(), "guest data of an encrypted image"));
        }
        if data_file {
            return Err(Error::unsupported(self.name(), "guest data in an external data file"));
        }
        Ok(())
    }

    /// Reads guest data of an image that needs no other.
    ///
    /// # Errors
    /// [`Error::Refused`] where the range reaches into the backing file or past the virtual size; else as
    /// [`Image::read_present`].
    pub fn read_at(&self, buf: &mut [u8], offset: GuestOffset) -> Result<()> {
        self.check_range(offset, buf.len() as u64)?;
        let mut holes = Vec::new();
        self.read_present(buf, offset, &mut holes)?;
        let has_backing = self.peek(|state| state.header.backing_file.is_some());
        for (at, len) in holes {
            if has_backing {
                return NoBacking(self.name()).read_at(&mut [], offset.saturating_add(at as u64));
            }
            buf[at..at + len].fill(0);
        }
        Ok(())
    }

    /// Reads what this image itself holds of a range. Parts that it does not hold are left as they are in `buf` and
    /// pushed to `holes` as (start in `buf`, length), in order. Past the virtual size the image holds nothing.
    ///
    /// # Errors
    /// [`Error::Corrupt`] where a mapping breaks a rule, [`Error::Unsupported`] as [`Image::data_access`],
    /// [`Error::Storage`].
    pub fn read_present(&self, buf: &mut [u8], offset: GuestOffset, holes: &mut Vec<(usize, usize)>) -> Result<()> {
        self.data_access()?;
        self.shared(|state| state.read_present(buf, offset, holes))
    }

    /// Writes guest data to an image that needs no other: no backing file, or all touched clusters whole or present.
    ///
    /// # Errors
    /// As [`Image::write_at_over`]; [`Error::Refused`] where a part of a cluster lies in the backing file.
    pub fn write_at(&self, buf: &[u8], offset: GuestOffset) -> Result<()> {
        self.write_at_over(buf, offset, &NoBacking(self.name()))
    }

    /// Writes guest data to an overlay; what a touched cluster lacks is taken from `backing`.
    ///
    /// # Errors
    /// [`Error::Refused`] past the virtual size, [`crate::storage::Error::ReadOnly`] and
    /// [`crate::storage::Error::NoSpace`], [`Error::Corrupt`], [`Error::Overlap`] where the refcounts are so wrong that
    /// metadata would be overwritten.
    pub fn write_at_over(&self, buf: &[u8], offset: GuestOffset, backing: &dyn Backing) -> Result<()> {
        self.check_write(offset, buf.len() as u64)?;
        let done = self.guard(|| self.shared(|state| state.write_in_place(buf, offset)))?;
        if done == buf.len() {
            return Ok(());
        }
        self.changing(|state| state.write(&buf[done..], offset.saturating_add(done as u64), backing))
    }

    /// Makes a range read as zeroes. Space that it has stays reserved where the format can say so.
    ///
    /// # Errors
    /// As [`Image::write_at`].
    pub fn write_zeroes_at(&self, offset: GuestOffset, len: u64) -> Result<()> {
        self.write_zeroes_at_over(offset, len, &NoBacking(self.name()))
    }

    /// As [`Image::write_zeroes_at`] for an overlay.
    ///
    /// # Errors
    /// As [`Image::write_at_over`].
    pub fn write_zeroes_at_over(&self, offset: GuestOffset, len: u64, backing: &dyn Backing) -> Result<()> {
        self.zero_range(offset, len, Space::Keep, backing)
    }

    /// Makes a range read as zeroes and keeps or frees its space.
    pub(crate) fn zero_range(&self, offset: GuestOffset, len: u64, space: Space, backing: &dyn Backing) -> Result<()> {
        self.check_write(offset, len)?;
        self.changing(|state| state.zero(offset, offset.saturating_add(len).get(), space, backing))
    }

    /// Says that a range is no longer needed. Whole clusters in it are given back and read as zeroes afterwards
    /// (version 2 with a backing file: left as they are). Parts of clusters are left as they are.
    ///
    /// # Errors
    /// As [`Image::write_at`].
    pub fn discard_at(&self, offset: GuestOffset, len: u64) -> Result<()> {
        self.check_write(offset, len)?;
        let end = offset.saturating_add(len).get();
        self.changing(|state| state.discard(offset, end, &NoBacking(state.storage.clone().name())))
    }

    /// What the image holds of a guest range, coalesced and lazily.
    #[must_use]
    pub fn extents(&self, range: Range<u64>) -> Extents<'_> {
        Extents::new(self, range)
    }

    /// Points the image at another backing file, or at none, without looking at either (`rebase -u`). `format` is the
    /// backing format extension's value. Durable on return; a crash leaves the old name and format or the new ones.
    ///
    /// # Errors
    /// [`Error::Limit`] where the name does not fit the first cluster, [`Error::Refused`] where it does not fit beside the
    /// old one and more than one sector would have to change at once (clusters of up to 2 KiB with very long names).
    pub fn set_backing_file(&self, name: Option<&[u8]>, format: Option<&[u8]>) -> Result<()> {
        self.check_write(GuestOffset::ZERO, 0)?;
        self.changing(|state| {
            let mut header = state.header.clone();
            header.set_backing(name, format);
            state.change_header(header)
        })
    }

    /// Whether [`Image::set_backing_file`] can be done as far as the header goes, without doing it.
    pub(crate) fn check_backing_file(&self, name: Option<&[u8]>, format: Option<&[u8]>) -> Result<()> {
        self.shared(|state| {
            let mut header = state.header.clone();
            header.set_backing(name, format);
            state.route_to(&mut header).map(|_| ())
        })
    }

    /// The internal snapshots.
    ///
    /// # Errors
    /// [`Error::Corrupt`].
    pub fn snapshots(&self) -> Result<Vec<SnapshotEntry>> {
        let (header, limits) = self.peek(|state| (state.header.header.clone(), state.limits.clone()));
        tables::read_snapshots(&*self.storage, &header, &limits)
    }

    /// The bitmap directory; empty where there are no bitmaps.
    ///
    /// # Errors
    /// [`Error::Corrupt`].
    pub fn bitmaps(&self) -> Result<Vec<BitmapDirectoryEntry>> {
        tables::read_bitmap_directory(&*self.storage, &self.header())
    }

    /// Keeps the image for this thread to write: a merge finds places in it, and fills them without its lock.
    ///
    /// # Errors
    /// [`Error::Refused`] where it is reserved already.
    pub(crate) fn reserve(&self) -> Result<Reservation<'_>> {
        let mut reserved = self.reserved();
        if reserved.is_some() {
            return Err(Error::refused(self.name(), IN_A_MERGE));
        }
        *reserved = Some(std::thread::current().id());
        Ok(Reservation(self))
    }

    fn reserved(&self) -> MutexGuard<'_, Option<ThreadId>> {
        self.reserved.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at the state beside other readers.
    fn peek<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.state.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Loads L2 tables into the cache, as many as fit, so that several walks of the extents read each of them once.
    pub(crate) fn load_l2_tables(&self) -> Result<()> {
        let span = self.geometry.l1_entry_span();
        self.shared(|state| {
            let mut next = state.next_l1(0);
            for _ in 0..state.l2_capacity() {
                let Some(index) = next else { break };
                state.l2_table(GuestOffset::new(span.saturating_mul(index as u64)))?;
                next = state.next_l1(index + 1);
            }
            Ok(())
        })
    }

    /// Returns the offset of the first L2 table that is past the end of the file, in the order of the L1 table: the file
    /// is truncated, and what the table maps would read as zeroes.
    pub(crate) fn missing_l2_table(&self) -> Result<Option<crate::format::HostOffset>> {
        let len = self.storage.len()?;
        Ok(self.peek(|state| {
            let tables = state.l1.iter().filter_map(|entry| entry.l2_table());
            tables.filter(|offset| offset.get() >= len).min()
        }))
    }

    /// Uses the state beside other readers.
    fn shared<T>(&self, operation: impl FnOnce(&State) -> Result<T>) -> Result<T> {
        self.peek(operation)
    }

    /// Uses the state alone.
    fn exclusive<T>(&self, operation: impl FnOnce(&mut State) -> Result<T>) -> Result<T> {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        // Whoever waited for the state while metadata was found in the way of data does not write either: not even the
        // header, whose corrupt bit it does not know of.
        self.check_poison()?;
        let done = self.guard(|| operation(&mut state));
        if state.header_in_doubt {
            self.poisoned.store(true, Ordering::SeqCst);
        }
        done
    }

    /// Changes the image, alone, after what must precede the first change.
    fn changing<T>(&self, operation: impl FnOnce(&mut State) -> Result<T>) -> Result<T> {
        self.exclusive(|state| {
            state.prepare_write()?;
            operation(state)
        })
    }

    /// Runs a writing operation. Where it met metadata in the way of data, the image is marked corrupt, and nothing more
    /// is written by this handle.
    fn guard<T>(&self, operation: impl FnOnce() -> Result<T>) -> Result<T> {
        let done = operation();
        if let Err(Error::Overlap { .. }) = &done
            && !self.poisoned.swap(true, Ordering::SeqCst)
        {
            self.mark_corrupt();
        }
        done
    }

    /// Sets the corrupt bit; the error that led here is what the caller hears of.
    fn mark_corrupt(&self) {
        let _ = open::set_corrupt_bit(&*self.storage);
    }

    fn check_poison(&self) -> Result<()> {
        if self.poisoned.load(Ordering::SeqCst) {
            return Err(Error::Poisoned { file: self.name().to_owned() });
        }
        Ok(())
    }

    /// Whether a range lies within the virtual size.
    fn check_range(&self, offset: GuestOffset, len: u64) -> Result<()> {
        let size = self.virtual_size();
        match offset.checked_add(len) {
            Some(end) if end.get() <= size => Ok(()),
            _ => {
                Err(Error::refused(self.name(), format!("{len} bytes at {offset} reach past the virtual size {size}")))
            }
        }
    }

    /// Whether a range may be written.
    fn check_write(&self, offset: GuestOffset, len: u64) -> Result<()> {
        if !self.writable {
            return Err(crate::storage::Error::ReadOnly { name: self.name().to_owned() }.into());
        }
        self.check_poison()?;
        if self.reserved().is_some_and(|thread| thread != std::thread::current().id()) {
            return Err(Error::refused(self.name(), IN_A_MERGE));
        }
        self.data_access()?;
        self.check_range(offset, len)
    }
}

/// A length as an index; more than memory can hold stays more than memory can hold.
fn as_len(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// The first eight bytes as a big-endian number; missing ones are 0.
fn be_u64(bytes: &[u8]) -> u64 {
    bytes.iter().take(8).fold(0, |number, &byte| number << 8 | u64::from(byte))
}
