//! The refcount table and refcount blocks of all widths. Specification: "Refcount table entry", "Host cluster management".

use super::{FormatError, Geometry, HostOffset};

/// The reserved bits of a refcount table entry: 0 to 8.
pub const REFTABLE_RESERVED_MASK: u64 = 0x1ff;

/// One refcount table entry as it lies in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct RefcountTableEntry(pub u64);

impl RefcountTableEntry {
    /// Where the refcount block lies, or `None`: all its clusters are free. Reserved bits are masked off.
    #[must_use]
    pub const fn block(self) -> Option<HostOffset> {
        match self.0 & !REFTABLE_RESERVED_MASK {
            0 => None,
            offset => Some(HostOffset::new(offset)),
        }
    }
}

/// One refcount block as it lies in the file. Entry 0 of a byte is its least significant bits for widths below 8.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RefcountBlock {
    _bytes: Box<[u8]>,
    _geometry: Geometry,
}

impl RefcountBlock {
    /// A block in which everything is free.
    #[must_use]
    pub fn empty(_geometry: Geometry) -> Self {
        todo!()
    }

    /// The block in these bytes, one cluster long.
    ///
    /// # Errors
    /// [`FormatError::Corrupt`] where `bytes` is not one cluster long.
    pub fn decode(_bytes: Box<[u8]>, _geometry: Geometry) -> Result<Self, FormatError> {
        todo!()
    }

    /// The bytes as they go to the file.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        todo!()
    }

    /// The number of refcounts.
    #[must_use]
    pub fn len(&self) -> usize {
        todo!()
    }

    /// Whether every refcount is 0.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        todo!()
    }

    /// The refcount at `index`; 0 past the end.
    #[must_use]
    pub fn get(&self, _index: usize) -> u64 {
        todo!()
    }

    /// Replaces the refcount at `index`.
    ///
    /// # Panics
    /// Where `index` is past the end or `value` does not fit the width: callers have checked.
    pub fn set(&mut self, _index: usize, _value: u64) {
        todo!()
    }

    /// The first index at or behind `from` whose refcount is 0, found by whole words.
    #[must_use]
    pub fn next_free(&self, _from: usize) -> Option<usize> {
        todo!()
    }

    /// The first index at or behind `from` whose refcount is not 0, found by whole words.
    #[must_use]
    pub fn next_used(&self, _from: usize) -> Option<usize> {
        todo!()
    }
}
