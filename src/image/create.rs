//! Creating an image.

mod layout;

use crate::format::{
    ClusterBits, CompatibleFeatures, CompressionType, Extension, Header, HeaderCluster, HostOffset,
    IncompatibleFeatures, L1Entry, L2Entry, L2Table, NormalCluster, RefcountBlock, RefcountOrder, RefcountTableEntry,
    Subclusters, Version, encode_l1, encode_reftable,
};
use crate::storage::{self, Storage, zero_range};

use super::{Error, Result, as_len};
use layout::Layout;

/// What a disk writes at once. A header's magic and all that it points at lie in the first one.
const SECTOR: u64 = 512;

/// What to allocate before anything is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// All L2 tables and refcounts, without writing the data clusters.
    Metadata,
    /// As `Metadata`, and blocks of the file reserved.
    Falloc,
    /// As `Metadata`, and the data clusters written with zeroes.
    Full,
}

/// What a new image looks like. The default is an empty disk as `qemu-img create` makes it: version 3, clusters of
/// 64 KiB, 16-bit refcounts.
///
/// ```
/// use qcow2_chain::format::ClusterBits;
/// use qcow2_chain::image::{CreateOptions, Preallocation};
///
/// let options = CreateOptions::new(10 << 30)
///     .with_cluster_bits(ClusterBits::from_size(128 << 10).expect("a power of two within the limits"))
///     .with_preallocation(Preallocation::Metadata);
/// assert_eq!(options.size, 10 << 30);
/// ```
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct CreateOptions {
    /// The virtual size in bytes, a multiple of 512.
    pub size: u64,
    /// The version (`compat`).
    pub version: Version,
    /// The cluster size.
    pub cluster_bits: ClusterBits,
    /// The refcount width.
    pub refcount_order: RefcountOrder,
    /// Whether L2 entries are extended.
    pub extended_l2: bool,
    /// Whether refcount updates may be postponed.
    pub lazy_refcounts: bool,
    /// How clusters that somebody compresses later are compressed.
    pub compression_type: CompressionType,
    /// The backing file's name, as it is written to the header, and its format.
    pub backing: Option<(Vec<u8>, Vec<u8>)>,
    /// What to allocate.
    pub preallocation: Preallocation,
}

impl CreateOptions {
    /// The default for a disk of `size` bytes, a multiple of 512.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Self { size, ..Self::default() }
    }

    /// The same with another size.
    #[must_use]
    pub fn with_size(mut self, size: u64) -> Self {
        self.size = size;
        self
    }

    /// The same with another version. Version 2 (`compat=0.10`) has 16-bit refcounts, deflate, and no extended L2
    /// entries or lazy refcounts.
    #[must_use]
    pub fn with_version(mut self, version: Version) -> Self {
        self.version = version;
        self
    }

    /// The same with another cluster size.
    #[must_use]
    pub fn with_cluster_bits(mut self, cluster_bits: ClusterBits) -> Self {
        self.cluster_bits = cluster_bits;
        self
    }

    /// The same with another refcount width.
    #[must_use]
    pub fn with_refcount_order(mut self, refcount_order: RefcountOrder) -> Self {
        self.refcount_order = refcount_order;
        self
    }

    /// The same with or without extended L2 entries (32 subclusters a cluster); these need clusters of at least 16 KiB.
    #[must_use]
    pub fn with_extended_l2(mut self, extended_l2: bool) -> Self {
        self.extended_l2 = extended_l2;
        self
    }

    /// The same with or without lazy refcounts.
    #[must_use]
    pub fn with_lazy_refcounts(mut self, lazy_refcounts: bool) -> Self {
        self.lazy_refcounts = lazy_refcounts;
        self
    }

    /// The same with another compression type.
    #[must_use]
    pub fn with_compression_type(mut self, compression_type: CompressionType) -> Self {
        self.compression_type = compression_type;
        self
    }

    /// The same as an overlay. `name` (at most 1,023 bytes) is written as it is, and is taken by whoever opens the image
    /// relative to the image's directory; `format` (at most 15 bytes) is `qcow2` or `raw`. The file is not looked at.
    #[must_use]
    pub fn with_backing(mut self, name: impl Into<Vec<u8>>, format: impl Into<Vec<u8>>) -> Self {
        self.backing = Some((name.into(), format.into()));
        self
    }

    /// The same with another preallocation. With a backing file it needs extended L2 entries, as in QEMU.
    #[must_use]
    pub fn with_preallocation(mut self, preallocation: Preallocation) -> Self {
        self.preallocation = preallocation;
        self
    }

    /// Writes the new image to an empty storage without opening it, durable on return. A storage of fixed size (a block
    /// device) may hold something, which is lost. [`super::Image::create`] does the same and opens it.
    ///
    /// # Errors
    /// [`Error::Refused`] for options that do not go together and for a storage that is not empty, [`Error::Limit`] for
    /// sizes and names that the format or QEMU cannot hold, [`Error::Storage`].
    pub fn write_to(&self, storage: &dyn Storage) -> Result<()> {
        lay_out(storage, self)
    }
}

