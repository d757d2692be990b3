//! L1 table entries. Specification: "L1 table entry".

use byteorder::{BigEndian, ByteOrder};

use super::l2::{OFFSET_MASK, OFLAG_COPIED};
use super::{FormatError, Geometry, HostOffset};

/// The reserved bits of an L1 entry: 0 to 8 and 56 to 62.
pub const L1_RESERVED_MASK: u64 = 0x7f00_0000_0000_01ff;

/// One L1 entry as it lies in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct L1Entry(pub u64);

impl L1Entry {
    /// An entry for an L2 table.
    #[must_use]
    pub const fn new(l2_table: HostOffset, copied: bool) -> Self {
        Self(l2_table.get() & OFFSET_MASK | if copied { OFLAG_COPIED } else { 0 })
    }

    /// Where the L2 table lies, or `None` where there is none: all its clusters are unallocated.
    #[must_use]
    pub const fn l2_table(self) -> Option<HostOffset> {
        match self.0 & OFFSET_MASK {
            0 => None,
            offset => Some(HostOffset::new(offset)),
        }
    }

    /// Whether the entry says that the L2 table's refcount is exactly one.
    #[must_use]
    pub const fn copied(self) -> bool {
        self.0 & OFLAG_COPIED != 0
    }

    /// The reserved bits that are set; `check` reports them, nothing else looks.
    #[must_use]
    pub const fn reserved(self) -> u64 {
        self.0 & L1_RESERVED_MASK
    }

    /// [`L1Entry::l2_table`], checked to start a cluster. `at` is where the entry stands, for the error.
    ///
    /// # Errors
    /// [`FormatError::Corrupt`] where the table is not aligned to a cluster.
    pub fn checked_l2_table(self, geometry: Geometry, at: HostOffset) -> Result<Option<HostOffset>, FormatError> {
        match self.l2_table() {
            Some(table) if !geometry.is_aligned(table) => Err(FormatError::corrupt(
                "L1 entry",
                at.get(),
                "L2 table offset",
                table,
                "a multiple of the cluster size",
            )),
            table => Ok(table),
        }
    }
}

/// Decodes a run of L1 entries; bytes behind the last whole entry are ignored.
#[must_use]
pub fn decode_l1(bytes: &[u8]) -> Vec<L1Entry> {
    bytes.chunks_exact(8).map(|entry| L1Entry(BigEndian::read_u64(entry))).collect()
}

/// Encodes a run of L1 entries.
#[must_use]
pub fn encode_l1(entries: &[L1Entry]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.0.to_be_bytes()).collect()
}
