//! The files that the catalogue names, and no others: opened by the recorded path in the recorded format, whatever their headers
//! say, and refused where a header says something else.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Refusal, Result};
use crate::chain::{Chain, Format, Layer, Node};
use crate::format::HeaderCluster;
use crate::image::{self, Image, OpenOptions, RawImage};
use crate::storage::{self, Access, FileSystem, LockMode, Storage};
use crate::vm::model::{Base, FileRef, Fingerprint, Model, OverlayShape, Volume};
use crate::vm::plan::MergeStep;

/// How much of a base's beginning goes into its fingerprint.
const HEADER_BYTES: u64 = 64 << 10;

/// Where the catalogue's paths start, and what they are names in.
#[derive(Clone, Debug)]
pub struct VolumeFiles {
    names: Arc<dyn FileSystem>,
    directory: PathBuf,
}

/// What a look at an image's header tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) virtual_size: u64,
    pub(crate) bytes_on_disk: Option<u64>,
    pub(crate) shape: Option<OverlayShape>,
}

/// How strictly headers are held to the records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Links {
    /// Each names the file recorded beneath it.
    Exact,
    /// A merge is under way: a header may name the second file beneath it already, with which the first is one.
    MaySkip,
}

impl VolumeFiles {
    /// The place where relative paths start at this directory.
    #[must_use]
    pub fn new(names: Arc<dyn FileSystem>, directory: impl Into<PathBuf>) -> Self {
        Self { names, directory: directory.into() }
    }

    /// What the paths are names in.
    #[must_use]
    pub fn names(&self) -> &Arc<dyn FileSystem> {
        &self.names
    }

    /// The path of a recorded file, from where this program is.
    #[must_use]
    pub fn path(&self, recorded: &str) -> PathBuf {
        self.directory.join(recorded)
    }

    /// The path to record for a file: relative where it lies beneath the catalogue's directory.
    pub(super) fn record(&self, path: &Path) -> Result<String> {
        let refused = |why| Refusal::Path { path: path.display().to_string(), why };
        let within = path.strip_prefix(&self.directory).ok().filter(|_| !self.directory.as_os_str().is_empty());
        let relative = within.map(Path::to_owned);
        let recorded = match relative {
            Some(relative) => relative,
            None if path.is_absolute() => path.to_owned(),
            None if self.directory.as_os_str().is_empty() => path.to_owned(),
            None => std::path::absolute(path).map_err(|_| refused("it cannot be made absolute"))?,
        };
        let text = recorded.to_str().ok_or_else(|| refused("it is not Unicode, as the catalogue must be"))?;
        if text.is_empty() {
            return Err(refused("it names no file").into());
        }
        Ok(text.to_owned())
    }

    /// How the header of one recorded file calls another: by name beside it, else by its whole path.
    pub(crate) fn backing_name(&self, of: &str, backing: &str) -> Vec<u8> {
        let (of, backing) = (self.path(of), self.path(backing));
        let beside = of.parent() == backing.parent();
        let name = backing.file_name().filter(|_| beside).map(PathBuf::from);
        let name = name.or_else(|| std::path::absolute(&backing).ok()).unwrap_or(backing);
        name.into_os_string().into_encoded_bytes()
    }

    pub(crate) fn exists(&self, recorded: &str) -> Result<bool> {
        Ok(self.names.exists(&self.path(recorded))?)
    }

    /// Whether two recorded paths lead to one file.
    pub(super) fn is_same(&self, a: &str, b: &str) -> bool {
        self.leads_to(&self.path(a), &self.path(b))
    }

    /// Whether two paths lead to one file.
    #[must_use]
    pub fn leads_to(&self, a: &Path, b: &Path) -> bool {
        if a == b {
            return true;
        }
        match (self.names.resolve(a), self.names.resolve(b)) {
            (Ok(a), Ok(b)) if a.file.is_some() && b.file.is_some() => a.file == b.file,
            (Ok(a), Ok(b)) => a.path == b.path,
            _ => false,
        }
    }

    /// Opens a recorded file's storage; a lock that cannot be had is a refusal.
    pub(crate) fn storage(&self, recorded: &str, access: &Access) -> Result<Arc<dyn Storage>> {
        self.names.open(&self.path(recorded), access).map_err(in_use)
    }

    /// Opens a recorded file as what it is recorded to be.
    pub(crate) fn layer(&self, file: &FileRef, write: bool) -> Result<Layer> {
        let access = if write { Access::write() } else { Access::read() };
        self.layer_as(file, &access)
    }

    fn layer_as(&self, file: &FileRef, access: &Access) -> Result<Layer> {
        let storage = self.storage(&file.path, access)?;
        let node = match file.format {
            Format::Qcow2 => Node::Qcow2(Image::open(storage, &OpenOptions::default().with_write(access.write))?),
            Format::Raw => Node::Raw(RawImage::open(storage)?),
        };
        Ok(Layer { node, path: self.path(&file.path) })
    }

