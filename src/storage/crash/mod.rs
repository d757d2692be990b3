//! Storages and file systems that record their changes, and every state that a power failure can
//! leave of them.
//!
//! Feature `test-utils`. Programs with storages of their own can use it too: run the operation on
//! [`RecordingStorage`]s or the [`RecordingFileSystem`] of one [`Recorder`], then check every state
//! of [`Log::each_state`].
//!
//! The model:
//!
//! - After a successful sync of a file, all earlier writes to it are durable. Later writes reach
//!   the medium in any order, or not at all, in aligned sectors of 512 bytes that are old or new,
//!   never mixed. Changes of length, holes and zeroed ranges are separate pieces. Files that tear
//!   ([`RecorderOptions::with_torn`]) are split anywhere.
//! - After a successful [`FileSystem::sync_dir`](crate::storage::FileSystem::sync_dir) all
//!   creations, renames and removals in that directory are durable. Until then any of them may be
//!   lost, independently of the others. A rename is atomic, and waits for both of its directories.
//! - The sync of a file does not make its name durable, and the sync of a directory does not make
//!   content durable. The content of a new file survives only if its name does.
//!
//! ```
//! use std::path::Path;
//! use qcow2_chain::storage::crash::{Recorder, Tree};
//! use qcow2_chain::storage::FileSystem;
//!
//! // A file is replaced: written beside it, made durable, renamed, and the name made durable.
//! let before: Tree = [("/vm/disk".into(), b"old".to_vec())].into();
//! let recorder = Recorder::new();
//! let names = recorder.names(&before);
//! let new = names.create_new(Path::new("/vm/new"))?;
//! new.write_at(b"new", 0)?;
//! new.sync()?;
//! names.rename(Path::new("/vm/new"), Path::new("/vm/disk"))?;
//! names.sync_dir(Path::new("/vm"))?;
//!
//! let log = recorder.log();
//! let right = |tree: &Tree| matches!(tree[Path::new("/vm/disk")].as_slice(), b"old" | b"new");
//! log.each_state(1, 8, |state| if right(&state.tree()) { Ok(()) } else { Err(state.number) }).unwrap();
//! assert_eq!(log.durable().tree()[Path::new("/vm/disk")], b"new");
//!
//! // Had the first of the two syncs been left out, a state would show neither.
//! let found = log.without(|barrier| barrier == 0).each_state(1, 8, |state| {
//!     if right(&state.tree()) { Ok(()) } else { Err(state.number) }
//! });
//! assert!(found.is_err());
//! # Ok::<(), qcow2_chain::storage::Error>(())
//! ```

mod file_system;
mod log;
mod site;
mod storage;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{FileId, MemoryFileSystem, MemoryStorage, Storage};
use log::{Change, Event, Medium, NameChange, Piece, Synced};

pub use file_system::RecordingFileSystem;
pub use log::{Barrier, Log, State};
pub use site::{Frame, Site};
pub use storage::RecordingStorage;

/// The contents of the recorded files, in the order of their creation.
pub type CrashState = Vec<Vec<u8>>;

/// Files by their paths, which start at the root.
pub type Tree = BTreeMap<PathBuf, Vec<u8>>;

/// The options of a [`Recorder`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RecorderOptions {
    /// Lets the storages zero, reserve and copy ranges, as files do. Otherwise they return that
    /// this is unsupported.
    pub in_kernel: bool,
    /// Records the call stack of each sync, which is slow, see [`Barrier::site`].
    pub sites: bool,
    /// Files whose path contains one of these tear anywhere, within a sector too.
    pub torn: Vec<String>,
    /// Files whose path contains one of these have a fixed length, as block devices do.
    pub fixed: Vec<String>,
    /// The sync that is not recorded, counted from 0, as if a barrier were missing.
    pub without: Option<usize>,
}

impl RecorderOptions {
    /// Sets if the storages zero, reserve and copy ranges. Default: no.
    #[must_use]
    pub fn with_in_kernel(mut self, in_kernel: bool) -> Self {
        self.in_kernel = in_kernel;
        self
    }

    /// Sets if call stacks of syncs are recorded. Default: no.
    #[must_use]
    pub fn with_sites(mut self, sites: bool) -> Self {
        self.sites = sites;
        self
    }

    /// Adds files that tear anywhere: those whose path contains `part`. Default: none.
    #[must_use]
    pub fn with_torn(mut self, part: impl Into<String>) -> Self {
        self.torn.push(part.into());
        self
    }

    /// Adds files of fixed length: those whose path contains `part`. Default: none.
    #[must_use]
    pub fn with_fixed(mut self, part: impl Into<String>) -> Self {
        self.fixed.push(part.into());
        self
    }

    /// Sets the sync that is not recorded, counted from 0. Default: none.
    #[must_use]
    pub fn with_without(mut self, number: Option<usize>) -> Self {
        self.without = number;
        self
    }
}

/// Records the changes of a group of files and their names, in order.
#[derive(Debug, Default)]
pub struct Recorder {
    options: RecorderOptions,
    recorded: Mutex<Recorded>,
}

#[derive(Debug, Default)]
struct Recorded {
    start: Medium,
    torn: Vec<bool>,
    /// The identities of the files that have names, by number.
    identities: BTreeMap<usize, FileId>,
    events: Vec<Event>,
    syncs: usize,
}

