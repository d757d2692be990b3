//! A VM's snapshots: the one thing that callers hold.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use super::adopt;
use super::preflight;
use super::{Refusal, Result};
use crate::chain::Chain;
use crate::storage::{FileSystem, HostFileSystem};
use crate::vm::execute::executor::{Domain, ExecutionContext, Executor};
use crate::vm::execute::journal::{Found, Journal};
use crate::vm::execute::lock::VmLock;
use crate::vm::execute::offline::OfflineExecutor;
use crate::vm::execute::progress::Progress;
use crate::vm::execute::report::Report;
use crate::vm::execute::{Run, Tools};
use crate::vm::files::{Links, VolumeFiles};
use crate::vm::model::catalogue::{Catalogue, directory_of, with_suffix};
use crate::vm::model::store::Store;
use crate::vm::model::{FileRef, Model, Snapshot, Volume};
use crate::vm::options::{AdoptOptions, MergeOptions, SnapshotOptions, VolumeSpec};
use crate::vm::plan::Plan;
use crate::vm::plan::planner::{Request, overlay_path};
use crate::vm::query::listing::Listing;

/// A VM's snapshots over all of its volumes.
///
/// Holds nothing but paths: every operation locks the VM, reads the catalogue, and leaves everything on disk, so that many
/// programs may have one each. An operation that was interrupted is completed or undone by [`SnapshotSet::recover`]; until
/// then other changes are refused, reading is not, and the VM can be started.
///
/// ```
/// use std::sync::Arc;
/// use qcow2_chain::image::{CreateOptions, Image};
/// use qcow2_chain::storage::{MemoryFileSystem, FileSystem};
/// use qcow2_chain::vm::{AdoptOptions, SnapshotSet, VolumeSpec};
///
/// let names: Arc<dyn FileSystem> = Arc::new(MemoryFileSystem::new());
/// let disk = names.create_new("/vm/vda.qcow2".as_ref())?;
/// Image::create(disk, &CreateOptions::new(1 << 30))?.close()?;
///
/// let volumes = [VolumeSpec::new("vda", "/vm/vda.qcow2")];
/// let set = SnapshotSet::adopt_in(names, "/vm/catalogue.json", &volumes, &AdoptOptions::default())?;
/// set.create("before the upgrade", &Default::default())?;
/// assert_eq!(set.list(false)?.current.as_deref(), Some("before the upgrade"));
/// set.revert("before the upgrade", &Default::default(), &())?;
/// set.delete("before the upgrade", &Default::default(), &())?;
/// assert!(set.active_path("vda")?.ends_with("vda.qcow2"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct SnapshotSet {
    pub(super) place: VolumeFiles,
    pub(super) store: Arc<dyn Store>,
    pub(super) executor: Arc<dyn Executor>,
    pub(super) journal: PathBuf,
    pub(super) catalogue: PathBuf,
    lock: VmLock,
    jobs: usize,
}

/// What a recovery did.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Recovery {
    /// Nothing was under way, and nothing was written.
    Clean,
    /// An operation had begun and was taken back: everything is as before it.
    Undone(String),
    /// An operation was completed.
    Completed(Box<Report>),
}

impl SnapshotSet {
    /// The set of this catalogue, which must exist.
    ///
    /// # Errors
    /// What reading the catalogue gives.
    pub fn load(catalogue: impl Into<PathBuf>) -> Result<Self> {
        Self::load_in(Arc::new(HostFileSystem), catalogue)
    }

    /// As [`SnapshotSet::load`], on other names than the operating system's.
    ///
    /// # Errors
    /// As [`SnapshotSet::load`].
    pub fn load_in(names: Arc<dyn FileSystem>, catalogue: impl Into<PathBuf>) -> Result<Self> {
        let catalogue = catalogue.into();
        let store = Arc::new(Catalogue::new(Arc::clone(&names), &catalogue));
        store.load()?;
        Ok(Self::with_store(names, catalogue, store))
    }

