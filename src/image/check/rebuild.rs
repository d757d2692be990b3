//! A refcount structure built anew from the references, where the old one cannot be mended in place.
//!
//! The new table and blocks go to clusters that nothing refers to, the old ones included, and are durable before the
//! header names them: at any moment the file has one whole structure.
//!
//! Entries that name places behind the file's end are not counted. Where the new structure would lie there too, the file is
//! made longer first, and everything is counted anew: the structure must not become what such an entry calls its data.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use byteorder::{BigEndian, ByteOrder};

use crate::format::{HostOffset, RefcountBlock, RefcountTableEntry};
use crate::image::{Error, Result};

use super::MAX_CLUSTERS;
use super::counts::{ReferenceCounts, index};
use super::snapshots::{self, SnapshotTable};
use super::subject::Subject;

/// A refcount structure that lies in clusters reserved for it.
#[derive(Debug, Default)]
struct Layout {
    /// The cluster of each refcount block by its index in the table.
    blocks: BTreeMap<u64, u64>,
    /// The first cluster of the table.
    table: u64,
    /// How many clusters it fills.
    table_clusters: u64,
}

/// What became of a rebuild.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Rebuilt {
    /// It is done.
    Done,
    /// Nothing was written: the file must have this many bytes first, and be counted anew.
    NeedsLength(u64),
}

/// Writes a new refcount structure, and with `snapshots` a new snapshot table, and makes the header name them.
///
/// `old` are the refcount table and blocks as they were counted: their clusters are free afterwards. `past_end` says that
/// something refers to places behind the file's end.
pub(super) fn rebuild(
    subject: &mut Subject<'_>,
    counts: &mut ReferenceCounts,
    old: &[(u64, u64)],
    snapshots: Option<&SnapshotTable>,
    past_end: bool,
) -> Result<Rebuilt> {
    let (size, before) = (subject.cluster_size(), counts.clusters());
    let mut released: Vec<(u64, u64)> = old.to_vec();
    // Blocks that were not counted, because what names them is wrong, still say which clusters are in use.
    for offset in subject.reftable.iter().filter_map(|entry| entry.block()).map(HostOffset::get) {
        if !subject.past_end(offset, size) && !subject.unaligned(offset) && counts.get(offset / size) == 0 {
            counts.add(offset / size, 1);
            released.push((offset, size));
        }
    }
    let mut snapshots_at = subject.head.header.snapshots_offset.get();
    let mut table = Vec::new();
    if let Some(old) = snapshots {
        table = snapshots::rewritten(subject, old)?;
        released.push((snapshots_at, old.len));
        snapshots_at = reserve(counts, 0, (table.len() as u64).div_ceil(size)) * size;
    }
    let layout = Layout::reserve(subject, counts)?;
    if past_end && counts.clusters() > before {
        // In steps of a part of the file, so that a file whose end was cut off is not counted once for each cluster.
        let rounded = counts.clusters().next_multiple_of((before / 8).max(1));
        let wanted = rounded.min(MAX_CLUSTERS).max(counts.clusters());
        return Ok(Rebuilt::NeedsLength(wanted.saturating_mul(size)));
    }
    if snapshots.is_some() {
        subject.storage.write_at(&table, snapshots_at)?;
    }
    for (offset, len) in released.into_iter().filter(|(offset, len)| *len > 0 && !subject.past_end(*offset, *len)) {
        for cluster in offset / size..(offset + len).div_ceil(size) {
            counts.release(cluster);
        }
    }
    layout.write(subject, counts)?;
    subject.storage.sync()?; // barrier: the new structures before the header names them

    let header = &mut subject.head.header;
    header.refcount_table_offset = HostOffset::new(layout.table * size);
    header.refcount_table_clusters = u32::try_from(layout.table_clusters).unwrap_or(u32::MAX);
    header.snapshots_offset = HostOffset::new(snapshots_at);
    let mut fields = [0; 24];
    BigEndian::write_u64(&mut fields, header.refcount_table_offset.get());
    BigEndian::write_u32(&mut fields[8..], header.refcount_table_clusters);
    BigEndian::write_u32(&mut fields[12..], header.nb_snapshots);
    BigEndian::write_u64(&mut fields[16..], snapshots_at);
    // All within one sector, so that both change or neither does.
    subject.storage.write_at(&fields, 48)?;
    // Nothing is allocated before the check is done, and that ends with a barrier.
    Ok(Rebuilt::Done)
}

