//! A storage that records what happens to it, and every state in which a power failure could have left it.
//!
//! Feature `test-utils`. A program that puts images on a storage of its own can test itself with this too: let the operation
//! run on [`RecordingStorage`]s of one [`Recorder`], then look at every state that [`Recorder::crash_states`] makes.
//!
//! The model: after a successful sync of a file all that was written to it before is durable. What was written since may
//! have reached the medium in any order, or not at all, by aligned sectors of 512 bytes that are old or new, never mixed.
//! Changes of length and holes are pieces of their own.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::{MemoryStorage, Result, Storage};

/// The unit that a medium writes whole.
const SECTOR: usize = 512;

/// The contents of the recorded files, in the order in which they were made.
pub type CrashState = Vec<Vec<u8>>;

/// One thing that happened to a file.
#[derive(Clone, Debug)]
enum Piece {
    Write { at: usize, data: Vec<u8> },
    SetLen(usize),
    Punch(Range<usize>),
}

#[derive(Clone, Debug)]
enum Event {
    Piece(usize, Piece),
    Sync(usize),
}

/// What happened to a group of files, in order.
#[derive(Debug, Default)]
pub struct Recorder {
    started: Mutex<Vec<Vec<u8>>>,
    events: Mutex<Vec<Event>>,
    /// The sync that is not recorded, counted from 0: a barrier taken out.
    dropped: Option<usize>,
    syncs: Mutex<usize>,
}

impl Recorder {
    /// A recorder that has seen nothing yet.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// A recorder that overhears the sync with this number, counted from 0 over all files, as if the code under test had
    /// left it out. A crash test that still passes then does not prove that barrier.
    #[must_use]
    pub fn without_sync(number: usize) -> Arc<Self> {
        Arc::new(Self { dropped: Some(number), ..Self::default() })
    }

    /// How many syncs there were.
    #[must_use]
    pub fn syncs(&self) -> usize {
        *lock(&self.syncs)
    }

    /// A file of this content, which counts as durable. It joins the group as its next member.
    #[must_use]
    pub fn storage(self: &Arc<Self>, name: &str, bytes: Vec<u8>) -> RecordingStorage {
        let mut started = lock(&self.started);
        started.push(bytes.clone());
        let inner = MemoryStorage::with_bytes(name, bytes);
        RecordingStorage { number: started.len() - 1, inner, recorder: Arc::clone(self) }
    }

    /// Calls `look` with every state that a crash could have left, or, where these are too many, with every prefix, every
    /// state that lacks one piece or has only one, and `samples` random subsets, drawn from `seed`, between each two
    /// syncs. Returns how many states there were.
    ///
    /// # Errors
    /// The first error of `look`.
    pub fn crash_states<E>(
        &self,
        seed: u64,
        samples: usize,
        mut look: impl FnMut(&CrashState) -> std::result::Result<(), E>,
    ) -> std::result::Result<usize, E> {
        let mut durable = lock(&self.started).clone();
        let mut pending: Vec<(usize, Piece)> = Vec::new();
        let mut random = seed | 1;
        let mut count = 0;
        let events = lock(&self.events).clone();
        for event in events.iter().chain([&Event::Sync(usize::MAX)]) {
            match event {
                Event::Piece(file, piece) => pending.extend(sectors(piece).map(|piece| (*file, piece))),
                Event::Sync(file) => {
                    for subset in subsets(pending.len(), samples, &mut random) {
                        let mut state = durable.clone();
                        let kept = pending.iter().zip(subset).filter(|(_, keep)| *keep);
                        kept.for_each(|((file, piece), _)| apply(&mut state[*file], piece));
                        count += 1;
                        look(&state)?;
                    }
                    let (synced, rest) = pending.into_iter().partition(|(of, _)| of == file);
                    pending = rest;
                    let synced: Vec<(usize, Piece)> = synced;
                    for (file, piece) in &synced {
                        apply(&mut durable[*file], piece);
                    }
                }
            }
        }
        Ok(count)
    }

    /// The state in which nothing survived but what was synced: what a promise of durability is measured by.
    #[must_use]
    pub fn durable(&self) -> CrashState {
        let mut durable = lock(&self.started).clone();
        let mut pending: Vec<(usize, Piece)> = Vec::new();
        for event in lock(&self.events).iter() {
            match event {
                Event::Piece(file, piece) => pending.push((*file, piece.clone())),
                Event::Sync(file) => {
                    for (_, piece) in pending.extract_if(.., |(of, _)| of == file) {
                        apply(&mut durable[*file], &piece);
                    }
                }
            }
        }
        durable
    }

    fn record(&self, event: Event) {
        lock(&self.events).push(event);
    }

    fn record_sync(&self, file: usize) {
        let mut syncs = lock(&self.syncs);
        if self.dropped != Some(*syncs) {
            self.record(Event::Sync(file));
        }
        *syncs += 1;
    }
}

/// A file in memory whose changes are recorded.
#[derive(Debug)]
pub struct RecordingStorage {
    number: usize,
    inner: MemoryStorage,
    recorder: Arc<Recorder>,
}

