//! The seam for names: open, create, rename, unlink, and the sync of a directory.

use std::fmt;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use super::{Error, FileId, FileStorage, LockMode, Result, Storage, sys};

/// How a storage is opened by name.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Access {
    /// Whether it will be written.
    pub write: bool,
    /// Which of QEMU's image locks to take before anything is read.
    pub lock: LockMode,
    /// Where given, the path must lie in this directory and is resolved so that it cannot leave it.
    ///
    /// The path means the same file as without this field (a relative one starts at the current directory). By its
    /// letters it must have the directory as its beginning; what follows is resolved beneath the directory by the kernel
    /// (`openat2`, or component by component where that is missing), which refuses a `..` that leads out of it, symbolic
    /// links and magic links. The directory itself is the caller's and may be reached through links.
    /// [`super::Error::Unsupported`] where the platform is no unix.
    pub beneath: Option<PathBuf>,
}

impl Access {
    /// Reading only, with the locks that QEMU takes for a backing file.
    #[must_use]
    pub fn read() -> Self {
        Self { write: false, lock: LockMode::Read, beneath: None }
    }

    /// Reading and writing, with the locks that QEMU takes for a disk in use.
    #[must_use]
    pub fn write() -> Self {
        Self { write: true, lock: LockMode::Write, beneath: None }
    }

    /// The same with other locks.
    #[must_use]
    pub fn with_lock(mut self, lock: LockMode) -> Self {
        self.lock = lock;
        self
    }

    /// The same, kept beneath a directory.
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

/// The treatment of attributes that cannot be set on a new file, see [`FileSystem::create_new_like`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Attributes {
    /// Fails, and removes the new file.
    Require,
    /// Skips the attribute. The permissions are reduced so that the file is still not more accessible than its model.
    BestEffort,
}

/// Names of storages: a file system, or a test's model of one.
///
/// A name is durable only after [`FileSystem::sync_dir`] of its directory; bytes only after [`Storage::sync`].
pub trait FileSystem: Send + Sync + fmt::Debug {
    /// Opens an existing regular file or block device.
    ///
    /// # Errors
    /// [`super::Error::Io`] where it does not exist, [`super::Error::Busy`] where its locks are held,
    /// [`super::Error::Refused`] where it leaves `access.beneath` or is no regular file or block device.
    fn open(&self, path: &Path, access: &Access) -> Result<Arc<dyn Storage>>;

    /// Creates a new, empty file for writing, with a writer's locks where the platform has them.
    ///
    /// # Errors
    /// [`super::Error::Io`] where the name is taken.
    fn create_new(&self, path: &Path) -> Result<Arc<dyn Storage>>;

    /// Creates a new, empty file as [`FileSystem::create_new`] does, with the access rights of `model`.
    ///
    /// On unix the new file gets owner, group and permissions of [`Storage::as_file`] of the model; on Linux also its
    /// POSIX ACL, its extended attributes and its security label. The set-id and sticky bits, `security.capability`,
    /// `security.ima`, `security.evm` and a default ACL are not copied. Of a block device, owner, group, security
    /// label and the permissions without execution are copied, because the rest belongs to the device node.
    ///
    /// At no instant is the new file more accessible than the model: it is created with mode 0600, and its permissions
    /// are set last. By default, and where the model has no file of the operating system, this is
    /// [`FileSystem::create_new`].
    ///
    /// # Errors
    /// - [`super::Error::Io`]: the name is taken.
    /// - [`super::Error::Attribute`]: an attribute of the model cannot be set and `attributes` is
    ///   [`Attributes::Require`], or the file system gives others access that the model does not. The new file is
    ///   removed again.
    fn create_new_like(&self, path: &Path, _model: &dyn Storage, _attributes: Attributes) -> Result<Arc<dyn Storage>> {
        self.create_new(path)
    }

    /// Checks if [`FileSystem::create_new_like`] with [`Attributes::Require`] would succeed in a directory.
    ///
    /// On Linux the attributes are set on a file without a name, which vanishes when it is closed. Where the file
    /// system has no such files, only write access to the directory is checked. The default accepts everything.
    ///
    /// # Errors
    /// - [`super::Error::Attribute`]: an attribute of the model cannot be set.
    /// - [`super::Error::Io`]: no file can be created in the directory.
    fn check_create_like(&self, _directory: &Path, _model: &dyn Storage) -> Result<()> {
        Ok(())
    }

    /// Gives a file another name in one step, replacing what had it.
    ///
    /// # Errors
    /// [`super::Error::Io`].
    fn rename(&self, from: &Path, to: &Path) -> Result<()>;

    /// Gives a file a second name beside its own. The new name must be free.
    ///
    /// # Errors
    /// [`super::Error::Unsupported`] by default and where the file system has one name a file, [`super::Error::Io`].
    fn link(&self, from: &Path, _to: &Path) -> Result<()> {
        Err(Error::unsupported(&from.display().to_string(), "a second name of a file"))
    }

    /// Takes a name away.
    ///
    /// # Errors
    /// [`super::Error::Io`].
    fn unlink(&self, path: &Path) -> Result<()>;

