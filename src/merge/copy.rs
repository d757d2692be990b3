//! The copy engine: extents in, long runs from file to file out.

use std::time::Duration;

use crate::chain::{Chain, ChainExtent};
use crate::format::GuestOffset;
use crate::image::{ExtentKind, Placement};
use crate::storage::{self, Storage};

use super::progress::{Phase, Progress, Step};
use super::rate::Rate;
use super::target::Target;
use super::writeback::Writeback;
use super::{Error, Result};

/// What a merge did, in guest bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// Data that was read and written.
    pub copied: u64,
    /// Data that the kernel copied, sharing blocks where the file system can.
    pub copied_in_kernel: u64,
    /// Ranges that were made zero, or found to be.
    pub zeroed: u64,
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
/// The copy buffer.
const BUFFER: usize = 1 << 20;
/// Runs from this length on are left to the kernel; below, gathering them in the buffer is quicker.
const KERNEL_RUN: u64 = 1 << 20;

/// Whole target clusters that lie adjacent in one source file.
#[derive(Clone, Copy, Debug)]
struct Move {
    layer: usize,
    from: u64,
    guest: GuestOffset,
    len: u64,
}

/// One run of bytes from file to file.
#[derive(Clone, Copy, Debug)]
struct Run {
    layer: usize,
    from: u64,
    to: u64,
    len: u64,
}

/// Moves extents of a chain's upper layers into a target.
pub(super) struct Copier<'a> {
    chain: &'a Chain,
    target: &'a Target<'a>,
    progress: &'a dyn Progress,
    total: u64,
    done: u64,
    pub(super) report: Report,
    moves: Vec<Move>,
    gathered: u64,
    buffer: Vec<u8>,
    in_kernel: bool,
    writeback: Writeback,
    rate: Rate,
}

impl<'a> Copier<'a> {
    pub(super) fn new(chain: &'a Chain, target: &'a Target<'a>, total: u64, progress: &'a dyn Progress) -> Self {
        let report = Report::default();
        let buffer = vec![0; BUFFER];
        Self {
            chain,
            target,
            progress,
            total,
            done: 0,
            report,
            moves: Vec::new(),
            gathered: 0,
            buffer,
            in_kernel: true,
            writeback: Writeback::new(target.storage(), total),
            rate: Rate::default(),
        }
    }

    /// The same, copying at most so many bytes of data a second.
    pub(super) fn with_rate(mut self, limit: Option<u64>) -> Self {
        self.rate = Rate::new(limit);
        self
    }

