//! Counting references: everything that the header leads to adds to the clusters it lies on.
//!
//! The work is bounded by the file, whatever its tables claim: what many snapshots or bitmaps share is read once and
//! counted with its weight.

use byteorder::{BigEndian, ByteOrder};

use crate::format::{
    AutoclearFeatures, BitmapDirectoryEntry, BitmapTableEntry, Extension, HostOffset, L1_RESERVED_MASK,
    decode_bitmap_directory,
};
use crate::format::{L1Entry, OFFSET_MASK};
use crate::image::Result;

use super::counts::{ReferenceCounts, index, overlay};
use super::mappings::Entry;
use super::snapshots::SnapshotTable;
use super::subject::{READ_AHEAD, Subject};
use super::{CheckReport, Fix};

/// The largest bitmap directory that QEMU reads.
const MAX_BITMAP_DIRECTORY: u64 = 65_535 * 1_024;

/// An L2 table and how often it is referenced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TableUse {
    /// Where it starts.
    pub(super) offset: u64,
    /// By how many entries of the active L1 table.
    pub(super) active: u64,
    /// By how many entries of the snapshots' L1 tables.
    pub(super) inactive: u64,
}

/// Why counting could not go to its end; the report has the details.
#[derive(Debug)]
pub(super) struct Stopped;

/// The references of an image, and what was seen on the way.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a finding of its own")]
pub(super) struct References<'s, 'a> {
    pub(super) subject: &'s Subject<'a>,
    pub(super) fix: Fix,
    pub(super) report: &'s mut CheckReport,
    pub(super) counts: ReferenceCounts,
    /// All L2 tables by their offset.
    pub(super) tables: Vec<TableUse>,
    /// The refcount table and blocks that were counted, as offset and length.
    pub(super) refcount_structures: Vec<(u64, u64)>,
    /// Whether the refcount structure must be built anew.
    pub(super) rebuild: bool,
    /// Whether every entry of the active tables that names a cluster has its COPIED flag.
    pub(super) all_copied: bool,
    /// Whether anything refers to places behind the file's end.
    pub(super) past_end: bool,
    /// Whether L2 entries were written.
    pub(super) wrote: bool,
    /// Entries that are to become plain zeroes, with how often their table is referenced.
    pub(super) plain_zeroes: Vec<(Entry, u64)>,
}

impl<'s, 'a> References<'s, 'a> {
    /// Counts all references of the image.
    pub(super) fn count(
        subject: &'s Subject<'a>,
        snapshots: &SnapshotTable,
        fix: Fix,
        report: &'s mut CheckReport,
    ) -> Result<(Self, Option<Stopped>)> {
        let clusters = subject.geometry.clusters_for(subject.file_len);
        let mut all = Self {
            subject,
            fix,
            report,
            counts: ReferenceCounts::new(clusters),
            tables: Vec::new(),
            refcount_structures: Vec::new(),
            rebuild: false,
            all_copied: true,
            past_end: false,
            wrote: false,
            plain_zeroes: Vec::new(),
        };
        all.count_range("header", 0, subject.cluster_size(), 1);
        all.count_l1_tables(snapshots)?;
        let stopped = match all.count_l2_tables(snapshots)? {
            Some(stopped) => Some(stopped),
            None => all.count_metadata(snapshots)?,
        };
        if stopped.is_none() {
            all.count_refblocks();
            all.make_plain_zeroes()?;
        }
        Ok((all, stopped))
    }

    /// Counts the snapshot table, refcount table, crypto header and bitmaps.
    fn count_metadata(&mut self, snapshots: &SnapshotTable) -> Result<Option<Stopped>> {
        let subject = self.subject;
        let header = &subject.head.header;
        self.count_range("snapshot table", header.snapshots_offset.get(), snapshots.len, 1);
        let (offset, len) = (header.refcount_table_offset.get(), self.reftable_len());
        if self.count_range("refcount table", offset, len, 1) {
            self.refcount_structures.push((offset, len));
        }
        if let Some((offset, len)) = subject.crypto_header() {
            self.count_range("crypto header", offset, len, 1);
        }
        self.count_bitmaps()
    }

    fn reftable_len(&self) -> u64 {
        u64::from(self.subject.head.header.refcount_table_clusters) * self.subject.cluster_size()
    }

