//! The counted references against the refcounts that the image holds.

use crate::format::{HostOffset, RefcountBlock};
use crate::image::Result;

use super::counts::{Chunk, ReferenceCounts, index};
use super::subject::Subject;
use super::{CheckReport, Fix};

/// What a comparison says beyond the report.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "four independent answers, no state")]
pub(super) struct Comparison {
    /// A used cluster has refcount 0: the refcount structure must be built anew.
    pub(super) rebuild: bool,
    /// Where the last cluster that is used or counted ends.
    pub(super) end: u64,
    /// All refcounts are as counted.
    pub(super) equal: bool,
    /// No cluster is referenced twice.
    pub(super) single: bool,
    /// Refcount blocks were written.
    pub(super) wrote: bool,
}

/// One refcount block being compared.
struct Block<'r> {
    /// The cluster of its first refcount.
    first: u64,
    /// Its refcounts; none where all are 0.
    refcounts: Option<RefcountBlock>,
    dirty: bool,
    max: u64,
    cluster_size: u64,
    fix: Fix,
    report: &'r mut CheckReport,
}

/// Compares, and repairs what `fix` allows. A refcount of 0 is never raised here.
pub(super) fn compare(
    subject: &Subject<'_>,
    counts: &ReferenceCounts,
    fix: Fix,
    report: &mut CheckReport,
) -> Result<Comparison> {
    let per_block = subject.geometry.refcount_block_entries();
    let mut result = Comparison { rebuild: false, end: 1, equal: true, single: true, wrote: false };
    let mut first = 0;
    while first < counts.clusters() {
        let end = (first + per_block).min(counts.clusters());
        let offset = subject.reftable_entry(first).block();
        if let Some(bad) = offset.filter(|offset| subject.unreadable(*offset)) {
            report.unchecked(end - first, "refcount block", bad.get(), || {
                format!("Can't get refcounts for clusters {first} to {}: no refcount block can lie at {bad}", end - 1)
            });
            result.equal = false;
        } else {
            let block = offset.map(|offset| subject.read_refblock(offset)).transpose()?.flatten();
            let (max, cluster_size) = (subject.geometry.refcount_order().max(), subject.cluster_size());
            let mut work = Block { first, refcounts: block, dirty: false, max, cluster_size, fix, report };
            work.compare(counts, end, &mut result);
            if let (true, Some(block), Some(offset)) = (work.dirty, work.refcounts, offset) {
                subject.storage.write_at(block.as_bytes(), HostOffset::get(offset))?;
                result.wrote = true;
            }
        }
        first = end;
    }
    result.end = result.end.saturating_mul(subject.cluster_size());
    Ok(result)
}

/// Clears refcounts behind all clusters that the file has or something refers to, and tells whether there were any: a shrink
/// that a crash interrupted leaves them. A check that only looks does not count them, as QEMU's does not; they would become
/// leaks as the file grows, and the report has them as repaired ones.
pub(super) fn clear_behind(subject: &Subject<'_>, counts: &ReferenceCounts, report: &mut CheckReport) -> Result<bool> {
    let per_block = subject.geometry.refcount_block_entries();
    let mut wrote = false;
    for (number, entry) in (0_u64..).zip(&subject.reftable) {
        let kept = index(counts.clusters().saturating_sub(number.saturating_mul(per_block)).min(per_block));
        let Some(offset) = entry.block().filter(|_| index(per_block) > kept) else { continue };
        // A block that something else refers to as well is left alone.
        let own = counts.get(offset.get() / subject.cluster_size()) == 1 && !subject.unreadable(offset);
        let Some(mut block) = (if own { subject.read_refblock(offset)? } else { None }) else { continue };
        let mut from = kept;
        while let Some(used) = block.next_used(from) {
            let cluster = number.saturating_mul(per_block).saturating_add(used as u64);
            report.leak(true, cluster.saturating_mul(subject.cluster_size()), || {
                format!("cluster {cluster} behind the end of the file refcount={} reference=0", block.get(used))
            });
            from = used + 1;
        }
        if from > kept {
            block.fill(kept..block.len(), 0);
            subject.storage.write_at(block.as_bytes(), offset.get())?;
            wrote = true;
        }
    }
    Ok(wrote)
}

