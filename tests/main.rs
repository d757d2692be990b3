//! All integration tests in one binary, so that it links once.

mod chain;
mod check;
#[cfg(feature = "cli")]
mod cli;
mod commit_ends;
mod compare;
mod convert;
#[cfg(feature = "cli")]
mod convert_program;
mod crash;
mod crash_merge;
#[cfg(feature = "vm")]
mod crash_vm;
mod create;
mod deep;
mod dependents;
mod devices;
#[cfg(all(feature = "cli", target_os = "linux"))]
mod environment;
mod faults;
mod filesystems;
mod foreign;
mod headers;
mod hostile;
mod image;
mod inspection;
#[cfg(feature = "cli")]
mod kill;
#[cfg(all(feature = "cli", unix))]
mod kill_vm;
mod layering;
#[cfg(feature = "vm")]
mod live_fake;
mod locks;
mod merge;
mod model;
mod plan;
#[cfg(feature = "cli")]
mod program_merges;
mod protocols;
#[cfg(feature = "vm")]
mod provider;
mod qemu;
mod rebase;
mod review;
#[cfg(all(feature = "vm", unix))]
mod scenarios;
#[cfg(all(feature = "cli", target_os = "linux"))]
mod signals;
mod sparse;
mod stress;
mod support;
mod tables;
#[cfg(feature = "vm")]
mod tells;
mod threads;
#[cfg(feature = "vm")]
mod vm;
#[cfg(all(feature = "cli", target_os = "linux"))]
mod vm_faults;
#[cfg(feature = "vm")]
mod vm_plan;
#[cfg(all(feature = "cli", target_os = "linux"))]
mod vm_program;
#[cfg(feature = "vm")]
mod vm_read;
#[cfg(all(feature = "vm", unix))]
mod vm_scale;
