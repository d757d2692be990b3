//! The snapshot set of a VM: the entry point for callers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use super::adopt;
use super::execute::executor::{Domain, ExecutionContext, Executor};
use super::execute::journal::{Found, Journal};
use super::execute::lock::VmLock;
use super::execute::offline::OfflineExecutor;
use super::execute::recover::Recovery;
use super::execute::report::Report;
use super::execute::{Run, Tools};
use super::files::VolumeFiles;
use super::model::catalogue::{Catalogue, directory_of, with_suffix};
use super::model::store::Store;
use super::model::{Model, Snapshot, State, Volume};
use super::options::{AdoptOptions, MergeOptions, SnapshotOptions, VolumeSpec};
use super::plan::Plan;
use super::plan::request::Request;
use super::preflight::Preflight;
use super::provider::OverlayProvider;
use super::query::listing::Listing;
use super::{Refusal, Result};
use crate::chain::Chain;
use crate::merge;
use crate::progress::Progress;
use crate::storage::{Attributes, EntryKind, FileSystem, HostFileSystem};

/// The snapshots of a VM over all of its volumes.
///
/// A set holds no file open: each operation locks the VM, reads the catalogue, and leaves
/// everything on disk, so that many processes may have one each. An interrupted operation is
/// completed or undone by [`SnapshotSet::recover`]. Until then other changes are refused; reading
/// is not, and the VM can be started.
///
/// ```
/// use std::sync::Arc;
/// use qcow2_chain::image::{CreateOptions, Image};
/// use qcow2_chain::storage::{FileSystem, MemoryFileSystem};
/// use qcow2_chain::vm::{AdoptOptions, SnapshotSet, VolumeSpec};
///
/// let file_system: Arc<dyn FileSystem> = Arc::new(MemoryFileSystem::new());
/// let disk = file_system.create_new("/vm/vda.qcow2".as_ref())?;
/// Image::create(disk, &CreateOptions::new(1 << 30))?.close()?;
///
/// let volumes = [VolumeSpec::new("vda", "/vm/vda.qcow2")];
/// let set = SnapshotSet::adopt_in(file_system, "/vm/catalogue.json", &volumes, &AdoptOptions::default())?;
/// set.create("before the upgrade", &Default::default())?;
/// assert_eq!(set.list(false)?.current.as_deref(), Some("before the upgrade"));
/// set.revert("before the upgrade", &Default::default(), &())?;
/// set.delete("before the upgrade", &Default::default(), &())?;
/// assert!(set.active_path("vda")?.ends_with("vda.qcow2"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct SnapshotSet {
    pub(super) files: VolumeFiles,
    pub(super) store: Arc<dyn Store>,
    pub(super) executor: Arc<dyn Executor>,
    pub(super) provider: Option<Arc<dyn OverlayProvider>>,
    pub(super) journal: PathBuf,
    pub(super) catalogue: PathBuf,
    pub(super) lock: VmLock,
    pub(super) jobs: usize,
}

/// The circumstances of an operation.
pub(super) struct Operation<'a> {
    pub(super) files: &'a VolumeFiles,
    pub(super) domain: Option<&'a Domain>,
    pub(super) jobs: usize,
    pub(super) vm: &'a str,
    pub(super) recovering: bool,
    pub(super) attributes: Attributes,
    pub(super) estimates: &'a BTreeMap<String, merge::Way>,
}

impl SnapshotSet {
    /// Loads the set of an existing catalogue.
    ///
    /// # Errors
    /// [`Error::Storage`](super::Error::Storage), [`Error::Catalogue`](super::Error::Catalogue): it cannot be read.
    pub fn load(catalogue: impl Into<PathBuf>) -> Result<Self> {
        Self::load_in(Arc::new(HostFileSystem), catalogue)
    }

    /// Loads the set of a catalogue in this file system.
    ///
    /// # Errors
    /// See [`SnapshotSet::load`].
    pub fn load_in(file_system: Arc<dyn FileSystem>, catalogue: impl Into<PathBuf>) -> Result<Self> {
        let catalogue = catalogue.into();
        // Beside a link to the catalogue, journal and lock would be others than beside the
        // catalogue.
        let catalogue = match file_system.entry(&catalogue)? {
            EntryKind::Link => file_system.resolve(&catalogue)?.path,
            _ => catalogue,
        };
        let store = Arc::new(Catalogue::new(Arc::clone(&file_system), &catalogue));
        store.load()?;
        Ok(Self::with_store(file_system, catalogue, store))
    }

