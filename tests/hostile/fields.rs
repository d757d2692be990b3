//! Every field of every structure, set to every value that might break something.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;

use qcow2_chain::chain::{Chain, Layer, Node};
use qcow2_chain::format::{
    AutoclearFeatures, BitmapDirectoryEntry, BitmapsExtension, ClusterBits, Extension, GuestOffset, HeaderCluster,
    HostOffset, Limits, SnapshotEntry, Version, encode_bitmap_directory, encode_snapshots,
};
use qcow2_chain::image::{CreateOptions, Fix, Image, OpenOptions, RawImage};
use qcow2_chain::merge::{ConvertOptions, ConvertTarget, convert};
use qcow2_chain::storage::MemoryStorage;

use super::treat::{checked, clusters, file, holds, repair, said, treat_by_turns};

/// What a small image may take beside its file: the caches, and what merges hold of their data.
const MEMORY: usize = 24 << 20;

/// A field: what it is called, where it stands, how wide it is, and where its structure starts.
struct Field {
    name: String,
    at: usize,
    width: usize,
    structure: u64,
}

/// An image with everything in it: plain, zeroed and compressed clusters, a snapshot, a bitmap.
struct Rich {
    bytes: Vec<u8>,
    cluster: usize,
    extended: bool,
    version: Version,
}

