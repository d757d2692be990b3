//! Whether two chains hold the same.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::format::GuestOffset;
use crate::image::ExtentKind;
use crate::progress::{Phase, Progress, Step};

use super::{Chain, ChainExtent, Error, Result, Walk};

/// How [`compare`] goes about it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CompareOptions {
    /// Whether unequal sizes are a difference, and unequal allocation too, as for `qemu-img compare -s`.
    pub strict: bool,
    /// Only so many bytes from the start are compared; none compares all.
    pub end: Option<u64>,
}

impl CompareOptions {
    /// The same, strict or not.
    #[must_use]
    pub fn with_strict(mut self, strict: bool) -> Self {
        self.strict = strict;
        self
    }

    /// The same, for so many bytes from the start.
    #[must_use]
    pub fn with_end(mut self, end: Option<u64>) -> Self {
        self.end = end;
        self
    }
}

/// What [`compare`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Comparison {
    /// The same content; where not strict, what one is longer reads as zeroes.
    Same,
    /// Strict only: the virtual sizes differ. Nothing was read.
    SizeDiffers,
    /// Strict only: from this offset on, one holds what the other does not, or in another way. The content before is the
    /// same.
    AllocationDiffersAt(u64),
    /// The first byte that differs.
    DiffersAt(u64),
}

/// The bytes read at once from each side.
const CHUNK: u64 = 1 << 20;
/// The most threads that read; each has two buffers of a chunk.
const MAX_THREADS: usize = 4;

static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Compares what the guest would see of two chains, on several threads. What both are known to read as zeroes is not read.
///
/// Before every read, `progress` receives the guest offset as the bytes done, and may cancel.
///
/// # Errors
/// [`Error::Cancelled`]; what reading either chain comes to.
pub fn compare(a: &Chain, b: &Chain, options: &CompareOptions, progress: &dyn Progress) -> Result<Comparison> {
    if options.strict && a.virtual_size() != b.virtual_size() {
        return Ok(Comparison::SizeDiffers);
    }
    let work = Work {
        pieces: Mutex::new(Pieces::new(a, b, options)),
        found: Mutex::new(None),
        progress,
        size: a.virtual_size().max(b.virtual_size()),
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS);
    std::thread::scope(|scope| {
        for _ in 1..threads {
            // Where there are no more threads, fewer do it.
            let _ = std::thread::Builder::new().spawn_scoped(scope, || work.run());
        }
        work.run();
    });
    let found = work.found.into_inner().unwrap_or_else(PoisonError::into_inner);
    found.map_or(Ok(Comparison::Same), |(_, found)| found)
}

/// What the threads share.
struct Work<'a> {
    pieces: Mutex<Pieces<'a>>,
    /// What ends the comparison, and where on the disk: the first counts.
    found: Mutex<Option<(u64, Result<Comparison>)>>,
    progress: &'a dyn Progress,
    /// The larger virtual size, in bytes.
    size: u64,
}

