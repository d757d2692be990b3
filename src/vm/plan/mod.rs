//! The plan of an operation, as a value. A dry run prints it, the journal stores it, and an
//! executor carries it out.

pub(super) mod planner;
pub(super) mod refusal;
pub(super) mod request;

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::merge::Direction;
use crate::storage::FileId;

use super::model::edit::Edit;
use super::model::{FileRef, Model, OverlayShape, SetId, SnapshotId, State};

/// The purpose of a plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", rename_all_fields = "kebab-case")]
#[non_exhaustive]
pub enum Purpose {
    /// Creates a snapshot.
    Create {
        /// Its name.
        name: String,
        /// If set, a running guest flushes and freezes its file systems first.
        quiesce: bool,
    },
    /// Reverts all volumes to a snapshot.
    Revert {
        /// Its name.
        name: String,
    },
    /// Deletes a snapshot.
    Delete {
        /// Its number.
        id: SnapshotId,
        /// Its name.
        name: String,
    },
    /// Resizes a volume.
    Resize {
        /// Its name.
        volume: String,
        /// The new size in bytes.
        size: u64,
    },
    /// Attaches or detaches volumes.
    Volumes,
}

impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Create { name, .. } => write!(f, "create snapshot {name}"),
            Self::Revert { name } => write!(f, "revert to snapshot {name}"),
            Self::Delete { name, .. } => write!(f, "delete snapshot {name}"),
            Self::Resize { volume, size } => write!(f, "resize volume {volume} to {size} bytes"),
            Self::Volumes => write!(f, "change the volumes"),
        }
    }
}

/// An overlay to create.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct NewOverlay {
    /// The volume.
    pub volume: String,
    /// The file, which does not exist yet.
    pub file: FileRef,
    /// The backing file.
    pub backing: FileRef,
    /// The virtual size in bytes.
    pub size: u64,
    /// The geometry.
    pub shape: OverlayShape,
    /// The file whose owner, mode and further attributes the overlay gets: the active file.
    pub like: String,
    /// If set, the set's [`OverlayProvider`](super::OverlayProvider) creates the file.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub provided: bool,
    /// The name in the request to the provider; empty without a provider.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub request: String,
}

/// The merge of two files of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct MergeStep {
    /// The upper file.
    pub top: FileRef,
    /// The backing file of the top.
    pub base: FileRef,
    /// The files beneath the base, the topmost first.
    pub below: Vec<FileRef>,
    /// The direction: [`Direction::Commit`] writes the base, [`Direction::Pull`] the top.
    pub direction: Direction,
    /// If set, the top is the active file, which may have changed since a failed attempt.
    pub active: bool,
    /// If set, internal snapshots of the top may be destroyed: the caller named each of them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub drop_internal: bool,
}

impl MergeStep {
    /// Returns the file that the merge writes. It survives, with its path and its format.
    #[must_use]
    pub fn survivor(&self) -> &FileRef {
        if self.direction == Direction::Pull { &self.top } else { &self.base }
    }
}

/// One action on the files of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", rename_all_fields = "kebab-case")]
#[non_exhaustive]
pub enum Step {
    /// Merges two files.
    Merge(MergeStep),
    /// Changes the backing file in a file's header to one with the same content.
    Relink {
        /// The file.
        file: FileRef,
        /// The present backing file.
        from: FileRef,
        /// The new backing file.
        to: FileRef,
    },
    /// Resizes the active file.
    Resize {
        /// The file.
        file: FileRef,
        /// The files beneath it, the topmost first.
        below: Vec<FileRef>,
        /// The new virtual size in bytes.
        size: u64,
    },
}

/// A file to remove once no record names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Removal {
    /// The path.
    pub path: String,
    /// The identity that the file had in the preflight. A file with another identity is not
    /// removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<FileId>,
    /// If set, the set's [`OverlayProvider`](super::OverlayProvider) removes the file.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub provided: bool,
}

/// A file that leaves the set and is not removed. Its fate is the caller's decision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Release {
    /// The path.
    pub path: String,
    /// The reason why it is not removed.
    pub reason: String,
}

/// The files that leave the set by a part of a plan.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Leaving {
    /// The files to remove.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remove: Vec<Removal>,
    /// The files that stay where they are.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub release: Vec<Release>,
}