    /// Opens recorded files, the topmost first, as one disk, `writable` of them for writing.
    pub(super) fn chain(&self, files: &[FileRef], writable: usize, links: Links) -> Result<Chain> {
        let mut layers = Vec::new();
        for (index, file) in files.iter().enumerate() {
            let layer = self.layer(file, index < writable)?;
            self.check_link(&layer, file, &files[index + 1..], links)?;
            layers.push(layer);
        }
        let mut layers = layers.into_iter();
        let nothing = || Refusal::Path { path: String::new(), why: "a disk of no files" };
        let top = layers.next().ok_or_else(nothing)?;
        Ok(Chain::from_layers(top, layers))
    }

    /// Refuses an image whose header names another backing file than the first of `below`, or gives it another format.
    pub(crate) fn check_link(&self, layer: &Layer, file: &FileRef, below: &[FileRef], links: Links) -> Result<()> {
        let Some(image) = layer.node.as_qcow2() else { return Ok(()) };
        let header = image.header();
        let mut found = self.check_names(&header, file, below.first());
        if found.is_err() && links == Links::MaySkip && !below.is_empty() {
            found = self.check_names(&header, file, below.get(1)).or(found);
        }
        Ok(found?)
    }

    fn check_names(&self, header: &HeaderCluster, file: &FileRef, below: Option<&FileRef>) -> Result<(), Refusal> {
        let path = || self.path(&file.path).display().to_string();
        let nothing = || "nothing".to_owned();
        let named = header.backing_file.as_ref().map(|name| String::from_utf8_lossy(name).into_owned());
        let agrees = match (&named, below) {
            (None, None) => true,
            (Some(name), Some(below)) => self.leads_to(&self.seen_from(file, name), &self.path(&below.path)),
            _ => false,
        };
        if !agrees {
            let recorded = below.map_or_else(nothing, |below| self.path(&below.path).display().to_string());
            return Err(Refusal::Disagreement { path: path(), found: named.unwrap_or_else(nothing), recorded });
        }
        let Some(below) = below else { return Ok(()) };
        let format = header.backing_format().map(|name| String::from_utf8_lossy(name).into_owned());
        if format.as_deref() != Some(below.format.name()) {
            let found = format.unwrap_or_else(nothing);
            let path = format!("{}: backing file", path());
            return Err(Refusal::Format { path, found, recorded: below.format.name().to_owned() });
        }
        Ok(())
    }

    /// Where a name in a file's header leads.
    fn seen_from(&self, file: &FileRef, name: &str) -> PathBuf {
        let path = self.path(&file.path);
        path.parent().unwrap_or(&path).join(name)
    }

    /// Opens a recorded file to look at, without a lock.
    pub(crate) fn look_layer(&self, file: &FileRef) -> Result<Layer> {
        self.layer_as(file, &Access::read().with_lock(LockMode::None))
    }

    /// Looks at an image's header without a lock: whoever holds it may be running.
    pub(crate) fn look(&self, file: &FileRef) -> Result<Facts> {
        let layer = self.layer_as(file, &Access::read().with_lock(LockMode::None))?;
        let shape = layer.node.as_qcow2().map(|image| OverlayShape {
            cluster_bits: image.geometry().cluster_bits().get(),
            extended_l2: image.geometry().extended_l2(),
        });
        let storage = layer.node.storage();
        let bytes_on_disk = storage.allocated_len()?;
        Ok(Facts { virtual_size: layer.node.virtual_size(), bytes_on_disk, shape })
    }

    /// Refuses a file that is not to be written, before an operation that would write it is begun: the one that nobody may
    /// write, by its mode, counts also for a program that could.
    pub(super) fn check_writable(&self, file: &FileRef) -> Result<()> {
        let refused = || Refusal::ReadOnly { path: self.path(&file.path).display().to_string() };
        let storage = match self.storage(&file.path, &Access::write().with_lock(LockMode::None)) {
            Ok(storage) => storage,
            Err(super::Error::Storage(storage::Error::Io { source, .. }))
                if source.kind() == std::io::ErrorKind::PermissionDenied
                    || source.kind() == std::io::ErrorKind::ReadOnlyFilesystem =>
            {
                return Err(refused().into());
            }
            Err(error) => return Err(error),
        };
        let mode = storage.as_file().and_then(|file| file.metadata().ok()).map(|metadata| metadata.permissions());
        if storage.is_read_only() || mode.is_some_and(|mode| mode.readonly()) {
            return Err(refused().into());
        }
        Ok(())
    }

