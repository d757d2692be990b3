//! The table of internal snapshots. Specification: "Snapshots".

use super::{FormatError, HostOffset, Limits};

/// One entry of the snapshot table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotEntry {
    /// Where the snapshot's L1 table starts.
    pub l1_table_offset: HostOffset,
    /// The number of entries in it.
    pub l1_size: u32,
    /// The unique ID, as bytes.
    pub id: Vec<u8>,
    /// The name, as bytes.
    pub name: Vec<u8>,
    /// Seconds since the epoch.
    pub date_sec: u32,
    /// Nanoseconds of the second.
    pub date_nsec: u32,
    /// Guest clock in nanoseconds.
    pub vm_clock_nsec: u64,
    /// The 32-bit VM state size in bytes.
    pub vm_state_size: u32,
    /// The extra data: 64-bit VM state size, virtual disk size, icount, and what follows, kept as it is.
    pub extra_data: Vec<u8>,
}

impl SnapshotEntry {
    /// The size of the VM state in bytes: the 64-bit one where there is one.
    #[must_use]
    pub fn vm_state(&self) -> u64 {
        todo!()
    }

    /// The virtual disk size at the time of the snapshot, where it is told.
    #[must_use]
    pub fn disk_size(&self) -> Option<u64> {
        todo!()
    }

    /// The instruction count, where it is told.
    #[must_use]
    pub fn icount(&self) -> Option<u64> {
        todo!()
    }
}

/// Decodes `count` entries from the bytes that start at the table's offset; tells how many bytes they fill.
///
/// `bytes` may hold more than the table, and is at most [`super::limits::MAX_SNAPSHOTS_SIZE`] long.
///
/// # Errors
/// [`FormatError::Corrupt`] where an entry runs past `bytes`, [`FormatError::Limit`] for too many entries or extra data.
pub fn decode_snapshots(
    _bytes: &[u8],
    _count: u32,
    _table: HostOffset,
    _limits: &Limits,
) -> Result<(Vec<SnapshotEntry>, usize), FormatError> {
    todo!()
}

/// Encodes the table, entries padded to 8 bytes.
#[must_use]
pub fn encode_snapshots(_entries: &[SnapshotEntry]) -> Vec<u8> {
    todo!()
}
