//! Writes the corpora that fuzzing begins with: images, tables, chains and records made by the library itself, with what the
//! targets do not make alone (compressed clusters, internal snapshots, bitmaps). Each seed is decoded again as its target does
//! it, and must be what was meant: a seed that is refused at the door would be worth nothing.
//!
//!     cargo run --manifest-path fuzz/Cargo.toml --example seeds -- fuzz/corpus

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arbitrary::{Arbitrary, Unstructured};
use qcow2_chain::chain::{Chain, Layer, Node};
use qcow2_chain::format::{
    AutoclearFeatures, BitmapDirectoryEntry, BitmapsExtension, ClusterBits, CompressionType, Extension, GuestOffset,
    HeaderCluster, HostOffset, L2Table, Limits, SnapshotEntry, Version, decode_bitmap_directory, decode_snapshots,
    encode_bitmap_directory, encode_snapshots,
};
use qcow2_chain::image::{CheckOptions, CreateOptions, Fix, Image, OpenOptions, RawImage, check};
use qcow2_chain::merge::{ConvertOptions, ConvertTarget, convert};
use qcow2_chain::storage::MemoryStorage;
use qcow2_chain::vm::{Catalogue, SnapshotSet};
use qcow2_chain_fuzz::inputs::{Bytes, Compressed, Files, Header, Merges, Records, Repair, Tables, Walk, Write};
use qcow2_chain_fuzz::records::{CATALOGUE, worlds};
use qcow2_chain_fuzz::{Hostile, limits};

/// The places in a header where tables stand.
const L1_TABLE: usize = 40;
const REFCOUNT_TABLE: usize = 48;

fn main() {
    let corpus = PathBuf::from(std::env::args_os().nth(1).expect("the directory of the corpora"));
    let mut written = 0;
    for (target, seeds) in all() {
        let directory = corpus.join(target);
        fs::create_dir_all(&directory).expect("a directory is made");
        for (number, seed) in seeds.iter().enumerate() {
            fs::write(directory.join(format!("seed-{number:03}")), seed).expect("a seed is written");
        }
        println!("{target}: {}", seeds.len());
        written += seeds.len();
    }
    println!("{written} seeds in {}", corpus.display());
}

fn all() -> Vec<(&'static str, Vec<Vec<u8>>)> {
    let images = images(None);
    vec![
        ("header_decode", images.iter().map(|image| header_decode(image)).collect()),
        ("tables_decode", images.iter().flat_map(|image| tables_decode(image)).collect()),
        ("open_and_walk", images.iter().flat_map(|image| open_and_walk(image)).collect()),
        ("open_and_write", images.iter().flat_map(|image| open_and_write(image)).collect()),
        ("repair", images.iter().flat_map(|image| repair(image)).collect()),
        ("chain_open", chain_open()),
        ("read_compressed", read_compressed()),
        ("merge", merge()),
        ("journal_and_catalogue", journal_and_catalogue()),
    ]
}

/// A value of the input type of a target, as the fuzzer makes it.
fn decoded<'a, T: Arbitrary<'a>>(seed: &'a [u8]) -> T {
    T::arbitrary_take_rest(Unstructured::new(seed)).expect("a seed is long enough")
}

/// The bytes that `arbitrary` makes a value of, front to back.
#[derive(Clone, Default)]
struct Seed(Vec<u8>);

impl Seed {
    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn u8(self, value: u8) -> Self {
        self.bytes(&[value])
    }

    fn u16(self, value: u16) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    fn u32(self, value: u32) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    fn u64(self, value: u64) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    fn bool(self, value: bool) -> Self {
        self.u8(value.into())
    }

    /// A variant of a derived enum: 32 bits that are scaled to the number of variants.
    fn variant(self, index: u64, of: u64) -> Self {
        self.u32(u32::try_from((index << 32).div_ceil(of)).expect("a variant that there is"))
    }

    /// An image whose bytes are these, and which is left as it is.
    fn given(self, image: &[u8]) -> Self {
        self.given_to_change(image).u64(0).u8(1)
    }

