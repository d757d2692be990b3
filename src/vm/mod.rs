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
mod catalogue;
mod changed;
mod edit;
mod error;
mod executor;
mod export;
mod journal;
mod listing;
mod lock;
mod model;
mod offline;
mod options;
mod place;
mod plan;
mod planner;
mod progress;
mod recover;
mod refusal;
mod report;
mod run;
mod set;
mod store;
mod survey;
mod trace;
mod verify;

pub use catalogue::Catalogue;
pub use changed::{ChangedRange, Changes, Point};
pub use edit::Edit;
pub use error::{Error, Result};
pub use executor::{Domain, Executor, Manner, Merged, Watch};
pub use export::{ExportOptions, Exported};
pub use journal::{Found, Journal, Progressed, Record};
pub use listing::{ListedSnapshot, ListedVolume, Listing};
pub use model::{
    Base, Dependent, FileRecord, FileRef, Fingerprint, LastOperation, MAX_NAME, Model, OverlayShape, Snapshot,
    SnapshotId, State, Volume,
};
pub use offline::Offline;
pub use options::{AdoptOptions, MergeOptions, SnapshotOptions, VolumeSpec};
pub(crate) use place::Links;
pub use place::Place;
pub use plan::{Cost, MergeStep, NewOverlay, Plan, Purpose, SizeChange, Stage, Step, VolumeWork};
pub use planner::{PlanOptions, Request, plan};
pub use progress::{Progress, VolumeStep};
pub use recover::Pending;
pub use refusal::Refusal;
pub use report::{MergedVolume, PathChange, Report};
pub use set::{Recovery, SnapshotSet};
pub use store::Store;
pub use verify::{ContentDigest, Problem, ProblemKind, Reconciliation, Verification, VerifyOptions};
