//! The copy engine: extents in, long runs from file to file out.

use std::sync::Arc;
use std::time::Duration;

use crate::chain::{Chain, ChainExtent};
use crate::format::GuestOffset;
use crate::image::{ExtentKind, Placement};
use crate::storage;

use super::rate::Rate;
use super::target::Target;
use super::transfer::{Carried, Gate, Run, Transfer};
use super::writeback::Writeback;
use super::{Error, Result};
use crate::progress::{Phase, Progress, Step};

/// What a merge did, in guest bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// Data that was read and written.
    pub copied: u64,
    /// Data that the kernel copied, because both files lie on a file system that shares blocks, or whose server copies.
    pub copied_in_kernel: u64,
    /// Ranges that were made zero, or found to be.
    pub zeroed: u64,
    /// What the layers hold and what did not have to move: the image that was written shows the same without.
    pub skipped: u64,
    /// Data that was read on both sides of a rebase and compared.
    pub compared: u64,
    /// What a rebase dropped from the top, as it equals the new backing file.
    pub dropped: u64,
    /// Of what was copied, what is stored compressed.
    pub compressed: u64,
    /// The persistent bitmaps of written images that vouched for their content before and no longer do: they are marked
    /// inconsistent.
    pub bitmaps_invalidated: Vec<String>,
}

/// Bytes of data moves that are gathered, sorted and carried out together.
const BATCH_BYTES: u64 = 1 << 30;
/// Moves that are gathered at most, whatever their length.
const BATCH_MOVES: usize = 32 << 10;
/// What is read from the chain at once where it cannot go from file to file.
const BUFFER: usize = 1 << 20;
/// Blocks are reserved for new runs from this length on.
const WORTH_RESERVING: u64 = 1 << 20;

/// Whole target clusters that lie adjacent in one source file.
#[derive(Clone, Copy, Debug)]
struct Move {
    layer: usize,
    from: u64,
    guest: GuestOffset,
    len: u64,
}

/// Moves extents of a chain's upper layers into a target.
pub(super) struct Copier<'a> {
    chain: &'a Chain,
    target: &'a Target<'a>,
    transfer: Transfer<'a>,
    course: Course<'a>,
    pub(super) report: Report,
    moves: Vec<Move>,
    gathered: u64,
    buffer: Vec<u8>,
}

impl<'a> Copier<'a> {
    pub(super) fn new(chain: &'a Chain, target: &'a Target<'a>, total: u64, progress: &'a dyn Progress) -> Self {
        let sources = chain.layers().iter().map(|layer| &**layer.node.storage()).collect();
        let course = Course {
            target,
            progress,
            total,
            done: 0,
            writeback: Writeback::new(
                chain.layers().iter().map(|layer| Arc::clone(layer.node.storage())).collect(),
                Arc::clone(target.storage()),
                total,
            ),
            rate: Rate::default(),
            told: 0,
            told_before: 0,
            before_change: &|| Ok(()),
            changed: false,
        };
        Self {
            chain,
            target,
            transfer: Transfer::new(sources, &**target.storage()),
            course,
            report: Report::default(),
            moves: Vec::new(),
            gathered: 0,
            buffer: Vec::new(),
        }
    }

    /// The same, copying at most so many bytes of data a second.
    pub(super) fn with_rate(mut self, limit: Option<u64>) -> Self {
        self.course.rate = Rate::new(limit);
        self
    }

    /// The same, where nobody will read so many layers from the top again.
    pub(super) fn with_spent(mut self, layers: usize) -> Self {
        self.transfer.spent = 0..layers;
        self
    }

    /// Sets the function to call once before the first change of the target's guest-visible content.
    pub(super) fn with_before_change(mut self, before_change: &'a dyn Fn() -> Result<()>) -> Self {
        self.course.before_change = before_change;
        self
    }

