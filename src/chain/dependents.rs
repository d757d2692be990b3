//! Search for images outside an operation that depend on its files.
//!
//! A merge changes a file that other images may be backed by. The search reads the header of every
//! image in some directories and compares the file names in it with the files of the operation.
//! It is exact about files (compared by device and inode, through links) and errs on the safe side
//! about names whose meaning depends on QEMU's working directory.
//!
//! # Cost
//! Each search reads all headers again; nothing is kept from one search to the next. A file costs an
//! open, two calls for its status, one read of 1 KiB and a close. A name costs no further call if it
//! leads to a file that was just read, and names that many images share are resolved once. Large
//! directories are read by several threads. A directory of 10,000 images cost 80 ms of processor
//! time, in 45 to 66 ms on a virtual machine with two processors (ext4, inodes and headers in the
//! page cache, little other load), and took 0.6 to 0.8 s right after the file system was mounted.
//! The cost depends on the number of files, not on their sizes, and is bounded by
//! [`DependentSearch::max_files`]. An operation should search once for all its files.
//!
//! There is no cache. Its entries would be valid only while inode, size, mtime and ctime of a file
//! are unchanged, so a search would still list the directory and ask for the status of each file:
//! on one thread a quarter of the time of the whole search. A file's times move in steps of a timer
//! tick, or by a server's clock, so a header that is changed right after it was read could be
//! missed. A missed dependent costs data, a repeated search costs milliseconds.
//!
//! # Limits
//! - Only qcow2 images (and version 1 of the format) are read. VMDK, VHDX, VDI and QED are not.
//! - Only the named directories are read, without their subdirectories.
//! - Block devices are read only in [`DependentSearch::directories`], never in the directory of a
//!   file, so that `/dev` is not searched. Other special files are never opened.
//! - Images that are opened with a backing file on QEMU's command line do not name it.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, ScopedJoinHandle};

use crate::storage::{self, Access, FileId, FileSystem, ListedFile, LockMode};

use super::error::{Error, Result};
use super::policy::path_from_bytes;
use header::HeaderNames;
use names::FileName;

mod header;
mod names;

/// The number of threads that read the headers of a large directory. More than there are
/// processors: on a cold cache or a network file system most of the time is latency.
const THREADS: usize = 8;
/// The number of files from which on a directory is read by several threads.
const PARALLEL_FROM: usize = 512;

/// Options of the search for images outside an operation that depend on its files.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DependentSearch {
    /// Enables the search. Default: `true`.
    pub enabled: bool,
    /// Directories to search in addition to those of the files. Default: none.
    ///
    /// Block devices are read here, for logical volumes that hold images.
    pub directories: Vec<PathBuf>,
    /// The largest number of files that one search reads, in all directories together. A search
    /// that would read more is refused before it reads any. Default: 100,000.
    pub max_files: usize,
}

impl Default for DependentSearch {
    fn default() -> Self {
        Self { enabled: true, directories: Vec::new(), max_files: 100_000 }
    }
}

impl DependentSearch {
    /// Returns options that switch the search off: it finds nothing and reads nothing.
    #[must_use]
    pub fn disabled() -> Self {
        Self { enabled: false, ..Self::default() }
    }

    /// Adds a directory to search. Default: only the directories of the files.
    #[must_use]
    pub fn with_directory(mut self, directory: impl Into<PathBuf>) -> Self {
        self.directories.push(directory.into());
        self
    }

    /// Sets the largest number of files that one search reads. Default: 100,000.
    #[must_use]
    pub fn with_max_files(mut self, files: usize) -> Self {
        self.max_files = files;
        self
    }
}

/// An image outside an operation that depends on one of its files.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ExternalDependent {
    /// The path of the image: the searched directory and its name there.
    pub image: PathBuf,
    /// The file that it names as its backing file or data file, as the caller wrote it.
    pub file: PathBuf,
}