    /// Adds `weight` references to every cluster that a range touches; tells whether the range lies in the file.
    pub(super) fn count_range(&mut self, structure: &'static str, offset: u64, len: u64, weight: u64) -> bool {
        if len == 0 {
            return true;
        }
        if self.subject.past_end(offset, len) {
            self.past_end = true;
            self.report.corrupt(weight, structure, offset, || {
                format!("counting reference for region exceeding the end of the file by one cluster or more: offset {offset:#x} size {len:#x}")
            });
            return false;
        }
        let bits = self.subject.geometry.cluster_bits().get();
        self.count_clusters(offset >> bits, ((offset + len - 1) >> bits) + 1, weight);
        true
    }

    /// Adds `weight` references to every cluster of a range that is known to lie in the file.
    fn count_clusters(&mut self, first: u64, end: u64, weight: u64) {
        let max = self.subject.geometry.refcount_order().max();
        let mut cluster = first;
        while cluster < end {
            if weight <= max {
                let next = self.counts.add_whole_chunks(cluster, end, weight);
                if next > cluster {
                    cluster = next;
                    continue;
                }
            }
            let now = self.counts.add(cluster, weight);
            if now > max {
                self.overflow(cluster, now, weight, max);
            }
            cluster += 1;
        }
    }

    /// More references than a refcount can tell: each one too many is a corruption.
    #[cold]
    pub(super) fn overflow(&mut self, cluster: u64, now: u64, weight: u64, max: u64) {
        let before = now - weight;
        let too_many = now - before.max(max);
        let offset = cluster.saturating_mul(self.subject.cluster_size());
        self.report.corrupt(too_many, "refcount", offset, || {
            format!("overflow cluster offset={offset:#x}: {now} references, a refcount of this image ends at {max}")
        });
    }

    /// Counts all L1 tables and collects the L2 tables that they name.
    fn count_l1_tables(&mut self, snapshots: &SnapshotTable) -> Result<()> {
        let subject = self.subject;
        let header = &subject.head.header;
        let (offset, len) = (header.l1_table_offset.get(), subject.l1_bytes());
        let mut tables = Collected::default();
        self.count_range("L1 table", offset, len, 1);
        self.read_l1(offset, len, 1, true, &mut |offset| tables.add(TableUse { offset, active: 1, inactive: 0 }))?;

        if subject.data_file() && header.nb_snapshots > 0 {
            self.report
                .corrupt(1, "header", 60, || format!("{} snapshots in image with data file", header.nb_snapshots));
        }
        let mut inactive = Vec::new();
        for (number, record) in snapshots.records.iter().enumerate() {
            let (offset, len) = (record.l1_offset, u64::from(record.l1_size) * 8);
            if subject.unaligned(offset) {
                self.report.corrupt(1, "snapshot table", record.at, || {
                    format!("snapshot {number} l1_offset={offset:#x}: L1 table is not cluster aligned; snapshot table entry corrupted")
                });
            } else if len > subject.limits.max_l1_bytes {
                self.report.corrupt(1, "snapshot table", record.at, || {
                    format!(
                        "snapshot {number} l1_size={:#x}: L1 table is too large; snapshot table entry corrupted",
                        record.l1_size
                    )
                });
            } else if subject.past_end(offset, len) {
                self.count_range("snapshot L1 table", offset, len, 1);
                inactive.push((offset, len, false));
            } else {
                inactive.push((offset, len, true));
            }
        }
        // What snapshots share is read once and weighs as often as it is shared.
        let bits = subject.geometry.cluster_bits().get();
        let counted = inactive.iter().filter(|(_, len, inside)| *inside && *len > 0);
        for (first, end, weight) in
            overlay(counted.map(|(offset, len, _)| (offset >> bits, ((offset + len - 1) >> bits) + 1)))
        {
            self.count_clusters(first, end, weight);
        }
        for (start, end, weight) in
            overlay(inactive.iter().map(|(offset, len, _)| (*offset, offset.saturating_add(*len))))
        {
            self.read_l1(start, end - start, weight, false, &mut |offset| {
                tables.add(TableUse { offset, active: 0, inactive: weight });
            })?;
        }
        self.tables = tables.finish();
        Ok(())
    }

