//! Who does the steps of a plan.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use crate::chain::Chain;
use crate::merge;
use crate::vm::Result;
use crate::vm::files::VolumeFiles;
use crate::vm::model::FileRef;
use crate::vm::plan::{MergeStep, NewOverlay};

/// What the hypervisor says of a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Domain {
    /// Whether it is running, or paused.
    pub running: bool,
    /// The files of each of its disks by the hypervisor's name of the disk, the one that it writes first; of a VM that is off,
    /// perhaps only that one, which it would be started with.
    pub disks: BTreeMap<String, Vec<PathBuf>>,
}

impl Domain {
    /// The disk that writes a recorded file.
    #[must_use]
    pub fn disk_writing(&self, place: &VolumeFiles, recorded: &str) -> Option<&str> {
        let path = place.path(recorded);
        let mut disks = self.disks.iter();
        let found = disks.find(|(_, files)| files.first().is_some_and(|file| place.leads_to(file, &path)));
        found.map(|(name, _)| name.as_str())
    }

    /// The disk that has a recorded file open, and the file's place among its files.
    #[must_use]
    pub fn disk_with(&self, place: &VolumeFiles, recorded: &str) -> Option<(&str, usize)> {
        if !self.running {
            return None;
        }
        let path = place.path(recorded);
        let place_of = |files: &[PathBuf]| files.iter().position(|file| place.leads_to(file, &path));
        self.disks.iter().find_map(|(name, files)| Some((name.as_str(), place_of(files)?)))
    }
}

/// Hears how far a merge is, and that a hypervisor is about to do it.
pub trait Watch: merge::Progress {
    /// The hypervisor is about to be told to do the merge: should the VM write the base one day, it was switched over.
    ///
    /// # Errors
    /// What remembering it gives; then it must not be told.
    fn before_start(&self) -> Result<()>;

    /// The hypervisor is about to be told to write the base instead of the top. What it writes afterwards is newer than the
    /// top, whoever asks later: that must be remembered first.
    ///
    /// # Errors
    /// What remembering it gives; then it must not be told.
    fn before_switch(&self) -> Result<()>;
}

impl Watch for () {
    fn before_start(&self) -> Result<()> {
        Ok(())
    }

    fn before_switch(&self) -> Result<()> {
        Ok(())
    }
}

/// How the steps are done.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct ExecutionContext<'a> {
    /// Where the files lie.
    pub place: &'a VolumeFiles,
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
    /// Whether a running VM writes the base now, and has since it was switched over: merging again would undo its writes.
    pub switched: bool,
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
    fn create(&self, overlays: &[NewOverlay], quiesce: bool, manner: &ExecutionContext<'_>) -> Result<()>;

    /// Makes two files one, durable on return, and keeps others from using them until the result is dropped.
    ///
    /// # Errors
    /// What went wrong; it can be done again.
    fn merge(&self, step: &MergeStep, manner: &ExecutionContext<'_>, watch: &dyn Watch) -> Result<Merged>;

    /// Lets a file's header name another file that reads the same, durable on return.
    ///
    /// # Errors
    /// What went wrong; it can be done again.
    fn relink(&self, file: &FileRef, from: &FileRef, to: &FileRef, manner: &ExecutionContext<'_>) -> Result<()>;

    /// Gives the active file another virtual size, durable on return.
    ///
    /// # Errors
    /// What went wrong; it has the old size or the new one.
    fn resize(&self, file: &FileRef, below: &[FileRef], size: u64, manner: &ExecutionContext<'_>) -> Result<()>;
}