    /// A set whose model somebody else keeps. `catalogue` tells where relative paths start and how the journal and the lock
    /// beside it are called; no such file is written.
    #[must_use]
    pub fn with_store(names: Arc<dyn FileSystem>, catalogue: impl Into<PathBuf>, store: Arc<dyn Store>) -> Self {
        let catalogue = catalogue.into();
        Self {
            place: VolumeFiles::new(Arc::clone(&names), directory_of(&catalogue)),
            store,
            executor: Arc::new(OfflineExecutor),
            journal: with_suffix(&catalogue, ".journal"),
            lock: VmLock::new(names, with_suffix(&catalogue, ".lock")),
            catalogue,
            jobs: 4,
        }
    }

    /// Takes in existing files as the volumes of a VM, and writes its catalogue, which must not exist yet.
    ///
    /// # Errors
    /// [`Refusal::Exists`]; what opening the files gives.
    pub fn adopt(catalogue: impl Into<PathBuf>, volumes: &[VolumeSpec], options: &AdoptOptions) -> Result<Self> {
        Self::adopt_in(Arc::new(HostFileSystem), catalogue, volumes, options)
    }

    /// As [`SnapshotSet::adopt`], on other names than the operating system's.
    ///
    /// # Errors
    /// As [`SnapshotSet::adopt`].
    pub fn adopt_in(
        names: Arc<dyn FileSystem>,
        catalogue: impl Into<PathBuf>,
        volumes: &[VolumeSpec],
        options: &AdoptOptions,
    ) -> Result<Self> {
        let catalogue = catalogue.into();
        let file = Catalogue::new(Arc::clone(&names), &catalogue);
        let exists = || Refusal::Exists { path: catalogue.display().to_string() };
        if file.exists()? {
            return Err(exists().into());
        }
        let stem = || catalogue.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let vm = options.vm.clone().unwrap_or_else(stem);
        let set = Self::with_store(names, &catalogue, Arc::new(file.clone()));
        let adopted = volumes.iter().map(|spec| adopt::read(&set.place, spec, options)).collect::<Result<Vec<_>>>()?;
        let model = adopt::model(&set.place, &vm, &adopted, &options.snapshots, now())?;
        let locked = set.lock.take()?;
        if file.exists()? {
            return Err(exists().into());
        }
        set.store.save(&model)?;
        drop(locked);
        Ok(set)
    }

    /// The same with another executor.
    #[must_use]
    pub fn with_executor(mut self, executor: Arc<dyn Executor>) -> Self {
        self.executor = executor;
        self
    }

    /// The same, working on so many volumes at once (4).
    #[must_use]
    pub fn with_jobs(mut self, jobs: usize) -> Self {
        self.jobs = jobs.max(1);
        self
    }

    /// The catalogue's path.
    #[must_use]
    pub fn catalogue(&self) -> &Path {
        &self.catalogue
    }

    /// Where the recorded paths lead.
    #[must_use]
    pub fn place(&self) -> &VolumeFiles {
        &self.place
    }

    /// The model as it is recorded.
    ///
    /// # Errors
    /// What reading it gives.
    pub fn model(&self) -> Result<Model> {
        self.store.load()
    }

    /// Volumes and snapshots, with the hidden ones or without.
    ///
    /// # Errors
    /// What reading the catalogue gives.
    pub fn list(&self, hidden: bool) -> Result<Listing> {
        let mut model = self.store.load()?;
        for volume in &mut model.volumes {
            // What cannot be looked at now had this size when it last could.
            if let Ok(facts) = self.place.look(&volume.active.file) {
                volume.active.virtual_size = facts.virtual_size;
            }
        }
        Ok(Listing::of(&model, &self.place, hidden))
    }

    /// The path of the file that the VM writes.
    ///
    /// # Errors
    /// [`Refusal::UnknownVolume`]; what reading the catalogue gives.
    pub fn active_path(&self, volume: &str) -> Result<PathBuf> {
        let model = self.store.load()?;
        Ok(self.place.path(&find_volume(&model, volume)?.active.file.path))
    }

