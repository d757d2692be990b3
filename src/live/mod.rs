//! Snapshots of a running VM: the same plans, carried out by its hypervisor where it has the files open.
//!
//! [`LiveExecutor`] is an [`Executor`](crate::vm::Executor). It decides nothing that the planner could: it turns a step into calls of a
//! [`Hypervisor`] and what the hypervisor says into the step's outcome. Files that the VM does not have open (another branch of the
//! tree, or all of them while it is off) are worked on by [`OfflineExecutor`](crate::vm::OfflineExecutor), under image locks.
//!
//! Events are hints and nothing more. What happened is read from the hypervisor's description of the VM and from the images.
//!
//! With feature `libvirt`, `libvirt::Libvirt` is such a hypervisor.

mod executor;
#[cfg(any(test, feature = "test-utils"))]
pub mod fake;
mod hypervisor;
mod job;
mod quiesce;

pub use executor::{LiveExecutor, OnTimeout};
pub use hypervisor::{
    Commit, Description, Disk, DiskFile, Event, FailureKind, Hypervisor, HypervisorError, Job, JobEvent, JobKind,
    Mirror, NewTop, Result,
};