/// Finds the images that name one of `files` as their backing file or external data file.
///
/// Searches the directories of `files` (both the directory in the path and, behind a link, the
/// directory of the file itself) and `search.directories`. Images in `own` do not count. The result
/// is sorted by image; an image with several names is reported once. It is empty if the search is
/// disabled.
///
/// Files are compared by identity (device and inode), so links to files and directories and hard
/// links are followed; where a file has no identity, or does not exist, resolved paths are
/// compared. A header counts if its names are readable, even if this library cannot open the image
/// (unknown features, encryption). QEMU resolves relative names in `json:` and `file:` names and in
/// the names of data files from its own working directory, which is not known here. Such a name
/// counts if its last component is the name of the file.
///
/// # Errors
/// - [`Error::DependentsUnknown`]: a directory, a file in it, or the file that an image names cannot
///   be examined. Files that vanish during the search are skipped.
/// - [`Error::DependentsLimit`]: there are more files than [`DependentSearch::max_files`].
///
/// ```
/// use std::path::PathBuf;
/// use std::sync::Arc;
/// use qcow2_chain::chain::{DependentSearch, find_dependents};
/// use qcow2_chain::image::{CreateOptions, Image};
/// use qcow2_chain::storage::{FileSystem, MemoryFileSystem, MemoryStorage};
///
/// let disk = Arc::new(MemoryStorage::new("clone.qcow2"));
/// let options = CreateOptions::new(1 << 20).with_backing("base.qcow2", "qcow2");
/// Image::create(Arc::clone(&disk) as _, &options)?.close()?;
/// let files = MemoryFileSystem::new();
/// files.insert("/pool/clone.qcow2", disk);
/// files.insert("/pool/base.qcow2", Arc::default());
/// let files: Arc<dyn FileSystem> = Arc::new(files);
///
/// let base = [PathBuf::from("/pool/base.qcow2")];
/// let found = find_dependents(&files, &base, &base, &DependentSearch::default())?;
/// assert_eq!(found[0].image, PathBuf::from("/pool/clone.qcow2"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn find_dependents(
    file_system: &Arc<dyn FileSystem>,
    files: &[PathBuf],
    own: &[PathBuf],
    search: &DependentSearch,
) -> Result<Vec<ExternalDependent>> {
    if !search.enabled {
        return Ok(Vec::new());
    }
    let file_system = &**file_system;
    let resolve = |path: &PathBuf| Identity::of(file_system, path).map_err(|error| unknown(path, error));
    let mut sought = Vec::new();
    let mut directories = Vec::new();
    for path in files {
        let identity = resolve(path)?;
        directories.extend([path, &identity.path].map(|path| (path.parent().unwrap_or(path).to_owned(), false)));
        sought.push(Sought { path: path.clone(), identity });
    }
    directories.extend(search.directories.iter().map(|directory| (directory.clone(), true)));
    let own = own.iter().map(resolve).collect::<Result<Vec<_>>>()?;
    search_directories(file_system, &sought, &own, directories, search.max_files)
}

/// Finds the images in some directories that name one of `sought`. The flag of a directory allows
/// block devices in it.
///
/// # Errors
/// As [`find_dependents`].
pub(crate) fn search_directories(
    file_system: &dyn FileSystem,
    sought: &[Sought],
    own: &[Identity],
    directories: impl IntoIterator<Item = (PathBuf, bool)>,
    max_files: usize,
) -> Result<Vec<ExternalDependent>> {
    if sought.is_empty() {
        return Ok(Vec::new());
    }
    let directories = list(file_system, directories, max_files)?;
    let read = |listed: Listed| listed.read(file_system, own);
    let directories: Vec<_> = directories.into_iter().map(read).collect::<Result<_>>()?;
    Comparison { file_system, sought, directories: &directories, parents: HashMap::new() }.dependents(own)
}

/// A file that images may depend on.
#[derive(Clone, Debug)]
pub(crate) struct Sought {
    /// The path as the caller wrote it.
    pub(crate) path: PathBuf,
    pub(crate) identity: Identity,
}

/// The identity of a file, which may not exist.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    /// The path without links.
    pub(crate) path: PathBuf,
    /// The identity of the file; none if it does not exist or the system has none.
    pub(crate) file: Option<FileId>,
}

impl Identity {
    /// Resolves a path. A file that does not exist is identified by its directory and its name.
    pub(crate) fn of(file_system: &dyn FileSystem, path: &Path) -> storage::Result<Self> {
        let error = match file_system.resolve(path) {
            Ok(found) => return Ok(Self { path: found.path, file: found.file }),
            Err(error) => error,
        };
        match path.file_name() {
            Some(name) if is_absent(&error) => {
                let directory = file_system.resolve(path.parent().unwrap_or(Path::new("")))?;
                Ok(Self { path: directory.path.join(name), file: None })
            }
            _ => Err(error),
        }
    }

    /// Returns `true` if both are the same file.
    pub(crate) fn is(&self, other: &Self) -> bool {
        match (self.file, other.file) {
            (Some(a), Some(b)) => a == b,
            _ => self.path == other.path,
        }
    }
}

/// Returns `true` if an error means that a path leads to no file.
fn is_absent(error: &storage::Error) -> bool {
    use std::io::ErrorKind::{InvalidFilename, InvalidInput, NotADirectory, NotFound};
    let storage::Error::Io { source, .. } = error else { return false };
    #[cfg(unix)]
    if source.raw_os_error() == Some(nix::libc::ELOOP) {
        return true;
    }
    matches!(source.kind(), NotFound | NotADirectory | InvalidFilename | InvalidInput)
}

fn unknown(file: &Path, source: storage::Error) -> Error {
    Error::DependentsUnknown { file: file.display().to_string(), source }
}

