//! From what is known and what is wanted to what will be done, without any I/O.

use std::collections::BTreeMap;

use crate::chain::Format;
use crate::merge::Direction;

use crate::vm::model::edit::Edit;
use crate::vm::model::{Dependent, FileRecord, FileRef, MAX_NAME, Model, Snapshot, SnapshotId, State, Volume};
use crate::vm::plan::refusal::Refusal;
use crate::vm::plan::{MergeStep, NewOverlay, Plan, Purpose, SizeChange, Stage, Step, VolumeWork};

/// What is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Request {
    /// A snapshot of all volumes.
    Create {
        /// Its name.
        name: String,
        /// What is to be remembered with it.
        description: String,
        /// Now, in seconds since 1970.
        created: u64,
        /// Whether the guest is asked to bring its file systems in order first.
        quiesce: bool,
        /// The most files that a volume may consist of afterwards.
        max_depth: usize,
    },
    /// All volumes as they were at a snapshot.
    Revert {
        /// Its name.
        name: String,
    },
    /// A snapshot less.
    Delete {
        /// Its name.
        name: String,
    },
    /// Another size of a volume.
    Resize {
        /// The volume's name.
        volume: String,
        /// Its new size in bytes.
        size: u64,
        /// Whether it may become smaller.
        shrink: bool,
    },
}

/// What the planner is told besides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PlanOptions {
    /// Whether the VM is running.
    pub running: bool,
    /// Which way each volume is merged; [`Direction::Commit`] where nothing is said and it can be.
    pub directions: BTreeMap<String, Direction>,
    /// Whether a merged file keeps the upper file's name where that took in the lower one. By default it takes the lower
    /// one's name, so that a volume without snapshots has its first path.
    pub keep_top_names: bool,
}

impl PlanOptions {
    /// The same, for a running VM or not.
    #[must_use]
    pub fn with_running(mut self, running: bool) -> Self {
        self.running = running;
        self
    }

    /// The same with another way to merge a volume.
    #[must_use]
    pub fn with_direction(mut self, volume: impl Into<String>, direction: Direction) -> Self {
        self.directions.insert(volume.into(), direction);
        self
    }

    /// The same, keeping the upper files' names or not.
    #[must_use]
    pub fn with_keep_top_names(mut self, keep: bool) -> Self {
        self.keep_top_names = keep;
        self
    }
}

/// Decides what an operation will do.
///
/// # Errors
/// Why it is not done. Nothing is changed by asking.
///
/// ```
/// use qcow2_chain::chain::Format;
/// use qcow2_chain::vm::{FileRecord, FileRef, Model, PlanOptions, Request, Volume, plan};
///
/// let file = FileRef { path: "vda.qcow2".into(), format: Format::Qcow2 };
/// let active = FileRecord { file, virtual_size: 1 << 30, bytes_on_disk: None, protected: false };
/// let volume = Volume { name: "vda".into(), active, bases: Vec::new(), overlay: Default::default() };
/// let model = Model::new("vm", vec![volume]);
/// let request = Request::Create {
///     name: "s1".into(),
///     description: String::new(),
///     created: 0,
///     quiesce: false,
///     max_depth: 256,
/// };
/// let after = plan(&model, &request, &PlanOptions::default())?.outcome(&model);
/// assert_eq!(after.find("s1").unwrap().files["vda"].file.path, "vda.qcow2");
/// # Ok::<(), qcow2_chain::vm::Refusal>(())
/// ```
pub fn plan(model: &Model, request: &Request, options: &PlanOptions) -> Result<Plan, Refusal> {
    let planner = Planner { model, options };
    if let Some(merging) = model.merging()
        && !matches!(request, Request::Delete { name } if model.find(name).is_some_and(|found| found.id == merging.id))
    {
        return Err(Refusal::Unfinished { operation: Purpose::Delete { name: merging.name.clone() }.to_string() });
    }
    match request {
        Request::Create { name, description, created, quiesce, max_depth } => {
            let snapshot = planner.new_snapshot(name, description, *created)?;
            planner.create(snapshot, *quiesce, *max_depth)
        }
        Request::Revert { name } => planner.revert(planner.find(name)?),
        Request::Delete { name } => planner.delete(planner.find(name)?),
        Request::Resize { volume, size, shrink } => planner.resize(volume, *size, *shrink),
    }
}

struct Planner<'a> {
    model: &'a Model,
    options: &'a PlanOptions,
}

