//! Convert and measure, against QEMU as the reader of what was written, and against what `qemu-img` makes of the same.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use qcow2_chain::chain::{Chain, ChainOptions, Format, Layer, Node, Policy};
use qcow2_chain::format::{ClusterBits, CompressionType, GuestOffset};
use qcow2_chain::image::{CreateOptions, Image, OpenOptions, Preallocation, RawImage};
use qcow2_chain::merge::{ConvertOptions, ConvertTarget, Error, Measurement, Progress, Step, convert, measure};
use qcow2_chain::storage::{Access, FileSystem, HostFileSystem, MemoryStorage, Storage};

use crate::support::layers::{format_of, layer, layers};
use crate::support::ours::create_options;
use crate::support::qemu::Qemu;
use crate::support::recipe::{Op, RandomImage, Shape};
use crate::support::rng::{Rng, cases, trace};
use crate::support::stack::content;

/// A chain of one to eight images with random content; returns its top, which is qcow2.
fn random_chain(qemu: Qemu, dir: &Path, rng: &mut Rng) -> RandomImage {
    let depth = if rng.chance(1, 5) { rng.within(4..9) } else { rng.within(1..4) };
    let shapes = (0..depth).map(|_| Shape::random(rng)).collect();
    let mut images = layers(qemu, dir, rng, "", shapes, 8);
    images.iter().for_each(trace);
    let top = images.pop().unwrap();
    if format_of(&top) == "qcow2" {
        return top;
    }
    let shape = Shape::random(rng);
    let over = layer(qemu, dir.join("over.qcow2"), rng, shape, Some(&top), 8);
    trace(&over);
    over
}

fn open(path: &Path, format: Format) -> Chain {
    let policy = Policy::Beneath(vec![path.parent().expect("a directory").to_owned()]);
    let options = ChainOptions::default().with_policy(policy).with_format(format);
    Chain::open(path, &options).expect("the chain opens")
}

fn new_file(path: &Path) -> Arc<dyn Storage> {
    HostFileSystem.create_new(path).expect("a new file")
}

/// Options of any kind that go together.
fn random_options(rng: &mut Rng, compress: bool) -> ConvertOptions {
    let options = ConvertOptions::default().with_compress(compress);
    let options = options.with_threads(usize::try_from(rng.within(0..5)).unwrap());
    match rng.within(0..6) {
        0 => options.with_sparse(0),
        1 => options.with_sparse(65536),
        2 => options.with_sparse(512),
        3 => options.with_offload(!compress),
        _ => options,
    }
}

/// The clusters of a content that are not all zero.
fn nonzero_clusters(model: &[u8], size: u64) -> usize {
    model.chunks(usize::try_from(size).unwrap()).filter(|cluster| cluster.iter().any(|byte| *byte != 0)).count()
}

/// Converts one random chain to a random geometry.
fn check_convert(qemu: Qemu, rng: &mut Rng, shape: &Shape, compress: bool) {
    let dir = tempfile::tempdir().unwrap();
    let source = random_chain(qemu, dir.path(), rng);
    let options = random_options(rng, compress);
    let mut create = create_options(shape);
    if compress {
        create.preallocation = Preallocation::Off;
    }
    let chain = open(&source.path, Format::Qcow2);
    let copy = dir.path().join("copy");
    let told = format!("{options:?} to {}: {source}", shape.options());
    let preallocated = create.preallocation != Preallocation::Off;
    let report = convert(&chain, ConvertTarget::Qcow2(new_file(&copy), create), &options, &());
    let report = report.unwrap_or_else(|error| panic!("{error}: {told}"));

    qemu.assert_clean(&copy);
    assert!(qemu.content(&copy, None) == source.model, "{told}");
    let found = qemu.check(&copy, None);
    assert_eq!(report.compressed, found.compressed_clusters * shape.cluster_size, "{told}");
    let wanted = nonzero_clusters(&source.model, shape.cluster_size) as u64;
    if options.sparse != 0 && !options.offload && !preallocated {
        assert_eq!(found.allocated_clusters, wanted, "{told}");
    }
    if compress && rng.chance(1, 3) {
        let again = Arc::new(MemoryStorage::new("again"));
        let target =
            ConvertTarget::Qcow2(again.clone(), create_options(&Shape { preallocation: "off", ..shape.clone() }));
        let threads = if options.threads == 1 { 3 } else { 1 };
        convert(&chain, target, &options.with_threads(threads), &()).unwrap();
        assert!(again.to_vec() == std::fs::read(&copy).unwrap(), "the number of threads decides nothing: {told}");
    }
}

