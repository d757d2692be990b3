//! What an operation will do, as a value: it is printed before it is done, kept in the journal while it is done, and done by
//! whichever executor there is.

pub(super) mod planner;
pub(super) mod refusal;

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::merge::Direction;

use crate::vm::model::edit::Edit;
use crate::vm::model::{FileRef, Model, OverlayShape, SnapshotId, State};

/// What a plan was made for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", rename_all_fields = "kebab-case")]
#[non_exhaustive]
pub enum Purpose {
    /// A snapshot is taken.
    Create {
        /// Its name.
        name: String,
        /// Whether the guest is asked to bring its file systems in order first.
        quiesce: bool,
    },
    /// All volumes go back to a snapshot.
    Revert {
        /// Its name.
        name: String,
    },
    /// A snapshot is deleted.
    Delete {
        /// Its name.
        name: String,
    },
    /// A volume gets another size.
    Resize {
        /// Its name.
        volume: String,
        /// The new size in bytes.
        size: u64,
    },
    /// Volumes come or go.
    Volumes,
}

impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Create { name, .. } => write!(f, "create snapshot {name}"),
            Self::Revert { name } => write!(f, "revert to snapshot {name}"),
            Self::Delete { name } => write!(f, "delete snapshot {name}"),
            Self::Resize { volume, size } => write!(f, "resize volume {volume} to {size} bytes"),
            Self::Volumes => write!(f, "change the volumes"),
        }
    }
}

/// A new overlay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct NewOverlay {
    /// Whose.
    pub volume: String,
    /// Its file, which does not exist yet.
    pub file: FileRef,
    /// What it stands on.
    pub backing: FileRef,
    /// Its virtual size in bytes.
    pub size: u64,
    /// Its geometry.
    pub shape: OverlayShape,
}

/// Two files of a volume become one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MergeStep {
    /// The upper file.
    pub top: FileRef,
    /// The file it stands on.
    pub base: FileRef,
    /// What the base stands on, the topmost first.
    pub below: Vec<FileRef>,
    /// Whether the base takes in the top ([`Direction::Commit`]), or the top the base ([`Direction::Pull`]).
    pub direction: Direction,
    /// Whether the top is what the VM writes: it may have changed since an attempt that failed.
    pub active: bool,
}

/// One thing to do to a volume's files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", rename_all_fields = "kebab-case")]
#[non_exhaustive]
pub enum Step {
    /// Two files become one.
    Merge(MergeStep),
    /// A file gets the name of one that nobody needs any more; its old name stays until all have heard of the new one.
    TakeName {
        /// The file.
        from: String,
        /// Its new name.
        to: String,
    },
    /// A file's header names another file that it stands on, which reads the same.
    Relink {
        /// The file.
        file: FileRef,
        /// What it stood on.
        from: FileRef,
        /// What it stands on.
        to: FileRef,
    },
    /// The active file gets another virtual size.
    Resize {
        /// The file.
        file: FileRef,
        /// What it stands on, the topmost first.
        below: Vec<FileRef>,
        /// The new size in bytes.
        size: u64,
    },
}

/// What is done to one volume, whatever becomes of the others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct VolumeWork {
    /// Which volume.
    pub volume: String,
    /// What is done, in order.
    pub steps: Vec<Step>,
    /// What is recorded then.
    pub edits: Vec<Edit>,
    /// The files that are removed then.
    pub unlink: Vec<String>,
}

impl VolumeWork {
    /// Whether it is recorded as done.
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

/// A part of an operation that ends with the catalogue saying that it is done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Stage {
    /// What is recorded before anything else.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub begin: Vec<Edit>,
    /// New overlays, for all volumes or for none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub create: Vec<NewOverlay>,
    /// What is done to each volume.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub work: Vec<VolumeWork>,
    /// What is recorded when all volumes are done.
    pub end: Vec<Edit>,
    /// The files that are removed then.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unlink: Vec<String>,
}

/// A volume's virtual size changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SizeChange {
    /// Which volume.
    pub volume: String,
    /// Its size before, in bytes.
    pub old: u64,
    /// Its size afterwards, in bytes.
    pub new: u64,
}

