//! The executor for a VM that may be running.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::hypervisor::{Commit, Description, Disk, FailureKind, Hypervisor, HypervisorError, NewTop};
use super::job::Watcher;
use super::quiesce::quiesced;
use super::received::check_received;
use crate::merge::Direction;
use crate::storage::{Access, LockMode};
use crate::vm::{
    CreationLog, Domain, Error, ExecutionContext, Executor, FileRef, Links, MergeStep, Merged, NewOverlay,
    OfflineExecutor, Refusal, Result, VolumeFiles, Watch, sealed,
};

/// The treatment of a merge that exceeds its time limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnTimeout {
    /// The job continues. The next deletion of the same snapshot takes it over.
    #[default]
    Keep,
    /// The job is ended. The VM keeps its present files.
    Abort,
}

/// Carries plans out for a VM that may be running.
///
/// Files that the running VM has open are merged, resized and switched by the hypervisor. All
/// others are left to [`OfflineExecutor`].
///
/// ```
/// use std::sync::Arc;
/// use qcow2_chain::live::{Hypervisor, LiveExecutor};
/// use qcow2_chain::vm::{Result, SnapshotSet};
///
/// /// Deletes a snapshot of a VM that is running or off.
/// fn delete(hypervisor: Arc<dyn Hypervisor>, catalogue: &str, snapshot: &str) -> Result<()> {
///     let set = SnapshotSet::load(catalogue)?.with_executor(Arc::new(LiveExecutor::new(hypervisor)));
///     set.delete(snapshot, &Default::default(), &())?;
///     Ok(())
/// }
/// ```
#[derive(Clone, Debug)]
pub struct LiveExecutor {
    hypervisor: Arc<dyn Hypervisor>,
    timeout: Option<Duration>,
    on_timeout: OnTimeout,
    agent_timeout: Duration,
}

impl LiveExecutor {
    /// Creates an executor over this hypervisor's VM, without a time limit for merges and with 30
    /// seconds for the guest agent.
    #[must_use]
    pub fn new(hypervisor: Arc<dyn Hypervisor>) -> Self {
        Self { hypervisor, timeout: None, on_timeout: OnTimeout::Keep, agent_timeout: Duration::from_secs(30) }
    }

    /// Sets the time limit for each merge in the running VM, and the treatment of one that exceeds
    /// it. Default: 0, no limit.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration, on_timeout: OnTimeout) -> Self {
        self.timeout = (!timeout.is_zero()).then_some(timeout);
        self.on_timeout = on_timeout;
        self
    }

    /// Sets the time limit for each answer of the guest agent, in whole seconds. Default: 30
    /// seconds. It holds for the time of a snapshot that freezes the guest; the hypervisor's
    /// initial limit is restored afterwards.
    #[must_use]
    pub fn with_agent_timeout(mut self, timeout: Duration) -> Self {
        self.agent_timeout = timeout;
        self
    }

    fn describe(&self) -> Result<Description> {
        self.hypervisor.describe().map_err(|error| failed("reading the state of the VM", error))
    }

    /// Returns the disk of the running VM that has a file open, and the file's index among the
    /// disk's files.
    fn disk_with(&self, files: &VolumeFiles, file: &FileRef) -> Result<Option<(Disk, usize)>> {
        let description = self.describe()?;
        if description.running { find(&description, &files.path(&file.path), files) } else { Ok(None) }
    }

    /// Switches disks to their overlays. If the answer is an error, the hypervisor's description
    /// decides.
    fn switch_to(&self, tops: &[NewTop], files: &VolumeFiles, quiesce: bool) -> Result<()> {
        let hypervisor = &*self.hypervisor;
        let done =
            if quiesce { quiesced(hypervisor, tops, self.agent_timeout) } else { hypervisor.snapshot(tops, false) };
        let Err(error) = done else { return Ok(()) };
        let what = "taking a snapshot of the running VM";
        let uncertain = |error| Error::Uncertain { what: what.to_owned(), source: Some(Box::new(error)) };
        let Ok(description) = hypervisor.describe() else { return Err(uncertain(error)) };
        let is_written = |top: &NewTop| {
            let disk = description.disks.iter().find(|disk| disk.name == top.disk);
            disk.and_then(|disk| disk.files.first()).is_some_and(|file| files.leads_to(&file.path, &top.file))
        };
        if tops.iter().any(is_written) {
            return Ok(());
        }
        Err(match error.kind {
            FailureKind::NoAgent | FailureKind::AgentTimeout => Refusal::Quiesce { why: error.message }.into(),
            // The definition of a VM that stopped may name other files than those it wrote: it may
            // have been switched, and have written its overlays, before it stopped.
            _ if !description.running => uncertain(error),
            _ => failed(what, error),
        })
    }

    fn merge_live(
        &self,
        disk: &Disk,
        found: (Option<usize>, usize),
        step: &MergeStep,
        context: &ExecutionContext<'_>,
        watch: &dyn Watch,
    ) -> Result<Merged> {
        let files = context.files;
        let (top, base) = match found {
            // Only the base is left: the merge was done before, if the base has the data. For the
            // active file, the journal decides that.
            (None, base) if !step.active && base > 0 => {
                check_received(files, step, watch)?;
                return merged(files, disk, base, step);
            }
            // The top is the active file exactly if the plan says so.
            (Some(top), base) if base == top + 1 && step.active == (top == 0) => (top, base),
            _ => {
                let role = if step.active { "the active file" } else { "a read-only file" };
                let found =
                    format!("the hypervisor does not have it as {role} above {} on disk {}", step.base, disk.name);
                return Err(disagreement(files, &step.top, &found));
            }
        };
        let commit = Commit {
            disk: disk.name.clone(),
            // The hypervisor's own names, which it compares as text: it has another working
            // directory, and may have opened the file through another link.
            top: disk.files[top].path.clone(),
            base: disk.files[base].path.clone(),
            active: step.active,
            rate_limit: context.rate_limit,
        };
        let watcher = Watcher {
            hypervisor: &*self.hypervisor,
            files,
            commit: &commit,
            file: &step.base.path,
            timeout: self.timeout,
            on_timeout: self.on_timeout,
            watch,
        };
        let done = watcher.run()?;
        let mut merged = merged(files, &done.disk, done.base, step)?;
        merged.report.copied = done.moved;
        Ok(merged)
    }
}

