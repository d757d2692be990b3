//! Tests of the bitmap directory and table codecs.

use proptest::prelude::*;

use super::super::RefcountOrder;
use super::*;

fn geometry(bits: u32) -> Geometry {
    let bits = ClusterBits::new(bits).expect("valid bits");
    Geometry::new(bits, RefcountOrder::default(), false).expect("valid geometry")
}

fn entry(name: &[u8]) -> BitmapDirectoryEntry {
    BitmapDirectoryEntry {
        bitmap_table_offset: HostOffset::new(0x6_0000),
        bitmap_table_size: 1,
        flags: BitmapDirectoryEntry::AUTO,
        kind: 1,
        granularity_bits: 16,
        name: name.to_vec(),
        extra_data: Vec::new(),
    }
}

fn decode(bytes: &[u8], count: u32) -> Result<Vec<BitmapDirectoryEntry>, FormatError> {
    let extension = BitmapsExtension {
        nb_bitmaps: count,
        bitmap_directory_size: u64::try_from(bytes.len()).expect("fits"),
        bitmap_directory_offset: HostOffset::new(0x5_0000),
    };
    decode_bitmap_directory(bytes, &extension)
}

fn refused(change: impl FnOnce(&mut BitmapDirectoryEntry)) -> FormatError {
    let mut entry = entry(b"a");
    change(&mut entry);
    decode(&encode_bitmap_directory(&[entry]), 1).expect_err("to be refused")
}

#[test]
fn an_entry_lies_as_the_specification_says() {
    let mut bytes = vec![0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, 1, 16, 0, 3, 0, 0, 0, 2];
    bytes.extend_from_slice(b"xyabc\0\0\0");
    let expected = BitmapDirectoryEntry { extra_data: b"xy".to_vec(), ..entry(b"abc") };
    assert_eq!(encode_bitmap_directory(core::slice::from_ref(&expected)), bytes);
    assert_eq!(decode(&bytes, 1), Ok(vec![expected]));
}

#[test]
fn entries_must_fill_the_directory() {
    let bytes = encode_bitmap_directory(&[entry(b"one"), entry(b"two")]);
    assert_eq!(decode(&bytes, 2).map(|entries| entries.len()), Ok(2));
    assert!(decode(&bytes, 1).is_err());
    assert!(decode(&bytes, 3).is_err());
    // The padding belongs to the entry.
    assert!(decode(&bytes[..bytes.len() - 1], 2).is_err());
    assert!(matches!(decode(&bytes, 65_536), Err(FormatError::Limit { limit: 65_535, .. })));
    let error = decode(&[bytes, vec![0; 24]].concat(), 3).expect_err("an empty entry");
    assert!(matches!(error, FormatError::Corrupt { offset: 0x5_0040, .. }), "{error}");
    let extension = BitmapsExtension {
        nb_bitmaps: 1,
        bitmap_directory_size: 64,
        bitmap_directory_offset: HostOffset::new(0x5_0000),
    };
    assert!(decode_bitmap_directory(&[0; 63], &extension).is_err());
    let large = BitmapsExtension { bitmap_directory_size: MAX_BITMAP_DIRECTORY_SIZE + 8, ..extension };
    assert!(matches!(decode_bitmap_directory(&[], &large), Err(FormatError::Limit { .. })));
}

#[test]
fn what_cannot_be_followed_is_refused() {
    let corrupt = |error| matches!(error, FormatError::Corrupt { offset: 0x5_0000, .. });
    assert!(corrupt(refused(|entry| entry.bitmap_table_offset = HostOffset::ZERO)));
    assert!(corrupt(refused(|entry| entry.bitmap_table_size = 0)));
    assert!(corrupt(refused(|entry| entry.granularity_bits = 8)));
    assert!(corrupt(refused(|entry| entry.granularity_bits = 32)));
    let limit = |error| matches!(error, FormatError::Limit { .. });
    assert!(limit(refused(|entry| entry.bitmap_table_size = MAX_BITMAP_TABLE_ENTRIES + 1)));
    assert!(limit(refused(|entry| entry.name = vec![b'n'; 1024])));
}

#[test]
fn what_must_not_be_used_is_kept() {
    let usable = |change: fn(&mut BitmapDirectoryEntry)| {
        let mut entry = entry(b"a");
        change(&mut entry);
        assert_eq!(decode(&encode_bitmap_directory(core::slice::from_ref(&entry)), 1), Ok(vec![entry.clone()]));
        entry.usable()
    };
    assert_eq!(usable(|_| ()), Ok(()));
    assert_eq!(usable(|entry| entry.flags = 1), Err(UnusableBitmap::InUse));
    assert_eq!(usable(|entry| entry.flags = 0x8000_0002), Err(UnusableBitmap::UnknownFlags(0x8000_0000)));
    assert_eq!(usable(|entry| entry.kind = 2), Err(UnusableBitmap::UnknownType(2)));
    assert_eq!(usable(|entry| entry.extra_data = vec![1]), Err(UnusableBitmap::ExtraData));
    assert_eq!(
        usable(|entry| {
            entry.extra_data = vec![1];
            entry.flags |= BitmapDirectoryEntry::EXTRA_DATA_COMPATIBLE;
        }),
        Ok(())
    );
}

