//! What the adapter needs of a hypervisor, about one VM.

use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use thiserror::Error as ThisError;

use crate::chain::Format;

/// The result of asking a hypervisor.
pub type Result<T, E = HypervisorError> = std::result::Result<T, E>;

/// Why a hypervisor did not do what it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, ThisError)]
#[error("{message}")]
pub struct HypervisorError {
    /// What kind of failure.
    pub kind: FailureKind,
    /// The hypervisor's own words.
    pub message: String,
}

impl HypervisorError {
    /// A failure of this kind.
    #[must_use]
    pub fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

/// What kind of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FailureKind {
    /// There is no such VM, or it is not running.
    Gone,
    /// The hypervisor cannot be reached, or its answer was lost: nobody knows whether it was done.
    Unreachable,
    /// There is no guest agent, or it is not connected.
    NoAgent,
    /// The guest agent did not answer in time. What it was told may still be obeyed.
    AgentTimeout,
    /// Anything else. It was not done.
    Failed,
}

/// One file of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskFile {
    /// Its path.
    pub path: PathBuf,
    /// Its format, where the hypervisor says one that is known here.
    pub format: Option<Format>,
}

/// A job that copies a disk's writes to another file meanwhile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirror {
    /// The file that it copies to.
    pub path: PathBuf,
    /// Whether that file reads as the disk does, so that the VM can be switched over.
    pub ready: bool,
}

/// A disk of the VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Its name in the hypervisor: libvirt's target, such as `vda`.
    pub name: String,
    /// Its files, the one that the VM writes first. Of a VM that is off, perhaps only that one.
    pub files: Vec<DiskFile>,
    /// The job on it that will want to be switched over, if there is one.
    pub mirror: Option<Mirror>,
}

/// A VM as its hypervisor describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Description {
    /// Whether it is running, or paused.
    pub running: bool,
    /// Its disks that are files.
    pub disks: Vec<Disk>,
}

/// Which job is running on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum JobKind {
    /// A commit of files that the VM does not write.
    Commit,
    /// A commit of the file that the VM writes.
    ActiveCommit,
    /// Another one.
    Other,
}

/// How far a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    /// Which job.
    pub kind: JobKind,
    /// What is done, in bytes. Equal to `total` does not mean ready, and both are 0 at first.
    pub done: u64,
    /// What is to be done, in bytes.
    pub total: u64,
}

/// A commit that is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit {
    /// The disk.
    pub disk: String,
    /// The file whose data go down.
    pub top: PathBuf,
    /// The file beneath it, which takes them in.
    pub base: PathBuf,
    /// Whether the VM writes `top`.
    pub active: bool,
    /// The most bytes to copy in a second; none does not limit.
    pub rate_limit: Option<u64>,
}

/// A disk that is to write a new file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewTop {
    /// The disk.
    pub disk: String,
    /// The file, which exists, is backed by the one that the disk writes now, and is qcow2.
    pub file: PathBuf,
}

/// How a job ended, or what it came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum JobEvent {
    /// It is complete.
    Completed,
    /// It failed.
    Failed,
    /// It was aborted.
    Cancelled,
    /// The VM can be switched over.
    Ready,
}

/// Something that the hypervisor told by itself. It says that it is time to look, no more: events get lost, come late, or come
/// for another job.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// Of the job on a disk.
    Job {
        /// The disk.
        disk: String,
        /// What.
        event: JobEvent,
    },
    /// The VM is not running any more.
    Stopped,
}

/// A hypervisor's view of one VM, and what can be asked of it. The adapter over it is [`super::LiveExecutor`].
///
/// Every call may be made from several threads at once.
pub trait Hypervisor: Send + Sync + fmt::Debug {
    /// The VM as it is now: running with these disks, or off with those that it would be started with.
    ///
    /// # Errors
    /// [`FailureKind::Unreachable`]. A VM that does not exist is described as off, without disks.
    fn describe(&self) -> Result<Description>;

    /// Lets disks write new files, all at one instant or none. With `quiesce` the guest's file systems are brought in order
    /// first and let go afterwards.
    ///
    /// # Errors
    /// [`FailureKind::NoAgent`], [`FailureKind::AgentTimeout`]; any other. After [`FailureKind::Unreachable`] it may be done.
    fn snapshot(&self, disks: &[NewTop], quiesce: bool) -> Result<()>;

    /// Sets how long the guest agent may take for an answer, from now on.
    ///
    /// # Errors
    /// [`FailureKind::NoAgent`]; any other.
    fn set_agent_timeout(&self, at_most: Duration) -> Result<()>;

    /// Lets go the guest's file systems.
    ///
    /// # Errors
    /// [`FailureKind::AgentTimeout`]; any other.
    fn thaw(&self) -> Result<()>;

    /// Starts a commit.
    ///
    /// # Errors
    /// Any. After [`FailureKind::Unreachable`] it may be running.
    fn commit(&self, commit: &Commit) -> Result<()>;

    /// The job on a disk, if one is running.
    ///
    /// # Errors
    /// [`FailureKind::Gone`], [`FailureKind::Unreachable`].
    fn job(&self, disk: &str) -> Result<Option<Job>>;

    /// Lets the job on a disk copy at most so many bytes in a second from now on; none does not limit.
    ///
    /// # Errors
    /// Any.
    fn set_rate_limit(&self, disk: &str, rate_limit: Option<u64>) -> Result<()>;

    /// Ends the job on a disk: the VM goes on as without it.
    ///
    /// # Errors
    /// Any.
    fn abort(&self, disk: &str) -> Result<()>;

    /// Ends the job on a disk that is ready: the VM writes the file that was copied to from now on.
    ///
    /// # Errors
    /// Any. After [`FailureKind::Unreachable`] it may be done.
    fn pivot(&self, disk: &str) -> Result<()>;

    /// Gives a disk another size in bytes, seen by the guest at once.
    ///
    /// # Errors
    /// Any. After [`FailureKind::Unreachable`] it may be done.
    fn resize(&self, disk: &str, size: u64) -> Result<()>;

    /// Waits for something about this disk or the VM to happen, no longer than this. Where the hypervisor tells nothing by
    /// itself it just waits.
    fn wait(&self, disk: &str, at_most: Duration) -> Option<Event>;

    /// The time, from any moment on. Another one than the machine's is for tests.
    fn now(&self) -> Duration {
        static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
        START.get_or_init(Instant::now).elapsed()
    }
}
