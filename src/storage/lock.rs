//! QEMU's image locks: open-file-description byte locks, as its `file-posix` driver takes them.
//!
//! Every lock is shared. A lock on byte 100 + i means that the holder uses permission i, on byte
//! 200 + i that it does not share permission i. A program first locks all of its own bytes, then
//! checks if another open file holds the opposite byte of any of them: of two programs that start
//! at once, at least one detects the other. A refused program must not have read anything.
//!
//! The locks are advisory: they bind QEMU (unless told `locking=off`), its tools and this crate.
//! They end with the open file, even if the process is killed.

use std::fs::File;
use std::io;

use super::{Error, Result, sys};

/// A permission of QEMU's block layer. A lock on byte 100 + i means that the holder uses permission
/// i, on byte 200 + i that it does not share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Permission {
    /// Consistent reads.
    ConsistentRead = 0,
    /// Writes that change content.
    Write = 1,
    /// Writes that do not change content.
    WriteUnchanged = 2,
    /// Changes of length.
    Resize = 3,
}

impl Permission {
    /// Returns QEMU's name of the permission.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::ConsistentRead => "consistent read",
            Self::Write => "write",
            Self::WriteUnchanged => "write unchanged",
            Self::Resize => "resize",
        }
    }

    /// Returns the byte whose lock means that the holder uses the permission.
    #[must_use]
    pub const fn use_byte(self) -> u64 {
        100 + self as u64
    }

    /// Returns the byte whose lock means that the holder does not share the permission.
    #[must_use]
    pub const fn unshare_byte(self) -> u64 {
        200 + self as u64
    }
}

/// The locks that a handle takes before it reads anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum LockMode {
    /// No locks, as with `qemu-img -U` or `locking=off`.
    None,
    /// The locks of QEMU on a read-only image and on every backing file: uses consistent reads,
    /// shares no writes.
    #[default]
    Read,
    /// The locks of QEMU on a disk in use: uses consistent reads, writes and resize, shares no
    /// writes.
    Write,
}

impl LockMode {
    /// Returns the permissions that a holder of this mode uses.
    #[must_use]
    pub const fn used(self) -> &'static [Permission] {
        match self {
            Self::None => &[],
            Self::Read => &[Permission::ConsistentRead],
            Self::Write => &[Permission::ConsistentRead, Permission::Write, Permission::Resize],
        }
    }

    /// Returns the permissions that a holder of this mode does not share.
    #[must_use]
    pub const fn unshared(self) -> &'static [Permission] {
        match self {
            Self::None => &[],
            Self::Read | Self::Write => &[Permission::Write, Permission::Resize],
        }
    }

    /// The bytes that a holder of this mode locks.
    fn bytes(self) -> impl Iterator<Item = u64> {
        let used = self.used().iter().map(|permission| permission.use_byte());
        used.chain(self.unshared().iter().map(|permission| permission.unshare_byte()))
    }

    /// The bytes that this mode locks and another does not.
    fn bytes_beyond(self, other: Self) -> Vec<u64> {
        self.bytes().filter(|byte| other.bytes().all(|held| held != *byte)).collect()
    }
}

/// Changes the locks from `held` to `wanted`. On failure the locks of `held` are kept.
pub(super) fn change(file: &File, name: &str, held: LockMode, wanted: LockMode) -> Result<()> {
    let more = wanted.bytes_beyond(held);
    if let Err(error) = take(file, name, &more).and_then(|()| refuse_conflicts(file, name, wanted)) {
        release(file, &more);
        return Err(error);
    }
    release(file, &held.bytes_beyond(wanted));
    Ok(())
}

fn failed(name: &str, byte: u64, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::Unsupported => Error::unsupported(name, "QEMU's image locking"),
        // An exclusive lock of another program. QEMU's own locks are all shared.
        io::ErrorKind::WouldBlock => Error::Busy { name: name.to_owned(), held: format!("failed to lock byte {byte}") },
        _ => Error::io(name, format!("lock byte {byte}"), 0, error),
    }
}

fn take(file: &File, name: &str, bytes: &[u64]) -> Result<()> {
    bytes.iter().try_for_each(|byte| sys::lock_byte(file, *byte).map_err(|error| failed(name, *byte, error)))
}

/// Releases locks. This cannot fail on a file where a lock was taken. If it did, the lock would end
/// with the handle.
fn release(file: &File, bytes: &[u64]) {
    for byte in bytes {
        let _ = sys::unlock_byte(file, *byte);
    }
}