impl sealed::Sealed for LiveExecutor {}

impl Executor for LiveExecutor {
    fn domain(&self, _vm: &str) -> Result<Option<Domain>> {
        let description = self.describe()?;
        let mut domain = Domain::new(description.running);
        for disk in description.disks {
            domain.disks.insert(disk.name, disk.files.into_iter().map(|file| file.path).collect());
        }
        Ok(Some(domain))
    }

    fn job_on(&self, disk: &str) -> Result<Option<String>> {
        let job = self.hypervisor.job(disk).map_err(|error| failed("reading the block jobs", error))?;
        Ok(job.map(|job| job.kind.to_string()))
    }

    fn create(
        &self,
        overlays: &[NewOverlay],
        quiesce: bool,
        context: &ExecutionContext<'_>,
        log: &dyn CreationLog,
    ) -> Result<()> {
        let (files, description) = (context.files, self.describe()?);
        let mut tops = Vec::new();
        for overlay in overlays.iter().filter(|_| description.running) {
            // A volume that no disk has is detached from the VM: its overlay is created as offline.
            let Some((disk, at)) = find(&description, &files.path(&overlay.backing.path), files)? else { continue };
            if at != 0 {
                return Err(disagreement(files, &overlay.backing, &format!("disk {} only reads it", disk.name)));
            }
            tops.push(NewTop { disk: disk.name, file: absolute(&files.path(&overlay.file.path)) });
        }
        // The overlays are created here, with the volume's geometry; the hypervisor only opens
        // them.
        OfflineExecutor.create(overlays, false, context, log)?;
        if tops.is_empty() { Ok(()) } else { self.switch_to(&tops, files, quiesce) }
    }

    fn merge(&self, step: &MergeStep, context: &ExecutionContext<'_>, watch: &dyn Watch) -> Result<Merged> {
        let (files, description) = (context.files, self.describe()?);
        let find_open = |file: &FileRef| {
            if description.running { find(&description, &files.path(&file.path), files) } else { Ok(None) }
        };
        match (find_open(&step.top)?, find_open(&step.base)?) {
            (None, None) => OfflineExecutor.merge(step, context, watch),
            _ if step.direction == Direction::Pull => Err(Refusal::Running { operation: "complete a pull" }.into()),
            (Some((disk, _)), Some((other, _))) if disk.name != other.name => {
                let found = format!("disk {} has it open, and disk {} has its base", disk.name, other.name);
                Err(disagreement(files, &step.top, &found))
            }
            (top, Some((disk, base))) => self.merge_live(&disk, (top.map(|(_, at)| at), base), step, context, watch),
            (Some((disk, _)), None) => {
                Err(disagreement(files, &step.base, &format!("disk {} does not have it", disk.name)))
            }
        }
    }

