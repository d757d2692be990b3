//! The refcount table and refcount blocks of all widths. Specification: "Refcount table entry", "Host cluster management".

use core::iter;
use core::ops::Range;

use byteorder::{BigEndian, ByteOrder};

use super::{FormatError, Geometry, HostOffset, RefcountOrder};

/// The reserved bits of a refcount table entry: 0 to 8.
pub const REFTABLE_RESERVED_MASK: u64 = 0x1ff;

/// One refcount table entry as it lies in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct RefcountTableEntry(pub u64);

impl RefcountTableEntry {
    /// An entry for a refcount block.
    ///
    /// # Panics
    /// Where `block` has reserved bits set: no allocator gives such an offset.
    #[must_use]
    pub const fn new(block: HostOffset) -> Self {
        assert!(block.get() & REFTABLE_RESERVED_MASK == 0, "a refcount block starts a cluster");
        Self(block.get())
    }

    /// Where the refcount block lies, or `None`: all its clusters are free. Reserved bits are masked off.
    #[must_use]
    pub const fn block(self) -> Option<HostOffset> {
        match self.0 & !REFTABLE_RESERVED_MASK {
            0 => None,
            offset => Some(HostOffset::new(offset)),
        }
    }

    /// The reserved bits that are set; `check` reports them.
    #[must_use]
    pub const fn reserved(self) -> u64 {
        self.0 & REFTABLE_RESERVED_MASK
    }

    /// [`RefcountTableEntry::block`], checked to start a cluster. `at` is where the entry stands, for the error.
    ///
    /// # Errors
    /// [`FormatError::Corrupt`] where the block is not aligned to a cluster.
    pub fn checked_block(self, geometry: Geometry, at: HostOffset) -> Result<Option<HostOffset>, FormatError> {
        match self.block() {
            Some(block) if !geometry.is_aligned(block) => {
                let expected = "a multiple of the cluster size";
                Err(FormatError::corrupt("refcount table entry", at.get(), "refcount block offset", block, expected))
            }
            block => Ok(block),
        }
    }
}

/// Decodes a run of refcount table entries; bytes behind the last whole entry are ignored.
#[must_use]
pub fn decode_reftable(bytes: &[u8]) -> Vec<RefcountTableEntry> {
    bytes.chunks_exact(8).map(|entry| RefcountTableEntry(BigEndian::read_u64(entry))).collect()
}

/// Encodes a run of refcount table entries.
#[must_use]
pub fn encode_reftable(entries: &[RefcountTableEntry]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.0.to_be_bytes()).collect()
}

/// One refcount block as it lies in the file. Entry 0 of a byte is its least significant bits for widths below 8.
///
/// Read as little-endian 64-bit words, the entries of every width follow one another from the least significant bits
/// up: below 8 bits because the specification says so, above because that is the order of the bytes. Each entry is a
/// lane of such a word; in the wide ones the bytes are swapped, which a test for zero need not care about.
#[derive(Clone, PartialEq, Eq)]
pub struct RefcountBlock {
    bytes: Box<[u8]>,
    order: RefcountOrder,
}

impl core::fmt::Debug for RefcountBlock {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("RefcountBlock").field("order", &self.order).field("len", &self.len()).finish_non_exhaustive()
    }
}

impl RefcountBlock {
    /// A block in which everything is free.
    #[must_use]
    pub fn empty(geometry: Geometry) -> Self {
        Self { bytes: vec![0; geometry.cluster_len()].into_boxed_slice(), order: geometry.refcount_order() }
    }

    /// The block in these bytes, one cluster long.
    ///
    /// # Errors
    /// [`FormatError::Corrupt`] where `bytes` is not one cluster long.
    pub fn decode(bytes: Box<[u8]>, geometry: Geometry) -> Result<Self, FormatError> {
        if bytes.len() != geometry.cluster_len() {
            return Err(FormatError::corrupt("refcount block", 0, "length", bytes.len(), geometry.cluster_len()));
        }
        Ok(Self { bytes, order: geometry.refcount_order() })
    }

