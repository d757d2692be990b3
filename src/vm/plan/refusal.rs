//! The reasons why an operation is refused before anything changed.

use thiserror::Error as ThisError;

use crate::vm::model::State;

/// The reason why an operation is refused. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, ThisError)]
#[non_exhaustive]
pub enum Refusal {
    /// The VM has no volumes.
    #[error("the VM has no volumes")]
    NoVolumes,
    /// The name of a snapshot is empty or too long.
    #[error("a snapshot name must have 1 to {max} bytes, got {len}")]
    NameLength {
        /// Its length in bytes.
        len: usize,
        /// The limit in bytes.
        max: usize,
    },
    /// The name of a snapshot has control characters.
    #[error("the snapshot name '{name}' has control characters; choose a name without them")]
    NameControl {
        /// The name, escaped.
        name: String,
    },
    /// Another snapshot has this name.
    #[error("a snapshot named {name} exists already")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// No snapshot has this name.
    #[error("no snapshot is named {name}")]
    UnknownSnapshot {
        /// The name.
        name: String,
    },
    /// No volume has this name.
    #[error("no volume is named {name}")]
    UnknownVolume {
        /// The name.
        name: String,
    },
    /// The name of a volume is taken or not allowed.
    #[error("the volume name '{name}' is not allowed: {why}")]
    VolumeName {
        /// The name.
        name: String,
        /// The reason.
        why: &'static str,
    },
    /// The name of the VM is not allowed: it is a part of file names.
    #[error("the VM name '{name}' is not allowed: {why}")]
    VmName {
        /// The name, escaped.
        name: String,
        /// The reason.
        why: &'static str,
    },
    /// A catalogue exists at this path.
    #[error("{path}: a catalogue exists already")]
    Exists {
        /// Its path.
        path: String,
    },
    /// A journal exists beside a catalogue that is to be created.
    #[error(
        "{path}: a journal of an interrupted operation exists. Restore the catalogue that it belongs to and run \
         recover; if that operation is of no interest, move the journal away"
    )]
    LeftoverJournal {
        /// The journal's path.
        path: String,
    },
    /// The journal does not belong to the catalogue.
    #[error(
        "{path}: the journal does not belong to this catalogue: {why}. If the catalogue was restored or replaced, \
         restore the one that the journal belongs to and run recover; if the interrupted operation is of no interest, \
         check the volumes with verify and move the journal away"
    )]
    ForeignJournal {
        /// The journal's path.
        path: String,
        /// The difference.
        why: String,
    },
    /// The snapshot has another state than the operation requires.
    #[error("snapshot {name} is {state}, not ready")]
    NotReady {
        /// Its name.
        name: String,
        /// Its state.
        state: State,
    },
    /// The operation requires that the VM is stopped.
    #[error("cannot {operation} while the VM is running")]
    Running {
        /// The operation.
        operation: &'static str,
    },
    /// A snapshot has no file of a volume.
    #[error("snapshot {snapshot} has no file of volume {volume}")]
    Incomplete {
        /// The snapshot's name.
        snapshot: String,
        /// The volume's name.
        volume: String,
    },
    /// A snapshot to revert to lacks volumes.
    #[error(
        "snapshot {snapshot} lacks the volumes {}; confirm that they are to be detached (detach-missing)",
        volumes.join(", ")
    )]
    LacksVolumes {
        /// The snapshot's name.
        snapshot: String,
        /// The volumes' names.
        volumes: Vec<String>,
    },
    /// A chain would be too deep.
    #[error("the chain of volume {volume} would have {depth} files, the limit is {max}; delete snapshots first")]
    Depth {
        /// The volume's name.
        volume: String,
        /// The depth after the operation.
        depth: usize,
        /// The limit.
        max: usize,
    },
    /// An earlier operation is unfinished.
    #[error("an earlier operation is unfinished: {operation}; run recover first")]
    Unfinished {
        /// The purpose of that operation.
        operation: String,
    },
    /// A size is not a multiple of 512 bytes, or 0.
    #[error("size must be a non-zero multiple of 512 bytes, got {size}")]
    Size {
        /// The size in bytes.
        size: u64,
    },
    /// A volume would shrink without permission.
    #[error("volume {volume} would shrink from {old} to {new} bytes and lose data; allow it with shrink")]
    Shrinks {
        /// The volume's name.
        volume: String,
        /// The present size in bytes.
        old: u64,
        /// The requested size in bytes.
        new: u64,
    },
    /// A file that the operation must write may not be written.
    #[error("{path} may not be written: {reason}")]
    Unwritable {
        /// The file.
        path: String,
        /// The reason.
        reason: String,
    },
    /// A file is protected.
    #[error("{path} is protected: it is never written or removed")]
    Protected {
        /// The file.
        path: String,
    },
    /// Images outside the set depend on a file that the operation would write or remove.
    #[error(
        "{path} may not be changed or removed: images outside the set depend on it ({}); delete or rebase these first",
        images.join(", ")
    )]
    Dependents {
        /// The file.
        path: String,
        /// The images.
        images: Vec<String>,
    },
    /// Another operation on this VM is in progress.
    #[error("{path}: another operation on this VM is in progress")]
    Locked {
        /// The lock's path.
        path: String,
    },
    /// Another program holds a file.
    #[error("{path} is in use: {held}")]
    InUse {
        /// The file.
        path: String,
        /// The lock that was not granted.
        held: String,
    },
    /// The VM, or another program, writes a file of the set that is not the active one.
    #[error(
        "volume {volume}: {path} is being written, but the catalogue records {active} as the active file. The VM \
         probably runs on the wrong file: stop it, and start it on the active file"
    )]
    WrongFile {
        /// The volume's name.
        volume: String,
        /// The file that is being written.
        path: String,
        /// The active file by the catalogue.
        active: String,
    },
    /// The VM has a file open that the operation would remove or change.
    #[error("{path} is open on disk {disk} of the running VM, and the operation would {action} it")]
    OpenInVm {
        /// The file.
        path: String,
        /// The hypervisor's name of the disk.
        disk: String,
        /// The action.
        action: &'static str,
    },
    /// The header of a file names another backing file than the catalogue.
    #[error("{path}: the header names the backing file {found}, the catalogue {recorded}")]
    Disagreement {
        /// The file.
        path: String,
        /// The backing file in the header.
        found: String,
        /// The backing file by the catalogue.
        recorded: String,
    },
    /// The format of a file, or of its backing file by its header, is not the recorded one.
    #[error("{path}: the format is {found}, by the catalogue {recorded}")]
    Format {
        /// The file.
        path: String,
        /// The format found.
        found: String,
        /// The recorded format.
        recorded: String,
    },
    /// A base was changed or replaced.
    #[error(
        "{path} is not the base that was recorded: {what}. If its content is right, record it again with accept-base"
    )]
    BaseChanged {
        /// The base.
        path: String,
        /// The difference.
        what: String,
    },
    /// A file has another size than the record says, or changed while it was examined.
    #[error("{path} changed while it was examined; try again")]
    Changed {
        /// The file.
        path: String,
    },
    /// The guest cannot be quiesced.
    #[error("the guest cannot be quiesced: {why}")]
    Quiesce {
        /// The reason.
        why: String,
    },
    /// A path cannot be recorded.
    #[error("{path}: {why}")]
    Path {
        /// The path, escaped.
        path: String,
        /// The reason.
        why: &'static str,
    },
    /// Two paths lead to one file.
    #[error("{first} and {second} are the same file; name each file once")]
    SameFile {
        /// One path.
        first: String,
        /// The other path.
        second: String,
    },
    /// A volume is a block device, and no directory for overlays is given.
    #[error("{path} is a block device: name a directory for the overlays of volume {volume} (overlay_dir)")]
    BlockDevice {
        /// The volume's name.
        volume: String,
        /// The device.
        path: String,
    },
    /// A directory for overlays is not on a durable medium.
    #[error("{path} is in memory: overlays there would not survive a restart; choose another overlay_dir")]
    MemoryDirectory {
        /// The directory.
        path: String,
    },
    /// A property of a file makes the operation impossible.
    #[error("{path}: {problem}; {remedy}")]
    Obstacle {
        /// The file.
        path: String,
        /// The property.
        problem: String,
        /// The remedy.
        remedy: String,
    },
    /// The operation would destroy or invalidate internal snapshots or bitmaps.
    #[error(
        "{path}: the operation would {loss} the {kind} {}; name each one to give it up (drop)",
        names.join(", ")
    )]
    WouldLose {
        /// The file.
        path: String,
        /// Either `destroy` or `invalidate`.
        loss: &'static str,
        /// Either `internal snapshots` or `bitmaps`.
        kind: &'static str,
        /// Their names.
        names: Vec<String>,
    },
    /// A device is smaller than the disk that it would hold.
    #[error("{path} has {have} bytes, the disk needs {need}; enlarge the device first")]
    DeviceTooSmall {
        /// The device.
        path: String,
        /// The bytes needed.
        need: u64,
        /// The bytes of the device.
        have: u64,
    },
    /// The process may not open enough files.
    #[error("{need} files must be open at once, the process may open {have} more; raise the limit (ulimit -n)")]
    Descriptors {
        /// The number needed.
        need: u64,
        /// The number available.
        have: u64,
    },
    /// A file that the operation discards is missing or damaged.
    #[error("{path}, which the operation discards, cannot be read: {problem}. Confirm that it is lost (discard-lost)")]
    Lost {
        /// The file.
        path: String,
        /// The reason.
        problem: String,
    },
    /// No deletion is under way that could be called off.
    #[error("no interrupted deletion can be cancelled: {why}")]
    NotCancellable {
        /// The reason.
        why: String,
    },
    /// A file is not a base of the set.
    #[error("{path} is not a base of this set; its bases are: {}", bases.join(", "))]
    NotABase {
        /// The path.
        path: String,
        /// The recorded bases.
        bases: Vec<String>,
    },
}

impl Refusal {
    /// Replaces the recorded path in a refusal of the planner by the one that the caller knows.
    pub(in crate::vm) fn with_path(mut self, shown: impl Fn(&str) -> String) -> Self {
        match &mut self {
            Self::Unwritable { path, .. }
            | Self::Protected { path }
            | Self::Dependents { path, .. }
            | Self::InUse { path, .. } => *path = shown(path),
            _ => {}
        }
        self
    }
}