    /// Creates a set whose model is kept by `store`. Recorded relative paths start at the directory
    /// of `catalogue`, and journal and lock are created beside it. No file is written at
    /// `catalogue` itself. The path must not contain links.
    #[must_use]
    pub fn with_store(file_system: Arc<dyn FileSystem>, catalogue: impl Into<PathBuf>, store: Arc<dyn Store>) -> Self {
        let catalogue = catalogue.into();
        Self {
            files: VolumeFiles::new(Arc::clone(&file_system), directory_of(&catalogue)),
            store,
            executor: Arc::new(OfflineExecutor),
            provider: None,
            journal: with_suffix(&catalogue, ".journal"),
            lock: VmLock::new(file_system, with_suffix(&catalogue, ".lock")),
            catalogue,
            jobs: 4,
        }
    }

    /// Takes in existing files as the volumes of a VM, and writes its catalogue, which must not
    /// exist.
    ///
    /// # Errors
    /// - [`Refusal::Exists`], [`Refusal::LeftoverJournal`]: a catalogue or a journal exists at the
    ///   path.
    /// - [`Refusal::VmName`], [`Refusal::VolumeName`], [`Refusal::Path`]: a name is not allowed.
    /// - [`Refusal::SameFile`]: two paths lead to one file.
    /// - [`Refusal::Dependents`]: an image outside the set is backed by one of the files.
    /// - [`Refusal::BlockDevice`], [`Refusal::MemoryDirectory`]: the place of overlays is missing
    ///   or not durable.
    pub fn adopt(catalogue: impl Into<PathBuf>, volumes: &[VolumeSpec], options: &AdoptOptions) -> Result<Self> {
        Self::adopt_in(Arc::new(HostFileSystem), catalogue, volumes, options)
    }

    /// Takes in files of this file system.
    ///
    /// # Errors
    /// See [`SnapshotSet::adopt`].
    pub fn adopt_in(
        file_system: Arc<dyn FileSystem>,
        catalogue: impl Into<PathBuf>,
        volumes: &[VolumeSpec],
        options: &AdoptOptions,
    ) -> Result<Self> {
        let catalogue = adopt::catalogue_path(&*file_system, &catalogue.into())?;
        let file = Catalogue::new(Arc::clone(&file_system), &catalogue);
        let set = Self::with_store(file_system, &catalogue, Arc::new(file.clone()));
        set.refuse_existing(&file)?;
        let model = adopt::model(&set.files, &catalogue, volumes, options, now())?;
        let locked = set.lock.take()?;
        set.refuse_existing(&file)?;
        set.store.save(&model)?;
        drop(locked);
        Ok(set)
    }

    fn refuse_existing(&self, file: &Catalogue) -> Result<()> {
        if file.exists()? {
            return Err(Refusal::Exists { path: self.catalogue.display().to_string() }.into());
        }
        if self.files.file_system().exists(&self.journal)? {
            return Err(Refusal::LeftoverJournal { path: self.journal.display().to_string() }.into());
        }
        Ok(())
    }

    /// Sets the executor. Default: [`OfflineExecutor`].
    #[must_use]
    pub fn with_executor(mut self, executor: Arc<dyn Executor>) -> Self {
        self.executor = executor;
        self
    }

    /// Sets the provider of overlays. Default: overlays are files in the active file's directory,
    /// or in the directory that the volume names.
    #[must_use]
    pub fn with_provider(mut self, provider: Arc<dyn OverlayProvider>) -> Self {
        self.provider = Some(provider);
        self
    }

    /// Sets the maximum number of volumes to work on at once. Default: 4.
    #[must_use]
    pub fn with_jobs(mut self, jobs: usize) -> Self {
        self.jobs = jobs.max(1);
        self
    }

    /// Returns the path of the catalogue, without links.
    #[must_use]
    pub fn catalogue(&self) -> &Path {
        &self.catalogue
    }

    /// Returns the view of the recorded files.
    #[must_use]
    pub fn files(&self) -> &VolumeFiles {
        &self.files
    }

    /// Reads the model.
    ///
    /// # Errors
    /// Any error of the store.
    pub fn model(&self) -> Result<Model> {
        self.store.load()
    }

    /// Lists volumes and snapshots, hidden ones included if `hidden` is set.
    ///
    /// # Errors
    /// Any error of the store.
    pub fn list(&self, hidden: bool) -> Result<Listing> {
        let mut model = self.store.load()?;
        for volume in &mut model.volumes {
            // If a file cannot be read, its size at the last operation is listed.
            if let Ok(facts) = self.files.look(&volume.active.file) {
                volume.active.virtual_size = facts.virtual_size;
            }
        }
        Ok(Listing::of(&model, &self.files, hidden))
    }

    /// Returns the path of a volume's active file.
    ///
    /// # Errors
    /// [`Refusal::UnknownVolume`]. Any error of the store.
    pub fn active_path(&self, volume: &str) -> Result<PathBuf> {
        let model = self.store.load()?;
        Ok(self.files.path(&find_attached(&model, volume)?.active.file.path))
    }

