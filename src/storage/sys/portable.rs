//! Replacements on platforms without the calls of Linux.

#[cfg(unix)]
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

/// The platform does not have the locks that QEMU takes on images.
pub(in crate::storage) const HAS_IMAGE_LOCKS: bool = false;

fn unsupported<T>() -> io::Result<T> {
    Err(io::ErrorKind::Unsupported.into())
}

pub(in crate::storage) fn zero_range(_file: &File, _range: &Range<u64>) -> io::Result<()> {
    unsupported()
}

pub(in crate::storage) fn punch_range(_file: &File, _range: &Range<u64>) -> io::Result<()> {
    unsupported()
}

pub(in crate::storage) fn allocate_range(_file: &File, _range: &Range<u64>) -> io::Result<()> {
    unsupported()
}

pub(in crate::storage) fn copy_some(_: &File, _from: u64, _target: &File, _to: u64, _len: u64) -> io::Result<u64> {
    unsupported()
}

pub(in crate::storage) fn copies_cheaply(_source: &File, _target: &File) -> bool {
    false
}

pub(in crate::storage) fn reopen_direct(_file: &File) -> Option<File> {
    None
}

pub(in crate::storage) fn will_not_need(_file: &File, _range: &Range<u64>) {}

/// Returns all that follows as data.
#[expect(clippy::unnecessary_wraps, reason = "the signature of the Linux call")]
pub(in crate::storage) fn next_data(_file: &File, at: u64, len: u64) -> io::Result<Option<Range<u64>>> {
    Ok((at < len).then_some(at..len))
}

/// Opens a path beneath a directory, one component at a time.
#[cfg(unix)]
pub(in crate::storage) use super::walk_beneath as open_beneath;

pub(in crate::storage) fn lock_byte(_file: &File, _byte: u64) -> io::Result<()> {
    unsupported()
}

pub(in crate::storage) fn unlock_byte(_file: &File, _byte: u64) -> io::Result<()> {
    unsupported()
}

pub(in crate::storage) fn byte_is_locked(_file: &File, _byte: u64) -> io::Result<bool> {
    unsupported()
}

/// The number of open descriptors is unknown.
pub(in crate::storage) fn descriptors_left() -> Option<u64> {
    None
}

/// Extended attributes are read and written on Linux only.
#[cfg(unix)]
#[expect(clippy::unnecessary_wraps, reason = "the signature of the Linux call")]
pub(in crate::storage) fn xattr_names(_file: &File) -> io::Result<Vec<OsString>> {
    Ok(Vec::new())
}

#[cfg(unix)]
#[expect(clippy::unnecessary_wraps, reason = "the signature of the Linux call")]
pub(in crate::storage) fn xattr(_file: &File, _name: &OsStr) -> io::Result<Option<Vec<u8>>> {
    Ok(None)
}

#[cfg(unix)]
pub(in crate::storage) fn set_xattr(_file: &File, _name: &OsStr, _value: &[u8]) -> io::Result<()> {
    unsupported()
}

#[cfg(unix)]
#[expect(clippy::unnecessary_wraps, reason = "the signature of the Linux call")]
pub(in crate::storage) fn remove_xattr(_file: &File, _name: &OsStr) -> io::Result<()> {
    Ok(())
}

/// Only the superuser is known to override the owners of files.
#[cfg(unix)]
pub(in crate::storage) fn overrides_owners() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Immutable files are recognised on Linux only.
#[cfg(unix)]
#[expect(clippy::unnecessary_wraps, reason = "the signature of the Linux call")]
pub(in crate::storage) fn check_changeable(_path: &Path) -> io::Result<()> {
    Ok(())
}

/// There are no files without a name.
#[cfg(unix)]
#[expect(clippy::unnecessary_wraps, reason = "the signature of the Linux call")]
pub(in crate::storage) fn open_unnamed(_directory: &Path) -> io::Result<Option<File>> {
    Ok(None)
}

/// No directory is known to be in memory.
#[expect(clippy::unnecessary_wraps, reason = "the signature of the Linux call")]
pub(in crate::storage) fn is_device_tree(_directory: &Path) -> io::Result<bool> {
    Ok(false)
}
