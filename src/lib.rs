//! qcow2 images and chains of overlays, read, written, checked and merged in pure Rust.
//!
//! The crate is built in tiers. Each tier uses only those below it:
//!
//! | tier | module | content |
//! |---|---|---|
//! | 1 | [`mod@format`] | codecs between bytes of the format and typed values; no I/O |
//! | 1 | [`progress`] | progress and cancellation of every tier |
//! | 1 | [`storage`] | files, memory, file systems, access rights, locks; independent of qcow2 |
//! | 2 | [`image`] | one image file |
//! | 3 | [`chain`] | several images as one disk |
//! | 4 | [`merge`] | commit, pull, rebase, flatten, convert |
//! | 5 | `vm` (feature `vm`) | snapshots of a VM over all of its volumes |
//! | 6 | `live` (feature `vm`) | the same while the VM runs, through its hypervisor |
//! | 7 | `libvirt` (feature `libvirt`, links libvirt) | that hypervisor, through libvirt |
#![deny(unsafe_code)]
#![warn(
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::unwrap_used,
    clippy::dbg_macro
)]

pub mod chain;
pub mod format;
pub mod image;
#[cfg(feature = "libvirt")]
pub mod libvirt;
#[cfg(feature = "vm")]
pub mod live;
pub mod merge;
pub mod progress;
pub mod storage;
#[cfg(feature = "vm")]
pub mod vm;

/// Compiles the code in the README with the doctests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
