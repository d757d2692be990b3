//! Tests of the L2 codec: the bits of the specification one by one, then all entries of all geometries.

use proptest::prelude::*;

use super::super::limits::{MAX_CLUSTER_BITS, MIN_CLUSTER_BITS, MIN_EXTENDED_L2_CLUSTER_BITS};
use super::super::{ClusterBits, L1_RESERVED_MASK, RefcountOrder};
use super::*;

const TABLE: HostOffset = HostOffset::new(0x4_0000);
/// So many different words fill a table; Miri takes its time for each.
const WORDS: usize = if cfg!(miri) { 16 } else { 2048 };

fn geometry(bits: u32, extended_l2: bool) -> Geometry {
    let bits = ClusterBits::new(bits).expect("valid bits");
    Geometry::new(bits, RefcountOrder::default(), extended_l2).expect("valid geometry")
}

fn geometries() -> impl Strategy<Value = Geometry> {
    prop_oneof![
        (MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).prop_map(|bits| geometry(bits, false)),
        (MIN_EXTENDED_L2_CLUSTER_BITS..=MAX_CLUSTER_BITS).prop_map(|bits| geometry(bits, true)),
    ]
}

fn rules(geometry: Geometry) -> Rules {
    Rules { geometry, version: Version::V3, data_file: false }
}

fn normal(host: u64, copied: bool, allocated: u32, zero: u32) -> L2Entry {
    let host = (host != 0).then_some(HostOffset::new(host));
    L2Entry::Normal(NormalCluster { host, copied, subclusters: Subclusters { allocated, zero } })
}

#[test]
fn a_standard_entry_has_five_meanings() {
    let rules = rules(geometry(16, false));
    let decode = |word| decode_entry(word, 0, rules).expect("a valid entry");
    assert_eq!(decode(0), L2Entry::UNALLOCATED);
    assert_eq!(decode(0x5_0000), normal(0x5_0000, false, 1, 0));
    assert_eq!(decode(OFLAG_COPIED | 0x5_0000), L2Entry::data(rules.geometry, HostOffset::new(0x5_0000)));
    assert_eq!(decode(1), L2Entry::zero(rules.geometry));
    assert_eq!(decode(OFLAG_COPIED | 0x5_0001), normal(0x5_0000, true, 0, 1));
    let compressed = CompressedDescriptor { offset: HostOffset::new(0x5_0123), sectors: 2 };
    assert_eq!(decode(OFLAG_COMPRESSED | 1 << 54 | 0x5_0123), L2Entry::Compressed(compressed));
}

#[test]
fn an_extended_entry_tells_each_subcluster() {
    let rules = rules(geometry(16, true));
    let decode = |word, bitmap| decode_entry(word, bitmap, rules);
    assert_eq!(decode(0, 0), Ok(L2Entry::UNALLOCATED));
    assert_eq!(decode(0, 0xffff_ffff << 32), Ok(L2Entry::zero(rules.geometry)));
    assert_eq!(decode(0x5_0000, 0x8000_0000_0000_0001), Ok(normal(0x5_0000, false, 1, 1 << 31)));
    // Reserved space without any subcluster in use, and bit 0, which is no zero flag here.
    assert_eq!(decode(OFLAG_COPIED | 0x5_0000, 0), Ok(normal(0x5_0000, true, 0, 0)));
    assert_eq!(decode(0x5_0001, 1), Ok(normal(0x5_0000, false, 1, 0)));
    assert_eq!(decode(0x5_0000, 1 << 32 | 1).map_err(|fault| fault.0), Err("subcluster bitmap"));
    assert_eq!(decode(0, 1).map_err(|fault| fault.0), Err("subcluster bitmap"));
    let compressed = decode(OFLAG_COMPRESSED | 0x5_0000, 1).map_err(|fault| fault.0);
    assert_eq!(compressed, Err("subcluster bitmap of a compressed cluster"));
}