impl Leaving {
    /// Returns true if no file leaves the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.release.is_empty()
    }
}

/// The work on one volume, independent of the other volumes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct VolumeWork {
    /// The volume.
    pub volume: String,
    /// The actions, in order.
    pub steps: Vec<Step>,
    /// The changes of the model that record the work.
    pub edits: Vec<Edit>,
    /// The files that leave the set afterwards.
    #[serde(default, skip_serializing_if = "Leaving::is_empty")]
    pub leaving: Leaving,
}

impl VolumeWork {
    /// Returns true if the model records the work as done.
    #[must_use]
    pub fn is_recorded(&self, model: &Model) -> bool {
        self.edits.iter().any(|edit| match edit {
            Edit::DropFile { id, volume } => {
                model.snapshot(*id).is_none_or(|snapshot| !snapshot.files.contains_key(volume))
            }
            _ => false,
        })
    }
}

/// A part of an operation that ends with one update of the catalogue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Stage {
    /// The changes of the model before any file changes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub begin: Vec<Edit>,
    /// The changes that take back `begin`, if the stage is called off before it published anything.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cancel: Vec<Edit>,
    /// The overlays to create, for all volumes or for none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub create: Vec<NewOverlay>,
    /// The work on each volume.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub work: Vec<VolumeWork>,
    /// The changes of the model when all volumes are done.
    pub end: Vec<Edit>,
    /// The files that leave the set afterwards.
    #[serde(default, skip_serializing_if = "Leaving::is_empty")]
    pub leaving: Leaving,
}

/// A change of a volume's virtual size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct SizeChange {
    /// The volume.
    pub volume: String,
    /// The size before, in bytes.
    pub old: u64,
    /// The size afterwards, in bytes.
    pub new: u64,
}

/// The estimated cost of merging one volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Cost {
    /// The direction of the plan.
    pub direction: Direction,
    /// The data to move, in bytes.
    pub data: u64,
    /// The new space needed, in bytes.
    pub space_needed: u64,
    /// The free space, in bytes, if known.
    pub space_free: Option<u64>,
    /// The data that the other direction would move, in bytes; absent if it is not possible.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub other_direction_data: Option<u64>,
}

/// The plan of an operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Plan {
    /// The identity of the set.
    pub set: SetId,
    /// The number of the operation in this set.
    pub id: u64,
    /// The purpose.
    pub purpose: Purpose,
    /// The stages, in order.
    pub stages: Vec<Stage>,
    /// The volumes whose size changes, and no others.
    pub size_changes: Vec<SizeChange>,
    /// The estimated cost of each volume's merge, by volume name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub costs: BTreeMap<String, Cost>,
}

impl Plan {
    /// Returns the model after the operation.
    #[must_use]
    pub fn outcome(&self, model: &Model) -> Model {
        let mut model = model.clone();
        for stage in &self.stages {
            Edit::apply_all(&stage.begin, &mut model);
            stage.work.iter().for_each(|work| Edit::apply_all(&work.edits, &mut model));
            Edit::apply_all(&stage.end, &mut model);
        }
        model.last_operation.id = self.id;
        model.last_operation.stages = self.stages.len();
        model
    }

    /// Returns true if only the catalogue changes.
    #[must_use]
    pub fn is_bookkeeping(&self) -> bool {
        self.stages.len() == 1
            && self.stages.iter().all(|stage| {
                stage.create.is_empty()
                    && stage.leaving.remove.is_empty()
                    && stage.work.is_empty()
                    // Two updates of the catalogue need a journal between them.
                    && stage.begin.is_empty()
            })
    }

    /// Returns the merges with their volumes.
    pub fn merges(&self) -> impl Iterator<Item = (&str, &MergeStep)> {
        self.works().flat_map(|work| {
            work.steps.iter().filter_map(|step| match step {
                Step::Merge(merge) => Some((work.volume.as_str(), merge)),
                _ => None,
            })
        })
    }

