//! The calls that Linux alone has.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{
    FallocateFlags, FcntlArg, OFlag, OpenHow, PosixFadviseAdvice, ResolveFlag, copy_file_range, fallocate, fcntl,
    openat2, posix_fadvise,
};
use nix::libc;
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::statfs::fstatfs;
use nix::unistd::{Whence, lseek64};

use super::{retry, walk_beneath};

/// Whether QEMU's image locks exist here.
pub(in crate::storage) const HAS_IMAGE_LOCKS: bool = true;

/// An error whose kind says "cannot be done here" for all the ways in which a kernel or a file system says so.
fn or_unsupported(errno: Errno) -> io::Error {
    match errno {
        Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL | Errno::ENOTTY | Errno::ENODEV | Errno::EXDEV => {
            io::Error::new(io::ErrorKind::Unsupported, errno)
        }
        _ => errno.into(),
    }
}

/// A file offset as a call takes it: on 32-bit systems some calls take 32 bits, and cannot serve what lies behind.
fn offset<T: TryFrom<u64>>(n: u64) -> io::Result<T> {
    T::try_from(n).map_err(|_| io::Error::new(io::ErrorKind::Unsupported, Errno::EOVERFLOW))
}

fn allocate(file: &File, flags: FallocateFlags, range: &Range<u64>) -> io::Result<()> {
    let (start, len) = (offset(range.start)?, offset(range.end - range.start)?);
    retry(|| fallocate(file, flags, start, len).map_err(or_unsupported))
}

/// Makes a range read as zeroes, keeping its blocks; the file grows where it ends before.
pub(in crate::storage) fn zero_range(file: &File, range: &Range<u64>) -> io::Result<()> {
    allocate(file, FallocateFlags::FALLOC_FL_ZERO_RANGE, range)
}

/// Gives a range's blocks back; the length stays.
pub(in crate::storage) fn punch_range(file: &File, range: &Range<u64>) -> io::Result<()> {
    allocate(file, FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE, range)
}

/// Reserves blocks; the file grows where it ends before.
pub(in crate::storage) fn allocate_range(file: &File, range: &Range<u64>) -> io::Result<()> {
    allocate(file, FallocateFlags::empty(), range)
}

/// Copies once within the kernel; 0 where the source ends.
pub(in crate::storage) fn copy_some(source: &File, from: u64, target: &File, to: u64, len: u64) -> io::Result<u64> {
    let (mut from, mut to) = (offset(from)?, offset(to)?);
    // The kernel takes at most this much at once; the sum of offset and length must fit too.
    let len = usize::try_from(len.min(1 << 30)).unwrap_or(1 << 30);
    let copied = copy_file_range(source, Some(&mut from), target, Some(&mut to), len).map_err(|errno| match errno {
        // Said of a swap file, and of a target that the kernel itself reads from.
        Errno::ETXTBSY => io::Error::new(io::ErrorKind::Unsupported, errno),
        _ => or_unsupported(errno),
    })?;
    Ok(copied as u64)
}

/// Whether a copy within the kernel is more than reading and writing in another place: the two files lie on one file
/// system of a kind that shares blocks or copies on its server.
pub(in crate::storage) fn copies_cheaply(source: &File, target: &File) -> bool {
    // Not all of them have a name in nix: Btrfs, XFS, bcachefs, OCFS2, NFS, SMB2.
    const KINDS: [libc::__fsword_t; 6] = [0x9123_683e, 0x5846_5342, 0xca45_1a4e, 0x7461_636f, 0x6969, 0xfe53_4d42];
    let device = |file: &File| file.metadata().ok().map(|metadata| metadata.dev());
    let kind = fstatfs(target).map(|stat| stat.filesystem_type().0 & 0xffff_ffff);
    device(source).is_some() && device(source) == device(target) && kind.is_ok_and(|kind| KINDS.contains(&kind))
}

/// The same file once more, written around the page cache. `None` where that cannot be had.
pub(in crate::storage) fn reopen_direct(file: &File) -> Option<File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flags = OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_DIRECT;
    let direct = OpenOptions::new().write(true).custom_flags(flags.bits()).open(path).ok()?;
    // Whatever stands at that path here: it must be the same file.
    let id = |file: &File| file.metadata().ok().and_then(|metadata| super::file_id(&metadata));
    (id(&direct).is_some() && id(&direct) == id(file)).then_some(direct)
}

