//! Adoption: existing images become the volumes of a VM.
//!
//! Paths are resolved first, so that the catalogue names files and no links. Records are read from
//! the headers of the images.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::files::VolumeFiles;
use super::model::catalogue::{MAX_FILE_NAME, directory_of};
use super::model::{Base, FileRecord, FileRef, Model, Snapshot, SnapshotId, State, Volume};
use super::options::{AdoptOptions, VolumeSpec};
use super::plan::planner::check_snapshot_name;
use super::{Refusal, Result};
use crate::chain::{Chain, ChainOptions, find_dependents};
use crate::format::{ClusterBits, Geometry, RefcountOrder};
use crate::storage::{EntryKind, FileId, FileSystem, LockMode};

/// The limit of a volume's name, and of a VM's name, in bytes.
const MAX_VOLUME_NAME: usize = 64;
const MAX_VM_NAME: usize = 128;

/// Returns the path of a catalogue to create, with its directory resolved.
pub(super) fn catalogue_path(file_system: &dyn FileSystem, path: &Path) -> Result<PathBuf> {
    let refused = |why| Refusal::Path { path: path.display().to_string().escape_debug().to_string(), why };
    let name = path.file_name().ok_or_else(|| refused("it names no file"))?;
    if name.len() > MAX_FILE_NAME {
        return Err(refused("the file name is too long; use at most 234 bytes").into());
    }
    if file_system.entry(path)? == EntryKind::Link {
        return Err(refused("it is a symbolic link; name the file that it leads to").into());
    }
    Ok(file_system.resolve(directory_of(path))?.path.join(name))
}

/// Checks the name of a volume, which is a part of its overlays' names.
fn check_volume_name(name: &str) -> Result<(), Refusal> {
    let refused = |why| Err(Refusal::VolumeName { name: name.escape_debug().to_string(), why });
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    match name {
        "" => refused("it is empty"),
        _ if name.len() > MAX_VOLUME_NAME => refused("it has more than 64 bytes"),
        _ if !name.chars().all(allowed) => refused("only letters, digits, '.', '_' and '-' are allowed"),
        _ => Ok(()),
    }
}

/// Checks the name of a VM, which is a part of its overlays' names. QEMU reads a name with a colon
/// as a protocol.
fn check_vm_name(name: &str) -> Result<(), Refusal> {
    let refused = |why| Err(Refusal::VmName { name: name.escape_debug().to_string(), why });
    match name {
        "" => refused("it is empty"),
        _ if name.len() > MAX_VM_NAME => refused("it has more than 128 bytes; choose a shorter one (vm)"),
        _ if name.contains(['/', ':']) || name.starts_with('.') => {
            refused("'/', ':' and a leading '.' are not allowed; choose another one (vm)")
        }
        _ if name.chars().any(char::is_control) => refused("it has control characters; choose another one (vm)"),
        _ => Ok(()),
    }
}

/// The files of one volume, the active one first.
struct Adopted<'a> {
    spec: &'a VolumeSpec,
    files: Vec<FileRecord>,
    overlay_dir: Option<String>,
}

/// Reads the files of a volume from their headers.
fn read<'a>(files: &VolumeFiles, spec: &'a VolumeSpec, options: &AdoptOptions) -> Result<Adopted<'a>> {
    check_volume_name(&spec.name)?;
    check_shape(spec)?;
    let path = real_path(&**files.file_system(), &spec.path)?;
    let overlay_dir = check_directory(files, spec, &path)?;
    // Headers only are read, which a running VM does not change.
    let chain_options = ChainOptions::default().with_policy(options.policy.clone()).with_format(spec.format);
    let chain_options = chain_options.with_lock(LockMode::None);
    let chain = Chain::open_in(files.file_system(), &path, &chain_options)?;
    let mut records = Vec::new();
    for (index, layer) in chain.layers().iter().enumerate() {
        layer.node.data_access()?;
        let path = real_path(&**files.file_system(), &layer.path)?;
        let file = FileRef { path: files.record(&path)?, format: layer.format() };
        let mut record = FileRecord::new(file, layer.node.virtual_size());
        record.bytes_on_disk = layer.node.storage().allocated_len()?;
        record.protected = spec.protected && index == 0;
        records.push(record);
    }
    Ok(Adopted { spec, files: records, overlay_dir })
}

