//! The failing file system.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Call, Faults, FaultyStorage, Reach};
use crate::storage::{Access, Attributes, EntryKind, FileSystem, ListedFile, Resolved, Result, Storage};

/// A file system that fails as the plan of its group requires, and so do the storages that it
/// opens.
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
    /// Wraps a file system as a member of a group.
    #[must_use]
    pub fn new(inner: Arc<dyn FileSystem>, faults: &Arc<Faults>) -> Self {
        Self { inner, faults: Arc::clone(faults) }
    }

    /// Performs a change, or fails before or after it.
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

    fn create_new_like(&self, path: &Path, model: &dyn Storage, attributes: Attributes) -> Result<Arc<dyn Storage>> {
        let create = || self.inner.create_new_like(path, model, attributes);
        Ok(self.faulty(self.change(path, "create it", Call::TakesRoom, create)?))
    }

    fn check_create_like(&self, directory: &Path, model: &dyn Storage) -> Result<()> {
        self.check(directory, "create a file in it", Call::TakesRoom)?;
        self.inner.check_create_like(directory, model)
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.change(from, "rename it", Call::TakesRoom, || self.inner.rename(from, to))
    }

    fn unlink(&self, path: &Path) -> Result<()> {
        self.change(path, "remove it", Call::Other, || self.inner.unlink(path))
    }

    fn check_unlink(&self, path: &Path) -> Result<()> {
        self.check(path, "look at it", Call::Other)?;
        self.inner.check_unlink(path)
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

    fn entry(&self, path: &Path) -> Result<EntryKind> {
        self.check(path, "look for it", Call::Other)?;
        self.inner.entry(path)
    }

    fn is_memory_backed(&self, directory: &Path) -> Result<bool> {
        self.check(directory, "find its file system", Call::Other)?;
        self.inner.is_memory_backed(directory)
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
    use crate::storage::{MemoryFileSystem, MemoryStorage};

    fn with(plan: super::super::Plan) -> (Arc<MemoryFileSystem>, FaultyFileSystem, Arc<Faults>) {
        let faults = Faults::new(plan);
        let inner = Arc::new(MemoryFileSystem::new());
        inner.create_new(Path::new("/a")).unwrap();
        (inner.clone(), FaultyFileSystem::new(inner, &faults), faults)
    }

    /// Calls every operation in this order and returns the successes.
    fn results(names: &FaultyFileSystem) -> Vec<bool> {
        let [a, b] = ["/a", "/b"].map(Path::new);
        let [c, root] = ["/c", "/"].map(Path::new);
        let model = MemoryStorage::new("model");
        vec![
            names.open(a, &Access::write()).is_ok(),
            names.create_new(b).is_ok(),
            names.list(root).is_ok(),
            names.exists(a).is_ok(),
            names.resolve(a).is_ok(),
            names.check_create_like(root, &model).is_ok(),
            names.create_new_like(c, &model, Attributes::Require).is_ok(),
            names.entry(a).is_ok(),
            names.is_memory_backed(root).is_ok(),
            names.rename(a, b).is_ok(),
            names.sync_dir(root).is_ok(),
            names.unlink(b).is_ok(),
        ]
    }

    #[test]
    fn every_operation_is_a_failing_point() {
        for at in 0..12_usize {
            let (_, names, faults) = with(Fault::Io.at(at as u64).with_reach(Reach::All));
            let results = results(&names);
            assert_eq!(results.iter().position(|done| !done), Some(at), "{results:?}");
            assert_eq!(faults.calls(), 12);
        }
        let counted = [(Fault::Io, 12), (Fault::NoSpace, 4), (Fault::Interrupted, 11), (Fault::Sync, 1)];
        for (fault, calls) in counted {
            let (_, names, faults) = with(fault.at(100));
            assert_eq!(results(&names), [true; 12]);
            assert_eq!(faults.calls(), calls, "{fault:?}");
        }
    }

    #[test]
    fn failed_rename_may_have_been_done() {
        for (reach, moved) in [(Reach::Nothing, false), (Reach::Half, false), (Reach::All, true)] {
            let (inner, names, faults) = with(Fault::Io.at(0).with_reach(reach).ever_after());
            assert!(names.rename(Path::new("/a"), Path::new("/b")).is_err());
            assert_eq!(inner.exists(Path::new("/b")).unwrap(), moved, "{reach:?}");
            faults.heal();
            assert!(names.sync_dir(Path::new("/")).is_ok());
        }
    }

    #[test]
    fn opened_storage_fails_by_the_same_plan() {
        let (_, names, _) = with(Fault::Io.at(1));
        let file = names.open(Path::new("/a"), &Access::write()).unwrap();
        assert!(file.write_at(b"x", 0).is_err());
        assert!(file.write_at(b"x", 0).is_ok());
    }
}