    /// Returns when the names in a directory are durable.
    ///
    /// # Errors
    /// [`super::Error::Io`].
    fn sync_dir(&self, directory: &Path) -> Result<()>;

    /// The paths of the files in a directory (`directory` and the name), sorted. Directories are left out.
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

    /// Whether a name exists.
    ///
    /// # Errors
    /// [`super::Error::Io`] where that cannot be told.
    fn exists(&self, path: &Path) -> Result<bool>;

    /// Returns the kind of a directory entry, without following a symbolic link at its end.
    ///
    /// By default every entry that exists is a regular file.
    ///
    /// # Errors
    /// [`super::Error::Io`]: the entry cannot be examined. A missing entry or directory is no error.
    fn entry(&self, path: &Path) -> Result<EntryKind> {
        Ok(if self.exists(path)? { EntryKind::File } else { EntryKind::Missing })
    }

    /// Checks if a directory is part of the device file system in memory, where nothing durable may be put.
    ///
    /// True on devtmpfs, and in `/dev` except for file systems that are mounted there (`/dev/shm`). Other file systems
    /// in memory are the caller's choice and give `false`, which is also the default.
    ///
    /// # Errors
    /// [`super::Error::Io`]: the directory cannot be examined.
    fn is_memory_backed(&self, _directory: &Path) -> Result<bool> {
        Ok(false)
    }

    /// What an existing name stands for, without opening it: the path without links, and the file's identity. Names that
    /// have no links are resolved by their letters.
    ///
    /// # Errors
    /// [`super::Error::Io`] where there is no such file.
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

/// What a name stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// The path without symbolic links, `.` and `..`.
    pub path: PathBuf,
    /// The file's identity, where the system has one; the same as [`Storage::file_id`] of the opened file.
    pub file: Option<FileId>,
}

/// The operating system's file names.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostFileSystem;

/// A directory as the system takes it: the parent of a bare name is the current directory.
fn or_current(directory: &Path) -> &Path {
    if directory.as_os_str().is_empty() { Path::new(".") } else { directory }
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

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        std::fs::rename(from, to).map_err(failed(from, format!("rename it to {}", to.display())))
    }

    fn link(&self, from: &Path, to: &Path) -> Result<()> {
        std::fs::hard_link(from, to).map_err(|error| match error.kind() {
            // A system call that a file system lacks, or refuses by principle.
            io::ErrorKind::Unsupported | io::ErrorKind::PermissionDenied | io::ErrorKind::TooManyLinks => {
                Error::unsupported(&from.display().to_string(), "a second name of a file")
            }
            _ => failed(from, format!("link it to {}", to.display()))(error),
        })
    }

    fn unlink(&self, path: &Path) -> Result<()> {
        std::fs::remove_file(path).map_err(failed(path, "remove it"))
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
        // A symbolic link that leads nowhere is a name that is taken.
        match std::fs::symlink_metadata(path) {
            Ok(_) => Ok(true),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(false),
            Err(error) => Err(failed(path, "look for it")(error)),
        }
    }

    fn resolve(&self, path: &Path) -> Result<Resolved> {
        let plain = or_current(path).canonicalize().map_err(failed(path, "look for it"))?;
        let file = std::fs::metadata(&plain).ok().and_then(|metadata| sys::file_id(&metadata));
        Ok(Resolved { path: plain, file })
    }
}

#[cfg(test)]
#[cfg(unix)]
mod tests {
    use super::*;

    fn unlocked() -> Access {
        Access::read().with_lock(LockMode::None)
    }

    #[test]
    fn names_are_made_moved_listed_and_removed() {
        let directory = tempfile::tempdir().unwrap();
        let [a, b, sub] = ["a", "b", "sub"].map(|name| directory.path().join(name));
        std::fs::create_dir(&sub).unwrap();
        let created = HostFileSystem.create_new(&a).unwrap();
        created.write_at(b"image", 0).unwrap();
        assert!(HostFileSystem.exists(&a).unwrap() && !HostFileSystem.exists(&b).unwrap());
        assert!(!HostFileSystem.exists(&a.join("below a file")).unwrap());
        HostFileSystem.link(&a, &b).unwrap();
        assert_eq!(HostFileSystem.resolve(&a).unwrap().file, HostFileSystem.resolve(&b).unwrap().file);
        assert!(matches!(HostFileSystem.link(&a, &b), Err(Error::Io { .. })), "the name is taken");
        HostFileSystem.unlink(&b).unwrap();
        HostFileSystem.rename(&a, &b).unwrap();
        HostFileSystem.sync_dir(directory.path()).unwrap();
        std::os::unix::fs::symlink("nowhere", &a).unwrap();
        assert!(HostFileSystem.exists(&a).unwrap());
        assert_eq!(HostFileSystem.list(directory.path()).unwrap(), [a.clone(), b.clone()]);
        HostFileSystem.unlink(&a).unwrap();
        assert_eq!(HostFileSystem.open(&b, &unlocked()).unwrap().len().unwrap(), 5);
        HostFileSystem.sync_dir(Path::new("")).unwrap();
    }