    /// Takes in one extent; what the source layers leave to others is passed over.
    pub(super) fn take(&mut self, extent: ChainExtent) -> Result<()> {
        match extent.kind {
            ExtentKind::Unallocated => {}
            // Also where a layer in between is too short and hides what lies deeper.
            ExtentKind::Zero { .. } => {
                self.zero(extent.guest, extent.len)?;
                self.advance(extent.len)?;
            }
            ExtentKind::Compressed => self.write_through(extent.guest, extent.len)?,
            ExtentKind::Data { host } => {
                let granularity = self.target.granularity();
                let (start, end) = (extent.guest.get(), extent.guest.get() + extent.len);
                let first = start.next_multiple_of(granularity).min(end);
                let last = (end - end % granularity).max(first);
                self.write_through(extent.guest, first - start)?;
                if first < last {
                    let from = host.get() + (first - start);
                    let layer = extent.layer.unwrap_or_default();
                    self.gather(Move { layer, from, guest: GuestOffset::new(first), len: last - first })?;
                }
                self.write_through(GuestOffset::new(last), end - last)?;
            }
        }
        Ok(())
    }

    /// The same of an extent that was counted as done before, when it was compared.
    pub(super) fn take_told(&mut self, extent: ChainExtent) -> Result<()> {
        self.course.told_before += extent.len;
        self.take(extent)
    }

    /// Makes a range of the target zero.
    pub(super) fn zero(&mut self, offset: GuestOffset, len: u64) -> Result<()> {
        self.course.before_change()?;
        self.target.zero(offset, len)?;
        self.report.zeroed += len;
        Ok(())
    }

    /// Carries out what is gathered and tells what was done.
    pub(super) fn finish(mut self) -> Result<Report> {
        self.carry_out()?;
        Ok(self.report)
    }

    /// Reads from the chain and writes to the target, cluster by cluster where need be.
    fn write_through(&mut self, offset: GuestOffset, len: u64) -> Result<()> {
        let mut at = 0;
        self.buffer.resize(if len > 0 { BUFFER } else { self.buffer.len() }, 0);
        while at < len {
            let size = usize::try_from(len - at).unwrap_or(usize::MAX).min(BUFFER);
            let position = offset.saturating_add(at);
            self.chain.read_at(&mut self.buffer[..size], position)?;
            self.course.before_change()?;
            self.target.write(&self.buffer[..size], position)?;
            self.report.copied += size as u64;
            at += size as u64;
            self.course.spend(size as u64)?;
            self.advance(size as u64)?;
        }
        Ok(())
    }

    fn gather(&mut self, mut next: Move) -> Result<()> {
        while next.len > 0 {
            let room = BATCH_BYTES - self.gathered;
            let part = Move { len: next.len.min(room), ..next };
            self.moves.push(part);
            self.gathered += part.len;
            next.from += part.len;
            next.guest = next.guest.saturating_add(part.len);
            next.len -= part.len;
            if self.gathered == BATCH_BYTES || self.moves.len() == BATCH_MOVES {
                self.carry_out()?;
            }
        }
        Ok(())
    }

    /// Finds room for what is gathered, in the order in which it lies in the sources, copies it, and maps it.
    fn carry_out(&mut self) -> Result<()> {
        let mut moves = std::mem::take(&mut self.moves);
        self.gathered = 0;
        if self.target.image().is_some() {
            moves.sort_unstable_by_key(|next| (next.layer, next.from));
        }
        let mut placements = Vec::with_capacity(moves.len());
        let mut runs: Vec<Run> = Vec::with_capacity(moves.len());
        let carried = Carried::default();
        let placed = self.place(&moves, &mut placements, &mut runs).and_then(|()| self.reserve(&runs));
        // What is mapped already is overwritten in place by the transfer.
        let in_place = runs.iter().any(|run| !run.fresh);
        let placed = placed.and_then(|()| if in_place { self.course.before_change() } else { Ok(()) });
        let done = placed.and_then(|()| self.transfer.carry(&runs, &mut self.course, &carried));
        let (copied, in_kernel) = carried.bytes();
        self.report.copied += copied;
        self.report.copied_in_kernel += in_kernel;
        if let Err(error) = done {
            self.give_back(&placements, &runs);
            return Err(error);
        }
        self.course.before_change()?;
        self.target.publish(&placements)?;
        self.course.settle(&carried)
    }

    /// After a failure: nothing names the new places. At worst, clusters leak; what went wrong first is what the caller
    /// must hear of.
    fn give_back(&self, placements: &[Placement], runs: &[Run]) {
        for run in runs.iter().filter(|run| run.fresh) {
            let _ = self.target.storage().punch_range(run.to..run.to + run.len);
        }
        let _ = self.target.abandon(placements);
    }

