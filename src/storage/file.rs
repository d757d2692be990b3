//! A file or block device.

use std::fs::{File, Metadata};
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::sys::{self, Kind};
use super::{Access, Error, FileId, FileStamp, LockMode, MAX_LEN, Result, Storage, beneath, lock, whole};

/// The unit of writes around the page cache, in bytes: offset, length and memory address are
/// multiples of it. No medium has larger sectors.
const DIRECT_UNIT: usize = 4096;

/// A regular file or block device with its image locks.
///
/// Reads and writes are positional and go through the kernel's page cache, except for
/// [`Storage::write_bulk_at`], which bypasses it where the system allows. Nothing is cached in this
/// process. The locks end when the storage is dropped.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    name: String,
    write: bool,
    fixed: bool,
    /// Set by a failed sync. Earlier writes may be lost, and no later sync would report it.
    poisoned: AtomicBool,
    lock: Mutex<LockMode>,
    /// The same file, opened to bypass the page cache by the first bulk write. `None` where that is
    /// not possible.
    direct: OnceLock<Option<File>>,
}

impl FileStorage {
    /// Opens an existing file.
    ///
    /// Nothing is read before the locks of [`Access::lock`] are held. Only regular files and block
    /// devices are opened. If [`Access::beneath`] is set, the path must be in that directory.
    ///
    /// # Errors
    /// As [`super::FileSystem::open`].
    pub fn open(path: impl AsRef<Path>, access: &Access) -> Result<Self> {
        let path = path.as_ref();
        let name = path.display().to_string();
        let opened = match &access.beneath {
            Some(directory) => beneath::open(path, directory, access.write)?,
            None => match sys::open(path, access.write) {
                Ok(file) => file,
                Err(error) => return Err(cannot_open(name, error)),
            },
        };
        Self::new(opened, name, access)
    }

    /// Creates a new file, which must not exist. It has a writer's locks where the platform
    /// supports them, see [`FileStorage::lock_mode`].
    ///
    /// # Errors
    /// As [`super::FileSystem::create_new`].
    pub fn create_new(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::take_new(path, sys::create_new(path))
    }

    /// Creates a new file as [`FileStorage::create_new`] does, with mode 0600.
    #[cfg(unix)]
    pub(super) fn create_private(path: &Path) -> Result<Self> {
        Self::take_new(path, sys::create_private(path))
    }

    /// Locks a file that was just created.
    fn take_new(path: &Path, created: io::Result<File>) -> Result<Self> {
        let name = path.display().to_string();
        let file = created.map_err(|error| Error::io(&name, "create it", 0, error))?;
        let lock = if sys::HAS_IMAGE_LOCKS { LockMode::Write } else { LockMode::None };
        let created = Self::new(file, name, &Access::write().with_lock(lock));
        if created.as_ref().is_err_and(|error| !matches!(error, Error::Busy { .. })) {
            // A file system without locks: leave no empty file behind. A file that another program
            // holds stays.
            let _ = std::fs::remove_file(path);
        }
        created
    }

    fn new(file: File, name: String, access: &Access) -> Result<Self> {
        let metadata = file.metadata().map_err(|error| Error::io(&name, "look at it", 0, error))?;
        let fixed = match sys::kind(&metadata) {
            Kind::Regular => false,
            Kind::BlockDevice => true,
            Kind::Other(what) => return Err(not_a_file(name, what)),
        };
        lock::change(&file, &name, LockMode::None, access.lock)?;
        Ok(Self {
            file,
            name,
            write: access.write,
            fixed,
            poisoned: AtomicBool::new(false),
            lock: Mutex::new(access.lock),
            direct: OnceLock::new(),
        })
    }

