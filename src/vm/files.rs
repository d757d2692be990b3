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

pub(in crate::vm) use held::{Hold, HeldFiles};

/// The unit that a medium writes as a whole, in bytes.
const SECTOR: usize = 512;

/// The recorded files of a set: a file system, and the directory at which recorded relative paths start.
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
    /// A merge is under way: a header may name the second file beneath it already, into which the first is merged.
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

    /// Returns the backing file name to write into the header of one recorded file for another: relative to the first
    /// if both are recorded by relative paths, so that the directory can be moved, else absolute.
    pub(crate) fn backing_name(&self, of: &str, backing: &str) -> Vec<u8> {
        let name = match relative_name(Path::new(of), Path::new(backing)) {
            Some(relative) => relative,
            None => {
                let backing = self.path(backing);
                std::path::absolute(&backing).unwrap_or(backing)
            }
        };
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

    /// Opens a recorded file. A file that the operation holds is not opened a second time. A lock that is not granted is
    /// a refusal.
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

    /// Opens recorded files, the topmost first, as one disk. The upper `writable` ones are opened for writing.
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

    /// Refuses an image whose header names another backing file than the first of `below`, or another format for it.
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

    /// Returns true if a file's header names another by its own path, and not by a second one that leads to it too.
    pub(crate) fn is_named_by(&self, file: &FileRef, below: &FileRef) -> Result<bool> {
        let layer = self.look_layer(file)?;
        let Some(image) = layer.node.as_qcow2() else { return Ok(true) };
        let header = image.header();
        let named = header.backing_file.as_ref().map(|name| self.seen_from(file, &String::from_utf8_lossy(name)));
        fn normal(path: &Path) -> Option<Vec<Component<'_>>> {
        let parts = path.components().filter(|part| *part != Component::CurDir);
        parts.map(|part| matches!(part, Component::Normal(_)).then_some(part)).collect()
    }
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

/// Puts `./` before a name that QEMU would read as a protocol: one with a colon before the first slash.
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
