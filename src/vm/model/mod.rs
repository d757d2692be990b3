//! What is known of a VM: its volumes, its snapshots, and which file each of them is.
//!
//! Snapshot *s* owns, for each volume, the file that the VM was writing **before** *s* was taken: a snapshot's files are frozen,
//! the volumes' active files are written. What a file stands on follows from the tree and is not recorded twice.

pub(super) mod catalogue;
pub(super) mod edit;
pub(super) mod store;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::chain::Format;

/// The longest name of a snapshot, in bytes.
pub const MAX_NAME: usize = 255;
/// No snapshot, overlay or operation gets this number, so that there is always a next one.
const END_OF_NUMBERS: u64 = 1 << 62;

/// What tells a snapshot from others of its VM for ever: no number is given twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SnapshotId(pub u64);

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}

/// What may be done with a snapshot. None of these is a dead end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It can be listed, read, reverted to and deleted.
    Ready,
    /// It was deleted while several things still stood on its files. It goes as soon as only one does.
    Hidden,
    /// Its deletion has begun and can only be resumed.
    Merging,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ready => "ready",
            Self::Hidden => "hidden",
            Self::Merging => "merging",
        })
    }
}

/// An image file by its name and its format, which is never guessed.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FileRef {
    /// The path, relative to the catalogue's directory, or absolute.
    pub path: String,
    /// The format.
    pub format: Format,
}

impl fmt::Display for FileRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.path)
    }
}

/// What is recorded of an image file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FileRecord {
    /// Which file.
    #[serde(flatten)]
    pub file: FileRef,
    /// Its virtual size in bytes. Of an active file: when it was last looked at.
    pub virtual_size: u64,
    /// The bytes that it occupied when it was frozen, if that could be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_on_disk: Option<u64>,
    /// Whether it belongs to others too: it is neither written nor removed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub protected: bool,
}

/// By what a base is recognised, so that one that was replaced is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Fingerprint {
    /// The file's length in bytes.
    pub len: u64,
    /// The CRC-32 of what its first 64 KiB hold, the header among it.
    pub header: u32,
    /// The CRC-32 of its L1 table; 0 for a raw image.
    pub l1: u32,
}

/// A file beneath a volume's first one: a template that others may use too. It is neither written nor removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Base {
    /// Which file.
    #[serde(flatten)]
    pub file: FileRef,
    /// What it was like when the volume was taken in.
    pub fingerprint: Fingerprint,
}

/// How a volume's overlays are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct OverlayShape {
    /// The cluster size, as a power of two.
    pub cluster_bits: u32,
    /// Whether L2 entries are extended.
    pub extended_l2: bool,
}

impl Default for OverlayShape {
    fn default() -> Self {
        Self { cluster_bits: 16, extended_l2: false }
    }
}

/// A disk of the VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Volume {
    /// Its name, unique in the VM: `vda`.
    pub name: String,
    /// The file that the VM writes.
    pub active: FileRecord,
    /// What the tree's first file stands on, the topmost first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bases: Vec<Base>,
    /// How its overlays are made.
    #[serde(default)]
    pub overlay: OverlayShape,
}

/// A moment of all volumes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Snapshot {
    /// Its number.
    pub id: SnapshotId,
    /// Its name, unique among those that are ready.
    pub name: String,
    /// What its maker said of it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// What may be done with it.
    pub state: State,
    /// The snapshot on whose files its files stand.
    pub parent: Option<SnapshotId>,
    /// Its file of each volume. Only one that is being merged may lack some: those are merged already.
    pub files: BTreeMap<String, FileRecord>,
}

/// The last operation that changed the catalogue, and how many of its stages are in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct LastOperation {
    /// Its number; no number is given twice.
    pub id: u64,
    /// How many of its stages are completed.
    pub stages: usize,
}

/// What stands directly on a snapshot's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Dependent {
    /// Another snapshot's files.
    Snapshot(SnapshotId),
    /// The active files.
    Volumes,
}