#[test]
fn host_cluster_0_is_data_only_in_a_data_file() {
    for extended in [false, true] {
        let table = |data_file| {
            let mut table = L2Table::empty(geometry(16, extended), Version::V3).with_data_file(data_file);
            table.set_raw(3, OFLAG_COPIED, u64::from(extended));
            table
        };
        match table(false).get(3, TABLE) {
            Ok(L2Entry::Normal(cluster)) => assert_eq!((extended, cluster.host), (false, None)),
            Ok(other) => panic!("{other:?}"),
            Err(_) => assert!(extended, "an allocated subcluster without a host cluster"),
        }
        let data = NormalCluster {
            host: Some(HostOffset::ZERO),
            copied: true,
            subclusters: Subclusters { allocated: 1, zero: 0 },
        };
        assert_eq!(table(true).get(3, TABLE), Ok(L2Entry::Normal(data)));
        let mut copy = L2Table::empty(geometry(16, extended), Version::V3).with_data_file(true);
        copy.set(3, &L2Entry::Normal(data));
        assert!(copy == table(true));
    }
    // Where nothing is allocated, a stray COPIED does no harm, and the zero flag wins over it.
    let mut table = L2Table::empty(geometry(16, false), Version::V3);
    table.set_raw(0, OFLAG_COPIED | OFLAG_ZERO, 0);
    assert_eq!(table.get(0, TABLE), Ok(normal(0, true, 0, 1)));
    assert_eq!(table.clone().with_data_file(true).get(0, TABLE), Ok(normal(0, true, 0, 1)));
}

#[test]
fn errors_say_where_the_entry_stands() {
    let mut table = L2Table::empty(geometry(16, true), Version::V3);
    table.set_raw(2, 0x5_0200, 0);
    let error = table.get(2, TABLE).expect_err("not aligned");
    let text = "L2 entry at 0x40020: host cluster offset is 0x50200, expected a multiple of the cluster size";
    assert_eq!(error.to_string(), text);

    let mut table = L2Table::empty(geometry(9, false), Version::V2);
    table.set_raw(1, 0x401, 0);
    table.set_raw(2, OFLAG_COMPRESSED | 1 << 56, 0);
    let error = |index| table.get(index, TABLE).expect_err("corrupt").to_string();
    assert_eq!(error(1), "L2 entry at 0x40008: zero flag is 1, expected 0 in version 2");
    assert!(error(2).starts_with("L2 entry at 0x40010: compressed cluster offset is 0x100000000000000"));
}

#[test]
fn a_table_is_one_cluster() {
    let tables = [(9, false, 64), (14, true, 1024), (16, false, 8192), (21, true, 131_072)];
    // Miri would look at two million bytes one by one.
    let tables = if cfg!(miri) { &tables[..2] } else { &tables };
    for &(bits, extended, entries) in tables {
        let geometry = geometry(bits, extended);
        let mut table = L2Table::empty(geometry, Version::V3);
        assert_eq!((table.len(), table.as_bytes().len()), (entries, geometry.cluster_len()));
        assert!(table.is_empty());
        assert_eq!(table.get(entries, TABLE), Ok(L2Entry::UNALLOCATED));
        assert_eq!(table.raw(usize::MAX), (0, 0));
        table.set(entries - 1, &L2Entry::zero(geometry));
        assert!(!table.is_empty());
        assert!(
            L2Table::decode(vec![0; geometry.cluster_len() - 1].into_boxed_slice(), geometry, Version::V3).is_err()
        );
    }
}

#[test]
fn every_bit_of_an_entry_has_one_meaning() {
    let flags = OFLAG_COPIED | OFLAG_COMPRESSED | OFLAG_ZERO;
    assert_eq!(L2_RESERVED_MASK ^ OFFSET_MASK ^ flags, u64::MAX);
    assert_eq!(L2_RESERVED_MASK & flags, 0);
    assert_eq!(L1_RESERVED_MASK & !L2_RESERVED_MASK, OFLAG_COMPRESSED | OFLAG_ZERO);
}

