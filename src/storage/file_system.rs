//! The file system trait: open, create, rename, unlink, and the sync of a directory.

use std::fmt;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

#[cfg(unix)]
use super::attributes;
use super::{Error, FileId, FileStorage, LockMode, Result, Storage, sys};

/// The mode of opening a storage by name.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Access {
    /// Opens for reading and writing if `true`, for reading only if `false`.
    pub write: bool,
    /// The image locks to take before anything is read.
    pub lock: LockMode,
    /// The directory that the path must be in, or `None` for no such restriction.
    ///
    /// The path means the same file as without this field: a relative path starts at the current
    /// directory. It must begin with the directory, compared component by component without looking
    /// at the disk. The kernel resolves the rest beneath the directory (by `openat2`, or one
    /// component at a time where that is missing), and refuses a `..` that leads out of it,
    /// symbolic links and magic links. The directory itself may be reached through links.
    ///
    /// On other platforms than unix, opening fails with [`super::Error::Unsupported`].
    pub beneath: Option<PathBuf>,
}

impl Access {
    /// Returns the mode for reading, with the locks that QEMU takes for a backing file.
    #[must_use]
    pub fn read() -> Self {
        Self { write: false, lock: LockMode::Read, beneath: None }
    }

    /// Returns the mode for reading and writing, with the locks that QEMU takes for a disk in use.
    #[must_use]
    pub fn write() -> Self {
        Self { write: true, lock: LockMode::Write, beneath: None }
    }

    /// Sets the image locks. Default: those of [`Access::read`] or [`Access::write`].
    #[must_use]
    pub fn with_lock(mut self, lock: LockMode) -> Self {
        self.lock = lock;
        self
    }

    /// Sets the directory that the path must be in. Default: none.
    #[must_use]
    pub fn with_beneath(mut self, directory: impl Into<PathBuf>) -> Self {
        self.beneath = Some(directory.into());
        self
    }
}

/// The kind of a directory entry, see [`FileSystem::entry`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum EntryKind {
    /// No entry of this name, or no such directory.
    Missing,
    /// A regular file.
    File,
    /// A block device.
    BlockDevice,
    /// A symbolic link, even one with a missing target.
    Link,
    /// A directory, or any other entry.
    Other,
}

/// The treatment of attributes that cannot be set on a new file, see
/// [`FileSystem::create_new_like`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Attributes {
    /// Fails, and removes the new file.
    Require,
    /// Skips the attribute. The permissions are reduced so that the file is still not more
    /// accessible than its model.
    BestEffort,
}

/// Directories and the files in them: a file system, or a test's model of one.
///
/// A name is durable only after [`FileSystem::sync_dir`] of its directory, content only after
/// [`Storage::sync`].
pub trait FileSystem: Send + Sync + fmt::Debug {
    /// Opens an existing regular file or block device.
    ///
    /// # Errors
    /// - [`super::Error::Io`]: it does not exist or cannot be opened.
    /// - [`super::Error::Busy`]: another program's locks forbid it.
    /// - [`super::Error::Refused`]: it is outside of `access.beneath`, or neither a regular file
    ///   nor a block device.
    fn open(&self, path: &Path, access: &Access) -> Result<Arc<dyn Storage>>;

    /// Creates a new, empty file for writing, with a writer's locks where the platform has them.
    ///
    /// # Errors
    /// [`super::Error::Io`]: the name is taken, or the file cannot be created.
    fn create_new(&self, path: &Path) -> Result<Arc<dyn Storage>>;

    /// Creates a new, empty file as [`FileSystem::create_new`] does, with the access rights of
    /// `model`.
    ///
    /// On unix the new file gets owner, group and permissions of [`Storage::as_file`] of the model;
    /// on Linux also its POSIX ACL, its extended attributes and its security label. The set-id and
    /// sticky bits, `security.capability`, `security.ima`, `security.evm` and a default ACL are not
    /// copied. Of a block device, owner, group, security label and the permissions without
    /// execution are copied, because the rest belongs to the device node.
    ///
    /// At no instant is the new file more accessible than the model: it is created with mode 0600,
    /// and its permissions are set last. By default, and where the model has no file of the
    /// operating system, this is [`FileSystem::create_new`].
    ///
    /// # Errors
    /// - [`super::Error::Io`]: the name is taken.
    /// - [`super::Error::Attribute`]: an attribute of the model cannot be set and `attributes` is
    ///   [`Attributes::Require`], or the file system gives others access that the model does not.
    ///   The new file is removed again.
    fn create_new_like(&self, path: &Path, _model: &dyn Storage, _attributes: Attributes) -> Result<Arc<dyn Storage>> {
        self.create_new(path)
    }