impl Recorder {
    /// Returns a recorder with default options.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Returns a recorder with these options.
    #[must_use]
    pub fn with(options: RecorderOptions) -> Arc<Self> {
        Arc::new(Self { options, ..Self::default() })
    }

    /// Returns a recorder that does not record the sync with this number, counted from 0 over all
    /// files and directories, as if the code under test had omitted it. A crash test that still
    /// passes does not prove that barrier.
    ///
    /// [`Log::without`] does the same to a log.
    #[must_use]
    pub fn without_sync(number: usize) -> Arc<Self> {
        Self::with(RecorderOptions::default().with_without(Some(number)))
    }

    /// Returns the number of syncs of files and directories.
    #[must_use]
    pub fn syncs(&self) -> usize {
        self.recorded().syncs
    }

    /// Adds a file with durable content to the group. It has no name that could be lost: `name` is
    /// for messages.
    #[must_use]
    pub fn storage(self: &Arc<Self>, name: &str, bytes: Vec<u8>) -> RecordingStorage {
        let inner = Arc::new(self.memory(name, &bytes));
        let number = self.join(Path::new(name), bytes);
        RecordingStorage::new(number, inner, Arc::clone(self))
    }

    /// Returns a file system with these files, whose names and content are durable. To record a
    /// recovery, pass [`State::tree`] of a crash state; the files get new identities.
    #[must_use]
    pub fn names(self: &Arc<Self>, tree: &Tree) -> RecordingFileSystem {
        RecordingFileSystem::new(Arc::clone(self), tree)
    }

    /// Returns a file system with copies of these files, whose names and content are durable. The
    /// files keep their identities. To record a recovery, pass [`State::file_system`] of a crash
    /// state.
    #[must_use]
    pub fn file_system(self: &Arc<Self>, files: &MemoryFileSystem) -> RecordingFileSystem {
        RecordingFileSystem::of(Arc::clone(self), files)
    }

    /// Marks the moment of a promise, such as `Ok` of a flush. Every state has the number of marks
    /// before it ([`State::marks`]), and [`Log::up_to`] returns the log up to a mark.
    pub fn mark(&self) {
        self.recorded().events.push(Event::Mark);
    }

    /// Returns the log so far.
    #[must_use]
    pub fn log(&self) -> Log {
        let recorded = self.recorded();
        Log {
            start: recorded.start.clone(),
            torn: recorded.torn.clone(),
            identities: recorded.identities.clone(),
            events: recorded.events.clone(),
        }
    }

    /// Calls `look` with the contents of the files in every state that a crash can leave, and
    /// returns the number of states. This is [`Log::each_state`] without names.
    ///
    /// # Errors
    /// The first error of `look`.
    pub fn crash_states<E>(
        &self,
        seed: u64,
        samples: usize,
        mut look: impl FnMut(&CrashState) -> std::result::Result<(), E>,
    ) -> std::result::Result<usize, E> {
        self.log().each_state(seed, samples, |state| look(&state.files))
    }

    /// Returns the contents of the files if only synced changes survived.
    #[must_use]
    pub fn durable(&self) -> CrashState {
        self.log().durable().files
    }

    fn recorded(&self) -> MutexGuard<'_, Recorded> {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a file to the group.
    fn join(&self, path: &Path, bytes: Vec<u8>) -> usize {
        let torn = self.tears(path);
        let mut recorded = self.recorded();
        recorded.start.files.push(bytes);
        recorded.torn.push(torn);
        recorded.torn.len() - 1
    }

    fn memory(&self, name: &str, bytes: &[u8]) -> MemoryStorage {
        if !self.options.fixed.iter().any(|part| name.contains(part)) {
            return MemoryStorage::with_bytes(name, bytes);
        }
        let device = MemoryStorage::fixed(name, bytes.len() as u64);
        assert!(device.write_at(bytes, 0).is_ok(), "a device in memory takes what fits");
        device
    }

    fn tears(&self, path: &Path) -> bool {
        let path = path.to_string_lossy();
        self.options.torn.iter().any(|part| path.contains(part))
    }

    /// Performs a change and records it in one step, so that the log has the right order.
    fn record<T, E>(
        &self,
        done: impl FnOnce(bool) -> std::result::Result<(Option<Event>, T), E>,
        file: Option<usize>,
    ) -> std::result::Result<T, E> {
        let mut recorded = self.recorded();
        let torn = file.is_some_and(|file| recorded.torn.get(file).copied().unwrap_or(false));
        let (event, value) = done(torn)?;
        recorded.events.extend(event);
        Ok(value)
    }

    fn record_piece(&self, file: usize, done: impl FnOnce(bool) -> super::Result<Option<Piece>>) -> super::Result<()> {
        let event = |torn| Ok((done(torn)?.map(|piece| Event::Change(Change::Bytes(file, piece))), ()));
        self.record(event, Some(file))
    }

    fn record_name<T>(&self, done: impl FnOnce() -> super::Result<(NameChange, T)>) -> super::Result<T> {
        self.record(|_| done().map(|(change, value)| (Some(Event::Change(Change::Name(change))), value)), None)
    }

    fn record_sync(&self, of: Synced) {
        let site = self.options.sites.then(|| Arc::new(std::backtrace::Backtrace::force_capture()));
        let mut recorded = self.recorded();
        let number = recorded.syncs;
        recorded.syncs += 1;
        if self.options.without != Some(number) {
            recorded.events.push(Event::Sync { number, of, site });
        }
    }
}
