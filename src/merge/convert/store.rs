//! Writes what the workers found, in order.

use std::ops::Range;
use std::sync::Arc;

use crate::format::HostOffset;
use crate::image::Placement;

use super::super::copy::Report;
use super::super::target::Target;
use super::super::transfer::Cached;
use super::super::writeback::Writeback;
use super::super::{Error, Result};
use super::workers::{Content, Piece, Seen};
use crate::progress::{Phase, Progress, Step};

/// The target, and how far it is.
pub(super) struct Store<'a> {
    target: &'a Target<'a>,
    /// The source's size.
    size: u64,
    progress: &'a dyn Progress,
    total: u64,
    done: u64,
    report: Report,
    writeback: Writeback,
}

/// Bytes of the buffer, and where they go.
#[derive(Clone, Debug)]
struct Run {
    bytes: Range<usize>,
    to: HostOffset,
}

impl<'a> Store<'a> {
    pub(super) fn new(target: &'a Target<'a>, size: u64, total: u64, progress: &'a dyn Progress) -> Self {
        let writeback = Writeback::new(Vec::new(), Arc::clone(target.storage()), total);
        Self { target, size, progress, total, done: 0, report: Report::default(), writeback }
    }

    /// Stores what was found, and gives the buffer back.
    pub(super) fn take(&mut self, seen: Seen) -> Result<Vec<u8>> {
        let Seen { buffer, pieces, solid } = seen;
        let mut pieces = pieces.into_iter().peekable();
        while let Some(piece) = pieces.next() {
            let len = piece.bytes.len() as u64;
            match piece.content {
                Content::Zero => self.report.zeroed += len,
                Content::Stream(stream) => {
                    let mut streams = vec![(piece.guest, stream)];
                    while let Some(Piece { guest, content: Content::Stream(stream), .. }) =
                        pieces.next_if(|next| matches!(next.content, Content::Stream(_)))
                    {
                        streams.push((guest, stream));
                    }
                    let image = self.target.image().ok_or(Error::Cancelled)?;
                    image.write_compressed(&streams)?;
                    let bytes = streams.len() as u64 * image.geometry().cluster_size();
                    self.report.copied += bytes;
                    self.report.compressed += bytes;
                    self.write_back(bytes);
                }
                Content::Plain => {
                    let mut plain = vec![piece];
                    while let Some(next) = pieces.next_if(|next| next.content == Content::Plain) {
                        plain.push(next);
                    }
                    self.write(&buffer, &plain, &solid)?;
                }
            }
        }
        self.advance(buffer.len() as u64)?;
        Ok(buffer)
    }

    /// Ends the content, and tells what was done.
    pub(super) fn finish(self) -> Result<Report> {
        let storage = self.target.storage();
        if let Some(image) = self.target.image()
            && !storage.is_fixed_size()
        {
            // What was left out at the end, so that the last cluster is whole; QEMU wants whole sectors at least.
            let len = storage.len()?;
            let whole =
                len.next_multiple_of(if self.report.compressed > 0 { 512 } else { image.geometry().cluster_size() });
            if whole > len {
                storage.set_len(whole)?;
            }
        }
        Ok(self.report)
    }

    /// Writes plain pieces where there is room for them.
    fn write(&mut self, buffer: &[u8], pieces: &[Piece], solid: &[Range<usize>]) -> Result<()> {
        let mut placements = Vec::new();
        let mut runs = Vec::new();
        let placed = self.place(buffer, pieces, &mut placements, &mut runs);
        let written = placed.and_then(|()| self.write_runs(buffer, &runs, solid));
        if let Err(error) = written {
            self.target.abandon(&placements)?;
            return Err(error);
        }
        self.target.publish(&placements)?;
        let bytes = pieces.iter().map(|piece| piece.bytes.len() as u64).sum();
        self.report.copied += bytes;
        self.write_back(bytes);
        Ok(())
    }

    fn place(
        &self,
        buffer: &[u8],
        pieces: &[Piece],
        placements: &mut Vec<Placement>,
        runs: &mut Vec<Run>,
    ) -> Result<()> {
        for piece in pieces {
            let len = piece.bytes.len() as u64;
            let visible = self.size.saturating_sub(piece.guest.get()).min(len);
            // The disk may end within its last unit.
            let whole = if visible < len { visible - visible % self.target.unit() } else { len };
            if whole < visible {
                let rest = piece.bytes.start + index(whole)..piece.bytes.start + index(visible);
                self.target.write(&buffer[rest], piece.guest.saturating_add(whole))?;
            }
            let first = placements.len();
            if whole > 0 {
                self.target.place(piece.guest, whole, placements)?;
            }
            for placement in &placements[first..] {
                push(runs, piece, placement);
            }
        }
        Ok(())
    }

    /// Writes runs; where the target was never written, without the zeroes among them.
    fn write_runs(&self, buffer: &[u8], runs: &[Run], solid: &[Range<usize>]) -> Result<()> {
        let storage = self.target.storage();
        let fresh = match self.target.image() {
            None => 0,
            Some(_) if storage.is_fixed_size() => u64::MAX,
            Some(_) => storage.len()?,
        };
        for run in runs {
            if run.to.get() < fresh {
                storage.write_at(&buffer[run.bytes.clone()], run.to.get())?;
                continue;
            }
            let first = solid.partition_point(|part| part.end <= run.bytes.start);
            for part in solid[first..].iter().take_while(|part| part.start < run.bytes.end) {
                let (start, end) = (part.start.max(run.bytes.start), part.end.min(run.bytes.end));
                let at = run.to.saturating_add((start - run.bytes.start) as u64);
                storage.write_at(&buffer[start..end], at.get())?;
            }
        }
        Ok(())
    }

    /// So many bytes more were written, somewhere: nobody reads the target yet.
    fn write_back(&mut self, len: u64) {
        let storage = self.target.storage();
        let all = || storage.len().map(|end| Cached { layer: None, start: 0, end }).into_iter().collect();
        self.writeback.written(all, len);
    }

    fn advance(&mut self, len: u64) -> Result<()> {
        self.done = self.total.min(self.done + len);
        self.progress.step(&Step::new(Phase::Copying, self.done, self.total, self.target.file()));
        if self.progress.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }
}

/// Appends the run of a placement, or lengthens the last one.
fn push(runs: &mut Vec<Run>, piece: &Piece, placement: &Placement) {
    let skip = index(placement.guest.distance_from(piece.guest));
    let bytes = piece.bytes.start + skip..piece.bytes.start + skip + index(placement.len);
    match runs.last_mut() {
        Some(last)
            if last.bytes.end == bytes.start && last.to.saturating_add(last.bytes.len() as u64) == placement.host =>
        {
            last.bytes.end = bytes.end;
        }
        _ => runs.push(Run { bytes, to: placement.host }),
    }
}

fn index(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}
