//! Which of the names that images write of their backing files are opened, and how.

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use crate::storage::{self, Access, FileId, FileSystem, Storage};

use super::error::{Error, Remedy, Result};

/// Which of the names that images write of their backing files are opened.
///
/// Whatever the policy, a name with a protocol prefix (`nbd:`, `json:`, `http:`, also `file:`), an empty name and a name
/// with a NUL are refused, and only regular files and block devices are opened.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Policy {
    /// None: an image with a backing file is an error.
    #[default]
    Refuse,
    /// Those that lie beneath one of these directories. The kernel enforces it where it can: no `..` out of the
    /// directory, no symbolic link, no magic link.
    Beneath(Vec<PathBuf>),
    /// Exactly these files, whatever name an image uses for them.
    List(Vec<PathBuf>),
    /// Any regular file or block device. Only for images that nobody hostile could have written.
    Any,
}

/// A backing file's name, and the image that names it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Link<'a> {
    /// The path that the naming image was opened by.
    pub(super) image: &'a Path,
    /// What the image says.
    pub(super) name: &'a [u8],
}

impl Link<'_> {
    /// The naming image, for messages.
    pub(super) fn file(&self) -> String {
        self.image.display().to_string()
    }

    /// The name, for messages.
    pub(super) fn backing(&self) -> String {
        String::from_utf8_lossy(self.name).into_owned()
    }

    fn refused(&self, why: impl Into<String>, remedy: Remedy) -> Error {
        Error::Refused { file: self.file(), backing: self.backing(), why: why.into(), remedy }
    }

    fn not_followed(&self, names: &dyn FileSystem, target: &Path) -> Error {
        let remedy = Remedy::Beneath(parent_name(&by_letters(&self.plain_target(names, target))));
        self.refused("backing files are not followed", remedy)
    }

    /// The path that the name stands for: relative to the directory of the image that names it, never to the working
    /// directory.
    ///
    /// # Errors
    /// [`Error::Refused`] for what is no file name at all.
    pub(super) fn target(&self) -> Result<PathBuf> {
        if self.name.is_empty() {
            return Err(self.refused("the name is empty", Remedy::Never));
        }
        if self.name.contains(&0) {
            return Err(self.refused("the name holds a NUL byte", Remedy::Never));
        }
        if has_protocol(self.name) {
            return Err(self.refused("it names a protocol, not a file", Remedy::Never));
        }
        let Some(name) = path_from_bytes(self.name) else {
            return Err(self.refused("the name is not valid on this system", Remedy::Never));
        };
        // `join` takes an absolute name as it is.
        Ok(self.image.parent().unwrap_or(self.image).join(name))
    }

    /// The target seen from where the image really lies. The target itself is not looked at.
    fn plain_target(&self, names: &dyn FileSystem, target: &Path) -> PathBuf {
        join_by_letters(&settled(names, &parent_name(self.image)), path_from_bytes(self.name).unwrap_or(target))
    }
}

/// Returns true if QEMU reads the part of a name before the first `:` as a protocol: if no slash precedes it.
#[must_use]
pub fn has_protocol(name: &[u8]) -> bool {
    let first = name.iter().copied().find(|byte| matches!(byte, b':' | b'/') || (cfg!(windows) && *byte == b'\\'));
    let drive = cfg!(windows) && matches!(name, [letter, b':', ..] if letter.is_ascii_alphabetic());
    first == Some(b':') && !drive
}

#[cfg(unix)]
#[expect(clippy::unnecessary_wraps, reason = "other systems refuse names that are not Unicode")]
pub(super) fn path_from_bytes(name: &[u8]) -> Option<&Path> {
    use std::os::unix::ffi::OsStrExt;
    Some(Path::new(std::ffi::OsStr::from_bytes(name)))
}

#[cfg(not(unix))]
pub(super) fn path_from_bytes(name: &[u8]) -> Option<&Path> {
    std::str::from_utf8(name).ok().map(Path::new)
}

