//! Snapshots of a VM over all of its volumes.
//!
//! A [`SnapshotSet`] keeps the tree of a VM's snapshots: each freezes the files that the VM was writing, for all volumes or for
//! none. What an operation does is decided by a pure function ([`plan()`]) over a small [`Model`], is a value ([`Plan`]), and is
//! carried out under a journal, so that a crash at any instant leaves something that [`SnapshotSet::recover`] completes or
//! undoes, and a VM that can be started meanwhile.
//!
//! The one rule of deletion counts what stands directly on a snapshot's files: where nothing does they are removed, where one
//! thing does they are merged with it, where several do the snapshot is hidden until only one is left.

mod adopt;
mod error;
mod execute;
mod files;
mod model;
mod options;
mod plan;
mod preflight;
mod query;
mod set;
mod trace;

pub use error::{Error, Result};
pub use execute::executor::{Domain, ExecutionContext, Executor, Merged, Watch};
pub use execute::journal::{Found, Journal, Progressed, Record};
pub use execute::offline::OfflineExecutor;
pub use execute::progress::{Progress, VolumeStep};
pub use execute::recover::Pending;
pub use execute::report::{MergedVolume, PathChange, Report};
pub(crate) use files::Links;
pub use files::VolumeFiles;
pub use model::catalogue::Catalogue;
pub use model::edit::Edit;
pub use model::store::Store;
pub use model::{
    Base, Dependent, FileRecord, FileRef, Fingerprint, LastOperation, MAX_NAME, Model, OverlayShape, Snapshot,
    SnapshotId, State, Volume,
};
pub use options::{AdoptOptions, MergeOptions, SnapshotOptions, VolumeSpec};
pub use plan::planner::{PlanOptions, Request, plan};
pub use plan::refusal::Refusal;
pub use plan::{Cost, MergeStep, NewOverlay, Plan, Purpose, SizeChange, Stage, Step, VolumeWork};
pub use query::changed::{ChangedRange, Changes, Point};
pub use query::export::{ExportOptions, Exported};
pub use query::listing::{ListedSnapshot, ListedVolume, Listing};
pub use query::verify::{ContentDigest, Problem, ProblemKind, Reconciliation, Verification, VerifyOptions};
pub use set::{Recovery, SnapshotSet};
