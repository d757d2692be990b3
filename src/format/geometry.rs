//! The numbers that every address computation of an image shares: cluster size, L2 entry size, refcount width.

use super::limits::{
    DEFAULT_CLUSTER_BITS, MAX_CLUSTER_BITS, MAX_REFCOUNT_ORDER, MIN_CLUSTER_BITS, MIN_EXTENDED_L2_CLUSTER_BITS,
};
use super::{GuestCluster, GuestOffset, HostCluster, HostOffset};

/// log2 of the cluster size in bytes, known to be within [`MIN_CLUSTER_BITS`]`..=`[`MAX_CLUSTER_BITS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterBits(u32);

impl ClusterBits {
    /// The checked value, or `None` outside of what QEMU accepts (9 to 21).
    #[must_use]
    pub const fn new(bits: u32) -> Option<Self> {
        if bits >= MIN_CLUSTER_BITS && bits <= MAX_CLUSTER_BITS { Some(Self(bits)) } else { None }
    }

    /// The checked value for a cluster size in bytes, or `None` if that is not a power of two within the limits.
    #[must_use]
    pub const fn from_size(size: u64) -> Option<Self> {
        if size.is_power_of_two() { Self::new(size.trailing_zeros()) } else { None }
    }

    /// The number of bits.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl Default for ClusterBits {
    fn default() -> Self {
        Self(DEFAULT_CLUSTER_BITS)
    }
}

/// log2 of the refcount width in bits, known to be within `0..=`[`MAX_REFCOUNT_ORDER`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RefcountOrder(u32);

impl RefcountOrder {
    /// The checked value, or `None` above 6 (64-bit refcounts).
    #[must_use]
    pub const fn new(order: u32) -> Option<Self> {
        if order <= MAX_REFCOUNT_ORDER { Some(Self(order)) } else { None }
    }

    /// The checked value for a width in bits (1, 2, 4, 8, 16, 32 or 64).
    #[must_use]
    pub const fn from_bits(bits: u32) -> Option<Self> {
        if bits.is_power_of_two() { Self::new(bits.trailing_zeros()) } else { None }
    }

    /// The order: log2 of the width.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The width in bits.
    #[must_use]
    pub const fn bits(self) -> u32 {
        1 << self.0
    }

    /// The largest refcount that this width can hold.
    #[must_use]
    pub const fn max(self) -> u64 {
        u64::MAX >> 64_u32.saturating_sub(self.bits())
    }
}

impl Default for RefcountOrder {
    /// 16-bit refcounts, the only width of version 2.
    fn default() -> Self {
        Self(4)
    }
}

/// The geometry of one image: all shifts and table sizes live here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Geometry {
    cluster_bits: ClusterBits,
    refcount_order: RefcountOrder,
    extended_l2: bool,
}

impl Geometry {
    /// The geometry of an image, or `None` where extended L2 is asked for with clusters under 16 KiB.
    #[must_use]
    pub const fn new(cluster_bits: ClusterBits, refcount_order: RefcountOrder, extended_l2: bool) -> Option<Self> {
        if extended_l2 && cluster_bits.0 < MIN_EXTENDED_L2_CLUSTER_BITS {
            return None;
        }
        Some(Self { cluster_bits, refcount_order, extended_l2 })
    }

    /// log2 of the cluster size.
    #[must_use]
    pub const fn cluster_bits(self) -> ClusterBits {
        self.cluster_bits
    }

    /// The cluster size in bytes.
    #[must_use]
    pub const fn cluster_size(self) -> u64 {
        1 << self.cluster_bits.0
    }

    /// The cluster size as the length of a buffer.
    #[must_use]
    pub const fn cluster_len(self) -> usize {
        1 << self.cluster_bits.0
    }

    /// Whether L2 entries are 16 bytes with a subcluster bitmap.
    #[must_use]
    pub const fn extended_l2(self) -> bool {
        self.extended_l2
    }

