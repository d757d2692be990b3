//! Changes of the model. Each sets something to a value, so that applying it twice is applying it
//! once.

use serde::{Deserialize, Serialize};

use super::{FileRecord, Model, Snapshot, SnapshotId, State};

/// One change of the model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", rename_all_fields = "kebab-case")]
#[non_exhaustive]
pub enum Edit {
    /// Adds a snapshot.
    AddSnapshot(Snapshot),
    /// Removes a snapshot.
    RemoveSnapshot {
        /// The snapshot.
        id: SnapshotId,
    },
    /// Sets the state of a snapshot.
    SetState {
        /// The snapshot.
        id: SnapshotId,
        /// The new state.
        state: State,
    },
    /// Sets the parent of a snapshot.
    SetParent {
        /// The snapshot.
        id: SnapshotId,
        /// The new parent.
        parent: Option<SnapshotId>,
    },
    /// Sets a snapshot's file of one volume.
    SetFile {
        /// The snapshot.
        id: SnapshotId,
        /// The volume.
        volume: String,
        /// The new file.
        record: FileRecord,
    },
    /// Removes a snapshot's file of one volume from the records.
    DropFile {
        /// The snapshot.
        id: SnapshotId,
        /// The volume.
        volume: String,
    },
    /// Sets the active file of a volume. A detached volume becomes attached.
    SetActive {
        /// The volume.
        volume: String,
        /// The new file.
        record: FileRecord,
    },
    /// Detaches a volume. Its active file leaves the set.
    Detach {
        /// The volume.
        volume: String,
    },
    /// Sets the current snapshot.
    SetCurrent {
        /// The snapshot.
        id: Option<SnapshotId>,
    },
    /// Raises the numbers to assign next.
    Advance {
        /// The number of the next snapshot.
        next_snapshot: u64,
        /// The number of the next overlay.
        next_file: u64,
    },
}

impl Edit {
    /// Applies the change. If its subject does not exist any more, nothing changes.
    pub fn apply(&self, model: &mut Model) {
        match self {
            Self::AddSnapshot(snapshot) => {
                model.snapshots.insert(snapshot.id, snapshot.clone());
            }
            Self::RemoveSnapshot { id } => {
                model.snapshots.remove(id);
                forget_detached(model);
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
                forget_detached(model);
            }
            Self::SetActive { volume, record } => set_active(model, volume, record),
            Self::Detach { volume } => {
                if let Some(at) = model.volumes.iter().position(|known| known.name == *volume) {
                    let volume = model.volumes.remove(at);
                    model.detached.push(volume);
                    forget_detached(model);
                }
            }
            Self::SetCurrent { id } => model.current = *id,
            Self::Advance { next_snapshot, next_file } => {
                model.next_snapshot = model.next_snapshot.max(*next_snapshot);
                model.next_file = model.next_file.max(*next_file);
            }
        }
    }

    /// Applies several changes in order.
    pub fn apply_all(edits: &[Self], model: &mut Model) {
        for edit in edits {
            edit.apply(model);
        }
    }
}

fn set_active(model: &mut Model, name: &str, record: &FileRecord) {
    if let Some(at) = model.detached.iter().position(|known| known.name == name) {
        let volume = model.detached.remove(at);
        model.volumes.push(volume);
    }
    if let Some(volume) = model.volumes.iter_mut().find(|known| known.name == name) {
        volume.active = record.clone();
    }
}

/// Removes detached volumes of which no snapshot holds a file any more.
fn forget_detached(model: &mut Model) {
    let snapshots = &model.snapshots;
    let is_held = |name: &str| snapshots.values().any(|snapshot| snapshot.files.contains_key(name));
    model.detached.retain(|volume| is_held(&volume.name));
}