#[test]
fn what_is_converted_reads_the_same_in_qemu() {
    let Some(qemu) = Qemu::find() else { return };
    cases("convert", 60, |rng| {
        let shape = Shape::random(rng);
        check_convert(qemu, rng, &shape, false);
    });
}

#[test]
fn what_is_compressed_reads_the_same_in_qemu() {
    let Some(qemu) = Qemu::find() else { return };
    cases("compressing convert", 40, |rng| {
        let shape = Shape::random(rng);
        check_convert(qemu, rng, &shape, true);
    });
}

#[test]
fn what_becomes_raw_holds_the_same_bytes() {
    let Some(qemu) = Qemu::find() else { return };
    cases("convert to raw", 50, |rng| {
        let dir = tempfile::tempdir().unwrap();
        let source = random_chain(qemu, dir.path(), rng);
        let chain = open(&source.path, Format::Qcow2);
        let options = random_options(rng, false);
        let copy = dir.path().join("copy");
        convert(&chain, ConvertTarget::Raw(new_file(&copy)), &options, &()).unwrap();
        assert!(std::fs::read(&copy).unwrap() == source.model, "{options:?}: {source}");

        // And back, from raw.
        let raw = open(&copy, Format::Raw);
        let back = dir.path().join("back");
        let shape = Shape { preallocation: "off", ..Shape::random(rng) };
        let target = ConvertTarget::Qcow2(new_file(&back), create_options(&shape));
        convert(&raw, target, &random_options(rng, false), &()).unwrap();
        qemu.assert_clean(&back);
        assert!(qemu.content(&back, None) == source.model, "{options:?}: {source}");
    });
}

/// The source's content at the start, what the target held behind it.
fn overwritten(source: &[u8], target: &[u8]) -> Vec<u8> {
    let mut merged = source.to_vec();
    merged.extend_from_slice(&target[source.len()..]);
    merged
}

#[test]
fn what_goes_over_an_existing_image_replaces_it() {
    let Some(qemu) = Qemu::find() else { return };
    cases("convert over an image", 50, |rng| {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let source = random_chain(qemu, from.path(), rng);
        let target = random_chain(qemu, to.path(), rng);
        let chain = open(&source.path, Format::Qcow2);
        let policy = Policy::Beneath(vec![to.path().to_owned()]);
        let writable = ChainOptions::default().with_policy(policy).with_writable(1);
        let existing = Chain::open(&target.path, &writable).unwrap();
        let done = convert(&chain, ConvertTarget::Existing(existing), &random_options(rng, false), &());
        if target.shape.size < source.shape.size {
            assert!(matches!(done, Err(Error::Refused { .. })), "{done:?}");
            return;
        }
        done.unwrap_or_else(|error| panic!("{error}: {source}{target}"));
        qemu.assert_clean(&target.path);
        let model = overwritten(&source.model, &target.model);
        assert!(qemu.content(&target.path, None) == model, "{source}{target}");
        for (name, model) in &target.snapshots {
            let shown = qemu.content(&target.path, Some(name));
            assert!(shown[..model.len()] == model[..], "{name}: {source}{target}");
        }
    });
}

