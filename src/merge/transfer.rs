//! Runs of bytes from file to file: in the kernel where that shares blocks, else by several threads with a buffer each.
//!
//! The order in which runs are carried is nobody's concern: nothing names what is written to new clusters before all of it
//! is durable, and what is overwritten in place is covered by the layer above. What the threads need is bounded: a buffer
//! for each, and as many pieces in waiting.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use crate::storage::{self, Storage};

use super::Result;

/// What one thread reads and writes at once.
const PIECE: u64 = 1 << 20;
/// What is left to the kernel at once, so that progress is told and a wish to stop is heard.
const KERNEL_PIECE: u64 = 64 << 20;
/// Shorter runs cost a call each, and gathering them in the buffer is as quick.
const KERNEL_RUN: u64 = 16 << 10;
/// More than there are processors: while one thread waits for the medium, another reads.
const THREADS: usize = 4;
/// What is carried sooner than threads are started.
const WORTH_THREADS: u64 = 4 << 20;
/// Where buffers start, so that storages can go around their caches.
const ALIGNMENT: usize = 4096;

/// Bytes of one source, and where they go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) layer: usize,
    pub(super) from: u64,
    pub(super) to: u64,
    pub(super) len: u64,
    /// The place is new: nothing of it is in use, or worth keeping in a cache.
    pub(super) fresh: bool,
}

impl Run {
    /// Takes in what follows in source and target. Tells whether it did.
    pub(super) fn absorb(&mut self, next: &Self) -> bool {
        let follows = self.layer == next.layer
            && self.fresh == next.fresh
            && self.from + self.len == next.from
            && self.to + self.len == next.to;
        if follows {
            self.len += next.len;
        }
        follows
    }

    fn part(&self, at: u64, len: u64) -> Self {
        Self { from: self.from + at, to: self.to + at, len, ..*self }
    }
}

/// Runs that one thread carries at once.
#[derive(Debug, Default, PartialEq, Eq)]
struct Piece {
    runs: Vec<Run>,
    len: u64,
    in_kernel: bool,
}

/// Where runs come from and go to.
pub(super) struct Transfer<'a> {
    sources: Vec<&'a dyn Storage>,
    target: &'a dyn Storage,
    /// Sources that nobody will read again.
    pub(super) spent: Range<usize>,
    /// By source: whether the kernel copies from it for less than reading and writing cost.
    in_kernel: Vec<AtomicBool>,
}

/// What a transfer did, in bytes.
#[derive(Debug, Default)]
pub(super) struct Carried {
    read_and_written: AtomicU64,
    in_kernel: AtomicU64,
    /// What was carried through caches and not yet told of.
    cached: Mutex<Vec<Cached>>,
}

/// A range that a cache may hold and need not keep.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Cached {
    /// The source, or none for the target.
    pub(super) layer: Option<usize>,
    pub(super) start: u64,
    pub(super) end: u64,
}

impl Carried {
    /// Bytes that were read and written, and bytes that the kernel copied.
    pub(super) fn bytes(&self) -> (u64, u64) {
        (self.read_and_written.load(Ordering::Acquire), self.in_kernel.load(Ordering::Acquire))
    }

