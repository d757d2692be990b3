//! Calls that all unixes have.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Component, Path};

use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, openat};
use nix::libc;
use nix::sys::stat::Mode;
use nix::unistd::{AccessFlags, faccessat, geteuid};

use super::Kind;
use crate::storage::{EntryKind, FileId, FileStamp};

/// Reads once. Returns 0 at the end.
pub(in crate::storage) fn read_some_at(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    file.read_at(buf, offset)
}

/// Writes once.
pub(in crate::storage) fn write_some_at(file: &File, buf: &[u8], offset: u64) -> io::Result<usize> {
    file.write_at(buf, offset)
}

/// The flags of every open: no inheritance by children, no wait for the other end of a FIFO, no
/// controlling terminal.
fn open_flags() -> OFlag {
    OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY
}

/// Opens an existing file without blocking.
pub(in crate::storage) fn open(path: &Path, write: bool) -> io::Result<File> {
    OpenOptions::new().read(true).write(write).custom_flags(open_flags().bits()).open(path)
}

/// Creates a file that must not exist, with QEMU's mode for new images.
pub(in crate::storage) fn create_new(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o644).open(path)
}

/// Creates a file that must not exist, for its owner only.
pub(in crate::storage) fn create_private(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
}

/// Checks if the effective user of this process may create entries in a directory.
pub(in crate::storage) fn check_writable(directory: &Path) -> io::Result<()> {
    let wanted = AccessFlags::W_OK | AccessFlags::X_OK;
    Ok(faccessat(AT_FDCWD, directory, wanted, AtFlags::AT_EACCESS)?)
}

/// The mode bit of a directory whose files only their owners remove.
const STICKY: u32 = 0o1000;

/// Checks if the effective user of this process may remove a directory entry.
pub(in crate::storage) fn check_removable(directory: &Path, path: &Path) -> io::Result<()> {
    check_writable(directory)?;
    let (parent, entry) = (std::fs::metadata(directory)?, std::fs::symlink_metadata(path)?);
    let user = geteuid().as_raw();
    // In a sticky directory only the owners of the file and of the directory remove a file.
    let sticky = parent.mode() & STICKY != 0;
    if sticky && user != parent.uid() && user != entry.uid() && !super::overrides_owners() {
        let reason = "its directory is sticky, and neither belongs to this user";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, reason));
    }
    super::check_changeable(directory)?;
    super::check_changeable(path)
}

/// Returns the stamp of a regular file.
pub(in crate::storage) fn stamp(metadata: &Metadata) -> Option<FileStamp> {
    let nanoseconds = |seconds: i64, rest: i64| seconds.saturating_mul(1_000_000_000).saturating_add(rest);
    (kind(metadata) == Kind::Regular).then(|| FileStamp {
        inode: metadata.ino(),
        len: metadata.len(),
        modified: nanoseconds(metadata.mtime(), metadata.mtime_nsec()),
        changed: nanoseconds(metadata.ctime(), metadata.ctime_nsec()),
    })
}

/// Returns the kind of a directory entry from metadata that follow no link.
pub(in crate::storage) fn entry(metadata: &Metadata) -> EntryKind {
    match kind(metadata) {
        Kind::Regular => EntryKind::File,
        Kind::BlockDevice => EntryKind::BlockDevice,
        Kind::Other(_) if metadata.file_type().is_symlink() => EntryKind::Link,
        Kind::Other(_) => EntryKind::Other,
    }
}

/// Returns the kind of an open file.
pub(in crate::storage) fn kind(metadata: &Metadata) -> Kind {
    let kind = metadata.file_type();
    if kind.is_file() {
        Kind::Regular
    } else if kind.is_block_device() {
        Kind::BlockDevice
    } else if kind.is_dir() {
        Kind::Other("a directory")
    } else if kind.is_fifo() {
        Kind::Other("a FIFO")
    } else if kind.is_char_device() {
        Kind::Other("a character device")
    } else {
        Kind::Other("neither a regular file nor a block device")
    }
}

/// Returns the kind of file that made an open fail, if that was the cause.
pub(in crate::storage) fn refused_kind(error: &io::Error) -> Option<&'static str> {
    match error.raw_os_error() {
        Some(libc::EISDIR) => Some("a directory"),
        Some(libc::ENXIO) => Some("a socket, or a device with nothing behind it"),
        _ => None,
    }
}

/// Returns the identity of a file: its file system and number.
///
/// A block device is identified by its device number, whichever of its nodes was opened. No file
/// has number 0, so that the device is not confused with a file of the file system on it.
#[expect(clippy::unnecessary_wraps, reason = "not every platform has it")]
pub(in crate::storage) fn file_id(metadata: &Metadata) -> Option<FileId> {
    Some(match kind(metadata) {
        Kind::BlockDevice => FileId { device: metadata.rdev(), inode: 0 },
        _ => FileId { device: metadata.dev(), inode: metadata.ino() },
    })
}

