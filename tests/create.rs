//! New images against those that `qemu-img create` makes: the same bytes where the layout is the same, the same words of
//! `info`, `check` and `map` everywhere.

use std::ffi::OsStr;
use std::path::Path;

use qcow2_chain::format::{ClusterBits, CompressionType, RefcountOrder, Version};
use qcow2_chain::image::{CreateOptions, Error, Preallocation};
use qcow2_chain::storage::{self, MemoryStorage, Storage};
use serde_json::Value;

use super::support::qemu::Qemu;
use super::support::recipe::Shape;
use super::support::rng::{self, Rng};

/// Our options for what `qemu-img create -o` is told.
fn options(shape: &Shape) -> CreateOptions {
    let preallocation = match shape.preallocation {
        "off" => Preallocation::Off,
        "metadata" => Preallocation::Metadata,
        "falloc" => Preallocation::Falloc,
        _ => Preallocation::Full,
    };
    let zstd = shape.compression_type == "zstd";
    CreateOptions::new(shape.size)
        .with_version(if shape.compat == "1.1" { Version::V3 } else { Version::V2 })
        .with_cluster_bits(ClusterBits::from_size(shape.cluster_size).expect("QEMU takes it"))
        .with_refcount_order(RefcountOrder::from_bits(shape.refcount_bits).expect("QEMU takes it"))
        .with_extended_l2(shape.extended_l2)
        .with_lazy_refcounts(shape.lazy_refcounts)
        .with_compression_type(if zstd { CompressionType::Zstd } else { CompressionType::Deflate })
        .with_preallocation(preallocation)
}

/// What we write for these options.
fn bytes(options: &CreateOptions) -> Vec<u8> {
    let storage = MemoryStorage::new("image");
    options.write_to(&storage).unwrap_or_else(|error| panic!("{options:?}: {error}"));
    storage.to_vec()
}

/// Lets QEMU create an image, over a backing file where there is one.
fn qemu_create(qemu: Qemu, path: &Path, shape: &Shape, backing: Option<(&str, &str)>) {
    let (options, size) = (shape.options(), shape.size.to_string());
    let mut args = vec!["create", "-q", "-f", "qcow2", "-o", &options];
    if let Some((name, format)) = backing {
        args.extend(["-u", "-b", name, "-F", format]);
    }
    let args: Vec<&OsStr> = args.into_iter().map(OsStr::new).chain([path.as_os_str(), OsStr::new(&size)]).collect();
    qemu.img(&args);
}

fn shape(cluster_bits: u64, size: u64) -> Shape {
    Shape {
        size,
        compat: "1.1",
        cluster_size: 1 << cluster_bits,
        refcount_bits: 16,
        extended_l2: false,
        lazy_refcounts: false,
        compression_type: "zlib",
        preallocation: "off",
    }
}

/// Says where two files differ first, instead of printing both.
fn assert_same_bytes(ours: &[u8], theirs: &[u8], what: &str) {
    if ours != theirs {
        let at = ours.iter().zip(theirs).position(|(ours, theirs)| ours != theirs);
        panic!("{what}: first difference at {at:x?}, lengths {:#x} and QEMU's {:#x}", ours.len(), theirs.len());
    }
}

