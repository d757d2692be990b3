//! What a merge would falsify beyond the guest's view of the chain: images elsewhere, internal snapshots, bitmaps.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use crate::chain::{Chain, Layer};
use crate::format::{AutoclearFeatures, BitmapDirectoryEntry, HeaderCluster, Limits};
use crate::image::Image;
use crate::storage::{self, Access, FileId, FileSystem, HostFileSystem, LockMode};

use super::{Error, Result};

/// The largest cluster: where a header ends at the latest.
const LARGEST_CLUSTER: usize = 2 << 20;

/// Refuses layers with internal snapshots, which show what is beneath their layer where they hold nothing themselves.
pub(super) fn refuse_stale_snapshots(layers: &[Layer]) -> Result<()> {
    for layer in layers {
        let snapshots = snapshots_of(layer)?;
        if !snapshots.is_empty() {
            return Err(Error::StaleSnapshots { file: layer.path.display().to_string(), snapshots });
        }
    }
    Ok(())
}

/// The names of a layer's internal snapshots.
pub(super) fn snapshots_of(layer: &Layer) -> Result<Vec<String>> {
    let snapshots = layer.node.as_qcow2().map(Image::snapshots).transpose()?.unwrap_or_default();
    Ok(snapshots.iter().map(|snapshot| String::from_utf8_lossy(&snapshot.name).into_owned()).collect())
}

/// Refuses a commit into `base` where an image in one of the directories, other than those of the chain, is over a layer
/// that would change.
pub(super) fn refuse_dependents(chain: &Chain, base: usize, directories: &[PathBuf]) -> Result<()> {
    let files: Vec<_> = chain.layers().iter().map(identity).collect();
    let mut found: Vec<(usize, PathBuf)> = Vec::new();
    for directory in directories {
        for path in HostFileSystem.list(directory)? {
            let resolved = HostFileSystem.resolve(&path).ok();
            let own = resolved.is_some_and(|found| files.iter().any(|file| file.is(&found)));
            if own {
                continue;
            }
            let Some(name) = backing_name(&path)? else { continue };
            let layer = (1..=base).find(|&index| files.get(index).is_some_and(|file| file.is_named(&name, &path)));
            found.extend(layer.map(|index| (index, path)));
        }
    }
    let Some(deepest) = found.iter().map(|(index, _)| *index).max() else { return Ok(()) };
    let file = chain.layers().get(deepest).map_or_else(String::new, |layer| layer.path.display().to_string());
    found.sort();
    found.dedup();
    Err(Error::Dependents { file, dependents: found.into_iter().map(|(_, path)| path).collect() })
}

/// What a layer's file is known by.
struct Identity {
    path: PathBuf,
    file: Option<FileId>,
}

fn identity(layer: &Layer) -> Identity {
    let path = HostFileSystem.resolve(&layer.path).map_or_else(|_| layer.path.clone(), |found| found.path);
    Identity { path, file: layer.node.storage().file_id() }
}

impl Identity {
    fn is(&self, found: &storage::Resolved) -> bool {
        match (self.file, found.file) {
            (Some(a), Some(b)) => a == b,
            _ => self.path == found.path,
        }
    }

    /// Whether the name that an image writes of its backing file means this one. What is no plain file name means it
    /// where it mentions it.
    fn is_named(&self, name: &[u8], by: &Path) -> bool {
        let text = String::from_utf8_lossy(name);
        let own = self.path.file_name().unwrap_or_default().to_string_lossy();
        if text.starts_with("json:") {
            return text.contains(&*own);
        }
        let target = by.parent().unwrap_or(by).join(text.strip_prefix("file:").unwrap_or(&text));
        HostFileSystem.resolve(&target).is_ok_and(|found| self.is(&found))
    }
}

/// The backing file's name in a file's header, if it is a qcow2 image that has one. What is gone by now, or no regular
/// file, has none, and neither has an image whose header nobody can open.
fn backing_name(path: &Path) -> Result<Option<Vec<u8>>> {
    let storage = match HostFileSystem.open(path, &Access::read().with_lock(LockMode::None)) {
        Ok(storage) => storage,
        Err(storage::Error::Refused { .. }) => return Ok(None),
        Err(storage::Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let mut magic = [0; 4];
    storage.read_at(&mut magic, 0)?;
    if magic != *b"QFI\xfb" {
        return Ok(None);
    }
    let len = storage.len()?;
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(LARGEST_CLUSTER).min(LARGEST_CLUSTER)];
    storage.read_at(&mut bytes, 0)?;
    let header = HeaderCluster::decode(&bytes, len, &Limits::default());
    Ok(header.ok().and_then(|header| header.backing_file))
}

/// The bitmaps of some layers that vouch for their content.
pub(super) struct Bitmaps<'a> {
    valid: Vec<(&'a Image, Vec<String>)>,
}

impl<'a> Bitmaps<'a> {
    /// Those that do now.
    pub(super) fn of(layers: &'a [Layer]) -> Result<Self> {
        let images = layers.iter().filter_map(|layer| layer.node.as_qcow2());
        let valid = images.map(|image| Ok((image, valid_bitmaps(image, true)?))).collect::<Result<_>>()?;
        Ok(Self { valid })
    }

    /// Those that no longer do.
    pub(super) fn invalidated(self) -> Result<Vec<String>> {
        let mut gone = Vec::new();
        for (image, before) in self.valid {
            let now: HashSet<String> = valid_bitmaps(image, true)?.into_iter().collect();
            gone.extend(before.into_iter().filter(|name| !now.contains(name)));
        }
        Ok(gone)
    }
}

/// The names of an image's bitmaps that vouch for its content: all, or only those that record every write.
pub(super) fn valid_bitmaps(image: &Image, all: bool) -> Result<Vec<String>> {
    if !image.header().header.autoclear_features.has(AutoclearFeatures::BITMAPS) {
        return Ok(Vec::new());
    }
    let wanted = |flags: u32| all || flags & BitmapDirectoryEntry::AUTO != 0;
    let bitmaps = image.bitmaps()?.into_iter();
    let valid = bitmaps.filter(|entry| entry.flags & BitmapDirectoryEntry::IN_USE == 0 && wanted(entry.flags));
    Ok(valid.map(|entry| String::from_utf8_lossy(&entry.name).into_owned()).collect())
}