/// Returns the path to record for a file: the one without links. Of a block device only the
/// directory is resolved: the node that `/dev/GROUP/VOLUME` leads to may be that of another logical
/// volume after a restart.
fn real_path(file_system: &dyn FileSystem, path: &Path) -> Result<PathBuf> {
    let real = file_system.resolve(path)?.path;
    match path.file_name() {
        Some(name) if file_system.entry(&real)? == EntryKind::BlockDevice => {
            Ok(file_system.resolve(directory_of(path))?.path.join(name))
        }
        _ => Ok(real),
    }
}

/// Refuses a geometry that no overlay can have.
fn check_shape(spec: &VolumeSpec) -> Result<()> {
    let Some(shape) = spec.overlay else { return Ok(()) };
    let geometry = ClusterBits::new(shape.cluster_bits)
        .and_then(|bits| Geometry::new(bits, RefcountOrder::default(), shape.extended_l2));
    if geometry.is_some() {
        return Ok(());
    }
    let problem = match ClusterBits::new(shape.cluster_bits) {
        None => format!("the cluster size of its overlays would be 2^{} bytes", shape.cluster_bits),
        Some(_) => {
            format!("extended L2 entries with clusters of {} bytes are not possible", 1_u64 << shape.cluster_bits)
        }
    };
    let remedy = "use a cluster_size from 512 bytes to 2 MiB, and at least 16 KiB with extended_l2".to_owned();
    Err(Refusal::Obstacle { path: format!("volume {}", spec.name), problem, remedy }.into())
}

/// Checks the directory of a volume's overlays, and returns it as recorded if it is named.
fn check_directory(files: &VolumeFiles, spec: &VolumeSpec, path: &Path) -> Result<Option<String>> {
    let file_system = files.file_system();
    let Some(directory) = &spec.overlay_dir else {
        if !spec.provided_overlays && file_system.entry(&file_system.resolve(path)?.path)? == EntryKind::BlockDevice {
            let (volume, path) = (spec.name.clone(), path.display().to_string());
            return Err(Refusal::BlockDevice { volume, path }.into());
        }
        return Ok(None);
    };
    let directory = file_system.resolve(directory)?.path;
    if file_system.is_memory_backed(&directory)? {
        return Err(Refusal::MemoryDirectory { path: directory.display().to_string() }.into());
    }
    // A directory that is the catalogue's own is recorded as `.`.
    let inside = files.path("");
    let recorded = if directory == inside { ".".to_owned() } else { files.record(&directory)? };
    Ok(Some(recorded))
}

impl Adopted<'_> {
    /// Returns the volume. Of the files beneath the active one, the upper `frozen` are those of
    /// snapshots, the others bases.
    fn volume(&self, files: &VolumeFiles, frozen: usize) -> Result<Volume> {
        let bases = self.files.iter().skip(1 + frozen).map(|record| {
            let fingerprint = files.fingerprint(&record.file)?;
            Ok(Base { file: record.file.clone(), fingerprint })
        });
        let active = self.files[0].clone();
        let shape = files.look(&active.file)?.shape;
        let mut volume = Volume::new(&self.spec.name, active);
        volume.bases = bases.collect::<Result<_>>()?;
        volume.overlay = self.spec.overlay.or(shape).unwrap_or_default();
        volume.overlay_dir.clone_from(&self.overlay_dir);
        Ok(volume)
    }
}