/// Returns the bytes that a regular file occupies.
#[expect(clippy::unnecessary_wraps, reason = "not every platform has it")]
pub(in crate::storage) fn allocated_len(metadata: &Metadata) -> Option<u64> {
    Some(metadata.blocks().saturating_mul(512))
}

/// Returns the bytes that an unprivileged program could still write to the file system.
pub(in crate::storage) fn free_space(file: &File) -> io::Result<Option<u64>> {
    let stat = nix::sys::statvfs::fstatvfs(file)?;
    // The types of these fields differ between the unixes.
    #[allow(clippy::useless_conversion, reason = "u32 on some unixes, u64 on others")]
    let (blocks, size) = (u64::from(stat.blocks_available()), u64::from(stat.fragment_size()));
    Ok(Some(blocks.saturating_mul(size)))
}

/// Makes the names in a directory durable.
pub(in crate::storage) fn sync_dir(directory: &Path) -> io::Result<()> {
    let flags = OFlag::O_CLOEXEC | OFlag::O_DIRECTORY;
    let opened = OpenOptions::new().read(true).custom_flags(flags.bits()).open(directory)?;
    match opened.sync_all() {
        // Some CIFS and FUSE file systems have no sync of a directory. Their names are as durable
        // as the server or the file system makes them, and no other call can improve that.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => Ok(()),
        done => done,
    }
}

/// Opens a directory to resolve names beneath it.
pub(in crate::storage) fn open_directory(directory: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_CLOEXEC | OFlag::O_DIRECTORY;
    Ok(OpenOptions::new().read(true).custom_flags(flags.bits()).open(directory)?.into())
}

/// Returns the error of a path that leads out of its directory.
fn escapes() -> io::Error {
    nix::errno::Errno::EXDEV.into()
}

/// Opens a path beneath a directory one component at a time and refuses symbolic links, for kernels
/// without `openat2`. No link is followed, so that `..` is the directory that was opened before.
pub(in crate::storage) fn walk_beneath(directory: &OwnedFd, rest: &Path, write: bool) -> io::Result<File> {
    let mode = if write { OFlag::O_RDWR } else { OFlag::O_RDONLY };
    let mut passed: Vec<OwnedFd> = Vec::new();
    let mut components = rest.components().peekable();
    while let Some(component) = components.next() {
        let here = passed.last().unwrap_or(directory).as_fd();
        match component {
            Component::CurDir => {}
            Component::ParentDir => {
                passed.pop().ok_or_else(escapes)?;
            }
            Component::Normal(name) if components.peek().is_none() => {
                let flags = open_flags() | OFlag::O_NOFOLLOW | mode;
                return Ok(File::from(openat(here, name, flags, Mode::empty())?));
            }
            Component::Normal(name) => {
                let flags = OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_DIRECTORY | OFlag::O_RDONLY;
                passed.push(openat(here, name, flags, Mode::empty())?);
            }
            Component::RootDir | Component::Prefix(_) => return Err(escapes()),
        }
    }
    Err(nix::errno::Errno::EISDIR.into())
}

/// Returns the reason for which an open beneath a directory was refused, if the error is such a
/// refusal.
pub(in crate::storage) fn refused_beneath(error: &io::Error) -> Option<&'static str> {
    match error.raw_os_error() {
        Some(libc::EXDEV) => Some("leads out of its directory"),
        // A link in the middle of a path gives ENOTDIR instead.
        Some(libc::ELOOP) => Some("leads through a symbolic link"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn walk_beneath_refuses_ways_out() {
        let root = tempfile::tempdir().unwrap();
        let top = root.path().join("top");
        std::fs::create_dir_all(top.join("a/b")).unwrap();
        std::fs::write(top.join("a/b/image"), b"x").unwrap();
        std::fs::write(root.path().join("outside"), b"x").unwrap();
        std::os::unix::fs::symlink("a", top.join("link")).unwrap();
        std::os::unix::fs::symlink("a/b/image", top.join("leaf")).unwrap();
        let directory = open_directory(&top).unwrap();
        let walk = |name: &str| walk_beneath(&directory, Path::new(name), false);

        for name in ["a/b/image", "./a/b/./image", "a/../a/b/image", "a/b/../../a/b/image"] {
            assert!(walk(name).is_ok(), "{name}");
        }
        for name in ["../outside", "a/../../outside", "/etc/passwd", "a/b/../../../outside"] {
            assert_eq!(refused_beneath(&walk(name).unwrap_err()), Some("leads out of its directory"), "{name}");
        }
        assert_eq!(walk("link/b/image").unwrap_err().kind(), io::ErrorKind::NotADirectory);
        assert!(refused_beneath(&walk("leaf").unwrap_err()).is_some());
        assert_eq!(walk("a/b/none").unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(walk("").is_err());
        assert!(walk("a/..").is_err());
    }
}
