//! Reading the tables that nothing but inspection needs: internal snapshots and bitmaps. OWNER: create helper

use crate::format::{BitmapDirectoryEntry, Header, HeaderCluster, Limits, SnapshotEntry};
use crate::storage::Storage;

use super::Result;

/// Reads the snapshot table.
pub(crate) fn read_snapshots(_storage: &dyn Storage, _header: &Header, _limits: &Limits) -> Result<Vec<SnapshotEntry>> {
    todo!()
}

/// Reads the bitmap directory; empty where there is none.
pub(crate) fn read_bitmap_directory(
    _storage: &dyn Storage,
    _header: &HeaderCluster,
) -> Result<Vec<BitmapDirectoryEntry>> {
    todo!()
}
