//! The files that the catalogue names, and no others.
//!
//! A file is opened by its recorded path in its recorded format. A backing file name in a header is
//! compared with the records, and never followed.

mod fingerprint;
mod held;

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use super::model::{FileRef, Model, OverlayShape, Volume};
use super::plan::{MergeStep, NewOverlay};
use super::{Refusal, Result};
use crate::chain::{Chain, Format, Layer, Node};
use crate::format::HeaderCluster;
use crate::image::{self, Image, OpenOptions, RawImage};
use crate::storage::{self, Access, FileId, FileSystem, LockMode, MemoryStorage, Storage};

pub(in crate::vm) use held::{HeldFiles, Hold};

/// The unit that a medium writes as a whole, in bytes.
const SECTOR: usize = 512;

/// The recorded files of a set: a file system, and the directory at which recorded relative paths
/// start.
#[derive(Clone, Debug)]
pub struct VolumeFiles {
    file_system: Arc<dyn FileSystem>,
    directory: PathBuf,
    held: Arc<HeldFiles>,
}

/// The facts in an image's header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) virtual_size: u64,
    pub(crate) bytes_on_disk: Option<u64>,
    pub(crate) shape: Option<OverlayShape>,
}

/// The strictness with which headers are compared with the records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Links {
    /// Each header names the file recorded beneath it.
    Exact,
    /// A merge is under way: a header may name the second file beneath it already, into which the
    /// first is merged.
    MaySkip,
}

impl VolumeFiles {
    /// Creates the view of the files whose recorded relative paths start at `directory`.
    #[must_use]
    pub fn new(file_system: Arc<dyn FileSystem>, directory: impl Into<PathBuf>) -> Self {
        Self { file_system, directory: directory.into(), held: Arc::default() }
    }

    /// Returns a view with files of its own to hold locked, for one operation.
    pub(in crate::vm) fn for_operation(&self) -> Self {
        Self { held: Arc::default(), ..self.clone() }
    }

    /// Returns the files that this operation holds locked.
    pub(in crate::vm) fn held(&self) -> &HeldFiles {
        &self.held
    }

    /// Returns the file system.
    #[must_use]
    pub fn file_system(&self) -> &Arc<dyn FileSystem> {
        &self.file_system
    }

    /// Returns the path of a recorded file for this process.
    #[must_use]
    pub fn path(&self, recorded: &str) -> PathBuf {
        self.directory.join(recorded)
    }

    /// Returns the path of a recorded file as text, for messages.
    pub(in crate::vm) fn shown(&self, recorded: &str) -> String {
        self.path(recorded).display().to_string()
    }

    /// Returns the path to record for a file: relative if it is beneath the catalogue's directory.
    pub(in crate::vm) fn record(&self, path: &Path) -> Result<String> {
        let refused = |why| Refusal::Path { path: path.display().to_string().escape_debug().to_string(), why };
        let within = path.strip_prefix(&self.directory).ok().filter(|_| !self.directory.as_os_str().is_empty());
        let relative = within.map(Path::to_owned);
        let recorded = match relative {
            Some(relative) => relative,
            None if path.is_absolute() || self.directory.as_os_str().is_empty() => path.to_owned(),
            None => std::path::absolute(path).map_err(|_| refused("it cannot be made absolute"))?,
        };
        let text = recorded.to_str();
        let text = text.ok_or_else(|| refused("it is not valid UTF-8, which the catalogue requires; rename it"))?;
        if text.is_empty() {
            return Err(refused("it names no file").into());
        }
        if text.chars().any(char::is_control) {
            return Err(refused("it has control characters; rename it").into());
        }
        Ok(text.to_owned())
    }

    /// Returns the backing file name to write into the header of one recorded file for another:
    /// relative to the first if both are recorded by relative paths, so that the directory can be
    /// moved, else absolute.
    pub(crate) fn backing_name(&self, of: &str, backing: &str) -> Vec<u8> {
        let name = relative_name(Path::new(of), Path::new(backing)).unwrap_or_else(|| {
            let backing = self.path(backing);
            std::path::absolute(&backing).unwrap_or(backing)
        });
        name.into_os_string().into_encoded_bytes()
    }

