//! Opening an image.

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, RwLock};

use crate::format::limits::{MAX_CLUSTER_BITS, MIN_CLUSTER_BITS};
use crate::format::{Geometry, HeaderCluster, IncompatibleFeatures, Limits, SnapshotEntry, Version};
use crate::storage::{Access, FileStorage, Storage};

use super::check::{CheckOptions, Fix, check};
use super::state::State;
use super::{Error, Image, Result, as_len};

/// How an image is opened.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct OpenOptions {
    /// Whether it will be written. An image with the dirty bit set is repaired first, as QEMU does.
    pub write: bool,
    /// What the image may claim.
    pub limits: Limits,
}

impl OpenOptions {
    /// The same, for writing or not.
    #[must_use]
    pub fn with_write(mut self, write: bool) -> Self {
        self.write = write;
        self
    }

    /// The same with other limits.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }
}

impl Image {
    /// Opens an image that lies on `storage`.
    ///
    /// An image that is encrypted, or whose data lies in another file, can be opened and inspected; its guest data is
    /// refused (see [`Image::data_access`]).
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::Unsupported`] and [`Error::Limit`] for what the header says,
    /// [`Error::MarkedCorrupt`] for writing an image with the corrupt bit, [`Error::Storage`].
    pub fn open(storage: Arc<dyn Storage>, options: &OpenOptions) -> Result<Self> {
        if options.write && storage.is_read_only() {
            return Err(crate::storage::Error::ReadOnly { name: storage.name().to_owned() }.into());
        }
        let (mut header, mut bytes) = read_header(&*storage, &options.limits)?;
        if options.write && header.header.incompatible_features.has(IncompatibleFeatures::CORRUPT) {
            return Err(Error::MarkedCorrupt { file: storage.name().to_owned() });
        }
        if options.write && header.header.incompatible_features.has(IncompatibleFeatures::DIRTY) {
            (header, bytes) = repair_dirty(&*storage, &options.limits)?;
        }
        if header.header.size > options.limits.max_virtual_size {
            let what = format!("virtual size {}, at most {}", header.header.size, options.limits.max_virtual_size);
            return Err(Error::Limit { file: storage.name().to_owned(), what });
        }
        let geometry = header.header.geometry();
        let state = State::load(Arc::clone(&storage), header, bytes, options.limits.clone())?;
        Ok(Self::with_state(storage, geometry, options.write, state))
    }

    /// Opens an internal snapshot for reading, as the disk that it was: in the size that it records, else in the present
    /// one. What it does not hold is the backing file's, as ever. Nobody must delete it meanwhile.
    ///
    /// ```
    /// use qcow2_chain::image::{Image, OpenOptions};
    ///
    /// # fn look(path: &std::path::Path) -> Result<(), qcow2_chain::image::Error> {
    /// let image = Image::open_path(path, &OpenOptions::default())?;
    /// for snapshot in image.snapshots()? {
    ///     let disk = image.open_snapshot(&snapshot)?;
    ///     println!("{}: {} bytes", String::from_utf8_lossy(&snapshot.name), disk.virtual_size());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Corrupt`] and [`Error::Limit`] for what the snapshot claims, [`Error::Storage`].
    pub fn open_snapshot(&self, snapshot: &SnapshotEntry) -> Result<Self> {
        let storage = Arc::clone(self.storage());
        let (mut header, limits) = self.peek(|state| (state.header.clone(), state.limits.clone()));
        snapshot.validate_l1(self.geometry, &limits).map_err(|e| Error::format(storage.name(), e))?;
        header.header.l1_table_offset = snapshot.l1_table_offset;
        header.header.l1_size = snapshot.l1_size;
        header.header.size = snapshot.disk_size().unwrap_or(header.header.size);
        if header.header.size > limits.max_virtual_size {
            let what = format!("virtual size {}, at most {}", header.header.size, limits.max_virtual_size);
            return Err(Error::Limit { file: storage.name().to_owned(), what });
        }
        let state = State::load(Arc::clone(&storage), header, Vec::new(), limits)?;
        Ok(Self::with_state(storage, self.geometry, false, state))
    }

    fn with_state(storage: Arc<dyn Storage>, geometry: Geometry, writable: bool, state: State) -> Self {
        let (poisoned, reserved) = (AtomicBool::new(false), Mutex::default());
        Self { storage, geometry, writable, poisoned, reserved, state: Box::new(RwLock::new(state)) }
    }

    /// Opens the image at a path, with the locks that QEMU would take.
    ///
    /// # Errors
    /// As [`Image::open`], and [`crate::storage::Error::Busy`] where another program uses the image.
    pub fn open_path(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Self> {
        let access = if options.write { Access::write() } else { Access::read() };
        Self::open(Arc::new(FileStorage::open(path, &access)?), options)
    }
}

/// Reads and decodes the first cluster. The second value is its bytes, as far as they are used.
fn read_header(storage: &dyn Storage, limits: &Limits) -> Result<(HeaderCluster, Vec<u8>)> {
    let file_len = storage.len()?;
    let mut start = [0; 24];
    storage.read_at(&mut start, 0)?;
    // Bytes 20 to 23 tell how long the first cluster is; decoding judges them.
    let cluster_bits = u64::from_be_bytes(std::array::from_fn(|at| start[16 + at])) & u64::from(u32::MAX);
    let cluster_bits = cluster_bits.clamp(u64::from(MIN_CLUSTER_BITS), u64::from(MAX_CLUSTER_BITS));
    let mut bytes = vec![0; as_len(file_len.min(1 << cluster_bits))];
    storage.read_at(&mut bytes, 0)?;
    let header = HeaderCluster::decode(&bytes, file_len, limits).map_err(|e| Error::format(storage.name(), e))?;
    bytes.truncate(header.header.geometry().cluster_len());
    Ok((header, bytes))
}

/// Rebuilds the refcounts of an image that was not closed, as its dirty bit asks for.
fn repair_dirty(storage: &dyn Storage, limits: &Limits) -> Result<(HeaderCluster, Vec<u8>)> {
    check(storage, &CheckOptions { fix: Fix::All, limits: limits.clone() })?;
    let (header, bytes) = read_header(storage, limits)?;
    let features = header.header.incompatible_features;
    if features.has(IncompatibleFeatures::DIRTY) || features.has(IncompatibleFeatures::CORRUPT) {
        return Err(Error::MarkedCorrupt { file: storage.name().to_owned() });
    }
    Ok((header, bytes))
}

/// Sets the corrupt bit of the image on `storage`, durably. Version 2 has none.
pub(super) fn set_corrupt_bit(storage: &dyn Storage) -> Result<()> {
    let (mut header, before) = read_header(storage, &Limits::default())?;
    if header.header.version == Version::V2 {
        return Ok(());
    }
    header.header.incompatible_features.0 |= IncompatibleFeatures::CORRUPT;
    let after = header.encode_over(&before).map_err(|e| Error::format(storage.name(), e))?;
    for sectors in HeaderCluster::changed_sectors(&before, &after) {
        storage.write_at(&after[sectors.clone()], sectors.start as u64)?;
    }
    Ok(storage.sync()?)
}
