//! The executor for a VM that may be running.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::hypervisor::{Commit, Description, Disk, FailureKind, Hypervisor, HypervisorError, NewTop};
use super::job::Watcher;
use super::quiesce::quiesced;
use crate::merge::Direction;
use crate::storage::{Access, LockMode};
use crate::vm::{
    Domain, Error, ExecutionContext, Executor, FileRef, Links, MergeStep, Merged, NewOverlay, OfflineExecutor, Refusal,
    Result, VolumeFiles, Watch,
};

/// What becomes of a merge that takes too long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnTimeout {
    /// Its job goes on. Deleting the snapshot again watches on.
    #[default]
    Keep,
    /// Its job is ended; the VM goes on with the files that it has.
    Abort,
}

/// Carries plans out for a VM that may be running.
///
/// ```
/// use std::sync::Arc;
/// use qcow2_chain::live::{Hypervisor, LiveExecutor};
/// use qcow2_chain::vm::{Result, SnapshotSet};
///
/// /// Deletes a snapshot, whether the VM is running or not.
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
    /// One over this hypervisor's VM: without a limit of time for merges, with 30 seconds for the guest agent.
    #[must_use]
    pub fn new(hypervisor: Arc<dyn Hypervisor>) -> Self {
        Self { hypervisor, timeout: None, on_timeout: OnTimeout::Keep, agent_timeout: Duration::from_secs(30) }
    }

    /// The same with a limit of time for each merge of a running VM, and what then becomes of it; 0 does not limit.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration, on_timeout: OnTimeout) -> Self {
        self.timeout = (!timeout.is_zero()).then_some(timeout);
        self.on_timeout = on_timeout;
        self
    }

    /// The same with another limit of time for the guest agent, in whole seconds.
    #[must_use]
    pub fn with_agent_timeout(mut self, timeout: Duration) -> Self {
        self.agent_timeout = timeout;
        self
    }

    fn describe(&self) -> Result<Description> {
        self.hypervisor.describe().map_err(|error| failed("asking what the VM is doing", error))
    }

    /// The disk that has a file open, and the file's place among its files, while the VM runs.
    fn disk_with(&self, place: &VolumeFiles, recorded: &str) -> Result<Option<(Disk, usize)>> {
        let description = self.describe()?;
        Ok(if description.running { find(&description, &place.path(recorded), place) } else { None })
    }

    /// Lets the disks write their overlays. After an answer that said nothing, the hypervisor's description decides.
    fn switch_to(&self, tops: &[NewTop], place: &VolumeFiles, quiesce: bool) -> Result<()> {
        let hypervisor = &*self.hypervisor;
        let done =
            if quiesce { quiesced(hypervisor, tops, self.agent_timeout) } else { hypervisor.snapshot(tops, false) };
        let Err(error) = done else { return Ok(()) };
        let what = "taking a snapshot of the running VM";
        let uncertain = |error| Error::Uncertain { what: what.to_owned(), source: Some(Box::new(error)) };
        let Ok(description) = hypervisor.describe() else { return Err(uncertain(error)) };
        let is_written = |top: &NewTop| {
            let disk = description.disks.iter().find(|disk| disk.name == top.disk);
            disk.and_then(|disk| disk.files.first()).is_some_and(|file| place.leads_to(&file.path, &top.file))
        };
        if tops.iter().any(is_written) {
            return Ok(());
        }
        Err(match error.kind {
            FailureKind::NoAgent | FailureKind::AgentTimeout => Refusal::Quiesce { why: error.message }.into(),
            // Of a VM that is gone, its configuration tells what it was told, not what it wrote: it may have been switched over,
            // and have written, before it went.
            _ if !description.running => uncertain(error),
            _ => failed(what, error),
        })
    }

    fn merge_live(
        &self,
        disk: &Disk,
        found: (Option<usize>, usize),
        step: &MergeStep,
        manner: &ExecutionContext<'_>,
        watch: &dyn Watch,
    ) -> Result<Merged> {
        let place = manner.place;
        match found {
            // The base is there and the top is not: done before. (What the VM writes is the journal's to judge.)
            (None, base) if !step.active => return merged(place, disk, base, step),
            // The VM writes the top if the plan says so, and not otherwise.
            (Some(top), base) if base == top + 1 && step.active == (top == 0) => {}
            _ => {
                let whose = if step.active { "what is written and" } else { "only read and" };
                return Err(disagreement(
                    place,
                    &step.top,
                    &format!("not {whose} above {} on disk {}", step.base, disk.name),
                ));
            }
        }
        let commit = Commit {
            disk: disk.name.clone(),
            top: place.path(&step.top.path),
            base: place.path(&step.base.path),
            active: step.active,
            rate_limit: manner.rate_limit,
        };
        let watcher = Watcher {
            hypervisor: &*self.hypervisor,
            place,
            commit: &commit,
            file: &step.base.path,
            timeout: self.timeout,
            on_timeout: self.on_timeout,
            watch,
        };
        let done = watcher.run()?;
        let mut merged = merged(place, &done.disk, done.base, step)?;
        merged.report.copied = done.moved;
        Ok(merged)
    }
}