/// Has what is dirty of a range written out, without waiting, and what is clean dropped from the page cache.
pub(in crate::storage) fn will_not_need(file: &File, range: &Range<u64>) {
    if let (Ok(start), Ok(len)) = (offset(range.start), offset(range.end.saturating_sub(range.start))) {
        // Advice: nothing depends on its being taken.
        let _ = posix_fadvise(file, start, len, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    }
}

/// The first run of data at or behind `at`. The seek moves the file's own position, which nobody uses.
pub(in crate::storage) fn next_data(file: &File, at: u64, len: u64) -> io::Result<Option<Range<u64>>> {
    if at >= len {
        return Ok(None);
    }
    let seek = |at: i64, whence| match retry(|| lseek64(file, at, whence).map_err(io::Error::from)) {
        Ok(found) => Ok(u64::try_from(found).ok()),
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(error) => Err(error),
    };
    let Some(start) = (match seek(offset(at)?, Whence::SeekData) {
        // This file system does not know holes.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(Some(at..len)),
        found => found?,
    }) else {
        return Ok(None);
    };
    // None where the file was cut in the meantime.
    Ok(seek(offset(start)?, Whence::SeekHole)?.filter(|end| *end > start).map(|end| start..end))
}

/// Opens a name beneath a directory, kept there by the kernel.
pub(in crate::storage) fn open_beneath(directory: &OwnedFd, rest: &Path, write: bool) -> io::Result<File> {
    let mode = if write { OFlag::O_RDWR } else { OFlag::O_RDONLY };
    let how = OpenHow::new()
        .flags(mode | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    // EAGAIN: something was renamed while `..` was resolved. Not for ever, as a renamer may never tire.
    let mut tries = 64;
    loop {
        match openat2(directory, rest, how) {
            Ok(file) => return Ok(File::from(file)),
            Err(Errno::EAGAIN | Errno::EINTR) if tries > 0 => tries -= 1,
            // Kernels before 5.6 do not have the call, and some sandboxes forbid what they do not know.
            Err(Errno::ENOSYS | Errno::EPERM) => return walk_beneath(directory, rest, write),
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn byte_lock(kind: i32, byte: u64) -> io::Result<libc::flock> {
    Ok(libc::flock {
        // Constants of a few units; their type differs from the field's.
        l_type: i16::try_from(kind).map_err(io::Error::other)?,
        l_whence: i16::try_from(libc::SEEK_SET).map_err(io::Error::other)?,
        l_start: offset(byte)?,
        l_len: 1,
        l_pid: 0,
    })
}

/// Takes a shared lock of the open file description on one byte; `WouldBlock` where another holds it exclusively.
pub(in crate::storage) fn lock_byte(file: &File, byte: u64) -> io::Result<()> {
    let lock = byte_lock(libc::F_RDLCK, byte)?;
    retry(|| match fcntl(file, FcntlArg::F_OFD_SETLK(&lock)) {
        Ok(_) => Ok(()),
        Err(Errno::EAGAIN | Errno::EACCES) => Err(io::ErrorKind::WouldBlock.into()),
        Err(errno) => Err(or_unsupported(errno)),
    })
}

/// Gives a byte's lock back.
pub(in crate::storage) fn unlock_byte(file: &File, byte: u64) -> io::Result<()> {
    let lock = byte_lock(libc::F_UNLCK, byte)?;
    retry(|| fcntl(file, FcntlArg::F_OFD_SETLK(&lock)).map(|_| ()).map_err(or_unsupported))
}

/// Whether another open file description holds any lock on one byte.
pub(in crate::storage) fn byte_is_locked(file: &File, byte: u64) -> io::Result<bool> {
    let mut lock = byte_lock(libc::F_WRLCK, byte)?;
    retry(|| fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock)).map_err(or_unsupported))?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

/// The soft limit of open descriptors minus the entries of `/proc/self/fd`.
pub(in crate::storage) fn descriptors_left() -> Option<u64> {
    let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE).ok()?;
    // The listing itself takes a descriptor, which is closed when this returns.
    let open = std::fs::read_dir("/proc/self/fd").ok()?.count().saturating_sub(1);
    // The limit has 32 bits on some platforms.
    #[allow(clippy::useless_conversion, reason = "rlim_t is u64 on most platforms")]
    Some(u64::from(limit).saturating_sub(open as u64))
}