/// All that is known of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Model {
    /// The VM's name.
    pub vm: String,
    /// Its volumes.
    pub volumes: Vec<Volume>,
    /// Its snapshots.
    #[serde(with = "as_list")]
    pub snapshots: BTreeMap<SnapshotId, Snapshot>,
    /// The snapshot on whose files the active files stand.
    pub current: Option<SnapshotId>,
    /// The number of the next snapshot.
    pub next_snapshot: u64,
    /// The number of the next overlay.
    pub next_file: u64,
    /// The last operation.
    pub last_operation: LastOperation,
}

/// Snapshots as a list: they carry their numbers.
mod as_list {
    use super::{BTreeMap, Deserialize, Snapshot, SnapshotId};

    pub(in crate::vm) fn serialize<S: serde::Serializer>(
        snapshots: &BTreeMap<SnapshotId, Snapshot>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(snapshots.values())
    }

    pub(in crate::vm) fn deserialize<'de, D: serde::Deserializer<'de>>(
        deserializer: D,
    ) -> Result<BTreeMap<SnapshotId, Snapshot>, D::Error> {
        let mut snapshots = BTreeMap::new();
        for snapshot in Vec::<Snapshot>::deserialize(deserializer)? {
            let id = snapshot.id;
            if snapshots.insert(id, snapshot).is_some() {
                return Err(serde::de::Error::custom(format!("snapshot {id} twice")));
            }
        }
        Ok(snapshots)
    }
}

impl Model {
    /// A VM without snapshots.
    #[must_use]
    pub fn new(vm: impl Into<String>, volumes: Vec<Volume>) -> Self {
        Self {
            vm: vm.into(),
            volumes,
            snapshots: BTreeMap::new(),
            current: None,
            next_snapshot: 1,
            next_file: 1,
            last_operation: LastOperation::default(),
        }
    }

    /// The volume of this name.
    #[must_use]
    pub fn volume(&self, name: &str) -> Option<&Volume> {
        self.volumes.iter().find(|volume| volume.name == name)
    }

    /// The snapshot of this number.
    #[must_use]
    pub fn snapshot(&self, id: SnapshotId) -> Option<&Snapshot> {
        self.snapshots.get(&id)
    }

