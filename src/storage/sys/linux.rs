//! Calls that only Linux has.

use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{
    FallocateFlags, FcntlArg, OFlag, OpenHow, PosixFadviseAdvice, ResolveFlag, copy_file_range, fallocate, fcntl,
    openat2, posix_fadvise,
};
use nix::libc;
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::stat::{major, minor};
use nix::sys::statfs::fstatfs;
use nix::unistd::{Whence, lseek64};
use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, XattrFlags, statx};
use rustix::thread::CapabilitySet;

use super::{retry, walk_beneath};

/// The platform has the locks that QEMU takes on images.
pub(in crate::storage) const HAS_IMAGE_LOCKS: bool = true;

/// Converts an error. All answers of a kernel or file system that lacks an operation become
/// `Unsupported`.
fn or_unsupported(errno: Errno) -> io::Error {
    match errno {
        Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL | Errno::ENOTTY | Errno::ENODEV | Errno::EXDEV => {
            io::Error::new(io::ErrorKind::Unsupported, errno)
        }
        _ => errno.into(),
    }
}

/// Converts a file offset to the type of a call. On 32-bit systems some calls take only 32 bits.
fn offset<T: TryFrom<u64>>(n: u64) -> io::Result<T> {
    T::try_from(n).map_err(|_| io::Error::new(io::ErrorKind::Unsupported, Errno::EOVERFLOW))
}

fn allocate(file: &File, flags: FallocateFlags, range: &Range<u64>) -> io::Result<()> {
    let (start, len) = (offset(range.start)?, offset(range.end - range.start)?);
    retry(|| fallocate(file, flags, start, len).map_err(or_unsupported))
}

/// Makes a range read as zeroes and keeps its blocks. The file grows if it ends earlier.
pub(in crate::storage) fn zero_range(file: &File, range: &Range<u64>) -> io::Result<()> {
    allocate(file, FallocateFlags::FALLOC_FL_ZERO_RANGE, range)
}

/// Releases the blocks of a range. The length stays.
pub(in crate::storage) fn punch_range(file: &File, range: &Range<u64>) -> io::Result<()> {
    allocate(file, FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE, range)
}

/// Reserves blocks. The file grows if it ends earlier.
pub(in crate::storage) fn allocate_range(file: &File, range: &Range<u64>) -> io::Result<()> {
    allocate(file, FallocateFlags::empty(), range)
}

/// Copies once within the kernel. Returns 0 where the source ends.
pub(in crate::storage) fn copy_some(source: &File, from: u64, target: &File, to: u64, len: u64) -> io::Result<u64> {
    let (mut from, mut to) = (offset(from)?, offset(to)?);
    // The kernel copies at most 2 GiB at once, and the sum of offset and length must not overflow.
    let len = usize::try_from(len.min(1 << 30)).unwrap_or(1 << 30);
    let copied = copy_file_range(source, Some(&mut from), target, Some(&mut to), len).map_err(|errno| match errno {
        // The answer for a swap file, and for a target that the kernel itself reads.
        Errno::ETXTBSY => io::Error::new(io::ErrorKind::Unsupported, errno),
        _ => or_unsupported(errno),
    })?;
    Ok(copied as u64)
}

/// Returns `true` if a copy within the kernel is cheaper than reading and writing: both files are
/// on one file system that shares blocks or copies on its server.
pub(in crate::storage) fn copies_cheaply(source: &File, target: &File) -> bool {
    // Btrfs, XFS, bcachefs, OCFS2, NFS, SMB2. nix has no names for some of them.
    const KINDS: [libc::__fsword_t; 6] = [0x9123_683e, 0x5846_5342, 0xca45_1a4e, 0x7461_636f, 0x6969, 0xfe53_4d42];
    let device = |file: &File| file.metadata().ok().map(|metadata| metadata.dev());
    let kind = fstatfs(target).map(|stat| stat.filesystem_type().0 & 0xffff_ffff);
    device(source).is_some() && device(source) == device(target) && kind.is_ok_and(|kind| KINDS.contains(&kind))
}

/// Opens the same file again for writes around the page cache. `None` where that is not possible.
pub(in crate::storage) fn reopen_direct(file: &File) -> Option<File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flags = OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_DIRECT;
    let direct = OpenOptions::new().write(true).custom_flags(flags.bits()).open(path).ok()?;
    // /proc may be missing or replaced in a container: the path must lead to the same file.
    let id = |file: &File| file.metadata().ok().and_then(|metadata| super::file_id(&metadata));
    (id(&direct).is_some() && id(&direct) == id(file)).then_some(direct)
}

