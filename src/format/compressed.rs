//! Descriptors of compressed clusters. Specification: "Compressed Clusters Descriptor".

use super::{ClusterBits, HostOffset};

/// Where a compressed cluster's bytes lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CompressedDescriptor {
    /// The first byte; not aligned to anything.
    pub offset: HostOffset,
    /// How many 512-byte sectors are touched, the first one included; at least 1.
    pub sectors: u64,
}

impl CompressedDescriptor {
    /// Decodes an L2 entry's first word with the compressed flag set. Every value decodes.
    #[must_use]
    pub fn decode(_descriptor: u64, _cluster_bits: ClusterBits) -> Self {
        todo!()
    }

    /// Encodes into an L2 entry's first word, compressed flag included.
    ///
    /// # Panics
    /// Where the descriptor does not fit the geometry: the allocator gives only offsets that do.
    #[must_use]
    pub fn encode(self, _cluster_bits: ClusterBits) -> u64 {
        todo!()
    }

    /// How many bytes from `offset` may hold the compressed stream: `sectors * 512 - offset % 512`.
    #[must_use]
    pub fn max_len(self) -> u64 {
        todo!()
    }
}