    pub(crate) fn exists(&self, recorded: &str) -> Result<bool> {
        Ok(self.file_system.exists(&self.path(recorded))?)
    }

    /// Returns true if two paths lead to one file.
    #[must_use]
    pub fn leads_to(&self, a: &Path, b: &Path) -> bool {
        if a == b {
            return true;
        }
        match (self.file_system.resolve(a), self.file_system.resolve(b)) {
            (Ok(a), Ok(b)) if a.file.is_some() && b.file.is_some() => a.file == b.file,
            (Ok(a), Ok(b)) => a.path == b.path,
            _ => false,
        }
    }

    /// Returns the identity of the file that a recorded path leads to at present.
    pub(in crate::vm) fn identity(&self, recorded: &str) -> Result<Option<FileId>> {
        Ok(self.file_system.resolve(&self.path(recorded))?.file)
    }

    /// Opens a recorded file. A file that the operation holds is not opened a second time. A lock
    /// that is not granted is a refusal.
    pub(crate) fn storage(&self, recorded: &str, access: &Access) -> Result<Arc<dyn Storage>> {
        let path = self.path(recorded);
        match self.held.get(&path, access.write) {
            Some(held) => Ok(held?),
            None => self.file_system.open(&path, access).map_err(in_use),
        }
    }

    /// Opens a recorded file in its recorded format.
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

    /// Opens recorded files, the topmost first, as one disk. The upper `writable` ones are opened
    /// for writing.
    pub(in crate::vm) fn chain(&self, files: &[FileRef], writable: usize, links: Links) -> Result<Chain> {
        let mut layers = Vec::new();
        for (index, file) in files.iter().enumerate() {
            let layer = self.layer(file, index < writable)?;
            self.check_link(&layer, file, &files[index + 1..], links)?;
            layers.push(layer);
        }
        let mut layers = layers.into_iter();
        let nothing = || Refusal::Path { path: String::new(), why: "a chain needs at least one file" };
        let top = layers.next().ok_or_else(nothing)?;
        Ok(Chain::from_layers(top, layers))
    }

