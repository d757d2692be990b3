//! L2 tables, standard and extended: which host cluster holds a guest cluster.
//!
//! Both kinds decode into one [`L2Entry`]. A standard cluster is a cluster of one subcluster, so that all that reads and
//! writes mappings is written once. Specification: "Cluster mapping", "Standard Cluster Descriptor", "Extended L2
//! Entries".

use byteorder::{BigEndian, ByteOrder};

use super::limits::MAX_CLUSTER_OFFSET;
use super::{CompressedDescriptor, FormatError, Geometry, HostOffset, Version};

/// Bit 63 of an L1 or L2 entry: the cluster's refcount is exactly one, it may be written in place.
pub const OFLAG_COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry: the cluster is compressed.
pub const OFLAG_COMPRESSED: u64 = 1 << 62;
/// Bit 0 of a standard L2 entry (version 3): the cluster reads as zeroes.
pub const OFLAG_ZERO: u64 = 1;
/// Bits 9 to 55 of an L1 or standard L2 entry: the host offset.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// The reserved bits of a standard L2 entry: 1 to 8 and 56 to 61.
pub const L2_RESERVED_MASK: u64 = 0x3f00_0000_0000_01fe;

/// The states of a cluster's subclusters, one bit each, subcluster 0 in bit 0.
///
/// A bit set in neither word means: not allocated here, ask the backing file. No bit is set in both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Subclusters {
    /// The data is in this image.
    pub allocated: u32,
    /// Reads as zeroes.
    pub zero: u32,
}

impl Subclusters {
    /// All `count` (1 or 32) subclusters as a bit mask.
    #[must_use]
    pub const fn mask(count: u32) -> u32 {
        u32::MAX >> 32_u32.saturating_sub(count)
    }
}

/// A cluster that is not compressed: where it lies, if anywhere, and what its subclusters hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct NormalCluster {
    /// The host cluster, aligned. Present without any allocated subcluster where space is only reserved.
    pub host: Option<HostOffset>,
    /// Whether the entry says that the host cluster's refcount is exactly one.
    pub copied: bool,
    /// What the subclusters hold; a standard cluster has one.
    pub subclusters: Subclusters,
}

/// One decoded L2 entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum L2Entry {
    /// Not compressed: unallocated, zero, data, or a mixture by subcluster.
    Normal(NormalCluster),
    /// A compressed cluster.
    Compressed(CompressedDescriptor),
}

impl L2Entry {
    /// Nothing here: the backing file decides.
    pub const UNALLOCATED: Self =
        Self::Normal(NormalCluster { host: None, copied: false, subclusters: Subclusters { allocated: 0, zero: 0 } });

    /// A whole cluster of data at `host`, with refcount one.
    #[must_use]
    pub const fn data(geometry: Geometry, host: HostOffset) -> Self {
        let allocated = Subclusters::mask(geometry.subclusters());
        Self::Normal(NormalCluster { host: Some(host), copied: true, subclusters: Subclusters { allocated, zero: 0 } })
    }

    /// A whole cluster that reads as zeroes and occupies no host cluster.
    #[must_use]
    pub const fn zero(geometry: Geometry) -> Self {
        let zero = Subclusters::mask(geometry.subclusters());
        Self::Normal(NormalCluster { host: None, copied: false, subclusters: Subclusters { allocated: 0, zero } })
    }
}

/// What an entry breaks, found without knowing where the entry stands.
type Fault = (&'static str, String, &'static str);

/// What decides over the meaning of an entry's bits.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Rules {
    geometry: Geometry,
    version: Version,
    /// Host cluster 0 holds data, since it is that of an external data file and not the image's header.
    data_file: bool,
}

impl Rules {
    /// Whether offset 0 means host cluster 0, and not "no cluster".
    const fn offset_0_is_a_cluster(self, copied: bool, zero_flag: bool) -> bool {
        self.data_file && copied && !zero_flag
    }
}

/// One L2 table as it lies in the file, decoded entry by entry.
#[derive(Clone, PartialEq, Eq)]
pub struct L2Table {
    bytes: Box<[u8]>,
    rules: Rules,
}

impl core::fmt::Debug for L2Table {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("L2Table").field("geometry", &self.rules.geometry).finish_non_exhaustive()
    }
}

impl L2Table {
    /// A table without any mapping.
    #[must_use]
    pub fn empty(geometry: Geometry, version: Version) -> Self {
        let bytes = vec![0; geometry.cluster_len()].into_boxed_slice();
        Self { bytes, rules: Rules { geometry, version, data_file: false } }
    }

    /// The table in these bytes, one cluster long.
    ///
    /// # Errors
    /// [`FormatError::Corrupt`] where `bytes` is not one cluster long. Entries are checked when they are asked for.
    pub fn decode(bytes: Box<[u8]>, geometry: Geometry, version: Version) -> Result<Self, FormatError> {
        if bytes.len() != geometry.cluster_len() {
            return Err(FormatError::corrupt("L2 table", 0, "length", bytes.len(), geometry.cluster_len()));
        }
        Ok(Self { bytes, rules: Rules { geometry, version, data_file: false } })
    }