    /// Returns the path of a snapshot's file of a volume.
    ///
    /// # Errors
    /// [`Refusal::UnknownSnapshot`], [`Refusal::UnknownVolume`], [`Refusal::Incomplete`]. Any error of the store.
    pub fn snapshot_path(&self, snapshot: &str, volume: &str) -> Result<PathBuf> {
        let model = self.store.load()?;
        let (found, volume) = (find_snapshot(&model, snapshot)?, find_volume(&model, volume)?);
        Ok(self.files.path(&file_of(found, volume)?.file.path))
    }

    /// Opens a volume as it was at a snapshot, for reading.
    ///
    /// # Errors
    /// - [`Refusal::UnknownSnapshot`], [`Refusal::UnknownVolume`], [`Refusal::Incomplete`].
    /// - [`Refusal::NotReady`]: the snapshot is being merged.
    /// - [`Refusal::Disagreement`], [`Refusal::BaseChanged`]: a file is not the recorded one.
    pub fn open(&self, snapshot: &str, volume: &str) -> Result<Chain> {
        let model = self.store.load()?;
        let (snapshot, volume) = (find_ready(&model, snapshot)?, find_volume(&model, volume)?);
        file_of(snapshot, volume)?;
        self.files.disk(&model, volume, &model.files_from(Some(snapshot.id), volume))
    }

    /// Opens a volume as it is now, for reading. A VM that writes it must be stopped.
    ///
    /// # Errors
    /// See [`SnapshotSet::open`].
    pub fn open_active(&self, volume: &str) -> Result<Chain> {
        let model = self.store.load()?;
        let volume = find_attached(&model, volume)?;
        self.files.disk(&model, volume, &model.active_chain(volume))
    }

    /// Computes the plan of an operation with all of its checks, and changes nothing.
    ///
    /// # Errors
    /// Those of the operation.
    pub fn plan(&self, request: &Request, options: &MergeOptions) -> Result<Plan> {
        Ok(Preflight::new(self, request, options)?.plan)
    }

    /// Creates a snapshot of all volumes, or of none.
    ///
    /// # Errors
    /// [`Error::Refused`](super::Error::Refused), or any error of creating the overlays: nothing has changed. After an
    /// error of the store, [`SnapshotSet::recover`] decides.
    pub fn create(&self, name: &str, options: &SnapshotOptions) -> Result<Report> {
        let request = Request::Create {
            name: name.to_owned(),
            description: options.description.clone(),
            created: now(),
            quiesce: options.quiesce,
            max_depth: options.max_depth,
        };
        self.operate(&request, &MergeOptions::default().with_ignore_attributes(options.ignore_attributes), &())
    }

    /// Reverts all volumes to a snapshot. Data written since the last snapshot is discarded. A
    /// hidden snapshot that only the discarded files needed is merged.
    ///
    /// # Errors
    /// - [`Error::Refused`](super::Error::Refused), [`Error::NoSpace`](super::Error::NoSpace):
    ///   nothing has changed.
    /// - [`Error::Incomplete`](super::Error::Incomplete): the volumes are reverted, and that merge
    ///   failed.
    pub fn revert(&self, name: &str, options: &MergeOptions, progress: &dyn Progress) -> Result<Report> {
        let request = Request::Revert { name: name.to_owned(), detach_missing: options.detach_missing };
        self.operate(&request, options, progress)
    }

    /// Deletes a snapshot: its files are removed, merged with their only dependent, or hidden while
    /// there are several. An interrupted deletion is resumed.
    ///
    /// # Errors
    /// - [`Error::Refused`](super::Error::Refused), [`Error::NoSpace`](super::Error::NoSpace):
    ///   nothing has changed.
    /// - [`Error::Incomplete`](super::Error::Incomplete),
    ///   [`Error::Cancelled`](super::Error::Cancelled): it has begun and can be resumed.
    pub fn delete(&self, name: &str, options: &MergeOptions, progress: &dyn Progress) -> Result<Report> {
        let locked = self.lock.take()?;
        if let Some(report) = self.resume_deletion(name, options, progress)? {
            return Ok(report);
        }
        let done = self.operate_locked(&Request::Delete { name: name.to_owned() }, options, progress);
        drop(locked);
        done
    }

    /// Resizes a volume's active file to `size` bytes. A smaller size requires `shrink`.
    ///
    /// # Errors
    /// [`Error::Refused`](super::Error::Refused). Any error of resizing the image.
    pub fn resize(&self, volume: &str, size: u64, shrink: bool) -> Result<Report> {
        self.operate(&Request::Resize { volume: volume.to_owned(), size, shrink }, &MergeOptions::default(), &())
    }