    fn place(&self, moves: &[Move], placements: &mut Vec<Placement>, runs: &mut Vec<Run>) -> Result<()> {
        for next in moves {
            let first = placements.len();
            self.target.place(next.guest, next.len, placements)?;
            for placement in &placements[first..] {
                let from = next.from + placement.guest.distance_from(next.guest);
                let (to, len, fresh) = (placement.host.get(), placement.len, !placement.mapped);
                let run = Run { layer: next.layer, from, to, len, fresh };
                if !runs.last_mut().is_some_and(|last| last.absorb(&run)) {
                    runs.push(run);
                }
            }
        }
        Ok(())
    }

    /// Reserves blocks for what goes behind the target's end, so that threads can fill it in any order, and so that a lack
    /// of space shows before anything is written.
    fn reserve(&self, runs: &[Run]) -> Result<()> {
        let storage = self.target.storage();
        if storage.is_fixed_size() {
            return Ok(());
        }
        let end = storage.len()?;
        let new = |run: &&Run| run.fresh && run.to >= end && !self.transfer.is_for_kernel(run);
        let mut new = runs.iter().filter(new).peekable();
        while let Some(first) = new.next() {
            let mut range = first.to..first.to + first.len;
            while let Some(next) = new.next_if(|next| next.to == range.end) {
                range.end += next.len;
            }
            if range.end - range.start < WORTH_RESERVING {
                continue;
            }
            match storage.allocate_range(range) {
                Err(storage::Error::Unsupported { .. }) => return Ok(()),
                done => done?,
            }
        }
        Ok(())
    }

    /// So many bytes more are merged: tells of it, and stops where the caller wants that.
    pub(super) fn advance(&mut self, len: u64) -> Result<()> {
        self.course.advance(len)
    }
}

/// How far a merge is, and how quickly it may go on.
struct Course<'a> {
    target: &'a Target<'a>,
    progress: &'a dyn Progress,
    total: u64,
    done: u64,
    writeback: Writeback,
    rate: Rate,
    /// What the present transfer has told of.
    told: u64,
    /// What comes once more and has been told of before.
    told_before: u64,
    /// Called before the guest-visible content of the target changes.
    before_change: &'a dyn Fn() -> Result<()>,
    /// Set once the guest-visible content of the target may have changed.
    changed: bool,
}

impl Course<'_> {
    /// Announces the first change of the target's guest-visible content.
    fn before_change(&mut self) -> Result<()> {
        if !self.changed {
            (self.before_change)()?;
            self.changed = true;
        }
        Ok(())
    }

    fn advance(&mut self, len: u64) -> Result<()> {
        let again = self.told_before.min(len);
        self.told_before -= again;
        self.done += len - again;
        let file = self.target.file();
        self.progress.step(&Step::new(Phase::Copying, self.done, self.total, file));
        if self.progress.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// So many bytes of data are about to be copied; waits where they come too quickly.
    fn spend(&mut self, len: u64) -> Result<()> {
        while let Some(pause) = self.rate.owed() {
            std::thread::sleep(pause.min(Duration::from_millis(100)));
            if self.progress.is_cancelled() {
                return Err(Error::Cancelled);
            }
        }
        self.rate.spend(len);
        Ok(())
    }

    /// What a transfer has come to.
    fn catch_up(&mut self, carried: &Carried) -> Result<()> {
        let (copied, in_kernel) = carried.bytes();
        let new = copied + in_kernel - self.told;
        self.told += new;
        self.writeback.written(|| carried.take_cached(), new);
        self.advance(new)
    }

    /// The same, of a transfer that has ended.
    fn settle(&mut self, carried: &Carried) -> Result<()> {
        let ended = self.catch_up(carried);
        self.told = 0;
        ended
    }
}

impl Gate for Course<'_> {
    fn step(&self, most: u64) -> u64 {
        self.rate.step(most)
    }

    fn pass(&mut self, len: u64, carried: &Carried) -> Result<()> {
        self.catch_up(carried)?;
        self.spend(len)
    }
}
