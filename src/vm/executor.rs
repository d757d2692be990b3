//! Who does the steps of a plan.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use super::Result;
use super::model::FileRef;
use super::place::Place;
use super::plan::{MergeStep, NewOverlay};
use crate::chain::Chain;
use crate::merge;

/// What the hypervisor says of a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Domain {
    /// Whether it is running.
    pub running: bool,
    /// The file that it writes for each volume, as far as that is known.
    pub active: BTreeMap<String, PathBuf>,
}

/// How the steps are done.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Manner<'a> {
    /// Where the files lie.
    pub place: &'a Place,
    /// How many volumes are worked on at once, at least 1.
    pub jobs: usize,
    /// The most bytes of data to copy in a second for one volume; none does not limit.
    pub rate_limit: Option<u64>,
    /// Whether an interrupted operation is being completed: what it has left allocated and unused is given back.
    pub recovering: bool,
}

/// What merging two files came to.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Merged {
    /// The virtual size of the file that is left, in bytes.
    pub virtual_size: u64,
    /// What was moved.
    pub report: merge::Report,
    /// The files, still open: nobody else can use them until the catalogue knows which is left.
    pub held: Option<Chain>,
}

/// Does the steps of a plan. Each can be done again after it was interrupted, or done already.
pub trait Executor: Send + Sync + fmt::Debug {
    /// What the VM is doing.
    ///
    /// # Errors
    /// Where that cannot be told.
    fn domain(&self, vm: &str) -> Result<Domain>;

    /// Makes overlays, all or none being of use, durable on return with their names. `quiesce` asks the guest to bring its
    /// file systems in order, if it is running.
    ///
    /// # Errors
    /// What went wrong; the caller removes those that were made.
    fn create(&self, overlays: &[NewOverlay], quiesce: bool, manner: &Manner<'_>) -> Result<()>;

    /// Makes two files one, durable on return, and keeps others from using them until the result is dropped.
    ///
    /// # Errors
    /// What went wrong; it can be done again.
    fn merge(&self, step: &MergeStep, manner: &Manner<'_>, progress: &dyn merge::Progress) -> Result<Merged>;

    /// Lets a file's header name another file that reads the same, durable on return.
    ///
    /// # Errors
    /// What went wrong; it can be done again.
    fn relink(&self, file: &FileRef, from: &FileRef, to: &FileRef, manner: &Manner<'_>) -> Result<()>;

    /// Gives the active file another virtual size, durable on return.
    ///
    /// # Errors
    /// What went wrong; it has the old size or the new one.
    fn resize(&self, file: &FileRef, below: &[FileRef], size: u64, manner: &Manner<'_>) -> Result<()>;
}
