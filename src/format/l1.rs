//! L1 table entries. Specification: "L1 table entry".

use byteorder::{BigEndian, ByteOrder};

use super::l2::{OFFSET_MASK, OFLAG_COPIED};
use super::{FormatError, Geometry, HostOffset};

/// The reserved bits of an L1 entry: 0 to 8 and 56 to 62.
pub const L1_RESERVED_MASK: u64 = 0x7f00_0000_0000_01ff;

/// One L1 entry as it lies in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct L1Entry(pub u64);

impl L1Entry {
    /// An entry for an L2 table.
    ///
    /// # Panics
    /// Where `l2_table` has reserved bits set: no allocator gives such an offset.
    #[must_use]
    pub const fn new(l2_table: HostOffset, copied: bool) -> Self {
        assert!(l2_table.get() & !OFFSET_MASK == 0, "an L2 table starts a cluster below 2^56");
        Self(l2_table.get() | if copied { OFLAG_COPIED } else { 0 })
    }

    /// Where the L2 table lies, or `None` where there is none: all its clusters are unallocated.
    #[must_use]
    pub const fn l2_table(self) -> Option<HostOffset> {
        match self.0 & OFFSET_MASK {
            0 => None,
            offset => Some(HostOffset::new(offset)),
        }
    }

    /// Whether the entry says that the L2 table's refcount is exactly one.
    #[must_use]
    pub const fn copied(self) -> bool {
        self.0 & OFLAG_COPIED != 0
    }

    /// The reserved bits that are set; `check` reports them, nothing else looks.
    #[must_use]
    pub const fn reserved(self) -> u64 {
        self.0 & L1_RESERVED_MASK
    }

    /// [`L1Entry::l2_table`], checked to start a cluster. `at` is where the entry stands, for the error.
    ///
    /// # Errors
    /// [`FormatError::Corrupt`] where the table is not aligned to a cluster.
    pub fn checked_l2_table(self, geometry: Geometry, at: HostOffset) -> Result<Option<HostOffset>, FormatError> {
        match self.l2_table() {
            Some(table) if !geometry.is_aligned(table) => Err(FormatError::corrupt(
                "L1 entry",
                at.get(),
                "L2 table offset",
                table,
                "a multiple of the cluster size",
            )),
            table => Ok(table),
        }
    }
}

/// Decodes a run of L1 entries; bytes behind the last whole entry are ignored.
#[must_use]
pub fn decode_l1(bytes: &[u8]) -> Vec<L1Entry> {
    bytes.chunks_exact(8).map(|entry| L1Entry(BigEndian::read_u64(entry))).collect()
}

/// Encodes a run of L1 entries.
#[must_use]
pub fn encode_l1(entries: &[L1Entry]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.0.to_be_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{ClusterBits, RefcountOrder};
    use super::*;

    fn geometry(bits: u32) -> Geometry {
        let bits = ClusterBits::new(bits).expect("valid bits");
        Geometry::new(bits, RefcountOrder::default(), false).expect("valid geometry")
    }

    #[test]
    fn flags_and_offset_are_told_apart() {
        let entry = L1Entry(0x8000_0000_0004_0000);
        assert_eq!(entry, L1Entry::new(HostOffset::new(0x4_0000), true));
        assert_eq!(entry.l2_table(), Some(HostOffset::new(0x4_0000)));
        assert!(entry.copied());
        assert!(!L1Entry::new(HostOffset::new(0x4_0000), false).copied());
        // COPIED without an offset is still no table.
        assert_eq!(L1Entry(OFLAG_COPIED).l2_table(), None);
        assert_eq!(L1Entry(0x7f00_0000_0004_01ff).reserved(), L1_RESERVED_MASK);
        assert_eq!(L1Entry(0x7f00_0000_0004_01ff).l2_table(), Some(HostOffset::new(0x4_0000)));
        assert_eq!(L1_RESERVED_MASK ^ OFFSET_MASK ^ OFLAG_COPIED, u64::MAX, "every bit has one meaning");
    }

    #[test]
    fn an_unaligned_table_is_told_with_its_place() {
        let at = HostOffset::new(0x3_0010);
        let entry = L1Entry(0x4_0200);
        assert_eq!(entry.checked_l2_table(geometry(9), at), Ok(Some(HostOffset::new(0x4_0200))));
        assert_eq!(L1Entry(0).checked_l2_table(geometry(16), at), Ok(None));
        let error = entry.checked_l2_table(geometry(16), at).expect_err("not aligned to 64 KiB");
        let text = "L1 entry at 0x30010: L2 table offset is 0x40200, expected a multiple of the cluster size";
        assert_eq!(error.to_string(), text);
    }

    #[test]
    #[should_panic(expected = "starts a cluster")]
    fn an_offset_that_does_not_fit_is_never_written() {
        let _ = L1Entry::new(HostOffset::new(1 << 56), true);
    }

    proptest! {
        #[test]
        fn runs_go_there_and_back(words in prop::collection::vec(any::<u64>(), 0..40), behind in 0_usize..8) {
            let entries: Vec<L1Entry> = words.into_iter().map(L1Entry).collect();
            let mut bytes = encode_l1(&entries);
            bytes.resize(bytes.len() + behind, 0xff);
            prop_assert_eq!(decode_l1(&bytes), entries);
        }

        #[test]
        fn a_word_is_the_sum_of_its_parts(word: u64) {
            let entry = L1Entry(word);
            let table = entry.l2_table().unwrap_or_default();
            prop_assert_eq!(L1Entry::new(table, entry.copied()).0 | entry.reserved(), word);
        }
    }
}
