//! The COPIED flag of the active tables: set exactly where the refcount is one.

use byteorder::{BigEndian, ByteOrder};

use crate::format::{HostCluster, OFFSET_MASK, OFLAG_COPIED};
use crate::image::Result;

use super::CheckReport;
use super::counts::{ReferenceCounts, index};
use super::mappings::Kind;
use super::references::{Metadata, TableUse};
use super::subject::{READ_AHEAD, Subject};

/// Which clusters have a refcount of exactly one in the image.
#[derive(Debug)]
pub(super) struct Ones<'s, 'a> {
    subject: &'s Subject<'a>,
    /// One bit a cluster, for each refcount block that has any.
    blocks: Vec<Option<Box<[u64]>>>,
}

impl<'s, 'a> Ones<'s, 'a> {
    /// Reads all refcounts of the clusters that the file has.
    pub(super) fn read(subject: &'s Subject<'a>) -> Result<Self> {
        let per_block = subject.geometry.refcount_block_entries();
        let needed = subject.geometry.clusters_for(subject.file_len).saturating_add(1).div_ceil(per_block);
        let mut blocks = Vec::new();
        for entry in subject.reftable.iter().take(index(needed)) {
            let offset = entry.block().filter(|offset| !subject.unreadable(*offset));
            let block = offset.map(|offset| subject.read_refblock(offset)).transpose()?.flatten();
            blocks.push(block.filter(|block| !block.is_empty()).map(|block| {
                let mut bits = vec![0_u64; block.len().div_ceil(64)].into_boxed_slice();
                for (word, bits) in bits.iter_mut().enumerate() {
                    for bit in 0..64 {
                        *bits |= u64::from(block.get(word * 64 + bit) == 1) << bit;
                    }
                }
                bits
            }));
        }
        Ok(Self { subject, blocks })
    }

    /// Whether a cluster's refcount is one; `None` where that cannot be read.
    fn is_one(&self, cluster: u64) -> Result<Option<bool>> {
        let geometry = self.subject.geometry;
        let entry = self.subject.reftable_entry(cluster);
        if entry.block().is_some_and(|offset| self.subject.unreadable(offset)) {
            return Ok(None);
        }
        let block = geometry.refcount_table_index(HostCluster::new(cluster));
        let within = geometry.refcount_block_index(HostCluster::new(cluster));
        match self.blocks.get(index(block)) {
            Some(Some(bits)) => Ok(Some(bits[within / 64] >> (within % 64) & 1 == 1)),
            Some(None) => Ok(Some(false)),
            // Far past the end of the file: a corrupt entry, rare enough to read a block for it.
            None => match entry.block() {
                Some(offset) => {
                    Ok(Some(self.subject.read_refblock(offset)?.is_some_and(|block| block.get(within) == 1)))
                }
                None => Ok(Some(false)),
            },
        }
    }
}

/// Checks the flags of the active L1 table and its L2 tables; with `repair`, where the metadata lies, sets them right.
/// Tells whether anything was written.
pub(super) fn check(
    ones: &Ones<'_, '_>,
    tables: &[TableUse],
    repair: Option<&Repair>,
    report: &mut CheckReport,
) -> Result<bool> {
    let wrote = check_l1(ones, repair, report)?;
    Ok(check_l2(ones, tables, repair, report)? | wrote)
}

/// What must not be written over while flags are set right.
#[derive(Debug)]
pub(super) struct Repair {
    /// All metadata but the active L1 table and the L2 tables.
    pub(super) beside_l1: Metadata,
    /// All metadata but the L2 tables.
    pub(super) beside_l2: Metadata,
    /// Tables that share their cluster with something else.
    pub(super) contested: Contested,
}

/// Tables that share their cluster with something else, such as data: a flag set right in one may be a bit of a guest's
/// data turned over.
#[derive(Debug)]
pub(super) struct Contested {
    l1: bool,
    /// The clusters of such L2 tables, sorted.
    l2: Vec<u64>,
}

