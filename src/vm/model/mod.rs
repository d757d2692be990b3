//! The model of a VM: its volumes, its snapshots, and the file of each.
//!
//! Snapshot *s* owns, for each volume, the file that the VM wrote **before** *s* was taken. The
//! files of snapshots are frozen; each volume's active file is written. The backing order follows
//! from the tree and is not recorded a second time.

pub(super) mod catalogue;
mod consistency;
pub(super) mod edit;
pub(super) mod identity;
pub(super) mod store;

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::chain::Format;
use crate::storage::FileStamp;

pub use identity::SetId;

/// The longest name of a snapshot, in bytes.
pub const MAX_NAME: usize = 255;

/// The number of a snapshot, unique in its set for ever: no number is assigned twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SnapshotId(pub u64);

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}

/// The state of a snapshot. Every state has a way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Listed, readable, revertible and deletable.
    Ready,
    /// Deleted by the user while several dependents need its files. It is merged as soon as one is
    /// left.
    Hidden,
    /// A journalled deletion is under way. It can be resumed, or called off while nothing is
    /// published.
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

/// An image file: its path and its format. The format is never guessed.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FileRef {
    /// The path, absolute or relative to the catalogue's directory.
    pub path: String,
    /// The format.
    pub format: Format,
}

impl fmt::Display for FileRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.path)
    }
}

/// The record of an image file that belongs to the set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct FileRecord {
    /// The file.
    #[serde(flatten)]
    pub file: FileRef,
    /// The virtual size in bytes. For an active file: the size at the last operation.
    pub virtual_size: u64,
    /// The bytes that the file occupied when it was frozen, if known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_on_disk: Option<u64>,
    /// If set, the file is never written once it is frozen, and never removed: it is shared with
    /// others.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub protected: bool,
    /// If set, an [`OverlayProvider`](super::OverlayProvider) created the file, and only it may
    /// remove it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub provided: bool,
}

impl FileRecord {
    /// Creates the record of a file of this virtual size in bytes, neither protected nor provided.
    #[must_use]
    pub fn new(file: FileRef, virtual_size: u64) -> Self {
        Self { file, virtual_size, bytes_on_disk: None, protected: false, provided: false }
    }
}

/// The fingerprint of a base, by which a change or replacement is detected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Fingerprint {
    /// The file's length in bytes.
    pub len: u64,
    /// The CRC-32 of the first 64 KiB, which include the header.
    pub header: u32,
    /// The CRC-32 of the L1 table; 0 for a raw image.
    pub l1: u32,
    /// The inode and times of the file, where the file system has them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stamp: Option<FileStamp>,
}

impl Fingerprint {
    /// Creates a fingerprint without inode and times.
    #[must_use]
    pub fn new(len: u64, header: u32, l1: u32) -> Self {
        Self { len, header, l1, stamp: None }
    }
}

/// A file beneath a volume's first file: a template that others may share. It is never written or
/// removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Base {
    /// The file.
    #[serde(flatten)]
    pub file: FileRef,
    /// The fingerprint at adoption, or when it was last accepted.
    pub fingerprint: Fingerprint,
}

impl Base {
    /// Creates the record of a base.
    #[must_use]
    pub fn new(file: FileRef, fingerprint: Fingerprint) -> Self {
        Self { file, fingerprint }
    }
}

/// The geometry of a volume's overlays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct OverlayShape {
    /// The cluster size as a power of two.
    pub cluster_bits: u32,
    /// If set, overlays have extended L2 entries.
    pub extended_l2: bool,
}

impl Default for OverlayShape {
    fn default() -> Self {
        Self { cluster_bits: 16, extended_l2: false }
    }
}

/// A virtual disk of the VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Volume {
    /// The name, unique in the VM, such as `vda`.
    pub name: String,
    /// The file that the VM writes.
    pub active: FileRecord,
    /// The files beneath the tree's first file, the topmost first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bases: Vec<Base>,
    /// The geometry of new overlays.
    #[serde(default)]
    pub overlay: OverlayShape,
    /// The directory for new overlays. If absent, they are created beside the active file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay_dir: Option<String>,
}