#[test]
fn empty_images_are_qemu_s_to_the_byte() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("theirs.qcow2");
    // Up to the last size of each, there are at most three refcount blocks. Of more, QEMU puts the last one second, as it
    // meets it first; and it moves a refcount table of more than one cluster, leaving a hole at cluster 1.
    for bits in 9..=21 {
        let widest = 1 << (12 + 2 * bits).min(36);
        for (index, size) in [0, 512, (10 << 20) + 512, widest].into_iter().enumerate() {
            let mut shape = shape(bits, size);
            shape.refcount_bits = 1 << ((usize::try_from(bits).unwrap() + index) % 7);
            shape.lazy_refcounts = index == 1;
            if index == 2 {
                (shape.compression_type, shape.extended_l2) = ("zstd", bits >= 14);
            }
            if index == 3 && bits % 2 == 0 {
                (shape.compat, shape.refcount_bits) = ("0.10", 16);
            }
            if size == widest && bits <= 10 {
                shape.refcount_bits = shape.refcount_bits.min(16);
            }
            let backing = (index == 3).then_some(("some/base.img", if bits % 3 == 0 { "raw" } else { "qcow2" }));
            qemu_create(qemu, &path, &shape, backing);
            let mut options = options(&shape);
            if let Some((name, format)) = backing {
                options = options.with_backing(name, format);
            }
            let theirs = std::fs::read(&path).expect("QEMU's image");
            assert_same_bytes(&bytes(&options), &theirs, &format!("{} bytes, {}", size, shape.options()));
        }
    }
}

#[test]
fn a_preallocated_image_of_one_l2_table_is_qemu_s_to_the_byte() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("theirs.qcow2");
    // With more than one table QEMU puts each before its data; ours lie together. With extended L2 entries its file ends
    // within the last cluster. For `falloc` and `full` it first makes the image, and then moves the refcount table.
    for (bits, compat) in [(9, "1.1"), (12, "0.10"), (14, "1.1"), (16, "1.1"), (16, "0.10"), (18, "1.1")] {
        for size in [512, (1 << (2 * bits - 3)).min(3 << 20) - 512] {
            let shape = Shape { compat, preallocation: "metadata", ..shape(bits, size) };
            qemu_create(qemu, &path, &shape, None);
            let theirs = std::fs::read(&path).expect("QEMU's image");
            assert_same_bytes(&bytes(&options(&shape)), &theirs, &format!("{size} bytes, {}", shape.options()));
        }
    }
}

/// `qemu-img info`, without what differs between two files of one kind.
fn info(qemu: Qemu, path: &Path) -> Value {
    let mut info = qemu.info(path);
    let fields = info.as_object_mut().expect("info prints an object");
    for own in ["filename", "actual-size", "children"] {
        fields.remove(own);
    }
    info
}

#[test]
fn random_images_are_what_qemu_s_own_are() {
    let Some(qemu) = Qemu::find() else { return };
    rng::cases("created images", 200, |rng| random_image(qemu, rng));
}

fn random_image(qemu: Qemu, rng: &mut Rng) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (ours, theirs) = (dir.path().join("ours.qcow2"), dir.path().join("theirs.qcow2"));
    let mut shape = Shape::random(rng);
    if rng.chance(1, 40) {
        shape.size = 0;
    }
    let backed = (shape.preallocation == "off" || shape.extended_l2) && rng.chance(1, 3);
    let mut options = options(&shape);
    if backed {
        // Longer than the overlay, and nothing but data: what shows through is its.
        std::fs::write(dir.path().join("base"), vec![0x5a; usize::try_from(shape.size).unwrap() + 512])
            .expect("a base");
        options = options.with_backing("base", "raw");
    }
    rng::trace(&format!("{} bytes, {}, backed {backed}", shape.size, shape.options()));
    std::fs::write(&ours, bytes(&options)).expect("our image");
    qemu_create(qemu, &theirs, &shape, backed.then_some(("base", "raw")));

    qemu.assert_clean(&ours);
    assert_eq!(info(qemu, &ours), info(qemu, &theirs), "info of {}", shape.options());
    if rng.chance(1, 3) {
        let (mut ours, mut theirs) = (qemu.check(&ours, None), qemu.check(&theirs, None));
        if shape.preallocation != "off" {
            // Ours has fewer refcount blocks where QEMU's table grew, and one run of data where QEMU's is in pieces.
            (ours.image_end_offset, theirs.image_end_offset) = (0, 0);
            (ours.fragmented_clusters, theirs.fragmented_clusters) = (0, 0);
        }
        assert_eq!(ours, theirs, "check of {}", shape.options());
    }
    if shape.size > 0 && rng.chance(1, 2) {
        let before = if backed { 0x5a } else { 0 };
        written_by_qemu(qemu, &ours, shape.size, before, rng);
    }
}