    /// The width of refcounts.
    #[must_use]
    pub const fn refcount_order(self) -> RefcountOrder {
        self.refcount_order
    }

    /// How many subclusters a cluster has: 32 with extended L2, else 1.
    #[must_use]
    pub const fn subclusters(self) -> u32 {
        if self.extended_l2 { 32 } else { 1 }
    }

    /// log2 of the subcluster size; the cluster's own where there are no subclusters.
    #[must_use]
    pub const fn subcluster_bits(self) -> u32 {
        if self.extended_l2 { self.cluster_bits.0.saturating_sub(5) } else { self.cluster_bits.0 }
    }

    /// The subcluster size in bytes; the cluster's own where there are no subclusters.
    #[must_use]
    pub const fn subcluster_size(self) -> u64 {
        1 << self.subcluster_bits()
    }

    /// log2 of the number of entries in an L2 table.
    #[must_use]
    pub const fn l2_bits(self) -> u32 {
        self.cluster_bits.0.saturating_sub(if self.extended_l2 { 4 } else { 3 })
    }

    /// The number of entries in an L2 table.
    #[must_use]
    pub const fn l2_entries(self) -> u64 {
        1 << self.l2_bits()
    }

    /// The size of an L2 entry in bytes: 16 with extended L2, else 8.
    #[must_use]
    pub const fn l2_entry_len(self) -> usize {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// log2 of the guest bytes that one L1 entry stands for.
    #[must_use]
    pub const fn l1_entry_bits(self) -> u32 {
        self.cluster_bits.0.saturating_add(self.l2_bits())
    }

    /// The guest bytes that one L1 entry stands for.
    #[must_use]
    pub const fn l1_entry_span(self) -> u64 {
        1 << self.l1_entry_bits()
    }

    /// The number of L1 entries that a virtual disk of `size` bytes needs.
    #[must_use]
    pub const fn l1_entries_for(self, size: u64) -> u64 {
        size.div_ceil(self.l1_entry_span())
    }

    /// The number of clusters that `bytes` bytes fill, the last one perhaps in part.
    #[must_use]
    pub const fn clusters_for(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }

    /// log2 of the number of refcounts in one refcount block.
    #[must_use]
    pub const fn refcount_block_bits(self) -> u32 {
        self.cluster_bits.0.saturating_add(3).saturating_sub(self.refcount_order.0)
    }

    /// The number of refcounts in one refcount block.
    #[must_use]
    pub const fn refcount_block_entries(self) -> u64 {
        1 << self.refcount_block_bits()
    }

    /// The index into the refcount table for a host cluster.
    #[must_use]
    pub const fn refcount_table_index(self, cluster: HostCluster) -> u64 {
        cluster.get() >> self.refcount_block_bits()
    }

    /// The index into its refcount block for a host cluster.
    #[must_use]
    #[expect(
        clippy::as_conversions,
        clippy::cast_possible_truncation,
        reason = "masked below a cluster's size in bits"
    )]
    #[expect(clippy::arithmetic_side_effects, reason = "a power of two less one")]
    pub const fn refcount_block_index(self, cluster: HostCluster) -> usize {
        (cluster.get() & (self.refcount_block_entries() - 1)) as usize
    }

    /// The index into the L1 table for a guest address.
    #[must_use]
    pub const fn l1_index(self, offset: GuestOffset) -> u64 {
        offset.get() >> self.l1_entry_bits()
    }

    /// The index into its L2 table for a guest address.
    #[must_use]
    #[expect(clippy::as_conversions, clippy::cast_possible_truncation, reason = "masked below the table's size")]
    #[expect(clippy::arithmetic_side_effects, reason = "a power of two less one")]
    pub const fn l2_index(self, offset: GuestOffset) -> usize {
        ((offset.get() >> self.cluster_bits.0) & (self.l2_entries() - 1)) as usize
    }

    /// The index of a guest address's subcluster within its cluster; 0 where there are no subclusters.
    #[must_use]
    #[expect(clippy::as_conversions, clippy::cast_possible_truncation, reason = "at most 31")]
    pub const fn subcluster_index(self, offset: GuestOffset) -> u32 {
        (self.offset_in_cluster(offset) >> self.subcluster_bits()) as u32
    }

    /// The distance of a guest address from the start of its cluster.
    #[must_use]
    #[expect(clippy::arithmetic_side_effects, reason = "a power of two less one")]
    pub const fn offset_in_cluster(self, offset: GuestOffset) -> u64 {
        offset.get() & (self.cluster_size() - 1)
    }

    /// The cluster that a guest address lies in.
    #[must_use]
    pub const fn guest_cluster(self, offset: GuestOffset) -> GuestCluster {
        GuestCluster::new(offset.get() >> self.cluster_bits.0)
    }

    /// The cluster that a host address lies in.
    #[must_use]
    pub const fn host_cluster(self, offset: HostOffset) -> HostCluster {
        HostCluster::new(offset.get() >> self.cluster_bits.0)
    }

    /// The first byte of a guest cluster, or `None` past `u64::MAX`.
    #[must_use]
    pub const fn guest_offset(self, cluster: GuestCluster) -> Option<GuestOffset> {
        match cluster.get().checked_mul(self.cluster_size()) {
            Some(offset) => Some(GuestOffset::new(offset)),
            None => None,
        }
    }

    /// The first byte of a host cluster, or `None` past `u64::MAX`.
    #[must_use]
    pub const fn host_offset(self, cluster: HostCluster) -> Option<HostOffset> {
        match cluster.get().checked_mul(self.cluster_size()) {
            Some(offset) => Some(HostOffset::new(offset)),
            None => None,
        }
    }

    /// Whether a host address is the start of a cluster.
    #[must_use]
    pub const fn is_aligned(self, offset: HostOffset) -> bool {
        offset.get().trailing_zeros() >= self.cluster_bits.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn geometry(cluster_bits: u32, order: u32, extended_l2: bool) -> Option<Geometry> {
        Geometry::new(ClusterBits::new(cluster_bits)?, RefcountOrder::new(order)?, extended_l2)
    }

    fn geometries() -> impl Strategy<Value = Geometry> {
        (9_u32..=21, 0_u32..=6, any::<bool>())
            .prop_filter_map("extended L2 needs 16 KiB", |(bits, order, extended)| geometry(bits, order, extended))
    }

    #[test]
    fn only_what_qemu_accepts_is_a_geometry() {
        assert_eq!(ClusterBits::new(8), None);
        assert_eq!(ClusterBits::new(22), None);
        assert_eq!(ClusterBits::from_size(0), None);
        assert_eq!(ClusterBits::from_size(3 << 15), None);
        assert_eq!(ClusterBits::from_size(1 << 63), None);
        assert_eq!(ClusterBits::from_size(65_536), Some(ClusterBits::default()));
        assert_eq!(RefcountOrder::new(7), None);
        assert_eq!(RefcountOrder::from_bits(0), None);
        assert_eq!(RefcountOrder::from_bits(12), None);
        assert_eq!(RefcountOrder::from_bits(16), Some(RefcountOrder::default()));
        assert!(geometry(13, 4, true).is_none());
        assert!(geometry(14, 4, true).is_some());
    }

    #[test]
    fn refcount_widths_hold_what_they_say() {
        let max = |order| RefcountOrder::new(order).expect("valid order").max();
        let expected = [1, 3, 15, 255, 65_535, u64::from(u32::MAX), u64::MAX];
        for (order, expected) in (0..).zip(expected) {
            assert_eq!(max(order), expected);
        }
    }

    #[test]
    fn the_default_geometry_has_the_numbers_of_the_specification() {
        let standard = geometry(16, 4, false).expect("valid geometry");
        assert_eq!((standard.l2_entries(), standard.l1_entry_span()), (8192, 512 << 20));
        assert_eq!((standard.refcount_block_entries(), standard.subclusters()), (32_768, 1));
        assert_eq!((standard.subcluster_size(), standard.l2_entry_len()), (65_536, 8));
        let extended = geometry(16, 4, true).expect("valid geometry");
        assert_eq!((extended.l2_entries(), extended.l1_entry_span()), (4096, 256 << 20));
        assert_eq!((extended.subclusters(), extended.subcluster_size(), extended.l2_entry_len()), (32, 2048, 16));
        assert_eq!(standard.l1_entries_for(0), 0);
        assert_eq!(standard.l1_entries_for(512 << 20), 1);
        assert_eq!(standard.l1_entries_for((512 << 20) + 1), 2);
        assert_eq!(standard.clusters_for(65_537), 2);
    }

    proptest! {
        #[test]
        fn indices_take_a_guest_address_apart(geometry in geometries(), offset: u64) {
            let at = GuestOffset::new(offset);
            let index = u64::try_from(geometry.l2_index(at)).expect("fits");
            prop_assert!(index < geometry.l2_entries());
            let (l1, within) = (u128::from(geometry.l1_index(at)), geometry.offset_in_cluster(at));
            let whole = l1 * u128::from(geometry.l1_entry_span())
                + u128::from(index) * u128::from(geometry.cluster_size())
                + u128::from(within);
            prop_assert_eq!(whole, u128::from(offset));
            prop_assert!(within < geometry.cluster_size());
            let sub = u64::from(geometry.subcluster_index(at));
            prop_assert!(sub < u64::from(geometry.subclusters()));
            prop_assert_eq!(sub, within / geometry.subcluster_size());
            let start = geometry.guest_offset(geometry.guest_cluster(at)).expect("not past the address");
            prop_assert_eq!(at.distance_from(start), within);
        }

        #[test]
        fn indices_take_a_host_cluster_apart(geometry in geometries(), cluster: u64) {
            let at = HostCluster::new(cluster);
            let index = u64::try_from(geometry.refcount_block_index(at)).expect("fits");
            prop_assert!(index < geometry.refcount_block_entries());
            let whole = u128::from(geometry.refcount_table_index(at)) * u128::from(geometry.refcount_block_entries());
            prop_assert_eq!(whole + u128::from(index), u128::from(cluster));
            match geometry.host_offset(at) {
                Some(offset) => {
                    prop_assert!(geometry.is_aligned(offset));
                    prop_assert_eq!(geometry.host_cluster(offset), at);
                }
                None => prop_assert!(u128::from(cluster) * u128::from(geometry.cluster_size()) > u128::from(u64::MAX)),
            }
        }

        #[test]
        fn tables_are_one_cluster(geometry in geometries()) {
            let len = u64::try_from(geometry.l2_entry_len()).expect("fits");
            prop_assert_eq!(geometry.l2_entries() * len, geometry.cluster_size());
            let bits = u64::from(geometry.refcount_order().bits());
            prop_assert_eq!(geometry.refcount_block_entries() * bits, geometry.cluster_size() * 8);
            prop_assert_eq!(u64::from(geometry.subclusters()) * geometry.subcluster_size(), geometry.cluster_size());
            prop_assert_eq!(u64::try_from(geometry.cluster_len()), Ok(geometry.cluster_size()));
            prop_assert!(geometry.subcluster_size() >= 512);
        }

        #[test]
        fn sizes_round_up(geometry in geometries(), size: u64) {
            let (entries, clusters) = (geometry.l1_entries_for(size), geometry.clusters_for(size));
            let covers = |count: u64, unit: u64| {
                let (size, end) = (u128::from(size), u128::from(count) * u128::from(unit));
                end >= size && end < size + u128::from(unit)
            };
            prop_assert!(covers(entries, geometry.l1_entry_span()));
            prop_assert!(covers(clusters, geometry.cluster_size()));
        }
    }
}
