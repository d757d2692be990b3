//! Names that fail.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Call, Faults, FaultyStorage, Reach};
use crate::storage::{Access, FileSystem, ListedFile, Resolved, Result, Storage};

/// Names that fail when their group's plan says so, and the storages opened by them too.
///
/// ```
/// use std::path::Path;
/// use std::sync::Arc;
/// use qcow2_chain::storage::fault::{Fault, Faults, FaultyFileSystem};
/// use qcow2_chain::storage::{Access, MemoryFileSystem, FileSystem};
///
/// let faults = Faults::new(Fault::Sync.at(1));
/// let names = FaultyFileSystem::new(Arc::new(MemoryFileSystem::new()), &faults);
/// names.create_new(Path::new("/disk"))?.sync()?;
/// assert!(names.sync_dir(Path::new("/")).is_err());
/// names.open(Path::new("/disk"), &Access::read())?;
/// # Ok::<(), qcow2_chain::storage::Error>(())
/// ```
#[derive(Debug)]
pub struct FaultyFileSystem {
    inner: Arc<dyn FileSystem>,
    faults: Arc<Faults>,
}

impl FaultyFileSystem {
    /// Names over others, in this group.
    #[must_use]
    pub fn new(inner: Arc<dyn FileSystem>, faults: &Arc<Faults>) -> Self {
        Self { inner, faults: Arc::clone(faults) }
    }

    /// Changes a name, or fails with the change done or not.
    fn change<T>(&self, path: &Path, action: &str, call: Call, change: impl FnOnce() -> Result<T>) -> Result<T> {
        if !self.faults.strikes(call) {
            return change();
        }
        if self.faults.plan.reach == Reach::All {
            change()?;
        }
        Err(self.faults.error(&path.display().to_string(), action, 0))
    }

    fn check(&self, path: &Path, action: &str, call: Call) -> Result<()> {
        if self.faults.strikes(call) { Err(self.faults.error(&path.display().to_string(), action, 0)) } else { Ok(()) }
    }

    fn faulty(&self, storage: Arc<dyn Storage>) -> Arc<dyn Storage> {
        Arc::new(FaultyStorage::new(storage, &self.faults))
    }
}

impl FileSystem for FaultyFileSystem {
    fn open(&self, path: &Path, access: &Access) -> Result<Arc<dyn Storage>> {
        self.check(path, "open it", Call::Other)?;
        Ok(self.faulty(self.inner.open(path, access)?))
    }

    fn create_new(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        let created = self.change(path, "create it", Call::TakesRoom, || self.inner.create_new(path))?;
        Ok(self.faulty(created))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.change(from, "rename it", Call::TakesRoom, || self.inner.rename(from, to))
    }

    fn link(&self, from: &Path, to: &Path) -> Result<()> {
        self.change(from, "link it", Call::TakesRoom, || self.inner.link(from, to))
    }

    fn unlink(&self, path: &Path) -> Result<()> {
        self.change(path, "remove it", Call::Other, || self.inner.unlink(path))
    }

    fn sync_dir(&self, directory: &Path) -> Result<()> {
        self.check(directory, "make its names durable", Call::Sync)?;
        self.inner.sync_dir(directory)
    }

    fn list(&self, directory: &Path) -> Result<Vec<PathBuf>> {
        self.check(directory, "list it", Call::Other)?;
        self.inner.list(directory)
    }

    fn list_openable(&self, directory: &Path) -> Result<Vec<ListedFile>> {
        self.check(directory, "list it", Call::Other)?;
        self.inner.list_openable(directory)
    }

    fn exists(&self, path: &Path) -> Result<bool> {
        self.check(path, "look for it", Call::Other)?;
        self.inner.exists(path)
    }

    fn resolve(&self, path: &Path) -> Result<Resolved> {
        self.check(path, "look for it", Call::Other)?;
        self.inner.resolve(path)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Fault;
    use super::*;
    use crate::storage::MemoryFileSystem;

    fn with(plan: super::super::Plan) -> (Arc<MemoryFileSystem>, FaultyFileSystem, Arc<Faults>) {
        let faults = Faults::new(plan);
        let inner = Arc::new(MemoryFileSystem::new());
        inner.create_new(Path::new("/a")).unwrap();
        (inner.clone(), FaultyFileSystem::new(inner, &faults), faults)
    }

    /// All that can be done to names, in this order.
    fn results(names: &FaultyFileSystem) -> Vec<bool> {
        let [a, b] = ["/a", "/b"].map(Path::new);
        let root = Path::new("/");
        vec![
            names.open(a, &Access::write()).is_ok(),
            names.create_new(b).is_ok(),
            names.list(root).is_ok(),
            names.exists(a).is_ok(),
            names.resolve(a).is_ok(),
            names.rename(a, b).is_ok(),
            names.sync_dir(root).is_ok(),
            names.unlink(b).is_ok(),
        ]
    }

    #[test]
    fn each_call_has_its_turn() {
        for at in 0..8_usize {
            let (_, names, faults) = with(Fault::Io.at(at as u64).with_reach(Reach::All));
            let results = results(&names);
            assert_eq!(results.iter().position(|done| !done), Some(at), "{results:?}");
            assert_eq!(faults.calls(), 8);
        }
        let counted = [(Fault::Io, 8), (Fault::NoSpace, 2), (Fault::Interrupted, 7), (Fault::Sync, 1)];
        for (fault, calls) in counted {
            let (_, names, faults) = with(fault.at(100));
            assert_eq!(results(&names), [true; 8]);
            assert_eq!(faults.calls(), calls, "{fault:?}");
        }
    }

    #[test]
    fn a_failed_rename_was_done_or_not() {
        for (reach, moved) in [(Reach::Nothing, false), (Reach::Half, false), (Reach::All, true)] {
            let (inner, names, faults) = with(Fault::Io.at(0).with_reach(reach).ever_after());
            assert!(names.rename(Path::new("/a"), Path::new("/b")).is_err());
            assert_eq!(inner.exists(Path::new("/b")).unwrap(), moved, "{reach:?}");
            faults.heal();
            assert!(names.sync_dir(Path::new("/")).is_ok());
        }
    }

    #[test]
    fn what_is_opened_fails_with_its_names() {
        let (_, names, _) = with(Fault::Io.at(1));
        let file = names.open(Path::new("/a"), &Access::write()).unwrap();
        assert!(file.write_at(b"x", 0).is_err());
        assert!(file.write_at(b"x", 0).is_ok());
    }
}