impl Volume {
    /// Creates a volume without bases and with the default geometry of overlays.
    #[must_use]
    pub fn new(name: impl Into<String>, active: FileRecord) -> Self {
        let overlay = OverlayShape::default();
        Self { name: name.into(), active, bases: Vec::new(), overlay, overlay_dir: None }
    }
}

/// The state of all volumes at one instant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Snapshot {
    /// The number.
    pub id: SnapshotId,
    /// The name, unique among ready snapshots.
    pub name: String,
    /// The description given at creation.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// The creation time in seconds since 1970.
    pub created: u64,
    /// The state.
    pub state: State,
    /// The snapshot whose files back this snapshot's files.
    pub parent: Option<SnapshotId>,
    /// The frozen file of each volume, by volume name. A volume that was attached later is absent,
    /// and so is one whose file is merged already while the snapshot is [`State::Merging`].
    pub files: BTreeMap<String, FileRecord>,
}

/// The last operation that changed the catalogue, and how many of its stages are recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct LastOperation {
    /// The operation's number; no number is assigned twice.
    pub id: u64,
    /// The number of completed stages.
    pub stages: usize,
}

/// A direct dependent of a snapshot's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Dependent {
    /// The files of another snapshot.
    Snapshot(SnapshotId),
    /// The active files.
    Volumes,
}

/// The model of a VM. The catalogue is its file form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Model {
    /// The random identity of the set. A journal belongs to the catalogue with the same identity.
    pub set: SetId,
    /// The VM's name.
    pub vm: String,
    /// The attached volumes.
    pub volumes: Vec<Volume>,
    /// Detached volumes of which snapshots still hold files. `active` is the file that was
    /// released.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub detached: Vec<Volume>,
    /// The snapshots.
    #[serde(with = "as_list")]
    pub snapshots: BTreeMap<SnapshotId, Snapshot>,
    /// The snapshot whose files back the active files.
    pub current: Option<SnapshotId>,
    /// The number of the next snapshot.
    pub next_snapshot: u64,
    /// The number of the next overlay.
    pub next_file: u64,
    /// The last operation.
    pub last_operation: LastOperation,
}

/// Serialises the map of snapshots as a list, as each carries its number.
mod as_list {
    use super::{BTreeMap, Deserialize, Snapshot, SnapshotId};

    pub(super) fn serialize<S: serde::Serializer>(
        snapshots: &BTreeMap<SnapshotId, Snapshot>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(snapshots.values())
    }

    pub(super) fn deserialize<'de, D: serde::Deserializer<'de>>(
        deserializer: D,
    ) -> Result<BTreeMap<SnapshotId, Snapshot>, D::Error> {
        let mut snapshots = BTreeMap::new();
        for snapshot in Vec::<Snapshot>::deserialize(deserializer)? {
            let id = snapshot.id;
            if snapshots.insert(id, snapshot).is_some() {
                return Err(serde::de::Error::custom(format!("snapshot {id} is listed twice")));
            }
        }
        Ok(snapshots)
    }
}

impl Model {
    /// Creates the model of a VM without snapshots, with a new random identity.
    #[must_use]
    pub fn new(vm: impl Into<String>, volumes: Vec<Volume>) -> Self {
        Self {
            set: SetId::random(),
            vm: vm.into(),
            volumes,
            detached: Vec::new(),
            snapshots: BTreeMap::new(),
            current: None,
            next_snapshot: 1,
            next_file: 1,
            last_operation: LastOperation::default(),
        }
    }

    /// Returns the attached volume of this name.
    #[must_use]
    pub fn volume(&self, name: &str) -> Option<&Volume> {
        self.volumes.iter().find(|volume| volume.name == name)
    }

    /// Returns the volume of this name, attached or detached.
    #[must_use]
    pub fn any_volume(&self, name: &str) -> Option<&Volume> {
        self.all_volumes().find(|volume| volume.name == name)
    }