    /// The same table of an image with an external data file: there, an entry with the COPIED flag and offset 0 is the
    /// data file's first cluster. In any other image it is no cluster, since cluster 0 is the header.
    #[must_use]
    pub fn with_data_file(mut self, data_file: bool) -> Self {
        self.rules.data_file = data_file;
        self
    }

    /// The bytes as they go to the file.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        1_usize << self.rules.geometry.l2_bits()
    }

    /// Whether no entry holds anything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        // By blocks, each without a branch: a table is often looked at just to find that it holds nothing.
        self.bytes.chunks(64).all(|block| block.iter().fold(0, |sum, &byte| sum | byte) == 0)
    }

    /// The raw words of an entry: the descriptor, and the subcluster bitmap (0 in a standard table).
    ///
    /// An index past the end reads as an entry that holds nothing.
    #[must_use]
    pub fn raw(&self, index: usize) -> (u64, u64) {
        let len = self.rules.geometry.l2_entry_len();
        let entry = index.checked_mul(len).and_then(|at| self.bytes.get(at..)).and_then(|rest| rest.get(..len));
        match entry.and_then(|entry| entry.split_at_checked(8)) {
            Some((descriptor, [])) => (BigEndian::read_u64(descriptor), 0),
            Some((descriptor, bitmap)) => (BigEndian::read_u64(descriptor), BigEndian::read_u64(bitmap)),
            None => (0, 0),
        }
    }

    /// Replaces the raw words of an entry; `bitmap` is ignored in a standard table.
    ///
    /// # Panics
    /// Where `index` is not an entry of the table: addresses come from [`Geometry::l2_index`], which is always one.
    pub fn set_raw(&mut self, index: usize, descriptor: u64, bitmap: u64) {
        let len = self.rules.geometry.l2_entry_len();
        let entry = index.checked_mul(len).and_then(|at| self.bytes.get_mut(at..)).and_then(|rest| rest.get_mut(..len));
        match entry.and_then(|entry| entry.split_at_mut_checked(8)) {
            Some((first, second)) => {
                BigEndian::write_u64(first, descriptor);
                if !second.is_empty() {
                    BigEndian::write_u64(second, bitmap);
                }
            }
            None => panic!("L2 index {index} is past the table's {} entries", self.len()),
        }
    }

    /// The decoded entry at `index` of the table that lies at `table` in the file.
    ///
    /// # Errors
    /// [`FormatError::Corrupt`] for an unaligned host offset, a zero flag in version 2, subclusters marked both
    /// allocated and zero, subclusters allocated without a host cluster, a compressed cluster with subclusters, or one
    /// past 2^56.
    /// Reserved bits are not looked at, as in QEMU; `check` reports them.
    pub fn get(&self, index: usize, table: HostOffset) -> Result<L2Entry, FormatError> {
        let (descriptor, bitmap) = self.raw(index);
        decode_entry(descriptor, bitmap, self.rules).map_err(|(field, found, expected)| {
            let at = u64::try_from(index.saturating_mul(self.rules.geometry.l2_entry_len())).unwrap_or(u64::MAX);
            FormatError::corrupt("L2 entry", table.get().saturating_add(at), field, found, expected)
        })
    }

    /// How many entries from `index` on, `most` at the most, say the same as the first: each the host cluster behind that
    /// of the one before, or none holds anything. At least 1; told from the raw words, without decoding. It may be too
    /// low: compressed clusters, subclusters, and zeroes without a place are told one by one.
    ///
    /// ```
    /// use qcow2_chain::format::{ClusterBits, Geometry, HostOffset, L2Entry, L2Table, RefcountOrder, Version};
    ///
    /// let geometry = Geometry::new(ClusterBits::default(), RefcountOrder::default(), false).unwrap();
    /// let mut table = L2Table::empty(geometry, Version::V3);
    /// for index in 0..3 {
    ///     table.set(index, &L2Entry::data(geometry, HostOffset::new((index as u64 + 5) << 16)));
    /// }
    /// assert_eq!((table.run(0, 8192), table.run(3, 8189)), (3, 8189));
    /// ```
    #[must_use]
    pub fn run(&self, index: usize, most: usize) -> usize {
        let geometry = self.rules.geometry;
        let (first, _) = self.raw(index);
        let host = first & OFFSET_MASK;
        let step = if first == 0 { 0 } else { geometry.cluster_size() };
        if geometry.extended_l2() || first & OFLAG_COMPRESSED != 0 || (first != 0 && host == 0) {
            return 1;
        }
        // Nowhere a carry into the flags.
        let room = if step == 0 { u64::MAX } else { OFFSET_MASK.saturating_sub(host) >> geometry.cluster_bits().get() };
        let most = most.min(usize::try_from(room).unwrap_or(usize::MAX));
        let words = self.bytes.as_chunks::<8>().0.get(index..).unwrap_or_default();
        let expected = core::iter::successors(Some(first), |word| Some(word.wrapping_add(step)));
        let same = words
            .iter()
            .take(most)
            .zip(expected)
            .take_while(|(word, expected)| u64::from_be_bytes(**word) == *expected);
        same.count().max(1)
    }

    /// Replaces the entry at `index`.
    ///
    /// # Panics
    /// Where `index` is not an entry of the table, or where the entry cannot be told in this geometry and version:
    /// a zero flag in version 2, allocated subclusters without a host cluster, states beyond the subcluster count, a
    /// host cluster that is not aligned, past 2^56, or the header's.
    pub fn set(&mut self, index: usize, entry: &L2Entry) {
        let (descriptor, bitmap) = encode_entry(entry, self.rules);
        self.set_raw(index, descriptor, bitmap);
    }
}

