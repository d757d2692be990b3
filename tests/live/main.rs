//! A real guest under a real libvirt: what the fake hypervisor of the other tests is measured against.
//!
//! ```text
//! tests/live/environment up        # as root: Debian packages, the guest, libvirtd with directories of its own
//! cargo test --all-features --test live -- --test-threads=1
//! tests/live/environment stop      # ends libvirtd and what runs under it
//! virsh -c "$(tests/live/environment uri)" list --all
//! ```
//!
//! Where the environment is there but not started, the tests start it. Where it is not there, each of them says
//! `live tests SKIPPED`; `QCOW2_CHAIN_REQUIRE_LIVE=1` makes that a failure.
//!
//! - [`hypervisor`]: `Hypervisor::get()`, its URI, and `virsh`
//! - [`lab`]: a directory with fresh ext4 disks, and what must hold of its files
//! - [`guest`]: a domain: boot (about 5 s under TCG), agent, hot-added disks, the writer and its fsynced records
//! - [`content`]: what an image holds, seen from outside: fsck, and every record of the writer
//! - [`scene`]: a VM with snapshots that writes all the time; its steps and what must hold after each
//! - `snapshots`: the acceptance table's rows
//! - `jobs`: merges that take too long, or whose program or guest dies
//! - `program`: the command line program
//! - `overhead`: our adapter beside virsh; `QCOW2_CHAIN_LIVE_ROUNDS` rounds (3)
//! - `baseline`: the same operations by virsh alone, which is what our adapter is compared with

mod baseline;
mod content;
mod guest;
mod hypervisor;
mod jobs;
mod lab;
mod overhead;
#[cfg(feature = "cli")]
mod program;
mod record;
mod scene;
mod snapshots;
#[path = "../support/states.rs"]
mod states;
