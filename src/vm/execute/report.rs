//! What an operation has changed, for billing and logging.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

use crate::merge::Direction;
use crate::vm::model::State;
use crate::vm::plan::{Purpose, SizeChange};

/// A volume's active file is another one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct PathChange {
    /// Which volume.
    pub volume: String,
    /// The file before.
    pub old: PathBuf,
    /// The file now.
    pub new: PathBuf,
}

/// What merging one volume moved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct MergedVolume {
    /// Whether the base took in the top, or the top the base.
    pub direction: Direction,
    /// Bytes of data that were read and written.
    pub copied: u64,
    /// Bytes of data that the kernel copied, sharing blocks where the file system can.
    pub copied_in_kernel: u64,
    /// Bytes that were made zero.
    pub zeroed: u64,
    /// The bitmaps that no longer vouch for their image.
    pub bitmaps_invalidated: Vec<String>,
}

/// What an operation has changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Report {
    /// What it was for.
    pub purpose: Purpose,
    /// The files that were made.
    pub created: Vec<PathBuf>,
    /// The files that are gone.
    pub removed: Vec<PathBuf>,
    /// The volumes whose active file is another one.
    pub moved: Vec<PathChange>,
    /// The volumes whose virtual size changed, and no others.
    pub resized: Vec<SizeChange>,
    /// What was merged.
    pub merged: BTreeMap<String, MergedVolume>,
    /// The snapshot's state afterwards, if it is still there: a deleted one may be hidden.
    pub state: Option<State>,
}

impl Report {
    pub(in crate::vm) fn new(purpose: Purpose) -> Self {
        Self {
            purpose,
            created: Vec::new(),
            removed: Vec::new(),
            moved: Vec::new(),
            resized: Vec::new(),
            merged: BTreeMap::new(),
            state: None,
        }
    }
}
