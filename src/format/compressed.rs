//! Descriptors of compressed clusters. Specification: "Compressed Clusters Descriptor".
//!
//! With x = 62 - (`cluster_bits` - 8): bits 0 to x-1 are the host offset, bits x to 61 the number of additional sectors.

use super::l2::OFLAG_COMPRESSED;
use super::limits::{MAX_CLUSTER_OFFSET, SECTOR_SIZE};
use super::{ClusterBits, FormatError, Geometry, HostCluster, HostOffset};

/// Where a compressed cluster's bytes lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CompressedDescriptor {
    /// The first byte; not aligned to anything.
    pub offset: HostOffset,
    /// How many 512-byte sectors are touched, the first one included; at least 1.
    pub sectors: u64,
}

impl CompressedDescriptor {
    /// The descriptor of `len` bytes at `offset`, or `None` where the geometry cannot tell it: no bytes, an offset past
    /// what the descriptor holds (512 TiB with 2 MiB clusters), or more than twice a cluster.
    #[must_use]
    pub fn new(offset: HostOffset, len: u64, cluster_bits: ClusterBits) -> Option<Self> {
        let last = offset.get().checked_add(len.checked_sub(1)?)?;
        let sectors = (last / SECTOR_SIZE).checked_sub(offset.get() / SECTOR_SIZE)?.checked_add(1)?;
        let fits = last <= MAX_CLUSTER_OFFSET && offset.get() <= max_offset(cluster_bits);
        (fits && sectors <= max_sectors(cluster_bits)).then_some(Self { offset, sectors })
    }

    /// Decodes an L2 entry's first word with the compressed flag set. Every value decodes;
    /// [`CompressedDescriptor::validate`] finds offsets that no image can have.
    #[must_use]
    pub fn decode(descriptor: u64, cluster_bits: ClusterBits) -> Self {
        let additional = (descriptor >> offset_width(cluster_bits)) & max_sectors(cluster_bits).saturating_sub(1);
        Self { offset: HostOffset::new(descriptor & max_offset(cluster_bits)), sectors: additional.saturating_add(1) }
    }

    /// Encodes into an L2 entry's first word, compressed flag included.
    ///
    /// # Panics
    /// Where the descriptor does not fit the geometry: [`CompressedDescriptor::new`] gives only those that do.
    #[must_use]
    pub fn encode(self, cluster_bits: ClusterBits) -> u64 {
        let Self { offset, sectors } = self;
        assert!(offset.get() <= max_offset(cluster_bits), "offset {offset} does not fit a compressed descriptor");
        assert!((1..=max_sectors(cluster_bits)).contains(&sectors), "{sectors} sectors do not fit a descriptor");
        OFLAG_COMPRESSED | sectors.saturating_sub(1) << offset_width(cluster_bits) | offset.get()
    }

    /// Refuses an offset with reserved bits (56 and above) set. `at` is where the entry stands, for the error.
    ///
    /// # Errors
    /// [`FormatError::Corrupt`].
    pub fn validate(self, at: HostOffset) -> Result<(), FormatError> {
        if self.offset.get() > MAX_CLUSTER_OFFSET {
            return Err(FormatError::corrupt(
                "L2 entry",
                at.get(),
                "compressed cluster offset",
                self.offset,
                "below 2^56",
            ));
        }
        Ok(())
    }

    /// How many bytes from `offset` may hold the compressed stream: `sectors * 512 - offset % 512`.
    #[must_use]
    pub const fn max_len(self) -> u64 {
        self.sectors.saturating_mul(SECTOR_SIZE).saturating_sub(self.offset.get() % SECTOR_SIZE)
    }

    /// The first byte behind the last sector; may lie past the end of the file.
    #[must_use]
    pub const fn end(self) -> HostOffset {
        self.offset.saturating_add(self.max_len())
    }

    /// The host clusters that are touched, in order; each is counted once for every compressed cluster that touches it.
    pub fn host_clusters(self, geometry: Geometry) -> impl DoubleEndedIterator<Item = HostCluster> + Clone + use<> {
        let first = geometry.host_cluster(self.offset).get();
        let end = geometry.clusters_for(self.end().get());
        (first..end).map(HostCluster::new)
    }
}

/// x of the specification: how many bits the offset has (49 to 61).
const fn offset_width(cluster_bits: ClusterBits) -> u32 {
    70_u32.saturating_sub(cluster_bits.get())
}

/// The largest offset that the descriptor's bits hold.
const fn max_offset(cluster_bits: ClusterBits) -> u64 {
    u64::MAX >> 64_u32.saturating_sub(offset_width(cluster_bits))
}

