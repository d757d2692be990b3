//! The log of changes, and the states that a crash can leave of them.

use std::backtrace::Backtrace;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::site::Site;
use super::{CrashState, Tree};
use crate::storage::{FileId, MemoryFileSystem, MemoryStorage};

/// The unit that a medium writes atomically, in bytes.
pub(super) const SECTOR: usize = 512;

/// The most places at which a write to a file that tears is split.
const TEARS: usize = 3;

/// The most prefixes, missing pieces and single pieces that are tried between two syncs.
const MOST: usize = 96;

/// One change of a file.
#[derive(Clone, Debug)]
pub(super) enum Piece {
    Write {
        at: usize,
        data: Vec<u8>,
    },
    SetLen(usize),
    Punch(Range<usize>),
    /// A hole. The file grows if it ends earlier.
    Zero(Range<usize>),
}

/// One change of a name.
#[derive(Clone, Debug)]
pub(super) enum NameChange {
    Create { path: PathBuf, file: usize },
    Rename { from: PathBuf, to: PathBuf, file: usize },
    Unlink(PathBuf),
}

#[derive(Clone, Debug)]
pub(super) enum Change {
    Bytes(usize, Piece),
    Name(NameChange),
}

/// The file or directory that a sync makes durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Synced {
    File(usize),
    Directory(PathBuf),
}

#[derive(Clone, Debug)]
pub(super) enum Event {
    Change(Change),
    Sync { number: usize, of: Synced, site: Option<Arc<Backtrace>> },
    Mark,
}

/// Files, and names for some of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Medium {
    pub(super) files: CrashState,
    pub(super) names: BTreeMap<PathBuf, usize>,
}

/// A state in which a crash could have left the files and names.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct State {
    /// The number among the states of one log, seed and number of samples, counted from 0. It
    /// reproduces the state.
    pub number: usize,
    /// The number of marks ([`super::Recorder::mark`]) before the crash.
    pub marks: usize,
    /// The contents of all files of the group in the order in which they joined it, including files
    /// without a name.
    pub files: CrashState,
    names: BTreeMap<PathBuf, usize>,
    identities: BTreeMap<usize, FileId>,
}

impl State {
    /// Returns the files that have a name, with the identities that they had before the crash.
    #[must_use]
    pub fn file_system(&self) -> MemoryFileSystem {
        let files = MemoryFileSystem::new();
        for (path, file) in &self.names {
            let storage = MemoryStorage::with_bytes(path.display().to_string(), &self.files[*file]);
            let storage = match self.identities.get(file) {
                Some(identity) => storage.with_file_id(*identity),
                None => storage,
            };
            files.insert(path, Arc::new(storage));
        }
        files
    }

    /// Returns the files that have a name, by path.
    #[must_use]
    pub fn tree(&self) -> Tree {
        self.names.iter().map(|(path, file)| (path.clone(), self.files[*file].clone())).collect()
    }
}

/// A sync of a file or a directory, as it was recorded.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Barrier {
    /// The number among the syncs of all files and directories, counted from 0.
    pub number: usize,
    /// The directory, or `None` for the sync of a file.
    pub directory: Option<PathBuf>,
    /// The call site, if recorded ([`super::RecorderOptions::with_sites`]).
    pub site: Option<Site>,
}

/// The changes of a group of files and names up to some moment.
#[derive(Clone, Debug)]
pub struct Log {
    pub(super) start: Medium,
    pub(super) torn: Vec<bool>,
    pub(super) identities: BTreeMap<usize, FileId>,
    pub(super) events: Vec<Event>,
}

impl Log {
    /// Returns `true` if nothing was changed.
    #[must_use]
    pub fn is_unchanged(&self) -> bool {
        !self.events.iter().any(|event| matches!(event, Event::Change(_)))
    }

    /// Returns the syncs of files and directories, in order.
    #[must_use]
    pub fn barriers(&self) -> Vec<Barrier> {
        let barriers = self.events.iter().filter_map(|event| match event {
            Event::Sync { number, of, site } => Some((*number, of, site)),
            Event::Change(_) | Event::Mark => None,
        });
        let barrier = |(number, of, site): (usize, &Synced, &Option<Arc<Backtrace>>)| Barrier {
            number,
            directory: match of {
                Synced::File(_) => None,
                Synced::Directory(path) => Some(path.clone()),
            },
            site: site.as_deref().map(Site::of),
        };
        barriers.map(barrier).collect()
    }

    /// Returns the log without the syncs for whose number `dropped` returns `true`, as if the code
    /// under test had omitted them. A test that still passes does not prove that barrier.
    #[must_use]
    pub fn without(&self, dropped: impl Fn(usize) -> bool) -> Self {
        let kept = |event: &&Event| !matches!(event, Event::Sync { number, .. } if dropped(*number));
        Self {
            start: self.start.clone(),
            torn: self.torn.clone(),
            identities: self.identities.clone(),
            events: self.events.iter().filter(kept).cloned().collect(),
        }
    }

