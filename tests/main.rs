//! All integration tests in one binary, so that it links once.

mod chain;
mod check;
#[cfg(feature = "cli")]
mod cli;
mod convert;
#[cfg(feature = "cli")]
mod convert_program;
mod crash;
mod crash_merge;
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
mod model;
mod plan;
mod protocols;
mod qemu;
mod rebase;
mod review;
mod stress;
mod support;
mod tables;