    /// Checks the entries of a stretch of L1 that `weight` tables share, counts the L2 tables and hands them on.
    fn read_l1(&mut self, offset: u64, len: u64, weight: u64, active: bool, found: &mut dyn FnMut(u64)) -> Result<()> {
        let end = offset.saturating_add(len).min(self.subject.file_len);
        let mut at = offset;
        while at < end {
            let bytes = self.subject.read_table(at, (end - at).min(READ_AHEAD))?;
            for (number, raw) in (0_u64..).zip(bytes.chunks_exact(8)) {
                let entry = L1Entry(BigEndian::read_u64(raw));
                if entry.0 != 0 {
                    self.all_copied &= entry.copied() || !active;
                    self.count_l1_entry(entry, at + number * 8, weight);
                    found(entry.0 & OFFSET_MASK);
                }
            }
            at += READ_AHEAD;
        }
        Ok(())
    }

    fn count_l1_entry(&mut self, entry: L1Entry, at: u64, weight: u64) {
        if entry.0 & L1_RESERVED_MASK != 0 {
            self.report
                .corrupt(weight, "L1 entry", at, || format!("found L1 entry with reserved bits set: {:x}", entry.0));
        }
        // An entry with flags but no offset names the header as its table, as QEMU sees it.
        let table = entry.0 & OFFSET_MASK;
        self.count_range("L2 table", table, self.subject.cluster_size(), weight);
        if self.subject.unaligned(table) {
            self.report.corrupt(weight, "L1 entry", at, || {
                format!("l2_offset={table:x}: Table is not cluster aligned; L1 entry corrupted")
            });
        }
    }

    /// Counts the bitmaps, unless the autoclear bit says that they are not to be believed.
    fn count_bitmaps(&mut self) -> Result<Option<Stopped>> {
        let subject = self.subject;
        let extension = subject.head.extensions.iter().find_map(|extension| match extension {
            Extension::Bitmaps(bitmaps) => Some(*bitmaps),
            _ => None,
        });
        let Some(extension) = extension else { return Ok(None) };
        if !subject.head.header.autoclear_features.has(AutoclearFeatures::BITMAPS) {
            return Ok(None);
        }
        let (offset, len) = (extension.bitmap_directory_offset.get(), extension.bitmap_directory_size);
        self.count_range("bitmap directory", offset, len, 1);
        let directory = if len <= MAX_BITMAP_DIRECTORY { subject.read_table(offset, len)? } else { Vec::new() };
        match decode_bitmap_directory(&directory, &extension) {
            Ok(entries) if directory.len() as u64 == len => self.count_bitmap_tables(&entries),
            Ok(_) => Ok(Some(self.broken_bitmaps(offset, "the bitmap directory reaches past the end of the file"))),
            Err(error) => Ok(Some(self.broken_bitmaps(offset, &error.to_string()))),
        }
    }

    fn broken_bitmaps(&mut self, offset: u64, why: &str) -> Stopped {
        self.report.corrupt(1, "bitmaps", offset, || why.to_owned());
        self.report
            .unchecked(1, "bitmaps", offset, || "the bitmaps cannot be followed, so no count is final".to_owned());
        Stopped
    }

    fn count_bitmap_tables(&mut self, entries: &[BitmapDirectoryEntry]) -> Result<Option<Stopped>> {
        let subject = self.subject;
        let bits = subject.geometry.cluster_bits().get();
        let mut tables = Vec::new();
        for entry in entries {
            let (offset, len) = (entry.bitmap_table_offset.get(), u64::from(entry.bitmap_table_size) * 8);
            if subject.past_end(offset, len) {
                self.count_range("bitmap table", offset, len, 1);
            } else if len > 0 {
                tables.push((offset, offset + len));
            }
        }
        for (first, end, weight) in overlay(tables.iter().map(|(start, end)| (start >> bits, ((end - 1) >> bits) + 1)))
        {
            self.count_clusters(first, end, weight);
        }
        for (start, end, weight) in overlay(tables.iter().copied()) {
            let mut at = start;
            while at < end.min(subject.file_len) {
                let bytes = subject.read_table(at, (end - at).min(READ_AHEAD))?;
                for (number, raw) in (0_u64..).zip(bytes.chunks_exact(8)) {
                    let here = HostOffset::new(at + number * 8);
                    match BitmapTableEntry::decode(BigEndian::read_u64(raw), subject.geometry.cluster_bits(), here) {
                        Ok(BitmapTableEntry::Cluster(data)) => {
                            self.count_range("bitmap data", data.get(), subject.cluster_size(), weight);
                        }
                        Ok(BitmapTableEntry::AllZeroes | BitmapTableEntry::AllOnes) => {}
                        Err(error) => return Ok(Some(self.broken_bitmaps(here.get(), &error.to_string()))),
                    }
                }
                at += READ_AHEAD;
            }
        }
        Ok(None)
    }

