//! The paths of new overlays, and the checks of the directories that they are created in.

use super::Checks;
use crate::storage::EntryKind;
use crate::vm::execute::offline::{model_of, overlay_request};
use crate::vm::model::catalogue::directory_of;
use crate::vm::plan::planner::overlay_name;
use crate::vm::plan::request::{OverlayPath, PlanOptions, Request};
use crate::vm::plan::{NewOverlay, Plan};
use crate::vm::{Refusal, Result};

/// The limit of a file name, in bytes.
const MAX_FILE_NAME: usize = 255;
/// The limit of a backing file name in a header, in bytes (specification, "Header fields").
const MAX_BACKING_NAME: usize = 1023;

impl Checks<'_> {
    /// Asks the provider, if there is one, for the paths of new overlays.
    pub(super) fn choose_overlays(&self, options: &mut PlanOptions) -> Result<()> {
        let Some(provider) = &self.set.provider else { return Ok(()) };
        let to = match self.request {
            Request::Create { .. } => None,
            Request::Revert { name, .. } => self.model.find(name),
            _ => return Ok(()),
        };
        for volume in self.model.all_volumes() {
            let size = match (self.request, to) {
                (Request::Revert { .. }, to) => to.and_then(|to| to.files.get(&volume.name)),
                _ => self.model.volume(&volume.name).map(|volume| &volume.active),
            };
            let Some(size) = size.map(|record| record.virtual_size) else { continue };
            let name = overlay_name(&self.model.vm, &volume.name, self.model.next_file, &options.token);
            let name = name.strip_suffix(".qcow2").unwrap_or(&name);
            let request = overlay_request(&self.model.vm, &volume.name, name, size, volume.overlay)?;
            let path = self.files.record(&provider.path(&request)?)?;
            options.overlays.insert(volume.name.clone(), OverlayPath { path, provided: Some(name.to_owned()) });
        }
        Ok(())
    }

    /// Refuses overlays that cannot be created: names, directories, attributes.
    pub(super) fn check_overlays(&self, plan: &Plan) -> Result<()> {
        for overlay in plan.created() {
            self.check_overlay_names(overlay)?;
            if !overlay.provided {
                self.check_directory(overlay)?;
            }
        }
        Ok(())
    }

    fn check_overlay_names(&self, overlay: &NewOverlay) -> Result<()> {
        let path = self.files.path(&overlay.file.path);
        let len = path.file_name().unwrap_or_default().len();
        let too_long = |problem: String| Refusal::Obstacle {
            path: path.display().to_string(),
            problem,
            remedy: "use shorter names".to_owned(),
        };
        if len > MAX_FILE_NAME {
            return Err(too_long(format!("the file name has {len} bytes, the limit is {MAX_FILE_NAME}")).into());
        }
        let len = self.files.backing_name(&overlay.file.path, &overlay.backing.path).len();
        if len > MAX_BACKING_NAME {
            return Err(too_long(format!(
                "the name of its backing file has {len} bytes, the limit is {MAX_BACKING_NAME}"
            ))
            .into());
        }
        Ok(())
    }

    fn check_directory(&self, overlay: &NewOverlay) -> Result<()> {
        let file_system = self.files.file_system();
        let path = self.files.path(&overlay.file.path);
        let directory = directory_of(&path);
        if self.is_beside_device(overlay)? {
            let (volume, path) = (overlay.volume.clone(), self.files.shown(&overlay.like));
            return Err(Refusal::BlockDevice { volume, path }.into());
        }
        if file_system.is_memory_backed(directory)? {
            return Err(Refusal::MemoryDirectory { path: directory.display().to_string() }.into());
        }
        if !self.options.ignore_attributes {
            file_system.check_create_like(directory, &*model_of(overlay, &self.files)?)?;
        }
        Ok(())
    }

    /// Returns true if the overlay would be created beside a block device, for lack of a directory
    /// for overlays.
    fn is_beside_device(&self, overlay: &NewOverlay) -> Result<bool> {
        let named = self.model.any_volume(&overlay.volume).is_some_and(|volume| volume.overlay_dir.is_some());
        if named || self.lost.contains(&overlay.like) {
            return Ok(false);
        }
        let file_system = self.files.file_system();
        let file = file_system.resolve(&self.files.path(&overlay.like))?.path;
        Ok(file_system.entry(&file)? == EntryKind::BlockDevice)
    }
}