fn refuse_conflicts(file: &File, name: &str, wanted: LockMode) -> Result<()> {
    let is_locked = |byte| sys::byte_is_locked(file, byte).map_err(|error| failed(name, byte, error));
    for permission in wanted.used() {
        if is_locked(permission.unshare_byte())? {
            let held = format!("failed to get \"{}\" lock", permission.name());
            return Err(Error::Busy { name: name.to_owned(), held });
        }
    }
    for permission in wanted.unshared() {
        if is_locked(permission.use_byte())? {
            let held = format!("failed to get shared \"{}\" lock", permission.name());
            return Err(Error::Busy { name: name.to_owned(), held });
        }
    }
    Ok(())
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use std::path::PathBuf;

    use super::super::{Access, FileStorage, Storage};
    use super::*;

    fn image() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        std::fs::write(&path, [0; 512]).unwrap();
        (directory, path)
    }

    fn open(path: &PathBuf, lock: LockMode) -> Result<FileStorage> {
        FileStorage::open(path, &Access::write().with_lock(lock))
    }

    fn held(result: Result<impl std::fmt::Debug>) -> String {
        match result {
            Err(Error::Busy { held, .. }) => held,
            other => panic!("not busy: {other:?}"),
        }
    }

    #[test]
    fn lock_bytes_are_those_of_qemu() {
        let bytes = |mode: LockMode| mode.bytes().collect::<Vec<_>>();
        assert!(bytes(LockMode::None).is_empty());
        assert_eq!(bytes(LockMode::Read), [100, 201, 203]);
        assert_eq!(bytes(LockMode::Write), [100, 101, 103, 201, 203]);
        assert_eq!(LockMode::Write.bytes_beyond(LockMode::Read), [101, 103]);
        assert!(LockMode::Read.bytes_beyond(LockMode::Write).is_empty());
        assert_eq!(Permission::WriteUnchanged.use_byte(), 102);
        assert_eq!(Permission::WriteUnchanged.name(), "write unchanged");
    }

    #[test]
    fn locks_conflict_within_one_process() {
        let (_directory, path) = image();
        let writer = open(&path, LockMode::Write).unwrap();
        assert_eq!(held(open(&path, LockMode::Write)), "failed to get \"write\" lock");
        assert_eq!(held(open(&path, LockMode::Read)), "failed to get shared \"write\" lock");
        let looker = open(&path, LockMode::None).unwrap();
        drop(writer);
        let readers = [open(&path, LockMode::Read).unwrap(), open(&path, LockMode::Read).unwrap()];
        assert_eq!(held(open(&path, LockMode::Write)), "failed to get \"write\" lock");
        drop(readers);
        // A failed attempt has left nothing behind.
        open(&path, LockMode::Write).unwrap();
        assert_eq!(looker.lock_mode(), LockMode::None);
    }

    #[test]
    fn set_lock_changes_all_or_nothing() {
        let (_directory, path) = image();
        let one = open(&path, LockMode::Read).unwrap();
        let other = open(&path, LockMode::Read).unwrap();
        assert_eq!(held(one.set_lock(LockMode::Write)), "failed to get \"write\" lock");
        assert_eq!(one.lock_mode(), LockMode::Read);
        // Nothing of the attempt is left: another reader still gets in, and another writer still
        // does not.
        let third = open(&path, LockMode::Read).unwrap();
        drop((other, third));
        assert!(open(&path, LockMode::Write).is_err());

        Storage::set_lock(&one, LockMode::Write).unwrap();
        one.set_lock(LockMode::Write).unwrap();
        assert_eq!(held(open(&path, LockMode::Read)), "failed to get shared \"write\" lock");
        one.set_lock(LockMode::Read).unwrap();
        drop(open(&path, LockMode::Read).unwrap());
        one.set_lock(LockMode::None).unwrap();
        open(&path, LockMode::Write).unwrap();
    }

    #[test]
    fn foreign_exclusive_lock_is_busy() {
        let (_directory, path) = image();
        let foreign = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let lock = nix::libc::flock { l_type: 1, l_whence: 0, l_start: 0, l_len: 0, l_pid: 0 };
        nix::fcntl::fcntl(&foreign, nix::fcntl::FcntlArg::F_OFD_SETLK(&lock)).unwrap();
        assert_eq!(held(open(&path, LockMode::Read)), "failed to lock byte 100");
        drop(foreign);
        open(&path, LockMode::Read).unwrap();
    }

    #[test]
    fn new_file_has_writer_locks() {
        let (directory, _path) = image();
        let path = directory.path().join("new");
        let file = FileStorage::create_new(&path).unwrap();
        assert_eq!(file.lock_mode(), LockMode::Write);
        assert!(open(&path, LockMode::Read).is_err());
    }

    #[test]
    fn concurrent_writers_are_at_most_one() {
        let (_directory, path) = image();
        for _ in 0..50 {
            let barrier = std::sync::Barrier::new(4);
            let got: Vec<_> = std::thread::scope(|scope| {
                let attempt = || {
                    barrier.wait();
                    open(&path, LockMode::Write)
                };
                let threads: Vec<_> = (0..4).map(|_| scope.spawn(attempt)).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert!(got.iter().filter(|result| result.is_ok()).count() <= 1, "{got:?}");
        }
    }
}
