//! Existing images become the volumes of a VM: what the catalogue says of them is read from their headers.

use std::collections::BTreeMap;
use std::path::Path;

use super::{Refusal, Result};
use crate::chain::{Chain, ChainOptions};
use crate::storage::LockMode;
use crate::vm::files::VolumeFiles;
use crate::vm::model::{Base, FileRecord, FileRef, MAX_NAME, Model, Snapshot, SnapshotId, State, Volume};
use crate::vm::options::{AdoptOptions, VolumeSpec};

/// A volume's name is part of its overlays' names.
fn check_volume_name(name: &str) -> Result<(), Refusal> {
    let refused = |why| Err(Refusal::VolumeName { name: name.to_owned(), why });
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    match name {
        "" => refused("it is empty"),
        _ if name.len() > 64 => refused("it has more than 64 bytes"),
        _ if !name.chars().all(allowed) => refused("only letters, digits, '.', '_' and '-' are allowed"),
        _ => Ok(()),
    }
}

fn check_vm_name(name: &str) -> Result<(), Refusal> {
    if name.is_empty() || name.len() > 128 || name.chars().any(|c| c == '/' || c.is_control()) {
        return Err(Refusal::VmName { name: name.to_owned() });
    }
    Ok(())
}

/// What was read of one volume: its files, the active one first.
pub(super) struct Adopted {
    spec: VolumeSpec,
    files: Vec<FileRecord>,
}

/// Reads a volume's files from their headers.
pub(super) fn read(place: &VolumeFiles, spec: &VolumeSpec, options: &AdoptOptions) -> Result<Adopted> {
    check_volume_name(&spec.name)?;
    // Headers only are read, which a running VM does not change.
    let chain_options = ChainOptions::default().with_policy(options.policy.clone()).with_format(spec.format);
    let chain_options = chain_options.with_lock(LockMode::None);
    let chain = Chain::open_in(place.names(), &spec.path, &chain_options)?;
    let mut files = Vec::new();
    for (index, layer) in chain.layers().iter().enumerate() {
        layer.node.data_access()?;
        let path = if index == 0 { layer.path.clone() } else { plain(place, &layer.path)? };
        files.push(FileRecord {
            file: FileRef { path: place.record(&path)?, format: layer.format() },
            virtual_size: layer.node.virtual_size(),
            bytes_on_disk: layer.node.storage().allocated_len()?,
            protected: spec.protected && index == 0,
        });
    }
    Ok(Adopted { spec: spec.clone(), files })
}

/// A path that a header led to, without its `..`.
fn plain(place: &VolumeFiles, path: &Path) -> Result<std::path::PathBuf> {
    let simple = path.components().all(|part| !matches!(part, std::path::Component::ParentDir));
    if simple { Ok(path.to_owned()) } else { Ok(place.names().resolve(path)?.path) }
}

impl Adopted {
    /// The volume: what lies beneath the active file and so many frozen ones are bases.
    fn volume(&self, place: &VolumeFiles, frozen: usize) -> Result<Volume> {
        let bases = self.files.iter().skip(1 + frozen).map(|record| {
            let fingerprint = place.fingerprint(&record.file)?;
            Ok(Base { file: record.file.clone(), fingerprint })
        });
        let active = self.files[0].clone();
        let shape = place.look(&active.file)?.shape;
        let overlay = self.spec.overlay.or(shape).unwrap_or_default();
        Ok(Volume { name: self.spec.name.clone(), active, bases: bases.collect::<Result<_>>()?, overlay })
    }
}

/// The model of a VM with these volumes.
pub(super) fn model(place: &VolumeFiles, vm: &str, adopted: &[Adopted], names: &[String], now: u64) -> Result<Model> {
    check_vm_name(vm)?;
    if adopted.is_empty() {
        return Err(Refusal::NoVolumes.into());
    }
    let volumes = adopted.iter().map(|one| one.volume(place, names.len())).collect::<Result<Vec<_>>>()?;
    let mut model = Model::new(vm, volumes);
    for (age, name) in names.iter().enumerate() {
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(Refusal::NameLength { len: name.len(), max: MAX_NAME }.into());
        }
        if model.find(name).is_some() {
            return Err(Refusal::NameTaken { name: name.clone() }.into());
        }
        let mut files = BTreeMap::new();
        for one in adopted {
            let volume = one.spec.name.clone();
            // The oldest lies deepest.
            let record = one.files.get(names.len() - age).cloned();
            let record =
                record.ok_or_else(|| Refusal::Incomplete { snapshot: name.clone(), volume: volume.clone() })?;
            files.insert(volume, record);
        }
        let id = SnapshotId(model.next_snapshot);
        let (description, state, parent) = (String::new(), State::Ready, model.current);
        let snapshot = Snapshot { id, name: name.clone(), description, created: now, state, parent, files };
        model.snapshots.insert(id, snapshot);
        model.current = Some(id);
        model.next_snapshot += 1;
    }
    let wrong = model.contradictions();
    if let Some(wrong) = wrong.into_iter().next() {
        return Err(super::Error::Catalogue { file: vm.to_owned(), why: wrong });
    }
    Ok(model)
}
