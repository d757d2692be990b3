//! What answers where Linux's own calls do not exist.

use std::fs::File;
use std::io;
use std::ops::Range;

/// Whether QEMU's image locks exist here.
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

/// All is data.
#[expect(clippy::unnecessary_wraps, reason = "the signature of the Linux call")]
pub(in crate::storage) fn next_data(_file: &File, at: u64, len: u64) -> io::Result<Option<Range<u64>>> {
    Ok((at < len).then_some(at..len))
}

/// Opens a name beneath a directory, component by component.
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

/// No number of open descriptors is known.
pub(in crate::storage) fn descriptors_left() -> Option<u64> {
    None
}