    /// Completes or undoes an interrupted operation. A recovery may itself be interrupted, and run
    /// again.
    ///
    /// # Errors
    /// - [`Error::Uncertain`](super::Error::Uncertain): recover with the hypervisor, or with
    ///   [`SnapshotSet::recover_with`].
    /// - [`Refusal::ForeignJournal`]: the journal does not belong to the catalogue.
    /// - Any other error that keeps the operation from being completed.
    pub fn recover(&self, progress: &dyn Progress) -> Result<Recovery> {
        self.recover_stated(None, progress)
    }

    /// Recovers by the caller's description of the VM, which overrules that of the executor: see
    /// [`Domain::stated`].
    ///
    /// # Errors
    /// See [`SnapshotSet::recover`].
    pub fn recover_with(&self, domain: &Domain, progress: &dyn Progress) -> Result<Recovery> {
        self.recover_stated(Some(domain), progress)
    }

    pub(super) fn recover_stated(&self, domain: Option<&Domain>, progress: &dyn Progress) -> Result<Recovery> {
        let _locked = self.lock.take()?;
        self.recover_locked(domain, &MergeOptions::default(), progress)
    }

    fn operate(&self, request: &Request, options: &MergeOptions, progress: &dyn Progress) -> Result<Report> {
        let locked = self.lock.take()?;
        let done = self.operate_locked(request, options, progress);
        drop(locked);
        done
    }

    fn operate_locked(&self, request: &Request, options: &MergeOptions, progress: &dyn Progress) -> Result<Report> {
        let preflight = Preflight::new(self, request, options)?;
        let operation = Operation {
            files: &preflight.files,
            domain: preflight.domain.as_ref(),
            jobs: preflight.jobs,
            vm: &preflight.model.vm,
            recovering: false,
            attributes: if options.ignore_attributes { Attributes::BestEffort } else { Attributes::Require },
            estimates: &preflight.estimates,
        };
        let tools = self.tools(&operation, options, progress);
        Run::new(tools, &preflight.plan, preflight.model.clone()).start()
    }

    pub(super) fn tools<'a>(
        &'a self,
        operation: &Operation<'a>,
        options: &MergeOptions,
        progress: &'a dyn Progress,
    ) -> Tools<'a> {
        let context = ExecutionContext {
            files: operation.files,
            jobs: operation.jobs,
            rate_limit: options.rate_limit,
            recovering: operation.recovering,
            attributes: operation.attributes,
            estimates: operation.estimates,
            provider: self.provider.as_ref(),
            vm: operation.vm,
        };
        Tools {
            store: &*self.store,
            executor: &*self.executor,
            domain: operation.domain,
            journal: &self.journal,
            catalogue: &self.catalogue,
            context,
            progress,
        }
    }

    pub(super) fn refuse_unfinished(&self) -> Result<()> {
        match Journal::find(self.files.file_system(), &self.journal)? {
            Found::Nothing => Ok(()),
            // The process that began it is gone: it would hold the lock.
            Found::Torn => {
                Err(Refusal::Unfinished { operation: "one that had not changed anything".to_owned() }.into())
            }
            Found::Journal(_, plan) => {
                self.check_journal(&plan, &self.store.load()?)?;
                Err(Refusal::Unfinished { operation: plan.purpose.to_string() }.into())
            }
        }
    }
}

/// Returns the present time in seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

pub(super) fn find_attached<'a>(model: &'a Model, name: &str) -> Result<&'a Volume, Refusal> {
    model.volume(name).ok_or_else(|| Refusal::UnknownVolume { name: name.to_owned() })
}

pub(super) fn find_volume<'a>(model: &'a Model, name: &str) -> Result<&'a Volume, Refusal> {
    model.any_volume(name).ok_or_else(|| Refusal::UnknownVolume { name: name.to_owned() })
}

pub(super) fn find_snapshot<'a>(model: &'a Model, name: &str) -> Result<&'a Snapshot, Refusal> {
    model.find(name).ok_or_else(|| Refusal::UnknownSnapshot { name: name.to_owned() })
}

pub(super) fn file_of<'a>(snapshot: &'a Snapshot, volume: &Volume) -> Result<&'a super::FileRecord, Refusal> {
    let lacks = || Refusal::Incomplete { snapshot: snapshot.name.clone(), volume: volume.name.clone() };
    snapshot.files.get(&volume.name).ok_or_else(lacks)
}

/// Returns a snapshot that can be read.
pub(super) fn find_ready<'a>(model: &'a Model, name: &str) -> Result<&'a Snapshot, Refusal> {
    let snapshot = find_snapshot(model, name)?;
    match snapshot.state {
        State::Ready => Ok(snapshot),
        state => Err(Refusal::NotReady { name: name.to_owned(), state }),
    }
}
