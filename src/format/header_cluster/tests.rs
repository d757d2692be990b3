use proptest::collection::vec;
use proptest::prelude::*;

use super::super::{AutoclearFeatures, ClusterBits, CompressionType, HostOffset, IncompatibleFeatures, Version};
use super::*;
use sketch::{Sketch, bitmaps, crypto, decode, sketch};

mod sketch;

/// What holds for every accepted input.
fn holds_when_accepted(bytes: &[u8], decoded: &HeaderCluster) -> Result<(), TestCaseError> {
    let (encoded, end) = decoded.encode_parts().expect("what decodes encodes");
    let both = end.min(bytes.len());
    prop_assert_eq!(&encoded[..both], &bytes[..both]);
    if let Some(name) = &decoded.backing_file {
        let at = usize::try_from(decoded.header.backing_file_offset).unwrap();
        prop_assert_eq!(&encoded[at..], &name[..]);
        prop_assert_eq!(&bytes[at..at + name.len()], &name[..]);
    }
    prop_assert_eq!(&decode(&encoded).expect("what was encoded decodes"), decoded);
    let over = decoded.encode_over(bytes).expect("what decodes encodes");
    let cluster = bytes.len().min(1 << decoded.header.cluster_bits.get());
    prop_assert_eq!(&over[..cluster], &bytes[..cluster]);
    prop_assert!(over[cluster..].iter().all(|&byte| byte == 0));
    Ok(())
}

/// Some sectors; one and a little for Miri, which takes its time for each byte.
const LONG: usize = if cfg!(miri) { 600 } else { 3000 };