    /// Takes in one extent; what the source layers leave to others is passed over.
    pub(super) fn take(&mut self, extent: ChainExtent) -> Result<()> {
        match extent.kind {
            ExtentKind::Unallocated => {}
            // Also where a layer in between is too short and hides what lies deeper.
            ExtentKind::Zero { .. } => {
                self.target.zero(extent.guest, extent.len)?;
                self.report.zeroed += extent.len;
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

    /// Carries out what is gathered and tells what was done.
    pub(super) fn finish(mut self) -> Result<Report> {
        self.carry_out()?;
        self.writeback.finish()?;
        Ok(self.report)
    }

    /// Reads from the chain and writes to the target, cluster by cluster where need be.
    fn write_through(&mut self, offset: GuestOffset, len: u64) -> Result<()> {
        let mut at = 0;
        while at < len {
            let size = usize::try_from(len - at).unwrap_or(usize::MAX).min(BUFFER);
            let position = offset.saturating_add(at);
            self.chain.read_at(&mut self.buffer[..size], position)?;
            self.target.write(&self.buffer[..size], position)?;
            self.report.copied += size as u64;
            at += size as u64;
            self.advance_data(size as u64)?;
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
        let placed = self.place(&moves, &mut placements, &mut runs);
        let copied = placed.and_then(|()| runs.chunk_by(follows).try_for_each(|runs| self.copy(runs)));
        if let Err(error) = copied {
            // What went wrong first is what the caller must hear of; at worst, clusters leak.
            let _ = self.target.abandon(&placements);
            return Err(error);
        }
        self.target.publish(&placements)
    }

    fn place(&self, moves: &[Move], placements: &mut Vec<Placement>, runs: &mut Vec<Run>) -> Result<()> {
        for next in moves {
            let first = placements.len();
            self.target.place(next.guest, next.len, placements)?;
            for placement in &placements[first..] {
                let from = next.from + placement.guest.distance_from(next.guest);
                let run = Run { layer: next.layer, from, to: placement.host.get(), len: placement.len };
                match runs.last_mut() {
                    Some(last)
                        if last.layer == run.layer
                            && last.from + last.len == run.from
                            && last.to + last.len == run.to =>
                    {
                        last.len += run.len;
                    }
                    _ => runs.push(run),
                }
            }
        }
        Ok(())
    }

    /// Copies runs that are adjacent in the target: long ones in the kernel, short ones together through the buffer.
    fn copy(&mut self, runs: &[Run]) -> Result<()> {
        let mut filled = 0;
        let mut to = runs.first().map_or(0, |run| run.to);
        for run in runs {
            let (mut from, mut len) = (run.from, run.len);
            if self.in_kernel && len >= KERNEL_RUN {
                self.write_buffer(&mut filled, &mut to)?;
                let copied = self.copy_in_kernel(run)?;
                from += copied;
                to += copied;
                len -= copied;
            }
            while len > 0 {
                let part = usize::try_from(len).unwrap_or(usize::MAX).min(BUFFER - filled);
                let source = self.source(run.layer);
                source.read_at(&mut self.buffer[filled..filled + part], from)?;
                filled += part;
                from += part as u64;
                len -= part as u64;
                if filled == BUFFER {
                    self.write_buffer(&mut filled, &mut to)?;
                }
            }
        }
        self.write_buffer(&mut filled, &mut to)
    }

    /// Writes what the buffer holds to `to`, and moves on.
    fn write_buffer(&mut self, filled: &mut usize, to: &mut u64) -> Result<()> {
        let len = std::mem::take(filled);
        if len == 0 {
            return Ok(());
        }
        self.target.storage().write_at(&self.buffer[..len], *to)?;
        *to += len as u64;
        self.report.copied += len as u64;
        self.writeback.written(len as u64);
        self.advance_data(len as u64)
    }

    /// Leaves a run to the kernel, as far as it goes. Returns how much it copied.
    fn copy_in_kernel(&mut self, run: &Run) -> Result<u64> {
        let mut copied = 0;
        while copied < run.len {
            let len = (run.len - copied).min(self.rate.step(64 << 20));
            let source = self.source(run.layer);
            match self.target.storage().copy_from(source, run.from + copied, run.to + copied, len) {
                Ok(0) => break,
                Ok(count) => {
                    copied += count;
                    self.report.copied_in_kernel += count;
                    self.writeback.written(count);
                    self.advance_data(count)?;
                }
                Err(storage::Error::Unsupported { .. }) => {
                    self.in_kernel = false;
                    break;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(copied)
    }

    fn source(&self, layer: usize) -> &'a dyn Storage {
        &**self.chain.layers()[layer].node.storage()
    }

    /// As [`Copier::advance`], for data; waits where it came too quickly.
    fn advance_data(&mut self, len: u64) -> Result<()> {
        self.advance(len)?;
        self.rate.spend(len);
        while let Some(pause) = self.rate.owed() {
            std::thread::sleep(pause.min(Duration::from_millis(100)));
            if self.progress.is_cancelled() {
                return Err(Error::Cancelled);
            }
        }
        Ok(())
    }

    /// So many bytes more are merged: tells of it, and stops where the caller wants that.
    pub(super) fn advance(&mut self, len: u64) -> Result<()> {
        self.done += len;
        let file = self.target.file();
        self.progress.step(&Step { phase: Phase::Copying, done: self.done, total: self.total, file });
        if self.progress.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }
}

/// Whether a run is adjacent to the one before it in the target.
fn follows(a: &Run, b: &Run) -> bool {
    a.to + a.len == b.to
}