    /// Checks if [`FileSystem::create_new_like`] with [`Attributes::Require`] would succeed in a
    /// directory.
    ///
    /// On Linux the attributes are set on a file without a name, which vanishes when it is closed.
    /// Where the file system has no such files, only write access to the directory is checked. The
    /// default accepts everything.
    ///
    /// # Errors
    /// - [`super::Error::Attribute`]: an attribute of the model cannot be set.
    /// - [`super::Error::Io`]: no file can be created in the directory.
    fn check_create_like(&self, _directory: &Path, _model: &dyn Storage) -> Result<()> {
        Ok(())
    }

    /// Renames a file in one step. A file of the new name is replaced.
    ///
    /// # Errors
    /// [`super::Error::Io`].
    fn rename(&self, from: &Path, to: &Path) -> Result<()>;

    /// Removes a name.
    ///
    /// # Errors
    /// [`super::Error::Io`].
    fn unlink(&self, path: &Path) -> Result<()>;

    /// Checks if [`FileSystem::unlink`] would be permitted, without removing anything.
    ///
    /// On unix the directory must be writable, and in a sticky directory the file or the directory
    /// must belong to the effective user. On Linux neither may be immutable or append-only. The
    /// default accepts everything.
    ///
    /// # Errors
    /// [`super::Error::Io`]: the name may not be removed, or does not exist.
    fn check_unlink(&self, _path: &Path) -> Result<()> {
        Ok(())
    }

    /// Makes the names in a directory durable.
    ///
    /// Where the file system has no such call (some network file systems), the names are as durable
    /// as the file system makes them by itself, and this succeeds.
    ///
    /// # Errors
    /// [`super::Error::Io`].
    fn sync_dir(&self, directory: &Path) -> Result<()>;

    /// Returns the paths of the files in a directory (`directory` and the name), sorted, without
    /// subdirectories.
    ///
    /// # Errors
    /// [`super::Error::Io`].
    fn list(&self, directory: &Path) -> Result<Vec<PathBuf>>;

    /// Lists the files in a directory that [`FileSystem::open`] may open, without opening any, sorted.
    ///
    /// FIFOs, sockets and character devices are left out as far as their types are known: to open
    /// one can have effects of its own. The default returns all of [`FileSystem::list`].
    ///
    /// # Errors
    /// [`super::Error::Io`].
    fn list_openable(&self, directory: &Path) -> Result<Vec<ListedFile>> {
        let file = |path| ListedFile { path, link: false, block_device: false };
        Ok(self.list(directory)?.into_iter().map(file).collect())
    }

    /// Returns `true` if a directory entry exists, even a symbolic link with a missing target.
    ///
    /// # Errors
    /// [`super::Error::Io`]: the entry cannot be examined. A missing directory is no error.
    fn exists(&self, path: &Path) -> Result<bool>;

    /// Returns the kind of a directory entry, without following a symbolic link at its end.
    ///
    /// By default every entry that exists is a regular file.
    ///
    /// # Errors
    /// [`super::Error::Io`]: the entry cannot be examined. A missing entry or directory is no
    /// error.
    fn entry(&self, path: &Path) -> Result<EntryKind> {
        Ok(if self.exists(path)? { EntryKind::File } else { EntryKind::Missing })
    }

    /// Checks if a directory is part of the device file system in memory, where nothing durable may
    /// be put.
    ///
    /// True on devtmpfs, and in `/dev` except for file systems that are mounted there (`/dev/shm`).
    /// Other file systems in memory are the caller's choice and give `false`, which is also the
    /// default.
    ///
    /// # Errors
    /// [`super::Error::Io`]: the directory cannot be examined.
    fn is_memory_backed(&self, _directory: &Path) -> Result<bool> {
        Ok(false)
    }

    /// Returns the path without links and the identity of an existing file, without opening it.
    ///
    /// The default is for file systems without links: it removes `.` and `..` from the path.
    ///
    /// # Errors
    /// [`super::Error::Io`]: there is no such file.
    fn resolve(&self, path: &Path) -> Result<Resolved> {
        let mut plain = PathBuf::new();
        for component in path.components() {
            match component {
                Component::CurDir => {}
                Component::ParentDir if plain.file_name().is_some() => {
                    plain.pop();
                }
                other => plain.push(other),
            }
        }
        Ok(Resolved { path: plain, file: None })
    }
}

/// A file in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedFile {
    /// The directory as it was given, and the name.
    pub path: PathBuf,
    /// The name is a symbolic link.
    pub link: bool,
    /// The file, through links, is known to be a block device.
    pub block_device: bool,
}

/// The file that a path leads to, see [`FileSystem::resolve`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// The path without symbolic links, `.` and `..`.
    pub path: PathBuf,
    /// The identity of the file, equal to [`Storage::file_id`] of the opened file. `None` where the
    /// system has none.
    pub file: Option<FileId>,
}

