//! Threads that read the source, find zeroes and compress. Buffers are bounded; results come back in order.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::sync::{Mutex, PoisonError};

use crate::chain::Chain;
use crate::format::{CompressionType, GuestOffset};
use crate::image::compress;

use super::super::{Error, Result};
use super::plan::{Origin, Plan, Segment, Task};

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

/// A task, a buffer for it, and where the result goes.
type Order = (Task, Vec<u8>, std::sync::mpsc::SyncSender<Result<Seen>>);

/// Looks at everything of a plan with this many threads, and hands each result to `take`, which gives the buffer back.
pub(super) fn look_at_all(
    source: &Chain,
    mut plan: Plan<'_>,
    look: &Look,
    threads: usize,
    take: &mut dyn FnMut(Seen) -> Result<Vec<u8>>,
) -> Result<()> {
    let (orders, queue) = channel::<Order>();
    let queue = &Mutex::new(queue);
    std::thread::scope(|scope| {
        let orders = orders; // dropped when this is done, which ends the workers
        let mut waiting: VecDeque<Receiver<Result<Seen>>> = VecDeque::new();
        let mut buffers = Vec::new();
        let mut started = 0;
        loop {
            // One task more than there are threads waits for a free one, and one is being stored.
            while waiting.len() <= threads {
                let Some(task) = plan.next()? else { break };
                if started < threads {
                    scope.spawn(move || work(source, look, queue));
                    started += 1;
                }
                waiting.push_back(order(&orders, task, buffers.pop().unwrap_or_default())?);
            }
            let Some(next) = waiting.pop_front() else { return Ok(()) };
            let seen = next.recv().map_err(|_| worker_is_gone())??;
            buffers.push(take(seen)?);
        }
    })
}

fn order(orders: &Sender<Order>, task: Task, buffer: Vec<u8>) -> Result<Receiver<Result<Seen>>> {
    let (result, receiver) = sync_channel(1);
    orders.send((task, buffer, result)).map_err(|_| worker_is_gone())?;
    Ok(receiver)
}

/// Can only be where a worker panicked, which the scope hands on.
fn worker_is_gone() -> Error {
    Error::Cancelled
}

/// Serves orders until there are no more.
fn work(source: &Chain, look: &Look, queue: &Mutex<Receiver<Order>>) {
    loop {
        let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((task, buffer, result)) = next else { return };
        // Whoever asked may have given up; then the orders end, too.
        let _ = result.send(look_at(source, look, &task, buffer));
    }
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

fn is_zero(bytes: &[u8]) -> bool {
    static ZEROES: [u8; 4096] = [0; 4096];
    bytes.chunks(ZEROES.len()).all(|part| *part == ZEROES[..part.len()])
}
