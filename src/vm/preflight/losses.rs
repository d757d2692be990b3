//! Internal snapshots and bitmaps that an operation would destroy or invalidate.

use super::Checks;
use super::estimates::Estimates;
use crate::chain::Layer;
use crate::format::{AutoclearFeatures, BitmapDirectoryEntry};
use crate::image::Image;
use crate::merge::Direction;
use crate::vm::model::FileRef;
use crate::vm::plan::Plan;
use crate::vm::{Refusal, Result};

impl Checks<'_> {
    /// Refuses a plan that would lose internal snapshots or bitmaps that the caller did not name.
    pub(super) fn check_losses(&self, plan: &mut Plan, estimates: &Estimates) -> Result<()> {
        let removed: Vec<String> = plan.removals().map(|removal| removal.path.clone()).collect();
        for path in removed.iter().filter(|path| !self.lost.contains(path)) {
            let Some(file) = self.file_ref(path) else { continue };
            match self.check_removal(&file, estimates) {
                Err(error) if self.options.discard_lost && error.refusal().is_none() => {}
                checked => checked?,
            }
        }
        for step in plan.merges_mut() {
            if self.is_open_in_vm(&step.top.path) || self.is_open_in_vm(&step.base.path) {
                // The hypervisor keeps the bitmaps of the base; the top was checked as a file to
                // remove.
                continue;
            }
            let names = internal_snapshots(self.examined(&step.top, estimates)?.layer())?;
            // They show the layer beneath where they hold nothing themselves.
            self.refuse_loss(&step.top, "change", "internal snapshots", names.clone())?;
            step.drop_internal = !names.is_empty();
            let survivor = if step.direction == Direction::Commit { &step.base } else { &step.top };
            let names = bitmaps(self.examined(survivor, estimates)?.layer(), true)?;
            self.refuse_loss(survivor, "invalidate", "bitmaps", names)?;
        }
        Ok(())
    }

    fn check_removal(&self, file: &FileRef, estimates: &Estimates) -> Result<()> {
        let layer = self.examined(file, estimates)?;
        self.refuse_loss(file, "destroy", "internal snapshots", internal_snapshots(layer.layer())?)?;
        self.refuse_loss(file, "destroy", "bitmaps", bitmaps(layer.layer(), false)?)
    }

    fn refuse_loss(&self, file: &FileRef, loss: &'static str, kind: &'static str, names: Vec<String>) -> Result<()> {
        let names: Vec<String> = names.into_iter().filter(|name| !self.options.drop.contains(name)).collect();
        if names.is_empty() {
            return Ok(());
        }
        Err(Refusal::WouldLose { path: self.files.shown(&file.path), loss, kind, names }.into())
    }

    /// Returns the record of a path.
    fn file_ref(&self, path: &str) -> Option<FileRef> {
        let mut records = self.model.records().map(|(_, _, record)| &record.file);
        records.find(|file| file.path == path).cloned()
    }
}

fn internal_snapshots(layer: &Layer) -> Result<Vec<String>> {
    let snapshots = layer.node.as_qcow2().map(Image::snapshots).transpose()?.unwrap_or_default();
    Ok(snapshots.iter().map(|snapshot| String::from_utf8_lossy(&snapshot.name).into_owned()).collect())
}

/// Returns the names of an image's bitmaps: all of them, or those that are consistent.
fn bitmaps(layer: &Layer, consistent: bool) -> Result<Vec<String>> {
    let Some(image) = layer.node.as_qcow2() else { return Ok(Vec::new()) };
    if !image.header().header.autoclear_features.has(AutoclearFeatures::BITMAPS) {
        return Ok(Vec::new());
    }
    let bitmaps = image.bitmaps()?.into_iter();
    let wanted = bitmaps.filter(|entry| !consistent || entry.flags & BitmapDirectoryEntry::IN_USE == 0);
    Ok(wanted.map(|entry| String::from_utf8_lossy(&entry.name).into_owned()).collect())
}