    /// What caches need not keep, of what was carried since this was last asked.
    pub(super) fn take_cached(&self) -> Vec<Cached> {
        std::mem::take(&mut *self.cached.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Who lets pieces through.
pub(super) trait Gate {
    /// How much may be carried at once, of so much at the most.
    fn step(&self, most: u64) -> u64;

    /// Waits until so much may be carried, tells what was carried so far, and hears of a wish to stop.
    fn pass(&mut self, len: u64, carried: &Carried) -> Result<()>;
}

impl<'a> Transfer<'a> {
    pub(super) fn new(sources: Vec<&'a dyn Storage>, target: &'a dyn Storage) -> Self {
        let in_kernel = sources.iter().map(|source| AtomicBool::new(target.prefers_copy_from(*source))).collect();
        Self { sources, target, spent: 0..0, in_kernel }
    }

    /// Whether the kernel would carry this run.
    pub(super) fn is_for_kernel(&self, run: &Run) -> bool {
        run.len >= KERNEL_RUN && self.in_kernel[run.layer].load(Ordering::Relaxed)
    }

    /// Carries runs. Returns when all are carried, or none is any more.
    ///
    /// # Errors
    /// The gate's, before those of reading and writing.
    pub(super) fn carry(&self, runs: &[Run], gate: &mut dyn Gate, carried: &Carried) -> Result<()> {
        if len_of(runs) < WORTH_THREADS {
            let mut buffer = Buffer::default();
            for piece in self.pieces(runs, gate.step(PIECE), gate.step(KERNEL_PIECE)) {
                gate.pass(piece.len, carried)?;
                self.carry_piece(&piece, &mut buffer, carried)?;
            }
            return Ok(());
        }
        let failure = Mutex::new(None);
        let (sender, receiver) = sync_channel(THREADS);
        let receiver = Arc::new(Mutex::new(receiver));
        std::thread::scope(|scope| -> Result<()> {
            // Sharing blocks takes a lock of the whole file: threads would only wait for one another.
            let threads = if runs.iter().all(|run| self.is_for_kernel(run)) { 1 } else { THREADS };
            for _ in 0..threads {
                let receiver = Arc::clone(&receiver);
                let failure = &failure;
                scope.spawn(move || self.work(&receiver, failure, carried));
            }
            // Where all threads have ended, sending fails; else they take in, and pass over, what comes after a failure.
            drop(receiver);
            for piece in self.pieces(runs, gate.step(PIECE), gate.step(KERNEL_PIECE)) {
                let failed = failure.lock().unwrap_or_else(PoisonError::into_inner).is_some();
                if failed {
                    break;
                }
                gate.pass(piece.len, carried)?;
                if sender.send(piece).is_err() {
                    break;
                }
            }
            drop(sender);
            Ok(())
        })?;
        match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(storage::Error::into(error)),
            None => Ok(()),
        }
    }

    /// What one thread does: piece after piece, until there are no more.
    fn work(&self, receiver: &Mutex<Receiver<Piece>>, failure: &Mutex<Option<storage::Error>>, carried: &Carried) {
        let mut buffer = Buffer::default();
        loop {
            let next = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(piece) = next else { return };
            if failure.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
                continue;
            }
            if let Err(error) = self.carry_piece(&piece, &mut buffer, carried) {
                failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            }
        }
    }

    /// Cuts and gathers runs into pieces.
    fn pieces<'r>(&'r self, runs: &'r [Run], most: u64, most_in_kernel: u64) -> impl Iterator<Item = Piece> + 'r {
        let (mut next, mut at) = (0, 0);
        std::iter::from_fn(move || {
            let mut piece = Piece::default();
            while let Some(run) = runs.get(next) {
                let in_kernel = self.is_for_kernel(run);
                let room = if in_kernel { most_in_kernel } else { most }.saturating_sub(piece.len);
                if room == 0 || (piece.len > 0 && piece.in_kernel != in_kernel) {
                    break;
                }
                let len = (run.len - at).min(room);
                piece.runs.push(run.part(at, len));
                piece.len += len;
                piece.in_kernel = in_kernel;
                at += len;
                if at == run.len {
                    (next, at) = (next + 1, 0);
                }
            }
            (piece.len > 0).then_some(piece)
        })
    }

    fn carry_piece(&self, piece: &Piece, buffer: &mut Buffer, carried: &Carried) -> storage::Result<()> {
        if piece.in_kernel {
            for run in &piece.runs {
                let done = self.carry_in_kernel(run)?;
                carried.in_kernel.fetch_add(done, Ordering::AcqRel);
                let mut at = done;
                while at < run.len {
                    let len = (run.len - at).min(PIECE);
                    self.carry_through(
                        &Piece { runs: vec![run.part(at, len)], len, in_kernel: false },
                        buffer,
                        carried,
                    )?;
                    at += len;
                }
            }
            Ok(())
        } else {
            self.carry_through(piece, buffer, carried)
        }
    }

    /// Reads what a piece is made of, and writes it: what is adjacent, at once.
    fn carry_through(&self, piece: &Piece, buffer: &mut Buffer, carried: &Carried) -> storage::Result<()> {
        let buffer = buffer.of(index(piece.len));
        let mut at = 0;
        for runs in piece.runs.chunk_by(|a, b| a.layer == b.layer && a.from + a.len == b.from) {
            let end = at + index(len_of(runs));
            self.sources[runs[0].layer].read_at(&mut buffer[at..end], runs[0].from)?;
            at = end;
        }
        let mut cached = Vec::new();
        at = 0;
        for runs in piece.runs.chunk_by(|a, b| a.fresh == b.fresh && a.to + a.len == b.to) {
            let (to, len) = (runs[0].to, len_of(runs));
            let bytes = &buffer[at..at + index(len)];
            if runs[0].fresh {
                self.target.write_bulk_at(bytes, to)?;
                cached.push(Cached { layer: None, start: to, end: to + len });
            } else {
                // Left to the cache, which writes it out in the order of the medium, when the barrier asks for it.
                self.target.write_at(bytes, to)?;
            }
            at += bytes.len();
        }
        let spent = piece.runs.iter().filter(|run| self.spent.contains(&run.layer));
        cached.extend(spent.map(|run| Cached { layer: Some(run.layer), start: run.from, end: run.from + run.len }));
        carried.cached.lock().unwrap_or_else(PoisonError::into_inner).extend(cached);
        carried.read_and_written.fetch_add(piece.len, Ordering::AcqRel);
        Ok(())
    }

    /// Leaves a run to the kernel, as far as it goes. Returns how much it copied.
    fn carry_in_kernel(&self, run: &Run) -> storage::Result<u64> {
        let mut done = 0;
        while done < run.len {
            let source = self.sources[run.layer];
            match self.target.copy_from(source, run.from + done, run.to + done, run.len - done) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(storage::Error::Unsupported { .. }) => {
                    self.in_kernel[run.layer].store(false, Ordering::Relaxed);
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }
}

fn len_of(runs: &[Run]) -> u64 {
    runs.iter().map(|run| run.len).sum()
}

fn index(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

/// Room for a piece, made when it is first needed.
#[derive(Default)]
struct Buffer {
    bytes: Vec<u8>,
}

impl Buffer {
    fn of(&mut self, len: usize) -> &mut [u8] {
        if self.bytes.len() < len + ALIGNMENT {
            self.bytes = vec![0; len + ALIGNMENT];
        }
        let start = self.bytes.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        &mut self.bytes[start..start + len]
    }
}

#[cfg(test)]
mod tests;
