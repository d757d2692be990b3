//! What there is, for people and programs.

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
    /// The snapshot that the active files stand on. Where that is hidden and hidden ones are not listed: the listed one that
    /// it stands on.
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
    /// Its name.
    pub name: String,
    /// The path of the file that the VM writes.
    pub active: String,
    /// Its virtual size in bytes.
    pub virtual_size: u64,
}

/// A snapshot in a listing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct ListedSnapshot {
    /// Its name.
    pub name: String,
    /// What may be done with it.
    pub state: State,
    /// The snapshot that it stands on; hidden ones that are not listed are passed over.
    pub parent: Option<String>,
    /// Whether it is the current one.
    pub current: bool,
    /// What its maker said of it.
    pub description: String,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// The path of its file of each volume.
    pub files: BTreeMap<String, String>,
}

impl Listing {
    /// Lists a model, with the hidden snapshots or without.
    #[must_use]
    pub fn of(model: &Model, files: &VolumeFiles, hidden: bool) -> Self {
        let path = |recorded: &str| files.path(recorded).display().to_string();
        let listed = |snapshot: &&Snapshot| hidden || snapshot.state != State::Hidden;
        // The next listed one from here downwards.
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
