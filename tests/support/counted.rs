//! A file system in memory that counts calls, and bytes read and written. The catalogue, the
//! journal and the lock (`*.json*`) are counted apart from the images. Opens, listings and reads are
//! counted by file too.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use qcow2_chain::storage::{
    Access, Attributes, EntryKind, FileSystem, ListedFile, MemoryFileSystem, Resolved, Result, Storage,
};

/// The unit of [`Traffic::reads`], in bytes.
pub const SECTOR: u64 = 512;

/// Calls and bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    pub calls: u64,
    pub bytes: u64,
}

/// The work on the images, and on the catalogue and the files beside it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Passed {
    pub images: Work,
    pub records: Work,
}

/// The calls by path.
#[derive(Clone, Debug, Default)]
pub struct Traffic {
    /// The number of opens of each file.
    pub opens: BTreeMap<PathBuf, u64>,
    /// The number of listings of each directory.
    pub lists: BTreeMap<PathBuf, u64>,
    /// The number of reads of each sector of each file.
    pub reads: BTreeMap<(PathBuf, u64), u64>,
}

/// A file system that counts.
#[derive(Debug, Default)]
pub struct CountedFileSystem {
    /// The files.
    pub inner: MemoryFileSystem,
    passed: Arc<Mutex<Passed>>,
    traffic: Arc<Mutex<Traffic>>,
}

impl CountedFileSystem {
    /// Returns the work since the last call.
    pub fn take(&self) -> Passed {
        std::mem::take(&mut self.passed.lock().unwrap())
    }

    /// Returns the calls by path since the last call.
    pub fn take_traffic(&self) -> Traffic {
        std::mem::take(&mut self.traffic.lock().unwrap())
    }

    fn count(&self, path: &Path) {
        note(&self.passed, is_record(&path.to_string_lossy()), 0);
    }

    fn counted(&self, path: &Path, inner: Arc<dyn Storage>) -> Arc<dyn Storage> {
        let record = is_record(&path.to_string_lossy());
        let (passed, traffic) = (Arc::clone(&self.passed), Arc::clone(&self.traffic));
        Arc::new(Counted { inner, record, path: path.to_owned(), passed, traffic })
    }
}

fn is_record(path: &str) -> bool {
    path.contains(".json")
}

fn note(passed: &Mutex<Passed>, record: bool, bytes: usize) {
    let mut passed = passed.lock().unwrap();
    let work = if record { &mut passed.records } else { &mut passed.images };
    work.calls += 1;
    work.bytes += bytes as u64;
}

impl FileSystem for CountedFileSystem {
    fn open(&self, path: &Path, access: &Access) -> Result<Arc<dyn Storage>> {
        self.count(path);
        *self.traffic.lock().unwrap().opens.entry(path.to_owned()).or_default() += 1;
        Ok(self.counted(path, self.inner.open(path, access)?))
    }
    fn create_new(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        self.count(path);
        Ok(self.counted(path, self.inner.create_new(path)?))
    }
    fn create_new_like(&self, path: &Path, model: &dyn Storage, attributes: Attributes) -> Result<Arc<dyn Storage>> {
        self.count(path);
        Ok(self.counted(path, self.inner.create_new_like(path, model, attributes)?))
    }
    fn check_create_like(&self, directory: &Path, model: &dyn Storage) -> Result<()> {
        self.count(directory);
        self.inner.check_create_like(directory, model)
    }
    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.count(to);
        self.inner.rename(from, to)
    }
    fn unlink(&self, path: &Path) -> Result<()> {
        self.count(path);
        self.inner.unlink(path)
    }
    fn check_unlink(&self, path: &Path) -> Result<()> {
        self.count(path);
        self.inner.check_unlink(path)
    }
    fn sync_dir(&self, directory: &Path) -> Result<()> {
        self.count(directory);
        self.inner.sync_dir(directory)
    }
    fn list(&self, directory: &Path) -> Result<Vec<PathBuf>> {
        self.count(directory);
        *self.traffic.lock().unwrap().lists.entry(directory.to_owned()).or_default() += 1;
        self.inner.list(directory)
    }
    fn list_openable(&self, directory: &Path) -> Result<Vec<ListedFile>> {
        self.count(directory);
        *self.traffic.lock().unwrap().lists.entry(directory.to_owned()).or_default() += 1;
        self.inner.list_openable(directory)
    }
    fn exists(&self, path: &Path) -> Result<bool> {
        self.count(path);
        self.inner.exists(path)
    }
    fn entry(&self, path: &Path) -> Result<EntryKind> {
        self.count(path);
        self.inner.entry(path)
    }
    fn is_memory_backed(&self, directory: &Path) -> Result<bool> {
        self.count(directory);
        self.inner.is_memory_backed(directory)
    }
    fn resolve(&self, path: &Path) -> Result<Resolved> {
        self.count(path);
        self.inner.resolve(path)
    }
}

#[derive(Debug)]
struct Counted {
    inner: Arc<dyn Storage>,
    record: bool,
    path: PathBuf,
    passed: Arc<Mutex<Passed>>,
    traffic: Arc<Mutex<Traffic>>,
}

impl Counted {
    fn note(&self, bytes: usize) {
        note(&self.passed, self.record, bytes);
    }
}

impl Storage for Counted {
    fn name(&self) -> &str {
        self.inner.name()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.note(buf.len());
        let sectors = offset / SECTOR..(offset + buf.len() as u64).div_ceil(SECTOR);
        let mut traffic = self.traffic.lock().unwrap();
        for sector in sectors {
            *traffic.reads.entry((self.path.clone(), sector)).or_default() += 1;
        }
        drop(traffic);
        self.inner.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.note(buf.len());
        self.inner.write_at(buf, offset)
    }
    fn len(&self) -> Result<u64> {
        self.note(0);
        self.inner.len()
    }
    fn set_len(&self, len: u64) -> Result<()> {
        self.note(0);
        self.inner.set_len(len)
    }
    fn sync(&self) -> Result<()> {
        self.note(0);
        self.inner.sync()
    }
    fn zero_range(&self, range: Range<u64>) -> Result<()> {
        self.note(0);
        self.inner.zero_range(range)
    }
    fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>> {
        self.note(0);
        self.inner.next_data(offset)
    }
    fn allocated_len(&self) -> Result<Option<u64>> {
        self.note(0);
        self.inner.allocated_len()
    }
    fn free_space(&self) -> Result<Option<u64>> {
        self.note(0);
        self.inner.free_space()
    }
    fn file_id(&self) -> Option<qcow2_chain::storage::FileId> {
        self.inner.file_id()
    }
    fn stamp(&self) -> Result<Option<qcow2_chain::storage::FileStamp>> {
        self.inner.stamp()
    }
}