/// Starts writing the dirty pages of a range and drops the clean ones from the page cache, without
/// waiting.
pub(in crate::storage) fn will_not_need(file: &File, range: &Range<u64>) {
    if let (Ok(start), Ok(len)) = (offset(range.start), offset(range.end.saturating_sub(range.start))) {
        // Advice only: an error has no consequence.
        let _ = posix_fadvise(file, start, len, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    }
}

/// Returns the first run of data at or behind `at`. The seek moves the file position, which is not
/// used elsewhere.
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
        // The file system has no such seek: all is data.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(Some(at..len)),
        found => found?,
    }) else {
        return Ok(None);
    };
    // None if the file was truncated in the meantime.
    Ok(seek(offset(start)?, Whence::SeekHole)?.filter(|end| *end > start).map(|end| start..end))
}

/// Opens a path beneath a directory. The kernel refuses to leave it.
pub(in crate::storage) fn open_beneath(directory: &OwnedFd, rest: &Path, write: bool) -> io::Result<File> {
    let mode = if write { OFlag::O_RDWR } else { OFlag::O_RDONLY };
    let how = OpenHow::new()
        .flags(mode | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    // EAGAIN: a directory was renamed while `..` was resolved. The number of tries is limited,
    // because renames may go on.
    let mut tries = 64;
    loop {
        match openat2(directory, rest, how) {
            Ok(file) => return Ok(File::from(file)),
            Err(Errno::EAGAIN | Errno::EINTR) if tries > 0 => tries -= 1,
            // Kernels before 5.6 do not have the call, and some sandboxes forbid unknown calls.
            Err(Errno::ENOSYS | Errno::EPERM) => return walk_beneath(directory, rest, write),
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn byte_lock(kind: i32, byte: u64) -> io::Result<libc::flock> {
    Ok(libc::flock {
        // Small constants of another type than the field.
        l_type: i16::try_from(kind).map_err(io::Error::other)?,
        l_whence: i16::try_from(libc::SEEK_SET).map_err(io::Error::other)?,
        l_start: offset(byte)?,
        l_len: 1,
        l_pid: 0,
    })
}

/// Takes a shared lock of the open file description on one byte. `WouldBlock` if another one holds
/// it exclusively.
pub(in crate::storage) fn lock_byte(file: &File, byte: u64) -> io::Result<()> {
    let lock = byte_lock(libc::F_RDLCK, byte)?;
    retry(|| match fcntl(file, FcntlArg::F_OFD_SETLK(&lock)) {
        Ok(_) => Ok(()),
        Err(Errno::EAGAIN | Errno::EACCES) => Err(io::ErrorKind::WouldBlock.into()),
        Err(errno) => Err(or_unsupported(errno)),
    })
}

/// Releases the lock on one byte.
pub(in crate::storage) fn unlock_byte(file: &File, byte: u64) -> io::Result<()> {
    let lock = byte_lock(libc::F_UNLCK, byte)?;
    retry(|| fcntl(file, FcntlArg::F_OFD_SETLK(&lock)).map(|_| ()).map_err(or_unsupported))
}

/// Returns `true` if another open file description holds a lock on one byte.
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

/// The largest value of an extended attribute, and the longest list of their names, in bytes.
const XATTR_MAX: usize = 64 << 10;

/// Checks for the answers of a file system that has no extended attributes of this kind, or not
/// this one.
fn lacks_xattr(error: rustix::io::Errno) -> bool {
    use rustix::io::Errno;
    matches!(error, Errno::NODATA | Errno::OPNOTSUPP | Errno::NOSYS)
}

/// Returns the names of the extended attributes that this process may see.
pub(in crate::storage) fn xattr_names(file: &File) -> io::Result<Vec<OsString>> {
    let mut names = vec![0; XATTR_MAX];
    let len = match rustix::fs::flistxattr(file, names.as_mut_slice()) {
        Ok(len) => len,
        Err(error) if lacks_xattr(error) => 0,
        Err(error) => return Err(error.into()),
    };
    names.truncate(len);
    let names = names.split(|byte| *byte == 0).filter(|name| !name.is_empty());
    Ok(names.map(|name| OsStr::from_bytes(name).to_owned()).collect())
}

/// Returns the value of an extended attribute, if the file has it.
pub(in crate::storage) fn xattr(file: &File, name: &OsStr) -> io::Result<Option<Vec<u8>>> {
    let mut value = vec![0; XATTR_MAX];
    match rustix::fs::fgetxattr(file, name, value.as_mut_slice()) {
        Ok(len) => {
            value.truncate(len);
            Ok(Some(value))
        }
        Err(error) if lacks_xattr(error) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Sets an extended attribute.
pub(in crate::storage) fn set_xattr(file: &File, name: &OsStr, value: &[u8]) -> io::Result<()> {
    Ok(rustix::fs::fsetxattr(file, name, value, XattrFlags::empty())?)
}

/// Removes an extended attribute, which may be missing.
pub(in crate::storage) fn remove_xattr(file: &File, name: &OsStr) -> io::Result<()> {
    match rustix::fs::fremovexattr(file, name) {
        Err(error) if !lacks_xattr(error) => Err(error.into()),
        _ => Ok(()),
    }
}

/// Returns true if this process may treat files as if it owned them (`CAP_FOWNER`).
pub(in crate::storage) fn overrides_owners() -> bool {
    let held = rustix::thread::capabilities(None);
    held.is_ok_and(|held| held.effective.contains(CapabilitySet::FOWNER))
}

/// Checks that a file or directory is neither immutable nor append-only. A link is not followed.
pub(in crate::storage) fn check_changeable(path: &Path) -> io::Result<()> {
    let found = match statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::empty()) {
        Ok(found) => found,
        // Before Linux 4.11 these attributes are not looked at.
        Err(rustix::io::Errno::NOSYS) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let fixed = StatxAttributes::IMMUTABLE | StatxAttributes::APPEND;
    if found.stx_attributes.intersects(fixed) {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "the file or its directory is immutable or append-only",
        ));
    }
    Ok(())
}

/// Creates a file without a name in a directory, with mode 0600. `None` where the file system has
/// no such files.
pub(in crate::storage) fn open_unnamed(directory: &Path) -> io::Result<Option<File>> {
    let flags = (OFlag::O_TMPFILE | OFlag::O_CLOEXEC).bits();
    match OpenOptions::new().read(true).write(true).mode(0o600).custom_flags(flags).open(directory) {
        Ok(file) => Ok(Some(file)),
        // Kernels that do not know the flag open the directory itself (EISDIR); some file systems
        // answer ENOENT.
        Err(error) => match error.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::EISDIR | libc::ENOENT | libc::EINVAL) => Ok(None),
            _ => Err(error),
        },
    }
}

/// Checks if a directory is on devtmpfs, or in `/dev` on the file system that is mounted there.
pub(in crate::storage) fn is_device_tree(directory: &Path) -> io::Result<bool> {
    let directory = directory.canonicalize()?;
    let device = std::fs::metadata(&directory)?.dev();
    if directory.starts_with("/dev") && std::fs::metadata("/dev")?.dev() == device {
        return Ok(true);
    }
    // devtmpfs answers `statfs` as tmpfs does. The list of mounts has its name; without the list
    // only /dev counts.
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    Ok(mounts.lines().any(|mount| is_devtmpfs(mount, device)))
}

/// Checks a line of `/proc/self/mountinfo`: `id parent major:minor root point options ... - type
/// source options`.
fn is_devtmpfs(mount: &str, device: u64) -> bool {
    let number = format!("{}:{}", major(device), minor(device));
    let kind = mount.split_once(" - ").and_then(|(_, rest)| rest.split(' ').next());
    mount.split(' ').nth(2) == Some(&number) && kind == Some("devtmpfs")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devtmpfs_is_found_by_its_number_in_the_list_of_mounts() {
        let line = "24 29 0:6 / /mnt/a\\040-\\040dev rw,nosuid shared:2 master:1 - devtmpfs udev rw,mode=755";
        let device = nix::sys::stat::makedev(0, 6);
        assert!(is_devtmpfs(line, device));
        assert!(!is_devtmpfs(line, nix::sys::stat::makedev(6, 0)));
        assert!(!is_devtmpfs(&line.replace("- devtmpfs", "- tmpfs"), device));
        assert!(!is_devtmpfs("24 29 0:6", device) && !is_devtmpfs("", device));
    }
}