    /// Counts the refcount blocks. Last of all, so that each finds out whether something else lies on it.
    fn count_refblocks(&mut self) {
        let (subject, size) = (self.subject, self.subject.cluster_size());
        let max = subject.geometry.refcount_order().max();
        for (number, entry) in (0_u64..).zip(&subject.reftable) {
            if entry.0 == 0 {
                continue;
            }
            let at = subject.head.header.refcount_table_offset.get() + number * 8;
            let offset = entry.block().map_or(0, HostOffset::get);
            if entry.reserved() != 0 {
                self.report.corrupt(1, "refcount table", at, || {
                    format!("refcount table entry {number} has reserved bits set")
                });
                self.rebuild = true;
            } else if subject.unaligned(offset) {
                self.report.corrupt(1, "refcount table", at, || {
                    format!("refcount block {number} is not cluster aligned; refcount table entry corrupted")
                });
                self.rebuild = true;
            } else if offset / size >= self.counts.clusters() {
                self.report.corrupt(1, "refcount table", at, || format!("refcount block {number} is outside image"));
                // QEMU makes the file reach as far as the entry says. We trust the mappings, not the entry.
                self.rebuild |= self.fix == Fix::All;
            } else {
                if self.count_range("refcount block", offset, size, 1) {
                    self.refcount_structures.push((offset, size));
                }
                let count = self.counts.get(offset / size).min(max);
                if count != 1 {
                    self.report
                        .corrupt(1, "refcount table", at, || format!("refcount block {number} refcount={count}"));
                    self.rebuild = true;
                }
            }
        }
    }
}

/// L2 tables as they are found, put together before they get too many.
#[derive(Default)]
struct Collected {
    uses: Vec<TableUse>,
    merged: usize,
}

impl Collected {
    fn add(&mut self, table: TableUse) {
        self.uses.push(table);
        if self.uses.len() >= self.merged * 2 + (1 << 16) {
            self.merge();
        }
    }

    fn merge(&mut self) {
        self.uses.sort_unstable_by_key(|table| table.offset);
        self.uses.dedup_by(|next, kept| {
            let same = next.offset == kept.offset;
            if same {
                kept.active += next.active;
                kept.inactive = kept.inactive.saturating_add(next.inactive);
            }
            same
        });
        self.merged = self.uses.len();
    }

    fn finish(mut self) -> Vec<TableUse> {
        self.merge();
        self.uses
    }
}

/// Where metadata lies that no repair of an L2 table may touch.
#[derive(Debug)]
pub(super) struct Metadata(Vec<(u64, u64)>);

impl Metadata {
    /// All metadata but the L2 tables, with or without the active L1 table.
    pub(super) fn of(subject: &Subject<'_>, snapshots: &SnapshotTable, with_l1: bool) -> Self {
        let header = &subject.head.header;
        let size = subject.cluster_size();
        let reftable_len = u64::from(header.refcount_table_clusters) * size;
        let mut ranges = vec![
            (0, size),
            (header.l1_table_offset.get(), if with_l1 { subject.l1_bytes() } else { 0 }),
            (header.refcount_table_offset.get(), reftable_len),
            (header.snapshots_offset.get(), snapshots.len),
        ];
        ranges.extend(snapshots.records.iter().map(|record| (record.l1_offset, u64::from(record.l1_size) * 8)));
        ranges.extend(subject.reftable.iter().filter_map(|entry| entry.block()).map(|block| (block.get(), size)));
        for extension in &subject.head.extensions {
            if let Extension::Bitmaps(bitmaps) = extension {
                ranges.push((bitmaps.bitmap_directory_offset.get(), bitmaps.bitmap_directory_size));
            }
        }
        let ends = ranges.into_iter().map(|(start, len)| (start, start.saturating_add(len)));
        Self(overlay(ends).into_iter().map(|(start, end, _)| (start, end)).collect())
    }

    /// Whether a range touches any of it.
    pub(super) fn overlaps(&self, offset: u64, len: u64) -> bool {
        let behind = self.0.partition_point(|(_, end)| *end <= offset);
        self.0.get(index(behind as u64)).is_some_and(|(start, _)| *start < offset.saturating_add(len))
    }
}
