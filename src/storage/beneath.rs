//! Opening of paths that must not leave a directory.

use std::fs::File;
use std::path::{Component, Path, PathBuf};

use super::{Error, Result};

/// Returns a path without `.` and `..`, computed without the disk, or `None` if it leads above the
/// root.
pub(super) fn by_letters(path: &Path) -> Option<PathBuf> {
    let mut out = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => {
                if !out.pop() {
                    return None;
                }
            }
            other => out.push(other),
        }
    }
    Some(out)
}

/// Splits an absolute path into the longest beginning that means the absolute directory, computed
/// without the disk, and the rest, which the kernel resolves beneath the directory.
pub(super) fn split(path: &Path, directory: &Path) -> Option<(PathBuf, PathBuf)> {
    let directory = by_letters(directory)?;
    let components: Vec<_> = path.components().collect();
    (1..components.len()).rev().find_map(|count| {
        let (start, rest) = components.split_at(count);
        let start: PathBuf = start.iter().collect();
        (by_letters(&start)? == directory).then(|| (start, rest.iter().collect()))
    })
}

pub(super) fn refused(path: &Path, directory: &Path, why: &str) -> Error {
    let why = format!("{why} ({})", directory.display());
    Error::Refused { name: path.display().to_string(), why }
}

/// Opens a path that must be beneath a directory.
#[cfg(unix)]
pub(super) fn open(path: &Path, directory: &Path, write: bool) -> Result<File> {
    use super::file::cannot_open;
    use super::sys;

    let name = || path.display().to_string();
    let absolute = |path: &Path| {
        std::path::absolute(path).map_err(|error| Error::io(&name(), "find the current directory", 0, error))
    };
    let Some((start, rest)) = split(&absolute(path)?, &absolute(directory)?) else {
        return Err(refused(path, directory, "does not lie beneath the directory"));
    };
    let cannot = |error| Error::io(&directory.display().to_string(), "open the directory", 0, error);
    let handle = sys::open_directory(directory).map_err(cannot)?;
    if start.components().any(|component| component == Component::ParentDir) {
        // Computed without the disk, this is the directory. After a symbolic link `..` may lead
        // elsewhere, and the path would mean another file than the one that is opened below.
        let same = |meant: std::fs::Metadata| -> Result<bool> {
            let there = File::from(handle.try_clone().map_err(cannot)?).metadata().map_err(cannot)?;
            Ok(sys::file_id(&meant) == sys::file_id(&there))
        };
        if !std::fs::metadata(&start).map_err(|error| cannot_open(name(), error)).and_then(same)? {
            return Err(refused(path, directory, "leads through a symbolic link out of the directory"));
        }
    }
    sys::open_beneath(&handle, &rest, write).map_err(|error| match sys::refused_beneath(&error) {
        Some(why) => refused(path, directory, why),
        None => cannot_open(name(), error),
    })
}

/// Other platforms have no calls that keep a path beneath a directory while it is resolved.
#[cfg(not(unix))]
pub(super) fn open(path: &Path, _directory: &Path, _write: bool) -> Result<File> {
    Err(Error::unsupported(&path.display().to_string(), "keeping a name beneath a directory"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_letters_removes_dots() {
        let plain = |path: &str| by_letters(Path::new(path)).map(|path| path.display().to_string());
        assert_eq!(plain("/a/./b/../c").as_deref(), Some("/a/c"));
        assert_eq!(plain("a/..").as_deref(), Some(""));
        assert_eq!(plain("/.."), None);
        assert_eq!(plain("../a"), None);
    }

    #[test]
    fn split_ends_at_the_directory() {
        let rest = |path: &str, directory: &str| {
            split(Path::new(path), Path::new(directory)).map(|(_, rest)| rest.display().to_string())
        };
        assert_eq!(rest("/a/b/c", "/a").as_deref(), Some("b/c"));
        assert_eq!(rest("/a/b/c", "/a/b/").as_deref(), Some("c"));
        assert_eq!(rest("/a/x/../b/c", "/a/b").as_deref(), Some("c"));
        assert_eq!(rest("/a/b/../b/c", "/a/b").as_deref(), Some("c"));
        // The kernel refuses a rest that leaves the directory.
        assert_eq!(rest("/a/b/../../etc/passwd", "/a/b").as_deref(), Some("../../etc/passwd"));
        assert_eq!(rest("/ab/c", "/a"), None);
        assert_eq!(rest("/etc/passwd", "/a"), None);
        assert_eq!(rest("/a", "/a"), None);
        assert_eq!(rest("/a/b", "/").as_deref(), Some("a/b"));
    }
}
