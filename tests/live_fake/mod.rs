//! Snapshots of a running VM over a hypervisor that plays every ugly turn: what is answered, what is on disk then, and what
//! recovery makes of it.

mod merges;
mod rig;
mod schedules;
mod snapshots;
mod switches;
