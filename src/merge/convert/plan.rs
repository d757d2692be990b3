//! What of a chain has to be looked at, in whole units of the target, in an order that is quick to read.

use crate::chain::{Chain, ChainExtent, ChainExtents};
use crate::format::GuestOffset;
use crate::image::ExtentKind;

use super::super::Result;

/// Where a piece of data is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Origin {
    /// In one layer's file, adjacent.
    File { layer: usize, from: u64 },
    /// Through the chain, at its guest address.
    Chain,
}

/// Whole units of the guest's disk. The last one of the disk may reach past its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) origin: Origin,
    pub(super) guest: GuestOffset,
    pub(super) len: u64,
}

/// What one worker looks at, at once.
pub(super) type Task = Vec<Segment>;

/// Bytes of a task, at most; a multiple of every cluster size.
pub(super) const TASK_BYTES: u64 = 2 << 20;

/// Segments that are gathered and sorted together.
const BATCH_SEGMENTS: usize = 32 << 10;
/// Their bytes.
const BATCH_BYTES: u64 = 1 << 30;

/// The tasks, made lazily: what is allocated decides what they cost.
pub(super) struct Plan<'a> {
    extents: ChainExtents<'a>,
    size: u64,
    unit: u64,
    /// Whether zeroes are data too.
    everything: bool,
    /// Whether a batch is read in the order of the source's files.
    sort: bool,
    /// Up to here, all units are planned.
    covered: u64,
    gathered: Vec<Segment>,
    gathered_bytes: u64,
    ready: std::vec::IntoIter<Segment>,
    /// What is left of the segment that the last task took a part of.
    rest: Option<Segment>,
}

impl<'a> Plan<'a> {
    pub(super) fn new(source: &'a Chain, unit: u64, everything: bool, sort: bool) -> Self {
        let size = source.virtual_size();
        let (gathered, ready) = (Vec::new(), Vec::new().into_iter());
        let extents = source.extents(0..size);
        Self { extents, size, unit, everything, sort, covered: 0, gathered, gathered_bytes: 0, ready, rest: None }
    }

    /// The next task, if there is one more.
    pub(super) fn next(&mut self) -> Result<Option<Task>> {
        let mut task = Task::new();
        let mut room = TASK_BYTES;
        while room > 0 {
            let Some(segment) = self.next_segment()? else { break };
            let part = Segment { len: segment.len.min(room), ..segment };
            room -= part.len;
            self.rest = (part.len < segment.len).then(|| advanced(segment, part.len));
            task.push(part);
        }
        Ok((!task.is_empty()).then_some(task))
    }

    fn next_segment(&mut self) -> Result<Option<Segment>> {
        loop {
            if let Some(segment) = self.rest.take().or_else(|| self.ready.next()) {
                return Ok(Some(segment));
            }
            while self.gathered.len() < BATCH_SEGMENTS && self.gathered_bytes < BATCH_BYTES {
                match self.extents.next() {
                    Some(extent) => self.take(&extent?),
                    None => break,
                }
            }
            if self.gathered.is_empty() {
                return Ok(None);
            }
            let mut batch = std::mem::take(&mut self.gathered);
            self.gathered_bytes = 0;
            if self.sort {
                batch.sort_by_key(|segment| segment.origin);
            }
            self.ready = batch.into_iter();
        }
    }

    /// Plans the units of an extent that no extent before has reached.
    fn take(&mut self, extent: &ChainExtent) {
        let (start, end) = (extent.guest.get(), extent.end());
        let first = (start - start % self.unit).max(self.covered);
        let behind = end.next_multiple_of(self.unit);
        let ExtentKind::Data { host } = extent.kind else {
            let data = extent.kind == ExtentKind::Compressed || self.everything;
            if data {
                self.push(Origin::Chain, first, behind);
            }
            return;
        };
        // Units that only this extent decides lie adjacent in its file; the others are read through the chain.
        let inner = start.next_multiple_of(self.unit).max(first);
        let inner_end = (end - end % self.unit).max(inner);
        self.push(Origin::Chain, first, inner.min(behind));
        if inner < inner_end {
            let layer = extent.layer.unwrap_or_default();
            let from = host.get() + (inner - start);
            self.push(Origin::File { layer, from }, inner, inner_end);
        }
        self.push(Origin::Chain, inner_end, behind);
    }

    fn push(&mut self, origin: Origin, from: u64, to: u64) {
        if from >= to {
            return;
        }
        self.covered = to;
        self.gathered_bytes += to - from;
        let next = Segment { origin, guest: GuestOffset::new(from), len: to - from };
        match self.gathered.last_mut() {
            Some(last) if advanced(*last, last.len) == Segment { len: 0, ..next } => last.len += next.len,
            _ => self.gathered.push(next),
        }
        debug_assert!(from < self.size, "nothing lies behind the disk");
    }
}

/// What follows `len` bytes into a segment.
fn advanced(segment: Segment, len: u64) -> Segment {
    let origin = match segment.origin {
        Origin::File { layer, from } => Origin::File { layer, from: from + len },
        Origin::Chain => Origin::Chain,
    };
    Segment { origin, guest: segment.guest.saturating_add(len), len: segment.len - len }
}