    /// Returns the locks that are held.
    #[must_use]
    pub fn lock_mode(&self) -> LockMode {
        *self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the locks that are held. If the new locks cannot be taken, the old ones are kept
    /// throughout.
    ///
    /// # Errors
    /// - [`Error::Busy`]: another program's locks forbid it.
    /// - [`Error::Unsupported`]: the platform or file system has no such locks.
    /// - [`Error::Io`]: the operating system returned an error.
    pub fn set_lock(&self, wanted: LockMode) -> Result<()> {
        let mut held = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        lock::change(&self.file, &self.name, *held, wanted)?;
        *held = wanted;
        Ok(())
    }

    fn metadata(&self) -> Result<Metadata> {
        self.file.metadata().map_err(|error| Error::io(&self.name, "look at it", 0, error))
    }

    fn may_change(&self) -> Result<()> {
        if !self.write {
            return Err(Error::ReadOnly { name: self.name.clone() });
        }
        if self.poisoned.load(Ordering::Acquire) {
            return Err(Error::Poisoned { name: self.name.clone() });
        }
        Ok(())
    }

    /// Writes a beginning of `buf` around the page cache. Returns its length, which is 0 where that
    /// is not possible.
    fn write_directly(&self, buf: &[u8], offset: u64) -> usize {
        let aligned = offset.is_multiple_of(DIRECT_UNIT as u64)
            && buf.len().is_multiple_of(DIRECT_UNIT)
            && buf.as_ptr().align_offset(DIRECT_UNIT) == 0;
        if !aligned {
            return 0;
        }
        let Some(direct) = self.direct.get_or_init(|| sys::reopen_direct(&self.file)) else { return 0 };
        // The caller writes the rest through the page cache, and reports an error that occurs
        // again.
        whole::write_units(buf, offset, DIRECT_UNIT, |part, at| sys::write_some_at(direct, part, at))
    }

    /// Converts the error of a range operation.
    fn range_failed(&self, what: &str, range: &Range<u64>, error: io::Error) -> Error {
        let len = range.end.saturating_sub(range.start);
        match error.kind() {
            io::ErrorKind::Unsupported => Error::unsupported(&self.name, what),
            _ => Error::io(&self.name, format!("do {what} of {len} bytes at offset {}", range.start), len, error),
        }
    }

    /// Converts the result of a range operation.
    fn done(&self, what: &str, range: &Range<u64>, result: io::Result<()>) -> Result<()> {
        result.map_err(|error| self.range_failed(what, range, error))
    }
}

pub(super) fn not_a_file(name: String, what: &str) -> Error {
    Error::Refused { name, why: format!("it is {what}, not a regular file or block device") }
}

pub(super) fn cannot_open(name: String, error: io::Error) -> Error {
    match sys::refused_kind(&error) {
        Some(what) => not_a_file(name, what),
        None => Error::Io { name, action: "open it".to_owned(), source: error },
    }
}

impl Drop for FileStorage {
    /// Releases the locks explicitly. Closing the file may not release them: a forked child process
    /// holds a copy of the descriptor, and with it the locks, until its `exec`.
    fn drop(&mut self) {
        let _ = self.set_lock(LockMode::None);
    }
}

impl Storage for FileStorage {
    fn name(&self) -> &str {
        &self.name
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let len = buf.len();
        whole::read(buf, offset, |part, at| sys::read_some_at(&self.file, part, at))
            .map_err(|error| Error::io(&self.name, format!("read {len} bytes at offset {offset}"), 0, error))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.may_change()?;
        let len = buf.len() as u64;
        if offset.checked_add(len).is_none_or(|end| end > MAX_LEN) {
            return Err(Error::NoSpace { name: self.name.clone(), need: len });
        }
        whole::write(buf, offset, |part, at| sys::write_some_at(&self.file, part, at))
            .map_err(|error| Error::io(&self.name, format!("write {len} bytes at offset {offset}"), len, error))
    }

    fn len(&self) -> Result<u64> {
        if self.fixed {
            // The metadata of a block device has no length. The file position is not used
            // elsewhere.
            (&self.file)
                .seek(SeekFrom::End(0))
                .map_err(|error| Error::io(&self.name, "find the end of the device", 0, error))
        } else {
            Ok(self.metadata()?.len())
        }
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.may_change()?;
        if self.fixed {
            return if self.len()? == len {
                Ok(())
            } else {
                Err(Error::unsupported(&self.name, "changing the length of a block device"))
            };
        }
        if len > MAX_LEN {
            return Err(Error::NoSpace { name: self.name.clone(), need: len });
        }
        sys::retry(|| self.file.set_len(len))
            .map_err(|error| Error::io(&self.name, format!("set its length to {len}"), len, error))
    }