/// Decodes the words of one entry.
fn decode_entry(descriptor: u64, bitmap: u64, rules: Rules) -> Result<L2Entry, Fault> {
    let Rules { geometry, version, .. } = rules;
    if descriptor & OFLAG_COMPRESSED != 0 {
        if bitmap != 0 {
            return Err(("subcluster bitmap of a compressed cluster", format!("{bitmap:#x}"), "0"));
        }
        let compressed = CompressedDescriptor::decode(descriptor, geometry.cluster_bits());
        if compressed.offset.get() > MAX_CLUSTER_OFFSET {
            return Err(("compressed cluster offset", compressed.offset.to_string(), "below 2^56"));
        }
        return Ok(L2Entry::Compressed(compressed));
    }
    let offset = HostOffset::new(descriptor & OFFSET_MASK);
    let copied = descriptor & OFLAG_COPIED != 0;
    if !geometry.is_aligned(offset) {
        return Err(("host cluster offset", offset.to_string(), "a multiple of the cluster size"));
    }
    let zero = !geometry.extended_l2() && descriptor & OFLAG_ZERO != 0;
    let host = (offset != HostOffset::ZERO || rules.offset_0_is_a_cluster(copied, zero)).then_some(offset);
    let subclusters = if geometry.extended_l2() {
        Subclusters { allocated: low_word(bitmap), zero: low_word(bitmap >> 32) }
    } else {
        if zero && version == Version::V2 {
            return Err(("zero flag", "1".to_owned(), "0 in version 2"));
        }
        Subclusters { allocated: u32::from(host.is_some() && !zero), zero: u32::from(zero) }
    };
    if subclusters.allocated & subclusters.zero != 0 {
        return Err(("subcluster bitmap", format!("{bitmap:#x}"), "no subcluster both allocated and zero"));
    }
    if subclusters.allocated != 0 && host.is_none() {
        return Err(("subcluster bitmap", format!("{bitmap:#x}"), "no allocated subcluster without a host cluster"));
    }
    Ok(L2Entry::Normal(NormalCluster { host, copied, subclusters }))
}

/// Encodes one entry into its words.
fn encode_entry(entry: &L2Entry, rules: Rules) -> (u64, u64) {
    let Rules { geometry, version, .. } = rules;
    let cluster = match entry {
        L2Entry::Compressed(descriptor) => {
            assert!(descriptor.offset.get() <= MAX_CLUSTER_OFFSET, "{} is past 2^56", descriptor.offset);
            return (descriptor.encode(geometry.cluster_bits()), 0);
        }
        L2Entry::Normal(cluster) => cluster,
    };
    let Subclusters { allocated, zero } = cluster.subclusters;
    let known = Subclusters::mask(geometry.subclusters());
    assert!((allocated | zero) & !known == 0, "subclusters beyond the geometry's {}", geometry.subclusters());
    assert!(allocated & zero == 0, "a subcluster is both allocated and zero");
    assert!(allocated == 0 || cluster.host.is_some(), "an allocated subcluster without a host cluster");
    let mut descriptor = cluster.host.map_or(0, HostOffset::get);
    assert!(descriptor & !OFFSET_MASK == 0, "host offset {descriptor:#x} does not fit an L2 entry");
    assert!(geometry.is_aligned(HostOffset::new(descriptor)), "host offset {descriptor:#x} does not start a cluster");
    let cluster_0 = rules.offset_0_is_a_cluster(cluster.copied, !geometry.extended_l2() && zero != 0);
    assert!(descriptor != 0 || cluster.host.is_some() == cluster_0, "offset 0 does not mean {:?}", cluster.host);
    if cluster.copied {
        descriptor |= OFLAG_COPIED;
    }
    if geometry.extended_l2() {
        return (descriptor, u64::from(allocated) | u64::from(zero) << 32);
    }
    if zero != 0 {
        assert!(version != Version::V2, "version 2 has no zero flag");
        descriptor |= OFLAG_ZERO;
    } else {
        assert!(allocated != 0 || cluster.host.is_none(), "a standard entry cannot reserve a cluster without data");
    }
    (descriptor, 0)
}

/// The low half of a word.
#[expect(clippy::as_conversions, clippy::cast_possible_truncation, reason = "the low half is what is wanted")]
fn low_word(word: u64) -> u32 {
    word as u32
}

#[cfg(test)]
mod tests;