/// The file systems of the operating system.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostFileSystem;

/// Returns a directory as system calls take it: the empty parent of a bare name is the current
/// directory.
fn or_current(directory: &Path) -> &Path {
    if directory.as_os_str().is_empty() { Path::new(".") } else { directory }
}

/// Checks for the errors of a name that does not exist.
fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

fn failed(path: &Path, action: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    move |error| Error::io(&path.display().to_string(), action, 0, error)
}

impl FileSystem for HostFileSystem {
    fn open(&self, path: &Path, access: &Access) -> Result<Arc<dyn Storage>> {
        Ok(Arc::new(FileStorage::open(path, access)?))
    }

    fn create_new(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        Ok(Arc::new(FileStorage::create_new(path)?))
    }

    fn create_new_like(&self, path: &Path, model: &dyn Storage, attributes: Attributes) -> Result<Arc<dyn Storage>> {
        #[cfg(unix)]
        if let Some(model) = model.as_file() {
            return Ok(Arc::new(attributes::create(path, model, attributes)?));
        }
        let _ = (model, attributes);
        self.create_new(path)
    }

    #[cfg(unix)]
    fn check_create_like(&self, directory: &Path, model: &dyn Storage) -> Result<()> {
        attributes::check(or_current(directory), model.as_file())
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        std::fs::rename(from, to).map_err(failed(from, format!("rename it to {}", to.display())))
    }

    fn unlink(&self, path: &Path) -> Result<()> {
        std::fs::remove_file(path).map_err(failed(path, "remove it"))
    }

    #[cfg(unix)]
    fn check_unlink(&self, path: &Path) -> Result<()> {
        let directory = or_current(path.parent().unwrap_or(path));
        sys::check_removable(directory, path).map_err(failed(path, "remove it"))
    }

    fn sync_dir(&self, directory: &Path) -> Result<()> {
        let directory = or_current(directory);
        sys::sync_dir(directory).map_err(failed(directory, "make its names durable"))
    }

    fn list(&self, directory: &Path) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(or_current(directory)).map_err(failed(directory, "list it"))? {
            let entry = entry.map_err(failed(directory, "list it"))?;
            if !entry.file_type().map_err(failed(&entry.path(), "look at it"))?.is_dir() {
                files.push(directory.join(entry.file_name()));
            }
        }
        files.sort_unstable();
        Ok(files)
    }

    fn list_openable(&self, directory: &Path) -> Result<Vec<ListedFile>> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(or_current(directory)).map_err(failed(directory, "list it"))? {
            let entry = entry.map_err(failed(directory, "list it"))?;
            let path = directory.join(entry.file_name());
            let kind = match entry.file_type() {
                Ok(kind) => kind,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(failed(&path, "look at it")(error)),
            };
            // The type of a regular file comes with its name; any other costs one more call.
            let block_device = if kind.is_file() {
                false
            } else {
                match std::fs::metadata(&path).map(|metadata| sys::kind(&metadata)) {
                    Ok(sys::Kind::BlockDevice) => true,
                    Ok(sys::Kind::Other(_)) => continue,
                    // After an error, opening it will report the reason.
                    Ok(sys::Kind::Regular) | Err(_) => false,
                }
            };
            files.push(ListedFile { path, link: kind.is_symlink(), block_device });
        }
        // By letters, which is much cheaper than by components.
        files.sort_unstable_by(|a, b| a.path.as_os_str().cmp(b.path.as_os_str()));
        Ok(files)
    }

    fn exists(&self, path: &Path) -> Result<bool> {
        // A symbolic link with a missing target exists too.
        match std::fs::symlink_metadata(path) {
            Ok(_) => Ok(true),
            Err(error) if is_missing(&error) => Ok(false),
            Err(error) => Err(failed(path, "look for it")(error)),
        }
    }

    fn entry(&self, path: &Path) -> Result<EntryKind> {
        match std::fs::symlink_metadata(path) {
            Ok(metadata) => Ok(sys::entry(&metadata)),
            Err(error) if is_missing(&error) => Ok(EntryKind::Missing),
            Err(error) => Err(failed(path, "look for it")(error)),
        }
    }

    fn is_memory_backed(&self, directory: &Path) -> Result<bool> {
        let directory = or_current(directory);
        sys::is_device_tree(directory).map_err(failed(directory, "find its file system"))
    }

    fn resolve(&self, path: &Path) -> Result<Resolved> {
        let plain = or_current(path).canonicalize().map_err(failed(path, "look for it"))?;
        let file = std::fs::metadata(&plain).ok().and_then(|metadata| sys::file_id(&metadata));
        Ok(Resolved { path: plain, file })
    }
}

#[cfg(test)]
#[cfg(unix)]
mod tests;
