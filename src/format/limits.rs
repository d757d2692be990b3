//! Every limit of the format, and of QEMU where it is stricter, by name.
//!
//! A number in a file is compared with one of these (or with what the caller set in [`Limits`]) before anything is
//! allocated or multiplied by it.

/// The first four bytes of every qcow2 file: `QFI\xfb`.
pub const MAGIC: u32 = 0x5146_49fb;

/// Smallest log2 of a cluster size (512 bytes).
pub const MIN_CLUSTER_BITS: u32 = 9;
/// Largest log2 of a cluster size that QEMU opens (2 MiB).
pub const MAX_CLUSTER_BITS: u32 = 21;
/// log2 of the cluster size that QEMU gives a new image (64 KiB).
pub const DEFAULT_CLUSTER_BITS: u32 = 16;
/// The cluster size in bytes that QEMU gives a new image.
pub const DEFAULT_CLUSTER_SIZE: u64 = 1 << DEFAULT_CLUSTER_BITS;
/// Smallest log2 of a cluster size with extended L2 entries (16 KiB, so that a subcluster has 512 bytes).
pub const MIN_EXTENDED_L2_CLUSTER_BITS: u32 = 14;

/// Largest refcount order: 64-bit refcounts.
pub const MAX_REFCOUNT_ORDER: u32 = 6;
/// Largest refcount width in bits.
pub const MAX_REFCOUNT_BITS: u32 = 64;
/// The refcount order of every version 2 image and of new images: 16-bit refcounts.
pub const DEFAULT_REFCOUNT_ORDER: u32 = 4;

/// Virtual sizes are counted in units of this many bytes; what is left over is cut off when an image is opened.
pub const SECTOR_SIZE: u64 = 512;
/// Largest file offset of anything, and largest virtual size, in bytes: `INT64_MAX`.
pub const MAX_OFFSET: u64 = i64::MAX.unsigned_abs();
/// Largest offset that a standard L2 entry, L1 entry or refcount table entry can hold: 2^56 - 1.
pub const MAX_CLUSTER_OFFSET: u64 = (1 << 56) - 1;

/// Largest L1 table in bytes (32 MiB), the active one's and a snapshot's.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest L1 table in entries.
pub const MAX_L1_ENTRIES: u64 = MAX_L1_BYTES / 8;
/// Largest index of the first L1 entry that holds VM state, that is: L1 entries that the virtual size needs (`INT_MAX`).
pub const MAX_VM_STATE_INDEX: u64 = 0x7fff_ffff;
/// Largest refcount table in bytes (8 MiB), when it is opened and when it grows.
pub const MAX_REFTABLE_BYTES: u64 = 8 << 20;
/// Largest number of host clusters that a check can count (`INT_MAX`).
pub const MAX_CHECK_CLUSTERS: u64 = 0x7fff_ffff;

/// The length of a version 2 header in bytes; there is no other.
pub const V2_HEADER_LENGTH: u32 = 72;
/// The shortest version 3 header in bytes.
pub const MIN_V3_HEADER_LENGTH: u32 = 104;
/// The length in bytes of the version 3 header that QEMU writes: the compression type and its padding included.
pub const DEFAULT_V3_HEADER_LENGTH: u32 = 112;
/// Longest name of a backing file in bytes.
pub const MAX_BACKING_FILE_SIZE: u64 = 1023;
/// Longest backing format in bytes.
pub const MAX_BACKING_FORMAT_SIZE: u64 = 15;
/// QEMU writes a feature name table only where clusters are larger than this, so that small ones keep room for a name.
pub const FEATURE_TABLE_MIN_CLUSTER: u64 = 4096;

/// Largest number of internal snapshots.
pub const MAX_SNAPSHOTS: u32 = 65_536;
/// Largest snapshot table in bytes (64 MiB).
pub const MAX_SNAPSHOTS_SIZE: u64 = 64 << 20;
/// Largest extra data of one snapshot in bytes.
pub const MAX_SNAPSHOT_EXTRA_DATA: u32 = 1024;
/// The part of a snapshot table entry that every entry has, in bytes.
pub const SNAPSHOT_HEADER_SIZE: u64 = 40;
/// The extra data that every snapshot of a version 3 image should have, in bytes.
pub const MIN_V3_SNAPSHOT_EXTRA_DATA: u32 = 16;