    /// The path of a snapshot's file.
    ///
    /// # Errors
    /// [`Refusal::UnknownSnapshot`], [`Refusal::UnknownVolume`], [`Refusal::Incomplete`].
    pub fn snapshot_path(&self, snapshot: &str, volume: &str) -> Result<PathBuf> {
        let model = self.store.load()?;
        let (found, volume) = (find_snapshot(&model, snapshot)?, find_volume(&model, volume)?);
        let lacks = || Refusal::Incomplete { snapshot: snapshot.to_owned(), volume: volume.name.clone() };
        Ok(self.place.path(&found.files.get(&volume.name).ok_or_else(lacks)?.file.path))
    }

    /// A volume as it was at a snapshot, for reading.
    ///
    /// # Errors
    /// [`Refusal::UnknownSnapshot`], [`Refusal::UnknownVolume`]; [`Refusal::NotReady`] for one that is being merged;
    /// [`Refusal::Disagreement`], [`Refusal::BaseChanged`]; what opening the files gives.
    pub fn open(&self, snapshot: &str, volume: &str) -> Result<Chain> {
        let model = self.store.load()?;
        let (snapshot, volume) = (find_ready(&model, snapshot)?, find_volume(&model, volume)?);
        self.place.disk(&model, volume, &model.files_from(Some(snapshot.id), volume))
    }

    /// A volume as it is now, for reading. A VM that writes it must be off.
    ///
    /// # Errors
    /// As [`SnapshotSet::open`].
    pub fn open_active(&self, volume: &str) -> Result<Chain> {
        let model = self.store.load()?;
        let volume = find_volume(&model, volume)?;
        self.place.disk(&model, volume, &model.active_chain(volume))
    }

    /// What an operation would do, without doing anything.
    ///
    /// # Errors
    /// As the operation.
    pub fn plan(&self, request: &Request, options: &MergeOptions) -> Result<Plan> {
        Ok(self.surveyed(request, options)?.2)
    }

    /// Takes a snapshot of all volumes, or of none.
    ///
    /// # Errors
    /// [`super::Error::Refused`]; what creating the overlays gives: then nothing has changed. After an error of the catalogue,
    /// [`SnapshotSet::recover`] tells whether the snapshot was taken.
    pub fn create(&self, name: &str, options: &SnapshotOptions) -> Result<Report> {
        let request = Request::Create {
            name: name.to_owned(),
            description: options.description.clone(),
            created: now(),
            quiesce: options.quiesce,
            max_depth: options.max_depth,
        };
        self.operate(&request, &MergeOptions::default(), &())
    }

    /// Brings all volumes back to a snapshot. What was written since the last one is gone. A snapshot that only the active
    /// files still needed, as it was hidden, is merged away.
    ///
    /// # Errors
    /// [`super::Error::Refused`], [`super::Error::NoSpace`]; [`super::Error::Incomplete`] where that merge failed: the volumes are back all the
    /// same.
    pub fn revert(&self, name: &str, options: &MergeOptions, progress: &dyn Progress) -> Result<Report> {
        self.operate(&Request::Revert { name: name.to_owned() }, options, progress)
    }

    /// Deletes a snapshot: its files are removed, merged with the one thing that stands on them, or kept out of sight while
    /// several do. One whose deletion was interrupted is deleted on.
    ///
    /// # Errors
    /// [`super::Error::Refused`], [`super::Error::NoSpace`]; [`super::Error::Incomplete`] and [`super::Error::Cancelled`] where it was begun and can be
    /// resumed.
    pub fn delete(&self, name: &str, options: &MergeOptions, progress: &dyn Progress) -> Result<Report> {
        let locked = self.lock.take()?;
        if let Some(report) = self.resume_deletion(name, options, progress)? {
            return Ok(report);
        }
        let done = self.operate_locked(&Request::Delete { name: name.to_owned() }, options, progress);
        drop(locked);
        done
    }

