//! Changes of the model: each sets something to a value, so that making it twice is making it once.

use serde::{Deserialize, Serialize};

use crate::vm::model::{FileRecord, Model, Snapshot, SnapshotId, State};

/// One change of the model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", rename_all_fields = "kebab-case")]
#[non_exhaustive]
pub enum Edit {
    /// A new snapshot.
    AddSnapshot(Snapshot),
    /// A snapshot is no more.
    RemoveSnapshot {
        /// Which.
        id: SnapshotId,
    },
    /// A snapshot's state.
    SetState {
        /// Which snapshot.
        id: SnapshotId,
        /// Its new state.
        state: State,
    },
    /// What a snapshot stands on.
    SetParent {
        /// Which snapshot.
        id: SnapshotId,
        /// Its new parent.
        parent: Option<SnapshotId>,
    },
    /// A snapshot's file of one volume.
    SetFile {
        /// Which snapshot.
        id: SnapshotId,
        /// Which volume.
        volume: String,
        /// Its new file.
        record: FileRecord,
    },
    /// A snapshot has no file of this volume any more.
    DropFile {
        /// Which snapshot.
        id: SnapshotId,
        /// Which volume.
        volume: String,
    },
    /// The file that the VM writes.
    SetActive {
        /// Which volume.
        volume: String,
        /// Its new file.
        record: FileRecord,
    },
    /// What the active files stand on.
    SetCurrent {
        /// Which snapshot.
        id: Option<SnapshotId>,
    },
    /// Numbers up to these are given.
    Advance {
        /// The number of the next snapshot.
        next_snapshot: u64,
        /// The number of the next overlay.
        next_file: u64,
    },
}

impl Edit {
    /// Makes the change. What it is about may be gone: then there is nothing to change.
    pub fn apply(&self, model: &mut Model) {
        match self {
            Self::AddSnapshot(snapshot) => {
                model.snapshots.insert(snapshot.id, snapshot.clone());
            }
            Self::RemoveSnapshot { id } => {
                model.snapshots.remove(id);
            }
            Self::SetState { id, state } => {
                if let Some(snapshot) = model.snapshots.get_mut(id) {
                    snapshot.state = *state;
                }
            }
            Self::SetParent { id, parent } => {
                if let Some(snapshot) = model.snapshots.get_mut(id) {
                    snapshot.parent = *parent;
                }
            }
            Self::SetFile { id, volume, record } => {
                if let Some(snapshot) = model.snapshots.get_mut(id) {
                    snapshot.files.insert(volume.clone(), record.clone());
                }
            }
            Self::DropFile { id, volume } => {
                if let Some(snapshot) = model.snapshots.get_mut(id) {
                    snapshot.files.remove(volume);
                }
            }
            Self::SetActive { volume, record } => {
                if let Some(volume) = model.volumes.iter_mut().find(|known| known.name == *volume) {
                    volume.active = record.clone();
                }
            }
            Self::SetCurrent { id } => model.current = *id,
            Self::Advance { next_snapshot, next_file } => {
                model.next_snapshot = model.next_snapshot.max(*next_snapshot);
                model.next_file = model.next_file.max(*next_file);
            }
        }
    }

    /// Makes several changes.
    pub fn apply_all(edits: &[Self], model: &mut Model) {
        for edit in edits {
            edit.apply(model);
        }
    }
}
