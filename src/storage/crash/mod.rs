//! Storages and names that record what happens to them, and every state in which a power failure
//! could have left them.
//!
//! Feature `test-utils`. A program that puts images on a storage of its own can test itself with
//! this too: let the operation run on [`RecordingStorage`]s, or on the [`RecordingFileSystem`], of
//! one [`Recorder`], then look at every state that [`Log::each_state`] makes.
//!
//! The model:
//!
//! - After a successful sync of a file all that was written to it before is durable. What was
//!   written since may have reached the medium in any order, or not at all, by aligned sectors of
//!   512 bytes that are old or new, never mixed. Changes of length, holes and zeroed ranges are
//!   pieces of their own. Files that are said to tear ([`RecorderOptions::with_torn`]) break
//!   anywhere.
//! - After a successful [`FileSystem::sync_dir`](crate::storage::FileSystem::sync_dir) all names
//!   that were made, moved or taken away in that directory are durable. Until then any of these
//!   changes may be lost whatever became of the others; a rename, which is done or not, waits for
//!   both its directories.
//! - The sync of a file says nothing of its name, and that of a directory nothing of the bytes in
//!   it. Bytes of a new file survive under a name that survives only.
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

use super::{MemoryStorage, Storage};
use log::{Change, Event, Medium, NameChange, Piece, Synced};

pub use file_system::RecordingFileSystem;
pub use log::{Barrier, Log, State};
pub use site::{Frame, Site};
pub use storage::RecordingStorage;

/// The contents of the recorded files, in the order in which they were made.
pub type CrashState = Vec<Vec<u8>>;

/// Files by their paths, which start at the root.
pub type Tree = BTreeMap<PathBuf, Vec<u8>>;

/// How a [`Recorder`] records.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RecorderOptions {
    /// Whether the storages zero, reserve and copy ranges by themselves, as files do, or leave that
    /// to their callers.
    pub in_kernel: bool,
    /// Whether it is noted who calls for each sync, which takes its time: see [`Barrier::site`].
    pub sites: bool,
    /// Files whose path contains one of these tear anywhere, within a sector too.
    pub torn: Vec<String>,
    /// Files whose path contains one of these have a fixed length, as block devices do.
    pub fixed: Vec<String>,
    /// The sync that is not recorded, counted from 0: a barrier taken out.
    pub without: Option<usize>,
}

impl RecorderOptions {
    /// The same, with storages that zero, reserve and copy by themselves or not.
    #[must_use]
    pub fn with_in_kernel(mut self, in_kernel: bool) -> Self {
        self.in_kernel = in_kernel;
        self
    }

    /// The same, noting who calls for each sync or not.
    #[must_use]
    pub fn with_sites(mut self, sites: bool) -> Self {
        self.sites = sites;
        self
    }

    /// The same, with files that tear anywhere wherever their path contains `part`.
    #[must_use]
    pub fn with_torn(mut self, part: impl Into<String>) -> Self {
        self.torn.push(part.into());
        self
    }

    /// The same, with files of fixed length wherever their path contains `part`.
    #[must_use]
    pub fn with_fixed(mut self, part: impl Into<String>) -> Self {
        self.fixed.push(part.into());
        self
    }

    /// The same, overhearing the sync with this number, counted from 0.
    #[must_use]
    pub fn with_without(mut self, number: Option<usize>) -> Self {
        self.without = number;
        self
    }
}

/// What happened to a group of files and their names, in order.
#[derive(Debug, Default)]
pub struct Recorder {
    options: RecorderOptions,
    recorded: Mutex<Recorded>,
}

#[derive(Debug, Default)]
struct Recorded {
    start: Medium,
    torn: Vec<bool>,
    events: Vec<Event>,
    syncs: usize,
}

impl Recorder {
    /// A recorder that has seen nothing yet.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// A recorder that records in another way.
    #[must_use]
    pub fn with(options: RecorderOptions) -> Arc<Self> {
        Arc::new(Self { options, ..Self::default() })
    }

    /// A recorder that overhears the sync with this number, counted from 0 over all files and
    /// directories, as if the code under test had left it out. A crash test that still passes then
    /// does not prove that barrier.
    ///
    /// [`Log::without`] does the same to what was recorded already.
    #[must_use]
    pub fn without_sync(number: usize) -> Arc<Self> {
        Self::with(RecorderOptions::default().with_without(Some(number)))
    }

    /// How many syncs of files and directories there were.
    #[must_use]
    pub fn syncs(&self) -> usize {
        self.recorded().syncs
    }

    /// A file of this content, which counts as durable. It joins the group as its next member and
    /// has no name that could be lost: `name` is for messages.
    #[must_use]
    pub fn storage(self: &Arc<Self>, name: &str, bytes: Vec<u8>) -> RecordingStorage {
        let inner = self.memory(name, &bytes);
        let number = self.join(Path::new(name), bytes);
        RecordingStorage::new(number, inner, Arc::clone(self))
    }

    /// Names of these files, names and bytes being durable. A crash state's [`State::tree`] can be
    /// given, so that what recovers from it is recorded in its turn.
    #[must_use]
    pub fn names(self: &Arc<Self>, tree: &Tree) -> RecordingFileSystem {
        RecordingFileSystem::new(Arc::clone(self), tree)
    }

    /// Notes that something has been promised: the caller was told `Ok` of a flush, say. Every
    /// state tells how many marks it is behind ([`State::marks`]), and [`Log::up_to`] what was
    /// durable when it was made.
    pub fn mark(&self) {
        self.recorded().events.push(Event::Mark);
    }

    /// What has happened so far.
    #[must_use]
    pub fn log(&self) -> Log {
        let recorded = self.recorded();
        Log { start: recorded.start.clone(), torn: recorded.torn.clone(), events: recorded.events.clone() }
    }

    /// Calls `look` with the contents of the files in every state that a crash could have left:
    /// [`Log::each_state`] for those to whom names do not matter. Returns how many states there
    /// were.
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

    /// The contents of the files where nothing survived but what was synced: what a promise of
    /// durability is measured by.
    #[must_use]
    pub fn durable(&self) -> CrashState {
        self.log().durable().files
    }

    fn recorded(&self) -> MutexGuard<'_, Recorded> {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a file into the group.
    fn join(&self, path: &Path, bytes: Vec<u8>) -> usize {
        let torn = self.tears(path);
        let mut recorded = self.recorded();
        recorded.start.files.push(bytes);
        recorded.torn.push(torn);
        recorded.torn.len() - 1
    }

    fn memory(&self, name: &str, bytes: &[u8]) -> Arc<MemoryStorage> {
        if !self.options.fixed.iter().any(|part| name.contains(part)) {
            return Arc::new(MemoryStorage::with_bytes(name, bytes));
        }
        let device = MemoryStorage::fixed(name, bytes.len() as u64);
        assert!(device.write_at(bytes, 0).is_ok(), "a device in memory takes what fits");
        Arc::new(device)
    }

    fn tears(&self, path: &Path) -> bool {
        let path = path.to_string_lossy();
        self.options.torn.iter().any(|part| path.contains(part))
    }

    /// Does something and records it, in one step, so that the log has the order of what happened.
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