    /// Gives a volume another size.
    ///
    /// # Errors
    /// [`super::Error::Refused`]; what resizing the image gives.
    pub fn resize(&self, volume: &str, size: u64, shrink: bool) -> Result<Report> {
        self.operate(&Request::Resize { volume: volume.to_owned(), size, shrink }, &MergeOptions::default(), &())
    }

    /// Completes or undoes what was interrupted. May itself be interrupted any number of times.
    ///
    /// # Errors
    /// What keeps it from being completed.
    pub fn recover(&self, progress: &dyn Progress) -> Result<Recovery> {
        self.recover_told(None, progress)
    }

    /// Recovers with what the caller says of the VM, if it says something.
    pub(super) fn recover_told(&self, domain: Option<&Domain>, progress: &dyn Progress) -> Result<Recovery> {
        let _locked = self.lock.take()?;
        self.recover_locked(domain, &MergeOptions::default(), progress)
    }

    /// Takes in one more volume. There must be no snapshots: they would lack it.
    ///
    /// # Errors
    /// [`Refusal::HasSnapshots`], [`Refusal::VolumeName`]; what opening the file gives.
    pub fn attach(&self, spec: &VolumeSpec, options: &AdoptOptions) -> Result<()> {
        self.change_volumes(|model| {
            if model.volume(&spec.name).is_some() {
                let why = "there is one already";
                return Err(Refusal::VolumeName { name: spec.name.clone(), why }.into());
            }
            let adopted = adopt::read(&self.place, spec, options)?;
            let added = adopt::model(&self.place, &model.vm, &[adopted], &[], now())?;
            model.volumes.extend(added.volumes);
            Ok(())
        })
    }

    /// Lets a volume go; its files stay. There must be no snapshots: they would keep it.
    ///
    /// # Errors
    /// [`Refusal::HasSnapshots`], [`Refusal::UnknownVolume`].
    pub fn detach(&self, volume: &str) -> Result<()> {
        self.change_volumes(|model| {
            find_volume(model, volume)?;
            model.volumes.retain(|known| known.name != volume);
            Ok(())
        })
    }

    fn change_volumes(&self, change: impl FnOnce(&mut Model) -> Result<()>) -> Result<()> {
        let locked = self.lock.take()?;
        self.refuse_unfinished()?;
        let mut model = self.store.load()?;
        if !model.snapshots.is_empty() {
            return Err(Refusal::HasSnapshots.into());
        }
        change(&mut model)?;
        if let Some(why) = model.contradictions().into_iter().next() {
            return Err(super::Error::Catalogue { file: self.catalogue.display().to_string(), why });
        }
        model.last_operation.id += 1;
        model.last_operation.stages = 1;
        self.store.save(&model)?;
        drop(locked);
        Ok(())
    }

    fn operate(&self, request: &Request, options: &MergeOptions, progress: &dyn Progress) -> Result<Report> {
        let locked = self.lock.take()?;
        let done = self.operate_locked(request, options, progress);
        drop(locked);
        done
    }

    fn operate_locked(&self, request: &Request, options: &MergeOptions, progress: &dyn Progress) -> Result<Report> {
        let (model, domain, plan) = self.surveyed(request, options)?;
        let idle = |file: &&FileRef| domain.disk_with(&self.place, &file.path).is_none();
        if let Request::Resize { volume, .. } = request {
            // Whoever has it open is met before the journal is begun.
            let active = model.volume(volume).map(|volume| &volume.active.file);
            drop(self.place.hold(active.into_iter().filter(idle))?);
        }
        // Nobody may write to files while they are frozen.
        let replaced = plan.created().next().is_some();
        let active = model.volumes.iter().map(|volume| &volume.active.file).filter(|_| replaced);
        let held = self.place.hold(active.filter(idle))?;
        let done = Run::new(self.tools(&domain, options, progress, false), &plan, model).start();
        drop(held);
        done
    }