    /// The snapshot of this name: one that is ready, else one whose deletion has begun. Hidden ones have no name to be found
    /// by: it may have been given to another.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<&Snapshot> {
        let of_state = |state| self.snapshots.values().find(|known| known.name == name && known.state == state);
        of_state(State::Ready).or_else(|| of_state(State::Merging))
    }

    /// The snapshot whose deletion has begun, if there is one.
    #[must_use]
    pub fn merging(&self) -> Option<&Snapshot> {
        self.snapshots.values().find(|snapshot| snapshot.state == State::Merging)
    }

    /// The snapshots directly on this one.
    pub fn children(&self, id: SnapshotId) -> impl Iterator<Item = &Snapshot> {
        self.snapshots.values().filter(move |snapshot| snapshot.parent == Some(id))
    }

    /// What stands directly on a snapshot's files.
    #[must_use]
    pub fn deps(&self, id: SnapshotId) -> Vec<Dependent> {
        let volumes = (self.current == Some(id)).then_some(Dependent::Volumes);
        self.children(id).map(|child| Dependent::Snapshot(child.id)).chain(volumes).collect()
    }

    /// The files of a volume from what stands on a snapshot downwards: the snapshot's own first, the bases last. Without a
    /// snapshot, the bases alone.
    #[must_use]
    pub fn files_from(&self, from: Option<SnapshotId>, volume: &Volume) -> Vec<FileRef> {
        let mut files = Vec::new();
        let mut next = from;
        // A tree has no more steps than snapshots.
        for _ in 0..=self.snapshots.len() {
            let Some(snapshot) = next.and_then(|id| self.snapshot(id)) else { break };
            files.extend(snapshot.files.get(&volume.name).map(|record| record.file.clone()));
            next = snapshot.parent;
        }
        files.extend(volume.bases.iter().map(|base| base.file.clone()));
        files
    }

    /// The files of a volume as the VM sees it: the active one first.
    #[must_use]
    pub fn active_chain(&self, volume: &Volume) -> Vec<FileRef> {
        let mut files = vec![volume.active.file.clone()];
        files.extend(self.files_from(self.current, volume));
        files
    }

    /// All records of files that are neither bases nor twice: (volume, what the file stands on, record).
    pub fn records(&self) -> impl Iterator<Item = (&Volume, Option<SnapshotId>, &FileRecord)> {
        let active = self.volumes.iter().map(|volume| (volume, self.current, &volume.active));
        let frozen = self.snapshots.values().flat_map(move |snapshot| {
            let known = move |(name, record): (&String, _)| Some((self.volume(name)?, snapshot.parent, record));
            snapshot.files.iter().filter_map(known)
        });
        active.chain(frozen)
    }

    /// Whether the records contradict one another: what is wrong, in words; empty where nothing is.
    #[must_use]
    pub fn contradictions(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut names = BTreeSet::new();
        for volume in &self.volumes {
            if !names.insert(&volume.name) {
                wrong.push(format!("volume {} is there twice", volume.name));
            }
        }
        let mut visible = BTreeSet::new();
        for snapshot in self.snapshots.values() {
            self.find_wrong_in(snapshot, &mut wrong);
            if snapshot.state == State::Ready && !visible.insert(&snapshot.name) {
                wrong.push(format!("the name {} is taken twice", snapshot.name));
            }
        }
        if self.snapshots.values().filter(|snapshot| snapshot.state == State::Merging).count() > 1 {
            wrong.push("two snapshots are being merged".to_owned());
        }
        for (what, number) in [
            ("next snapshot", self.next_snapshot),
            ("next overlay", self.next_file),
            ("last operation", self.last_operation.id),
        ] {
            if number >= END_OF_NUMBERS {
                wrong.push(format!("the {what} has the number {number}: they end before {END_OF_NUMBERS}"));
            }
        }
        match self.current {
            Some(id) if self.snapshot(id).is_none() => wrong.push(format!("the current snapshot {id} does not exist")),
            None if !self.snapshots.is_empty() => wrong.push("no snapshot is the current one".to_owned()),
            _ => {}
        }
        let mut paths = BTreeSet::new();
        for (_, _, record) in self.records() {
            if !paths.insert(&record.file.path) {
                wrong.push(format!("{} is recorded twice", record.file.path));
            }
        }
        for base in self.volumes.iter().flat_map(|volume| &volume.bases) {
            if paths.contains(&base.file.path) {
                wrong.push(format!("{} is a base and is not", base.file.path));
            }
        }
        wrong
    }

    fn find_wrong_in(&self, snapshot: &Snapshot, wrong: &mut Vec<String>) {
        let name = &snapshot.name;
        if snapshot.id.0 >= self.next_snapshot {
            wrong.push(format!("snapshot {name} has a number that was not given yet"));
        }
        if name.is_empty() || name.len() > MAX_NAME {
            wrong.push(format!("a snapshot's name has {} bytes", name.len()));
        }
        // A parent is older than its children, so that there are no loops. (A merge hands a child to its grandparent.)
        match snapshot.parent {
            Some(parent) if parent >= snapshot.id => wrong.push(format!("snapshot {name} is older than its parent")),
            Some(parent) if self.snapshot(parent).is_none() => wrong.push(format!("{name}'s parent does not exist")),
            _ => {}
        }
        for volume in self.volumes.iter().filter(|volume| !snapshot.files.contains_key(&volume.name)) {
            if snapshot.state != State::Merging {
                wrong.push(format!("snapshot {name} lacks volume {}", volume.name));
            }
        }
        for volume in snapshot.files.keys().filter(|volume| self.volume(volume).is_none()) {
            wrong.push(format!("snapshot {name} has a volume {volume} that does not exist"));
        }
    }

    /// The hidden snapshots that should be gone: fewer than two things stand on them. Between two operations there are none.
    #[must_use]
    pub fn overdue(&self) -> Vec<&Snapshot> {
        let hidden = self.snapshots.values().filter(|snapshot| snapshot.state == State::Hidden);
        hidden.filter(|snapshot| self.deps(snapshot.id).len() < 2).collect()
    }
}
