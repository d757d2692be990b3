//! Why an operation is not done at all. Nothing has changed then.

use thiserror::Error as ThisError;

use crate::vm::model::State;

/// Why an operation is not done; nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, ThisError)]
#[non_exhaustive]
pub enum Refusal {
    /// A VM without volumes has no snapshots.
    #[error("there are no volumes")]
    NoVolumes,
    /// A snapshot's name is empty or too long.
    #[error("a snapshot's name has 1 to {max} bytes, not {len}")]
    NameLength {
        /// Its length in bytes.
        len: usize,
        /// The most.
        max: usize,
    },
    /// A snapshot's name has control characters.
    #[error("a snapshot's name has no control characters")]
    NameControl,
    /// There is a snapshot of this name.
    #[error("there is a snapshot {name} already")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// There is no snapshot of this name.
    #[error("there is no snapshot {name}")]
    UnknownSnapshot {
        /// The name.
        name: String,
    },
    /// There is no volume of this name.
    #[error("there is no volume {name}")]
    UnknownVolume {
        /// The name.
        name: String,
    },
    /// There is a volume of this name, or the name cannot be part of a file's name.
    #[error("a volume cannot be called {name}: {why}")]
    VolumeName {
        /// The name.
        name: String,
        /// Why not.
        why: &'static str,
    },
    /// A VM's name is part of its overlays' names.
    #[error("a VM cannot be called '{name}'")]
    VmName {
        /// The name.
        name: String,
    },
    /// There is a catalogue already.
    #[error("{path}: there is a catalogue already")]
    Exists {
        /// Its path.
        path: String,
    },
    /// The snapshot is being deleted, or is hidden.
    #[error("snapshot {name} is {state}, not ready")]
    NotReady {
        /// Its name.
        name: String,
        /// Its state.
        state: State,
    },
    /// This is done to a VM that is off.
    #[error("cannot {operation} while the VM is running")]
    Running {
        /// What.
        operation: &'static str,
    },
    /// A snapshot has no record of a volume.
    #[error("snapshot {snapshot} has no file of volume {volume}")]
    Incomplete {
        /// The snapshot's name.
        snapshot: String,
        /// The volume's name.
        volume: String,
    },
    /// A volume would consist of too many files. Deleting snapshots brings the number down.
    #[error("volume {volume} would consist of {depth} files, at most {max} are allowed")]
    Depth {
        /// The volume's name.
        volume: String,
        /// How many files it would have.
        depth: usize,
        /// The most.
        max: usize,
    },
    /// An earlier operation has begun and is not completed. Recover first, or resume it.
    #[error("an earlier operation has not been completed: {operation}")]
    Unfinished {
        /// What it was for.
        operation: String,
    },
    /// Volumes come and go only while there are no snapshots.
    #[error("volumes cannot come or go while there are snapshots")]
    HasSnapshots,
    /// A size is a multiple of 512 bytes, and not 0.
    #[error("a size of {size} bytes is no multiple of 512 over 0")]
    Size {
        /// The size in bytes.
        size: u64,
    },
    /// A volume would become smaller, and that was not asked for.
    #[error("volume {volume} would shrink from {old} to {new} bytes and lose data")]
    Shrinks {
        /// The volume's name.
        volume: String,
        /// Its size in bytes.
        old: u64,
        /// The size asked for, in bytes.
        new: u64,
    },
    /// The file's mode or its file system does not allow writing: it is no target of a merge.
    #[error("{path} is read-only, and the operation would write it")]
    ReadOnly {
        /// Its path.
        path: String,
    },
    /// The file belongs to others too.
    #[error("{path} is protected: it is neither written nor removed")]
    Protected {
        /// Its path.
        path: String,
    },
    /// Another operation on this VM is in progress.
    #[error("{path}: another operation on this VM is in progress")]
    Locked {
        /// The lock's path.
        path: String,
    },
    /// A file is used by someone else: a running VM, or another program.
    #[error("{path} is in use: {held}")]
    InUse {
        /// The file.
        path: String,
        /// Which lock could not be had.
        held: String,
    },
    /// A file's header names another file than the one it stands on by the records.
    #[error("{path} stands on {found} by its header, on {recorded} by the catalogue")]
    Disagreement {
        /// The file.
        path: String,
        /// What its header says.
        found: String,
        /// What is recorded.
        recorded: String,
    },
    /// A file's format, or what its header says of its backing file's format, is not the recorded one.
    #[error("{path}: format {found}, by the catalogue {recorded}")]
    Format {
        /// The file.
        path: String,
        /// What was found.
        found: String,
        /// What is recorded.
        recorded: String,
    },
    /// A base is not what it was when the volume was taken in.
    #[error("{path} is not the base that was recorded: it was changed or replaced")]
    BaseChanged {
        /// The base.
        path: String,
    },
    /// The guest cannot be asked to bring its file systems in order.
    #[error("the guest cannot be quiesced: {why}")]
    Quiesce {
        /// Why not.
        why: String,
    },
    /// A path cannot stand in the catalogue.
    #[error("{path}: {why}")]
    Path {
        /// The path.
        path: String,
        /// Why not.
        why: &'static str,
    },
}
