//! A file system in memory.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::beneath::{by_letters, refused, split};
use super::{Access, Error, FileSystem, MemoryStorage, ReadOnlyStorage, Resolved, Result, Storage};

/// A directory tree in memory.
///
/// Every directory exists, a relative path starts at the root, and there are no links. Two handles
/// of one name share the same bytes. Image locks are accepted without effect, because no other
/// program can reach the memory.
#[derive(Debug, Default)]
pub struct MemoryFileSystem {
    files: Mutex<BTreeMap<PathBuf, Arc<MemoryStorage>>>,
}

fn failed(path: &Path, action: impl Into<String>, kind: io::ErrorKind) -> Error {
    Error::Io { name: path.display().to_string(), action: action.into(), source: kind.into() }
}

/// Returns the absolute path without `.` and `..`, or `None` if it leads above the root.
pub(super) fn rooted(path: &Path) -> Option<PathBuf> {
    by_letters(&Path::new("/").join(path))
}

fn key(path: &Path, action: &str) -> Result<PathBuf> {
    rooted(path).ok_or_else(|| failed(path, action, io::ErrorKind::NotFound))
}

impl MemoryFileSystem {
    /// Returns an empty file system.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives a storage a name. A storage of this name is replaced.
    pub fn insert(&self, path: impl AsRef<Path>, storage: Arc<MemoryStorage>) {
        if let Some(key) = rooted(path.as_ref()) {
            self.files().insert(key, storage);
        }
    }

    /// Returns the storage of a name.
    #[must_use]
    pub fn get(&self, path: impl AsRef<Path>) -> Option<Arc<MemoryStorage>> {
        self.files().get(&rooted(path.as_ref())?).cloned()
    }

    /// Returns a copy of all files with their content and their identities. Later changes of one
    /// file system do not affect the other.
    #[must_use]
    pub fn copy(&self) -> Self {
        let copy = |(path, storage): (&PathBuf, &Arc<MemoryStorage>)| (path.clone(), Arc::new(storage.copy()));
        Self { files: Mutex::new(self.files().iter().map(copy).collect()) }
    }

    /// Returns all files by their paths, which start at the root.
    #[must_use]
    pub fn to_map(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        self.files().iter().map(|(path, storage)| (path.clone(), storage.to_vec())).collect()
    }

    pub(super) fn files(&self) -> MutexGuard<'_, BTreeMap<PathBuf, Arc<MemoryStorage>>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FileSystem for MemoryFileSystem {
    fn open(&self, path: &Path, access: &Access) -> Result<Arc<dyn Storage>> {
        if let Some(directory) = &access.beneath {
            let root = Path::new("/");
            let (_, rest) = split(&root.join(path), &root.join(directory))
                .ok_or_else(|| refused(path, directory, "does not lie beneath the directory"))?;
            // `..` must not lead above the directory, not even to return to it.
            by_letters(&rest).ok_or_else(|| refused(path, directory, "leads out of its directory"))?;
        }
        let found = self.files().get(&key(path, "open it")?).cloned();
        let storage = found.ok_or_else(|| failed(path, "open it", io::ErrorKind::NotFound))?;
        Ok(if access.write { storage } else { Arc::new(ReadOnlyStorage::new(storage)) })
    }

    fn create_new(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        let key = key(path, "create it")?;
        let mut files = self.files();
        if files.contains_key(&key) {
            return Err(failed(path, "create it", io::ErrorKind::AlreadyExists));
        }
        let storage = Arc::new(MemoryStorage::new(path.display().to_string()));
        files.insert(key, Arc::clone(&storage));
        Ok(storage)
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        let action = || format!("rename it to {}", to.display());
        let (old, new) = (key(from, &action())?, key(to, &action())?);
        let mut files = self.files();
        let storage = files.remove(&old).ok_or_else(|| failed(from, action(), io::ErrorKind::NotFound))?;
        files.insert(new, storage);
        Ok(())
    }

    fn unlink(&self, path: &Path) -> Result<()> {
        let key = key(path, "remove it")?;
        let removed = self.files().remove(&key);
        removed.map(drop).ok_or_else(|| failed(path, "remove it", io::ErrorKind::NotFound))
    }

    fn sync_dir(&self, _directory: &Path) -> Result<()> {
        Ok(())
    }

    fn list(&self, directory: &Path) -> Result<Vec<PathBuf>> {
        let parent = key(directory, "list it")?;
        let files = self.files();
        let inside = files.keys().filter(|path| path.parent() == Some(&parent));
        Ok(inside.filter_map(|path| path.file_name()).map(|name| directory.join(name)).collect())
    }

    fn exists(&self, path: &Path) -> Result<bool> {
        Ok(self.get(path).is_some())
    }

