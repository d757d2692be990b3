//! Counting what the L2 tables refer to, the bulk of every check.

use byteorder::{BigEndian, ByteOrder};

use crate::format::{CompressedDescriptor, L2_RESERVED_MASK, OFFSET_MASK, OFLAG_COMPRESSED, OFLAG_COPIED, OFLAG_ZERO};
use crate::image::Result;

use super::Fix;
use super::counts::index;
use super::references::{Metadata, References, Stopped, TableUse};
use super::snapshots::SnapshotTable;
use super::subject::{READ_AHEAD, Subject};

/// How many bytes of tables that start inside a cluster are followed, beyond the length of the file. Such a table is
/// corrupt, and there can be thousands in the space of one.
const UNALIGNED_BUDGET: u64 = 16 << 20;

/// What an L2 entry is, as far as reference counting goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Compressed.
    Compressed,
    /// With a host cluster, be it data, zeroes or only reserved.
    Allocated,
    /// Without a host cluster.
    Nothing,
}

/// How many entries at most are made plain zeroes in one pass; what is left, the next repair finds.
const MAX_PLAIN_ZEROES: usize = 1 << 16;

/// One entry and where it stands.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    descriptor: u64,
    bitmap: u64,
    at: u64,
}

/// How the data clusters of one table follow one another.
#[derive(Debug, Default)]
struct Fragments {
    allocated: u64,
    fragmented: u64,
    compressed: u64,
    next: u64,
}

/// What a slow look at an entry says of the rest of the table.
#[derive(Debug, PartialEq, Eq)]
enum Then {
    GoOn,
    LeaveTable,
}

impl Subject<'_> {
    /// What a standard or extended entry refers to.
    pub(super) fn kind(&self, descriptor: u64) -> Kind {
        let reserved_host = self.data_file() && descriptor & OFLAG_COPIED != 0;
        let zero = descriptor & OFLAG_ZERO != 0 && !self.geometry.extended_l2();
        if descriptor & OFLAG_COMPRESSED != 0 {
            Kind::Compressed
        } else if descriptor & OFFSET_MASK != 0 || reserved_host && !zero {
            Kind::Allocated
        } else {
            Kind::Nothing
        }
    }

    /// Hands each L2 table to `visit`, reading those together that lie together. The tables are sorted by offset.
    pub(super) fn for_each_table(
        &self,
        tables: &[TableUse],
        mut visit: impl FnMut(TableUse, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let size = self.cluster_size();
        let at_once = index((READ_AHEAD / size).max(1));
        let mut buffer = Vec::new();
        let mut rest = tables;
        while let Some(first) = rest.first() {
            let follow = |number: &usize| {
                rest.get(*number).is_some_and(|table| table.offset == first.offset + *number as u64 * size)
            };
            let run = 1 + (1..at_once).take_while(follow).count();
            let (together, behind) = rest.split_at(run);
            rest = behind;
            // Past the end there are only zeroes, and zeroes refer to nothing.
            if first.offset >= self.file_len {
                continue;
            }
            buffer.resize(run * self.geometry.cluster_len(), 0);
            self.storage.read_at(&mut buffer, first.offset)?;
            for (table, bytes) in together.iter().zip(buffer.chunks_exact_mut(self.geometry.cluster_len())) {
                visit(*table, bytes)?;
            }
        }
        Ok(())
    }
}

impl References<'_, '_> {
    /// Counts what all L2 tables refer to.
    pub(super) fn count_l2_tables(&mut self, snapshots: &SnapshotTable) -> Result<Option<Stopped>> {
        let tables = std::mem::take(&mut self.tables);
        let subject = self.subject;
        let metadata = (self.fix == Fix::All).then(|| Metadata::of(subject, snapshots, true));
        let mut unaligned_left = UNALIGNED_BUDGET.saturating_add(subject.file_len);
        let mut stopped = None;
        subject.for_each_table(&tables, |table, bytes| {
            if subject.unaligned(table.offset) {
                if unaligned_left < bytes.len() as u64 {
                    if stopped.replace(Stopped).is_none() {
                        self.report.unchecked(1, "L2 table", table.offset, || {
                            "too many L2 tables that are not cluster aligned, the rest is not followed".to_owned()
                        });
                    }
                    return Ok(());
                }
                unaligned_left -= bytes.len() as u64;
            }
            self.count_table(table, bytes, metadata.as_ref())
        })?;
        self.tables = tables;
        Ok(stopped)
    }

