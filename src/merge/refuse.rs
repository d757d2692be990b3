//! What a merge would falsify beyond the guest's view of the chain: images elsewhere, internal snapshots, bitmaps.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

use crate::chain::{Chain, DependentSearch, Identity, Layer, Sought, search_directories};
use crate::format::{AutoclearFeatures, BitmapDirectoryEntry};
use crate::image::Image;
use crate::storage::{FileSystem, HostFileSystem};

use super::{Error, Result};

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

/// Refuses a commit into `base` if an image in one of the directories that is not part of the chain
/// depends on a layer that would change.
///
/// # Errors
/// - [`Error::Dependents`]: there are such images.
/// - [`Error::Chain`]: the search failed, see [`crate::chain::find_dependents`].
pub(super) fn refuse_dependents(chain: &Chain, base: usize, directories: &[PathBuf]) -> Result<()> {
    if directories.is_empty() {
        return Ok(());
    }
    let host: Arc<dyn FileSystem> = Arc::new(HostFileSystem);
    // Layers that the caller opened have paths of the host.
    let file_system = &**chain.names().unwrap_or(&host);
    let layers: Vec<_> = chain.layers().iter().map(|layer| identity(file_system, layer)).collect();
    let changed: Vec<_> = layers.iter().take(base.saturating_add(1)).skip(1).cloned().collect();
    let own: Vec<_> = layers.into_iter().map(|layer| layer.identity).collect();
    let directories = directories.iter().map(|directory| (directory.clone(), true));
    let max_files = DependentSearch::default().max_files;
    let found = search_directories(file_system, &changed, &own, directories, max_files)?;
    let deepest = changed.into_iter().rev().find(|layer| found.iter().any(|image| image.file == layer.path));
    let Some(deepest) = deepest else { return Ok(()) };
    let mut dependents: Vec<_> = found.into_iter().map(|dependent| dependent.image).collect();
    dependents.dedup();
    Err(Error::Dependents { file: deepest.path.display().to_string(), dependents })
}

/// Returns the identity of a layer: that of its open file where it has one.
fn identity(file_system: &dyn FileSystem, layer: &Layer) -> Sought {
    let found = file_system.resolve(&layer.path).ok();
    let path = found.as_ref().map_or_else(|| layer.path.clone(), |found| found.path.clone());
    let file = layer.node.storage().file_id().or_else(|| found.and_then(|found| found.file));
    Sought { path: layer.path.clone(), identity: Identity { path, file } }
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