    fn given_to_change(self, image: &[u8]) -> Self {
        self.u8(7).u32(u32::try_from(image.len()).expect("a small image")).bytes(image)
    }

    /// A write in a vector of steps.
    fn write(self, offset: u32, len: u16, byte: u8) -> Self {
        self.bool(true).variant(0, 3).u32(offset).u16(len).u8(byte)
    }

    /// Zeroes or a discard in a vector of steps.
    fn unmap(self, discard: bool, offset: u32, len: u32) -> Self {
        self.bool(true).variant(1 + u64::from(discard), 3).u32(offset).u32(len)
    }

    fn end(self) -> Self {
        self.bool(false)
    }

    /// Ends with the length of the slice that was put behind so many bytes.
    fn with_slice_at(mut self, front: usize, len: usize) -> Vec<u8> {
        let behind = self.0.len() - front;
        let len = u16::try_from(len).expect("a short slice").to_be_bytes();
        self.0.extend_from_slice(if behind < 256 { &len[1..] } else { &len });
        self.0
    }
}

/// An image while structures are put behind its end.
struct Rich {
    bytes: Vec<u8>,
    cluster: usize,
}

/// Images of all shapes, over another or not: empty, plain, and with everything in it.
fn images(backing: Option<&str>) -> Vec<Vec<u8>> {
    let shapes = [(Version::V2, 9, false), (Version::V3, 9, false), (Version::V3, 12, false), (Version::V3, 14, true)];
    let mut images = Vec::new();
    for (version, bits, extended) in shapes {
        for zstd in [false, true] {
            let mut options = CreateOptions::new(0)
                .with_version(version)
                .with_cluster_bits(ClusterBits::new(bits).expect("a size of clusters"))
                .with_extended_l2(extended);
            if zstd && version == Version::V3 {
                options.compression_type = CompressionType::Zstd;
            } else if zstd {
                continue;
            }
            images.push(Rich::new(options.clone(), backing));
            if bits == 9 {
                images.push(plain(options.with_size(8192), backing));
            }
        }
    }
    images
}

fn plain(mut options: CreateOptions, backing: Option<&str>) -> Vec<u8> {
    options.backing = backing.map(|name| (name.into(), b"qcow2".to_vec()));
    let storage = Arc::new(MemoryStorage::new("plain"));
    let image = Image::create(storage.clone(), &options).expect("created");
    image.write_at(&[0xa1; 1024], GuestOffset::new(512)).expect("written");
    image.write_zeroes_at(GuestOffset::new(4096), 512).expect("zeroed");
    image.close().expect("closed");
    storage.to_vec()
}

/// An image of so many clusters of content, all compressed.
fn compressed(options: CreateOptions, clusters: usize) -> Arc<MemoryStorage> {
    let cluster = 1 << options.cluster_bits.get();
    let content: Vec<u8> = (0..clusters * cluster).map(|at| (at / cluster + 1) as u8).collect();
    let source = RawImage::open(Arc::new(MemoryStorage::with_bytes("source", &content))).expect("a raw image");
    let chain = Chain::from_layers(Layer { node: Node::Raw(source), path: PathBuf::from("source") }, []);
    let target = Arc::new(MemoryStorage::new("compressed"));
    let how = ConvertOptions::default().with_compress(true).with_threads(1);
    convert(&chain, ConvertTarget::Qcow2(target.clone(), options), &how, &()).expect("converted");
    target
}

