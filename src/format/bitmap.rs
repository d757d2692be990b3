//! Bitmap directory and tables. Specification: "Bitmaps extension", "Bitmap directory", "Bitmap table".

use super::{BitmapsExtension, FormatError, HostOffset};

/// One entry of the bitmap directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapDirectoryEntry {
    /// Where the bitmap table starts.
    pub bitmap_table_offset: HostOffset,
    /// The number of entries in it.
    pub bitmap_table_size: u32,
    /// Bit 0 `in_use`, bit 1 `auto`, bit 2 `extra_data_compatible`.
    pub flags: u32,
    /// 1: a dirty tracking bitmap.
    pub kind: u8,
    /// log2 of the guest bytes that one bit stands for.
    pub granularity_bits: u8,
    /// The name, as bytes.
    pub name: Vec<u8>,
    /// Extra data, kept as it is.
    pub extra_data: Vec<u8>,
}

impl BitmapDirectoryEntry {
    /// Flag bit 0: the bitmap was not saved correctly and must not be used.
    pub const IN_USE: u32 = 1;
    /// Flag bit 1: every write must be recorded.
    pub const AUTO: u32 = 2;
    /// Flag bit 2: the bitmap may be used in spite of unknown extra data.
    pub const EXTRA_DATA_COMPATIBLE: u32 = 4;
}

/// Decodes the directory; `bytes` is exactly `bitmap_directory_size` long.
///
/// # Errors
/// See format.md 1.10.
pub fn decode_bitmap_directory(
    _bytes: &[u8],
    _extension: &BitmapsExtension,
) -> Result<Vec<BitmapDirectoryEntry>, FormatError> {
    todo!()
}

/// Encodes the directory.
#[must_use]
pub fn encode_bitmap_directory(_entries: &[BitmapDirectoryEntry]) -> Vec<u8> {
    todo!()
}

/// One entry of a bitmap table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapTableEntry {
    /// The bits lie in this cluster.
    Cluster(HostOffset),
    /// All bits are 0.
    AllZeroes,
    /// All bits are 1.
    AllOnes,
}

impl BitmapTableEntry {
    /// Decodes one entry; `at` is where it stands.
    ///
    /// # Errors
    /// [`FormatError::Corrupt`] for reserved bits and unaligned clusters.
    pub fn decode(_entry: u64, _cluster_bits: super::ClusterBits, _at: HostOffset) -> Result<Self, FormatError> {
        todo!()
    }

    /// Encodes one entry.
    #[must_use]
    pub fn encode(self) -> u64 {
        todo!()
    }
}