#[test]
fn a_table_fits_the_disk() {
    // One cluster of 64 KiB has 512 Ki bits of 64 KiB each: 32 GiB.
    let entry = entry(b"a");
    assert_eq!(entry.table_entries_for(0, geometry(16)), 0);
    assert_eq!(entry.table_entries_for(32 << 30, geometry(16)), 1);
    assert_eq!(entry.table_entries_for((32 << 30) + 1, geometry(16)), 2);
    assert_eq!(entry.validate(geometry(16), 32 << 30), Ok(()));
    assert!(matches!(entry.validate(geometry(16), (32 << 30) + 1), Err(FormatError::Corrupt { .. })));
    let stale = BitmapDirectoryEntry { flags: BitmapDirectoryEntry::IN_USE, ..entry.clone() };
    assert_eq!(stale.validate(geometry(16), u64::MAX), Ok(()));
    assert!(matches!(entry.validate(geometry(18), 1), Err(FormatError::Corrupt { .. })), "unaligned");
    let large = BitmapDirectoryEntry { bitmap_table_size: 8193, ..entry.clone() };
    assert!(matches!(large.validate(geometry(16), 1), Err(FormatError::Limit { .. })));
    let far = BitmapDirectoryEntry { bitmap_table_offset: HostOffset::new(u64::MAX << 16), ..entry };
    assert!(matches!(far.validate(geometry(16), 1), Err(FormatError::Corrupt { .. })));
}

#[test]
fn names_are_compared_by_request_only() {
    let entries = vec![entry(b"a"), entry(b""), entry(b"b"), entry(b"a"), entry(b"")];
    assert_eq!(decode(&encode_bitmap_directory(&entries), 5), Ok(entries.clone()));
    let empty = "the name is empty";
    assert_eq!(bitmap_name_faults(&entries), [(1, empty), (3, "the name is not unique"), (4, empty)]);
    assert_eq!(bitmap_name_faults(&[]), []);
}

#[test]
fn table_entries_have_three_meanings() {
    let at = HostOffset::new(0x6_0008);
    let decode = |word| BitmapTableEntry::decode(word, ClusterBits::default(), at);
    assert_eq!(decode(0), Ok(BitmapTableEntry::AllZeroes));
    assert_eq!(decode(1), Ok(BitmapTableEntry::AllOnes));
    assert_eq!(decode(0x7_0000), Ok(BitmapTableEntry::Cluster(HostOffset::new(0x7_0000))));
    for word in [2, 0x100, 1 << 56, 1 << 63, 0x7_0001, 0x7_0200] {
        assert!(matches!(decode(word), Err(FormatError::Corrupt { offset: 0x6_0008, .. })), "{word:#x}");
    }
}

#[test]
#[should_panic(expected = "does not fit")]
fn a_cluster_at_0_is_never_written() {
    let _ = BitmapTableEntry::Cluster(HostOffset::ZERO).encode();
}

/// Names and tables may be longer than Miri has time for.
const LONG: usize = if cfg!(miri) { 40 } else { 1024 };

fn entries() -> impl Strategy<Value = Vec<BitmapDirectoryEntry>> {
    let bytes = |max| prop::collection::vec(any::<u8>(), 0..max);
    let numbers = (1_u64.., 1..=MAX_BITMAP_TABLE_ENTRIES, any::<u32>(), any::<u8>(), 9_u8..=31);
    let entry = (numbers, bytes(LONG), bytes(100)).prop_map(|(numbers, name, extra_data)| {
        let (offset, bitmap_table_size, flags, kind, granularity_bits) = numbers;
        let bitmap_table_offset = HostOffset::new(offset);
        BitmapDirectoryEntry { bitmap_table_offset, bitmap_table_size, flags, kind, granularity_bits, name, extra_data }
    });
    prop::collection::vec(entry, 0..6)
}

proptest! {
    #[test]
    fn directories_go_there_and_back(entries in entries(), cut in any::<prop::sample::Index>()) {
        let bytes = encode_bitmap_directory(&entries);
        let count = u32::try_from(entries.len()).expect("few");
        let decoded = decode(&bytes, count).expect("our own directory");
        prop_assert_eq!(&decoded, &entries);
        prop_assert_eq!(encode_bitmap_directory(&decoded), bytes.clone());
        if !bytes.is_empty() {
            prop_assert!(decode(&bytes[..cut.index(bytes.len())], count).is_err());
        }
    }

    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(prop_oneof![Just(0), Just(16), any::<u8>()], 0..LONG.min(200)), count: u32) {
        for count in [count, count % 8] {
            for entry in decode(&bytes, count).unwrap_or_default() {
                let _ = (entry.usable(), entry.validate(geometry(16), u64::MAX), entry.validate(geometry(9), 1));
            }
        }
    }

    #[test]
    fn table_entries_go_there_and_back(word: u64, shift in 0_u32..64, bits in 9_u32..=21) {
        let bits = ClusterBits::new(bits).expect("valid bits");
        for word in [word, word >> shift, word << shift, word << shift & !(0xff << 56)] {
            if let Ok(entry) = BitmapTableEntry::decode(word, bits, HostOffset::ZERO) {
                prop_assert_eq!(entry.encode(), word);
            }
        }
    }
}