impl Contested {
    /// Finds them by the references to their clusters.
    pub(super) fn among(subject: &Subject<'_>, counts: &ReferenceCounts, tables: &[TableUse]) -> Self {
        let geometry = subject.geometry;
        let bits = geometry.cluster_bits().get();
        let first = subject.head.header.l1_table_offset.get() >> bits;
        let end = first.saturating_add(geometry.clusters_for(subject.l1_bytes())).min(counts.clusters());
        let l1 = (first..end).any(|cluster| counts.get(cluster) > 1);
        let used = |table: &&TableUse| counts.get(table.offset >> bits) > table.active.saturating_add(table.inactive);
        let mut l2: Vec<u64> = tables.iter().filter(used).map(|table| table.offset >> bits).collect();
        l2.sort_unstable();
        Self { l1, l2 }
    }
}

fn check_l1(ones: &Ones<'_, '_>, repair: Option<&Repair>, report: &mut CheckReport) -> Result<bool> {
    let subject = ones.subject;
    let start = subject.head.header.l1_table_offset.get();
    let end = start.saturating_add(subject.l1_bytes()).min(subject.file_len);
    let bits = subject.geometry.cluster_bits().get();
    let writable = repair
        .is_some_and(|repair| !repair.contested.l1 && !repair.beside_l1.overlaps(start, end.saturating_sub(start)));
    let (mut at, mut wrote) = (start, false);
    while at < end {
        let mut bytes = subject.read_table(at, (end - at).min(READ_AHEAD))?;
        let mut dirty = false;
        for (number, raw) in (0_u64..).zip(bytes.chunks_exact_mut(8)) {
            let entry = BigEndian::read_u64(raw);
            let table = entry & OFFSET_MASK;
            if table == 0 {
                continue;
            }
            let Some(one) = ones.is_one(table >> bits)? else { continue };
            if one == (entry & OFLAG_COPIED != 0) {
                continue;
            }
            let here = at + number * 8;
            let text = || {
                let flag = if one { "missing" } else { "set" };
                format!("OFLAG_COPIED L2 cluster: l1_index={} l1_entry={entry:x}: flag is {flag}", (here - start) / 8)
            };
            if writable {
                report.corrupt_repaired(1, "L1 entry", here, text);
                BigEndian::write_u64(raw, entry ^ OFLAG_COPIED);
                dirty = true;
            } else {
                report.corrupt(1, "L1 entry", here, text);
            }
        }
        if dirty {
            subject.storage.write_at(&bytes, at)?;
            wrote = true;
        }
        at += READ_AHEAD;
    }
    Ok(wrote)
}

fn check_l2(
    ones: &Ones<'_, '_>,
    tables: &[TableUse],
    repair: Option<&Repair>,
    report: &mut CheckReport,
) -> Result<bool> {
    let subject = ones.subject;
    let active: Vec<TableUse> = tables.iter().filter(|table| table.active > 0 && table.offset != 0).copied().collect();
    let bits = subject.geometry.cluster_bits().get();
    let entry_len = subject.geometry.l2_entry_len();
    let mut wrote = false;
    subject.for_each_table(&active, |table, bytes| {
        if ones.is_one(table.offset >> bits)?.is_none() {
            return Ok(());
        }
        let len = bytes.len() as u64;
        let writable = repair.is_some_and(|repair| {
            let contested = repair.contested.l2.binary_search(&(table.offset >> bits)).is_ok();
            !contested && !subject.unaligned(table.offset) && !repair.beside_l2.overlaps(table.offset, len)
        });
        let mut dirty = false;
        for (number, raw) in (0_u64..).zip(bytes.chunks_exact_mut(entry_len)) {
            let entry = BigEndian::read_u64(raw);
            if entry == 0 || subject.kind(entry) != Kind::Allocated {
                continue;
            }
            let one = if subject.data_file() { Some(true) } else { ones.is_one((entry & OFFSET_MASK) >> bits)? };
            if one.is_none_or(|one| one == (entry & OFLAG_COPIED != 0)) {
                continue;
            }
            let here = table.offset + number * entry_len as u64;
            let text = || {
                let flag = if one == Some(true) { "missing" } else { "set" };
                format!("OFLAG_COPIED data cluster: l2_entry={entry:x}: flag is {flag}")
            };
            if writable {
                report.corrupt_repaired(table.active, "L2 entry", here, text);
                BigEndian::write_u64(raw, entry ^ OFLAG_COPIED);
                dirty = true;
            } else {
                report.corrupt(table.active, "L2 entry", here, text);
            }
        }
        if dirty {
            subject.storage.write_at(bytes, table.offset)?;
            wrote = true;
        }
        Ok(())
    })?;
    Ok(wrote)
}