    /// The bytes as they go to the file.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The number of refcounts.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len().saturating_mul(8) >> self.order.get()
    }

    /// Whether every refcount is 0.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.next_used(0).is_none()
    }

    /// The largest refcount that an entry can hold.
    #[must_use]
    pub const fn max(&self) -> u64 {
        self.order.max()
    }

    /// The refcount at `index`; 0 past the end.
    #[must_use]
    #[inline]
    pub fn get(&self, index: usize) -> u64 {
        let (word, shift) = self.locate(index);
        let word = self.words().get(word).map_or(0, |&word| u64::from_le_bytes(word));
        self.swap((word >> shift) & self.max())
    }

    /// Replaces the refcount at `index`.
    ///
    /// # Panics
    /// Where `index` is past the end or `value` does not fit the width: callers have checked.
    #[inline]
    pub fn set(&mut self, index: usize, value: u64) {
        assert!(value <= self.max(), "refcount {value} does not fit {} bits", self.order.bits());
        let (word, shift) = self.locate(index);
        let (mask, lane) = (self.max(), self.swap(value));
        self.update(word, mask << shift, lane << shift);
    }

    /// Replaces all refcounts of `range` by `value`, by whole words.
    ///
    /// # Panics
    /// Where `range` ends past the end or `value` does not fit the width: callers have checked.
    pub fn fill(&mut self, range: Range<usize>, value: u64) {
        assert!(value <= self.max(), "refcount {value} does not fit {} bits", self.order.bits());
        assert!(range.end <= self.len(), "refcounts {range:?} are past the block's {}", self.len());
        if range.is_empty() {
            return;
        }
        // A lane in every place of the word: the product has no carries, since lanes do not touch.
        let pattern = self.swap(value).wrapping_mul(self.lowest_bits());
        let (first, first_shift) = self.locate(range.start);
        let (last, last_shift) = self.locate(range.end.saturating_sub(1));
        let head = u64::MAX << first_shift;
        let tail = u64::MAX >> 64_u32.saturating_sub(last_shift.saturating_add(self.order.bits()));
        if first == last {
            self.update(first, head & tail, pattern);
            return;
        }
        self.update(first, head, pattern);
        if let Some(whole) = self.words_mut().get_mut(first.saturating_add(1)..last) {
            whole.fill(pattern.to_le_bytes());
        }
        self.update(last, tail, pattern);
    }

    /// The first index at or behind `from` whose refcount is 0, found by whole words.
    #[must_use]
    #[inline]
    pub fn next_free(&self, from: usize) -> Option<usize> {
        let lowest = self.lowest_bits();
        let highest = lowest << self.order.bits().saturating_sub(1);
        // The borrow of a zero lane reaches its highest bit. It may run on into higher lanes, but the lowest hit is true.
        self.search(from, |word, hidden| (word | hidden).wrapping_sub(lowest) & !(word | hidden) & highest)
    }

    /// The first index at or behind `from` whose refcount is not 0, found by whole words.
    #[must_use]
    #[inline]
    pub fn next_used(&self, from: usize) -> Option<usize> {
        self.search(from, |word, hidden| word & !hidden)
    }

    /// How many entries from `start` on are free, up to `most`.
    pub(crate) fn free_entries(&self, start: usize, most: usize) -> usize {
        let end = start.saturating_add(most).min(self.len());
        (start..end).take_while(|&index| self.get(index) == 0).count()
    }

    /// The first run of free entries at or behind `from`: where it starts, and how long it is, to the block's end at most.
    #[must_use]
    pub fn free_run(&self, from: usize) -> Option<(usize, usize)> {
        let start = self.next_free(from)?;
        let end = self.next_used(start).unwrap_or(self.len());
        Some((start, end.saturating_sub(start)))
    }

    /// The first run of entries in use at or behind `from`: where it starts, and how long it is.
    #[must_use]
    pub fn used_run(&self, from: usize) -> Option<(usize, usize)> {
        let start = self.next_used(from)?;
        let end = self.next_free(start).unwrap_or(self.len());
        Some((start, end.saturating_sub(start)))
    }

    /// All entries in use, as index and refcount, in order. Free stretches cost next to nothing.
    pub fn iter_used(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        let next = move |from| self.next_used(from).map(|index| (index, self.get(index)));
        iter::successors(next(0), move |&(index, _)| next(index.saturating_add(1)))
    }

    /// The words of the block, in bytes. A cluster is a whole number of words.
    #[inline]
    fn words(&self) -> &[[u8; 8]] {
        self.bytes.as_chunks().0
    }

    /// The words of the block, to be changed.
    #[inline]
    fn words_mut(&mut self) -> &mut [[u8; 8]] {
        self.bytes.as_chunks_mut().0
    }

    /// The word that an entry lies in, and how far up in it.
    #[inline]
    fn locate(&self, index: usize) -> (usize, u32) {
        let lane_bits = 6_u32.saturating_sub(self.order.get());
        let lane = index & !(usize::MAX << lane_bits);
        // At most 63 lanes: the conversion cannot fail.
        (index >> lane_bits, u32::try_from(lane).unwrap_or(0) << self.order.get())
    }

    /// A lane as it lies in a little-endian word to its value, and back.
    #[inline]
    fn swap(&self, lane: u64) -> u64 {
        if self.order.bits() > 8 { lane.swap_bytes() >> 64_u32.saturating_sub(self.order.bits()) } else { lane }
    }

    /// A word with the lowest bit of every lane set.
    #[inline]
    fn lowest_bits(&self) -> u64 {
        match self.order.get() {
            0 => u64::MAX,
            1 => 0x5555_5555_5555_5555,
            2 => 0x1111_1111_1111_1111,
            3 => 0x0101_0101_0101_0101,
            4 => 0x0001_0001_0001_0001,
            5 => 0x0000_0001_0000_0001,
            _ => 1,
        }
    }

    /// Replaces the bits of a word that `mask` tells.
    #[inline]
    fn update(&mut self, index: usize, mask: u64, bits: u64) {
        match self.words_mut().get_mut(index) {
            Some(word) => *word = (u64::from_le_bytes(*word) & !mask | bits & mask).to_le_bytes(),
            None => panic!("refcount word {index} is past the block's {}", self.words().len()),
        }
    }

    /// The entry at or behind `from` that the lowest bit of the first `hits(word, hidden) != 0` lies in, where `hidden`
    /// has the bits of entries before `from`.
    #[inline]
    fn search(&self, from: usize, hits: impl Fn(u64, u64) -> u64) -> Option<usize> {
        let (first, shift) = self.locate(from);
        let (&word, rest) = self.words().get(first..)?.split_first()?;
        let found = hits(u64::from_le_bytes(word), !(u64::MAX << shift));
        let (index, found) = if found != 0 {
            (first, found)
        } else {
            let behind = rest.iter().position(|&word| hits(u64::from_le_bytes(word), 0) != 0)?;
            let word = rest.get(behind).map_or(0, |&word| u64::from_le_bytes(word));
            (first.saturating_add(behind).saturating_add(1), hits(word, 0))
        };
        let lane = usize::try_from(found.trailing_zeros() >> self.order.get()).unwrap_or(0);
        Some((index << 6_u32.saturating_sub(self.order.get())).saturating_add(lane))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::ClusterBits;
    use super::*;

    /// Blocks of narrower entries have more of them than Miri has time for.
    const NARROWEST: u32 = if cfg!(miri) { 5 } else { 0 };

    fn geometry(order: u32) -> Geometry {
        let order = RefcountOrder::new(order).expect("valid order");
        Geometry::new(ClusterBits::new(9).expect("valid bits"), order, false).expect("valid geometry")
    }

    fn block(order: u32, bytes: &[u8]) -> RefcountBlock {
        let mut cluster = vec![0; 512];
        cluster[..bytes.len()].copy_from_slice(bytes);
        RefcountBlock::decode(cluster.into_boxed_slice(), geometry(order)).expect("one cluster")
    }

    #[test]
    fn every_width_reads_the_bytes_of_the_specification() {
        let bytes = [0x1b, 0x80, 0, 1, 0, 0, 0, 2, 0xff];
        let first = |order, count| (0..count).map(|index| block(order, &bytes).get(index)).collect::<Vec<_>>();
        assert_eq!(first(0, 16), [1, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(first(1, 8), [3, 2, 1, 0, 0, 0, 0, 2]);
        assert_eq!(first(2, 4), [0xb, 1, 0, 8]);
        assert_eq!(first(3, 4), [0x1b, 0x80, 0, 1]);
        assert_eq!(first(4, 4), [0x1b80, 1, 0, 2]);
        assert_eq!(first(5, 3), [0x1b80_0001, 2, 0xff00_0000]);
        assert_eq!(first(6, 2), [0x1b80_0001_0000_0002, 0xff00_0000_0000_0000]);
    }

    #[test]
    fn a_block_has_the_entries_of_its_geometry() {
        for order in 0..=6 {
            let block = RefcountBlock::empty(geometry(order));
            assert_eq!(u64::try_from(block.len()), Ok(geometry(order).refcount_block_entries()));
            assert!(block.is_empty());
            assert_eq!(block.free_run(0), Some((0, block.len())));
            assert_eq!(block.get(block.len()), 0);
            assert_eq!(block.get(usize::MAX), 0);
            assert_eq!(block.next_free(block.len()), None);
            assert_eq!(block.next_free(usize::MAX), None);
        }
        assert!(RefcountBlock::decode(vec![0; 511].into_boxed_slice(), geometry(4)).is_err());
    }

    #[test]
    #[should_panic(expected = "does not fit")]
    fn a_refcount_beyond_the_width_is_never_written() {
        RefcountBlock::empty(geometry(1)).set(0, 4);
    }

    #[test]
    #[should_panic(expected = "past the block")]
    fn an_index_past_the_end_is_never_written() {
        RefcountBlock::empty(geometry(6)).set(64, 1);
    }

    #[test]
    #[should_panic(expected = "past the block")]
    fn a_range_past_the_end_is_never_filled() {
        RefcountBlock::empty(geometry(6)).fill(63..65, 1);
    }

    #[test]
    fn table_entries_keep_their_reserved_bits_apart() {
        let entry = RefcountTableEntry(0x3_0001);
        assert_eq!(entry.block(), Some(HostOffset::new(0x3_0000)));
        assert_eq!(entry.reserved(), 1);
        assert_eq!(RefcountTableEntry(0x1ff).block(), None);
        assert_eq!(RefcountTableEntry::new(HostOffset::new(0x3_0000)), RefcountTableEntry(0x3_0000));
        assert_eq!(entry.checked_block(geometry(4), HostOffset::ZERO), Ok(Some(HostOffset::new(0x3_0000))));
        let wide = Geometry::new(ClusterBits::default(), RefcountOrder::default(), false).expect("valid geometry");
        let unaligned = RefcountTableEntry(0x3_0200).checked_block(wide, HostOffset::new(8));
        assert!(matches!(unaligned, Err(FormatError::Corrupt { offset: 8, .. })));
    }

    /// What the model of a block is told to do.
    #[derive(Clone, Debug)]
    enum Step {
        Set(usize, u64),
        Fill(usize, usize, u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        // Zero as often as anything else, and small values often: they are what blocks are full of.
        let value = prop_oneof![Just(0), 1_u64..4, any::<u64>()];
        let step = prop_oneof![
            (any::<usize>(), value.clone()).prop_map(|(index, value)| Step::Set(index, value)),
            (any::<usize>(), any::<usize>(), value).prop_map(|(a, b, value)| Step::Fill(a, b, value)),
        ];
        prop::collection::vec(step, 0..40)
    }

    fn compare(block: &RefcountBlock, model: &[u64]) -> Result<(), TestCaseError> {
        let used = |&(_, &value): &(usize, &u64)| value != 0;
        prop_assert_eq!(
            block.iter_used().collect::<Vec<_>>(),
            model.iter().copied().enumerate().filter(|&(_, value)| value != 0).collect::<Vec<_>>()
        );
        let (mut free, mut taken) = (None, None);
        for (index, &value) in model.iter().enumerate().rev() {
            if value == 0 {
                free = Some(index);
            } else {
                taken = Some(index);
            }
            prop_assert_eq!(block.get(index), value);
            prop_assert_eq!(block.next_free(index), free);
            prop_assert_eq!(block.next_used(index), taken);
        }
        let run = free.map(|start| (start, model[start..].iter().take_while(|&&value| value == 0).count()));
        prop_assert_eq!(block.free_run(0), run);
        let run = taken.map(|start| (start, model[start..].iter().take_while(|&&value| value != 0).count()));
        prop_assert_eq!(block.used_run(0), run);
        prop_assert_eq!(block.is_empty(), !model.iter().enumerate().any(|entry| used(&entry)));
        Ok(())
    }

    proptest! {
        #[test]
        fn a_block_is_a_vector_of_numbers(order in NARROWEST..=6, steps in steps()) {
            let mut block = RefcountBlock::empty(geometry(order));
            let mut model = vec![0_u64; block.len()];
            for step in steps {
                match step {
                    Step::Set(index, value) => {
                        let (index, value) = (index % model.len(), value & block.max());
                        block.set(index, value);
                        model[index] = value;
                    }
                    Step::Fill(a, b, value) => {
                        let (a, b, value) = (a % model.len(), b % (model.len() + 1), value & block.max());
                        block.fill(a.min(b)..a.max(b), value);
                        model[a.min(b)..a.max(b)].fill(value);
                    }
                }
            }
            compare(&block, &model)?;
        }

        #[test]
        #[cfg_attr(miri, ignore = "takes too long; the test above goes the same ways")]
        fn any_bytes_are_a_block(order in NARROWEST..=6, bytes in prop::collection::vec(any::<u8>(), 512)) {
            let block = block(order, &bytes);
            prop_assert_eq!(block.as_bytes(), &bytes[..]);
            let model: Vec<u64> = (0..block.len()).map(|index| block.get(index)).collect();
            compare(&block, &model)?;
            let mut copy = RefcountBlock::empty(geometry(order));
            for (index, &value) in model.iter().enumerate() {
                copy.set(index, value);
            }
            prop_assert_eq!(copy.as_bytes(), &bytes[..]);
        }

        #[test]
        fn table_entries_go_there_and_back(words in prop::collection::vec(any::<u64>(), 0..40)) {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
            prop_assert_eq!(encode_reftable(&decode_reftable(&bytes)), bytes);
        }
    }
}
