//! A real guest under a real libvirt. It confirms the behaviour of the fake hypervisor of the other
//! tests.
//!
//! ```text
//! tests/live/environment up        # as root: packages, the guest, a private libvirtd
//! cargo test --all-features --test live -- --test-threads=1
//! tests/live/environment stop      # ends libvirtd and its guests
//! virsh -c "$(tests/live/environment uri)" list --all
//! ```
//!
//! The tests start an environment that is installed but not started. Without one, each test prints
//! `live tests SKIPPED`, which `QCOW2_CHAIN_REQUIRE_LIVE=1` turns into a failure.
//!
//! - [`hypervisor`]: `Hypervisor::get()`, its URI, and `virsh`
//! - [`lab`]: a directory with fresh ext4 disks, and the checks of its files
//! - [`guest`]: a domain: boot (about 5 s under TCG), agent, hot-added disks, the writer and its
//!   fsynced records
//! - [`content`]: the content of an image: fsck, and every record of the writer
//! - [`scene`]: a VM with snapshots that writes all the time; its steps, and the checks after each
//! - `snapshots`: the rows of the acceptance table
//! - `jobs`: merges that exceed a time limit, or whose program or guest ends
//! - `connection`: number and end of connections, a daemon that hangs, names in headers
//! - `program`: the command line program
//! - `overhead`: times compared with virsh; `QCOW2_CHAIN_LIVE_ROUNDS` rounds (3)
//! - `baseline`: the same operations by virsh alone

mod baseline;
mod connection;
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