fn number(bytes: &[u8], at: usize, width: usize) -> u64 {
    bytes.get(at..at + width).unwrap_or_default().iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

impl Rich {
    fn new(version: Version, extended: bool) -> Self {
        let bits = if extended { 14 } else { 12 };
        let cluster = 1 << bits;
        let content: Vec<u8> = (0..16 * cluster).map(|at| u8::try_from(at / cluster + 1).unwrap()).collect();
        let source = RawImage::open(file(&content)).expect("a raw image");
        let chain = Chain::from_layers(Layer { node: Node::Raw(source), path: PathBuf::from("source") }, []);
        let options = CreateOptions::new(0)
            .with_version(version)
            .with_cluster_bits(ClusterBits::new(bits).unwrap())
            .with_extended_l2(extended);
        let target = Arc::new(MemoryStorage::new("rich"));
        let how = ConvertOptions::default().with_compress(true).with_threads(1);
        convert(&chain, ConvertTarget::Qcow2(target.clone(), options), &how, &()).expect("converted");
        let image = Image::open(target.clone(), &OpenOptions::default().with_write(true)).expect("opened");
        let at = |number: usize| GuestOffset::new((number * cluster) as u64);
        image.write_at(&vec![0xd1; 4 * cluster], at(4)).expect("written");
        image.write_zeroes_at(at(6), cluster as u64).expect("zeroed");
        image.discard_at(at(9), cluster as u64).expect("discarded");
        image.close().expect("closed");
        let mut rich = Self { bytes: target.to_vec(), cluster, extended, version };
        rich.add_snapshot();
        if version == Version::V3 {
            rich.add_bitmap();
        }
        let storage = file(&rich.bytes);
        let report = checked(&storage, Fix::All).expect("repaired");
        assert!(report.is_clean(), "{report:?}");
        rich.bytes = storage.to_vec();
        rich
    }

    fn head(&self) -> HeaderCluster {
        HeaderCluster::decode(&self.bytes, self.bytes.len() as u64, &Limits::default()).expect("a sound header")
    }

    fn set_head(&mut self, head: &HeaderCluster) {
        let first = head.encode_over(&self.bytes[..self.cluster]).expect("it fits");
        self.bytes[..first.len()].copy_from_slice(&first);
    }

    /// Puts a structure behind the end of the file.
    fn append(&mut self, structure: &[u8]) -> HostOffset {
        let at = self.bytes.len().next_multiple_of(self.cluster);
        self.bytes.resize(at, 0);
        self.bytes.extend_from_slice(structure);
        self.bytes.resize((at + structure.len()).next_multiple_of(self.cluster), 0);
        HostOffset::new(at as u64)
    }

    fn add_snapshot(&mut self) {
        let mut head = self.head();
        let (l1, len) = (self.l1(), 8 * usize::try_from(head.header.l1_size).unwrap());
        let copy = self.bytes[l1..l1 + len].to_vec();
        let mut extra_data = vec![0; 24];
        extra_data[8..16].copy_from_slice(&head.header.size.to_be_bytes());
        extra_data[16..].fill(0xff);
        let entry = SnapshotEntry {
            l1_table_offset: self.append(&copy),
            l1_size: head.header.l1_size,
            id: b"1".to_vec(),
            name: b"before".to_vec(),
            date_sec: 1,
            date_nsec: 2,
            vm_clock_nsec: 3,
            vm_state_size: 0,
            extra_data,
        };
        head.header.snapshots_offset = self.append(&encode_snapshots(&[entry]));
        head.header.nb_snapshots = 1;
        self.set_head(&head);
    }

    fn add_bitmap(&mut self) {
        let data = self.append(&vec![0xff; self.cluster]);
        let table = self.append(&data.get().to_be_bytes());
        let directory = encode_bitmap_directory(&[BitmapDirectoryEntry {
            bitmap_table_offset: table,
            bitmap_table_size: 1,
            flags: 0,
            kind: 1,
            granularity_bits: 16,
            name: b"dirty".to_vec(),
            extra_data: Vec::new(),
        }]);
        let mut head = self.head();
        head.set_extension(Extension::Bitmaps(BitmapsExtension {
            nb_bitmaps: 1,
            bitmap_directory_size: directory.len() as u64,
            bitmap_directory_offset: self.append(&directory),
        }));
        head.header.autoclear_features.0 |= AutoclearFeatures::BITMAPS;
        self.set_head(&head);
    }

    fn number(&self, at: usize, width: usize) -> u64 {
        number(&self.bytes, at, width)
    }

    /// The offset in an entry of 8 bytes.
    fn offset(&self, at: usize) -> usize {
        usize::try_from(self.number(at, 8) & 0x00ff_ffff_ffff_fe00).unwrap()
    }

    fn l1(&self) -> usize {
        self.offset(40)
    }

    fn fields(&self) -> Vec<Field> {
        let mut fields = Vec::new();
        let mut add = |name: &str, at: usize, width: usize, structure: usize| {
            fields.push(Field { name: format!("{name} at {at:#x}"), at, width, structure: structure as u64 });
        };
        let narrow = [4, 16, 20, 32, 36, 56, 60];
        for at in narrow {
            add("header", at, 4, 0);
        }
        for at in [8, 24, 40, 48, 64] {
            add("header", at, 8, 0);
        }
        let mut extension = 72;
        if self.version == Version::V3 {
            for at in [72, 80, 88] {
                add("header", at, 8, 0);
            }
            add("header", 96, 4, 0);
            add("header", 100, 4, 0);
            add("header", 104, 1, 0);
            extension = usize::try_from(self.number(100, 4)).unwrap();
        }
        loop {
            let len = usize::try_from(self.number(extension + 4, 4)).unwrap();
            add("extension type", extension, 4, 0);
            add("extension length", extension + 4, 4, 0);
            for at in (extension + 8..extension + 8 + len.min(32)).step_by(4) {
                add("extension data", at, 4, 0);
            }
            for at in (extension + 8..extension + 8 + len.min(32)).step_by(8) {
                add("extension data", at, 8, 0);
            }
            if self.number(extension, 4) == 0 {
                break;
            }
            extension += 8 + len.next_multiple_of(8);
        }
        self.table_fields(&mut add);
        fields
    }

    fn table_fields(&self, add: &mut dyn FnMut(&str, usize, usize, usize)) {
        let l1 = self.l1();
        add("L1 entry", l1, 8, l1);
        let l2 = self.offset(l1);
        for number in 0..11 {
            for word in 0..if self.extended { 2 } else { 1 } {
                let at = l2 + if self.extended { 16 * number + 8 * word } else { 8 * number };
                add(if word == 0 { "L2 entry" } else { "L2 bitmap" }, at, 8, l2);
            }
        }
        let reftable = self.offset(48);
        for number in 0..3 {
            add("refcount table entry", reftable + 8 * number, 8, reftable);
        }
        let block = self.offset(reftable);
        for number in 0..24 {
            add("refcount", block + 2 * number, 2, block);
        }
        let snapshots = self.offset(64);
        for (at, width) in [(0, 8), (8, 4), (12, 2), (14, 2), (16, 4), (24, 8), (32, 4), (36, 4), (40, 8), (48, 8)] {
            add("snapshot", snapshots + at, width, snapshots);
        }
        let snapshot_l1 = self.offset(snapshots);
        add("snapshot L1 entry", snapshot_l1, 8, snapshot_l1);
        if let Some(bitmaps) = self.head().bitmaps() {
            let directory = usize::try_from(bitmaps.bitmap_directory_offset.get()).unwrap();
            for (at, width) in [(0, 8), (8, 4), (12, 4), (16, 1), (17, 1), (18, 2), (20, 4), (24, 4)] {
                add("bitmap", directory + at, width, directory);
            }
            let table = self.offset(directory);
            add("bitmap table entry", table, 8, table);
        }
    }

    /// What a field may be set to: bounds, its neighbours, and, where it may be an offset, every place that is none of its
    /// business, with the flags that it has and without.
    fn values(&self, field: &Field) -> Vec<u64> {
        let max = u64::MAX >> (64 - 8 * field.width);
        let old = self.number(field.at, field.width);
        let mut values = vec![0, 1, max, max / 2, max / 2 + 1, old.wrapping_add(1), old.wrapping_sub(1), old << 1];
        values.extend((0..8 * field.width).step_by(if field.width == 8 { 7 } else { 3 }).map(|bit| old ^ 1 << bit));
        if field.width == 8 {
            let (cluster, len) = (self.cluster as u64, self.bytes.len() as u64);
            let flags = old & !0x00ff_ffff_ffff_fe00;
            let places = [
                field.structure,
                field.structure + cluster / 2,
                cluster / 2,
                self.l1() as u64,
                self.offset(self.l1()) as u64,
                self.offset(48) as u64,
                self.offset(self.offset(48)) as u64,
                self.offset(64) as u64,
                len - cluster,
                len,
                len + 16 * cluster,
                1 << 55,
                (1 << 56) - cluster,
                (1 << 63) - cluster,
            ];
            values
                .extend(places.into_iter().flat_map(|place| [place, place | flags, place | 1 << 63, place | 1 << 62]));
        }
        values.iter_mut().for_each(|value| *value &= max);
        values.sort_unstable();
        values.dedup();
        values.retain(|value| *value != old);
        values
    }

    fn with(&self, field: &Field, value: u64) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes[field.at..field.at + field.width].copy_from_slice(&value.to_be_bytes()[8 - field.width..]);
        bytes
    }
}