impl Storage for RecordingStorage {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.inner.write_at(buf, offset)?;
        // A sector reaches the medium as it is now, with what earlier writes have put around this one.
        let start = offset & !(SECTOR as u64 - 1);
        let end = (offset + buf.len() as u64).next_multiple_of(SECTOR as u64).min(self.inner.len()?);
        let mut data = vec![0; index(end.saturating_sub(start))];
        self.inner.read_at(&mut data, start)?;
        self.recorder.record(Event::Piece(self.number, Piece::Write { at: index(start), data }));
        Ok(())
    }

    fn len(&self) -> Result<u64> {
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.inner.set_len(len)?;
        self.recorder.record(Event::Piece(self.number, Piece::SetLen(index(len))));
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        self.inner.sync()?;
        self.recorder.record_sync(self.number);
        Ok(())
    }

    fn punch_range(&self, range: Range<u64>) -> Result<()> {
        let end = range.end.min(self.inner.len()?);
        let zeroes = vec![0; index(end.saturating_sub(range.start))];
        self.inner.write_at(&zeroes, range.start)?;
        self.recorder.record(Event::Piece(self.number, Piece::Punch(index(range.start)..index(end))));
        Ok(())
    }
}

/// Splits a write into the sectors that reach the medium one by one.
fn sectors(piece: &Piece) -> impl Iterator<Item = Piece> {
    let mut parts = Vec::new();
    match piece {
        Piece::Write { at, data } => {
            let mut done = 0;
            while done < data.len() {
                let end = (((at + done) / SECTOR + 1) * SECTOR - at).min(data.len());
                parts.push(Piece::Write { at: at + done, data: data[done..end].to_vec() });
                done = end;
            }
        }
        whole => parts.push(whole.clone()),
    }
    parts.into_iter()
}

fn apply(bytes: &mut Vec<u8>, piece: &Piece) {
    match piece {
        Piece::Write { at, data } => {
            if bytes.len() < at + data.len() {
                bytes.resize(at + data.len(), 0);
            }
            bytes[*at..at + data.len()].copy_from_slice(data);
        }
        Piece::SetLen(len) => bytes.resize(*len, 0),
        Piece::Punch(range) => {
            let end = range.end.min(bytes.len());
            bytes[range.start.min(end)..end].fill(0);
        }
    }
}

/// Which pieces of `count` are kept, one choice after the other.
fn subsets(count: usize, samples: usize, random: &mut u64) -> Vec<Vec<bool>> {
    if count <= 8 {
        return (0..1_usize << count).map(|mask| (0..count).map(|bit| mask >> bit & 1 == 1).collect()).collect();
    }
    let prefixes = (0..=count).map(|len| (0..count).map(|at| at < len).collect());
    let missing = (0..count).map(|out| (0..count).map(|at| at != out).collect());
    let alone = (0..count).map(|only| (0..count).map(|at| at == only).collect());
    let mut all: Vec<Vec<bool>> = prefixes.chain(missing).chain(alone).collect();
    all.extend((0..samples).map(|_| (0..count).map(|_| next(random) & 1 == 1).collect::<Vec<bool>>()));
    all
}

/// A small generator: the states need variety, not quality.
fn next(random: &mut u64) -> u64 {
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
    *random >> 32
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn index(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// How often each file appears in a group's states, for tests of the recorder itself.
#[cfg(test)]
fn distinct(states: &[CrashState]) -> usize {
    states.iter().collect::<std::collections::BTreeSet<_>>().len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn states(recorder: &Recorder) -> Vec<CrashState> {
        let mut states = Vec::new();
        let count = recorder
            .crash_states(7, 4, |state| {
                states.push(state.clone());
                Ok::<(), ()>(())
            })
            .expect("the closure never fails");
        assert_eq!(count, states.len());
        states
    }

    #[test]
    fn what_is_synced_is_in_every_later_state() {
        let recorder = Recorder::new();
        let file = recorder.storage("a", vec![0; 1024]);
        file.write_at(&[1; 1024], 0).unwrap();
        file.sync().unwrap();
        file.write_at(&[2; 512], 512).unwrap();
        let states = states(&recorder);
        // Two sectors before the sync: four states. One after it: two.
        assert_eq!(states.len(), 6);
        assert_eq!(distinct(&states), 5);
        assert_eq!(recorder.durable(), [[1; 1024]]);
        assert!(states[4..].iter().all(|state| state[0][..512] == [1; 512]));
    }

    #[test]
    fn a_sync_of_one_file_says_nothing_of_another() {
        let recorder = Recorder::new();
        let (a, b) = (recorder.storage("a", vec![0; 512]), recorder.storage("b", vec![0; 512]));
        a.write_at(&[1; 512], 0).unwrap();
        b.sync().unwrap();
        let last = states(&recorder).into_iter().skip(2).collect::<Vec<_>>();
        assert_eq!(distinct(&last), 2, "the write may still be lost");
    }

    #[test]
    fn a_dropped_sync_is_not_heard() {
        let recorder = Recorder::without_sync(0);
        let file = recorder.storage("a", vec![0; 512]);
        file.write_at(&[1; 512], 0).unwrap();
        file.sync().unwrap();
        assert_eq!(recorder.syncs(), 1);
        assert_eq!(states(&recorder).len(), 2);
    }
}
