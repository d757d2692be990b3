//! Windows.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::windows::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::Kind;
use crate::storage::{EntryKind, FileId, FileStamp};

/// The flag that opening a directory requires.
const FILE_FLAG_BACKUP_SEMANTICS: u32 = 0x0200_0000;

pub(in crate::storage) fn read_some_at(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    file.seek_read(buf, offset)
}

pub(in crate::storage) fn write_some_at(file: &File, buf: &[u8], offset: u64) -> io::Result<usize> {
    file.seek_write(buf, offset)
}

pub(in crate::storage) fn open(path: &Path, write: bool) -> io::Result<File> {
    OpenOptions::new().read(true).write(write).open(path)
}

pub(in crate::storage) fn create_new(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).open(path)
}

pub(in crate::storage) fn kind(metadata: &Metadata) -> Kind {
    if metadata.is_file() {
        Kind::Regular
    } else if metadata.is_dir() {
        Kind::Other("a directory")
    } else {
        Kind::Other("no regular file")
    }
}

pub(in crate::storage) fn refused_kind(_error: &io::Error) -> Option<&'static str> {
    None
}

/// The standard library does not return it on Windows.
pub(in crate::storage) fn file_id(_metadata: &Metadata) -> Option<FileId> {
    None
}

pub(in crate::storage) fn allocated_len(_metadata: &Metadata) -> Option<u64> {
    None
}

#[expect(clippy::unnecessary_wraps, reason = "the signature of the unix call")]
pub(in crate::storage) fn free_space(_file: &File) -> io::Result<Option<u64>> {
    Ok(None)
}

/// Makes the names in a directory durable.
pub(in crate::storage) fn sync_dir(directory: &Path) -> io::Result<()> {
    OpenOptions::new().write(true).custom_flags(FILE_FLAG_BACKUP_SEMANTICS).open(directory)?.sync_all()
}

/// The standard library does not return a file's number on Windows.
pub(in crate::storage) fn stamp(_metadata: &Metadata) -> Option<FileStamp> {
    None
}

/// Returns the kind of a directory entry from metadata that follow no link.
pub(in crate::storage) fn entry(metadata: &Metadata) -> EntryKind {
    if metadata.is_symlink() {
        EntryKind::Link
    } else if metadata.is_file() {
        EntryKind::File
    } else {
        EntryKind::Other
    }
}