    /// Calls `look` with every state that a crash can leave, and returns the number of states. For
    /// more than 8 pieces between two syncs these are: every prefix, every state that lacks one
    /// piece or has only one piece (for more than 96 pieces, a sample of these), and `samples`
    /// random subsets, drawn from `seed`.
    ///
    /// # Errors
    /// The first error of `look`.
    pub fn each_state<E>(
        &self,
        seed: u64,
        samples: usize,
        mut look: impl FnMut(&State) -> std::result::Result<(), E>,
    ) -> std::result::Result<usize, E> {
        let mut random = seed | 1;
        let mut window = Window::new(self.start.clone());
        let (mut count, mut marks) = (0, 0);
        let mut look_at_all = |window: &Window, marks: usize, random: &mut u64| {
            for subset in subsets(window.open(), samples, random) {
                let Medium { files, names } = window.with(&subset);
                look(&State { number: count, marks, files, names, identities: self.identities.clone() })?;
                count += 1;
            }
            Ok(())
        };
        for event in &self.events {
            match event {
                Event::Change(change) => window.add(change, &self.torn, &mut random),
                Event::Sync { of, .. } => {
                    look_at_all(&window, marks, &mut random)?;
                    window.sync(of);
                }
                Event::Mark => {
                    // Up to here a state may be older than the mark; from here on none is.
                    marks += 1;
                    look_at_all(&window, marks, &mut random)?;
                }
            }
        }
        look_at_all(&window, marks, &mut random)?;
        Ok(count)
    }

    /// Returns the log up to the mark with this number, counted from 0, or all of it if there is no
    /// such mark.
    #[must_use]
    pub fn up_to(&self, mark: usize) -> Self {
        let mut left = mark + 1;
        let before = |event: &&Event| {
            left -= usize::from(matches!(event, Event::Mark));
            left > 0
        };
        let events = self.events.iter().take_while(before).cloned().collect();
        let (torn, identities) = (self.torn.clone(), self.identities.clone());
        Self { start: self.start.clone(), torn, identities, events }
    }

    /// Returns the state in which only synced changes survived, as a test of promised durability
    /// requires.
    #[must_use]
    pub fn durable(&self) -> State {
        let mut marks = 0;
        let mut window = Window::new(self.start.clone());
        let none = vec![false; self.torn.len()];
        for event in &self.events {
            match event {
                Event::Change(change) => window.add(change, &none, &mut 1),
                Event::Sync { of, .. } => window.sync(of),
                Event::Mark => marks += 1,
            }
        }
        let Medium { files, names } = window.with(&vec![false; window.open()]);
        State { number: 0, marks, files, names, identities: self.identities.clone() }
    }

    /// Returns the state in which everything survived.
    #[must_use]
    pub fn last(&self) -> State {
        let mut medium = self.start.clone();
        let mut marks = 0;
        for event in &self.events {
            match event {
                Event::Change(change) => medium.apply(change),
                Event::Mark => marks += 1,
                Event::Sync { .. } => {}
            }
        }
        let Medium { files, names } = medium;
        State { number: 0, marks, files, names, identities: self.identities.clone() }
    }
}

/// The durable state at a moment, and the changes that may be lost.
struct Window {
    durable: Medium,
    pending: Vec<Pending>,
}

struct Pending {
    change: Change,
    /// The directories that are not yet synced. A change of names is durable when all of them are.
    /// It stays in its place while an earlier one is not, because the file of a name depends on the
    /// order.
    waits: Vec<PathBuf>,
}

impl Pending {
    /// Returns `true` if the change may be lost.
    fn is_open(&self) -> bool {
        matches!(self.change, Change::Bytes(..)) || !self.waits.is_empty()
    }
}

impl Window {
    fn new(durable: Medium) -> Self {
        Self { durable, pending: Vec::new() }
    }

    fn add(&mut self, change: &Change, torn: &[bool], random: &mut u64) {
        match change {
            Change::Bytes(file, piece) => {
                let parts = match torn.get(*file) {
                    Some(true) => shreds(piece, random),
                    _ => sectors(piece),
                };
                let pending = |piece| Pending { change: Change::Bytes(*file, piece), waits: Vec::new() };
                self.pending.extend(parts.into_iter().map(pending));
            }
            Change::Name(name) => {
                self.pending.push(Pending { change: change.clone(), waits: name.directories() });
            }
        }
    }

