//! What commit and pull have in common: one layer takes in what others hold.

use crate::chain::{Chain, ChainExtent, Layer};
use crate::image::{ExtentKind, Needs};

use super::copy::{Copier, Report};
use super::target::Target;
use super::{Error, Result, Way};
use crate::progress::{Phase, Progress, Step};

/// A target that takes in what the upper layers of a chain hold, as far as it is wanted.
pub(super) struct Absorb<'a, W> {
    chain: &'a Chain,
    target: &'a Target<'a>,
    /// How many layers, from the top, are taken in.
    layers: usize,
    wanted: W,
    work: Work,
}

impl<'a, W: Fn(&ChainExtent) -> bool> Absorb<'a, W> {
    /// Finds out what there is to do, unless an estimate has it. Refuses what does not fit.
    pub(super) fn survey(
        chain: &'a Chain,
        target: &'a Target<'a>,
        layers: usize,
        wanted: W,
        estimate: Option<&Way>,
        progress: &dyn Progress,
    ) -> Result<Self> {
        progress.step(&Step::new(Phase::Planning, 0, 0, target.file()));
        let work = match estimate {
            Some(way) => Work {
                total: way.data + way.zeroes,
                data: way.data,
                in_place: way.overwritten,
                new_bytes: way.space_needed,
            },
            None => weigh(chain, target, layers, &wanted)?,
        };
        target.check_room(work.new_bytes)?;
        Ok(Self { chain, target, layers, wanted, work })
    }

    /// Does it. All of it is durable on return. Of the layers, nobody will read the uppermost `spent` again.
    pub(super) fn run(
        &self,
        rate_limit: Option<u64>,
        spent: usize,
        progress: &dyn Progress,
        before_change: &dyn Fn() -> Result<()>,
    ) -> Result<Report> {
        let (chain, target) = (self.chain, self.target);
        let mut copier = Copier::new(chain, target, self.work.total, progress)
            .with_rate(rate_limit)
            .with_spent(spent)
            .with_before_change(before_change);
        for extent in chain.extents_of(0..self.layers, 0..chain.virtual_size()) {
            let extent = extent?;
            if (self.wanted)(&extent) {
                copier.take(extent)?;
            } else if extent.layer.is_some() {
                copier.report.skipped += extent.len;
            }
        }
        let report = copier.finish()?;
        self.tell(Phase::Publishing, progress);
        target.flush()?; // barriers: refcounts and data, then mappings, then what they replaced is freed
        Ok(report)
    }

    /// Tells that everything is copied, and what comes next.
    pub(super) fn tell(&self, phase: Phase, progress: &dyn Progress) {
        progress.step(&Step::new(phase, self.work.total, self.work.total, self.target.file()));
    }
}

/// What a merge has to move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Work {
    /// Guest bytes that the source layers decide.
    pub(super) total: u64,
    /// Of these, bytes of data.
    pub(super) data: u64,
    /// Of the data, bytes that are overwritten where they lie.
    pub(super) in_place: u64,
    /// The space that the rest of the data needs in the target.
    pub(super) new_bytes: u64,
}

/// The ends of the layers' files, to find images that are truncated: data past the end would be read as zeroes.
struct Ends<'a> {
    chain: &'a Chain,
    /// The first offset at which no cluster can begin, by layer.
    ends: Vec<u64>,
}

impl<'a> Ends<'a> {
    /// Reads the lengths of the upper `layers` files, and refuses images with L2 tables past the end.
    fn of(chain: &'a Chain, layers: usize) -> Result<Self> {
        let mut ends = Vec::new();
        for layer in chain.layers().iter().take(layers) {
            let len = layer.node.storage().len()?;
            let Some(image) = layer.node.as_qcow2() else {
                ends.push(u64::MAX);
                continue;
            };
            if let Some(table) = image.missing_l2_table()? {
                return Err(truncated(layer, "an L2 table", table.get(), len));
            }
            // The last cluster may be incomplete.
            ends.push(len.next_multiple_of(image.geometry().cluster_size()));
        }
        Ok(Self { chain, ends })
    }

    /// Refuses an extent of a layer that has data past the end of its file.
    fn check(&self, layer: Option<usize>, kind: ExtentKind, len: u64) -> Result<()> {
        let (ExtentKind::Data { host }, Some(layer)) = (kind, layer) else { return Ok(()) };
        let Some(end) = self.ends.get(layer).copied() else { return Ok(()) };
        if host.get().saturating_add(len) <= end {
            return Ok(());
        }
        let layer = &self.chain.layers()[layer];
        Err(truncated(layer, "data", host.get(), layer.node.storage().len()?))
    }
}

/// Walks the tables of each of the upper `layers` by itself, and refuses damaged entries and truncated files.
pub(super) fn examine(chain: &Chain, layers: usize) -> Result<()> {
    let ends = Ends::of(chain, layers)?;
    for (index, layer) in chain.layers().iter().enumerate().take(layers) {
        if let Some(image) = layer.node.as_qcow2() {
            image.load_l2_tables()?;
        }
        for extent in layer.node.extents(0..layer.node.virtual_size()) {
            let extent = extent?;
            ends.check(Some(index), extent.kind, extent.len)?;
        }
    }
    Ok(())
}

fn truncated(layer: &Layer, what: &str, at: u64, len: u64) -> Error {
    Error::Refused {
        file: layer.path.display().to_string(),
        why: format!("it is truncated: its tables name {what} at byte {at}, and the file has {len} bytes"),
    }
}

/// Walks the metadata of the layers above `base`; weighs what is `wanted` in the target.
pub(super) fn weigh(
    chain: &Chain,
    target: &Target<'_>,
    base: usize,
    wanted: impl Fn(&ChainExtent) -> bool,
) -> Result<Work> {
    let mut work = Work::default();
    // Several extents may lie in one cluster of the target.
    let mut counted = 0;
    let zeroes_are_data = target.zeroes_are_data();
    let ends = Ends::of(chain, base)?;
    for extent in chain.extents_of(0..base, 0..chain.virtual_size()) {
        let extent = extent?;
        ends.check(extent.layer, extent.kind, extent.len)?;
        let data = match extent.kind {
            ExtentKind::Unallocated => continue,
            _ if !wanted(&extent) => continue,
            ExtentKind::Zero { .. } => zeroes_are_data,
            ExtentKind::Data { .. } | ExtentKind::Compressed => {
                work.data += extent.len;
                true
            }
        };
        work.total += extent.len;
        if data {
            let (start, end) = (extent.guest.get(), extent.end());
            let mut needs = target.needs(start..end)?;
            work.in_place += needs.in_place;
            if start < counted {
                needs = if counted < end { target.needs(counted..end)? } else { Needs::default() };
            }
            work.new_bytes += needs.clusters * target.granularity();
            counted = counted.max(end.next_multiple_of(target.granularity()));
        }
    }
    Ok(work)
}