    fn count_table(&mut self, table: TableUse, bytes: &[u8], metadata: Option<&Metadata>) -> Result<()> {
        let (geometry, file_len) = (self.subject.geometry, self.subject.file_len);
        let (size, bits) = (geometry.cluster_size(), geometry.cluster_bits().get());
        let max = geometry.refcount_order().max();
        let weight = table.active.saturating_add(table.inactive);
        // Entries without any of these bits are whole plain clusters; nearly all are.
        let special = OFLAG_COMPRESSED | L2_RESERVED_MASK | OFLAG_ZERO | (size - 1);
        let special = if self.subject.data_file() { u64::MAX } else { special };
        let mut fragments = Fragments::default();
        let mut all_copied = OFLAG_COPIED;
        let entry_len = geometry.l2_entry_len();
        for (number, raw) in (0_u64..).zip(bytes.chunks_exact(entry_len)) {
            let descriptor = BigEndian::read_u64(raw);
            let bitmap = if entry_len == 16 { BigEndian::read_u64(&raw[8..]) } else { 0 };
            if descriptor | bitmap == 0 {
                continue;
            }
            let offset = descriptor & OFFSET_MASK;
            let plain = descriptor & special == 0 && bitmap & bitmap >> 32 == 0;
            if plain && offset != 0 && offset < file_len {
                fragments.allocate(offset, size);
                all_copied &= descriptor;
                let now = self.counts.add(offset >> bits, weight);
                if now > max {
                    self.overflow(offset >> bits, now, weight, max);
                }
                continue;
            }
            let entry = Entry { descriptor, bitmap, at: table.offset + number * entry_len as u64 };
            if self.count_special(entry, weight, table.active > 0, &mut fragments, metadata)? == Then::LeaveTable {
                break;
            }
        }
        if table.active > 0 {
            self.all_copied &= all_copied != 0;
            self.report.allocated_clusters += fragments.allocated * table.active;
            self.report.fragmented_clusters += fragments.fragmented * table.active;
            self.report.compressed_clusters += fragments.compressed * table.active;
        }
        Ok(())
    }

    /// Counts an entry that is not simply a cluster of data.
    fn count_special(
        &mut self,
        entry: Entry,
        weight: u64,
        active: bool,
        fragments: &mut Fragments,
        metadata: Option<&Metadata>,
    ) -> Result<Then> {
        let Entry { descriptor, bitmap, at } = entry;
        let kind = self.subject.kind(descriptor);
        if kind != Kind::Compressed && descriptor & L2_RESERVED_MASK != 0 {
            self.report
                .corrupt(weight, "L2 entry", at, || format!("found l2 entry with reserved bits set: {descriptor:x}"));
        }
        match kind {
            Kind::Compressed => self.count_compressed(entry, weight, fragments),
            Kind::Allocated => {
                self.all_copied &= !active || descriptor & OFLAG_COPIED != 0;
                return self.count_allocated(entry, weight, fragments, metadata);
            }
            Kind::Nothing => {
                if bitmap & u64::from(u32::MAX) != 0 {
                    self.report.corrupt(weight, "L2 entry", at, || {
                        format!("Unallocated cluster has non-zero subcluster allocation map {bitmap:#x}")
                    });
                }
            }
        }
        Ok(Then::GoOn)
    }

    fn count_compressed(&mut self, entry: Entry, weight: u64, fragments: &mut Fragments) {
        let Entry { descriptor, bitmap, at } = entry;
        let place = CompressedDescriptor::decode(descriptor & !OFLAG_COPIED, self.subject.geometry.cluster_bits());
        if descriptor & OFLAG_COPIED != 0 {
            self.report.corrupt(weight, "L2 entry", at, || {
                format!("coffset={}: copied flag must never be set for compressed clusters", place.offset)
            });
        }
        if self.subject.data_file() {
            self.report.corrupt(weight, "L2 entry", at, || {
                format!("compressed cluster with data file, entry={descriptor:#x}")
            });
        } else if bitmap != 0 {
            self.report.corrupt(weight, "L2 entry", at, || {
                format!("compressed cluster with non-zero subcluster allocation bitmap, entry={descriptor:#x}")
            });
        } else {
            self.count_range("compressed cluster", place.offset.get(), place.max_len(), weight);
            fragments.allocated += 1;
            fragments.compressed += 1;
            // What lies within sectors is never contiguous with what follows.
            fragments.fragmented += 1;
        }
    }

