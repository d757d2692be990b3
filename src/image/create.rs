//! Creating an image. OWNER: create helper

use crate::format::{ClusterBits, CompressionType, RefcountOrder, Version};
use crate::storage::Storage;

use super::Result;

/// What to allocate before anything is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// All L2 tables and refcounts, without writing the data clusters.
    Metadata,
    /// As `Metadata`, and blocks of the file reserved.
    Falloc,
    /// As `Metadata`, and the data clusters written with zeroes.
    Full,
}

/// What a new image looks like.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct CreateOptions {
    /// The virtual size in bytes, a multiple of 512.
    pub size: u64,
    /// The version (`compat`).
    pub version: Version,
    /// The cluster size.
    pub cluster_bits: ClusterBits,
    /// The refcount width.
    pub refcount_order: RefcountOrder,
    /// Whether L2 entries are extended.
    pub extended_l2: bool,
    /// Whether refcount updates may be postponed.
    pub lazy_refcounts: bool,
    /// How clusters that somebody compresses later are compressed.
    pub compression_type: CompressionType,
    /// The backing file's name, as it is written to the header, and its format.
    pub backing: Option<(Vec<u8>, Vec<u8>)>,
    /// What to allocate.
    pub preallocation: Preallocation,
}

/// Writes a new image to an empty storage, durable on return.
pub(super) fn lay_out(_storage: &dyn Storage, _options: &CreateOptions) -> Result<()> {
    todo!()
}