impl Executor for LiveExecutor {
    fn domain(&self, _vm: &str) -> Result<Domain> {
        let description = self.describe()?;
        let mut domain = Domain { running: description.running, ..Domain::default() };
        for disk in description.disks {
            domain.disks.insert(disk.name, disk.files.into_iter().map(|file| file.path).collect());
        }
        Ok(domain)
    }

    fn create(&self, overlays: &[NewOverlay], quiesce: bool, manner: &ExecutionContext<'_>) -> Result<()> {
        let description = self.describe()?;
        let mut tops = Vec::new();
        for overlay in overlays.iter().filter(|_| description.running) {
            let backing = manner.place.path(&overlay.backing.path);
            let Some((disk, at)) = find(&description, &backing, manner.place) else { continue };
            if at != 0 {
                return Err(disagreement(manner.place, &overlay.backing, "not the one that the VM writes"));
            }
            let file = absolute(&manner.place.path(&overlay.file.path));
            tops.push(NewTop { disk: disk.name, file });
        }
        // The overlays are ours, with the geometry that the volume wants; the hypervisor opens them.
        OfflineExecutor.create(overlays, false, manner)?;
        if tops.is_empty() { Ok(()) } else { self.switch_to(&tops, manner.place, quiesce) }
    }

    fn merge(&self, step: &MergeStep, manner: &ExecutionContext<'_>, watch: &dyn Watch) -> Result<Merged> {
        let (place, description) = (manner.place, self.describe()?);
        let at = |recorded: &str| find(&description, &place.path(recorded), place).filter(|_| description.running);
        let (top, base) = (at(&step.top.path), at(&step.base.path));
        match (top, base) {
            (None, None) => OfflineExecutor.merge(step, manner, watch),
            _ if step.direction == Direction::Pull => {
                Err(Refusal::Running { operation: "complete a merge upwards" }.into())
            }
            (top, Some((disk, base))) => self.merge_live(&disk, (top.map(|(_, at)| at), base), step, manner, watch),
            (Some(_), None) => Err(disagreement(place, &step.base, "not beneath what its disk has")),
        }
    }

    fn relink(&self, file: &FileRef, from: &FileRef, to: &FileRef, manner: &ExecutionContext<'_>) -> Result<()> {
        if self.disk_with(manner.place, &file.path)?.is_none() {
            return OfflineExecutor.relink(file, from, to, manner);
        }
        // The hypervisor did it with the merge; a header that it has open is not ours to write. By the letters: the old name,
        // which may lead to the same file still, is about to go.
        if !manner.place.is_named_by(file, to)? {
            return Err(Refusal::Running { operation: "relink a file that the VM has open" }.into());
        }
        manner.place.check_head(file, std::slice::from_ref(to), Links::Exact)
    }

    fn resize(&self, file: &FileRef, below: &[FileRef], size: u64, manner: &ExecutionContext<'_>) -> Result<()> {
        let Some((disk, at)) = self.disk_with(manner.place, &file.path)? else {
            return OfflineExecutor.resize(file, below, size, manner);
        };
        if at != 0 {
            return Err(Refusal::Running { operation: "resize a file that the VM only reads" }.into());
        }
        let done = self.hypervisor.resize(&disk.name, size);
        // Whatever was answered, the image tells.
        if manner.place.look(file)?.virtual_size == size {
            return sync(manner.place, &manner.place.path(&file.path));
        }
        let unchanged = || HypervisorError::new(FailureKind::Failed, "the disk kept its size");
        Err(failed("resizing a disk", done.err().unwrap_or_else(unchanged)))
    }
}

/// The hypervisor has other files than the plan.
fn disagreement(place: &VolumeFiles, file: &FileRef, found: &str) -> Error {
    let what =
        format!("{}: by the catalogue a disk's file, by the hypervisor {found}", place.path(&file.path).display());
    Error::Hypervisor { what, source: None }
}

/// The disk that has a file, and the file's place among its files.
fn find(description: &Description, path: &Path, place: &VolumeFiles) -> Option<(Disk, usize)> {
    description.disks.iter().find_map(|disk| Some((disk.clone(), position(disk, path, place)?)))
}

pub(super) fn position(disk: &Disk, path: &Path, place: &VolumeFiles) -> Option<usize> {
    disk.files.iter().position(|file| place.leads_to(&file.path, path))
}

/// What a commit in the hypervisor came to: durable, whatever the VM's way of caching, before the top's name may go.
fn merged(place: &VolumeFiles, disk: &Disk, base: usize, step: &MergeStep) -> Result<Merged> {
    let above = base.saturating_sub(1);
    for file in disk.files.iter().take(base + 1).skip(above) {
        sync(place, &file.path)?; // barrier: the base's data and the link above it before the catalogue
    }
    let virtual_size = place.look(&step.base)?.virtual_size;
    Ok(Merged { virtual_size, switched: step.active, ..Merged::default() })
}

fn sync(place: &VolumeFiles, path: &Path) -> Result<()> {
    Ok(place.names().open(path, &Access::write().with_lock(LockMode::None))?.sync()?)
}

/// A hypervisor is a program of its own, with a directory of its own.
fn absolute(path: &Path) -> std::path::PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// A failure of the hypervisor, as the snapshots' error.
pub(super) fn failed(what: &str, error: HypervisorError) -> Error {
    Error::Hypervisor { what: format!("{what}: {error}"), source: Some(Box::new(error)) }
}
