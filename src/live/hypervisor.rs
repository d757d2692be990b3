//! The interface to a hypervisor, for one VM.

use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use thiserror::Error as ThisError;

use crate::chain::Format;

/// The result of a call of a hypervisor.
pub type Result<T, E = HypervisorError> = std::result::Result<T, E>;

/// A failed call of a hypervisor.
#[derive(Clone, Debug, PartialEq, Eq, ThisError)]
#[error("{message}")]
pub struct HypervisorError {
    /// The kind of failure.
    pub kind: FailureKind,
    /// The hypervisor's own message.
    pub message: String,
}

impl HypervisorError {
    /// Creates an error of this kind.
    #[must_use]
    pub fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

/// The kind of a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FailureKind {
    /// The VM does not exist or does not run.
    Gone,
    /// The hypervisor cannot be reached, or its answer was lost. The call may have had its effect.
    Unreachable,
    /// The VM has no guest agent, or the agent is not connected.
    NoAgent,
    /// The guest agent did not answer in time. It may still execute the command later.
    AgentTimeout,
    /// Any other failure. The call had no effect.
    Failed,
}

/// One file of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskFile {
    /// The path, as the hypervisor names it.
    pub path: PathBuf,
    /// The format, if the hypervisor reports one that this crate reads.
    pub format: Option<Format>,
}

/// A job that mirrors a disk's writes to another file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirror {
    /// The file that the job copies to.
    pub path: PathBuf,
    /// True once that file has the content of the disk, so that the VM can be switched to it.
    pub ready: bool,
}

/// A disk of the VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// The hypervisor's name of the disk: libvirt's target, such as `vda`.
    pub name: String,
    /// The disk's files, from the active file down. A VM that is off may have only the first one.
    pub files: Vec<DiskFile>,
    /// The mirroring job on the disk, if there is one.
    pub mirror: Option<Mirror>,
}

/// The state of a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Description {
    /// True if the VM runs or is paused.
    pub running: bool,
    /// The disks that are files or block devices.
    pub disks: Vec<Disk>,
}

/// The kind of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum JobKind {
    /// A commit of files that the VM only reads.
    Commit,
    /// A commit of the active file.
    ActiveCommit,
    /// Any other job.
    Other,
}

impl fmt::Display for JobKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Commit => "commit",
            Self::ActiveCommit => "active commit",
            Self::Other => "other",
        })
    }
}

/// The state of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    /// The kind of job.
    pub kind: JobKind,
    /// The work done, in bytes. A value equal to `total` does not mean that the job is ready; both
    /// are 0 at first.
    pub done: u64,
    /// The work in total, in bytes.
    pub total: u64,
}

/// A request to commit one file into another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit {
    /// The disk.
    pub disk: String,
    /// The file whose data is committed, as the hypervisor names it.
    pub top: PathBuf,
    /// The file that receives the data, as the hypervisor names it.
    pub base: PathBuf,
    /// True if `top` is the active file.
    pub active: bool,
    /// The largest number of bytes to copy per second; `None` for no limit.
    pub rate_limit: Option<u64>,
}

/// A disk and its new active file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewTop {
    /// The disk.
    pub disk: String,
    /// The new file: an absolute path of an existing qcow2 image that is backed by the present
    /// active file.
    pub file: PathBuf,
}

/// A change of a job's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum JobEvent {
    /// The job is complete.
    Completed,
    /// The job failed.
    Failed,
    /// The job was aborted.
    Cancelled,
    /// The VM can be switched to the file that the job copies to.
    Ready,
}

/// A notification. It is a hint to read the VM's state, and no more: events get lost, arrive late,
/// or concern another job.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A job's state changed.
    Job {
        /// The disk.
        disk: String,
        /// The change.
        event: JobEvent,
    },
    /// The VM stopped.
    Stopped,
}

/// A hypervisor's interface to one VM. [`super::LiveExecutor`] carries plans out over it.
///
/// All methods may be called from several threads at once.
pub trait Hypervisor: Send + Sync + fmt::Debug {
    /// Returns the present state: of a running VM its disks, of one that is off the disks of its
    /// definition. A VM that does not exist is described as off and without disks.
    ///
    /// # Errors
    /// [`FailureKind::Unreachable`]: the state cannot be read.
    fn describe(&self) -> Result<Description>;

    /// Switches disks to new active files, all at one instant or none. With `quiesce` the guest's
    /// file systems are frozen before and thawed afterwards.
    ///
    /// # Errors
    /// - [`FailureKind::NoAgent`], [`FailureKind::AgentTimeout`]: the guest could not be frozen; no
    ///   disk was switched.
    /// - [`FailureKind::Unreachable`]: the disks may have been switched.
    /// - Any other kind: no disk was switched.
    fn snapshot(&self, disks: &[NewTop], quiesce: bool) -> Result<()>;

    /// Sets the time limit for answers of the guest agent; `None` restores the hypervisor's initial
    /// limit. The limit belongs to the VM: other users of the agent have it too, until it is
    /// restored.
    ///
    /// # Errors
    /// - [`FailureKind::NoAgent`]: there is no agent.
    /// - Any other kind: the limit is unchanged, or unknown after [`FailureKind::Unreachable`].
    fn set_agent_timeout(&self, at_most: Option<Duration>) -> Result<()>;

    /// Thaws the guest's file systems.
    ///
    /// # Errors
    /// - [`FailureKind::AgentTimeout`]: the agent did not answer, or still answers an earlier
    ///   command.
    /// - Any other kind: the file systems may be frozen.
    fn thaw(&self) -> Result<()>;

    /// Starts a commit. Where the file above `top` names its backing file by a relative path, it
    /// keeps a relative path.
    ///
    /// # Errors
    /// - [`FailureKind::Unreachable`]: the job may be running.
    /// - Any other kind: no job was started.
    fn commit(&self, commit: &Commit) -> Result<()>;

    /// Returns the state of the job on a disk, or `None` if there is none.
    ///
    /// # Errors
    /// - [`FailureKind::Gone`]: the VM does not run.
    /// - [`FailureKind::Unreachable`]: the state cannot be read.
    fn job(&self, disk: &str) -> Result<Option<Job>>;

    /// Limits the job on a disk to a number of bytes per second; `None` removes the limit.
    ///
    /// # Errors
    /// Any kind, also if there is no job.
    fn set_rate_limit(&self, disk: &str, rate_limit: Option<u64>) -> Result<()>;

    /// Ends the job on a disk. The VM keeps its present files.
    ///
    /// # Errors
    /// Any kind, also if there is no job.
    fn abort(&self, disk: &str) -> Result<()>;

    /// Ends the job on a disk and switches the VM to the file that the job copied to.
    ///
    /// # Errors
    /// - [`FailureKind::Unreachable`]: the VM may have been switched.
    /// - Any other kind: the VM was not switched, for example because the job is not ready.
    fn pivot(&self, disk: &str) -> Result<()>;

    /// Changes the size of a disk, in bytes. The guest sees the new size at once.
    ///
    /// # Errors
    /// - [`FailureKind::Unreachable`]: the size may have changed.
    /// - Any other kind: the size is unchanged.
    fn resize(&self, disk: &str, size: u64) -> Result<()>;

    /// Waits for an event of this disk or of the VM, for at most this time. A hypervisor without
    /// events waits for the whole time.
    fn wait(&self, disk: &str, at_most: Duration) -> Option<Event>;

    /// Returns the time since an arbitrary moment. Tests replace the machine's clock.
    fn now(&self) -> Duration {
        static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
        START.get_or_init(Instant::now).elapsed()
    }
}
