//! QEMU's image locks: open-file-description byte locks, as its `file-posix` driver takes them.
//!
//! Every lock is shared and says one thing: byte 100 + i "I use permission i", byte 200 + i "I do not share permission
//! i". A program first takes all of its own bytes, then asks whether another open file holds the opposite byte of any:
//! so of two that come at once, at least one sees the other. A program that is refused must not have read anything.
//!
//! The locks are advisory: they bind QEMU (unless told `locking=off`), its tools and this crate. They end with the open
//! file, also where a process is killed.

use std::fs::File;
use std::io;

use super::{Error, Result, sys};

/// One of QEMU's permissions; byte 100 + i says "I use it", byte 200 + i says "I do not share it".
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
    /// QEMU's name for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::ConsistentRead => "consistent read",
            Self::Write => "write",
            Self::WriteUnchanged => "write unchanged",
            Self::Resize => "resize",
        }
    }

    /// The byte that says "I use it".
    #[must_use]
    pub const fn use_byte(self) -> u64 {
        100 + self as u64
    }

    /// The byte that says "I do not share it".
    #[must_use]
    pub const fn unshare_byte(self) -> u64 {
        200 + self as u64
    }
}

/// Which locks a handle takes before it reads anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum LockMode {
    /// None, as with `qemu-img -U` or `locking=off`: for looking at an image whose owner is gone.
    None,
    /// What QEMU takes on a read-only image and on every backing file: uses consistent reads, shares no writes.
    #[default]
    Read,
    /// What QEMU takes on a disk in use: uses consistent reads, writes and resize, shares no writes.
    Write,
}

impl LockMode {
    /// The permissions that a holder of this mode uses.
    #[must_use]
    pub const fn used(self) -> &'static [Permission] {
        match self {
            Self::None => &[],
            Self::Read => &[Permission::ConsistentRead],
            Self::Write => &[Permission::ConsistentRead, Permission::Write, Permission::Resize],
        }
    }

    /// The permissions that a holder of this mode leaves to nobody else.
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

/// Goes from the locks of `held` to those of `wanted`, or fails with those of `held` still in place.
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
        // None of QEMU's own locks does this, as they are all shared: somebody else's exclusive lock.
        io::ErrorKind::WouldBlock => Error::Busy { name: name.to_owned(), held: format!("failed to lock byte {byte}") },
        _ => Error::io(name, format!("lock byte {byte}"), 0, error),
    }
}

fn take(file: &File, name: &str, bytes: &[u64]) -> Result<()> {
    bytes.iter().try_for_each(|byte| sys::lock_byte(file, *byte).map_err(|error| failed(name, *byte, error)))
}

/// To unlock cannot fail on a file where a lock was taken; if it did, the lock would end with the handle.
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