    fn sync(&self) -> Result<()> {
        if self.poisoned.load(Ordering::Acquire) {
            return Err(Error::Poisoned { name: self.name.clone() });
        }
        // This includes the length, which is needed to read the data back, but not the times of
        // change and access.
        self.file.sync_data().map_err(|error| {
            self.poisoned.store(true, Ordering::Release);
            Error::io(&self.name, "make it durable", 0, error)
        })
    }

    fn is_read_only(&self) -> bool {
        !self.write
    }

    fn is_fixed_size(&self) -> bool {
        self.fixed
    }

    fn file_id(&self) -> Option<FileId> {
        self.metadata().ok().and_then(|metadata| sys::file_id(&metadata))
    }

    fn stamp(&self) -> Result<Option<FileStamp>> {
        Ok(sys::stamp(&self.metadata()?))
    }

    fn zero_range(&self, range: Range<u64>) -> Result<()> {
        self.may_change()?;
        if range.is_empty() {
            return Ok(());
        }
        let mut result = sys::zero_range(&self.file, &range);
        if result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::Unsupported) && range.end <= self.len()? {
            // A hole reads as zeroes too. tmpfs and others support only this call.
            result = sys::punch_range(&self.file, &range);
        }
        self.done("zeroing a range", &range, result)
    }

    fn punch_range(&self, range: Range<u64>) -> Result<()> {
        self.may_change()?;
        if range.is_empty() {
            return Ok(());
        }
        self.done("punching a hole", &range, sys::punch_range(&self.file, &range))
    }

    fn allocate_range(&self, range: Range<u64>) -> Result<()> {
        self.may_change()?;
        if range.is_empty() {
            return Ok(());
        }
        self.done("reserving blocks", &range, sys::allocate_range(&self.file, &range))
    }

    fn copy_from(&self, source: &dyn Storage, from: u64, to: u64, len: u64) -> Result<u64> {
        self.may_change()?;
        let Some(file) = source.as_file() else {
            return Err(Error::unsupported(&self.name, "copying in the kernel"));
        };
        let copied = whole::copy(len, |done, left| {
            sys::copy_some(file, from.saturating_add(done), &self.file, to.saturating_add(done), left)
        });
        copied.map_err(|error| self.range_failed("copying in the kernel", &(to..to.saturating_add(len)), error))
    }

    fn prefers_copy_from(&self, source: &dyn Storage) -> bool {
        source.as_file().is_some_and(|source| sys::copies_cheaply(source, &self.file))
    }

    fn write_bulk_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.may_change()?;
        let within = offset.checked_add(buf.len() as u64).is_some_and(|end| end <= MAX_LEN);
        let done = if within { self.write_directly(buf, offset) } else { 0 };
        if done == buf.len() { Ok(()) } else { self.write_at(&buf[done..], offset + done as u64) }
    }

    fn will_not_need(&self, range: Range<u64>) {
        sys::will_not_need(&self.file, &range);
    }

    fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>> {
        let len = self.len()?;
        if self.fixed {
            return Ok((offset < len).then_some(offset..len));
        }
        sys::next_data(&self.file, offset, len)
            .map_err(|error| Error::io(&self.name, format!("look for data behind offset {offset}"), 0, error))
    }

    fn allocated_len(&self) -> Result<Option<u64>> {
        if self.fixed { Ok(None) } else { Ok(sys::allocated_len(&self.metadata()?)) }
    }

    fn free_space(&self) -> Result<Option<u64>> {
        if self.fixed {
            // A device cannot grow. The free space of its node's file system does not matter.
            return Ok(None);
        }
        sys::free_space(&self.file).map_err(|error| Error::io(&self.name, "ask for the free space", 0, error))
    }

    fn set_lock(&self, wanted: LockMode) -> Result<()> {
        self.set_lock(wanted)
    }

    fn as_file(&self) -> Option<&File> {
        Some(&self.file)
    }
}

#[cfg(test)]
mod tests;
