//! Where the two sides may differ: both are read by several threads, and what differs goes on to the copy engine.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use crate::chain::{Below, ChainExtent};
use crate::format::GuestOffset;
use crate::image::{Backing, Image};

use super::super::copy::{Copier, Report};
use super::super::{Result, is_zero};
use super::sides::{Action, Piece, Sides};
use crate::chain::in_order::{in_order, threads};

/// What is gathered before it is compared.
const BATCH: u64 = 64 << 20;

/// Carries out what the sides differ in.
pub(super) struct Rebaser<'a> {
    sides: &'a Sides<'a>,
    copier: Copier<'a>,
    /// The unit in which the top holds data or does not.
    unit: u64,
    size: u64,
    /// What is to be compared, in order; no range is empty, none touches the next.
    pending: Vec<Range<u64>>,
    gathered: u64,
}

impl<'a> Rebaser<'a> {
    pub(super) fn new(sides: &'a Sides<'a>, copier: Copier<'a>) -> Self {
        let unit = sides.image.geometry().subcluster_size();
        Self { sides, copier, unit, size: sides.chain.virtual_size(), pending: Vec::new(), gathered: 0 }
    }

    pub(super) fn take(&mut self, piece: &Piece) -> Result<()> {
        let (start, end) = (piece.old.guest.get(), piece.old.end());
        match piece.action {
            Action::Skip => {
                self.copier.report.skipped += if piece.old.layer.is_some() { piece.old.len } else { 0 };
                Ok(())
            }
            Action::Move => self.copier.take(piece.old),
            Action::Compare => self.compare_later(start..end),
            Action::Zero => {
                // Whole units need not be looked at; where only a part is zero, data would have to be written.
                let first = start.next_multiple_of(self.unit).min(end);
                let last = if end == self.size { end } else { (end - end % self.unit).max(first) };
                self.compare_later(start..first)?;
                if first < last {
                    let guest = GuestOffset::new(first);
                    self.copier.take(ChainExtent { guest, len: last - first, ..piece.old })?;
                }
                self.compare_later(last..end)
            }
        }
    }

    pub(super) fn finish(mut self) -> Result<Report> {
        self.compare()?;
        self.copier.finish()
    }

    fn compare_later(&mut self, range: Range<u64>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        self.gathered += range.end - range.start;
        match self.pending.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.pending.push(range),
        }
        if self.gathered >= BATCH { self.compare() } else { Ok(()) }
    }

    /// Compares what is pending, and moves the old content where the new differs.
    fn compare(&mut self) -> Result<()> {
        let pending = std::mem::take(&mut self.pending);
        let pool: Mutex<Vec<Buffers>> = Mutex::default();
        let step = Buffers::len_for(self.sides.image);
        let (old, new) = (self.sides.chain.below(0), self.sides.new_below());
        let mut parts = pending.into_iter().flat_map(|range| cut(range, step));
        let look = |range: Range<u64>| {
            let pooled = || pool.lock().unwrap_or_else(PoisonError::into_inner);
            let free = pooled().pop();
            let mut buffers = free.unwrap_or_else(|| Buffers::new(self.sides.image));
            let found = differences([&old, &new], &range, self.unit, &mut buffers);
            pooled().push(buffers);
            found.map(|found| (range, found))
        };
        // What is gathered little of is compared here.
        let threads = usize::try_from(self.gathered / (2 * step)).unwrap_or(usize::MAX).clamp(1, threads());
        self.gathered = 0;
        let mut found = Vec::new();
        let copier = &mut self.copier;
        in_order(threads, &mut || Ok(parts.next()), &look, &mut |(range, differences)| {
            let len = range.end - range.start;
            let differing = differences.iter().map(|(_, range)| range.end - range.start).sum::<u64>();
            copier.report.compared += len;
            copier.report.skipped += len - differing;
            found.extend(differences);
            copier.advance(len)
        })?;
        found.into_iter().try_for_each(|(fate, range)| self.settle(fate, range))
    }

    /// Makes the top hold a range as the old side has it.
    fn settle(&mut self, fate: Fate, range: Range<u64>) -> Result<()> {
        if fate == Fate::Zero {
            return self.copier.zero(GuestOffset::new(range.start), range.end - range.start);
        }
        for extent in self.sides.chain.extents(range) {
            self.copier.take_told(extent?)?;
        }
        Ok(())
    }
}

/// The parts of a range, cut at multiples of a step.
fn cut(range: Range<u64>, step: u64) -> impl Iterator<Item = Range<u64>> {
    let mut start = range.start;
    std::iter::from_fn(move || {
        let part = start..range.end.min(start - start % step + step);
        start = part.end;
        (!part.is_empty()).then_some(part)
    })
}

/// What becomes of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Equal,
    Zero,
    Data,
}

impl Fate {
    fn of(old: &[u8], new: &[u8]) -> Self {
        match () {
            () if old == new => Self::Equal,
            () if is_zero(old) => Self::Zero,
            () => Self::Data,
        }
    }
}

/// Reads both sides, the old one first; tells where they differ, adjacent units with the same fate together.
fn differences(
    sides: [&Below<'_>; 2],
    range: &Range<u64>,
    unit: u64,
    buffers: &mut Buffers,
) -> Result<Vec<(Fate, Range<u64>)>> {
    let (old, new) = buffers.parts(range);
    let start = GuestOffset::new(range.start);
    sides[0].read_at(old, start)?;
    sides[1].read_at(new, start)?;
    let mut found: Vec<(Fate, Range<u64>)> = Vec::new();
    if old == new {
        return Ok(found);
    }
    let place = |at: u64| usize::try_from(at - range.start).unwrap_or(usize::MAX);
    for unit in cut(range.clone(), unit) {
        let bytes = place(unit.start)..place(unit.end);
        let fate = Fate::of(&old[bytes.clone()], &new[bytes]);
        match found.last_mut() {
            _ if fate == Fate::Equal => {}
            Some((last, run)) if *last == fate && run.end == unit.start => run.end = unit.end,
            _ => found.push((fate, unit)),
        }
    }
    Ok(found)
}

/// Room for the same range of both sides.
pub(super) struct Buffers {
    old: Vec<u8>,
    new: Vec<u8>,
}

impl Buffers {
    /// At least 1 MiB each, and whole clusters.
    pub(super) fn new(image: &Image) -> Self {
        let len = usize::try_from(Self::len_for(image)).unwrap_or(usize::MAX);
        Self { old: vec![0; len], new: vec![0; len] }
    }

    /// The length of either.
    fn len_for(image: &Image) -> u64 {
        image.geometry().cluster_size().max(1 << 20)
    }

    pub(super) fn len(&self) -> u64 {
        self.old.len() as u64
    }

    pub(super) fn parts(&mut self, range: &Range<u64>) -> (&mut [u8], &mut [u8]) {
        let len = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
        let (old, new) = (self.old.len(), self.new.len());
        (&mut self.old[..len.min(old)], &mut self.new[..len.min(new)])
    }
}