/// The name of the directory that a file lies in: the current one for a bare name.
fn parent_name(path: &Path) -> PathBuf {
    let directory = path.parent().unwrap_or(path);
    if directory.as_os_str().is_empty() { PathBuf::from(".") } else { directory.to_owned() }
}

/// What was opened, and by which path.
pub(super) struct Opened {
    pub(super) storage: Arc<dyn Storage>,
    pub(super) path: PathBuf,
}

/// What has been opened already, to find loops.
#[derive(Debug, Default)]
pub(super) struct Seen {
    files: Vec<FileId>,
    paths: Vec<PathBuf>,
}

impl Seen {
    /// Notes an opened file. Tells whether it is new.
    pub(super) fn insert(&mut self, names: &dyn FileSystem, path: &Path, storage: &dyn Storage) -> bool {
        if let Some(id) = storage.file_id() {
            let new = !self.files.contains(&id);
            self.files.push(id);
            return new;
        }
        let path = names.resolve(path).map_or_else(|_| path.to_owned(), |found| found.path);
        let new = !self.paths.contains(&path);
        self.paths.push(path);
        new
    }

    /// Whether a name that cannot be opened stands for one of these.
    fn holds(&self, names: &dyn FileSystem, path: &Path) -> bool {
        names.resolve(path).is_ok_and(|found| match found.file {
            Some(id) => self.files.contains(&id),
            None => self.paths.contains(&found.path),
        })
    }
}

impl Policy {
    /// Refuses what is refused whatever lies behind the name.
    ///
    /// # Errors
    /// [`Error::Refused`].
    pub(super) fn check(&self, names: &dyn FileSystem, link: Link<'_>) -> Result<()> {
        let target = link.target()?;
        if *self == Self::Refuse { Err(link.not_followed(names, &target)) } else { Ok(()) }
    }

    /// Opens the backing file that a link names, if this policy allows it.
    ///
    /// # Errors
    /// [`Error::Refused`]; [`Error::Loop`] where the file is locked by this very chain; [`Error::Storage`].
    pub(super) fn open(&self, names: &dyn FileSystem, link: Link<'_>, access: &Access, seen: &Seen) -> Result<Opened> {
        let target = link.target()?;
        let opened = match self {
            Self::Refuse => Err(link.not_followed(names, &target)),
            Self::Beneath(directories) => open_beneath(names, link, &target, directories, access),
            Self::List(files) => match files.iter().find(|file| same_file(names, file, &target)) {
                // The path that the caller gave is opened, not the one that the image gave: nothing that happens to
                // the image's name in between can matter.
                Some(file) => Ok(names.open(file, access)),
                None => Err(link.refused("it is not one of the allowed files", Remedy::List(target.clone()))),
            },
            Self::Any => Ok(names.open(&target, access)),
        }?;
        match opened {
            Ok(storage) => Ok(Opened { storage, path: target }),
            // An image that backs itself finds its own lock: say so, not that another process has it.
            Err(storage::Error::Busy { .. }) if seen.holds(names, &target) => {
                Err(Error::Loop { file: link.file(), backing: link.backing() })
            }
            Err(storage::Error::Refused { why, .. }) => Err(link.refused(why, Remedy::Never)),
            Err(error) => Err(error.into()),
        }
    }
}

/// Whether two names stand for one file. Neither is opened.
fn same_file(names: &dyn FileSystem, a: &Path, b: &Path) -> bool {
    if a == b {
        return true;
    }
    match (names.resolve(a), names.resolve(b)) {
        (Ok(a), Ok(b)) => a.path == b.path || (a.file.is_some() && a.file == b.file),
        _ => false,
    }
}

/// A directory's name without links, or as it was given where it has none.
fn settled(names: &dyn FileSystem, directory: &Path) -> PathBuf {
    names.resolve(directory).map_or_else(|_| directory.to_owned(), |found| found.path)
}