impl Planner<'_> {
    fn plan(&self, purpose: Purpose, stages: Vec<Stage>) -> Plan {
        let id = self.model.last_operation.id + 1;
        Plan { id, purpose, stages, size_changes: Vec::new(), costs: BTreeMap::new() }
    }

    fn find(&self, name: &str) -> Result<&Snapshot, Refusal> {
        self.model.find(name).ok_or_else(|| Refusal::UnknownSnapshot { name: name.to_owned() })
    }

    fn new_snapshot(&self, name: &str, description: &str, created: u64) -> Result<Snapshot, Refusal> {
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(Refusal::NameLength { len: name.len(), max: MAX_NAME });
        }
        if name.chars().any(char::is_control) {
            return Err(Refusal::NameControl);
        }
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

    /// The overlay that takes this number, of a size, over a file.
    fn overlay(&self, volume: &Volume, number: u64, size: u64, backing: &FileRef) -> NewOverlay {
        let path = overlay_path(&self.model.vm, volume, number);
        NewOverlay {
            volume: volume.name.clone(),
            file: FileRef { path, format: Format::Qcow2 },
            backing: backing.clone(),
            size,
            shape: volume.overlay,
        }
    }

    /// New overlays for all volumes, numbered on, and the edits that make them the active files.
    fn overlays<'a>(
        &self,
        on: impl Iterator<Item = (&'a Volume, &'a FileRecord)>,
    ) -> (Vec<NewOverlay>, Vec<Edit>, u64) {
        let mut number = self.model.next_file;
        let (mut create, mut edits) = (Vec::new(), Vec::new());
        for (volume, record) in on {
            let overlay = self.overlay(volume, number, record.virtual_size, &record.file);
            let active = FileRecord {
                file: overlay.file.clone(),
                virtual_size: overlay.size,
                bytes_on_disk: None,
                protected: false,
            };
            edits.push(Edit::SetActive { volume: volume.name.clone(), record: active });
            create.push(overlay);
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

    fn revert(&self, to: &Snapshot) -> Result<Plan, Refusal> {
        if self.options.running {
            return Err(Refusal::Running { operation: "revert" });
        }
        if to.state != State::Ready {
            return Err(Refusal::NotReady { name: to.name.clone(), state: to.state });
        }
        let mut on = Vec::new();
        for volume in &self.model.volumes {
            on.push((volume, record(to, volume)?));
        }
        let (create, mut end, next_file) = self.overlays(on.iter().copied());
        end.push(Edit::SetCurrent { id: Some(to.id) });
        end.push(Edit::Advance { next_snapshot: self.model.next_snapshot, next_file });
        let removable = self.model.volumes.iter().filter(|volume| !volume.active.protected);
        let unlink = removable.map(|volume| volume.active.file.path.clone()).collect();
        let stage = Stage { create, end, unlink, ..Stage::default() };
        let changed = on.iter().filter(|(volume, record)| volume.active.virtual_size != record.virtual_size);
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
        let purpose = Purpose::Delete { name: snapshot.name.clone() };
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

    /// The stage that removes a snapshot on which nothing stands.
    fn drop_files(&self, snapshot: &Snapshot) -> Result<Stage, Refusal> {
        for volume in self.model.volumes.iter().filter(|_| snapshot.state != State::Merging) {
            record(snapshot, volume)?;
        }
        let removable = snapshot.files.values().filter(|record| !record.protected);
        Ok(Stage {
            end: vec![Edit::RemoveSnapshot { id: snapshot.id }],
            unlink: removable.map(|record| record.file.path.clone()).collect(),
            ..Stage::default()
        })
    }

    /// Something that stood on a snapshot is gone after the plan so far: a hidden one on which only one thing still stands
    /// goes too. A merge leaves as many on the snapshot beneath as before, so that nothing follows from it.
    fn clean_up(&self, plan: &mut Plan, parent: Option<SnapshotId>) -> Result<(), Refusal> {
        let after = plan.outcome(self.model);
        let Some(hidden) = parent.and_then(|id| after.snapshot(id)).filter(|parent| parent.state == State::Hidden)
        else {
            return Ok(());
        };
        if let [dep] = after.deps(hidden.id).as_slice() {
            plan.stages.push(self.merge(&after, hidden, *dep)?);
        }
        Ok(())
    }

    /// The stage that merges a snapshot with the one thing that stands on it.
    fn merge(&self, model: &Model, merged: &Snapshot, dep: Dependent) -> Result<Stage, Refusal> {
        let mut work = Vec::new();
        for volume in &model.volumes {
            let Some(base) = merged.files.get(&volume.name) else {
                if merged.state == State::Merging {
                    continue; // it is merged already
                }
                return Err(lacks(merged, volume));
            };
            work.push(self.merge_volume(model, merged, dep, volume, base)?);
        }
        let handed_on = match dep {
            Dependent::Volumes => Edit::SetCurrent { id: merged.parent },
            Dependent::Snapshot(id) => Edit::SetParent { id, parent: merged.parent },
        };
        Ok(Stage {
            begin: vec![Edit::SetState { id: merged.id, state: State::Merging }],
            work,
            end: vec![handed_on, Edit::RemoveSnapshot { id: merged.id }],
            ..Stage::default()
        })
    }

    fn merge_volume(
        &self,
        model: &Model,
        merged: &Snapshot,
        dep: Dependent,
        volume: &Volume,
        base: &FileRecord,
    ) -> Result<VolumeWork, Refusal> {
        let (top, on_top) = match dep {
            Dependent::Volumes => (&volume.active, Vec::new()),
            Dependent::Snapshot(id) => {
                let dep = model.snapshot(id).ok_or_else(|| lacks(merged, volume))?;
                (record(dep, volume)?, files_on(model, id, volume)?)
            }
        };
        let is_open = self.options.running && model.active_chain(volume).contains(&top.file);
        if is_open && base.protected {
            return Err(Refusal::Running { operation: "merge into the file above a protected one" });
        }
        let direction = match self.options.directions.get(&volume.name) {
            // A hypervisor merges downwards.
            _ if is_open => Direction::Commit,
            _ if base.protected => Direction::Pull,
            Some(Direction::Pull) => Direction::Pull,
            _ => Direction::Commit,
        };
        if top.protected {
            return Err(Refusal::Protected { path: top.file.path.clone() });
        }
        let commit = direction == Direction::Commit;
        let renamed = !commit && !base.protected && !self.options.keep_top_names;
        let path = if commit || renamed { &base.file.path } else { &top.file.path };
        let format = if commit { base.file.format } else { top.file.format };
        let survivor = FileRecord { file: FileRef { path: path.clone(), format }, ..top.clone() };

        let mut steps = vec![Step::Merge(MergeStep {
            top: top.file.clone(),
            base: base.file.clone(),
            below: model.files_from(merged.parent, volume),
            direction,
            active: dep == Dependent::Volumes,
        })];
        if renamed {
            steps.push(Step::TakeName { from: top.file.path.clone(), to: base.file.path.clone() });
        }
        if survivor.file.path != top.file.path {
            let relink = |file| Step::Relink { file, from: top.file.clone(), to: survivor.file.clone() };
            steps.extend(on_top.into_iter().map(relink));
        }
        let dead = if commit || renamed { Some(&top.file) } else { Some(&base.file).filter(|_| !base.protected) };
        let unlink = dead.map(|file| file.path.clone()).into_iter().collect();
        let moved = match dep {
            Dependent::Volumes => Edit::SetActive { volume: volume.name.clone(), record: survivor },
            Dependent::Snapshot(id) => Edit::SetFile { id, volume: volume.name.clone(), record: survivor },
        };
        let dropped = Edit::DropFile { id: merged.id, volume: volume.name.clone() };
        Ok(VolumeWork { volume: volume.name.clone(), steps, edits: vec![moved, dropped], unlink })
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
        if volume.active.protected {
            return Err(Refusal::Protected { path: volume.active.file.path.clone() });
        }
        let below = self.model.files_from(self.model.current, volume);
        let record = FileRecord { virtual_size: size, ..volume.active.clone() };
        let work = VolumeWork {
            volume: volume.name.clone(),
            steps: vec![Step::Resize { file: volume.active.file.clone(), below, size }],
            edits: vec![Edit::SetActive { volume: volume.name.clone(), record }],
            unlink: Vec::new(),
        };
        let stage = Stage { work: vec![work], ..Stage::default() };
        let mut plan = self.plan(Purpose::Resize { volume: volume.name.clone(), size }, vec![stage]);
        if size != old {
            plan.size_changes.push(SizeChange { volume: volume.name.clone(), old, new: size });
        }
        Ok(plan)
    }
}

/// A snapshot's file of a volume.
fn record<'a>(snapshot: &'a Snapshot, volume: &Volume) -> Result<&'a FileRecord, Refusal> {
    snapshot.files.get(&volume.name).ok_or_else(|| lacks(snapshot, volume))
}

