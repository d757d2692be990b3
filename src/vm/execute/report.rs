//! The report of an operation, for billing and logging.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

use crate::merge::Direction;
use crate::vm::model::State;
use crate::vm::plan::{Purpose, SizeChange};

/// Serialises paths as text. Bytes that are not valid UTF-8 are replaced: JSON cannot hold them.
pub(in crate::vm) mod as_text {
    use std::collections::BTreeMap;
    use std::path::{Path, PathBuf};

    use serde::Serializer;

    pub(in crate::vm) fn path<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&path.display())
    }

    #[expect(clippy::ref_option, reason = "serde passes a reference to the field")]
    pub(in crate::vm) fn optional<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
        match path {
            Some(path) => serializer.collect_str(&path.display()),
            None => serializer.serialize_none(),
        }
    }

    pub(in crate::vm) fn list<S: Serializer>(paths: &[PathBuf], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(paths.iter().map(|path| path.to_string_lossy()))
    }

    pub(in crate::vm) fn by_volume<S: Serializer>(
        paths: &BTreeMap<String, PathBuf>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_map(paths.iter().map(|(volume, path)| (volume, path.to_string_lossy())))
    }
}

/// A change of a volume's active file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct PathChange {
    /// The volume.
    pub volume: String,
    /// The active file before.
    #[serde(serialize_with = "as_text::path")]
    pub old: PathBuf,
    /// The active file now.
    #[serde(serialize_with = "as_text::path")]
    pub new: PathBuf,
}

/// A file that left the set and was not removed. Its fate is the caller's decision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Released {
    /// The file.
    #[serde(serialize_with = "as_text::path")]
    pub path: PathBuf,
    /// The reason why it was not removed.
    pub reason: String,
}

/// The merge of one volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct MergedVolume {
    /// The direction.
    pub direction: Direction,
    /// Bytes of data read and written.
    pub copied: u64,
    /// Bytes of data that the kernel copied, sharing blocks where the file system can.
    pub copied_in_kernel: u64,
    /// Bytes made zero.
    pub zeroed: u64,
    /// Bitmaps that are inconsistent now.
    pub bitmaps_invalidated: Vec<String>,
}

/// The report of an operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Report {
    /// The purpose of the operation.
    pub purpose: Purpose,
    /// Files created.
    #[serde(serialize_with = "as_text::list")]
    pub created: Vec<PathBuf>,
    /// Files removed.
    #[serde(serialize_with = "as_text::list")]
    pub removed: Vec<PathBuf>,
    /// Files that left the set and were not removed.
    pub released: Vec<Released>,
    /// Volumes whose active file is another one now.
    pub moved: Vec<PathChange>,
    /// Volumes whose virtual size changed, and no others.
    pub resized: Vec<SizeChange>,
    /// Merges by volume.
    pub merged: BTreeMap<String, MergedVolume>,
    /// The active file of each volume afterwards.
    #[serde(serialize_with = "as_text::by_volume")]
    pub paths: BTreeMap<String, PathBuf>,
    /// The state of the snapshot afterwards, if it still exists: a deleted one may be hidden.
    pub state: Option<State>,
}

impl Report {
    pub(in crate::vm) fn new(purpose: Purpose) -> Self {
        Self {
            purpose,
            created: Vec::new(),
            removed: Vec::new(),
            released: Vec::new(),
            moved: Vec::new(),
            resized: Vec::new(),
            merged: BTreeMap::new(),
            paths: BTreeMap::new(),
            state: None,
        }
    }
}