/// Writes a new image to an empty storage, durable on return.
///
/// The header's first sector is written last, behind a barrier: what a crash leaves before is no image. The name of a
/// backing file may lie behind that sector.
pub(super) fn lay_out(storage: &dyn Storage, options: &CreateOptions) -> Result<()> {
    let layout = Layout::plan(storage.name(), options)?;
    let header = header_cluster(&layout, options).encode().map_err(|error| Error::format(storage.name(), error))?;

    make_room(storage, &layout)?;
    write_refcounts(storage, &layout)?;
    write_l1_table(storage, &layout)?;
    write_l2_tables(storage, &layout)?;
    prepare_data(storage, &layout, options.preallocation)?;
    let (first, rest) = header.split_at(header.len().min(as_len(SECTOR)));
    storage.write_at(rest, SECTOR)?;
    storage.sync()?; // barrier: all that the header names, and what of it lies behind the first sector
    storage.write_at(first, 0)?;
    storage.sync()?; // not an order, a promise: the image is there
    Ok(())
}

/// The header, its extensions as QEMU writes them, and the backing file's name.
fn header_cluster(layout: &Layout, options: &CreateOptions) -> HeaderCluster {
    let flag = |set, bit| if set { bit } else { 0 };
    let incompatible = flag(options.compression_type != CompressionType::Deflate, IncompatibleFeatures::COMPRESSION)
        | flag(options.extended_l2, IncompatibleFeatures::EXTENDED_L2);
    let mut header = Header::new(options.version, options.cluster_bits, options.size);
    header.l1_size = layout.l1_size();
    if layout.l1_entries != 0 {
        header.l1_table_offset = layout.offset(layout.l1_table());
    }
    header.refcount_table_offset = layout.offset(1);
    header.refcount_table_clusters = layout.refcount_table_clusters();
    header.incompatible_features = IncompatibleFeatures(incompatible);
    header.compatible_features = CompatibleFeatures(flag(options.lazy_refcounts, CompatibleFeatures::LAZY_REFCOUNTS));
    header.refcount_order = options.refcount_order;
    header.compression_type = options.compression_type;

    let (name, format) = options.backing.clone().unzip();
    let extensions = Extension::for_new_image(&header, format.as_deref(), None, None);
    HeaderCluster::new(header, extensions, name)
}

/// Sees to it that the storage is empty, or as good as empty, and gives it its length.
fn make_room(storage: &dyn Storage, layout: &Layout) -> Result<()> {
    let len = storage.len()?;
    if !storage.is_fixed_size() {
        if len != 0 {
            return Err(Error::refused(storage.name(), "a new image needs an empty file"));
        }
        storage.set_len(layout.file_len())?;
        return Ok(());
    }
    let need = layout.offset(layout.end()).get();
    if len < need {
        return Err(storage::Error::NoSpace { name: storage.name().to_owned(), need }.into());
    }
    // What is new and not written must read as zeroes: the L1 table, and preallocated data, which the guest would see.
    zero_range(storage, 0..SECTOR)?;
    storage.sync()?; // barrier: an image that was here before is gone before its tables are
    zero_range(storage, SECTOR..need)?;
    Ok(())
}

/// Writes the refcount blocks, all refcounts 1 up to the end, and the table that names them.
fn write_refcounts(storage: &dyn Storage, layout: &Layout) -> Result<()> {
    let mut table = vec![RefcountTableEntry(layout.offset(layout.first_block()).get())];
    let others = layout.other_blocks()..layout.l2_table();
    table.extend(others.map(|cluster| RefcountTableEntry(layout.offset(cluster).get())));
    storage.write_at(&encode_reftable(&table), layout.offset(1).get())?;

    let full = counted(layout, layout.geometry.refcount_block_entries());
    let in_last = layout.end() - (layout.refcount_blocks - 1) * layout.geometry.refcount_block_entries();
    let last = counted(layout, in_last);
    if layout.refcount_blocks == 1 {
        storage.write_at(last.as_bytes(), layout.offset(layout.first_block()).get())?;
        return Ok(());
    }
    storage.write_at(full.as_bytes(), layout.offset(layout.first_block()).get())?;
    let mut run = Run::new(storage, layout.offset(layout.other_blocks()));
    for _ in 2..layout.refcount_blocks {
        run.push(full.as_bytes())?;
    }
    run.push(last.as_bytes())?;
    run.finish()
}

