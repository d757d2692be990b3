//! Options of operations.

use std::collections::BTreeSet;
use std::path::PathBuf;

use super::model::OverlayShape;
use super::plan::request::MergePreference;
use crate::chain::{DependentSearch, Format, Policy};

/// Options of [`SnapshotSet::create`](super::SnapshotSet::create).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SnapshotOptions {
    /// A description, kept in the catalogue. Default: empty.
    pub description: String,
    /// If set, a running guest flushes and freezes its file systems first. Default: false.
    pub quiesce: bool,
    /// The maximum depth of a volume's chain afterwards. Default: 256.
    pub max_depth: usize,
    /// If set, an overlay may lack attributes of the active file that the process may not set.
    /// Default: false, which refuses the snapshot.
    pub ignore_attributes: bool,
}

impl Default for SnapshotOptions {
    fn default() -> Self {
        Self { description: String::new(), quiesce: false, max_depth: 256, ignore_attributes: false }
    }
}

impl SnapshotOptions {
    /// Sets the description.
    #[must_use]
    pub fn with_description(mut self, description: impl Into<String>) -> Self {
        self.description = description.into();
        self
    }

    /// Sets whether a running guest flushes and freezes its file systems first.
    #[must_use]
    pub fn with_quiesce(mut self, quiesce: bool) -> Self {
        self.quiesce = quiesce;
        self
    }

    /// Sets the maximum depth of a volume's chain.
    #[must_use]
    pub fn with_max_depth(mut self, files: usize) -> Self {
        self.max_depth = files;
        self
    }

    /// Sets whether overlays may lack attributes that the process may not set.
    #[must_use]
    pub fn with_ignore_attributes(mut self, ignore: bool) -> Self {
        self.ignore_attributes = ignore;
        self
    }
}

/// Options of [`SnapshotSet::delete`](super::SnapshotSet::delete) and
/// [`SnapshotSet::revert`](super::SnapshotSet::revert).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MergeOptions {
    /// The preferred direction of merges. Default: [`MergePreference::CommitElsePull`].
    pub direction: MergePreference,
    /// The maximum bytes of data to copy per second and volume. Default: no limit.
    pub rate_limit: Option<u64>,
    /// The names of internal snapshots and bitmaps that may be destroyed or invalidated. Default:
    /// none.
    pub drop: BTreeSet<String>,
    /// The search for images outside the set that depend on its files. Default: in the directories
    /// of the files.
    pub dependents: DependentSearch,
    /// If set, a revert proceeds although an active file that it discards is missing or damaged.
    /// Default: false.
    pub discard_lost: bool,
    /// If set, a revert detaches volumes that the snapshot lacks. Default: false, which refuses the
    /// revert.
    pub detach_missing: bool,
    /// If set, an overlay may lack attributes of the active file that the process may not set.
    /// Default: false.
    pub ignore_attributes: bool,
}

impl MergeOptions {
    /// Sets the preferred direction.
    #[must_use]
    pub fn with_direction(mut self, direction: impl Into<MergePreference>) -> Self {
        self.direction = direction.into();
        self
    }

    /// Sets the maximum bytes of data per second and volume.
    #[must_use]
    pub fn with_rate_limit(mut self, limit: Option<u64>) -> Self {
        self.rate_limit = limit;
        self
    }

    /// Adds the name of an internal snapshot or bitmap that may be destroyed or invalidated.
    #[must_use]
    pub fn with_drop(mut self, name: impl Into<String>) -> Self {
        self.drop.insert(name.into());
        self
    }

    /// Sets the search for images outside the set.
    #[must_use]
    pub fn with_dependents(mut self, search: DependentSearch) -> Self {
        self.dependents = search;
        self
    }

    /// Sets whether a revert discards an active file that is missing or damaged.
    #[must_use]
    pub fn with_discard_lost(mut self, discard: bool) -> Self {
        self.discard_lost = discard;
        self
    }