/// An internal snapshot is a disk of its own to a reader, over the same backing files.
#[test]
fn an_internal_snapshot_reads_as_the_disk_was() {
    let Some(qemu) = Qemu::find() else { return };
    let seen = AtomicU64::new(0);
    cases("internal snapshots", 40, |rng| {
        let dir = tempfile::tempdir().unwrap();
        let mut top = random_chain(qemu, dir.path(), rng);
        if top.shape.refcount_bits == 64 || top.snapshots.is_empty() && top.shape.refcount_bits >= 16 {
            top.apply(qemu, vec![Op::Snapshot("one".to_owned()), Op::Fill(0..512, 0x77)]);
        }
        let chain = open(&top.path, Format::Qcow2);
        let image = chain.top().node.as_qcow2().unwrap();
        let views: Vec<_> = image.snapshots().unwrap().iter().map(|s| image.open_snapshot(s).unwrap()).collect();
        let mut layers = chain.into_layers();
        for ((name, model), view) in top.snapshots.iter().zip(views) {
            layers[0] = Layer { node: Node::Qcow2(view), path: top.path.clone() };
            let mut all = layers.into_iter();
            let chain = Chain::from_layers(all.next().unwrap(), all);
            assert!(content(&chain).unwrap() == *model, "{name}: {top}");
            assert!(chain.write_at(&[1], GuestOffset::ZERO).is_err(), "a snapshot was written");
            layers = chain.into_layers();
            seen.fetch_add(1, Ordering::Relaxed);
        }
    });
    assert!(seen.into_inner() >= 10 || std::env::var_os("QCOW2_CHAIN_CASE").is_some());
}

/// A device: what it held before shows nowhere.
#[test]
fn a_storage_that_cannot_grow_is_overwritten() {
    let source = memory_chain(&CreateOptions::new(3 << 20));
    let Node::Qcow2(image) = &source.top().node else { unreachable!("it is qcow2") };
    image.write_at(&[7; 100_000], GuestOffset::new(70_001)).unwrap();
    let mut model = vec![0; 3 << 20];
    model[70_001..170_001].fill(7);
    let device = || {
        let device = Arc::new(MemoryStorage::fixed("device", 4 << 20));
        device.write_at(&vec![0xee; 4 << 20], 0).unwrap();
        device
    };

    let raw = device();
    convert(&source, ConvertTarget::Raw(raw.clone()), &ConvertOptions::default(), &()).unwrap();
    assert!(raw.to_vec()[..3 << 20] == model[..] && raw.to_vec()[3 << 20..].iter().all(|byte| *byte == 0xee));

    for compress in [false, true] {
        let qcow2 = device();
        let options = ConvertOptions::default().with_compress(compress);
        convert(&source, ConvertTarget::Qcow2(qcow2.clone(), CreateOptions::default()), &options, &()).unwrap();
        let copy = Image::open(qcow2, &OpenOptions::default()).unwrap();
        let mut read = vec![1; 3 << 20];
        copy.read_at(&mut read, GuestOffset::ZERO).unwrap();
        assert!(read == model);
    }
    let small = Arc::new(MemoryStorage::fixed("small", 2 << 20));
    convert(&source, ConvertTarget::Raw(small), &ConvertOptions::default(), &()).unwrap_err();
}

fn memory_chain(options: &CreateOptions) -> Chain {
    let image = Image::create(Arc::new(MemoryStorage::new("source")), options).unwrap();
    Chain::from_layers(Layer { node: Node::Qcow2(image), path: "source".into() }, [])
}

