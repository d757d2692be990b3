//! Threads that read the source, find zeroes and compress. Buffers are bounded; results come back in order.

use std::cell::RefCell;
use std::ops::Range;

use crate::chain::Chain;
use crate::format::{CompressionType, GuestOffset};
use crate::image::compress;

use super::super::{Result, is_zero};
use super::plan::{Origin, Plan, Segment, Task};
use crate::chain::in_order::in_order;

/// What is done with the data that is read.
#[derive(Clone, Debug)]
pub(super) struct Look {
    /// What is stored whole or not at all.
    pub(super) unit: u64,
    /// Zeroes from this length on are left out; 0 for none.
    pub(super) sparse: u64,
    /// How it is compressed, if it is.
    pub(super) kind: Option<CompressionType>,
}

/// A run of whole units of one kind, at `bytes` of the buffer.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) guest: GuestOffset,
    pub(super) bytes: Range<usize>,
    pub(super) content: Content,
}

/// What a piece holds.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// Zeroes.
    Zero,
    /// Data.
    Plain,
    /// One cluster, compressed.
    Stream(Vec<u8>),
}

/// What was found of a task.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) buffer: Vec<u8>,
    pub(super) pieces: Vec<Piece>,
    /// The parts of the buffer that are worth writing where zeroes are there already, in order.
    pub(super) solid: Vec<Range<usize>>,
}

/// Looks at everything of a plan with this many threads, and hands each result to `take`, which gives the buffer back.
pub(super) fn look_at_all(
    source: &Chain,
    mut plan: Plan<'_>,
    look: &Look,
    threads: usize,
    take: &mut dyn FnMut(Seen) -> Result<Vec<u8>>,
) -> Result<()> {
    let buffers: RefCell<Vec<Vec<u8>>> = RefCell::default();
    let mut next = || Ok(plan.next()?.map(|task| (task, buffers.borrow_mut().pop().unwrap_or_default())));
    in_order(threads, &mut next, &|(task, buffer)| look_at(source, look, &task, buffer), &mut |seen| {
        let buffer = take(seen)?;
        buffers.borrow_mut().push(buffer);
        Ok(())
    })
}

fn look_at(source: &Chain, look: &Look, task: &Task, mut buffer: Vec<u8>) -> Result<Seen> {
    let len = task.iter().map(|segment| length(segment.len)).sum();
    buffer.resize(len, 0);
    let mut filled = 0;
    let mut pieces = Vec::new();
    let mut segments = task.iter().peekable();
    while let Some(&segment) = segments.next() {
        let mut bytes = filled..filled + length(segment.len);
        split(look, segment.guest, &bytes, &mut pieces);
        // What follows in the source's file is read at once.
        while let (Origin::File { layer, from }, Some(&&next)) = (segment.origin, segments.peek()) {
            if next.origin != (Origin::File { layer, from: from + bytes.len() as u64 }) {
                break;
            }
            segments.next();
            let more = bytes.end..bytes.end + length(next.len);
            split(look, next.guest, &more, &mut pieces);
            bytes.end = more.end;
        }
        filled = bytes.end;
        read(source, segment, &mut buffer[bytes])?;
    }
    let solid = find_solid(look, &buffer);
    Ok(Seen { pieces: judge(look, pieces, &buffer, &solid), buffer, solid })
}

fn length(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

/// Cuts a segment into units.
fn split(look: &Look, guest: GuestOffset, bytes: &Range<usize>, pieces: &mut Vec<(GuestOffset, Range<usize>)>) {
    let unit = length(look.unit);
    let units = bytes.clone().step_by(unit).map(|at| at..bytes.end.min(at + unit));
    pieces.extend(units.map(|unit| (guest.saturating_add((unit.start - bytes.start) as u64), unit)));
}

fn read(source: &Chain, segment: Segment, buf: &mut [u8]) -> Result<()> {
    match segment.origin {
        Origin::File { layer, from } => source.layers()[layer].node.storage().read_at(buf, from)?,
        Origin::Chain => {
            let inside = source.virtual_size().saturating_sub(segment.guest.get());
            let (inside, outside) = buf.split_at_mut(length(inside).min(buf.len()));
            source.read_at(inside, segment.guest)?;
            outside.fill(0);
        }
    }
    Ok(())
}

/// Where the buffer is not zero, as far as that matters. Shorter runs of zeroes count as data.
fn find_solid(look: &Look, buffer: &[u8]) -> Vec<Range<usize>> {
    let mut solid: Vec<Range<usize>> = Vec::new();
    if look.sparse == 0 {
        solid.push(0..buffer.len());
        return solid;
    }
    let block = length(look.sparse).min(length(look.unit));
    for (index, bytes) in buffer.chunks(block).enumerate() {
        if is_zero(bytes) {
            continue;
        }
        let (start, end) = (index * block, index * block + bytes.len());
        match solid.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => solid.push(start..end),
        }
    }
    solid
}

/// Tells for each unit what it holds, and joins those that are stored the same way.
fn judge(look: &Look, units: Vec<(GuestOffset, Range<usize>)>, buffer: &[u8], solid: &[Range<usize>]) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    let mut solid = solid.iter().peekable();
    for (guest, bytes) in units {
        while solid.next_if(|run| run.end <= bytes.start).is_some() {}
        let zero = solid.peek().is_none_or(|run| run.start >= bytes.end);
        let content = match look.kind {
            _ if zero => Content::Zero,
            Some(kind) => compress(kind, &buffer[bytes.clone()]).map_or(Content::Plain, Content::Stream),
            None => Content::Plain,
        };
        match pieces.last_mut() {
            Some(last)
                if last.content == content
                    && !matches!(content, Content::Stream(_))
                    && last.guest.saturating_add(last.bytes.len() as u64) == guest =>
            {
                last.bytes.end = bytes.end;
            }
            _ => pieces.push(Piece { guest, bytes, content }),
        }
    }
    pieces
}
