//! Every limit of the format, and of QEMU where it is stricter, by name.

/// Smallest log2 of a cluster size (512 bytes).
pub const MIN_CLUSTER_BITS: u32 = 9;
/// Largest log2 of a cluster size that QEMU opens (2 MiB).
pub const MAX_CLUSTER_BITS: u32 = 21;
/// log2 of the cluster size that QEMU gives a new image (64 KiB).
pub const DEFAULT_CLUSTER_BITS: u32 = 16;
/// Smallest log2 of a cluster size with extended L2 entries (16 KiB, so that a subcluster has 512 bytes).
pub const MIN_EXTENDED_L2_CLUSTER_BITS: u32 = 14;
/// Largest refcount order: 64-bit refcounts.
pub const MAX_REFCOUNT_ORDER: u32 = 6;

/// What the caller lets an image claim. The default is what QEMU enforces.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Largest active or snapshot L1 table in bytes (32 MiB).
    pub max_l1_bytes: u64,
    /// Largest refcount table in bytes (8 MiB).
    pub max_reftable_bytes: u64,
    /// Largest number of internal snapshots (65,536).
    pub max_snapshots: u32,
    /// Largest virtual size in bytes (none by default).
    pub max_virtual_size: u64,
    /// Memory for cached metadata of one image, in bytes.
    pub cache_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_l1_bytes: 32 << 20,
            max_reftable_bytes: 8 << 20,
            max_snapshots: 65_536,
            max_virtual_size: u64::MAX,
            cache_bytes: 32 << 20,
        }
    }
}