/// What must never reach a table, each with the words of its refusal.
#[test]
fn our_own_mistakes_are_not_written() {
    let standard = rules(geometry(16, false));
    let extended = rules(geometry(16, true));
    let v2 = Rules { version: Version::V2, ..standard };
    let header = NormalCluster { host: Some(HostOffset::ZERO), ..NormalCluster::default() };
    let past = CompressedDescriptor { offset: HostOffset::new(1 << 56), sectors: 1 };
    let mistakes = [
        ("beyond the geometry", standard, normal(0x5_0000, true, 2, 0)),
        ("both allocated and zero", extended, normal(0x5_0000, true, 1, 1)),
        ("without a host cluster", extended, normal(0, false, 1, 0)),
        ("does not fit", standard, normal(1 << 56, true, 1, 0)),
        ("does not start a cluster", standard, normal(0x5_0200, true, 1, 0)),
        ("offset 0", standard, L2Entry::Normal(header)),
        ("offset 0", Rules { data_file: true, ..standard }, normal(0, true, 0, 0)),
        ("version 2", v2, normal(0, false, 0, 1)),
        ("reserve a cluster", standard, normal(0x5_0000, true, 0, 0)),
        ("past 2^56", rules(geometry(9, false)), L2Entry::Compressed(past)),
    ];
    for (words, rules, entry) in mistakes {
        let panic = std::panic::catch_unwind(|| encode_entry(&entry, rules)).expect_err(words);
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default();
        assert!(text.contains(words), "{words}: {text}");
    }
}

/// Any entry that the geometry can tell.
fn entries(geometry: Geometry) -> impl Strategy<Value = L2Entry> {
    let bits = geometry.cluster_bits();
    let known = Subclusters::mask(geometry.subclusters());
    let host = (1_u64..1 << (56 - bits.get())).prop_map(move |cluster| cluster << bits.get());
    let normal = (prop::option::of(host), any::<bool>(), any::<u32>(), any::<u32>()).prop_map(
        move |(host, copied, allocated, zero)| {
            let zero = zero & known;
            let mut allocated = if host.is_some() { allocated & known & !zero } else { 0 };
            if !geometry.extended_l2() && host.is_some() {
                allocated = 1 & !zero;
            }
            let host = host.map(HostOffset::new);
            L2Entry::Normal(NormalCluster { host, copied, subclusters: Subclusters { allocated, zero } })
        },
    );
    let width = (70 - bits.get()).min(56);
    let compressed = (0_u64..1 << width, 1_u64..=1 << (bits.get() - 8)).prop_map(|(offset, sectors)| {
        L2Entry::Compressed(CompressedDescriptor { offset: HostOffset::new(offset), sectors })
    });
    prop_oneof![3 => normal, 1 => compressed]
}

