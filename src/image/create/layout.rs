//! Where everything of a new image lies, decided before a byte is written.

use crate::format::limits::{
    MAX_BACKING_FILE_SIZE, MAX_BACKING_FORMAT_SIZE, MAX_CLUSTER_OFFSET, MAX_L1_ENTRIES, MAX_OFFSET, MAX_REFTABLE_BYTES,
    SECTOR_SIZE,
};
use crate::format::{CompressionType, Geometry, HostOffset, RefcountOrder, Version};

use super::super::{Error, Result};
use super::{CreateOptions, Preallocation};

/// The parts of a new image in the order of the file, in clusters: the header, the refcount table, the first refcount
/// block, the L1 table, all other refcount blocks, and with preallocation all L2 tables and all data.
///
/// Up to the L1 table this is where QEMU puts them, too. Behind it QEMU mixes what it allocates, here each kind is one
/// run: the whole disk is one extent, and is written in long strokes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) geometry: Geometry,
    pub(super) version: Version,
    pub(super) reftable_clusters: u64,
    pub(super) refcount_blocks: u64,
    pub(super) l1_entries: u64,
    pub(super) l2_tables: u64,
    pub(super) data_clusters: u64,
}

impl Layout {
    /// Checks the options against each other and against all limits, and places everything.
    pub(super) fn plan(file: &str, options: &CreateOptions) -> Result<Self> {
        let geometry = check_options(file, options)?;
        let limit = |what: String| Error::Limit { file: file.to_owned(), what };

        let l1_entries = geometry.l1_entries_for(options.size);
        if l1_entries > MAX_L1_ENTRIES {
            let largest = MAX_L1_ENTRIES.saturating_mul(geometry.l1_entry_span());
            return Err(limit(format!("a size of {} with this cluster size, at most {largest}", options.size)));
        }
        let preallocate = options.preallocation != Preallocation::Off;
        let mut layout = Self {
            geometry,
            version: options.version,
            reftable_clusters: 1,
            refcount_blocks: 1,
            l1_entries,
            l2_tables: if preallocate { l1_entries } else { 0 },
            data_clusters: if preallocate { geometry.clusters_for(options.size) } else { 0 },
        };
        // The refcount structures count themselves: each round counts what the round before has added, until nothing is.
        loop {
            let blocks = layout.end().div_ceil(geometry.refcount_block_entries());
            let table = geometry.clusters_for(blocks.saturating_mul(8));
            if (blocks, table) == (layout.refcount_blocks, layout.reftable_clusters) {
                break;
            }
            (layout.refcount_blocks, layout.reftable_clusters) = (blocks, table);
        }
        let reftable_bytes = layout.reftable_clusters.saturating_mul(geometry.cluster_size());
        if reftable_bytes > MAX_REFTABLE_BYTES {
            return Err(limit(format!("a refcount table of {reftable_bytes} bytes, at most {MAX_REFTABLE_BYTES}")));
        }
        if layout.end() > MAX_CLUSTER_OFFSET >> geometry.cluster_bits().get() {
            return Err(limit(format!("{} host clusters reach past {MAX_CLUSTER_OFFSET:#x}", layout.end())));
        }
        Ok(layout)
    }

    /// The number of L1 entries, as the header tells it.
    pub(super) fn l1_size(&self) -> u32 {
        narrow(self.l1_entries)
    }

    /// The length of the refcount table in clusters, as the header tells it.
    pub(super) fn refcount_table_clusters(&self) -> u32 {
        narrow(self.reftable_clusters)
    }

    /// The clusters that the L1 table fills.
    pub(super) fn l1_clusters(&self) -> u64 {
        self.geometry.clusters_for(self.l1_entries * 8)
    }

    /// The cluster of the first refcount block.
    pub(super) fn first_block(&self) -> u64 {
        1 + self.reftable_clusters
    }

