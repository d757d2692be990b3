//! The interface between a plan and the executor of its steps.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use crate::merge;
use crate::progress::Progress;
use crate::storage::{Attributes, FileId, Resolved};
use crate::vm::Result;
use crate::vm::files::VolumeFiles;
use crate::vm::model::FileRef;
use crate::vm::plan::{MergeStep, NewOverlay};
use crate::vm::provider::OverlayProvider;

/// A VM by its hypervisor's description.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Domain {
    /// If set, the VM is running or paused.
    pub running: bool,
    /// The files of each disk, the active one first, by the hypervisor's name of the disk. For a
    /// stopped VM perhaps only the file that it would be started on.
    pub disks: BTreeMap<String, Vec<PathBuf>>,
    /// If set, the caller states on which files the VM runs, and the content of files does not
    /// overrule it.
    pub(in crate::vm) stated: bool,
}

impl Domain {
    /// Creates the description of a VM without disks.
    #[must_use]
    pub fn new(running: bool) -> Self {
        Self { running, ..Self::default() }
    }

    /// Creates the description by a caller who states the files that the VM runs on, one for each
    /// disk.
    #[must_use]
    pub fn stated(files: impl IntoIterator<Item = PathBuf>) -> Self {
        let disks = files.into_iter().enumerate().map(|(number, file)| (format!("disk {number}"), vec![file]));
        Self { disks: disks.collect(), stated: true, ..Self::default() }
    }

    /// Returns the name of the disk that writes a recorded file.
    #[must_use]
    pub fn disk_writing(&self, files: &VolumeFiles, recorded: &str) -> Option<&str> {
        let path = files.path(recorded);
        let mut disks = self.disks.iter();
        let found = disks.find(|(_, open)| open.first().is_some_and(|file| files.leads_to(file, &path)));
        found.map(|(name, _)| name.as_str())
    }

    /// Returns the name of the disk of a running VM that has a recorded file open, and the file's
    /// index in its chain.
    #[must_use]
    pub fn disk_with(&self, files: &VolumeFiles, recorded: &str) -> Option<(&str, usize)> {
        if !self.running {
            return None;
        }
        let path = files.path(recorded);
        let index_in = |open: &[PathBuf]| open.iter().position(|file| files.leads_to(file, &path));
        self.disks.iter().find_map(|(name, open)| Some((name.as_str(), index_in(open)?)))
    }
}

/// The files that a running VM has open, resolved once: an operation asks for each of its records.
#[derive(Debug, Default)]
pub(in crate::vm) struct OpenFiles {
    by_identity: HashMap<FileId, (String, usize)>,
    /// Files without an identity, by their path without links.
    by_path: HashMap<PathBuf, (String, usize)>,
}

impl OpenFiles {
    /// Resolves the files of a running VM. A stopped or unknown VM has none.
    pub(in crate::vm) fn of(domain: Option<&Domain>, files: &VolumeFiles) -> Self {
        let mut open = Self::default();
        let disks = domain.filter(|domain| domain.running).into_iter().flat_map(|domain| &domain.disks);
        for (disk, chain) in disks {
            for (index, path) in chain.iter().enumerate() {
                let known = match files.file_system().resolve(path) {
                    Ok(Resolved { file: Some(identity), .. }) => open.by_identity.entry(identity).or_default(),
                    Ok(Resolved { path, file: None }) => open.by_path.entry(path).or_default(),
                    // A path that cannot be resolved can still be compared as it is.
                    Err(_) => open.by_path.entry(path.clone()).or_default(),
                };
                // If several disks have a file, the one that writes it counts.
                if known.0.is_empty() || index < known.1 {
                    *known = (disk.clone(), index);
                }
            }
        }
        open
    }

    /// Returns the name of the disk that has a recorded file open, and the file's index in its
    /// chain.
    pub(in crate::vm) fn disk_with(&self, files: &VolumeFiles, recorded: &str) -> Option<(&str, usize)> {
        if self.by_identity.is_empty() && self.by_path.is_empty() {
            return None;
        }
        let path = files.path(recorded);
        let found = match files.file_system().resolve(&path) {
            Ok(Resolved { file: Some(identity), .. }) => self.by_identity.get(&identity),
            Ok(Resolved { path, file: None }) => self.by_path.get(&path),
            Err(_) => self.by_path.get(&path),
        };
        found.map(|(disk, index)| (disk.as_str(), *index))
    }
}

/// Receives the progress of a merge, and records its points of no return.
pub trait Watch: Progress {
    /// Called before the library changes the guest-visible content of the base. Until then the
    /// merge can be called off.
    ///
    /// # Errors
    /// Any error of the journal. The merge stops before the change.
    fn before_change(&self) -> merge::Result<()>;