    fn count_allocated(
        &mut self,
        entry: Entry,
        weight: u64,
        fragments: &mut Fragments,
        metadata: Option<&Metadata>,
    ) -> Result<Then> {
        let Entry { descriptor, bitmap, at } = entry;
        let offset = descriptor & OFFSET_MASK;
        if bitmap & bitmap >> 32 != 0 {
            self.report.corrupt(weight, "L2 entry", at, || {
                format!("offset={offset:x}: Allocated cluster has corrupted subcluster allocation bitmap {bitmap:#x}")
            });
        }
        if self.subject.unaligned(offset) {
            let data = if self.subject.geometry.extended_l2() {
                bitmap & u64::from(u32::MAX) != 0
            } else {
                descriptor & OFLAG_ZERO == 0
            };
            let what = if data { "Data cluster" } else { "Preallocated cluster" };
            let text = || format!("offset={offset:x}: {what} is not properly aligned; L2 entry corrupted.");
            match metadata.filter(|_| !data) {
                None => self.report.corrupt(weight, "L2 entry", at, text),
                Some(metadata) if metadata.overlaps(at, self.subject.geometry.l2_entry_len() as u64) => {
                    self.report.corrupt(weight, "L2 entry", at, text);
                    self.report.unchecked(1, "L2 table", at, || "L2 table lies on other metadata".to_owned());
                    return Ok(Then::LeaveTable);
                }
                // Whether only a table lies here is known when everything is counted.
                Some(_) if self.plain_zeroes.len() < MAX_PLAIN_ZEROES => {
                    self.plain_zeroes.push((entry, weight));
                    return Ok(Then::GoOn);
                }
                Some(_) => self.report.corrupt(weight, "L2 entry", at, text),
            }
        }
        fragments.allocate(offset, self.subject.cluster_size());
        if !self.subject.data_file() {
            self.count_range("data cluster", offset, self.subject.cluster_size(), weight);
        }
        Ok(Then::GoOn)
    }

    /// Repairs the entries that were put off, where nothing but their table lies in the cluster: what looks like an entry
    /// may be data, which a broken L1 entry calls a table.
    pub(super) fn make_plain_zeroes(&mut self) -> Result<()> {
        let size = self.subject.cluster_size();
        for (entry, weight) in std::mem::take(&mut self.plain_zeroes) {
            let offset = entry.descriptor & OFFSET_MASK;
            let text =
                || format!("offset={offset:x}: Preallocated cluster is not properly aligned; L2 entry corrupted.");
            if self.counts.get(entry.at / size) > weight {
                self.report.corrupt(weight, "L2 entry", entry.at, text);
                self.count_range("data cluster", offset, size, weight);
            } else {
                self.report.corrupt_repaired(weight, "L2 entry", entry.at, text);
                self.make_plain_zero(entry)?;
            }
        }
        Ok(())
    }

    /// A cluster that only reserves space at an impossible place becomes one that reserves none: the guest reads zeroes
    /// from both.
    fn make_plain_zero(&mut self, entry: Entry) -> Result<()> {
        let mut raw = [0; 16];
        let len = self.subject.geometry.l2_entry_len();
        if self.subject.geometry.extended_l2() {
            BigEndian::write_u64(&mut raw[8..], entry.bitmap & u64::from(u32::MAX) << 32);
        } else {
            BigEndian::write_u64(&mut raw, OFLAG_ZERO);
        }
        self.subject.storage.write_at(&raw[..len], entry.at)?;
        self.wrote = true;
        Ok(())
    }
}

impl Fragments {
    #[inline]
    fn allocate(&mut self, offset: u64, size: u64) {
        self.allocated += 1;
        self.fragmented += u64::from(self.next != 0 && offset != self.next);
        self.next = offset + size;
    }
}