/// A refcount block whose first `count` refcounts are 1.
fn counted(layout: &Layout, count: u64) -> RefcountBlock {
    let mut block = RefcountBlock::empty(layout.geometry);
    let count = usize::try_from(count).unwrap_or(usize::MAX).min(block.len());
    block.fill(0..count, 1);
    block
}

/// Writes the L1 table, unless it is empty: then it reads as zeroes already.
fn write_l1_table(storage: &dyn Storage, layout: &Layout) -> Result<()> {
    if layout.l2_tables == 0 {
        return Ok(());
    }
    let tables = layout.l2_table()..layout.data();
    let entries: Vec<_> = tables.map(|cluster| L1Entry::new(layout.offset(cluster), true)).collect();
    storage.write_at(&encode_l1(&entries), layout.offset(layout.l1_table()).get())?;
    Ok(())
}

/// Writes all L2 tables, one after the other: guest cluster n has the n-th data cluster.
fn write_l2_tables(storage: &dyn Storage, layout: &Layout) -> Result<()> {
    let mut run = Run::new(storage, layout.offset(layout.l2_table()));
    let mut left = layout.data_clusters;
    let mut host = layout.data();
    for _ in 0..layout.l2_tables {
        let mut table = L2Table::empty(layout.geometry, layout.version);
        let here = left.min(layout.geometry.l2_entries());
        for (index, cluster) in (0..table.len()).zip(host..host + here) {
            table.set(index, &preallocated(layout, layout.offset(cluster)));
        }
        run.push(table.as_bytes())?;
        left -= here;
        host += here;
    }
    run.finish()
}

/// The entry of a cluster that has its space but was never written. In an extended entry nothing is allocated, so that
/// a backing file shows through; a standard entry can only be told as data.
fn preallocated(layout: &Layout, host: HostOffset) -> L2Entry {
    if layout.geometry.extended_l2() {
        L2Entry::Normal(NormalCluster { host: Some(host), copied: true, subclusters: Subclusters::default() })
    } else {
        L2Entry::data(layout.geometry, host)
    }
}

/// Gives the data clusters what the preallocation promises.
fn prepare_data(storage: &dyn Storage, layout: &Layout, preallocation: Preallocation) -> Result<()> {
    let data = layout.offset(layout.data()).get()..layout.offset(layout.end()).get();
    if data.is_empty() {
        return Ok(());
    }
    match preallocation {
        Preallocation::Off | Preallocation::Metadata => return Ok(()),
        Preallocation::Falloc => match storage.allocate_range(data.clone()) {
            // Writing reserves, too.
            Err(storage::Error::Unsupported { .. }) => {}
            done => return Ok(done?),
        },
        Preallocation::Full => {}
    }
    let zeroes = vec![0; RUN_LEN];
    let mut at = data.start;
    while at < data.end {
        let len = usize::try_from(data.end - at).unwrap_or(usize::MAX).min(RUN_LEN);
        storage.write_at(&zeroes[..len], at)?;
        at += len as u64;
    }
    Ok(())
}

/// How many bytes go to the storage at once.
const RUN_LEN: usize = 4 << 20;

/// Bytes that follow one another in the storage, written in long strokes.
struct Run<'a> {
    storage: &'a dyn Storage,
    at: HostOffset,
    bytes: Vec<u8>,
}

impl<'a> Run<'a> {
    fn new(storage: &'a dyn Storage, at: HostOffset) -> Self {
        Self { storage, at, bytes: Vec::new() }
    }

    /// Appends.
    fn push(&mut self, bytes: &[u8]) -> Result<()> {
        self.bytes.extend_from_slice(bytes);
        if self.bytes.len() >= RUN_LEN { self.finish() } else { Ok(()) }
    }

    /// Writes what is left.
    fn finish(&mut self) -> Result<()> {
        if !self.bytes.is_empty() {
            self.storage.write_at(&self.bytes, self.at.get())?;
            self.at = self.at.saturating_add(self.bytes.len() as u64);
            self.bytes.clear();
        }
        Ok(())
    }
}