/// Returns the model of a VM with these volumes.
pub(super) fn model(
    files: &VolumeFiles,
    catalogue: &Path,
    volumes: &[VolumeSpec],
    options: &AdoptOptions,
    now: u64,
) -> Result<Model> {
    let vm = if let Some(name) = &options.vm {
        name.clone()
    } else {
        let stem = catalogue.file_stem().unwrap_or_default();
        let not_text = || Refusal::VmName { name: stem.display().to_string(), why: "it is not valid UTF-8" };
        stem.to_str().ok_or_else(not_text)?.to_owned()
    };
    check_vm_name(&vm)?;
    if volumes.is_empty() {
        return Err(Refusal::NoVolumes.into());
    }
    let adopted = volumes.iter().map(|spec| read(files, spec, options)).collect::<Result<Vec<_>>>()?;
    let names = &options.snapshots;
    let volumes = adopted.iter().map(|one| one.volume(files, names.len())).collect::<Result<Vec<_>>>()?;
    let mut model = Model::new(vm, volumes);
    for (age, name) in names.iter().enumerate() {
        add_snapshot(&mut model, &adopted, name, names.len() - age, now)?;
    }
    let searched = model.records().map(|(_, _, record)| record.clone()).collect::<Vec<_>>();
    check(files, &model, &searched, options)?;
    Ok(model)
}

/// Adds the snapshot whose files are at this depth beneath the active ones.
fn add_snapshot(model: &mut Model, adopted: &[Adopted<'_>], name: &str, depth: usize, now: u64) -> Result<()> {
    check_snapshot_name(name)?;
    if model.find(name).is_some() {
        return Err(Refusal::NameTaken { name: name.to_owned() }.into());
    }
    let mut files = BTreeMap::new();
    for one in adopted {
        let volume = one.spec.name.clone();
        let record = one.files.get(depth).cloned();
        let record = record.ok_or_else(|| Refusal::Incomplete { snapshot: name.to_owned(), volume: volume.clone() })?;
        files.insert(volume, record);
    }
    let id = SnapshotId(model.next_snapshot);
    let (description, state, parent) = (String::new(), State::Ready, model.current);
    let snapshot = Snapshot { id, name: name.to_owned(), description, created: now, state, parent, files };
    model.snapshots.insert(id, snapshot);
    model.current = Some(id);
    model.next_snapshot += 1;
    Ok(())
}

/// Returns a volume to attach to an existing set.
pub(super) fn volume(files: &VolumeFiles, spec: &VolumeSpec, model: &Model, options: &AdoptOptions) -> Result<Volume> {
    let volume = read(files, spec, options)?.volume(files, 0)?;
    let mut with = model.clone();
    with.volumes.push(volume.clone());
    check(files, &with, std::slice::from_ref(&volume.active), options)?;
    Ok(volume)
}

/// Refuses contradictions, one file under two names, and those of the new files that images outside
/// the set depend on.
fn check(files: &VolumeFiles, model: &Model, new: &[FileRecord], options: &AdoptOptions) -> Result<()> {
    if let Some(why) = model.contradictions().into_iter().next() {
        return Err(super::Error::Catalogue { file: model.vm.clone(), why });
    }
    refuse_same_files(files, model)?;
    let path = |record: &FileRecord| files.path(&record.file.path);
    let searched: Vec<PathBuf> = new.iter().filter(|record| !record.protected).map(path).collect();
    let known: Vec<PathBuf> = model.records().map(|(_, _, record)| path(record)).collect();
    let found = find_dependents(files.file_system(), &searched, &known, &options.dependents)?;
    let Some(first) = found.first() else { return Ok(()) };
    let images = found.iter().filter(|dependent| dependent.file == first.file);
    let images = images.map(|dependent| dependent.image.display().to_string()).collect();
    Err(Refusal::Dependents { path: first.file.display().to_string(), images }.into())
}

/// Refuses one file under two recorded names. Several volumes may share a base by one name.
fn refuse_same_files(files: &VolumeFiles, model: &Model) -> Result<()> {
    let records = model.records().map(|(_, _, record)| record.file.path.as_str());
    let bases = model.all_volumes().flat_map(|volume| &volume.bases).map(|base| base.file.path.as_str());
    let paths: BTreeSet<&str> = records.chain(bases).collect();
    let mut known: BTreeMap<FileId, &str> = BTreeMap::new();
    for path in paths {
        // A file that is missing has no identity: `attach` must work beside a volume whose file is
        // lost.
        let Ok(Some(identity)) = files.identity(path) else { continue };
        if let Some(first) = known.insert(identity, path) {
            let (first, second) = (files.shown(first), files.shown(path));
            return Err(Refusal::SameFile { first, second }.into());
        }
    }
    Ok(())
}