impl Rich {
    /// Plain, zeroed, discarded and compressed clusters, a snapshot and, in version 3, a bitmap.
    fn new(options: CreateOptions, backing: Option<&str>) -> Vec<u8> {
        let (cluster, version) = (1 << options.cluster_bits.get(), options.version);
        let storage = compressed(options, if cluster < 16 << 10 { 16 } else { 4 });
        let image = Image::open(storage.clone(), &OpenOptions::default().with_write(true)).expect("opened");
        let at = |number: usize| GuestOffset::new((number * cluster) as u64);
        image.write_at(&vec![0xd1; cluster + 512], at(1)).expect("written");
        image.write_zeroes_at(at(3), cluster as u64 / 2).expect("zeroed");
        image.discard_at(at(3), cluster as u64).expect("discarded");
        image.close().expect("closed");
        let mut rich = Self { bytes: storage.to_vec(), cluster };
        rich.add_snapshot();
        if version == Version::V3 {
            rich.add_bitmap();
        }
        let mut head = rich.head();
        head.set_backing(backing.map(str::as_bytes), backing.map(|_| &b"qcow2"[..]));
        rich.set_head(&head);
        let storage = MemoryStorage::with_bytes("rich", &rich.bytes);
        let report = check(&storage, &CheckOptions::default().with_fix(Fix::All)).expect("repaired");
        assert!(report.is_clean(), "{report:?}");
        storage.to_vec()
    }