    /// Returns the attached volumes, then the detached ones.
    pub fn all_volumes(&self) -> impl Iterator<Item = &Volume> {
        self.volumes.iter().chain(&self.detached)
    }

    /// Returns the snapshot of this number.
    #[must_use]
    pub fn snapshot(&self, id: SnapshotId) -> Option<&Snapshot> {
        self.snapshots.get(&id)
    }

    /// Returns the snapshot of this name: a ready one, else one whose deletion has begun. A hidden
    /// snapshot is not found by its name, which another snapshot may have by now.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<&Snapshot> {
        let of_state = |state| self.snapshots.values().find(|known| known.name == name && known.state == state);
        of_state(State::Ready).or_else(|| of_state(State::Merging))
    }

    /// Returns the snapshot whose deletion has begun.
    #[must_use]
    pub fn merging(&self) -> Option<&Snapshot> {
        self.snapshots.values().find(|snapshot| snapshot.state == State::Merging)
    }

    /// Returns the snapshots directly above this one.
    pub fn children(&self, id: SnapshotId) -> impl Iterator<Item = &Snapshot> {
        self.snapshots.values().filter(move |snapshot| snapshot.parent == Some(id))
    }

    /// Returns the direct dependents of a snapshot's files.
    #[must_use]
    pub fn deps(&self, id: SnapshotId) -> Vec<Dependent> {
        let volumes = (self.current == Some(id)).then_some(Dependent::Volumes);
        self.children(id).map(|child| Dependent::Snapshot(child.id)).chain(volumes).collect()
    }

    /// Returns the record of a dependent's file of a volume, which may have none.
    #[must_use]
    pub fn record_of(&self, dependent: Dependent, volume: &str) -> Option<&FileRecord> {
        match dependent {
            Dependent::Volumes => self.volume(volume).map(|volume| &volume.active),
            Dependent::Snapshot(id) => self.snapshot(id)?.files.get(volume),
        }
    }

    /// Returns the files of a volume from a snapshot downwards, its own file first and the bases
    /// last. Without a snapshot, returns the bases.
    #[must_use]
    pub fn files_from(&self, from: Option<SnapshotId>, volume: &Volume) -> Vec<FileRef> {
        let mut files = Vec::new();
        let mut next = from;
        // A path through the tree has no more steps than snapshots.
        for _ in 0..=self.snapshots.len() {
            let Some(snapshot) = next.and_then(|id| self.snapshot(id)) else { break };
            files.extend(snapshot.files.get(&volume.name).map(|record| record.file.clone()));
            next = snapshot.parent;
        }
        files.extend(volume.bases.iter().map(|base| base.file.clone()));
        files
    }

    /// Returns the files of an attached volume, the active one first.
    #[must_use]
    pub fn active_chain(&self, volume: &Volume) -> Vec<FileRef> {
        let mut files = vec![volume.active.file.clone()];
        files.extend(self.files_from(self.current, volume));
        files
    }

    /// Returns all records except bases: volume, the snapshot beneath, record.
    pub fn records(&self) -> impl Iterator<Item = (&Volume, Option<SnapshotId>, &FileRecord)> {
        let active = self.volumes.iter().map(|volume| (volume, self.current, &volume.active));
        let frozen = self.snapshots.values().flat_map(move |snapshot| {
            let known = move |(name, record): (&String, _)| Some((self.any_volume(name)?, snapshot.parent, record));
            snapshot.files.iter().filter_map(known)
        });
        active.chain(frozen)
    }

    /// Returns true if a record or a base names this path.
    #[must_use]
    pub fn names(&self, path: &str) -> bool {
        self.records().any(|(_, _, record)| record.file.path == path)
            || self.all_volumes().flat_map(|volume| &volume.bases).any(|base| base.file.path == path)
    }

    /// Returns the hidden snapshots with fewer than two dependents. Between two operations there
    /// are none.
    #[must_use]
    pub fn overdue(&self) -> Vec<&Snapshot> {
        let hidden = self.snapshots.values().filter(|snapshot| snapshot.state == State::Hidden);
        hidden.filter(|snapshot| self.deps(snapshot.id).len() < 2).collect()
    }
}