/// QEMU writes into our image, reads all of it, and still finds it clean.
fn written_by_qemu(qemu: Qemu, path: &Path, size: u64, before: u8, rng: &mut Rng) {
    let mut model = vec![before; usize::try_from(size).unwrap()];
    let mut commands = Vec::new();
    for _ in 0..3 {
        let range = rng.range(size, 65_536);
        let pattern = rng.pattern();
        commands.push(format!("write -q -P {pattern} {} {}", range.start, range.end - range.start));
        model[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()].fill(pattern);
    }
    qemu.io(path, &commands);
    qemu.assert_clean(path);
    assert!(qemu.content(path, None) == model, "what QEMU wrote into {}", path.display());
}

#[test]
fn a_preallocated_disk_is_one_extent() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("image.qcow2");
    for (bits, preallocation) in [(9, "metadata"), (12, "falloc"), (16, "full"), (21, "metadata")] {
        let shape = Shape { preallocation, ..shape(bits, 5 << 20) };
        std::fs::write(&path, bytes(&options(&shape))).expect("our image");
        qemu.assert_clean(&path);
        let map = qemu.map(&path);
        assert!(map.windows(2).all(|pair| pair[0].offset.map(|at| at + pair[0].length) == pair[1].offset), "{map:?}");
        assert!(map.iter().all(|entry| entry.present), "{map:?}");
        let check = qemu.check(&path, None);
        assert_eq!((check.allocated_clusters, check.fragmented_clusters), ((5_u64 << 20).div_ceil(1 << bits), 0));
    }
}

#[test]
fn the_largest_disk_of_each_cluster_size_is_made_and_one_more_sector_is_not() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("image.qcow2");
    // 4,194,304 L1 entries.
    for (bits, refcount_bits) in [(9, 1), (9, 16), (9, 64), (10, 64), (12, 16), (16, 16), (21, 16)] {
        let size = (1 << 22) << (2 * bits - 3);
        let shape = Shape { refcount_bits, ..shape(bits, size) };
        std::fs::write(&path, bytes(&options(&shape))).expect("our image");
        qemu.assert_clean(&path);
        assert_eq!(qemu.info(&path)["virtual-size"].as_u64(), Some(size));
        qemu.io(&path, &[format!("write -q {} 512", size - 512), format!("read -q {} 512", size - 512)]);
        qemu.assert_clean(&path);
        let over = options(&Shape { size: size + 512, ..shape });
        assert!(matches!(over.write_to(&MemoryStorage::new("image")), Err(Error::Limit { .. })), "{over:?}");
    }
}

#[test]
fn what_qemu_refuses_is_refused_and_nothing_is_written() {
    let new = || CreateOptions::new(1 << 20);
    let small = ClusterBits::new(9).expect("512 bytes");
    let v2 = || new().with_version(Version::V2);
    let refused = [
        CreateOptions::new(1000),
        v2().with_refcount_order(RefcountOrder::new(3).expect("8 bits")),
        v2().with_extended_l2(true),
        v2().with_lazy_refcounts(true),
        v2().with_compression_type(CompressionType::Zstd),
        new().with_extended_l2(true).with_cluster_bits(ClusterBits::new(13).expect("8 KiB")),
        new().with_backing("base", "raw").with_preallocation(Preallocation::Metadata),
        new().with_backing("", "raw"),
        new().with_backing("base", ""),
    ];
    for options in refused {
        let storage = MemoryStorage::new("image");
        assert!(matches!(options.write_to(&storage), Err(Error::Refused { .. })), "{options:?}");
        assert!(storage.to_vec().is_empty());
    }
    let over = [
        CreateOptions::new(1 << 63),
        CreateOptions::new(u64::MAX - 511),
        new().with_backing("b".repeat(1024), "raw"),
        new().with_backing("base", "a-format-too-long"),
        new().with_cluster_bits(small).with_backing("b".repeat(400), "raw"),
        // Host offsets of all data would not fit an L2 entry.
        CreateOptions::new(1 << 60)
            .with_cluster_bits(ClusterBits::new(21).expect("2 MiB"))
            .with_preallocation(Preallocation::Metadata),
    ];
    for options in over {
        let storage = MemoryStorage::new("image");
        assert!(matches!(options.write_to(&storage), Err(Error::Limit { .. })), "{options:?}");
        assert!(storage.to_vec().is_empty());
    }
    let used = MemoryStorage::with_bytes("image", vec![1]);
    assert!(matches!(new().write_to(&used), Err(Error::Refused { .. })));
    assert_eq!(used.to_vec(), [1]);
}