    fn relink(&self, file: &FileRef, from: &FileRef, to: &FileRef, context: &ExecutionContext<'_>) -> Result<()> {
        if self.disk_with(context.files, file)?.is_none() {
            return OfflineExecutor.relink(file, from, to, context);
        }
        // The hypervisor changed the header together with the merge; a header that it has open must
        // not be written here. The names are compared, not the files: the old name may still lead
        // to the same file, and is about to be removed.
        if !context.files.is_named_by(file, to)? {
            return Err(Refusal::Running { operation: "relink a file that the VM has open" }.into());
        }
        context.files.check_head(file, std::slice::from_ref(to), Links::Exact)
    }

    fn resize(&self, file: &FileRef, below: &[FileRef], size: u64, context: &ExecutionContext<'_>) -> Result<()> {
        let Some((disk, at)) = self.disk_with(context.files, file)? else {
            return OfflineExecutor.resize(file, below, size, context);
        };
        if at != 0 {
            return Err(Refusal::Running { operation: "resize a file that the VM only reads" }.into());
        }
        let done = self.hypervisor.resize(&disk.name, size);
        // The image decides, since an answer may be lost.
        if context.files.look(file)?.virtual_size == size {
            return sync(context.files, &context.files.path(&file.path));
        }
        let unchanged = || HypervisorError::new(FailureKind::Failed, "the disk kept its size");
        Err(failed("resizing a disk", done.err().unwrap_or_else(unchanged)))
    }
}

/// Creates the error for a file whose use by the hypervisor differs from the plan.
pub(super) fn disagreement(files: &VolumeFiles, file: &FileRef, found: &str) -> Error {
    let what = format!("{}: the hypervisor and the catalogue disagree: {found}", files.path(&file.path).display());
    Error::Hypervisor { what, source: None }
}

/// Returns the disk that has a file, and the file's index among the disk's files. Files are
/// compared by identity.
///
/// # Errors
/// [`Error::Hypervisor`]: more than one disk has the file. To merge, resize or remove it would
/// change the other disk.
fn find(description: &Description, path: &Path, files: &VolumeFiles) -> Result<Option<(Disk, usize)>> {
    let mut users = description.disks.iter().filter_map(|disk| Some((disk, position(disk, path, files)?)));
    let (first, second) = (users.next(), users.next());
    if let (Some((first, _)), Some((second, _))) = (first, second) {
        let what = format!("{}: the disks {} and {} of the VM share it", path.display(), first.name, second.name);
        return Err(Error::Hypervisor { what, source: None });
    }
    Ok(first.map(|(disk, at)| (disk.clone(), at)))
}

/// Returns the index of a file among a disk's files. Files are compared by identity.
pub(super) fn position(disk: &Disk, path: &Path, files: &VolumeFiles) -> Option<usize> {
    disk.files.iter().position(|file| files.leads_to(&file.path, path))
}

/// Returns the result of a commit in the hypervisor, after making it durable: the VM's cache mode
/// may omit syncs.
fn merged(files: &VolumeFiles, disk: &Disk, base: usize, step: &MergeStep) -> Result<Merged> {
    let above = base.saturating_sub(1);
    for file in disk.files.iter().take(base + 1).skip(above) {
        sync(files, &file.path)?; // barrier: the base's data and the link above it before the catalogue
    }
    let virtual_size = files.look(&step.base)?.virtual_size;
    Ok(Merged { virtual_size, switched: step.active, ..Merged::default() })
}

fn sync(files: &VolumeFiles, path: &Path) -> Result<()> {
    Ok(files.file_system().open(path, &Access::write().with_lock(LockMode::None))?.sync()?)
}

/// Makes a path absolute: the hypervisor is another process with another working directory.
fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// Converts a failure of the hypervisor; `what` names the attempt.
pub(super) fn failed(what: &str, error: HypervisorError) -> Error {
    Error::Hypervisor { what: format!("{what}: {error}"), source: Some(Box::new(error)) }
}