#[test]
fn what_does_not_go_together_is_refused_and_nothing_is_written() {
    let source = memory_chain(&CreateOptions::new(1 << 20));
    let refused = |target: ConvertTarget, options: ConvertOptions| {
        let done = convert(&source, target, &options, &());
        assert!(matches!(done, Err(Error::Refused { .. })), "{done:?}");
    };
    let plain = ConvertOptions::default();
    let compressed = plain.clone().with_compress(true);
    let empty = Arc::new(MemoryStorage::new("empty"));
    let qcow2 = |create: CreateOptions| ConvertTarget::Qcow2(empty.clone(), create);
    refused(ConvertTarget::Raw(empty.clone()), compressed.clone());
    refused(qcow2(CreateOptions::default().with_backing("base", "raw")), plain.clone());
    refused(qcow2(CreateOptions::default().with_preallocation(Preallocation::Full)), compressed.clone());
    refused(qcow2(CreateOptions::default()), compressed.clone().with_offload(true));
    refused(qcow2(CreateOptions::default()), plain.clone().with_sparse(1000));
    refused(ConvertTarget::Existing(memory_chain(&CreateOptions::new(1 << 20))), compressed);
    refused(ConvertTarget::Existing(memory_chain(&CreateOptions::new(512))), plain.clone());
    assert!(empty.to_vec().is_empty());
    let full = Arc::new(MemoryStorage::with_bytes("full", b"something"));
    refused(ConvertTarget::Raw(full.clone()), plain.clone());
    assert_eq!(full.to_vec(), b"something");
    let done = convert(&source, ConvertTarget::Qcow2(full.clone(), CreateOptions::default()), &plain, &());
    assert!(done.is_err() && full.to_vec() == b"something");

    let itself = Arc::clone(source.top().node.storage());
    refused(ConvertTarget::Raw(itself), plain);
}

/// Until all else is durable, there is no image: nobody takes a part for the whole.
#[test]
fn a_conversion_that_ends_early_leaves_no_image() {
    struct Stop(AtomicU64);
    impl Progress for Stop {
        fn step(&self, _step: &Step) {}
        fn is_cancelled(&self) -> bool {
            self.0.fetch_sub(1, Ordering::SeqCst) == 0
        }
    }
    let source = memory_chain(&CreateOptions::new(30 << 20));
    let Node::Qcow2(image) = &source.top().node else { unreachable!("it is qcow2") };
    let bytes = Rng::new(5).bytes(20 << 20);
    image.write_at(&bytes, GuestOffset::new(1 << 20)).unwrap();
    for compress in [false, true] {
        for steps in [0, 3] {
            let storage = Arc::new(MemoryStorage::new("copy"));
            let options = ConvertOptions::default().with_compress(compress);
            let target = ConvertTarget::Qcow2(storage.clone(), CreateOptions::default());
            let done = convert(&source, target, &options, &Stop(steps.into()));
            assert!(matches!(done, Err(Error::Cancelled)), "{done:?}");
            assert!(storage.to_vec().iter().take(512).all(|byte| *byte == 0));
            assert!(Image::open(storage, &OpenOptions::default()).is_err());
        }
        // The same where there is no room.
        let storage = Arc::new(MemoryStorage::with_capacity_limit("copy", 10 << 20));
        let options = ConvertOptions::default().with_compress(compress);
        let target = ConvertTarget::Qcow2(storage.clone(), CreateOptions::default());
        let done = convert(&source, target, &options, &());
        assert!(done.is_err(), "{done:?}");
        assert!(Image::open(storage, &OpenOptions::default()).is_err());
    }
}

/// An enormous disk costs what it holds.
#[test]
fn a_sparse_disk_costs_what_it_holds() {
    let source = memory_chain(&CreateOptions::new(64 << 40).with_cluster_bits(ClusterBits::new(21).unwrap()));
    let Node::Qcow2(image) = &source.top().node else { unreachable!("it is qcow2") };
    for at in [0, 1 << 40, (64 << 40) - 4096] {
        image.write_at(&[9; 4096], GuestOffset::new(at)).unwrap();
    }
    let storage = Arc::new(MemoryStorage::new("copy"));
    let create = CreateOptions::default()
        .with_cluster_bits(ClusterBits::new(20).unwrap())
        .with_compression_type(CompressionType::Zstd);
    let options = ConvertOptions::default().with_compress(true);
    let report = convert(&source, ConvertTarget::Qcow2(storage.clone(), create), &options, &()).unwrap();
    assert_eq!((report.copied, report.compressed), (3 << 20, 3 << 20));
    let copy = Image::open(storage, &OpenOptions::default()).unwrap();
    let mut read = [0; 4096];
    copy.read_at(&mut read, GuestOffset::new(1 << 40)).unwrap();
    assert_eq!(read, [9; 4096]);
    let measured =
        measure(Some(&source), &CreateOptions::default().with_cluster_bits(ClusterBits::new(21).unwrap())).unwrap();
    assert_eq!(measured.fully_allocated - measured.required, (64 << 40) - (3 << 21));
}