proptest! {
    #[test]
    fn every_entry_of_every_geometry_goes_there_and_back(
        (geometry, entry) in geometries().prop_flat_map(|geometry| (Just(geometry), entries(geometry))),
    ) {
        let (descriptor, bitmap) = encode_entry(&entry, rules(geometry));
        prop_assert_eq!(decode_entry(descriptor, bitmap, rules(geometry)), Ok(entry));
        if descriptor & OFLAG_COMPRESSED == 0 {
            prop_assert_eq!(descriptor & L2_RESERVED_MASK, 0);
        }
        prop_assert!(geometry.extended_l2() || bitmap == 0);
    }

    #[test]
    fn every_word_decodes_to_its_meaning_or_an_error(
        geometry in geometries(), words: (u64, u64), shift in 0_u32..64, v2: bool, data_file: bool,
    ) {
        let version = if v2 { Version::V2 } else { Version::V3 };
        let rules = Rules { geometry, version, data_file };
        // Aligned offsets and sparse bitmaps, too: of random words nearly all are refused.
        let mask = !(OFFSET_MASK & (geometry.cluster_size() - 1));
        for (word, bitmap) in [words, (words.0 & mask, words.1 << shift), (words.0 & mask, 0), (words.0 & mask, words.1 << 32)] {
            let Ok(entry) = decode_entry(word, bitmap, rules) else { continue };
            let (again, bits) = encode_entry(&entry, rules);
            prop_assert_eq!(decode_entry(again, bits, rules), Ok(entry));
            // Only what has no meaning is lost: reserved bits, bit 0 of an extended entry, COPIED of a compressed one.
            let lost = match entry {
                L2Entry::Compressed(_) => OFLAG_COPIED,
                L2Entry::Normal(_) if geometry.extended_l2() => L2_RESERVED_MASK | OFLAG_ZERO,
                L2Entry::Normal(_) => L2_RESERVED_MASK,
            };
            prop_assert_eq!(again, word & !lost);
            prop_assert_eq!(bits, if geometry.extended_l2() { bitmap } else { 0 });
        }
    }

    #[test]
    fn a_table_keeps_every_bit_of_what_is_not_set(extended: bool, words in prop::collection::vec(any::<u64>(), WORDS), at in 0_usize..1024) {
        let geometry = geometry(14, extended);
        let words: Vec<u64> = words.into_iter().cycle().take(2048).collect();
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
        let mut table = L2Table::decode(bytes.clone().into_boxed_slice(), geometry, Version::V3).expect("one cluster");
        prop_assert_eq!(table.as_bytes(), &bytes[..]);
        let expected = if extended { (words[2 * at], words[2 * at + 1]) } else { (words[at], 0) };
        prop_assert_eq!(table.raw(at), expected);
        table.set(at, &L2Entry::zero(geometry));
        let len = geometry.l2_entry_len();
        prop_assert_eq!(&table.as_bytes()[..at * len], &bytes[..at * len]);
        prop_assert_eq!(&table.as_bytes()[(at + 1) * len..], &bytes[(at + 1) * len..]);
        prop_assert_eq!(table.get(at, TABLE), Ok(L2Entry::zero(geometry)));
    }
}

proptest! {
    #[test]
    fn a_run_is_as_if_told_entry_by_entry(
        geometry in geometries(),
        base in prop_oneof![Just(0_u64), Just(1), Just(OFFSET_MASK >> 9), 1_u64..1 << 20],
        flags in prop_oneof![Just(0_u64), Just(OFLAG_COPIED), Just(OFLAG_ZERO), Just(OFLAG_COMPRESSED)],
        breaks in proptest::collection::vec(0_usize..64, 0..3),
        index in 0_usize..32,
        most in 1_usize..64,
    ) {
        let mut table = L2Table::empty(geometry, Version::V3);
        let len = table.len().min(64);
        for entry in 0..len {
            // Clusters in a row, with a gap wherever there is a break; 0 stays 0.
            let gaps = breaks.iter().filter(|at| **at <= entry).count() as u64;
            let cluster = if base == 0 { 0 } else { base + entry as u64 + gaps };
            let host = (cluster << geometry.cluster_bits().get()) & OFFSET_MASK;
            table.set_raw(entry, if base == 0 && flags != OFLAG_ZERO { 0 } else { host | flags }, 0);
        }
        let index = index.min(len - 1);
        let most = most.min(len - index);
        let run = table.run(index, most);
        prop_assert!((1..=most).contains(&run));
        let told = |entry: usize| match table.get(entry, TABLE) {
            Ok(L2Entry::Normal(cluster)) => Some(cluster),
            _ => None,
        };
        if let Some(first) = told(index) {
            let follows = |skip: usize| {
                let host = first.host.map(|host| HostOffset::new(host.get() + skip as u64 * geometry.cluster_size()));
                told(index + skip) == Some(NormalCluster { host, ..first })
            };
            prop_assert!((0..run).all(follows), "{run} from {index}");
            let standard = !geometry.extended_l2() && (first.host.is_some() || first.subclusters.zero == 0);
            prop_assert!(!standard || run == most || !follows(run), "{run} from {index} is too low");
        } else {
            prop_assert_eq!(run, 1);
        }
    }
}