/// A directory and the files to read in it.
struct Listed {
    path: PathBuf,
    identity: Identity,
    /// Block devices are read too.
    devices: bool,
    files: Vec<ListedFile>,
}

/// Lists directories, each once. Reads no file.
fn list(
    file_system: &dyn FileSystem,
    directories: impl IntoIterator<Item = (PathBuf, bool)>,
    max_files: usize,
) -> Result<Vec<Listed>> {
    let mut distinct: Vec<(PathBuf, Identity, bool)> = Vec::new();
    for (path, devices) in directories {
        let found = file_system.resolve(&path).map_err(|error| unknown(&path, error))?;
        let identity = Identity { path: found.path, file: found.file };
        match distinct.iter_mut().find(|(_, known, _)| known.is(&identity)) {
            Some(known) => known.2 |= devices,
            None => distinct.push((path, identity, devices)),
        }
    }
    let mut listed = Vec::new();
    let mut total = 0;
    for (path, identity, devices) in distinct {
        let mut files = file_system.list_openable(&path).map_err(|error| unknown(&path, error))?;
        files.retain(|file| devices || !file.block_device);
        total += files.len();
        if total > max_files {
            let directory = path.display().to_string();
            return Err(Error::DependentsLimit { directory, found: total, limit: max_files });
        }
        listed.push(Listed { path, identity, devices, files });
    }
    Ok(listed)
}

/// A directory whose files have been read.
struct Directory {
    path: PathBuf,
    identity: Identity,
    /// The identities of the files that were opened, by their names.
    opened: HashMap<OsString, FileId>,
    images: Vec<Found>,
}

/// An image that names other files.
struct Found {
    path: PathBuf,
    file: Option<FileId>,
    link: bool,
    names: HeaderNames,
}

/// The identity of a file and the names in its header; `None` for a file that was skipped.
type Header = Option<(Option<FileId>, HeaderNames)>;

impl Listed {
    /// Reads the headers of all files but those in `own`.
    fn read(mut self, file_system: &dyn FileSystem, own: &[Identity]) -> Result<Directory> {
        let (mut opened, mut images) = (HashMap::new(), Vec::new());
        let known: HashMap<&Path, FileId> =
            own.iter().filter_map(|own| Some((own.path.as_path(), own.file?))).collect();
        self.files.retain(|listed| {
            let Some(name) = listed.path.file_name().filter(|_| !listed.link) else { return true };
            let Some(file) = known.get(self.identity.path.join(name).as_path()) else { return true };
            opened.insert(name.to_owned(), *file);
            false
        });
        let headers = self.headers(file_system)?;
        for (listed, header) in self.files.into_iter().zip(headers) {
            let Some((file, names)) = header else { continue };
            opened.extend(listed.path.file_name().map(OsStr::to_owned).zip(file));
            if names != HeaderNames::default() {
                images.push(Found { path: listed.path, file, link: listed.link, names });
            }
        }
        Ok(Directory { path: self.path, identity: self.identity, opened, images })
    }

    /// Reads the headers of all files, in their order.
    fn headers(&self, file_system: &dyn FileSystem) -> Result<Vec<Header>> {
        let read = |files: &[ListedFile]| -> Result<Vec<Header>> {
            files.iter().map(|file| read_header(file_system, file, self.devices)).collect()
        };
        if self.files.len() < PARALLEL_FROM {
            return read(&self.files);
        }
        let read = &read;
        let parts = thread::scope(|scope| {
            let start = |files| thread::Builder::new().spawn_scoped(scope, move || read(files)).map_err(|_| files);
            let threads: Vec<_> = self.files.chunks(self.files.len().div_ceil(THREADS)).map(start).collect();
            let wait = |thread: std::result::Result<ScopedJoinHandle<'_, Result<Vec<Header>>>, _>| match thread {
                Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                // No more threads: this one does the work.
                Err(files) => read(files),
            };
            threads.into_iter().map(wait).collect::<Result<Vec<_>>>()
        });
        Ok(parts?.concat())
    }
}

/// Reads the identity of a file and the names in its header. Returns `None` for a file that has
/// vanished or is of a type that holds no image.
fn read_header(file_system: &dyn FileSystem, file: &ListedFile, devices: bool) -> Result<Header> {
    let storage = match file_system.open(&file.path, &Access::read().with_lock(LockMode::None)) {
        Ok(storage) => storage,
        Err(storage::Error::Refused { .. }) => return Ok(None),
        Err(error) if is_absent(&error) => return Ok(None),
        Err(error) => return Err(unknown(&file.path, error)),
    };
    // Not every file system states the type in its listing.
    if !devices && storage.is_fixed_size() {
        return Ok(None);
    }
    let names = HeaderNames::read(&*storage).map_err(|error| unknown(&file.path, error))?;
    Ok(Some((storage.file_id(), names)))
}

