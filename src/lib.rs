//! qcow2 images and chains of overlays, read, written, checked and merged in pure Rust.
//!
//! The crate is built in floors; each uses only those below it:
//!
//! | floor | module | what it owns |
//! |---|---|---|
//! | 1 | [`mod@format`] | bytes of the format to typed values and back; no I/O |
//! | 1 | [`storage`] | files, memory, names, locks; knows nothing of qcow2 |
//! | 2 | [`image`] | one image file |
//! | 3 | [`chain`] | several images as one disk |
//! | 4 | [`merge`] | deltas become one |
//! | 5 | `vm` (feature `vm`) | a VM's snapshots over all of its volumes |
//! | 6 | `live` (feature `vm`) | the same while the VM runs, by its hypervisor |
//! | 7 | `libvirt` (feature `libvirt`, links libvirt) | that hypervisor, by libvirt |
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
pub mod storage;
#[cfg(feature = "vm")]
pub mod vm;

/// The README's code is compiled with the documentation's.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
