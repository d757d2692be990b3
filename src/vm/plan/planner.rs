//! The planner: computes the plan of an operation from the model and the request, without any I/O.

use crate::chain::Format;

use crate::vm::model::edit::Edit;
use crate::vm::model::{FileRecord, FileRef, MAX_NAME, Model, Snapshot, SnapshotId, State, Volume};

use super::refusal::Refusal;
use super::request::{FileFacts, PlanOptions, Request};
use super::{Leaving, NewOverlay, Plan, Purpose, Release, Removal, SizeChange, Stage, Step, VolumeWork};

mod merge;

/// Computes the plan of an operation.
///
/// # Errors
/// [`Refusal`]: the reason why the operation is not possible.
///
/// ```
/// use qcow2_chain::chain::Format;
/// use qcow2_chain::vm::{FileRecord, FileRef, Model, PlanOptions, Request, Volume, plan};
///
/// let file = FileRef { path: "vda.qcow2".into(), format: Format::Qcow2 };
/// let model = Model::new("vm", vec![Volume::new("vda", FileRecord::new(file, 1 << 30))]);
/// let request = Request::Create {
///     name: "s1".into(),
///     description: String::new(),
///     created: 0,
///     quiesce: false,
///     max_depth: 256,
/// };
/// let options = PlanOptions::default().with_token("5eed");
/// let after = plan(&model, &request, &options)?.outcome(&model);
/// assert_eq!(after.find("s1").unwrap().files["vda"].file.path, "vda.qcow2");
/// assert_eq!(after.volumes[0].active.file.path, "vm-vda.1-5eed.qcow2");
/// # Ok::<(), qcow2_chain::vm::Refusal>(())
/// ```
pub fn plan(model: &Model, request: &Request, options: &PlanOptions) -> Result<Plan, Refusal> {
    let planner = Planner { model, options };
    if let Some(merging) = model.merging() {
        let resumes = match request {
            Request::Delete { name } => model.find(name).is_some_and(|found| found.id == merging.id),
            Request::ResumeDelete { id } => *id == merging.id,
            _ => false,
        };
        if !resumes {
            let (id, name) = (merging.id, merging.name.clone());
            return Err(Refusal::Unfinished { operation: Purpose::Delete { id, name }.to_string() });
        }
    }
    match request {
        Request::Create { name, description, created, quiesce, max_depth } => {
            let snapshot = planner.new_snapshot(name, description, *created)?;
            planner.create(snapshot, *quiesce, *max_depth)
        }
        Request::Revert { name, detach_missing } => planner.revert(planner.find(name)?, *detach_missing),
        Request::Delete { name } => planner.delete(planner.find(name)?),
        Request::ResumeDelete { id } => {
            let unknown = || Refusal::UnknownSnapshot { name: id.to_string() };
            planner.delete(model.snapshot(*id).ok_or_else(unknown)?)
        }
        Request::Resize { volume, size, shrink } => planner.resize(volume, *size, *shrink),
    }
}

/// Refuses a snapshot name that is empty, too long or has control characters.
pub(in crate::vm) fn check_snapshot_name(name: &str) -> Result<(), Refusal> {
    if name.is_empty() || name.len() > MAX_NAME {
        return Err(Refusal::NameLength { len: name.len(), max: MAX_NAME });
    }
    if name.chars().any(char::is_control) {
        return Err(Refusal::NameControl { name: name.escape_debug().to_string() });
    }
    Ok(())
}

/// Returns the file name of a new overlay.
pub(in crate::vm) fn overlay_name(vm: &str, volume: &str, number: u64, token: &str) -> String {
    format!("{}.{number}-{token}.qcow2", overlay_stem(vm, volume))
}

/// Returns the beginning of the file names of a volume's overlays, up to the dot before the number.
pub(in crate::vm) fn overlay_stem(vm: &str, volume: &str) -> String {
    format!("{vm}-{volume}")
}

struct Planner<'a> {
    model: &'a Model,
    options: &'a PlanOptions,
}

