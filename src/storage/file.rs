//! A file or block device.

use std::fs::{File, Metadata};
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::sys::{self, Kind};
use super::{Access, Error, FileId, LockMode, MAX_LEN, Result, Storage, beneath, lock};

/// What a write around the page cache is a multiple of, in place, length and memory. No medium's sectors are larger.
const DIRECT_UNIT: usize = 4096;

/// A regular file or block device with its image locks.
///
/// Reads and writes are positional and go through the kernel's page cache, but for [`Storage::write_bulk_at`], which goes
/// around it where the system allows; nothing is kept in this program. The locks
/// end when the last clone of an `Arc` around it is dropped.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    name: String,
    write: bool,
    fixed: bool,
    /// Set by a failed sync. What was written before it may be lost, and no later sync would tell.
    poisoned: AtomicBool,
    lock: Mutex<LockMode>,
    /// The same file, written around the page cache: opened by the first bulk write, none where that cannot be had.
    direct: OnceLock<Option<File>>,
}

impl FileStorage {
    /// Opens an existing file.
    ///
    /// Nothing is read before the locks of [`Access::lock`] are held, and only regular files and block devices are
    /// opened. Where [`Access::beneath`] is given, the path must lie in that directory; see there.
    ///
    /// # Errors
    /// As [`super::Names::open`].
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