    /// Returns the merge steps for modification.
    pub(in crate::vm) fn merges_mut(&mut self) -> impl Iterator<Item = &mut MergeStep> {
        let works = self.stages.iter_mut().flat_map(|stage| &mut stage.work);
        works.flat_map(|work| &mut work.steps).filter_map(|step| match step {
            Step::Merge(merge) => Some(merge),
            _ => None,
        })
    }

    /// Returns the work on volumes over all stages.
    pub fn works(&self) -> impl Iterator<Item = &VolumeWork> {
        self.stages.iter().flat_map(|stage| &stage.work)
    }

    /// Returns what leaves the set, in order of execution.
    pub fn leaving(&self) -> impl Iterator<Item = &Leaving> {
        self.stages
            .iter()
            .flat_map(|stage| stage.work.iter().map(|work| &work.leaving).chain(std::iter::once(&stage.leaving)))
    }

    /// Returns the files to remove, in order of execution.
    pub fn removals(&self) -> impl Iterator<Item = &Removal> {
        self.leaving().flat_map(|leaving| &leaving.remove)
    }

    /// Returns the files that leave the set and are not removed.
    pub fn releases(&self) -> impl Iterator<Item = &Release> {
        self.leaving().flat_map(|leaving| &leaving.release)
    }

    /// Returns the overlays to create.
    pub fn created(&self) -> impl Iterator<Item = &NewOverlay> {
        self.stages.iter().flat_map(|stage| &stage.create)
    }

    /// Returns the state in a model of the snapshot that the plan concerns.
    #[must_use]
    pub fn state_in(&self, model: &Model) -> Option<State> {
        match &self.purpose {
            Purpose::Create { name, .. } | Purpose::Revert { name } => model.find(name).map(|known| known.state),
            Purpose::Delete { id, .. } => model.snapshot(*id).map(|known| known.state),
            Purpose::Resize { .. } | Purpose::Volumes => None,
        }
    }

    /// Returns the snapshots that the plan merges.
    pub fn merged(&self) -> impl Iterator<Item = SnapshotId> {
        self.stages.iter().flat_map(|stage| &stage.begin).filter_map(|edit| match edit {
            Edit::SetState { id, .. } => Some(*id),
            _ => None,
        })
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Merge(merge) if merge.direction == Direction::Pull => {
                write!(f, "pull {} into {}", merge.base, merge.top)
            }
            Self::Merge(merge) => write!(f, "commit {} into {}", merge.top, merge.base),
            Self::Relink { file, to, .. } => write!(f, "relink {file} to {to}"),
            Self::Resize { file, size, .. } => write!(f, "resize {file} to {size} bytes"),
        }
    }
}

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes, {} of new space", self.data, self.space_needed)?;
        let other = if self.direction == Direction::Commit { Direction::Pull } else { Direction::Commit };
        match self.other_direction_data {
            Some(data) => write!(f, "; {other} would move {data} bytes"),
            None => write!(f, "; {other} is not possible"),
        }
    }
}

impl Leaving {
    fn write(&self, f: &mut fmt::Formatter<'_>, prefix: &str) -> fmt::Result {
        for removal in &self.remove {
            writeln!(f, "  {prefix}remove {}", removal.path)?;
        }
        for release in &self.release {
            writeln!(f, "  {prefix}release {}: {}", release.path, release.reason)?;
        }
        Ok(())
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.purpose)?;
        for stage in &self.stages {
            for overlay in &stage.create {
                let (volume, file, backing) = (&overlay.volume, &overlay.file, &overlay.backing);
                writeln!(f, "  {volume}: create {file} backed by {backing}, {} bytes", overlay.size)?;
            }
            for work in &stage.work {
                for step in &work.steps {
                    write!(f, "  {}: {step}", work.volume)?;
                    match (step, self.costs.get(&work.volume)) {
                        (Step::Merge(_), Some(cost)) => writeln!(f, " ({cost})")?,
                        _ => writeln!(f)?,
                    }
                }
                work.leaving.write(f, &format!("{}: ", work.volume))?;
            }
            stage.leaving.write(f, "")?;
        }
        for change in &self.size_changes {
            writeln!(f, "  {}: size {} -> {} bytes", change.volume, change.old, change.new)?;
        }
        if self.is_bookkeeping() {
            writeln!(f, "  catalogue only")?;
        }
        Ok(())
    }
}
