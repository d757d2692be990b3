//! What an image holds, as coalesced runs of the guest's address space.

use crate::format::{GuestOffset, HostOffset};

use super::{Image, Result};

/// A run of guest addresses that are all of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it starts.
    pub guest: GuestOffset,
    /// Its length in bytes; never 0.
    pub len: u64,
    /// What it holds.
    pub kind: ExtentKind,
}

/// What an extent holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Data, contiguous in the file from `host` on.
    Data {
        /// Where the first byte lies.
        host: HostOffset,
    },
    /// Zeroes; `host` tells where space is reserved for it, if it is (contiguous over the extent).
    Zero {
        /// Where the reserved space starts.
        host: Option<HostOffset>,
    },
    /// Compressed data, one or more whole clusters.
    Compressed,
    /// Nothing: the backing file decides.
    Unallocated,
}

/// The extents of a guest range, in order, disjoint, and without gaps.
#[derive(Debug)]
pub struct Extents<'a> {
    _image: &'a Image,
}

impl Iterator for Extents<'_> {
    type Item = Result<Extent>;

    fn next(&mut self) -> Option<Self::Item> {
        todo!()
    }
}