    /// Resolves the path from the root. Every directory exists, so that a path without a file is
    /// valid too.
    fn resolve(&self, path: &Path) -> Result<Resolved> {
        let path = key(path, "look for it")?;
        let file = self.files().get(&path).and_then(|storage| storage.file_id());
        Ok(Resolved { path, file })
    }
}

#[cfg(test)]
mod tests {
    use super::super::EntryKind;
    use super::*;

    #[test]
    fn handles_of_one_name_share_a_storage() {
        let names = MemoryFileSystem::new();
        let path = Path::new("a/image");
        let created = names.create_new(path).unwrap();
        created.write_at(b"hello", 0).unwrap();
        let reader = names.open(Path::new("/a/b/../image"), &Access::read()).unwrap();
        let writer = names.open(Path::new("./a/image"), &Access::write()).unwrap();
        assert!(reader.is_read_only() && !writer.is_read_only());
        assert!(matches!(reader.write_at(b"x", 0), Err(Error::ReadOnly { .. })));
        writer.write_at(b"J", 0).unwrap();
        let mut buf = [0; 5];
        reader.read_at(&mut buf, 0).unwrap();
        assert_eq!(&buf, b"Jello");
        assert_eq!(reader.file_id(), created.file_id());
        let resolved = names.resolve(Path::new("a/./x/../image")).unwrap();
        assert_eq!(resolved, Resolved { path: "/a/image".into(), file: created.file_id() });
        assert_eq!(names.resolve(Path::new("a")).unwrap(), Resolved { path: "/a".into(), file: None });
        let kind = |error: Error| io::Error::from(error).kind();
        assert_eq!(kind(names.create_new(path).unwrap_err()), io::ErrorKind::AlreadyExists);
        assert_eq!(kind(names.open(Path::new("b"), &Access::read()).unwrap_err()), io::ErrorKind::NotFound);
        assert_eq!(kind(names.open(Path::new("../b"), &Access::read()).unwrap_err()), io::ErrorKind::NotFound);
    }

    #[test]
    fn storages_survive_changes_of_names() {
        let names = MemoryFileSystem::new();
        let [a, b, c] = ["/d/a", "/d/b", "/d/e/c"].map(Path::new);
        for path in [a, b, c] {
            names.create_new(path).unwrap();
        }
        let (first, second) = (names.get(a).unwrap(), names.get(b).unwrap());
        assert_eq!(names.list(Path::new("/d")).unwrap(), [a, b]);
        names.rename(a, b).unwrap();
        assert!(!names.exists(a).unwrap() && names.exists(b).unwrap());
        assert_eq!(names.get(b).unwrap().file_id(), first.file_id());
        second.write_at(b"still there", 0).unwrap();
        names.unlink(b).unwrap();
        assert!(names.rename(b, a).is_err() && names.unlink(b).is_err());
        names.insert("d/z", second);
        assert_eq!(names.list(Path::new("d")).unwrap(), [Path::new("d/z")]);
        names.sync_dir(Path::new("/d")).unwrap();
        let kinds = [c, b, Path::new("/d/e")].map(|path| names.entry(path).unwrap());
        assert_eq!(kinds, [EntryKind::File, EntryKind::Missing, EntryKind::Missing]);
        // A file may be renamed to itself.
        names.rename(c, c).unwrap();
        assert!(names.exists(c).unwrap());
    }

    #[test]
    fn copy_keeps_identities_and_separates_content() {
        let names = MemoryFileSystem::new();
        let path = Path::new("/d/a");
        names.create_new(path).unwrap().write_at(b"old", 0).unwrap();
        let copy = names.copy();
        names.get(path).unwrap().write_at(b"new", 0).unwrap();
        assert_eq!(copy.to_map(), [(path.to_owned(), b"old".to_vec())].into());
        assert_eq!(names.to_map()[path], b"new");
        assert_eq!(copy.get(path).unwrap().file_id(), names.get(path).unwrap().file_id());
    }

    #[test]
    fn beneath_compares_paths() {
        let names = MemoryFileSystem::new();
        for path in ["/top/a/image", "/outside"] {
            names.create_new(Path::new(path)).unwrap();
        }
        let open = |path: &str| names.open(Path::new(path), &Access::read().with_beneath("/top"));
        for path in ["/top/a/image", "top/a/image", "/top/a/../a/image", "/x/../top/a/image"] {
            assert!(open(path).is_ok(), "{path}");
        }
        for path in ["/outside", "/top/../outside", "/top/../../top", "/top", "/topa"] {
            assert!(matches!(open(path), Err(Error::Refused { .. })), "{path}");
        }
    }
}