/// The largest number of sectors that the descriptor's bits hold: two clusters full.
const fn max_sectors(cluster_bits: ClusterBits) -> u64 {
    1 << cluster_bits.get().saturating_sub(8)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::l2::OFLAG_COPIED;
    use super::super::{RefcountOrder, limits};
    use super::*;

    fn bits(bits: u32) -> ClusterBits {
        ClusterBits::new(bits).expect("valid cluster bits")
    }

    fn geometry(cluster_bits: u32) -> Geometry {
        Geometry::new(bits(cluster_bits), RefcountOrder::default(), false).expect("valid geometry")
    }

    #[test]
    fn the_split_of_the_word_follows_the_cluster_size() {
        // 64 KiB clusters: x = 54.
        let word = OFLAG_COMPRESSED | 3 << 54 | 0x5_0123;
        let descriptor = CompressedDescriptor::decode(word, bits(16));
        assert_eq!(descriptor, CompressedDescriptor { offset: HostOffset::new(0x5_0123), sectors: 4 });
        assert_eq!(descriptor.max_len(), 4 * 512 - 0x123);
        assert_eq!(descriptor.end(), HostOffset::new(0x5_0800));
        // 512-byte clusters have one bit for sectors, 2 MiB clusters thirteen.
        assert_eq!(CompressedDescriptor::decode(1 << 61, bits(9)).sectors, 2);
        assert_eq!(CompressedDescriptor::decode(1 << 60, bits(9)).offset, HostOffset::new(1 << 60));
        assert_eq!(CompressedDescriptor::decode(0x1fff << 49, bits(21)).sectors, 8192);
        assert_eq!(CompressedDescriptor::decode(1 << 48, bits(21)).offset, HostOffset::new(1 << 48));
    }

    #[test]
    fn reserved_offset_bits_are_found() {
        let at = HostOffset::new(0x4_0008);
        let descriptor = CompressedDescriptor::decode(1 << 56 | 512, bits(9));
        let error = descriptor.validate(at).expect_err("bit 56 is reserved");
        assert!(matches!(error, FormatError::Corrupt { offset: 0x4_0008, .. }), "{error}");
        assert_eq!(CompressedDescriptor::decode(MAX_CLUSTER_OFFSET, bits(9)).validate(at), Ok(()));
    }

    #[test]
    fn a_stream_that_straddles_touches_both_clusters() {
        let clusters = |offset, sectors| {
            let descriptor = CompressedDescriptor { offset: HostOffset::new(offset), sectors };
            descriptor.host_clusters(geometry(16)).map(HostCluster::get).collect::<Vec<_>>()
        };
        assert_eq!(clusters(0x5_0000, 1), [5]);
        assert_eq!(clusters(0x5_fe00, 1), [5]);
        assert_eq!(clusters(0x5_ffff, 1), [5]);
        assert_eq!(clusters(0x5_ffff, 2), [5, 6]);
        assert_eq!(clusters(0x5_0001, 256), [5, 6]);
        assert_eq!(clusters(0x5_0200, 256), [5, 6, 7]);
    }

    #[test]
    fn only_what_fits_can_be_made() {
        let new =
            |offset, len, cluster_bits| CompressedDescriptor::new(HostOffset::new(offset), len, bits(cluster_bits));
        assert_eq!(new(0, 0, 16), None);
        assert_eq!(new(511, 1, 16).map(|d| d.sectors), Some(1));
        assert_eq!(new(511, 2, 16).map(|d| d.sectors), Some(2));
        // The longest stream that is worth storing, at the worst alignment, fits every cluster size.
        for cluster_bits in limits::MIN_CLUSTER_BITS..=limits::MAX_CLUSTER_BITS {
            assert!(new(511, (1 << cluster_bits) - 1, cluster_bits).is_some());
            assert_eq!(new(0, (2 << cluster_bits) + 1, cluster_bits), None);
        }
        assert_eq!(new(1 << 49, 1, 21), None);
        assert!(new((1 << 49) - 1, 1, 21).is_some());
        assert_eq!(new(1 << 56, 1, 9), None);
        assert_eq!(new(u64::MAX, 2, 9), None);
    }

    proptest! {
        #[test]
        fn every_word_decodes_and_encodes_back(word: u64, cluster_bits in 9_u32..=21) {
            let word = (word | OFLAG_COMPRESSED) & !OFLAG_COPIED;
            let descriptor = CompressedDescriptor::decode(word, bits(cluster_bits));
            prop_assert_eq!(descriptor.encode(bits(cluster_bits)), word);
            prop_assert!(descriptor.host_clusters(geometry(cluster_bits)).count() <= 3);
            prop_assert_eq!(descriptor.end().get() % SECTOR_SIZE, 0);
        }

        #[test]
        fn a_made_descriptor_covers_its_bytes(offset in 0_u64..1 << 49, len in 1_u64..4096, cluster_bits in 12_u32..=21) {
            let descriptor = CompressedDescriptor::new(HostOffset::new(offset), len, bits(cluster_bits)).expect("fits");
            prop_assert!(descriptor.max_len() >= len);
            prop_assert!(descriptor.max_len() < len + SECTOR_SIZE);
            prop_assert_eq!(descriptor.validate(HostOffset::ZERO), Ok(()));
            let word = descriptor.encode(bits(cluster_bits));
            prop_assert_eq!(CompressedDescriptor::decode(word, bits(cluster_bits)), descriptor);
        }

        #[test]
        fn no_fields_panic(offset: u64, sectors: u64, cluster_bits in 9_u32..=21) {
            let descriptor = CompressedDescriptor { offset: HostOffset::new(offset), sectors };
            let _ = (descriptor.max_len(), descriptor.end(), descriptor.validate(HostOffset::ZERO));
            let _ = descriptor.host_clusters(geometry(cluster_bits)).next_back();
        }
    }
}