    /// Refuses an image whose header names another backing file than the first of `below`, or
    /// another format for it.
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
        let path = || self.shown(&file.path);
        let nothing = || "none".to_owned();
        let named = header.backing_file.as_ref().map(|name| String::from_utf8_lossy(name).into_owned());
        let agrees = match (&named, below) {
            (None, None) => true,
            (Some(name), Some(below)) => self.leads_to(&self.seen_from(file, name), &self.path(&below.path)),
            _ => false,
        };
        if !agrees {
            let recorded = below.map_or_else(nothing, |below| self.shown(&below.path));
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

    /// Returns the path that a name in a file's header leads to.
    fn seen_from(&self, file: &FileRef, name: &str) -> PathBuf {
        let path = self.path(&file.path);
        path.parent().unwrap_or(&path).join(name)
    }

    /// Opens a recorded file for inspection, without a lock.
    pub(crate) fn look_layer(&self, file: &FileRef) -> Result<Layer> {
        self.layer_as(file, &Access::read().with_lock(LockMode::None))
    }

    /// Reads an image's header without a lock, as a running VM may hold the file.
    pub(crate) fn look(&self, file: &FileRef) -> Result<Facts> {
        facts(&self.look_layer(file)?)
    }

    /// Refuses a file whose header disagrees with the records, without a lock.
    pub(crate) fn check_head(&self, file: &FileRef, below: &[FileRef], links: Links) -> Result<()> {
        self.check_link(&self.look_layer(file)?, file, below, links)
    }

    /// Returns true if a file's header names another by its own path, and not by a second one that
    /// leads to it too.
    pub(crate) fn is_named_by(&self, file: &FileRef, below: &FileRef) -> Result<bool> {
        let layer = self.look_layer(file)?;
        let Some(image) = layer.node.as_qcow2() else { return Ok(true) };
        let header = image.header();
        let named = header.backing_file.as_ref().map(|name| self.seen_from(file, &String::from_utf8_lossy(name)));
        let plain = |path: &Path| self.file_system.resolve(path).map_or_else(|_| path.to_owned(), |found| found.path);
        Ok(named.is_some_and(|named| plain(&named) == plain(&self.path(&below.path))))
    }

    /// Returns true if the top of a merge is not backed by its base any more, but by the file
    /// beneath: a pull has completed. A missing or unreadable file is an error, and proves nothing.
    pub(in crate::vm) fn has_pulled(&self, step: &MergeStep) -> Result<bool> {
        let layer = self.look_layer(&step.top)?;
        let base = std::slice::from_ref(&step.base);
        match self.check_link(&layer, &step.top, base, Links::Exact) {
            Ok(()) => Ok(false),
            Err(error) => match self.check_link(&layer, &step.top, &step.below, Links::Exact) {
                Ok(()) => Ok(true),
                Err(_) => Err(error),
            },
        }
    }

    /// Refuses an overlay whose header is not the planned one: another backing file, size or
    /// geometry.
    pub(in crate::vm) fn check_overlay(&self, overlay: &NewOverlay) -> Result<()> {
        let layer = self.look_layer(&overlay.file)?;
        self.check_link(&layer, &overlay.file, std::slice::from_ref(&overlay.backing), Links::Exact)?;
        let found = facts(&layer)?;
        if found.shape != Some(overlay.shape) {
            return Err(Refusal::Obstacle {
                path: self.shown(&overlay.file.path),
                problem: "it has another geometry than the overlay that was planned".to_owned(),
                remedy: "find out which program created it".to_owned(),
            }
            .into());
        }
        Ok(())
    }

    /// Returns true if a file holds nothing but a part of the planned overlay: a creation was
    /// interrupted. Each sector is that of the complete overlay, or zero.
    pub(in crate::vm) fn is_partial_overlay(&self, overlay: &NewOverlay) -> Result<bool> {
        let expected = Arc::new(MemoryStorage::new(overlay.file.path.clone()));
        let backing = self.backing_name(&overlay.file.path, &overlay.backing.path);
        let shared: Arc<dyn Storage> = Arc::clone(&expected) as _;
        Image::create(shared, &overlay.options(backing))?.close()?;
        let expected = expected.to_vec();
        let found = self.storage(&overlay.file.path, &Access::read().with_lock(LockMode::None))?;
        if found.len()? > expected.len() as u64 {
            return Ok(false);
        }
        let mut sectors = vec![0; expected.len()];
        found.read_at(&mut sectors, 0)?;
        let same = |(found, expected): (&[u8], &[u8])| found == expected || found.iter().all(|byte| *byte == 0);
        Ok(sectors.chunks(SECTOR).zip(expected.chunks(SECTOR)).all(same))
    }

    /// Returns true if another program has an overlay open, or if it holds data: a VM has been
    /// writing it.
    ///
    /// # Errors
    /// Any error while the overlay is read. An overlay that cannot be read, or that changed without
    /// holding data, proves nothing.
    pub(in crate::vm) fn is_written(&self, overlay: &NewOverlay) -> Result<bool> {
        let file = &overlay.file;
        let access = Access::read().with_lock(LockMode::Write);
        match self.storage(&file.path, &access) {
            Err(super::Error::Refused(Refusal::InUse { .. })) => return Ok(true),
            Err(error) => return Err(error),
            Ok(_) => {}
        }
        let layer = self.look_layer(file)?;
        let size = layer.node.virtual_size();
        let alone = Chain::from_layers(layer, []);
        for extent in alone.extents(0..size) {
            if extent?.layer.is_some() {
                return Ok(true);
            }
        }
        if overlay.provided || self.is_partial_overlay(overlay)? {
            return Ok(false);
        }
        Err(Refusal::Obstacle {
            path: self.shown(&file.path),
            problem: "it is not as it was created, and holds no data that can be read".to_owned(),
            remedy: "find out which program wrote it".to_owned(),
        }
        .into())
    }

    /// Opens files of a volume, the topmost first, as one read-only disk, after a check of its
    /// bases.
    pub(in crate::vm) fn disk(&self, model: &Model, volume: &Volume, files: &[FileRef]) -> Result<Chain> {
        volume.bases.iter().try_for_each(|base| self.check_base(base))?;
        let links = if model.merging().is_some() { Links::MaySkip } else { Links::Exact };
        self.chain(files, 0, links)
    }
}

/// Reads the facts in an open image's header.
pub(in crate::vm) fn facts(layer: &Layer) -> Result<Facts> {
    let shape = layer.node.as_qcow2().map(|image| OverlayShape {
        cluster_bits: image.geometry().cluster_bits().get(),
        extended_l2: image.geometry().extended_l2(),
    });
    let bytes_on_disk = layer.node.storage().allocated_len()?;
    Ok(Facts { virtual_size: layer.node.virtual_size(), bytes_on_disk, shape })
}

/// Returns the normal components of a path, or `None` if it is absolute or has `..`.
fn normal(path: &Path) -> Option<Vec<Component<'_>>> {
    let parts = path.components().filter(|part| *part != Component::CurDir);
    parts.map(|part| matches!(part, Component::Normal(_)).then_some(part)).collect()
}