    /// Sets whether a revert detaches volumes that the snapshot lacks.
    #[must_use]
    pub fn with_detach_missing(mut self, detach: bool) -> Self {
        self.detach_missing = detach;
        self
    }

    /// Sets whether overlays may lack attributes that the process may not set.
    #[must_use]
    pub fn with_ignore_attributes(mut self, ignore: bool) -> Self {
        self.ignore_attributes = ignore;
        self
    }
}

/// An image to take in as a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct VolumeSpec {
    /// The volume's name: letters, digits, `.`, `_` and `-`, at most 64 bytes.
    pub name: String,
    /// The file that the VM writes.
    pub path: PathBuf,
    /// The format of that file. It is never guessed.
    pub format: Format,
    /// If set, the file is shared with others: once a snapshot froze it, it is never written or
    /// removed.
    pub protected: bool,
    /// The geometry of overlays. Default: that of the file.
    pub overlay: Option<OverlayShape>,
    /// The directory for overlays. Default: that of the active file. Required for a block device,
    /// unless its overlays come from a provider.
    pub overlay_dir: Option<PathBuf>,
    /// If set, an [`OverlayProvider`](super::OverlayProvider) will create the overlays. Default:
    /// false.
    pub provided_overlays: bool,
}

impl VolumeSpec {
    /// Creates the specification of a qcow2 file.
    #[must_use]
    pub fn new(name: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        let (name, path) = (name.into(), path.into());
        Self {
            name,
            path,
            format: Format::Qcow2,
            protected: false,
            overlay: None,
            overlay_dir: None,
            provided_overlays: false,
        }
    }

    /// Sets the format.
    #[must_use]
    pub fn with_format(mut self, format: Format) -> Self {
        self.format = format;
        self
    }

    /// Sets whether the file is shared with others.
    #[must_use]
    pub fn with_protected(mut self, protected: bool) -> Self {
        self.protected = protected;
        self
    }

    /// Sets the geometry of overlays.
    #[must_use]
    pub fn with_overlay(mut self, overlay: OverlayShape) -> Self {
        self.overlay = Some(overlay);
        self
    }

    /// Sets the directory for overlays.
    #[must_use]
    pub fn with_overlay_dir(mut self, directory: impl Into<PathBuf>) -> Self {
        self.overlay_dir = Some(directory.into());
        self
    }

    /// Sets whether an [`OverlayProvider`](super::OverlayProvider) will create the overlays.
    #[must_use]
    pub fn with_provided_overlays(mut self, provided: bool) -> Self {
        self.provided_overlays = provided;
        self
    }
}

/// Options of [`SnapshotSet::adopt`](super::SnapshotSet::adopt).
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct AdoptOptions {
    /// The VM's name. Default: the catalogue's file name without its extension.
    pub vm: Option<String>,
    /// The policy by which backing files are opened. Default: [`Policy::Refuse`].
    pub policy: Policy,
    /// The names of snapshots to make of the files beneath the active ones, the oldest first. Files
    /// beneath these, or all if none are named, are bases, which are never written or removed.
    pub snapshots: Vec<String>,
    /// The search for images that depend on the files. Default: in the directories of the files.
    pub dependents: DependentSearch,
}

impl AdoptOptions {
    /// Sets the VM's name.
    #[must_use]
    pub fn with_vm(mut self, vm: impl Into<String>) -> Self {
        self.vm = Some(vm.into());
        self
    }

    /// Sets the policy by which backing files are opened.
    #[must_use]
    pub fn with_policy(mut self, policy: Policy) -> Self {
        self.policy = policy;
        self
    }

    /// Sets the names of snapshots to make, the oldest first.
    #[must_use]
    pub fn with_snapshots<N: Into<String>>(mut self, names: impl IntoIterator<Item = N>) -> Self {
        self.snapshots = names.into_iter().map(Into::into).collect();
        self
    }

    /// Sets the search for images that depend on the files.
    #[must_use]
    pub fn with_dependents(mut self, search: DependentSearch) -> Self {
        self.dependents = search;
        self
    }
}