    fn head(&self) -> HeaderCluster {
        head(&self.bytes)
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
        let (l1, len) = (word(&self.bytes, L1_TABLE) as usize, 8 * head.header.l1_size as usize);
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
            flags: BitmapDirectoryEntry::AUTO,
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
}

fn head(image: &[u8]) -> HeaderCluster {
    HeaderCluster::decode(image, image.len() as u64, &Limits::default()).expect("a sound header")
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// The offset in a table's entry.
fn offset(bytes: &[u8], at: usize) -> usize {
    (word(bytes, at) & 0x00ff_ffff_ffff_fe00) as usize
}

fn opens(image: &[u8]) {
    let storage = Arc::new(MemoryStorage::with_bytes("seed", image));
    let options = OpenOptions::default().with_write(true).with_limits(limits());
    let image = Image::open(storage, &options).expect("a seed is an image that opens");
    let mut buf = vec![0; usize::try_from(image.virtual_size()).expect("a small disk")];
    image.read_present(&mut buf, GuestOffset::ZERO, &mut Vec::new()).expect("it reads");
}

fn header_decode(image: &[u8]) -> Vec<u8> {
    let cluster = 1 << head(image).header.cluster_bits.get();
    let seed = Seed::default().u64(image.len() as u64).bytes(&image[..cluster.min(4096)]).0;
    let (len, bytes) = decoded::<Header<'_>>(&seed);
    HeaderCluster::decode(bytes, len, &Limits::default()).expect("a seed is a header");
    seed
}

fn tables_decode(image: &[u8]) -> Vec<Vec<u8>> {
    let head = head(image);
    let geometry = head.header.geometry();
    let at = |place: usize| place..(place + geometry.cluster_len()).min(image.len());
    let seed = |count: u32, place: usize| {
        Seed::default()
            .u8(u8::try_from(head.header.cluster_bits.get() - 9).expect("small"))
            .u8(u8::try_from(geometry.refcount_order().get()).expect("small"))
            .bool(geometry.extended_l2())
            .bool(head.header.version == Version::V2)
            .u32(count)
            .u64(word(image, place))
            .u64(place as u64)
            .bytes(&image[at(place)])
            .0
    };
    let l2 = offset(image, offset(image, L1_TABLE));
    let block = offset(image, offset(image, REFCOUNT_TABLE));
    let mut seeds = vec![seed(1, l2), seed(1, block)];
    let input = decoded::<Tables<'_>>(&seeds[0]);
    let table = L2Table::decode(input.bytes.into(), geometry, head.header.version).expect("one cluster");
    assert!((0..table.len()).all(|index| table.get(index, HostOffset::new(l2 as u64)).is_ok()));
    if head.header.nb_snapshots > 0 {
        let snapshots = seed(1, head.header.snapshots_offset.get() as usize);
        let input = decoded::<Tables<'_>>(&snapshots);
        decode_snapshots(input.bytes, 1, HostOffset::new(input.words[1]), &Limits::default()).expect("a snapshot");
        seeds.push(snapshots);
    }
    if let Some(extension) = head.bitmaps() {
        let mut bitmaps = seed(1, extension.bitmap_directory_offset.get() as usize);
        // Entries fill their directory, which ends within its cluster.
        bitmaps.truncate(bitmaps.len() - geometry.cluster_len() + extension.bitmap_directory_size as usize);
        decode_bitmap_directory(decoded::<Tables<'_>>(&bitmaps).bytes, &extension).expect("a bitmap");
        seeds.push(bitmaps);
    }
    seeds
}

fn open_and_walk(image: &[u8]) -> Vec<Vec<u8>> {
    let raw = Seed::default().variant(1, 2).bytes(image).0;
    let made = Seed::default().variant(0, 2).given(image).0;
    for seed in [&raw, &made] {
        let bytes = match decoded(seed) {
            Walk::Made(hostile) => hostile.bytes(),
            Walk::Raw(bytes) => bytes.to_vec(),
        };
        assert!(bytes == image);
        opens(&bytes);
    }
    vec![raw, made]
}

fn open_and_write(image: &[u8]) -> Vec<Vec<u8>> {
    let steps =
        |seed: Seed| seed.write(100, 700, 0x11).unmap(false, 512, 512).unmap(true, 0, 4096).write(5000, 900, 0x22);
    let seeds = [false, true].map(|repair| steps(Seed::default().given(image)).end().bool(repair).0);
    for seed in &seeds {
        let (hostile, steps, _): Write = decoded(seed);
        assert!(hostile.bytes() == image && steps.len() == 4);
        opens(image);
    }
    seeds.to_vec()
}

/// The image as it is; with one word of its first refcount block changed (leaks, or clusters said to be free); with one L2
/// entry changed.
fn repair(image: &[u8]) -> Vec<Vec<u8>> {
    let cluster = 1_usize << head(image).header.cluster_bits.get();
    let number = |place: usize| u8::try_from(place / cluster).expect("a small image");
    let l2 = number(offset(image, offset(image, L1_TABLE)));
    let block = number(offset(image, offset(image, REFCOUNT_TABLE)));
    let mut seeds = Vec::new();
    for all in [false, true] {
        seeds.push(Seed::default().given(image).bool(all).0);
        let (zero, max, less) = (0, 2, 5);
        for (cluster, value) in [(block, zero), (block, max), (l2, less), (l2, max)] {
            let seed = Seed::default().given_to_change(image).u64(1);
            seeds.push(seed.variant(1, 2).u8(cluster).u16(0).variant(value, 9).u8(1).bool(all).0);
        }
    }
    for (number, seed) in seeds.iter().enumerate() {
        let (hostile, _): Repair = decoded(seed);
        assert!(hostile.is_given() && hostile.sound() == image);
        assert_eq!(hostile.bytes() == image, number % 5 == 0, "one that is changed is another");
    }
    seeds
}

fn chain_open() -> Vec<Vec<u8>> {
    let (tops, bases) = (images(Some("base")), images(None));
    let mut seeds = Vec::new();
    for (number, (top, base)) in tops.iter().zip(&bases).enumerate() {
        let none = |seed: Seed, image: &[u8]| seed.given(image).bool(false);
        let seed = none(none(none(Seed::default(), top), base), &bases[0]);
        // At /d/base and /d/sub/deep.
        let seed = seed.u8(0).u8(1).u8(1 + (number % 3) as u8).bool(number % 2 == 1).bool(number % 4 == 3).0;
        let input: Files<'_> = decoded(&seed);
        let given = |file: &(Hostile, _)| file.0.bytes();
        assert!(given(&input.files[0]) == *top && given(&input.files[1]) == *base && input.places == [0, 1]);
        assert_eq!(head(top).backing_file.as_deref(), Some(&b"base"[..]));
        opens(base);
        seeds.push(seed);
    }
    seeds
}

fn read_compressed() -> Vec<Vec<u8>> {
    let contents: [&[u8]; 3] = [b"a", b"0123456789abcdefghijklmnopqrstuvwxyz", &[0; 100]];
    let mut seeds = Vec::new();
    for (number, content) in contents.into_iter().cycle().take(24).enumerate() {
        let (zstd, extended) = (number % 2 == 1, number % 8 == 7);
        let front = Seed::default().u8((number % 8) as u8).bool(zstd).bool(extended).u8((number / 3) as u8);
        let len = front.0.len();
        let mut seed = front.bytes(content);
        let changed = number >= 8;
        if changed {
            seed = seed.bool(true).u8((number % 4) as u8).bool(false).u64(1 << (number + 20)).end();
            seed = seed.bool(true).u16(number as u16).u8(0x55).end();
        } else {
            seed = seed.end().end();
        }
        let seed = seed.u16(u16::from(number >= 16)).with_slice_at(len, content.len());
        let input: Compressed<'_> = decoded(&seed);
        assert!(input.content == content && input.entries.len() == usize::from(changed), "{number}: {input:?}");
        assert_eq!((input.streams.len(), input.cut), (usize::from(changed), u16::from(number >= 16)));
        seeds.push(seed);
    }
    seeds
}

fn merge() -> Vec<Vec<u8>> {
    let merges: [fn(Seed) -> Seed; 5] = [
        |seed| seed.variant(0, 4).bool(false).bool(true),
        |seed| seed.variant(0, 4).bool(true).bool(false),
        |seed| seed.variant(1, 4).u8(1),
        |seed| seed.variant(2, 4).bool(true).bool(true),
        |seed| seed.variant(3, 4).bool(true),
    ];
    let (tops, middles, bases) = (images(Some("mid")), images(Some("base")), images(None));
    let mut seeds = Vec::new();
    for shape in 0..tops.len() {
        for (number, merge) in merges.iter().enumerate() {
            let three = number % 2 == 1;
            // The one next in shape below: another size, other clusters.
            let other = (shape + number) % tops.len();
            let middle = if three { &middles[other] } else { &bases[other] };
            let layers = [&tops[shape], middle, &bases[shape]];
            let seed =
                layers.into_iter().fold(Seed::default(), |seed, layer| seed.given(layer)).bool(three).bool(false);
            let seed = seed.write(300, 600, 0x33).end().unmap(true, 0, 1024).end();
            let seed = merges[(number + 1) % merges.len()](merge(seed)).0;
            let input: Merges = decoded(&seed);
            assert!(input.layers.iter().zip(layers).all(|(hostile, layer)| hostile.bytes() == *layer));
            assert_eq!((input.three, input.repair, input.steps.each_ref().map(Vec::len)), (three, false, [1, 1]));
            seeds.push(seed);
        }
    }
    seeds
}

/// Each operation on a VM, its journal with none, one, some and all of its records; the catalogue sound, or as plain bytes.
fn journal_and_catalogue() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (number, world) in worlds().iter().enumerate() {
        let catalogue = world.catalogue(&[]);
        Catalogue::decode(&catalogue, Path::new(CATALOGUE)).expect("a seed is a catalogue");
        let names = world.names();
        names.insert(CATALOGUE, Arc::new(MemoryStorage::with_bytes("catalogue", &catalogue)));
        SnapshotSet::load_in(names, CATALOGUE).expect("a VM").model().expect("its model");
        for records in [0, 1, 2, 3, 255] {
            let front = Seed::default().u8(number as u8).u8(records);
            let changed = front.clone().variant(0, 2).end().variant(0, 2).end().u8(0).0;
            let input: Records<'_> = decoded(&changed);
            assert!(
                matches!((&input.catalogue, &input.journal), (Bytes::Changed(a), Bytes::Changed(b)) if a.is_empty() && b.is_empty())
            );
            seeds.push(changed);
            if records == 255 {
                let front = front.variant(1, 2);
                let len = front.0.len();
                let raw = front.bytes(&catalogue).variant(0, 2).end().u8(0).with_slice_at(len, catalogue.len());
                let input: Records<'_> = decoded(&raw);
                assert!(matches!(input.catalogue, Bytes::Raw(bytes) if bytes == catalogue));
                seeds.push(raw);
            }
        }
    }
    seeds
}