    pub(super) fn tools<'a>(
        &'a self,
        domain: &'a Domain,
        options: &MergeOptions,
        progress: &'a dyn Progress,
        recovering: bool,
    ) -> Tools<'a> {
        let manner =
            ExecutionContext { place: &self.place, jobs: self.jobs, rate_limit: options.rate_limit, recovering };
        Tools { store: &*self.store, executor: &*self.executor, domain, journal: &self.journal, manner, progress }
    }

    /// What is known, what the VM is doing, and the plan, which nothing that can be seen beforehand stands in the way of.
    fn surveyed(&self, request: &Request, options: &MergeOptions) -> Result<(Model, Domain, Plan)> {
        self.refuse_unfinished()?;
        let model = self.look_at_volumes()?;
        let domain = self.executor.domain(&model.vm)?;
        let plan = self.planned(&model, &domain, request, options)?;
        preflight::check(&self.place, &domain, &plan)?;
        Ok((model, domain, plan))
    }

    /// Plans after a look at everything that could refute the records.
    fn planned(&self, model: &Model, domain: &Domain, request: &Request, options: &MergeOptions) -> Result<Plan> {
        let plan = preflight::plan_with_costs(&self.place, model, request, domain, options)?;
        for volume in &model.volumes {
            volume.bases.iter().try_for_each(|base| self.place.check_base(base))?;
            self.check_head(model, &model.active_chain(volume))?;
        }
        if let Request::Revert { name } = request {
            let snapshot = find_ready(model, name)?;
            for volume in &model.volumes {
                self.check_head(model, &model.files_from(Some(snapshot.id), volume))?;
            }
        }
        Ok(plan)
    }

    /// Refuses where the first file's header disagrees with the records. The others are looked at by whoever opens them: the
    /// cost of a snapshot does not grow with their number.
    fn check_head(&self, model: &Model, files: &[FileRef]) -> Result<()> {
        let Some((first, below)) = files.split_first() else { return Ok(()) };
        let links = if model.merging().is_some() { Links::MaySkip } else { Links::Exact };
        self.place.check_head(first, below, links)
    }

    /// The model, with the sizes that the active files have now, and numbers for overlays that no file has.
    fn look_at_volumes(&self) -> Result<Model> {
        let mut model = self.store.load()?;
        for volume in &mut model.volumes {
            let facts = self.place.look(&volume.active.file)?;
            volume.active.virtual_size = facts.virtual_size;
            volume.active.bytes_on_disk = facts.bytes_on_disk;
        }
        while self.any_overlay_exists(&model)? {
            model.next_file += 1;
        }
        Ok(model)
    }

    fn any_overlay_exists(&self, model: &Model) -> Result<bool> {
        for (number, volume) in (model.next_file..).zip(&model.volumes) {
            if self.place.exists(&overlay_path(&model.vm, volume, number))? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn refuse_unfinished(&self) -> Result<()> {
        match Journal::find(self.place.names(), &self.journal)? {
            Found::Nothing => Ok(()),
            // Whoever began it holds the lock, or is gone.
            Found::Torn => {
                Err(Refusal::Unfinished { operation: "one that had not changed anything".to_owned() }.into())
            }
            Found::Journal(_, plan) => Err(Refusal::Unfinished { operation: plan.purpose.to_string() }.into()),
        }
    }
}

/// Now, in seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

pub(super) fn find_volume<'a>(model: &'a Model, name: &str) -> Result<&'a Volume, Refusal> {
    model.volume(name).ok_or_else(|| Refusal::UnknownVolume { name: name.to_owned() })
}

pub(super) fn find_snapshot<'a>(model: &'a Model, name: &str) -> Result<&'a Snapshot, Refusal> {
    model.find(name).ok_or_else(|| Refusal::UnknownSnapshot { name: name.to_owned() })
}

/// A snapshot that can be read.
pub(super) fn find_ready<'a>(model: &'a Model, name: &str) -> Result<&'a Snapshot, Refusal> {
    let snapshot = find_snapshot(model, name)?;
    match snapshot.state {
        super::State::Ready => Ok(snapshot),
        state => Err(Refusal::NotReady { name: name.to_owned(), state }),
    }
}