    /// Keeps everybody else from using files until what is returned is dropped.
    pub(super) fn hold<'a>(&self, files: impl Iterator<Item = &'a FileRef>) -> Result<Vec<Arc<dyn Storage>>> {
        files.map(|file| self.hold_one(&file.path)).collect()
    }

    /// As [`VolumeFiles::hold`], for one recorded file.
    pub(super) fn hold_one(&self, recorded: &str) -> Result<Arc<dyn Storage>> {
        self.storage(recorded, &Access::read().with_lock(LockMode::Write))
    }

    /// Whether somebody has an overlay open, or it holds data of its own: then a VM has been writing it. One that cannot be
    /// read as an image, as its making was interrupted, holds none.
    pub(super) fn is_written(&self, file: &FileRef) -> Result<bool> {
        if !self.exists(&file.path)? {
            return Ok(false);
        }
        match self.hold_one(&file.path) {
            Err(super::Error::Refused(Refusal::InUse { .. })) => return Ok(true),
            Err(error) => return Err(error),
            Ok(_) => {}
        }
        let Ok(layer) = self.look_layer(file) else { return Ok(false) };
        let size = layer.node.virtual_size();
        let alone = Chain::from_layers(layer, []);
        Ok(alone.extents(0..size).map_while(Result::ok).any(|extent| extent.layer.is_some()))
    }

    /// Refuses a file whose header disagrees with the records, without a lock.
    pub(crate) fn check_head(&self, file: &FileRef, below: &[FileRef], links: Links) -> Result<()> {
        let layer = self.layer_as(file, &Access::read().with_lock(LockMode::None))?;
        self.check_link(&layer, file, below, links)
    }

    /// Whether a file's header names another by this name, and not by a second one that leads to it too.
    pub(crate) fn is_named_by(&self, file: &FileRef, below: &FileRef) -> Result<bool> {
        let layer = self.look_layer(file)?;
        let Some(image) = layer.node.as_qcow2() else { return Ok(true) };
        let header = image.header();
        let named = header.backing_file.as_ref().map(|name| self.seen_from(file, &String::from_utf8_lossy(name)));
        let plain = |path: &Path| self.names.resolve(path).map_or_else(|_| path.to_owned(), |found| found.path);
        Ok(named.is_some_and(|named| plain(&named) == plain(&self.path(&below.path))))
    }

    /// Whether the top of a merge does not stand on its base any more: it has taken it in.
    pub(super) fn has_pulled(&self, step: &MergeStep) -> Result<bool> {
        if !self.exists(&step.top.path)? {
            return Ok(true);
        }
        let base = std::slice::from_ref(&step.base);
        Ok(self.check_head(&step.top, base, Links::Exact).is_err()
            && self.check_head(&step.top, &step.below, Links::Exact).is_ok())
    }

    /// By what a file is recognised.
    pub(super) fn fingerprint(&self, file: &FileRef) -> Result<Fingerprint> {
        let layer = self.layer_as(file, &Access::read().with_lock(LockMode::None))?;
        let storage = layer.node.storage();
        let len = storage.len()?;
        let header = digest(&**storage, 0, len.min(HEADER_BYTES))?;
        let l1 = match layer.node.as_qcow2().map(Image::header) {
            Some(header) => {
                let at = header.header.l1_table_offset.get();
                digest(&**storage, at, 8 * u64::from(header.header.l1_size))?
            }
            None => 0,
        };
        Ok(Fingerprint { len, header, l1 })
    }

    /// Refuses a base that is not what it was.
    pub(super) fn check_base(&self, base: &Base) -> Result<()> {
        if self.fingerprint(&base.file)? == base.fingerprint {
            return Ok(());
        }
        Err(Refusal::BaseChanged { path: self.path(&base.file.path).display().to_string() }.into())
    }

    /// A volume's disk as it was at a snapshot, or is now: the files, and how strictly their headers are held to it.
    pub(super) fn disk(&self, model: &Model, volume: &Volume, files: &[FileRef]) -> Result<Chain> {
        volume.bases.iter().try_for_each(|base| self.check_base(base))?;
        let links = if model.merging().is_some() { Links::MaySkip } else { Links::Exact };
        self.chain(files, 0, links)
    }
}

/// A lock that cannot be had is a refusal with a name of its own.
fn in_use(error: storage::Error) -> super::Error {
    match error {
        storage::Error::Busy { name, held } => Refusal::InUse { path: name, held }.into(),
        error => error.into(),
    }
}

/// The CRC-32 of a range of a file.
fn digest(storage: &dyn Storage, from: u64, len: u64) -> Result<u32> {
    let mut digest = crc32fast::Hasher::new();
    let mut buf = vec![0; 64 << 10];
    let mut done = 0;
    while done < len {
        let part = usize::try_from(len - done).unwrap_or(usize::MAX).min(buf.len());
        storage.read_at(&mut buf[..part], from + done)?;
        digest.update(&buf[..part]);
        done += part as u64;
    }
    Ok(digest.finalize())
}

/// Gives back what an interrupted operation has left allocated and unused.
pub(super) fn give_back_leaks(storage: &dyn Storage) -> Result<()> {
    image::check(storage, &image::CheckOptions::default().with_fix(image::Fix::Leaks))?;
    storage.sync()?;
    Ok(())
}