impl Block<'_> {
    fn compare(&mut self, counts: &ReferenceCounts, end: u64, result: &mut Comparison) {
        let mut at = self.first;
        while at < end {
            let (count, chunk, within) = counts.run(at, end);
            match (chunk, &self.refcounts) {
                (Chunk::Uniform(0), None) => {}
                (Chunk::Uniform(0), Some(_)) => self.compare_unused(at, count, result),
                (Chunk::Nibbles(nibbles), Some(block)) if self.max == u64::from(u16::MAX) => {
                    let refcounts = block.as_bytes().get(index((at - self.first) * 2)..).unwrap_or_default();
                    match equal(&nibbles[within / 2..], refcounts, index(count)) {
                        Some(Equal { used, single }) => {
                            result.single &= single;
                            result.end = result.end.max(if used > 0 { at + used } else { 0 });
                        }
                        None => self.compare_each(at, count, chunk, within, result),
                    }
                }
                _ => self.compare_each(at, count, chunk, within, result),
            }
            at += count;
        }
    }

    /// Clusters that nobody refers to: only refcounts other than 0 matter.
    fn compare_unused(&mut self, at: u64, count: u64, result: &mut Comparison) {
        let (mut from, end) = (index(at - self.first), index(at - self.first + count));
        while let Some(used) =
            self.refcounts.as_ref().and_then(|block| block.next_used(from)).filter(|used| *used < end)
        {
            self.compare_one(self.first + used as u64, 0, result);
            from = used + 1;
        }
    }

    fn compare_each(&mut self, at: u64, count: u64, chunk: &Chunk, within: usize, result: &mut Comparison) {
        for number in 0..count {
            self.compare_one(at + number, chunk.get(within + index(number)), result);
        }
    }

    #[inline]
    fn compare_one(&mut self, cluster: u64, references: u64, result: &mut Comparison) {
        let references = references.min(self.max);
        let place = index(cluster - self.first);
        let refcount = self.refcounts.as_ref().map_or(0, |block| block.get(place));
        result.single &= references <= 1;
        if refcount | references != 0 {
            result.end = result.end.max(cluster + 1);
        }
        if refcount != references {
            result.rebuild |= refcount == 0;
            self.differ(cluster, refcount, references, result);
        }
    }

    #[cold]
    fn differ(&mut self, cluster: u64, refcount: u64, references: u64, result: &mut Comparison) {
        let leak = refcount > references;
        let repair = refcount != 0 && (self.fix == Fix::All || self.fix == Fix::Leaks && leak);
        if let (true, Some(block)) = (repair, &mut self.refcounts) {
            block.set(index(cluster - self.first), references);
            self.dirty = true;
        } else {
            result.equal = false;
        }
        let text = || format!("cluster {cluster} refcount={refcount} reference={references}");
        let offset = cluster.saturating_mul(self.cluster_size);
        match (leak, repair) {
            (true, repaired) => self.report.leak(repaired, offset, text),
            (false, true) => self.report.corrupt_repaired(1, "refcount", offset, text),
            (false, false) => self.report.corrupt(1, "refcount", offset, text),
        }
    }
}

/// Clusters whose 16-bit refcounts are as counted.
struct Equal {
    /// How many there are up to the last used one.
    used: u64,
    /// None is referenced twice.
    single: bool,
}

/// Compares 16-bit refcounts with the counts of as many clusters, all at once; `None` where any differs.
fn equal(nibbles: &[u8], refcounts: &[u8], count: usize) -> Option<Equal> {
    let (pairs, odd) = (count / 2, count % 2);
    let refcounts = refcounts.get(..count * 2)?;
    let (mut difference, mut bits) = (0, 0);
    for (pair, raw) in nibbles[..pairs].iter().zip(refcounts.chunks_exact(4)) {
        let expected = [0, pair & 15, 0, pair >> 4];
        difference |= u32::from_ne_bytes(expected) ^ u32::from_ne_bytes([raw[0], raw[1], raw[2], raw[3]]);
        bits |= pair;
    }
    if odd == 1 {
        let last = nibbles[pairs] & 15;
        bits |= last;
        difference |= u32::from(refcounts[count * 2 - 2..] != [0, last]);
    }
    let last = refcounts.chunks_exact(2).rposition(|raw| raw != [0, 0]);
    let used = last.map_or(0, |last| last as u64 + 1);
    (difference == 0).then_some(Equal { used, single: bits & 0xee == 0 })
}