impl Planner<'_> {
    fn plan(&self, purpose: Purpose, stages: Vec<Stage>) -> Plan {
        let id = self.model.last_operation.id + 1;
        Plan {
            set: self.model.set.clone(),
            id,
            purpose,
            stages,
            size_changes: Vec::new(),
            costs: std::collections::BTreeMap::new(),
        }
    }

    fn find(&self, name: &str) -> Result<&Snapshot, Refusal> {
        self.model.find(name).ok_or_else(|| Refusal::UnknownSnapshot { name: name.to_owned() })
    }

    fn facts(&self, path: &str) -> FileFacts {
        self.options.facts.get(path).cloned().unwrap_or_default()
    }

    fn new_snapshot(&self, name: &str, description: &str, created: u64) -> Result<Snapshot, Refusal> {
        check_snapshot_name(name)?;
        if self.model.find(name).is_some() {
            return Err(Refusal::NameTaken { name: name.to_owned() });
        }
        let records = self.model.volumes.iter().map(|volume| (volume.name.clone(), volume.active.clone()));
        Ok(Snapshot {
            id: SnapshotId(self.model.next_snapshot),
            name: name.to_owned(),
            description: description.to_owned(),
            created,
            state: State::Ready,
            parent: self.model.current,
            files: records.collect(),
        })
    }

    /// Returns the path of a volume's new overlay, and the name in the request if a provider
    /// creates it.
    fn overlay_path(&self, volume: &Volume, number: u64) -> (String, Option<String>) {
        if let Some(given) = self.options.overlays.get(&volume.name) {
            return (given.path.clone(), given.provided.clone());
        }
        let name = overlay_name(&self.model.vm, &volume.name, number, &self.options.token);
        let directory = match &volume.overlay_dir {
            Some(directory) if directory == "." => String::new(),
            Some(directory) => format!("{}/", directory.trim_end_matches('/')),
            None => {
                let path = &volume.active.file.path;
                path.rfind('/').map_or_else(String::new, |at| path[..=at].to_owned())
            }
        };
        (format!("{directory}{name}"), None)
    }

    /// Returns new overlays on these files, and the edits that make them the active files.
    fn overlays<'a>(
        &self,
        on: impl Iterator<Item = (&'a Volume, &'a FileRecord)>,
    ) -> (Vec<NewOverlay>, Vec<Edit>, u64) {
        let mut number = self.model.next_file;
        let (mut create, mut edits) = (Vec::new(), Vec::new());
        for (volume, record) in on {
            let (path, request) = self.overlay_path(volume, number);
            let provided = request.is_some();
            let file = FileRef { path, format: Format::Qcow2 };
            let active = FileRecord { provided, ..FileRecord::new(file.clone(), record.virtual_size) };
            edits.push(Edit::SetActive { volume: volume.name.clone(), record: active });
            create.push(NewOverlay {
                volume: volume.name.clone(),
                file,
                backing: record.file.clone(),
                size: record.virtual_size,
                shape: volume.overlay,
                like: volume.active.file.path.clone(),
                provided,
                request: request.unwrap_or_default(),
            });
            number += 1;
        }
        (create, edits, number)
    }

    fn create(&self, snapshot: Snapshot, quiesce: bool, max_depth: usize) -> Result<Plan, Refusal> {
        if self.model.volumes.is_empty() {
            return Err(Refusal::NoVolumes);
        }
        for volume in &self.model.volumes {
            let depth = self.model.active_chain(volume).len() + 1;
            if depth > max_depth {
                return Err(Refusal::Depth { volume: volume.name.clone(), depth, max: max_depth });
            }
        }
        let volumes = self.model.volumes.iter();
        let (create, mut end, next_file) = self.overlays(volumes.map(|volume| (volume, &volume.active)));
        let (id, name) = (snapshot.id, snapshot.name.clone());
        end.push(Edit::AddSnapshot(snapshot));
        end.push(Edit::SetCurrent { id: Some(id) });
        end.push(Edit::Advance { next_snapshot: id.0 + 1, next_file });
        let stage = Stage { create, end, ..Stage::default() };
        Ok(self.plan(Purpose::Create { name, quiesce }, vec![stage]))
    }

    fn revert(&self, to: &Snapshot, detach_missing: bool) -> Result<Plan, Refusal> {
        if self.options.running {
            return Err(Refusal::Running { operation: "revert" });
        }
        if to.state != State::Ready {
            return Err(Refusal::NotReady { name: to.name.clone(), state: to.state });
        }
        let (held, lacking): (Vec<_>, Vec<_>) =
            self.model.volumes.iter().partition(|volume| to.files.contains_key(&volume.name));
        if !lacking.is_empty() && !detach_missing {
            let volumes = lacking.iter().map(|volume| volume.name.clone()).collect();
            return Err(Refusal::LacksVolumes { snapshot: to.name.clone(), volumes });
        }
        let on: Vec<(&Volume, &FileRecord)> =
            self.model.all_volumes().filter_map(|volume| Some((volume, to.files.get(&volume.name)?))).collect();
        if on.is_empty() {
            return Err(Refusal::LacksVolumes { snapshot: to.name.clone(), volumes: Vec::new() });
        }
        let (create, mut end, next_file) = self.overlays(on.iter().copied());
        let mut leaving = Leaving::default();
        for volume in &held {
            self.discard(&volume.active, &mut leaving)?;
        }
        for volume in &lacking {
            end.push(Edit::Detach { volume: volume.name.clone() });
            let reason = format!("volume {} is detached: snapshot {} lacks it", volume.name, to.name);
            leaving.release.push(Release { path: volume.active.file.path.clone(), reason });
        }
        end.push(Edit::SetCurrent { id: Some(to.id) });
        end.push(Edit::Advance { next_snapshot: self.model.next_snapshot, next_file });
        let stage = Stage { create, end, leaving, ..Stage::default() };
        let attached = on.iter().filter(|(volume, _)| self.model.volume(&volume.name).is_some());
        let changed = attached.filter(|(volume, record)| volume.active.virtual_size != record.virtual_size);
        let size_changes = changed.map(|(volume, record)| SizeChange {
            volume: volume.name.clone(),
            old: volume.active.virtual_size,
            new: record.virtual_size,
        });
        let mut plan = self.plan(Purpose::Revert { name: to.name.clone() }, vec![stage]);
        plan.size_changes = size_changes.collect();
        self.clean_up(&mut plan, self.model.current)?;
        Ok(plan)
    }

    fn delete(&self, snapshot: &Snapshot) -> Result<Plan, Refusal> {
        if snapshot.state == State::Hidden {
            return Err(Refusal::NotReady { name: snapshot.name.clone(), state: snapshot.state });
        }
        let purpose = Purpose::Delete { id: snapshot.id, name: snapshot.name.clone() };
        match self.model.deps(snapshot.id).as_slice() {
            [] => {
                let mut plan = self.plan(purpose, vec![self.drop_files(snapshot)?]);
                self.clean_up(&mut plan, snapshot.parent)?;
                Ok(plan)
            }
            [dep] => Ok(self.plan(purpose, vec![self.merge(self.model, snapshot, *dep)?])),
            _ => {
                let end = vec![Edit::SetState { id: snapshot.id, state: State::Hidden }];
                Ok(self.plan(purpose, vec![Stage { end, ..Stage::default() }]))
            }
        }
    }

    /// Returns the stage that removes a snapshot without dependents.
    fn drop_files(&self, snapshot: &Snapshot) -> Result<Stage, Refusal> {
        let mut leaving = Leaving::default();
        for record in snapshot.files.values() {
            self.discard(record, &mut leaving)?;
        }
        Ok(Stage { end: vec![Edit::RemoveSnapshot { id: snapshot.id }], leaving, ..Stage::default() })
    }

    /// Decides on a file that no record will name: it is removed, or released where it may not be
    /// removed.
    fn discard(&self, record: &FileRecord, leaving: &mut Leaving) -> Result<(), Refusal> {
        let path = record.file.path.clone();
        let facts = self.facts(&path);
        if !facts.dependents.is_empty() {
            return Err(Refusal::Dependents { path, images: facts.dependents });
        }
        if let Some(held) = facts.in_use {
            return Err(Refusal::InUse { path, held });
        }
        let reason = match facts.unremovable {
            _ if record.protected => Some("it is protected".to_owned()),
            reason => reason,
        };
        match reason {
            Some(reason) => leaving.release.push(Release { path, reason }),
            None => leaving.remove.push(Removal { path, identity: facts.identity, provided: record.provided }),
        }
        Ok(())
    }

    /// Adds the merge of a hidden snapshot that has only one dependent left after the plan so far.
    /// A merge leaves the number of dependents of the snapshot beneath unchanged, so that one such
    /// merge is enough.
    fn clean_up(&self, plan: &mut Plan, parent: Option<SnapshotId>) -> Result<(), Refusal> {
        let after = plan.outcome(self.model);
        let Some(hidden) = parent.and_then(|id| after.snapshot(id)).filter(|parent| parent.state == State::Hidden)
        else {
            return Ok(());
        };
        if let [dep] = after.deps(hidden.id).as_slice() {
            let options = self.with_released(plan);
            let planner = Planner { model: self.model, options: &options };
            plan.stages.push(planner.merge(&after, hidden, *dep)?);
        }
        Ok(())
    }

    /// Returns the options with the files that a plan releases as dependents outside the set, which
    /// they become.
    fn with_released(&self, plan: &Plan) -> PlanOptions {
        let mut options = self.options.clone();
        for release in plan.releases() {
            let Some((volume, on, _)) = self.model.records().find(|(_, _, record)| record.file.path == release.path)
            else {
                continue;
            };
            if let Some(backing) = self.model.files_from(on, volume).first() {
                options.facts.entry(backing.path.clone()).or_default().dependents.push(release.path.clone());
            }
        }
        options
    }

    fn resize(&self, volume: &str, size: u64, shrink: bool) -> Result<Plan, Refusal> {
        let unknown = || Refusal::UnknownVolume { name: volume.to_owned() };
        let volume = self.model.volume(volume).ok_or_else(unknown)?;
        let old = volume.active.virtual_size;
        if size == 0 || !size.is_multiple_of(512) {
            return Err(Refusal::Size { size });
        }
        if size < old && !shrink {
            return Err(Refusal::Shrinks { volume: volume.name.clone(), old, new: size });
        }
        let path = &volume.active.file.path;
        if volume.active.protected {
            return Err(Refusal::Protected { path: path.clone() });
        }
        let facts = self.facts(path);
        if let Some(reason) = facts.unwritable {
            return Err(Refusal::Unwritable { path: path.clone(), reason });
        }
        if let Some(held) = facts.in_use {
            return Err(Refusal::InUse { path: path.clone(), held });
        }
        if !facts.dependents.is_empty() {
            return Err(Refusal::Dependents { path: path.clone(), images: facts.dependents });
        }
        let below = self.model.files_from(self.model.current, volume);
        let record = FileRecord { virtual_size: size, ..volume.active.clone() };
        let work = VolumeWork {
            volume: volume.name.clone(),
            steps: vec![Step::Resize { file: volume.active.file.clone(), below, size }],
            edits: vec![Edit::SetActive { volume: volume.name.clone(), record }],
            leaving: Leaving::default(),
        };
        let stage = Stage { work: vec![work], ..Stage::default() };
        let mut plan = self.plan(Purpose::Resize { volume: volume.name.clone(), size }, vec![stage]);
        if size != old {
            plan.size_changes.push(SizeChange { volume: volume.name.clone(), old, new: size });
        }
        Ok(plan)
    }
}