/// Largest number of bitmaps.
pub const MAX_BITMAPS: u32 = 65_535;
/// The part of a bitmap directory entry that every entry has, in bytes.
pub const BITMAP_DIRECTORY_ENTRY_SIZE: u64 = 24;
/// Largest bitmap directory in bytes: [`MAX_BITMAPS`] entries of 1 KiB.
pub const MAX_BITMAP_DIRECTORY_SIZE: u64 = 67_107_840;
/// Largest bitmap table in entries.
pub const MAX_BITMAP_TABLE_ENTRIES: u32 = 0x0800_0000;
/// Largest bitmap in bytes of bits (512 MiB).
pub const MAX_BITMAP_PHYSICAL_SIZE: u64 = 512 << 20;
/// Smallest log2 of the guest bytes that one bit of a bitmap stands for.
pub const MIN_BITMAP_GRANULARITY_BITS: u8 = 9;
/// Largest log2 of the guest bytes that one bit of a bitmap stands for.
pub const MAX_BITMAP_GRANULARITY_BITS: u8 = 31;
/// Longest name of a bitmap in bytes.
pub const MAX_BITMAP_NAME_SIZE: u16 = 1023;

/// Largest number of clusters that one request encrypts or decrypts.
pub const MAX_CRYPT_CLUSTERS: u64 = 32;
/// Largest number of requests that QEMU works on side by side for one request of the guest.
pub const MAX_WORKERS: u32 = 8;
/// Largest number of threads that QEMU compresses or encrypts with.
pub const MAX_THREADS: u32 = 4;

/// Largest L2 cache that QEMU takes by itself, in bytes (32 MiB).
pub const DEFAULT_L2_CACHE_MAX_SIZE: u64 = 32 << 20;
/// Smallest L2 cache in tables.
pub const MIN_L2_CACHE_ENTRIES: u64 = 2;
/// Smallest refcount cache in blocks.
pub const MIN_REFCOUNT_CACHE_ENTRIES: u64 = 4;

/// How much `commit` and `stream` copy at once, in bytes (512 KiB).
pub const COMMIT_CHUNK: u64 = 512 << 10;
/// Smallest granularity of `mirror` in bytes; the target's cluster size is taken within the two.
pub const MIN_MIRROR_GRANULARITY: u64 = 4 << 10;
/// Largest granularity of `mirror` in bytes.
pub const MAX_MIRROR_GRANULARITY: u64 = 64 << 10;

/// What the caller lets an image claim. The default is what QEMU enforces.
///
/// ```
/// use qcow2_chain::format::Limits;
///
/// let limits = Limits::default().with_max_virtual_size(1 << 40).with_cache_bytes(4 << 20);
/// assert_eq!(limits.max_virtual_size, 1 << 40);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Largest active or snapshot L1 table in bytes (32 MiB).
    pub max_l1_bytes: u64,
    /// Largest refcount table in bytes (8 MiB).
    pub max_reftable_bytes: u64,
    /// Largest number of internal snapshots (65,536).
    pub max_snapshots: u32,
    /// Largest snapshot table in bytes (64 MiB).
    pub max_snapshot_table_bytes: u64,
    /// Largest number of bitmaps (65,535).
    pub max_bitmaps: u32,
    /// Largest bitmap directory in bytes (64 MiB less 1 KiB).
    pub max_bitmap_directory_bytes: u64,
    /// Largest virtual size in bytes (none by default).
    pub max_virtual_size: u64,
    /// Memory for cached metadata of one image, in bytes.
    pub cache_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_l1_bytes: MAX_L1_BYTES,
            max_reftable_bytes: MAX_REFTABLE_BYTES,
            max_snapshots: MAX_SNAPSHOTS,
            max_snapshot_table_bytes: MAX_SNAPSHOTS_SIZE,
            max_bitmaps: MAX_BITMAPS,
            max_bitmap_directory_bytes: MAX_BITMAP_DIRECTORY_SIZE,
            max_virtual_size: u64::MAX,
            cache_bytes: DEFAULT_L2_CACHE_MAX_SIZE,
        }
    }
}

/// Defines one setter for each field.
macro_rules! setters {
    ($($(#[$doc:meta])* $name:ident: $field:ident, $kind:ty;)*) => {
        impl Limits {
            $(
                $(#[$doc])*
                #[must_use]
                pub const fn $name(mut self, $field: $kind) -> Self {
                    self.$field = $field;
                    self
                }
            )*
        }
    };
}

setters! {
    /// The same with another largest L1 table, in bytes.
    with_max_l1_bytes: max_l1_bytes, u64;
    /// The same with another largest refcount table, in bytes.
    with_max_reftable_bytes: max_reftable_bytes, u64;
    /// The same with another largest number of internal snapshots.
    with_max_snapshots: max_snapshots, u32;
    /// The same with another largest snapshot table, in bytes.
    with_max_snapshot_table_bytes: max_snapshot_table_bytes, u64;
    /// The same with another largest number of bitmaps.
    with_max_bitmaps: max_bitmaps, u32;
    /// The same with another largest bitmap directory, in bytes.
    with_max_bitmap_directory_bytes: max_bitmap_directory_bytes, u64;
    /// The same with another largest virtual size, in bytes.
    with_max_virtual_size: max_virtual_size, u64;
    /// The same with other memory for cached metadata, in bytes.
    with_cache_bytes: cache_bytes, u64;
}
