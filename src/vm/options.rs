//! How operations are done.

use std::path::PathBuf;

use crate::chain::{Format, Policy};
use crate::merge::Direction;
use crate::vm::model::OverlayShape;

/// How snapshots are taken.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SnapshotOptions {
    /// What is to be remembered with the snapshot.
    pub description: String,
    /// Whether the guest is asked to bring its file systems in order first. A VM that is off has nothing to do.
    pub quiesce: bool,
    /// The most files that a volume may consist of afterwards (256).
    pub max_depth: usize,
}

impl Default for SnapshotOptions {
    fn default() -> Self {
        Self { description: String::new(), quiesce: false, max_depth: 256 }
    }
}

impl SnapshotOptions {
    /// The same with another description.
    #[must_use]
    pub fn with_description(mut self, description: impl Into<String>) -> Self {
        self.description = description.into();
        self
    }

    /// The same, asking the guest to bring its file systems in order or not.
    #[must_use]
    pub fn with_quiesce(mut self, quiesce: bool) -> Self {
        self.quiesce = quiesce;
        self
    }

    /// The same with another limit of files a volume.
    #[must_use]
    pub fn with_max_depth(mut self, files: usize) -> Self {
        self.max_depth = files;
        self
    }
}

/// How files are merged where an operation needs that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MergeOptions {
    /// Which way ([`Direction::Auto`]: whichever moves less data; a raw file takes in, so that it stays raw).
    pub direction: Direction,
    /// Whether a file that took in the one beneath keeps its own name (off: it takes the other's).
    pub keep_top_names: bool,
    /// The most bytes of data to copy in a second for one volume; none does not limit.
    pub rate_limit: Option<u64>,
}

impl Default for MergeOptions {
    fn default() -> Self {
        Self { direction: Direction::Auto, keep_top_names: false, rate_limit: None }
    }
}

impl MergeOptions {
    /// The same with another way.
    #[must_use]
    pub fn with_direction(mut self, direction: Direction) -> Self {
        self.direction = direction;
        self
    }

    /// The same, keeping the upper files' names or not.
    #[must_use]
    pub fn with_keep_top_names(mut self, keep: bool) -> Self {
        self.keep_top_names = keep;
        self
    }

    /// The same with another limit of bytes in a second.
    #[must_use]
    pub fn with_rate_limit(mut self, limit: Option<u64>) -> Self {
        self.rate_limit = limit;
        self
    }
}

/// A volume to take in.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct VolumeSpec {
    /// Its name: letters, digits, `.`, `_` and `-`.
    pub name: String,
    /// The file that the VM writes.
    pub path: PathBuf,
    /// That file's format; never guessed.
    pub format: Format,
    /// Whether that file belongs to others too: it is neither written nor removed once a snapshot froze it.
    pub protected: bool,
    /// How overlays are made; as the file is by default.
    pub overlay: Option<OverlayShape>,
}

impl VolumeSpec {
    /// A qcow2 file.
    #[must_use]
    pub fn new(name: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        let (name, path) = (name.into(), path.into());
        Self { name, path, format: Format::Qcow2, protected: false, overlay: None }
    }

    /// The same in another format.
    #[must_use]
    pub fn with_format(mut self, format: Format) -> Self {
        self.format = format;
        self
    }

    /// The same, belonging to others too or not.
    #[must_use]
    pub fn with_protected(mut self, protected: bool) -> Self {
        self.protected = protected;
        self
    }

    /// The same with another geometry of overlays.
    #[must_use]
    pub fn with_overlay(mut self, overlay: OverlayShape) -> Self {
        self.overlay = Some(overlay);
        self
    }
}

/// How existing files are taken in.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct AdoptOptions {
    /// The VM's name; that of the catalogue's file, without its extension, by default.
    pub vm: Option<String>,
    /// Which backing files may be followed ([`Policy::Refuse`]).
    pub policy: Policy,
    /// The names of snapshots to make of the files beneath the active ones, the oldest first. What lies deeper, or all where
    /// none are named, are bases: neither written nor removed.
    pub snapshots: Vec<String>,
}

impl AdoptOptions {
    /// The same with another name of the VM.
    #[must_use]
    pub fn with_vm(mut self, vm: impl Into<String>) -> Self {
        self.vm = Some(vm.into());
        self
    }

    /// The same with another policy.
    #[must_use]
    pub fn with_policy(mut self, policy: Policy) -> Self {
        self.policy = policy;
        self
    }

    /// The same, making snapshots of these names, the oldest first.
    #[must_use]
    pub fn with_snapshots<N: Into<String>>(mut self, names: impl IntoIterator<Item = N>) -> Self {
        self.snapshots = names.into_iter().map(Into::into).collect();
        self
    }
}