fn measured(qemu: Qemu, args: &[&str]) -> Measured {
    let text = qemu.img(&[&["measure", "--output=json", "-O", "qcow2"], args].concat());
    let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let number = |name: &str| json[name].as_u64();
    (number("required"), number("fully-allocated"), number("bitmaps"))
}

/// Required, fully allocated, bitmaps.
type Measured = (Option<u64>, Option<u64>, Option<u64>);

fn ours(measured: Measurement) -> Measured {
    (Some(measured.required), Some(measured.fully_allocated), measured.bitmaps)
}

#[test]
fn a_measure_is_qemu_s() {
    let Some(qemu) = Qemu::find() else { return };
    cases("measure", 150, |rng| {
        let dir = tempfile::tempdir().unwrap();
        let mut shape = Shape { preallocation: "off", ..Shape::random(rng) };
        if rng.chance(1, 2) {
            // Larger disks, without a source.
            let bits = rng.within(20..45);
            shape.size = rng.within(0..1 << bits) / 512 * 512;
            shape.cluster_size = shape.cluster_size.max(8192);
            shape.preallocation = rng.pick(&["off", "metadata", "falloc", "full"]);
            let (options, size) = (shape.options(), shape.size.to_string());
            let theirs = measured(qemu, &["-o", &options, "--size", &size]);
            assert_eq!(ours(measure(None, &create_options(&shape)).unwrap()), theirs, "{options} {size}");
            return;
        }
        let mut source = RandomImage::create(qemu, dir.path().join("0.qcow2"), shape);
        source.apply_random(qemu, rng, 12);
        if rng.chance(1, 2) {
            let over = Shape::random(rng);
            source = RandomImage::create_over(qemu, dir.path().join("1.qcow2"), over, &source);
            source.apply_random(qemu, rng, 8);
        }
        let target = Shape::random(rng);
        let options = target.options();
        let name = source.path.to_string_lossy();
        let theirs = measured(qemu, &["-o", &options, "-f", "qcow2", &name]);
        let chain = open(&source.path, Format::Qcow2);
        let create = create_options(&target).with_size(chain.virtual_size());
        let (required, full, bitmaps) = ours(measure(Some(&chain), &create).unwrap());
        assert_eq!((full, bitmaps), (theirs.1, theirs.2), "{options}: {source}");
        // Of an image that seems preallocated, QEMU also looks for holes in the file.
        assert!(required >= theirs.0, "{options}: {source}");
        let map = qemu.map(&source.path).into_iter().filter(|entry| entry.data && !entry.zero);
        let data = map.map(|entry| Ok(entry.start..entry.start + entry.length));
        assert_eq!(Some(Measurement::of_qcow2(&create, data).unwrap().required), theirs.0, "{options}: {source}");
        let raw = qemu.img(&["measure", "-O", "raw", &name]);
        let size = Measurement::of_raw(chain.virtual_size()).required;
        assert_eq!(raw, format!("required size: {size}\nfully allocated size: {size}\n"));
    });
}

/// A file that was copied by the kernel, and one that holds nothing but zeroes.
#[test]
fn data_left_to_the_kernel_is_not_looked_at() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("raw");
    std::fs::write(&path, vec![0; 3 << 20]).unwrap();
    let chain = open(&path, Format::Raw);
    for (offload, copied) in [(false, 0), (true, 3 << 20)] {
        let copy = dir.path().join(format!("copy{offload}"));
        let options = ConvertOptions::default().with_offload(offload);
        let report = convert(&chain, ConvertTarget::Raw(new_file(&copy)), &options, &()).unwrap();
        assert_eq!(report.copied + report.copied_in_kernel, copied);
        let raw = RawImage::open(HostFileSystem.open(&copy, &Access::read()).unwrap()).unwrap();
        assert_eq!(raw.virtual_size(), 3 << 20);
    }
}