fn lacks(snapshot: &Snapshot, volume: &Volume) -> Refusal {
    Refusal::Incomplete { snapshot: snapshot.name.clone(), volume: volume.name.clone() }
}

/// The files of a volume that stand on a snapshot's, hidden ones and the active one included.
fn files_on(model: &Model, id: SnapshotId, volume: &Volume) -> Result<Vec<FileRef>, Refusal> {
    let mut files = Vec::new();
    for dep in model.deps(id) {
        match dep {
            Dependent::Volumes => files.push(volume.active.file.clone()),
            Dependent::Snapshot(child) => {
                let Some(child) = model.snapshot(child) else { continue };
                let record = child.files.get(&volume.name).ok_or_else(|| lacks(child, volume))?;
                files.push(record.file.clone());
            }
        }
    }
    Ok(files)
}

/// The path of a volume's overlay of this number: beside the active file.
pub(in crate::vm) fn overlay_path(vm: &str, volume: &Volume, number: u64) -> String {
    let name = format!("{}.{number}.qcow2", overlay_stem(vm, &volume.name));
    match volume.active.file.path.rfind('/') {
        Some(at) => format!("{}{name}", &volume.active.file.path[..=at]),
        None => name,
    }
}

/// How the names of a volume's overlays begin, up to the dot before the number.
pub(in crate::vm) fn overlay_stem(vm: &str, volume: &str) -> String {
    format!("{vm}-{volume}")
}