    fn sync(&mut self, of: &Synced) {
        match of {
            Synced::File(file) => {
                let own = |pending: &mut Pending| matches!(pending.change, Change::Bytes(number, _) if number == *file);
                for Pending { change, .. } in self.pending.extract_if(.., own) {
                    self.durable.apply(&change);
                }
            }
            Synced::Directory(directory) => {
                for pending in &mut self.pending {
                    pending.waits.retain(|waits| waits != directory);
                }
                let mut lost_before = false;
                let settled = |pending: &mut Pending| match &pending.change {
                    Change::Bytes(..) => false,
                    Change::Name(_) => {
                        lost_before |= pending.is_open();
                        !lost_before
                    }
                };
                for Pending { change, .. } in self.pending.extract_if(.., settled) {
                    self.durable.apply(&change);
                }
            }
        }
    }

    /// Returns the number of changes that may be lost.
    fn open(&self) -> usize {
        self.pending.iter().filter(|pending| pending.is_open()).count()
    }

    /// Returns the state in which these of the changes that may be lost are kept.
    fn with(&self, kept: &[bool]) -> Medium {
        let mut medium = self.durable.clone();
        let mut kept = kept.iter();
        for pending in &self.pending {
            if !pending.is_open() || kept.next().copied().unwrap_or(true) {
                medium.apply(&pending.change);
            }
        }
        medium
    }
}

impl NameChange {
    /// Returns the directories that it changes.
    fn directories(&self) -> Vec<PathBuf> {
        let parent = |path: &Path| path.parent().map_or_else(PathBuf::new, Path::to_path_buf);
        match self {
            Self::Create { path, .. } | Self::Unlink(path) => vec![parent(path)],
            Self::Rename { from, to, .. } if from.parent() == to.parent() => vec![parent(to)],
            Self::Rename { from, to, .. } => vec![parent(from), parent(to)],
        }
    }
}

impl Medium {
    fn apply(&mut self, change: &Change) {
        match change {
            Change::Bytes(file, piece) => piece.apply(&mut self.files[*file]),
            Change::Name(NameChange::Create { path, file }) => {
                self.names.insert(path.clone(), *file);
            }
            Change::Name(NameChange::Rename { from, to, file }) => {
                self.names.remove(from);
                self.names.insert(to.clone(), *file);
            }
            Change::Name(NameChange::Unlink(path)) => {
                self.names.remove(path);
            }
        }
    }
}

impl Piece {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Write { at, data } => {
                if bytes.len() < at + data.len() {
                    bytes.resize(at + data.len(), 0);
                }
                bytes[*at..at + data.len()].copy_from_slice(data);
            }
            Self::SetLen(len) => bytes.resize(*len, 0),
            Self::Punch(range) => {
                let end = range.end.min(bytes.len());
                bytes[range.start.min(end)..end].fill(0);
            }
            Self::Zero(range) => {
                if bytes.len() < range.end {
                    bytes.resize(range.end, 0);
                }
                bytes[range.clone()].fill(0);
            }
        }
    }

    /// Splits a write at these offsets. The rest is a piece too.
    fn split(at: usize, data: &[u8], cuts: impl Iterator<Item = usize>) -> Vec<Self> {
        let mut parts = Vec::new();
        let mut done = 0;
        for end in cuts.chain([data.len()]) {
            if end > done {
                parts.push(Self::Write { at: at + done, data: data[done..end].to_vec() });
                done = end;
            }
        }
        parts
    }
}

/// Splits a write into the sectors that reach the medium one by one.
fn sectors(piece: &Piece) -> Vec<Piece> {
    match piece {
        Piece::Write { at, data } => {
            let first = SECTOR - at % SECTOR;
            Piece::split(*at, data, (first..data.len()).step_by(SECTOR))
        }
        whole => vec![whole.clone()],
    }
}

/// Splits a write by sectors, and sectors at random offsets.
fn shreds(piece: &Piece, random: &mut u64) -> Vec<Piece> {
    let mut parts = Vec::new();
    for sector in sectors(piece) {
        let Piece::Write { at, data } = &sector else {
            parts.push(sector);
            continue;
        };
        let mut cuts = [0; TEARS];
        for cut in &mut cuts {
            *cut = usize::try_from(next(random)).unwrap_or(0) % data.len().max(1);
        }
        cuts.sort_unstable();
        parts.extend(Piece::split(*at, data, cuts.into_iter()));
    }
    parts
}

/// Returns selections of the pieces that are kept, of `count` pieces.
fn subsets(count: usize, samples: usize, random: &mut u64) -> Vec<Vec<bool>> {
    if count <= 8 {
        return (0..1_usize << count).map(|mask| (0..count).map(|bit| mask >> bit & 1 == 1).collect()).collect();
    }
    // A long zeroed range has hundreds of equal pieces: a sample is enough.
    let step = count.div_ceil(MOST);
    let mut places = || {
        let first = usize::try_from(next(random)).unwrap_or(0) % step;
        (first..count).step_by(step)
    };
    let prefixes = places().chain([0, count]).map(|len| (0..count).map(|at| at < len).collect());
    let missing = places().map(|out| (0..count).map(|at| at != out).collect());
    let alone = places().map(|only| (0..count).map(|at| at == only).collect());
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