proptest! {
    #[test]
    fn what_is_well_formed_comes_back_byte_by_byte(sketch in sketch()) {
        let (bytes, end) = sketch.build();
        prop_assume!(bytes.len() <= 1 << sketch.cluster_bits);
        let decoded = decode(&bytes).expect("it is well-formed");
        let kinds: Vec<u32> = sketch.extensions.iter().map(|(kind, ..)| *kind).collect();
        prop_assert_eq!(decoded.extensions.iter().map(Extension::kind).collect::<Vec<_>>(), kinds);
        for (extension, (_, data, _)) in decoded.extensions.iter().zip(&sketch.extensions) {
            prop_assert_eq!(&extension.data(), data);
        }
        prop_assert_eq!(decoded.backing_file.clone().unwrap_or_default(), sketch.name.clone());
        prop_assert_eq!(&decoded.encode().unwrap()[..end], &bytes[..end]);
        prop_assert_eq!(HeaderCluster::changed_sectors(&bytes, &decoded.encode_over(&bytes).unwrap()), vec![]);
        holds_when_accepted(&bytes, &decoded)?;
    }

    #[test]
    fn damage_never_panics_and_what_is_still_accepted_comes_back(
        sketch in sketch(),
        damage in vec((any::<prop::sample::Index>(), prop_oneof![any::<u8>(), Just(0), Just(0xff)]), 1..6),
        cut in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        let (mut bytes, _) = sketch.build();
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok(decoded) = decode(&bytes) {
            holds_when_accepted(&bytes, &decoded)?;
        }
    }

    #[test]
    fn noise_never_panics(
        mut bytes in vec(any::<u8>(), 0..700), version in 0..5_u8, bits in 0..30_u8, len in any::<u64>(), word in 0..90_usize,
    ) {
        for (at, value) in [(0, b'Q'), (1, b'F'), (2, b'I'), (3, 0xfb), (7, version), (23, bits)] {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
        for at in [4..7, 20..23, 72..80, 8 * word..8 * word + 8] {
            bytes.get_mut(at).unwrap_or_default().fill(0);
        }
        let _ = HeaderCluster::decode(&bytes, len, &Limits::default());
        let _ = Header::decode(&bytes, len, &Limits::default());
    }

    #[test]
    fn a_changed_header_is_what_decodes_afterwards(
        sketch in sketch(),
        name in proptest::option::of(vec(any::<u8>(), 1..80)),
        format in proptest::option::of(vec(any::<u8>(), 1..16)),
        extra in vec(any::<u8>(), 0..40),
    ) {
        let (bytes, _) = sketch.build();
        prop_assume!(bytes.len() <= 1 << sketch.cluster_bits);
        let mut changed = decode(&bytes).expect("it is well-formed");
        changed.set_backing(name.as_deref(), format.as_deref());
        changed.set_extension(Extension::Unknown { kind: 7, data: extra });
        let Ok(encoded) = changed.encode() else {
            let need = bytes.len() + 80 + 80 + 24;
            prop_assert!(need > 1 << sketch.cluster_bits, "there is room");
            return Ok(());
        };
        for new in [encoded, changed.encode_over(&bytes).unwrap()] {
            let again = decode(&new).expect("it decodes");
            prop_assert_eq!(&again.extensions, &changed.extensions);
            prop_assert_eq!(&again.backing_file, &changed.backing_file);
            prop_assert_eq!(again.header.size, changed.header.size);
        }
    }

    #[test]
    fn writing_the_changed_sectors_gives_the_new_bytes(
        old in vec(0..2_u8, 0..LONG), new in vec(0..2_u8, 0..LONG), same in any::<prop::sample::Index>(),
    ) {
        let mut new = new;
        let keep = same.index(old.len().min(new.len()) + 1);
        new[..keep].copy_from_slice(&old[..keep]);
        let mut file = old.clone();
        file.resize(old.len().max(new.len()), 0xee);
        let ranges = HeaderCluster::changed_sectors(&old, &new);
        for range in &ranges {
            prop_assert!(range.start % 512 == 0 && range.start >= keep / 512 * 512);
            file[range.clone()].copy_from_slice(&new[range.clone()]);
        }
        prop_assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
        prop_assert_eq!(&file[..new.len()], &new[..]);
    }
}

/// Changes a number of `len` bytes in a well-formed header with everything in it.
fn rejected(at: usize, value: u64, len: usize) -> String {
    let (mut bytes, _) = Sketch::default().build();
    bytes[at..at + len].copy_from_slice(&value.to_be_bytes()[8 - len..]);
    decode(&bytes).expect_err("it is refused").to_string()
}

#[test]
fn each_wrong_field_is_named_with_place_and_value() {
    let cases: &[(usize, u64, usize, &str)] = &[
        (0, 0, 4, "header at 0x0: magic is 0x00000000, expected 0x514649fb, qcow2"),
        (4, 1, 4, "version 1 in the header at 0x4 (2 and 3 are known) is not supported"),
        (4, 4, 4, "version 4 in the header"),
        (8, 103, 8, "header at 0x8: backing_file_offset is 0x67, expected 0x70 to 0x10000, in the first cluster"),
        (8, 0x10001, 8, "header at 0x8: backing_file_offset is 0x10001"),
        (8, 116, 8, "first cluster at 0x70: header extension is cut off, expected 8 bytes"),
        (20, 8, 4, "header at 0x14: cluster_bits is 8, expected 9 to 21"),
        (20, 22, 4, "header at 0x14: cluster_bits is 22"),
        (24, 1 << 63, 8, "header at 0x18: size is 9223372036854775808, expected at most 9223372036854775807"),
        (24, (1 << 29) + 1, 8, "header at 0x24: l1_size is 1, expected at least 2 for a size of 536870913"),
        (32, 3, 4, "crypt_method 3 in the header at 0x20"),
        (32, 2, 4, "header at 0x20: crypt_method is 2 without an encryption header"),
        (36, 0, 4, "header at 0x24: l1_size is 0, expected at least 1"),
        (36, 4_194_305, 4, "header: L1 table bytes is 33554440, the limit is 33554432"),
        (
            40,
            0x3_0200,
            8,
            "header at 0x28: l1_table_offset is 0x30200, expected a multiple of the cluster size 0x10000",
        ),
        (40, 0, 8, "header at 0x28: l1_table_offset is 0x0, expected behind the header"),
        (
            40,
            0x7fff_ffff_ffff_0000 + 0x10000,
            8,
            "header at 0x28: l1_table_offset is 0x8000000000000000, expected at most",
        ),
        (48, 0, 8, "header at 0x30: refcount_table_offset is 0x0, expected behind the header"),
        (48, 1, 8, "header at 0x30: refcount_table_offset is 0x1"),
        (48, 0x7fff_ffff_ffff_0000, 8, "header at 0x30: refcount_table_offset is 0x7fffffffffff0000"),
        (56, 0, 4, "header at 0x38: refcount_table_clusters is 0, expected at least 1"),
        (56, 129, 4, "header: refcount table bytes is 8454144, the limit is 8388608"),
        (60, 1, 4, "header at 0x40: snapshots_offset is 0x0, expected behind the header"),
        (64, 512, 8, "header at 0x40: snapshots_offset is 0x200, expected a multiple"),
        (72, 0x20, 8, "bit 5 of the incompatible_features 0x20 in the header at 0x48"),
        (72, 8, 8, "header at 0x68: compression_type is 0 or absent, expected not 0"),
        (88, 1, 8, "header at 0x58: autoclear_features is 0x1, expected no bitmaps bit without"),
        (88, 2, 8, "header at 0x58: autoclear_features is 0x2, expected no raw external data without"),
        (96, 7, 4, "header at 0x60: refcount_order is 7, expected at most 6"),
        (100, 103, 4, "header at 0x64: header_length is 103, expected a multiple of 8 from 104"),
        (100, 108, 4, "header at 0x64: header_length is 108"),
        (100, 0x10008, 4, "header at 0x64: header_length is 65544"),
        (104, 1, 1, "header at 0x68: compression_type is 1, expected 0 or absent"),
    ];
    for &(at, value, len, expected) in cases {
        let error = rejected(at, value, len);
        assert!(error.contains(expected), "{at}: {error}");
    }
    let mut big = Sketch { cluster_bits: 9, ..Sketch::default() }.build().0;
    big[24..32].copy_from_slice(&(1_u64 << 50).to_be_bytes());
    assert_eq!(decode(&big).unwrap_err(), FormatError::limit("header", "L1 entries for size", 1 << 35, 0x7fff_ffff));
}

#[test]
fn unknown_features_go_by_the_names_of_the_image() {
    let mut table = vec![0, 5];
    table.extend(b"wor\x1bmhole");
    table.resize(48, 0);
    let sketch =
        Sketch { extensions: vec![(9, vec![1; 3], 1), (Extension::FEATURE_NAMES, table, 0)], ..Sketch::default() };
    let error = Sketch { incompatible: 0x60, ..sketch }.decode().unwrap_err().to_string();
    assert!(error.starts_with("\"wor\\u{1b}mhole\" (bit 5), bit 6 of the incompatible_features 0x60"), "{error}");
}

#[test]
fn extensions_that_break_the_rules_are_refused() {
    let refuse = |extensions: Vec<_>, autoclear, crypt_method, expected: &str| {
        let error =
            Sketch { crypt_method, extensions, autoclear, ..Sketch::default() }.decode().unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    let format = |len| (Extension::BACKING_FORMAT, vec![b'x'; len], 0);
    refuse(vec![format(16)], 0, 0, "header extension at 0x70: backing format length is 16, expected at most 15");
    refuse(vec![format(3), format(3)], 0, 0, "header extension at 0x80: type is 0xe2792aca again");
    refuse(vec![(77, vec![], 0), (77, vec![], 0)], 0, 0, "type is 0x0000004d again, expected each type once");
    refuse(vec![crypto(0x50000, 1)], 0, 0, "crypt_method is not 2, with an encryption header");
    refuse(vec![crypto(0x50000, 1)], 0, 1, "crypt_method is not 2, with an encryption header");
    refuse(vec![crypto(0x50001, 1)], 0, 2, "encryption header pointer at 0x78: offset is 0x50001");
    refuse(vec![(Extension::CRYPTO, vec![0; 15], 0)], 0, 2, "extension length is 15, expected 16");
    refuse(vec![bitmaps(0, 1, 0x50000)], 1, 0, "bitmaps extension at 0x78: nb_bitmaps is 0");
    refuse(vec![bitmaps(1, 0, 0x50000)], 1, 0, "bitmaps extension at 0x80: bitmap_directory_size is 0");
    refuse(vec![bitmaps(1, 1, 0x50001)], 1, 0, "bitmaps extension at 0x88: bitmap_directory_offset is 0x50001");
    refuse(vec![bitmaps(65_536, 1, 0x50000)], 1, 0, "nb_bitmaps is 65536, the limit is 65535");
    refuse(vec![bitmaps(1, 67_107_841, 0x50000)], 1, 0, "bitmap_directory_size is 67107841, the limit is 67107840");
    refuse(vec![(Extension::BITMAPS, vec![0; 23], 0)], 1, 0, "bitmaps extension at 0x78: length is 23, expected 24");
    let mut reserved = bitmaps(1, 1, 0x50000);
    reserved.1[7] = 1;
    refuse(vec![reserved], 1, 0, "bitmaps extension at 0x7c: reserved is 0x1, expected 0");

    let (mut bytes, end) = Sketch { extensions: vec![(9, vec![0; 8], 0)], ..Sketch::default() }.build();
    bytes[116..120].copy_from_slice(&0xffff_ffff_u32.to_be_bytes());
    assert!(decode(&bytes).unwrap_err().to_string().contains("extension length is 4294967295, expected at most 65416"));
    bytes[116..120].copy_from_slice(&9_u32.to_be_bytes());
    assert_eq!(end, 136);
    bytes.truncate(124);
    let error = decode(&bytes).unwrap_err().to_string();
    assert_eq!(error, "first cluster at 0x78: extension data is cut off after 4 bytes, expected 9 bytes");
}

#[test]
fn bitmaps_that_nobody_vouches_for_are_kept_and_not_believed() {
    let bad = bitmaps(0, 0, 3);
    let cluster = Sketch { extensions: vec![bad.clone()], ..Sketch::default() }.decode().unwrap();
    assert_eq!(cluster.extensions, [Extension::Unknown { kind: Extension::BITMAPS, data: bad.1 }]);
    assert_eq!((cluster.bitmaps(), cluster.bitmaps_consistent()), (None, false));
    let good = Sketch { extensions: vec![bitmaps(1, 40, 0x50000)], ..Sketch::default() };
    let cluster = good.decode().unwrap();
    assert!(cluster.bitmaps().is_some() && !cluster.bitmaps_consistent());
    assert!(Sketch { autoclear: AutoclearFeatures::BITMAPS, ..good }.decode().unwrap().bitmaps_consistent());
}

#[test]
fn a_name_without_room_for_a_marker_stays_until_extensions_push_it() {
    // As programs from before the extensions wrote: the name right behind 72 bytes.
    let sketch = Sketch { version: 2, marker: None, name: b"base.img".to_vec(), ..Sketch::default() };
    let (bytes, _) = sketch.build();
    let mut cluster = decode(&bytes).unwrap();
    assert_eq!(cluster.header.backing_file_offset, 72);
    assert_eq!(cluster.encode().unwrap(), bytes);
    cluster.set_backing(Some(b"base.img"), Some(b"raw"));
    let encoded = cluster.encode_over(&bytes).unwrap();
    let again = decode(&encoded).unwrap();
    assert_eq!((again.header.backing_file_offset, again.backing_format()), (96, Some(&b"raw"[..])));
    cluster.set_backing(None, Some(b"raw"));
    let encoded = cluster.encode_over(&encoded).unwrap();
    let again = decode(&encoded).unwrap();
    assert_eq!((again.header.backing_file_offset, again.header.backing_file_size, again.extensions.len()), (0, 0, 0));
    assert!(encoded[72..].iter().all(|&byte| byte == 0), "the old name and extension are gone");
}

#[test]
fn names_are_limited_and_must_fit() {
    let name = |len| Sketch { name: vec![b'n'; len], ..Sketch::default() };
    assert!(name(1023).decode().is_ok());
    assert_eq!(name(1024).decode().unwrap_err(), FormatError::limit("header", "backing_file_size", 1024, 1023));
    let (mut bytes, _) = name(10).build();
    bytes.truncate(bytes.len() - 1);
    assert!(decode(&bytes).unwrap_err().to_string().contains("backing file name is cut off after 9 bytes"));

    let mut small = Sketch { cluster_bits: 9, ..Sketch::default() }.decode().unwrap();
    small.set_backing(Some(&[b'n'; 392]), None);
    assert_eq!(small.encode().unwrap().len(), 512);
    small.set_backing(Some(&[b'n'; 393]), None);
    let field = "header, extensions and backing file name";
    assert_eq!(small.encode().unwrap_err(), FormatError::limit("first cluster", field, 513, 512));
    small.set_backing(None, None);
    small.set_extension(Extension::Unknown { kind: 1, data: vec![1; 392] });
    let full = small.encode().unwrap();
    assert_eq!((full.len(), decode(&full).unwrap().extensions), (512, small.extensions.clone()));
    small.set_extension(Extension::Unknown { kind: 1, data: vec![1; 393] });
    assert!(small.encode().is_err());
}

#[test]
fn what_decoding_would_refuse_is_not_encoded() {
    let fresh = Sketch::default().decode().unwrap();
    let refused = |change: &dyn Fn(&mut HeaderCluster)| {
        let mut cluster = fresh.clone();
        change(&mut cluster);
        cluster.encode().unwrap_err().to_string()
    };
    assert!(refused(&|c| c.backing_file = Some(Vec::new())).contains("backing_file_size is 0"));
    assert!(refused(&|c| c.header.version = Version::V2).contains("version is 2"));
    assert!(refused(&|c| c.header.incompatible_features.0 = 1 << 40).contains("bit 40"));
    assert!(refused(&|c| c.header.header_length = u32::MAX).contains("header_length"));
    assert!(refused(&|c| c.header.l1_table_offset = HostOffset::new(5)).contains("l1_table_offset"));
    assert!(refused(&|c| c.set_extension(Extension::Unknown { kind: 0, data: vec![] })).contains("type is 0x00000000"));
    let format = Extension::Unknown { kind: Extension::BACKING_FORMAT, data: vec![] };
    assert!(refused(&|c| c.set_extension(format.clone())).contains("as an unknown one"));
    assert!(refused(&|c| c.header.additional = vec![0; 70_000]).contains("header_length is"));
    let mut small = Sketch { cluster_bits: 13, ..Sketch::default() }.decode().unwrap();
    small.header.incompatible_features.0 = IncompatibleFeatures::EXTENDED_L2;
    assert!(small.encode().unwrap_err().to_string().contains("cluster_bits is 13, expected at least 14"));
}

#[test]
fn a_short_header_grows_for_a_compression_type() {
    let mut cluster = Sketch { additional: Vec::new(), ..Sketch::default() }.decode().unwrap();
    assert_eq!((cluster.header.header_length, cluster.encode().unwrap().len()), (104, 112));
    cluster.header.compression_type = CompressionType::Zstd;
    cluster.header.incompatible_features.0 |= IncompatibleFeatures::COMPRESSION;
    let again = decode(&cluster.encode().unwrap()).unwrap();
    assert_eq!((again.header.header_length, again.header.compression_type), (112, CompressionType::Zstd));
}

#[test]
fn extensions_of_a_new_image_come_in_order() {
    let kinds = |version, bits, crypto| {
        let header = Header::new(version, ClusterBits::new(bits).unwrap(), 0);
        let list = Extension::for_new_image(&header, Some(b"raw"), Some(b"d"), crypto);
        list.iter().map(Extension::kind).collect::<Vec<_>>()
    };
    let (format, file, names) = (Extension::BACKING_FORMAT, Extension::DATA_FILE, Extension::FEATURE_NAMES);
    let luks = Some(CryptoHeader { offset: HostOffset::new(0x40000), length: 1 });
    assert_eq!(kinds(Version::V3, 16, luks), [format, file, Extension::CRYPTO, names]);
    assert_eq!(kinds(Version::V3, 12, None), [format, file]);
    assert_eq!(kinds(Version::V2, 16, None), [format, file]);

    let mut cluster = Sketch { extensions: vec![(5, vec![], 0)], ..Sketch::default() }.decode().unwrap();
    for kind in [names, format, file] {
        let data = vec![b'x'];
        cluster.set_extension(match kind {
            Extension::BACKING_FORMAT => Extension::BackingFormat(data),
            Extension::DATA_FILE => Extension::DataFile(data),
            _ => Extension::FeatureNames(data),
        });
    }
    assert_eq!(cluster.extensions.iter().map(Extension::kind).collect::<Vec<_>>(), [format, file, names, 5]);
}

#[test]
fn sizes_are_whole_sectors_to_the_guest_and_exact_in_the_file() {
    let cluster = Sketch::default().decode().unwrap();
    assert_eq!((cluster.header.size, cluster.header.virtual_size()), (1000, 512));
    let limits = Limits::default().with_max_virtual_size(511);
    let (bytes, _) = Sketch::default().build();
    let error = HeaderCluster::decode(&bytes, bytes.len() as u64, &limits).unwrap_err();
    assert_eq!(error, FormatError::limit("header", "size", 512, 511));
}