    #[test]
    fn errors_tell_both_names() {
        let directory = tempfile::tempdir().unwrap();
        let [a, b] = ["a", "b"].map(|name| directory.path().join(name));
        let text = |error: Error| error.to_string();
        let renamed = text(HostFileSystem.rename(&a, &b).unwrap_err());
        assert_eq!(renamed, format!("{}: cannot rename it to {}", a.display(), b.display()));
        assert_eq!(text(HostFileSystem.unlink(&a).unwrap_err()), format!("{}: cannot remove it", a.display()));
        assert_eq!(text(HostFileSystem.list(&a).unwrap_err()), format!("{}: cannot list it", a.display()));
        assert!(text(HostFileSystem.sync_dir(&a).unwrap_err()).contains("make its names durable"));
    }

    /// A directory `top` with `a/b/image`, links of all kinds, and `outside` next to it.
    fn tree() -> (tempfile::TempDir, PathBuf) {
        let root = tempfile::tempdir().unwrap();
        let top = root.path().join("top");
        std::fs::create_dir_all(top.join("a/b")).unwrap();
        std::fs::create_dir_all(root.path().join("other/deep")).unwrap();
        std::fs::create_dir(root.path().join("other/top")).unwrap();
        std::fs::write(top.join("a/b/image"), b"inside").unwrap();
        std::fs::write(root.path().join("outside"), b"outside").unwrap();
        for (target, link) in [("../outside", "leaf"), ("..", "up"), ("a", "down"), ("/proc/self/fd", "magic")] {
            std::os::unix::fs::symlink(target, top.join(link)).unwrap();
        }
        std::os::unix::fs::symlink(&top, root.path().join("way")).unwrap();
        std::os::unix::fs::symlink(root.path().join("other/deep"), root.path().join("sideways")).unwrap();
        (root, top)
    }

    #[test]
    fn nothing_leads_out_of_a_directory() {
        let (root, top) = tree();
        let open = |path: PathBuf| HostFileSystem.open(&path, &unlocked().with_beneath(&top));
        for path in ["a/b/image", "a/../a/b/image", "./a//b/./image", "../top/a/b/image"] {
            assert_eq!(open(top.join(path)).unwrap().len().unwrap(), 6, "{path}");
        }
        let outside = [
            "../outside",
            "a/../../outside",
            "leaf",
            "up/outside",
            "up/top/a/b/image",
            "down/b/image",
            "magic/0",
            "a/../../../../../../../etc/passwd",
        ];
        for path in outside {
            let error = open(top.join(path)).unwrap_err();
            assert!(matches!(error, Error::Refused { .. }), "{path}: {error:?}");
        }
        for path in [root.path().join("outside"), PathBuf::from("/etc/passwd"), top.clone(), "outside".into()] {
            assert!(matches!(open(path.clone()), Err(Error::Refused { .. })), "{}", path.display());
        }
        let missing = open(top.join("a/none")).unwrap_err();
        assert_eq!(io::Error::from(missing).kind(), io::ErrorKind::NotFound);
        assert!(matches!(open(top.join("a")), Err(Error::Refused { .. })));
        // The way may go round by a sibling, unless a link on it makes the path mean another directory.
        assert!(open(root.path().join("other/../top/a/b/image")).is_ok());
        let error = open(root.path().join("sideways/../top/a/b/image")).unwrap_err();
        assert!(matches!(error, Error::Refused { .. }), "{error:?}");
    }

    #[test]
    fn a_name_is_resolved_through_its_links() {
        let (root, top) = tree();
        let plain = top.canonicalize().unwrap().join("a/b/image");
        let resolved = HostFileSystem.resolve(&root.path().join("way/down/../a/b/image")).unwrap();
        assert_eq!(resolved.path, plain);
        assert_eq!(resolved.file, HostFileSystem.open(&plain, &unlocked()).unwrap().file_id());
        assert!(HostFileSystem.resolve(&top.join("none")).is_err());
        assert_eq!(HostFileSystem.resolve(Path::new("")).unwrap().path, std::env::current_dir().unwrap());
    }

    #[test]
    fn the_directory_itself_may_be_reached_by_a_link() {
        let (root, _top) = tree();
        let way = root.path().join("way");
        let access = unlocked().with_beneath(&way);
        assert!(HostFileSystem.open(&way.join("a/b/image"), &access).is_ok());
        assert!(HostFileSystem.open(&way.join("down/b/image"), &access).is_err());
        // By its letters this lies elsewhere.
        assert!(HostFileSystem.open(&root.path().join("top/a/b/image"), &access).is_err());
    }

    #[test]
    fn beneath_is_kept_for_writers_too() {
        let (_root, top) = tree();
        let access = Access::write().with_lock(LockMode::None).with_beneath(&top);
        HostFileSystem.open(&top.join("a/b/image"), &access).unwrap().write_at(b"I", 0).unwrap();
        assert!(HostFileSystem.open(&top.join("leaf"), &access).is_err());
        assert!(HostFileSystem.open(&top.join("a"), &access).is_err());
    }
}
