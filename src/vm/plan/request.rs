//! The input of the planner.

use std::collections::BTreeMap;

use crate::merge::Direction;
use crate::storage::FileId;

use crate::vm::model::SnapshotId;

/// A requested operation.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Request {
    /// Creates a snapshot of all volumes.
    Create {
        /// Its name.
        name: String,
        /// A description, kept in the catalogue.
        description: String,
        /// The present time in seconds since 1970.
        created: u64,
        /// If set, a running guest flushes and freezes its file systems first.
        quiesce: bool,
        /// The maximum depth of a volume's chain afterwards.
        max_depth: usize,
    },
    /// Reverts all volumes to a snapshot.
    Revert {
        /// Its name.
        name: String,
        /// If set, volumes that the snapshot lacks are detached. If not, they make the planner
        /// refuse.
        detach_missing: bool,
    },
    /// Deletes a snapshot.
    Delete {
        /// Its name.
        name: String,
    },
    /// Resumes the deletion of a snapshot in the state `Merging`.
    ResumeDelete {
        /// Its number.
        id: SnapshotId,
    },
    /// Resizes a volume.
    Resize {
        /// The volume's name.
        volume: String,
        /// The new virtual size in bytes.
        size: u64,
        /// If set, the size may be smaller than the present one.
        shrink: bool,
    },
}

/// The preferred direction of a merge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum MergePreference {
    /// Commit; pull where the base may not be written. The default.
    #[default]
    CommitElsePull,
    /// Commit, or refuse.
    Commit,
    /// Pull, or refuse.
    Pull,
    /// Pull; commit where the top may not be written.
    PullElseCommit,
    /// The direction that moves less data.
    Auto,
}

impl From<Direction> for MergePreference {
    fn from(direction: Direction) -> Self {
        match direction {
            Direction::Commit => Self::Commit,
            Direction::Pull => Self::Pull,
        }
    }
}

/// The facts about a file that decide on its fate. The preflight gathers them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileFacts {
    /// The identity.
    pub identity: Option<FileId>,
    /// The reason why the file may not be written, if there is one.
    pub unwritable: Option<String>,
    /// The reason why the file may not be removed, if there is one.
    pub unremovable: Option<String>,
    /// The lock by which another program reads the file, if one does. It may neither be written nor
    /// removed then.
    pub in_use: Option<String>,
    /// Images outside the set that depend on the file. It may neither be written nor removed then.
    pub dependents: Vec<String>,
}

/// The path of a new overlay.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct OverlayPath {
    /// The path, absolute or relative to the catalogue's directory.
    pub path: String,
    /// If set, an [`OverlayProvider`](crate::vm::OverlayProvider) creates and removes the file: the
    /// name in the request.
    pub provided: Option<String>,
}

impl OverlayPath {
    /// Creates the path of an overlay that the library creates and removes.
    #[must_use]
    pub fn new(path: impl Into<String>) -> Self {
        Self { path: path.into(), provided: None }
    }
}

/// Further input of the planner. All of it is data, so that the planner does no I/O and is
/// deterministic.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PlanOptions {
    /// If set, the VM is running.
    pub running: bool,
    /// The random part of the names of new overlays.
    pub token: String,
    /// The paths of new overlays, by volume. A volume that is absent gets one beside its active
    /// file.
    pub overlays: BTreeMap<String, OverlayPath>,
    /// The preferred direction by volume, [`MergePreference::CommitElsePull`] where absent.
    pub directions: BTreeMap<String, MergePreference>,
    /// The facts about files, by recorded path. A file that is absent may be written and removed.
    pub facts: BTreeMap<String, FileFacts>,
}

impl PlanOptions {
    /// Sets whether the VM is running. Default: false.
    #[must_use]
    pub fn with_running(mut self, running: bool) -> Self {
        self.running = running;
        self
    }

    /// Sets the random part of the names of new overlays. Default: empty.
    #[must_use]
    pub fn with_token(mut self, token: impl Into<String>) -> Self {
        self.token = token.into();
        self
    }

    /// Sets the preferred direction of a volume's merges.
    #[must_use]
    pub fn with_direction(mut self, volume: impl Into<String>, direction: impl Into<MergePreference>) -> Self {
        self.directions.insert(volume.into(), direction.into());
        self
    }

    /// Sets the facts about a file.
    #[must_use]
    pub fn with_facts(mut self, path: impl Into<String>, facts: FileFacts) -> Self {
        self.facts.insert(path.into(), facts);
        self
    }
}

impl FileFacts {
    /// Sets the reason why the file may not be written.
    #[must_use]
    pub fn with_unwritable(mut self, reason: impl Into<String>) -> Self {
        self.unwritable = Some(reason.into());
        self
    }

    /// Sets the reason why the file may not be removed.
    #[must_use]
    pub fn with_unremovable(mut self, reason: impl Into<String>) -> Self {
        self.unremovable = Some(reason.into());
        self
    }

    /// Adds an image outside the set that depends on the file.
    #[must_use]
    pub fn with_dependent(mut self, image: impl Into<String>) -> Self {
        self.dependents.push(image.into());
        self
    }
}