    /// Called before the hypervisor is asked to start a merge, or before a job that is found
    /// running is taken over.
    ///
    /// # Errors
    /// Any error of the journal. The hypervisor must not be asked then.
    fn before_start(&self) -> Result<()>;

    /// Called before the hypervisor is asked to switch the VM from the top to the base. From then
    /// on the base may be newer than the top.
    ///
    /// # Errors
    /// Any error of the journal. The hypervisor must not be asked then.
    fn before_switch(&self) -> Result<()>;
}

impl Watch for () {
    fn before_change(&self) -> merge::Result<()> {
        Ok(())
    }

    fn before_start(&self) -> Result<()> {
        Ok(())
    }

    fn before_switch(&self) -> Result<()> {
        Ok(())
    }
}

/// The context in which steps are carried out.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ExecutionContext<'a> {
    /// The recorded files.
    pub files: &'a VolumeFiles,
    /// The maximum number of volumes to work on at once, at least 1.
    pub jobs: usize,
    /// The maximum bytes of data to copy per second and volume. `None` means no limit.
    pub rate_limit: Option<u64>,
    /// If set, an interrupted operation is completed: clusters that it left allocated and unused
    /// are freed.
    pub recovering: bool,
    /// The treatment of attributes of the active file that cannot be set on an overlay.
    pub attributes: Attributes,
    /// The provider of overlays, if the set has one.
    pub provider: Option<&'a Arc<dyn OverlayProvider>>,
    /// The estimates of the preflight, by the recorded path of the survivor. The files are locked
    /// since.
    pub estimates: &'a BTreeMap<String, merge::Way>,
    /// The VM's name, for requests to the provider.
    pub vm: &'a str,
}

/// An overlay that was created.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Created {
    /// The recorded path.
    pub path: String,
    /// The identity of the file.
    pub identity: Option<FileId>,
    /// If set, the provider created it.
    pub provided: bool,
}

/// Records the overlays that an operation created.
pub trait CreationLog: Sync {
    /// Called when an overlay was created exclusively, before anything is written to it.
    fn created(&self, created: Created);

    /// Called when all overlays are complete and durable, before a VM can write to them.
    ///
    /// # Errors
    /// Any error of the journal. The VM must not be switched to the overlays then.
    fn completed(&self) -> Result<()>;
}

/// The result of a merge.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Merged {
    /// The virtual size of the survivor, in bytes.
    pub virtual_size: u64,
    /// The data moved.
    pub report: merge::Report,
    /// If set, a running VM has been switched to the base and writes it. A second merge would undo
    /// its writes.
    pub switched: bool,
}

/// Carries out the steps of a plan. Each step can be repeated after an interruption, or when it is
/// done already.
///
/// The trait is sealed: its contract includes internals of recovery. A VM's hypervisor is added by
/// [`live::Hypervisor`](crate::live::Hypervisor), a store of the model by
/// [`Store`](crate::vm::Store), media for overlays by [`OverlayProvider`].
pub trait Executor: sealed::Sealed + Send + Sync + fmt::Debug {
    /// Returns the hypervisor's description of the VM, or `None` if this executor has no
    /// hypervisor.
    ///
    /// # Errors
    /// The hypervisor cannot be reached.
    fn domain(&self, vm: &str) -> Result<Option<Domain>>;

    /// Returns the kind of the block job that runs on a disk, by the hypervisor's name of the disk;
    /// `None` if there is none.
    ///
    /// # Errors
    /// The hypervisor cannot be reached.
    fn job_on(&self, disk: &str) -> Result<Option<String>>;

    /// Creates overlays, durable on return together with their names, and switches the disks of a
    /// running VM to them. With `quiesce`, a running guest flushes and freezes its file systems
    /// first.
    ///
    /// # Errors
    /// Any. The caller removes the overlays that `log` recorded.
    fn create(
        &self,
        overlays: &[NewOverlay],
        quiesce: bool,
        context: &ExecutionContext<'_>,
        log: &dyn CreationLog,
    ) -> Result<()>;

    /// Merges two files, durable on return.
    ///
    /// # Errors
    /// Any. The merge can be repeated.
    fn merge(&self, step: &MergeStep, context: &ExecutionContext<'_>, watch: &dyn Watch) -> Result<Merged>;

    /// Changes the backing file in a file's header to one with the same content, durable on return.
    ///
    /// # Errors
    /// Any. The change can be repeated.
    fn relink(&self, file: &FileRef, from: &FileRef, to: &FileRef, context: &ExecutionContext<'_>) -> Result<()>;

    /// Resizes the active file, durable on return.
    ///
    /// # Errors
    /// Any. The file has the old size or the new one.
    fn resize(&self, file: &FileRef, below: &[FileRef], size: u64, context: &ExecutionContext<'_>) -> Result<()>;
}

/// Restricts [`Executor`] to this crate.
pub(crate) mod sealed {
    /// Implemented by the executors of this crate.
    pub trait Sealed {}
}
