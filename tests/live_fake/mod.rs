//! Snapshots of a running VM over a hypervisor with injected faults: answers, images on disk, and
//! the recovery.

mod jobs;
mod merges;
mod rig;
mod schedules;
mod snapshots;
mod switches;
