//! The recording file system.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::log::{NameChange, Synced};
use super::{Recorder, RecordingStorage, Tree};
use crate::storage::memory_file_system::rooted;
use crate::storage::{
    Access, Attributes, EntryKind, FileId, FileSystem, MemoryFileSystem, MemoryStorage, ReadOnlyStorage, Resolved,
    Result, Storage,
};

/// A directory tree in memory, like [`MemoryFileSystem`], that records its changes together with
/// those of its files.
#[derive(Debug)]
pub struct RecordingFileSystem {
    recorder: Arc<Recorder>,
    inner: MemoryFileSystem,
    /// The numbers of the files in the log by identity, which a rename does not change.
    numbers: Mutex<BTreeMap<FileId, usize>>,
}

impl RecordingFileSystem {
    pub(super) fn new(recorder: Arc<Recorder>, tree: &Tree) -> Self {
        let names = Self { recorder, inner: MemoryFileSystem::new(), numbers: Mutex::default() };
        for (path, bytes) in tree {
            names.start(path, bytes.clone(), None);
        }
        names
    }

    pub(super) fn of(recorder: Arc<Recorder>, files: &MemoryFileSystem) -> Self {
        let names = Self { recorder, inner: MemoryFileSystem::new(), numbers: Mutex::default() };
        for (path, storage) in files.files().iter() {
            names.start(path, storage.to_vec(), storage.file_id());
        }
        names
    }

    /// Adds a file that exists before the recording, with this identity or a new one.
    fn start(&self, path: &Path, bytes: Vec<u8>, identity: Option<FileId>) {
        let Some(path) = rooted(path) else { return };
        let storage = self.recorder.memory(&path.display().to_string(), &bytes);
        let storage = Arc::new(match identity {
            Some(identity) => storage.with_file_id(identity),
            None => storage,
        });
        let file = self.recorder.join(&path, bytes);
        self.recorder.recorded().start.names.insert(path.clone(), file);
        self.identify(&storage, file);
        self.inner.insert(path, storage);
    }

    /// Records the identity of a file.
    fn identify(&self, storage: &MemoryStorage, file: usize) {
        if let Some(identity) = storage.file_id() {
            self.numbers().insert(identity, file);
            self.recorder.recorded().identities.insert(file, identity);
        }
    }

    /// Returns all files with their present content, durable or not.
    #[must_use]
    pub fn tree(&self) -> Tree {
        self.recorder.log().last().tree()
    }

    fn numbers(&self) -> MutexGuard<'_, BTreeMap<FileId, usize>> {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn recorded(&self, storage: Arc<MemoryStorage>, path: &Path) -> Option<RecordingStorage> {
        let number = self.number(&storage)?;
        self.tear(number, path);
        Some(RecordingStorage::new(number, storage, Arc::clone(&self.recorder)))
    }

    fn number(&self, storage: &MemoryStorage) -> Option<usize> {
        self.numbers().get(&storage.file_id()?).copied()
    }

    /// Marks a file as one that tears if its new path is listed so. It keeps the mark.
    fn tear(&self, number: usize, path: &Path) {
        if self.recorder.tears(path) {
            self.recorder.recorded().torn[number] = true;
        }
    }
}

/// Returns the path of a name in the log.
fn key(path: &Path) -> PathBuf {
    rooted(path).unwrap_or_else(|| path.to_path_buf())
}

impl FileSystem for RecordingFileSystem {
    fn open(&self, path: &Path, access: &Access) -> Result<Arc<dyn Storage>> {
        let opened = self.inner.open(path, access)?;
        let Some(storage) = self.inner.get(path).and_then(|storage| self.recorded(storage, path)) else {
            return Ok(opened);
        };
        let storage: Arc<dyn Storage> = Arc::new(storage);
        Ok(if access.write { storage } else { Arc::new(ReadOnlyStorage::new(storage)) })
    }

    fn create_new(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        let file = self.recorder.join(path, Vec::new());
        let storage = self.recorder.record_name(|| {
            self.inner.create_new(path)?;
            Ok((NameChange::Create { path: key(path), file }, self.inner.get(path).unwrap_or_default()))
        })?;
        self.identify(&storage, file);
        Ok(Arc::new(RecordingStorage::new(file, storage, Arc::clone(&self.recorder))))
    }

    /// Files in memory have no access rights, so that the creation is all that is recorded.
    fn create_new_like(&self, path: &Path, _model: &dyn Storage, _attributes: Attributes) -> Result<Arc<dyn Storage>> {
        self.create_new(path)
    }

    fn check_create_like(&self, directory: &Path, model: &dyn Storage) -> Result<()> {
        self.inner.check_create_like(directory, model)
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        let file = self.recorder.record_name(|| {
            self.inner.rename(from, to)?;
            let file = self.inner.get(to).and_then(|storage| self.number(&storage)).unwrap_or_default();
            Ok((NameChange::Rename { from: key(from), to: key(to), file }, file))
        })?;
        self.tear(file, to);
        Ok(())
    }

    fn unlink(&self, path: &Path) -> Result<()> {
        self.recorder.record_name(|| {
            self.inner.unlink(path)?;
            Ok((NameChange::Unlink(key(path)), ()))
        })
    }

    fn check_unlink(&self, path: &Path) -> Result<()> {
        self.inner.check_unlink(path)
    }

    fn sync_dir(&self, directory: &Path) -> Result<()> {
        self.inner.sync_dir(directory)?;
        self.recorder.record_sync(Synced::Directory(key(directory)));
        Ok(())
    }

    fn list(&self, directory: &Path) -> Result<Vec<PathBuf>> {
        self.inner.list(directory)
    }

    fn exists(&self, path: &Path) -> Result<bool> {
        self.inner.exists(path)
    }

    fn entry(&self, path: &Path) -> Result<EntryKind> {
        self.inner.entry(path)
    }

    fn is_memory_backed(&self, directory: &Path) -> Result<bool> {
        self.inner.is_memory_backed(directory)
    }

    fn resolve(&self, path: &Path) -> Result<Resolved> {
        self.inner.resolve(path)
    }
}
