//! The listing of volumes and snapshots.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::vm::files::VolumeFiles;
use crate::vm::model::{Model, Snapshot, SnapshotId, State};

/// A VM's volumes and snapshots, as `vm list --json` prints them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Listing {
    /// The VM's name.
    pub vm: String,
    /// The snapshot whose files back the active files. If it is not listed: the next listed
    /// snapshot towards the root.
    pub current: Option<String>,
    /// The volumes.
    pub volumes: Vec<ListedVolume>,
    /// The snapshots, the oldest first.
    pub snapshots: Vec<ListedSnapshot>,
}

/// A volume in a listing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct ListedVolume {
    /// The name.
    pub name: String,
    /// The path of the active file.
    pub active: String,
    /// The virtual size in bytes.
    pub virtual_size: u64,
}

/// A snapshot in a listing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct ListedSnapshot {
    /// The name.
    pub name: String,
    /// The state, which decides on the possible operations.
    pub state: State,
    /// The parent. If it is not listed: the next listed snapshot towards the root.
    pub parent: Option<String>,
    /// If set, the snapshot is the current one.
    pub current: bool,
    /// The description given at creation.
    pub description: String,
    /// The creation time in seconds since 1970.
    pub created: u64,
    /// The path of the snapshot's file, by volume name.
    pub files: BTreeMap<String, String>,
}

impl Listing {
    /// Lists a model, hidden snapshots included if `hidden` is set.
    #[must_use]
    pub fn of(model: &Model, files: &VolumeFiles, hidden: bool) -> Self {
        let path = |recorded: &str| files.path(recorded).display().to_string();
        let listed = |snapshot: &&Snapshot| hidden || snapshot.state != State::Hidden;
        // The next listed snapshot towards the root, this one included.
        let next = |from: Option<SnapshotId>| {
            let mut at = from;
            while let Some(snapshot) = at.and_then(|id| model.snapshot(id)) {
                if listed(&snapshot) {
                    return Some(snapshot);
                }
                at = snapshot.parent;
            }
            None
        };
        let current = next(model.current);
        let snapshots = model.snapshots.values().filter(listed).map(|snapshot| ListedSnapshot {
            name: snapshot.name.clone(),
            state: snapshot.state,
            parent: next(snapshot.parent).map(|parent| parent.name.clone()),
            current: current.is_some_and(|current| current.id == snapshot.id),
            description: snapshot.description.clone(),
            created: snapshot.created,
            files: snapshot.files.iter().map(|(name, record)| (name.clone(), path(&record.file.path))).collect(),
        });
        Self {
            vm: model.vm.clone(),
            current: current.map(|snapshot| snapshot.name.clone()),
            volumes: model
                .volumes
                .iter()
                .map(|volume| ListedVolume {
                    name: volume.name.clone(),
                    active: path(&volume.active.file.path),
                    virtual_size: volume.active.virtual_size,
                })
                .collect(),
            snapshots: snapshots.collect(),
        }
    }
}