/// A device: fixed in size, full of what was there before, and it stops working after some writes.
#[derive(Debug)]
struct Device {
    bytes: MemoryStorage,
    writes_left: std::sync::atomic::AtomicU64,
}

impl Device {
    fn new(len: usize, writes: u64) -> Self {
        let mut bytes = vec![0xe5; len];
        // An old image.
        bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        Self { bytes: MemoryStorage::with_bytes("device", bytes), writes_left: writes.into() }
    }
}

impl Storage for Device {
    fn name(&self) -> &str {
        self.bytes.name()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> storage::Result<()> {
        self.bytes.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> storage::Result<()> {
        use std::sync::atomic::Ordering::Relaxed;
        let no_space = || storage::Error::NoSpace { name: self.name().to_owned(), need: buf.len() as u64 };
        if offset + buf.len() as u64 > self.len()? {
            return Err(no_space());
        }
        self.writes_left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).map_err(|_| no_space())?;
        self.bytes.write_at(buf, offset)
    }
    fn len(&self) -> storage::Result<u64> {
        self.bytes.len()
    }
    fn set_len(&self, _len: u64) -> storage::Result<()> {
        Err(storage::Error::unsupported(self.name(), "changing the size"))
    }
    fn sync(&self) -> storage::Result<()> {
        Ok(())
    }
    fn is_fixed_size(&self) -> bool {
        true
    }
}

#[test]
fn a_device_keeps_its_size_and_shows_nothing_of_what_it_held() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("device");
    for preallocation in [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
        let device = Device::new(3 << 20, u64::MAX);
        CreateOptions::new(2 << 20).with_preallocation(preallocation).write_to(&device).expect("room for it");
        assert_eq!(device.len().expect("memory"), 3 << 20);
        std::fs::write(&path, device.bytes.to_vec()).expect("our image");
        qemu.assert_clean(&path);
        assert!(qemu.content(&path, None).iter().all(|&byte| byte == 0), "{preallocation:?}");
        written_by_qemu(qemu, &path, 2 << 20, 0, &mut Rng::new(9));
    }
    let small = Device::new(100 << 10, u64::MAX);
    let error = CreateOptions::new(2 << 20).write_to(&small).expect_err("three clusters are more");
    assert!(matches!(error, Error::Storage(storage::Error::NoSpace { need: 262_144, .. })), "{error:?}");
    assert_eq!(small.bytes.to_vec()[..4], *b"QFI\xfb", "nothing is touched");
}

#[test]
fn a_creation_that_stops_anywhere_leaves_no_image() {
    let options = CreateOptions::new(1 << 20)
        .with_cluster_bits(ClusterBits::new(12).expect("4 KiB"))
        .with_preallocation(Preallocation::Full);
    for writes in 0.. {
        let device = Device::new(2 << 20, writes);
        let done = options.write_to(&device);
        let magic = device.bytes.to_vec()[..4] == *b"QFI\xfb";
        // With no write at all the old image stands untouched.
        assert_eq!(magic, done.is_ok() || writes == 0, "after {writes} writes");
        if done.is_ok() {
            assert!(writes > 5);
            return;
        }
    }
}