/// The comparison of the names in headers with the files that are sought.
struct Comparison<'a> {
    file_system: &'a dyn FileSystem,
    sought: &'a [Sought],
    directories: &'a [Directory],
    /// The searched directory that a path leads to, if any.
    parents: HashMap<PathBuf, Option<&'a Directory>>,
}

impl Comparison<'_> {
    fn dependents(mut self, own: &[Identity]) -> Result<Vec<ExternalDependent>> {
        let mut dependents = Vec::new();
        let mut reported = HashSet::new();
        for directory in self.directories {
            // Many images of a directory name the same file.
            let mut known = HashMap::new();
            for image in &directory.images {
                let failed = |error| unknown(&image.path, error);
                let files = self.named_by(directory, image, &mut known).map_err(failed)?;
                if files.is_empty() || self.is_own(image, own).map_err(failed)? {
                    continue;
                }
                for file in files.into_iter().filter_map(|index| self.sought.get(index)) {
                    // An image with several names is reported once.
                    if image.file.is_none_or(|image| reported.insert((image, &file.path))) {
                        dependents.push(ExternalDependent { image: image.path.clone(), file: file.path.clone() });
                    }
                }
            }
        }
        dependents.sort();
        dependents.dedup();
        Ok(dependents)
    }

    fn is_own(&self, image: &Found, own: &[Identity]) -> storage::Result<bool> {
        let identity = match image.file {
            Some(_) => Identity { path: image.path.clone(), file: image.file },
            None => Identity::of(self.file_system, &image.path)?,
        };
        Ok(own.iter().any(|own| own.is(&identity)))
    }

    /// Returns the indices of the sought files that an image depends on. `known` has the results of
    /// other images in the directory, by the name in the header.
    fn named_by<'d>(
        &mut self,
        directory: &Directory,
        image: &'d Found,
        known: &mut HashMap<(&'d [u8], bool), Vec<usize>>,
    ) -> storage::Result<Vec<usize>> {
        let mut files = Vec::new();
        for (name, is_data_file) in image.names.iter() {
            // The same name means other files where an image is a link.
            if let Some(same) = known.get(&(name, is_data_file)).filter(|_| !image.link) {
                files.extend(same);
                continue;
            }
            let found = self.named(directory, image, name, is_data_file)?;
            files.extend(&found);
            if !image.link {
                known.insert((name, is_data_file), found);
            }
        }
        Ok(files)
    }

    /// Returns the indices of the sought files that a name in an image's header leads to.
    fn named(
        &mut self,
        directory: &Directory,
        image: &Found,
        name: &[u8],
        is_data_file: bool,
    ) -> storage::Result<Vec<usize>> {
        let mut found = Vec::new();
        for FileName { path, anywhere } in names::parse(name, is_data_file) {
            let Some(path) = path_from_bytes(&path) else { continue };
            let target = directory.path.join(path);
            found.extend(self.lead_to(&target)?);
            if path.is_relative() && image.link {
                // The image may also be opened by its own path, which gives the name another meaning.
                let own = self.file_system.resolve(&image.path)?.path;
                found.extend(self.lead_to(&own.parent().unwrap_or(&own).join(path))?);
            }
            if let Some(name) = path.file_name().filter(|_| anywhere && path.is_relative()) {
                let is_called = |sought: &Sought| {
                    [&sought.path, &sought.identity.path].iter().any(|file| file.file_name() == Some(name))
                };
                found.extend((0..).zip(self.sought).filter(|(_, sought)| is_called(sought)).map(|(index, _)| index));
            }
        }
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }

    /// Returns the indices of the sought files that a path leads to.
    fn lead_to(&mut self, path: &Path) -> storage::Result<Vec<usize>> {
        let identity = match self.opened(path) {
            Some(identity) => identity,
            None => match Identity::of(self.file_system, path) {
                Ok(identity) => identity,
                Err(error) if is_absent(&error) => return Ok(Vec::new()),
                Err(error) => return Err(error),
            },
        };
        let same = (0..).zip(self.sought).filter(|(_, sought)| sought.identity.is(&identity));
        Ok(same.map(|(index, _)| index).collect())
    }

    /// Returns the identity of a file that this search has opened.
    fn opened(&mut self, path: &Path) -> Option<Identity> {
        let (parent, name) = (path.parent()?, path.file_name()?);
        let directory = if let Some(known) = self.parents.get(parent) {
            (*known)?
        } else {
            let found = Identity::of(self.file_system, parent).ok();
            let directory = found.and_then(|found| self.directories.iter().find(|known| known.identity.is(&found)));
            self.parents.insert(parent.to_owned(), directory);
            directory?
        };
        let file = directory.opened.get(name)?;
        Some(Identity { path: directory.identity.path.join(name), file: Some(*file) })
    }
}