    /// The first cluster of the L1 table.
    pub(super) fn l1_table(&self) -> u64 {
        self.first_block() + 1
    }

    /// The first cluster of the refcount blocks behind the first one.
    pub(super) fn other_blocks(&self) -> u64 {
        self.l1_table() + self.l1_clusters()
    }

    /// The cluster of the first L2 table.
    pub(super) fn l2_table(&self) -> u64 {
        self.other_blocks() + self.refcount_blocks - 1
    }

    /// The first cluster of data.
    pub(super) fn data(&self) -> u64 {
        self.l2_table() + self.l2_tables
    }

    /// The cluster behind the last one.
    pub(super) fn end(&self) -> u64 {
        self.data() + self.data_clusters
    }

    /// The host offset of a cluster; below [`MAX_CLUSTER_OFFSET`] for all up to the end.
    pub(super) fn offset(&self, cluster: u64) -> HostOffset {
        HostOffset::new(cluster << self.geometry.cluster_bits().get())
    }

    /// The length of the file. Where the L1 table comes last, the file ends with it, as QEMU's does.
    pub(super) fn file_len(&self) -> u64 {
        if self.end() == self.other_blocks() {
            self.offset(self.l1_table()).get() + self.l1_entries * 8
        } else {
            self.offset(self.end()).get()
        }
    }
}

/// A count as the header holds it: the limits of the tables are far below 2^32.
fn narrow(count: u64) -> u32 {
    let narrow = u32::try_from(count).unwrap_or(u32::MAX);
    assert!(u64::from(narrow) == count, "a layout over its limits");
    narrow
}

/// Checks what no layout is needed for, in QEMU's sense of what goes with what.
fn check_options(file: &str, options: &CreateOptions) -> Result<Geometry> {
    let refused = |why: &str| Err(Error::refused(file, why));
    if !options.size.is_multiple_of(SECTOR_SIZE) {
        return refused("the size is not a multiple of 512");
    }
    if options.size > MAX_OFFSET {
        let what = format!("a size of {}, at most {MAX_OFFSET}", options.size);
        return Err(Error::Limit { file: file.to_owned(), what });
    }
    if options.version == Version::V2 {
        if options.refcount_order != RefcountOrder::default() {
            return refused("refcounts of other than 16 bits need version 3 (compat=1.1)");
        }
        if options.extended_l2 {
            return refused("extended L2 entries need version 3 (compat=1.1)");
        }
        if options.lazy_refcounts {
            return refused("lazy refcounts need version 3 (compat=1.1)");
        }
        if options.compression_type != CompressionType::Deflate {
            return refused("a compression type other than zlib needs version 3 (compat=1.1)");
        }
    }
    if let Some((name, format)) = &options.backing {
        check_backing(file, name, format)?;
        // A standard L2 entry that has a host cluster hides the backing file; only subclusters can have one and not.
        if options.preallocation != Preallocation::Off && !options.extended_l2 {
            return refused("preallocation with a backing file needs extended L2 entries");
        }
    }
    Geometry::new(options.cluster_bits, options.refcount_order, options.extended_l2)
        .ok_or_else(|| Error::refused(file, "extended L2 entries need clusters of at least 16 KiB"))
}

/// Checks the lengths of what the header says of the backing file.
fn check_backing(file: &str, name: &[u8], format: &[u8]) -> Result<()> {
    if name.is_empty() {
        return Err(Error::refused(file, "the backing file's name is empty"));
    }
    if format.is_empty() {
        return Err(Error::refused(file, "a backing file needs its format"));
    }
    let parts = [("name", name, MAX_BACKING_FILE_SIZE), ("format", format, MAX_BACKING_FORMAT_SIZE)];
    for (part, bytes, most) in parts {
        if bytes.len() as u64 > most {
            let what = format!("a backing file {part} of {} bytes, at most {most}", bytes.len());
            return Err(Error::Limit { file: file.to_owned(), what });
        }
    }
    Ok(())
}