/// Opens a backing file beneath the first of some directories that allows it.
///
/// What the caller named (the directories, and where the image lies) may go through links; what the image named may not.
fn open_beneath(
    names: &dyn FileSystem,
    link: Link<'_>,
    target: &Path,
    directories: &[PathBuf],
    access: &Access,
) -> Result<storage::Result<Arc<dyn Storage>>> {
    let plain = link.plain_target(names, target);
    let letters = by_letters(&plain);
    let mut refusal = None;
    let mut inside = false;
    for directory in directories {
        let real = settled(names, directory);
        let within = letters.starts_with(&real);
        inside |= within;
        for (path, directory) in [(target, directory.clone()), (&plain, real)] {
            match names.open(path, &access.clone().with_beneath(directory)) {
                Err(storage::Error::Refused { why, .. }) if within || refusal.is_none() => refusal = Some(why),
                Err(storage::Error::Refused { .. }) => {}
                done => return Ok(done),
            }
        }
    }
    let why = refusal.unwrap_or_else(|| "no directory is allowed".to_owned());
    let remedy = if inside { remedy_inside(names, target, plain) } else { Remedy::Beneath(parent_name(&letters)) };
    Err(link.refused(why, remedy))
}

/// What would open a target that lies in an allowed directory and is refused nevertheless: links are open to those who
/// list the file, what is no image is closed to all.
fn remedy_inside(names: &dyn FileSystem, target: &Path, plain: PathBuf) -> Remedy {
    match names.resolve(target) {
        Ok(found) if found.path != plain => Remedy::List(plain),
        _ => Remedy::Never,
    }
}

/// A name seen from a directory that goes through no links, where leading `..` may be taken by their letters.
fn join_by_letters(directory: &Path, name: &Path) -> PathBuf {
    let mut path = directory.to_owned();
    let mut leading = true;
    for component in name.components() {
        match component {
            Component::ParentDir if leading && path.is_absolute() => {
                path.pop();
            }
            Component::CurDir => {}
            other => {
                leading = false;
                path.push(other);
            }
        }
    }
    path
}

/// A path without `..`, each taken by its letters: what it most likely stands for, good enough for advice.
fn by_letters(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir if plain.file_name().is_some() => {
                plain.pop();
            }
            other => plain.push(other),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protocols_are_told_from_names() {
        for name in ["nbd:x", "json:{}", "a.b+c-d:x", ":", "a b:c", "file:x"] {
            assert!(has_protocol(name.as_bytes()), "{name}");
        }
        for name in ["x", "./a:b", "/a:b", "a/b:c", ""] {
            assert!(!has_protocol(name.as_bytes()), "{name}");
        }
    }

    #[test]
    fn names_are_seen_from_the_image_that_names_them() {
        let target = |image: &str, name: &str| {
            let link = Link { image: Path::new(image), name: name.as_bytes() };
            link.target().map(|path| path.display().to_string()).map_err(|error| error.to_string())
        };
        assert_eq!(target("/d/top", "base").as_deref(), Ok("/d/base"));
        assert_eq!(target("d/top", "../base").as_deref(), Ok("d/../base"));
        assert_eq!(target("top", "base").as_deref(), Ok("base"));
        assert_eq!(target("/d/top", "/e/base").as_deref(), Ok("/e/base"));
        assert!(target("/d/top", "").is_err_and(|error| error.contains("empty")));
        assert!(target("/d/top", "a\0b").is_err_and(|error| error.contains("NUL")));
        let error = target("/d/top", "nbd:x").expect_err("a protocol");
        assert_eq!(
            error,
            "/d/top: backing file 'nbd:x' is refused: it names a protocol, not a file; no policy allows it"
        );
    }

    #[test]
    fn only_leading_dots_are_taken_by_their_letters() {
        let join =
            |directory: &str, name: &str| join_by_letters(Path::new(directory), Path::new(name)).display().to_string();
        assert_eq!(join("/a/b", "../c"), "/a/c");
        assert_eq!(join("/a/b", "./../../../c"), "/c");
        assert_eq!(join("/a/b", "c/../d"), "/a/b/c/../d");
        assert_eq!(join("a", "../c"), "a/../c");
        assert_eq!(join("/a", "/b/../c"), "/b/../c");
        assert_eq!(by_letters(Path::new("/a/b/../../../c")).display().to_string(), "/../c");
    }
}