impl Work<'_> {
    /// Reports that everything before a guest offset is compared, or is being compared. Returns true to stop.
    fn stops_at(&self, offset: u64) -> bool {
        self.progress.step(&Step::new(Phase::Comparing, offset, self.size, ""));
        self.progress.is_cancelled()
    }

    fn run(&self) {
        let (mut left, mut right) = (Vec::new(), Vec::new());
        loop {
            let mut pieces = lock(&self.pieces);
            let (at, found) = match pieces.next() {
                Ok(None) => return,
                Ok(Some(Next::Ends(found))) => (pieces.at, Ok(found)),
                Err(error) => (pieces.at, Err(error)),
                Ok(Some(Next::Read(piece))) => {
                    drop(pieces);
                    let difference = if self.stops_at(piece.at) {
                        Err(Error::Cancelled)
                    } else {
                        piece.first_difference(&mut left, &mut right)
                    };
                    pieces = lock(&self.pieces);
                    match difference {
                        Ok(None) => continue,
                        Ok(Some(offset)) => (offset, Ok(Comparison::DiffersAt(offset))),
                        Err(error) => (piece.at, Err(error)),
                    }
                }
            };
            // Pieces are given out in order: what could be found before this one is being looked for already.
            pieces.ended = true;
            drop(pieces);
            let mut first = lock(&self.found);
            if first.as_ref().is_none_or(|(other, _)| at < *other) {
                *first = Some((at, found));
            }
            return;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What comes next: something to read, or the end of it all.
enum Next<'a> {
    Read(Piece<'a>),
    Ends(Comparison),
}

/// A range to be read; `None` stands for zeroes.
struct Piece<'a> {
    at: u64,
    len: usize,
    sides: [Option<&'a Chain>; 2],
}

/// Walks both chains and gives out what must be read, in order.
struct Pieces<'a> {
    chains: [&'a Chain; 2],
    walks: [Walk<'a>; 2],
    strict: bool,
    /// The shorter one's size, and the longer one's.
    sizes: [u64; 2],
    at: u64,
    /// The end of the run that is being given out, and its sides.
    run: (u64, [Option<&'a Chain>; 2]),
    /// What was met when looking ahead, and ends the comparison there.
    met: Option<Result<Comparison>>,
    ended: bool,
}

impl<'a> Pieces<'a> {
    fn new(a: &'a Chain, b: &'a Chain, options: &CompareOptions) -> Self {
        let end = options.end.unwrap_or(u64::MAX);
        let [x, y] = [a, b].map(|chain| chain.virtual_size().min(end));
        let walks = [(a, x), (b, y)].map(|(chain, end)| Walk::new(Some(chain.extents(0..end))));
        let sizes = [x.min(y), x.max(y)];
        Self {
            chains: [a, b],
            walks,
            strict: options.strict,
            sizes,
            at: 0,
            run: (0, [None; 2]),
            met: None,
            ended: false,
        }
    }

    fn next(&mut self) -> Result<Option<Next<'a>>> {
        loop {
            if self.ended || self.at >= self.sizes[1] {
                return Ok(None);
            }
            if let Some(met) = self.met.take().or_else(|| self.look()) {
                return met.map(|found| Some(Next::Ends(found)));
            }
            let (at, sides) = (self.at, self.run.1);
            let most = at.saturating_add(CHUNK);
            self.at = self.run.0.min(most);
            if sides.iter().all(Option::is_none) {
                self.at = self.run.0;
                continue;
            }
            // Runs of one kind that follow each other are read at once.
            while self.at < most && self.at < self.sizes[1] {
                self.met = self.look();
                if self.met.is_some() || self.run.1.map(|side| side.is_some()) != sides.map(|side| side.is_some()) {
                    break;
                }
                self.at = self.run.0.min(most);
            }
            let len = usize::try_from(self.at - at).unwrap_or(usize::MAX);
            return Ok(Some(Next::Read(Piece { at, len, sides })));
        }
    }

    /// Finds the run at the present position, which must lie on the disk; else says what ends the comparison there.
    fn look(&mut self) -> Option<Result<Comparison>> {
        if self.at < self.run.0 { None } else { self.find_run().transpose() }
    }

    fn find_run(&mut self) -> Result<Option<Comparison>> {
        let [a, b] = self.chains;
        let [left, right] = [self.walks[0].at(self.at)?, self.walks[1].at(self.at)?];
        let common = self.at < self.sizes[0];
        if self.strict && common && allocation(a, &left) != allocation(b, &right) {
            return Ok(Some(Comparison::AllocationDiffersAt(self.at)));
        }
        // What the longer one holds behind the end of the other is compared with zeroes.
        let limit = if common { self.sizes[0] } else { self.sizes[1] };
        let side = |chain: &'a Chain, extent: &ChainExtent| (!extent.is_zero()).then_some(chain);
        self.run = (left.end().min(right.end()).min(limit), [side(a, &left), side(b, &right)]);
        Ok(None)
    }
}

/// How a chain holds an extent, as far as that can be compared between two chains.
fn allocation(chain: &Chain, extent: &ChainExtent) -> (bool, std::mem::Discriminant<ExtentKind>) {
    // Past the end of a layer that is too short, that layer counts as holding the zeroes.
    let present = extent.layer.is_some() || extent.depth + 1 < chain.layers().len();
    (present, std::mem::discriminant(&extent.kind))
}

impl Piece<'_> {
    /// The first address at which the two sides differ.
    fn first_difference(&self, left: &mut Vec<u8>, right: &mut Vec<u8>) -> Result<Option<u64>> {
        let difference = match self.sides {
            [Some(a), Some(b)] => first_difference(self.read(a, left)?, self.read(b, right)?),
            [Some(side), None] | [None, Some(side)] => first_nonzero(self.read(side, left)?),
            [None, None] => None,
        };
        Ok(difference.map(|offset| self.at + offset as u64))
    }

    fn read<'b>(&self, chain: &Chain, buf: &'b mut Vec<u8>) -> Result<&'b [u8]> {
        if buf.len() < self.len {
            buf.resize(self.len, 0);
        }
        chain.read_at(&mut buf[..self.len], GuestOffset::new(self.at))?;
        Ok(&buf[..self.len])
    }
}

/// Where two slices of one length first differ. Whole pieces are compared at memory's speed.
fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    let pieces = a.chunks(ZEROES.len()).zip(b.chunks(ZEROES.len()));
    let (index, (a, b)) = pieces.enumerate().find(|(_, (a, b))| a != b)?;
    let offset = a.iter().zip(b).position(|(a, b)| a != b)?;
    Some(index * ZEROES.len() + offset)
}

fn first_nonzero(bytes: &[u8]) -> Option<usize> {
    let (index, piece) = bytes.chunks(ZEROES.len()).enumerate().find(|(_, piece)| **piece != ZEROES[..piece.len()])?;
    Some(index * ZEROES.len() + piece.iter().position(|byte| *byte != 0)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_difference_is_found_behind_whole_pieces() {
        let mut bytes = vec![7; 3 * ZEROES.len() + 5];
        let same = bytes.clone();
        assert_eq!(first_difference(&bytes, &same), None);
        let at = bytes.len() - 1;
        bytes[at] = 8;
        assert_eq!(first_difference(&bytes, &same), Some(at));
        bytes[0] = 8;
        assert_eq!(first_difference(&bytes, &same), Some(0));
    }

    #[test]
    fn the_first_nonzero_byte_is_found() {
        let mut bytes = vec![0; 2 * ZEROES.len() + 1];
        assert_eq!(first_nonzero(&bytes), None);
        bytes[2 * ZEROES.len()] = 1;
        assert_eq!(first_nonzero(&bytes), Some(2 * ZEROES.len()));
        assert_eq!(first_nonzero(&[]), None);
    }
}