/// Reserves neighbouring clusters that nobody refers to.
fn reserve(counts: &mut ReferenceCounts, from: u64, count: u64) -> u64 {
    let first = counts.find_free(from, count);
    for cluster in first..first + count {
        assert_eq!(counts.add(cluster, 1), 1, "cluster {cluster} was free");
    }
    first
}

impl Layout {
    /// Finds room for the table and for a block for every used cluster, those of the structure itself included.
    fn reserve(subject: &Subject<'_>, counts: &mut ReferenceCounts) -> Result<Self> {
        let bits = subject.geometry.refcount_block_bits();
        let entries = subject.cluster_size() / 8;
        let mut layout = Self::default();
        let mut cursor = 0;
        let mut needed = used_blocks(counts, bits);
        loop {
            while let Some(block) = needed.pop() {
                if let Entry::Vacant(place) = layout.blocks.entry(block) {
                    cursor = reserve(counts, cursor, 1);
                    place.insert(cursor);
                    needed.push(cursor >> bits);
                }
            }
            let last = layout.blocks.last_key_value().map_or(0, |(block, _)| *block);
            let wanted = (last + 1).div_ceil(entries);
            if wanted <= layout.table_clusters {
                return Ok(layout);
            }
            if wanted * subject.cluster_size() > subject.limits.max_reftable_bytes {
                let what = format!("refcount table of {wanted} clusters after the repair");
                return Err(Error::Limit { file: subject.storage.name().to_owned(), what });
            }
            for cluster in layout.table..layout.table + layout.table_clusters {
                counts.release(cluster);
            }
            layout.table = reserve(counts, cursor, wanted);
            layout.table_clusters = wanted;
            needed.extend((layout.table >> bits)..=((layout.table + wanted - 1) >> bits));
        }
    }

    /// Writes blocks and table to where they were reserved.
    fn write(&self, subject: &mut Subject<'_>, counts: &ReferenceCounts) -> Result<()> {
        let size = subject.cluster_size();
        let (bits, max) = (subject.geometry.refcount_block_bits(), subject.geometry.refcount_order().max());
        let mut table = vec![0; index(self.table_clusters * size)];
        subject.reftable = vec![RefcountTableEntry::default(); table.len() / 8];
        for (&number, &cluster) in &self.blocks {
            let mut block = RefcountBlock::empty(subject.geometry);
            let first = number << bits;
            for within in 0..1_u64 << bits {
                match counts.get(first + within) {
                    0 => {}
                    count => block.set(index(within), count.min(max)),
                }
            }
            subject.storage.write_at(block.as_bytes(), cluster * size)?;
            let entry = RefcountTableEntry::new(HostOffset::new(cluster * size));
            subject.reftable[index(number)] = entry;
            BigEndian::write_u64(&mut table[index(number) * 8..], entry.0);
        }
        subject.storage.write_at(&table, self.table * size)?;
        subject.file_len = subject.storage.len()?;
        Ok(())
    }
}

/// The refcount blocks that used clusters need.
fn used_blocks(counts: &ReferenceCounts, bits: u32) -> Vec<u64> {
    let mut blocks = Vec::new();
    let mut at = 0;
    while let Some(used) = counts.next_used(at) {
        blocks.push(used >> bits);
        at = ((used >> bits) + 1) << bits;
    }
    blocks
}
