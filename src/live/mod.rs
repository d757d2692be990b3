//! Snapshots of a running VM: the plans of [`vm`](crate::vm), carried out by a hypervisor for the
//! files that the VM has open.
//!
//! [`LiveExecutor`] implements [`Executor`](crate::vm::Executor). It makes no decisions that belong
//! to the planner: it converts a step to calls of a [`Hypervisor`], and the hypervisor's state to
//! the step's result. Files that the VM does not have open (another branch of the tree, or all
//! files of a VM that is off) are left to [`OfflineExecutor`](crate::vm::OfflineExecutor), which
//! locks them.
//!
//! Events are hints to read the state earlier. Results are read from the hypervisor's description
//! of the VM and from the images.
//!
//! With the feature `libvirt`, `libvirt::Libvirt` is a hypervisor.

mod executor;
#[cfg(any(test, feature = "test-utils"))]
pub mod fake;
mod hypervisor;
mod job;
mod quiesce;
mod received;

pub use executor::{LiveExecutor, OnTimeout};
pub use hypervisor::{
    Commit, Description, Disk, DiskFile, Event, FailureKind, Hypervisor, HypervisorError, Job, JobEvent, JobKind,
    Mirror, NewTop, Result,
};
