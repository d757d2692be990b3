//! Snapshots of a VM over all of its volumes.
//!
//! A [`SnapshotSet`] keeps the tree of a VM's snapshots. A snapshot freezes the active files of all
//! volumes, or of none, and new overlays become the active files. A pure function ([`plan()`]) over
//! a small [`Model`] computes what an operation does. The result is a value ([`Plan`]), which is
//! carried out under a journal, so that [`SnapshotSet::recover`] completes or undoes an operation
//! after a crash at any instant. The VM can be started before that.
//!
//! Deletion follows one rule. Without dependents, the files of a snapshot are removed. With one
//! dependent, they are merged with it. With several, the snapshot is hidden until one is left.
//!
//! # Files
//! The set writes and removes only files that its catalogue records or that the operation creates.
//! A merge never renames a file: the survivor keeps its own path and format. A file that may not be
//! removed is reported as released. See `docs/vm.md` for the rules, the order of writes, and
//! recovery.

mod adopt;
mod error;
mod execute;
mod files;
mod model;
mod options;
mod plan;
mod preflight;
mod provider;
mod query;
mod set;
mod trace;
mod volumes;

pub use crate::progress::Progress;
pub use error::{Error, Result};
pub(crate) use execute::executor::sealed;
pub use execute::executor::{Created, CreationLog, Domain, ExecutionContext, Executor, Merged, Watch};
#[cfg(feature = "test-utils")]
pub use execute::journal::{Journal, Record};
pub use execute::offline::OfflineExecutor;
pub use execute::recover::{Pending, Recovery};
pub use execute::report::{MergedVolume, PathChange, Released, Report};
pub(crate) use files::Links;
pub use files::VolumeFiles;
pub use model::catalogue::Catalogue;
pub use model::edit::Edit;
pub use model::store::Store;
pub use model::{
    Base, Dependent, FileRecord, FileRef, Fingerprint, LastOperation, MAX_NAME, Model, OverlayShape, SetId, Snapshot,
    SnapshotId, State, Volume,
};
pub use options::{AdoptOptions, MergeOptions, SnapshotOptions, VolumeSpec};
pub use plan::planner::plan;
pub use plan::refusal::Refusal;
pub use plan::request::{FileFacts, MergePreference, OverlayPath, PlanOptions, Request};
pub use plan::{
    Cost, Leaving, MergeStep, NewOverlay, Plan, Purpose, Release, Removal, SizeChange, Stage, Step, VolumeWork,
};
pub use provider::{OverlayProvider, OverlayRequest};
pub use query::changed::{ChangedRange, Changes, Point};
pub use query::export::{ExportOptions, Exported};
pub use query::listing::{ListedSnapshot, ListedVolume, Listing};
pub use query::verify::{ContentDigest, Problem, ProblemKind, Reconciliation, Verification, VerifyOptions};
pub use set::SnapshotSet;