    /// Creates a new file, which must not exist, with a writer's locks where the platform has them
    /// ([`FileStorage::lock_mode`] tells).
    ///
    /// # Errors
    /// As [`super::Names::create_new`].
    pub fn create_new(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let name = path.display().to_string();
        let file = sys::create_new(path).map_err(|error| Error::io(&name, "create it", 0, error))?;
        let lock = if sys::HAS_IMAGE_LOCKS { LockMode::Write } else { LockMode::None };
        let created = Self::new(file, name, &Access::write().with_lock(lock));
        if created.as_ref().is_err_and(|error| !matches!(error, Error::Busy { .. })) {
            // A file system without locks: leave no empty file behind. (Where somebody else holds it, it stays.)
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

    /// The locks that are held.
    #[must_use]
    pub fn lock_mode(&self) -> LockMode {
        *self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the locks that are held. Where the new ones cannot be had, the old ones were never let go.
    ///
    /// # Errors
    /// [`Error::Busy`], [`Error::Unsupported`] on a platform or file system without these locks, [`Error::Io`].
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

    /// Writes around the page cache as far as that goes, and returns how far.
    fn write_directly(&self, buf: &[u8], offset: u64) -> usize {
        let aligned = offset.is_multiple_of(DIRECT_UNIT as u64)
            && buf.len().is_multiple_of(DIRECT_UNIT)
            && buf.as_ptr().align_offset(DIRECT_UNIT) == 0;
        if !aligned {
            return 0;
        }
        let Some(direct) = self.direct.get_or_init(|| sys::reopen_direct(&self.file)) else { return 0 };
        let mut done = 0;
        while done < buf.len() {
            // What went wrong, the ordinary way finds out again and tells; after a part, it does the rest.
            match sys::retry(|| sys::write_some_at(direct, &buf[done..], offset + done as u64)) {
                Ok(written) if written > 0 && written.is_multiple_of(DIRECT_UNIT) => done += written,
                _ => break,
            }
        }
        done
    }

    /// What a range operation of the system came to.
    fn done(&self, what: &str, range: &Range<u64>, result: io::Result<()>) -> Result<()> {
        let len = range.end.saturating_sub(range.start);
        result.map_err(|error| match error.kind() {
            io::ErrorKind::Unsupported => Error::unsupported(&self.name, what),
            _ => Error::io(&self.name, format!("do {what} of {len} bytes at offset {}", range.start), len, error),
        })
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
    /// Gives the locks back, rather than leave that to the closing of the file: a child process that was just forked, and
    /// has not yet come to its `exec`, holds a copy of the descriptor and with it the locks.
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
        let mut rest = buf;
        let mut at = offset;
        while !rest.is_empty() {
            let most = usize::try_from(MAX_LEN.saturating_sub(at)).unwrap_or(usize::MAX).min(rest.len());
            let read =
                if most == 0 { Ok(0) } else { sys::retry(|| sys::read_some_at(&self.file, &mut rest[..most], at)) };
            match read {
                Ok(0) => {
                    rest.fill(0);
                    break;
                }
                Ok(read) => {
                    rest = &mut rest[read..];
                    at += read as u64;
                }
                Err(error) => {
                    return Err(Error::io(&self.name, format!("read {len} bytes at offset {offset}"), 0, error));
                }
            }
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.may_change()?;
        let len = buf.len() as u64;
        if offset.checked_add(len).is_none_or(|end| end > MAX_LEN) {
            return Err(Error::NoSpace { name: self.name.clone(), need: len });
        }
        let mut rest = buf;
        let mut at = offset;
        while !rest.is_empty() {
            let written = match sys::retry(|| sys::write_some_at(&self.file, rest, at)) {
                Ok(0) => Err(io::ErrorKind::WriteZero.into()),
                result => result,
            };
            let written = written
                .map_err(|error| Error::io(&self.name, format!("write {len} bytes at offset {offset}"), len, error))?;
            rest = &rest[written..];
            at += written as u64;
        }
        Ok(())
    }

    fn len(&self) -> Result<u64> {
        if self.fixed {
            // The metadata of a block device gives no length. Seeking moves a position that nobody uses.
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
        // The length is part of what is needed to read the data back, so this makes it durable as well; only times of
        // change and access are left out.
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

    fn zero_range(&self, range: Range<u64>) -> Result<()> {
        self.may_change()?;
        if range.is_empty() {
            return Ok(());
        }
        let mut result = sys::zero_range(&self.file, &range);
        if result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::Unsupported) && range.end <= self.len()? {
            // A hole reads as zeroes too; tmpfs and others have only this one.
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
        let mut done = 0;
        while done < len {
            match sys::copy_some(file, from.saturating_add(done), &self.file, to.saturating_add(done), len - done) {
                Ok(0) => break,
                Ok(copied) => done += copied,
                Err(error) => {
                    let range = to..to.saturating_add(len);
                    return self.done("copying in the kernel", &range, Err(error)).map(|()| done);
                }
            }
        }
        Ok(done)
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
            // A device has its length and no more; the file system of its node has nothing to say.
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
mod tests {
    use std::sync::Arc;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn new_file() -> (tempfile::TempDir, FileStorage) {
        new_file_in(&std::env::temp_dir())
    }

    fn new_file_in(parent: &Path) -> (tempfile::TempDir, FileStorage) {
        let directory = tempfile::tempdir_in(parent).unwrap();
        let file = FileStorage::create_new(directory.path().join("image")).unwrap();
        (directory, file)
    }

    fn read(storage: &dyn Storage, offset: u64, len: usize) -> Vec<u8> {
        let mut buf = vec![0xee; len];
        storage.read_at(&mut buf, offset).unwrap();
        buf
    }

    #[test]
    fn reads_what_was_written_and_zeroes_behind_the_end() {
        let (_directory, file) = new_file();
        assert!(file.is_empty().unwrap());
        file.write_at(b"hello", 1000).unwrap();
        assert_eq!(file.len().unwrap(), 1005);
        assert_eq!(read(&file, 998, 10), b"\0\0hello\0\0\0");
        assert_eq!(read(&file, 5000, 3), [0; 3]);
        assert_eq!(read(&file, u64::MAX - 1, 3), [0; 3]);
        file.read_at(&mut [], 7).unwrap();
        file.write_at(&[], 1 << 40).unwrap();
        file.sync().unwrap();
        assert!(matches!(file.write_at(b"x", u64::MAX), Err(Error::NoSpace { need: 1, .. })));
        assert!(matches!(file.write_at(b"xy", MAX_LEN - 1), Err(Error::NoSpace { need: 2, .. })));
    }

    #[test]
    fn length_is_set_both_ways() {
        let (_directory, file) = new_file();
        file.write_at(&[7; 100], 0).unwrap();
        file.set_len(10).unwrap();
        file.set_len(MIB).unwrap();
        assert_eq!(file.len().unwrap(), MIB);
        assert_eq!(read(&file, 8, 4), [7, 7, 0, 0]);
        assert!(matches!(file.set_len(u64::MAX), Err(Error::NoSpace { .. })));
        assert!(!file.is_fixed_size());
    }

    #[test]
    fn errors_tell_path_and_action_and_keep_their_source() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("none");
        let error = FileStorage::open(&path, &Access::read()).unwrap_err();
        assert_eq!(error.to_string(), format!("{}: cannot open it", path.display()));
        let Error::Io { source, .. } = &error else { panic!("{error:?}") };
        assert_eq!(source.kind(), io::ErrorKind::NotFound);
        assert_eq!(io::Error::from(error).kind(), io::ErrorKind::NotFound);

        FileStorage::create_new(&path).unwrap();
        let error = FileStorage::create_new(&path).unwrap_err();
        assert_eq!(io::Error::from(error).kind(), io::ErrorKind::AlreadyExists);
    }

    #[test]
    fn a_reader_changes_nothing() {
        let (directory, file) = new_file();
        file.write_at(b"data", 0).unwrap();
        drop(file);
        let file = FileStorage::open(directory.path().join("image"), &Access::read()).unwrap();
        assert!(file.is_read_only());
        let refused = [
            file.write_at(b"x", 0),
            file.set_len(0),
            file.zero_range(0..1),
            file.punch_range(0..1),
            file.allocate_range(0..1),
            file.copy_from(&file, 0, 0, 1).map(|_| ()),
        ];
        for result in refused {
            assert!(matches!(result, Err(Error::ReadOnly { .. })), "{result:?}");
        }
        file.sync().unwrap();
        assert_eq!(read(&file, 0, 4), b"data");
    }

    #[test]
    fn a_failed_sync_is_the_end() {
        let (_directory, file) = new_file();
        file.write_at(b"data", 0).unwrap();
        file.poisoned.store(true, Ordering::Release);
        for result in [file.sync(), file.write_at(b"x", 0), file.set_len(0), file.zero_range(0..1)] {
            assert!(matches!(result, Err(Error::Poisoned { .. })), "{result:?}");
        }
        assert_eq!(read(&file, 0, 4), b"data");
    }

    #[cfg(unix)]
    #[test]
    fn only_files_and_block_devices_are_opened() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let socket = directory.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        // None of these may be waited for.
        for path in [fifo.as_path(), &socket, directory.path(), Path::new("/dev/zero")] {
            for access in [Access::read(), Access::write()] {
                let error = FileStorage::open(path, &access).unwrap_err();
                assert!(matches!(error, Error::Refused { .. }), "{error:?}");
            }
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn blocks_are_reserved_zeroed_and_given_back() {
        // A disk's file system, as a rule, and one of memory, which can do less.
        for parent in [&std::env::temp_dir(), Path::new("/dev/shm")].into_iter().filter(|parent| parent.is_dir()) {
            serves_ranges(&new_file_in(parent).1);
        }
    }

    #[cfg(target_os = "linux")]
    fn serves_ranges(file: &FileStorage) {
        let mib = usize::try_from(MIB).unwrap();
        file.write_at(&vec![1; 4 * mib], 0).unwrap();
        file.sync().unwrap();
        let full = file.allocated_len().unwrap().unwrap();
        assert!(full >= 4 * MIB);

        // What the file system can do it must have done; what it cannot, it must say.
        match file.punch_range(MIB..2 * MIB) {
            Ok(()) => {
                assert_eq!(file.len().unwrap(), 4 * MIB);
                assert_eq!(read(file, MIB, mib), vec![0; mib]);
                assert!(file.allocated_len().unwrap().unwrap() <= full - MIB);
                assert_eq!(file.next_data(0).unwrap(), Some(0..MIB));
                assert_eq!(file.next_data(MIB + 5).unwrap(), Some(2 * MIB..4 * MIB));
                assert_eq!(file.next_data(3 * MIB).unwrap(), Some(3 * MIB..4 * MIB));
            }
            Err(error) => assert!(matches!(error, Error::Unsupported { .. }), "{error:?}"),
        }
        super::super::zero_range(file, 3 * MIB - 1..3 * MIB + 1).unwrap();
        assert_eq!(read(file, 3 * MIB - 2, 4), [1, 0, 0, 1]);
        super::super::zero_range(file, 4 * MIB - 1..4 * MIB + 1).unwrap();
        assert_eq!(file.len().unwrap(), 4 * MIB + 1);
        match file.allocate_range(5 * MIB..6 * MIB) {
            Ok(()) => assert_eq!(file.len().unwrap(), 6 * MIB),
            Err(error) => assert!(matches!(error, Error::Unsupported { .. }), "{error:?}"),
        }
        assert_eq!(file.next_data(u64::MAX).unwrap(), None);
        for result in [file.zero_range(7..7), file.punch_range(7..7), file.allocate_range(7..7)] {
            result.unwrap();
        }
        assert!(file.free_space().unwrap().is_some_and(|bytes| bytes > 0));
        // Reads go by position, wherever the search for data has left the file.
        assert_eq!(read(file, 0, 2), [1, 1]);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn copies_within_the_kernel() {
        let (directory, source) = new_file();
        let target = FileStorage::create_new(directory.path().join("target")).unwrap();
        let bytes: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
        source.write_at(&bytes, 0).unwrap();
        match target.copy_from(&source, 1000, 500, 1 << 40) {
            Ok(copied) => {
                assert_eq!(copied, 399_000);
                assert_eq!(target.len().unwrap(), 399_500);
                assert_eq!(read(&target, 500, 399_000), bytes[1000..]);
                assert_eq!(target.copy_from(&source, 400_000, 0, 10).unwrap(), 0);
            }
            Err(error) => assert!(matches!(error, Error::Unsupported { .. }), "{error:?}"),
        }
        // Ranges of one file that overlap: the kernel will not, so the caller copies by itself.
        assert!(matches!(source.copy_from(&source, 0, 100, 1000), Err(Error::Unsupported { .. })));
        let memory = super::super::MemoryStorage::with_bytes("memory", vec![1; 10]);
        assert!(matches!(target.copy_from(&memory, 0, 0, 10), Err(Error::Unsupported { .. })));
    }

    #[cfg(unix)]
    #[test]
    fn a_file_is_the_same_under_all_its_names() {
        let (directory, file) = new_file();
        let [link, other] = ["link", "other"].map(|name| directory.path().join(name));
        std::fs::hard_link(directory.path().join("image"), &link).unwrap();
        let unlocked = Access::read().with_lock(LockMode::None);
        let linked = FileStorage::open(&link, &unlocked).unwrap();
        let other = FileStorage::create_new(&other).unwrap();
        assert!(file.file_id().is_some());
        assert_eq!(file.file_id(), linked.file_id());
        assert_ne!(file.file_id(), other.file_id());
    }

    #[test]
    fn many_threads_share_one_handle() {
        let (_directory, file) = new_file();
        let file = Arc::new(file);
        std::thread::scope(|scope| {
            for thread in 0..8_u8 {
                let file = Arc::clone(&file);
                scope.spawn(move || {
                    for round in 0..64_u64 {
                        let at = (round * 8 + u64::from(thread)) * 512;
                        file.write_at(&[thread + 1; 512], at).unwrap();
                        assert_eq!(read(&*file, at, 512), [thread + 1; 512]);
                        file.next_data(at).unwrap();
                        if round % 16 == 0 {
                            file.sync().unwrap();
                        }
                    }
                });
            }
        });
        for sector in 0..512_u64 {
            let byte = u8::try_from(sector % 8 + 1).unwrap();
            assert_eq!(read(&*file, sector * 512, 512), [byte; 512], "sector {sector}");
        }
    }
}