/// Sets each field of one shape to each value, and does everything with the image.
fn all_fields(version: Version, extended: bool, part: usize, parts: usize) {
    let rich = Rich::new(version, extended);
    // Data alone: zeroes may be read by chance, from tables that are none.
    let model: Vec<_> = clusters(&file(&rich.bytes))
        .into_iter()
        .map(|data| data.filter(|data| data.iter().any(|byte| *byte != 0)))
        .collect();
    assert_eq!(model.iter().flatten().count(), 14, "all but the zeroed and the discarded cluster");
    let (mut cases, mut refused, mut repaired) = (0_usize, 0, 0);
    for field in rich.fields().iter().skip(part).step_by(parts) {
        for value in
            rich.values(field).into_iter().enumerate().filter(|case| is_chosen(field, *case)).map(|case| case.1)
        {
            let mut what = String::new();
            let _ = write!(what, "{} = {value:#x} ({version:?}, extended {extended})", field.name);
            let damaged = rich.with(field, value);
            let caught = std::panic::catch_unwind(|| {
                let outcomes = treat_by_turns(&what, &damaged, MEMORY, cases);
                let clean = checked(&file(&damaged), Fix::Nothing).is_ok_and(|report| report.is_clean());
                let storage = file(&damaged);
                let fix = if cases % 4 == 0 { Fix::Leaks } else { Fix::All };
                let mended = repair(&storage, fix, &model).is_ok();
                let same = holds(&storage, &damaged) || is_cleared(field) || is_told_behind(&damaged, fix);
                assert!(!clean || same, "a clean image is changed");
                (said(&outcomes, "look").is_err(), mended)
            });
            let Ok((error, mended)) = caught else { panic!("{what}") };
            cases += 1;
            refused += usize::from(error);
            repaired += usize::from(mended);
        }
    }
    println!("{version:?}, extended {extended}: {cases} cases, {refused} refused, {repaired} clean after a repair");
    assert!(refused > 0 && repaired > 0);
}

/// Whether a value is tried: the bounds always, of the others one in six, another one for each field; all where
/// `QCOW2_CHAIN_HOSTILE_ALL` is set.
fn is_chosen(field: &Field, (number, value): (usize, u64)) -> bool {
    let max = u64::MAX >> (64 - 8 * field.width);
    let bound = [0, 1, max, max / 2].contains(&value);
    bound || (number + field.at / 4).is_multiple_of(6) || std::env::var_os("QCOW2_CHAIN_HOSTILE_ALL").is_some()
}

/// Whether a repair tells that it clears refcounts behind the end of the file, which no check finds, and of nothing else.
fn is_told_behind(image: &[u8], fix: Fix) -> bool {
    checked(&file(image), fix).is_ok_and(|report| {
        report.leaks_fixed > 0 && report.findings.iter().all(|finding| finding.offset >= image.len() as u64)
    })
}

/// Unknown autoclear bits are cleared by whoever writes, and so are the dirty and the corrupt bit of what is sound.
fn is_cleared(field: &Field) -> bool {
    field.name.starts_with("header at 0x58") || field.name.starts_with("header at 0x48")
}

#[test]
fn version_3_first_half() {
    all_fields(Version::V3, false, 0, 2);
}

#[test]
fn version_3_second_half() {
    all_fields(Version::V3, false, 1, 2);
}

#[test]
fn version_2() {
    all_fields(Version::V2, false, 0, 1);
}

#[test]
fn extended_l2_first_half() {
    all_fields(Version::V3, true, 0, 2);
}

#[test]
fn extended_l2_second_half() {
    all_fields(Version::V3, true, 1, 2);
}