/// Returns the name of `to` relative to the directory of `from`. Returns `None` unless both paths
/// are relative and free of `..`: then a name with `..` means the same file wherever the common
/// directory is moved.
fn relative_name(from: &Path, to: &Path) -> Option<PathBuf> {
    let beside = from.parent() == to.parent();
    if beside && let Some(name) = to.file_name() {
        return Some(without_protocol(PathBuf::from(name)));
    }
    let (from, to) = (normal(from)?, normal(to)?);
    let shared = from.iter().zip(&to).take_while(|(a, b)| a == b).count().min(from.len().saturating_sub(1));
    let up = from.len() - 1 - shared;
    let mut name: PathBuf = std::iter::repeat_n(Component::ParentDir, up).collect();
    name.extend(&to[shared..]);
    Some(without_protocol(name))
}

/// Puts `./` before a name that QEMU would read as a protocol: one with a colon before the first
/// slash.
fn without_protocol(name: PathBuf) -> PathBuf {
    let bytes = name.as_os_str().as_encoded_bytes();
    let first = bytes.split(|byte| *byte == b'/').next().unwrap_or_default();
    if first.contains(&b':') { Path::new(".").join(name) } else { name }
}

/// Turns a lock that was not granted into a refusal.
pub(in crate::vm) fn in_use(error: storage::Error) -> super::Error {
    match error {
        storage::Error::Busy { name, held } => Refusal::InUse { path: name, held }.into(),
        error => error.into(),
    }
}

/// Frees clusters that an interrupted operation left allocated and unused.
pub(in crate::vm) fn free_leaks(storage: &dyn Storage) -> Result<()> {
    image::check(storage, &image::CheckOptions::default().with_fix(image::Fix::Leaks))?;
    storage.sync()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(from: &str, to: &str) -> Option<String> {
        relative_name(Path::new(from), Path::new(to)).map(|path| path.to_str().unwrap().to_owned())
    }

    #[test]
    fn backing_names_are_relative_to_the_overlay() {
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(name("a.qcow2", "b.qcow2"), some("b.qcow2"));
        assert_eq!(name("/vm/a.qcow2", "/vm/b.qcow2"), some("b.qcow2"));
        assert_eq!(name("b/mid.qcow2", "a/root.qcow2"), some("../a/root.qcow2"));
        assert_eq!(name("a/b/mid.qcow2", "a/root.qcow2"), some("../root.qcow2"));
        assert_eq!(name("top.qcow2", "a/b/root.qcow2"), some("a/b/root.qcow2"));
        assert_eq!(name("/vm/a.qcow2", "/pool/b.qcow2"), None);
        assert_eq!(name("a.qcow2", "../b/c.qcow2"), None);
    }

    #[test]
    fn backing_names_with_a_colon_are_no_protocol() {
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(name("a.qcow2", "disk:0.qcow2"), some("./disk:0.qcow2"));
        assert_eq!(name("a.qcow2", "d:1/b.qcow2"), some("./d:1/b.qcow2"));
        assert_eq!(name("a/a.qcow2", "b:1.qcow2"), some("../b:1.qcow2"));
    }
}