/// What a merge of one volume is expected to cost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Cost {
    /// Whether the base takes in the top, or the top the base.
    pub direction: Direction,
    /// Bytes of data to move.
    pub data: u64,
    /// Bytes of new space.
    pub space_needed: u64,
    /// Bytes that are free for it, if that can be told.
    pub space_free: Option<u64>,
}

/// What an operation will do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Plan {
    /// Its number among the operations of this VM.
    pub id: u64,
    /// What it is for.
    pub purpose: Purpose,
    /// What is done, in order.
    pub stages: Vec<Stage>,
    /// The volumes whose size changes, and no others.
    pub size_changes: Vec<SizeChange>,
    /// What merging each volume is expected to cost.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub costs: BTreeMap<String, Cost>,
}

impl Plan {
    /// The model after all of it.
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

    /// Whether it touches no file but the catalogue.
    #[must_use]
    pub fn is_bookkeeping(&self) -> bool {
        self.stages.len() == 1
            && self.stages.iter().all(|stage| {
                stage.create.is_empty()
                    && stage.unlink.is_empty()
                    && stage.work.is_empty()
                    // What is recorded before and after is one record.
                    && stage.begin.is_empty()
            })
    }

    /// The merges, with their volumes.
    pub fn merges(&self) -> impl Iterator<Item = (&str, &MergeStep)> {
        self.stages.iter().flat_map(|stage| &stage.work).flat_map(|work| {
            work.steps.iter().filter_map(|step| match step {
                Step::Merge(merge) => Some((work.volume.as_str(), merge)),
                _ => None,
            })
        })
    }

    /// The files that will be gone, in the order in which they go.
    pub fn vanishing(&self) -> impl Iterator<Item = String> {
        let in_work = |stage: &Stage| stage.work.iter().flat_map(|work| &work.unlink).cloned().collect::<Vec<_>>();
        self.stages.iter().flat_map(move |stage| in_work(stage).into_iter().chain(stage.unlink.iter().cloned()))
    }

    /// The overlays that will be made.
    pub fn created(&self) -> impl Iterator<Item = &NewOverlay> {
        self.stages.iter().flat_map(|stage| &stage.create)
    }

    /// The state, in a model, of the snapshot that it is for.
    #[must_use]
    pub fn state_in(&self, model: &Model) -> Option<State> {
        let id = match &self.purpose {
            Purpose::Create { name, .. } | Purpose::Revert { name } => {
                return model.find(name).map(|known| known.state);
            }
            Purpose::Delete { .. } => self.stages.iter().flat_map(|stage| &stage.end).find_map(|edit| match edit {
                Edit::SetState { id, .. } => Some(*id),
                _ => None,
            })?,
            Purpose::Resize { .. } | Purpose::Volumes => return None,
        };
        model.snapshot(id).map(|known| known.state)
    }

    /// The snapshots that it merges away.
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
                write!(f, "pull {} up into {}", merge.base, merge.top)
            }
            Self::Merge(merge) => write!(f, "commit {} into {}", merge.top, merge.base),
            Self::TakeName { from, to } => write!(f, "let {from} take the name {to}"),
            Self::Relink { file, to, .. } => write!(f, "relink {file} to {to}"),
            Self::Resize { file, size, .. } => write!(f, "resize {file} to {size} bytes"),
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.purpose)?;
        for stage in &self.stages {
            for overlay in &stage.create {
                let (volume, file, backing) = (&overlay.volume, &overlay.file, &overlay.backing);
                writeln!(f, "  {volume}: create {file} on {backing}, {} bytes", overlay.size)?;
            }
            for work in &stage.work {
                for step in &work.steps {
                    write!(f, "  {}: {step}", work.volume)?;
                    match (step, self.costs.get(&work.volume)) {
                        (Step::Merge(_), Some(cost)) => {
                            writeln!(f, " ({} bytes, {} of new space)", cost.data, cost.space_needed)?;
                        }
                        _ => writeln!(f)?,
                    }
                }
                for path in &work.unlink {
                    writeln!(f, "  {}: remove {path}", work.volume)?;
                }
            }
            for path in &stage.unlink {
                writeln!(f, "  remove {path}")?;
            }
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
