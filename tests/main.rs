//! All integration tests in one binary, so that it links once.

mod chain;
mod check;
#[cfg(feature = "cli")]
mod cli;
mod commit_ends;
mod convert;
#[cfg(feature = "cli")]
mod convert_program;
mod crash;
mod crash_merge;
#[cfg(feature = "vm")]
mod crash_vm;
mod create;
mod devices;
mod faults;
mod filesystems;
mod foreign;
mod headers;
mod hostile;
mod image;
mod inspection;
#[cfg(feature = "cli")]
mod kill;
mod layering;
mod locks;
mod merge;
mod plan;
mod qemu;
mod rebase;
mod review;
mod support;
mod tables;
#[cfg(feature = "vm")]
mod vm;
#[cfg(feature = "vm")]
mod vm_plan;
#[cfg(feature = "vm")]
mod vm_read;
