//! Changes of a set's volumes and bases: attach, detach, accept.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::adopt;
use super::execute::report::Released;
use super::files::VolumeFiles;
use super::model::Model;
use super::model::catalogue::directory_of;
use super::model::edit::Edit;
use super::options::{AdoptOptions, VolumeSpec};
use super::set::{SnapshotSet, find_attached};
use super::{Refusal, Result};

impl SnapshotSet {
    /// Attaches a volume. Snapshots taken before lack it.
    ///
    /// # Errors
    /// [`Refusal::VolumeName`], and those of [`SnapshotSet::adopt`] about files.
    pub fn attach(&self, spec: &VolumeSpec, options: &AdoptOptions) -> Result<()> {
        self.change_volumes(|model| {
            if model.any_volume(&spec.name).is_some() {
                let why = "the set has a volume, or snapshots of a detached one, by this name";
                return Err(Refusal::VolumeName { name: spec.name.clone(), why }.into());
            }
            // Paths beneath the catalogue's directory are recorded by relative ones, whatever the
            // directory is called here.
            let directory = self.files.file_system().resolve(directory_of(&self.catalogue))?.path;
            let files = VolumeFiles::new(Arc::clone(self.files.file_system()), directory);
            let volume = adopt::volume(&files, spec, model, options)?;
            model.volumes.push(volume);
            Ok(())
        })
    }

    /// Detaches a volume: it gets no further snapshots. Its active file stays and is returned as
    /// released. Existing snapshots keep their files, and a revert to one of them attaches the
    /// volume again. The active file may be missing.
    ///
    /// # Errors
    /// [`Refusal::UnknownVolume`]. Any error of the store.
    pub fn detach(&self, volume: &str) -> Result<Released> {
        let mut path = PathBuf::new();
        self.change_volumes(|model| {
            path = self.files.path(&find_attached(model, volume)?.active.file.path);
            Edit::Detach { volume: volume.to_owned() }.apply(model);
            Ok(())
        })?;
        Ok(Released { path, reason: format!("volume {volume} is detached") })
    }

    /// Records the present fingerprint of a base: the caller states that its content is right.
    ///
    /// # Errors
    /// [`Refusal::NotABase`]. Any error of reading the file.
    pub fn accept_base(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        self.change_volumes(|model| {
            let mut found = false;
            let bases = model.volumes.iter_mut().chain(&mut model.detached).flat_map(|volume| &mut volume.bases);
            for base in bases {
                if self.files.leads_to(&self.files.path(&base.file.path), path) {
                    base.fingerprint = self.files.fingerprint(&base.file)?;
                    found = true;
                }
            }
            if found {
                return Ok(());
            }
            let bases = model.all_volumes().flat_map(|volume| &volume.bases);
            let bases = bases.map(|base| self.files.shown(&base.file.path)).collect();
            Err(Refusal::NotABase { path: path.display().to_string(), bases }.into())
        })
    }

    fn change_volumes(&self, change: impl FnOnce(&mut Model) -> Result<()>) -> Result<()> {
        let locked = self.lock.take()?;
        self.refuse_unfinished()?;
        let mut model = self.store.load()?;
        change(&mut model)?;
        if let Some(why) = model.contradictions().into_iter().next() {
            return Err(super::Error::Catalogue { file: self.catalogue.display().to_string(), why });
        }
        model.last_operation.id += 1;
        model.last_operation.stages = 1;
        self.store.save(&model)?;
        drop(locked);
        Ok(())
    }
}
