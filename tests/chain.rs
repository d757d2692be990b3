//! Chains that QEMU made, judged by QEMU: content, maps, comparisons; and writes through a chain that QEMU then reads.

use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use qcow2_chain::chain::{
    Chain, ChainExtent, ChainOptions, ChainReader, CompareOptions, Comparison, Error, Format, compare,
};
use qcow2_chain::format::GuestOffset;
use qcow2_chain::image::ExtentKind;
use qcow2_chain::storage;

use crate::support::qemu::{MapEntry, Qemu};
use crate::support::recipe::{RandomImage, Shape};
use crate::support::rng::{Rng, cases, trace};

fn options(directory: &Path) -> ChainOptions {
    ChainOptions::default().beneath(directory)
}

fn open(path: &Path) -> Chain {
    let directory = path.parent().expect("a directory");
    Chain::open(path, &options(directory)).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn content(chain: &Chain) -> Vec<u8> {
    let mut bytes = Vec::new();
    ChainReader::new(chain).read_to_end(&mut bytes).expect("the chain is read");
    bytes
}

/// A chain of images, the base first.
struct Images {
    directory: tempfile::TempDir,
    images: Vec<RandomImage>,
    /// What the raw base holds, if there is one.
    raw: bool,
}

impl Images {
    /// Two to four layers of different geometry, some shorter and some longer than what they are over.
    fn random(qemu: Qemu, rng: &mut Rng) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let raw = rng.chance(1, 3);
        let mut images: Vec<RandomImage> = Vec::new();
        for index in 0..rng.within(2..5) {
            let mut shape = Shape::random(rng);
            shape.preallocation = "off";
            let path = directory.path().join(format!("{index}"));
            let mut image = match images.last() {
                None if raw => raw_base(&path, shape, rng),
                None => RandomImage::create(qemu, path, shape),
                Some(base) if raw && index == 1 => over_raw(qemu, path, shape, base),
                Some(base) => RandomImage::create_over(qemu, path, shape, base),
            };
            if !raw || index > 0 {
                let count = rng.within(1..10);
                image.apply_random(qemu, rng, count);
            }
            trace(&image);
            images.push(image);
        }
        Self { directory, images, raw }
    }

    fn top(&self) -> &RandomImage {
        self.images.last().expect("there are images")
    }

    fn open(&self) -> Chain {
        let chain = Chain::open(&self.top().path, &options(self.directory.path())).expect("the chain is opened");
        assert_eq!(chain.layers().len(), self.images.len());
        assert_eq!(chain.layers().last().expect("a base").format(), if self.raw { Format::Raw } else { Format::Qcow2 });
        chain
    }
}

fn raw_base(path: &Path, shape: Shape, rng: &mut Rng) -> RandomImage {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::create(path).expect("the base is created");
    file.set_len(shape.size).expect("the base is as long as it says");
    let mut model = vec![0; usize::try_from(shape.size).unwrap()];
    for _ in 0..rng.within(0..6) {
        let range = rng.range(shape.size, 4096);
        let bytes = vec![rng.pattern(); usize::try_from(range.end - range.start).unwrap()];
        file.write_all_at(&bytes, range.start).expect("the base is written");
        let start = usize::try_from(range.start).unwrap();
        model[start..start + bytes.len()].copy_from_slice(&bytes);
    }
    RandomImage::from_model(path.to_owned(), shape, false, model)
}

/// An overlay whose backing name is relative.
fn over_raw(qemu: Qemu, path: PathBuf, mut shape: Shape, base: &RandomImage) -> RandomImage {
    shape.preallocation = "off";
    let name = path.display().to_string();
    let backing = base.path.file_name().expect("a name").to_string_lossy();
    let options = shape.options();
    let size = shape.size.to_string();
    qemu.img(&["create", "-q", "-f", "qcow2", "-b", &backing, "-F", "raw", "-o", &options, &name, &size]);
    RandomImage::from_model(path, shape, true, base.model.clone())
}

#[test]
fn random_chains_read_as_qemu_reads_them() {
    let Some(qemu) = Qemu::find() else { return };
    cases("chains read", 24, |rng| {
        let images = Images::random(qemu, rng);
        let chain = images.open();
        assert!(content(&chain) == images.top().model, "{}", images.top());
        assert!(qemu.content(&images.top().path, None) == images.top().model, "the model is QEMU's");
        for _ in 0..20 {
            let range = rng.range(chain.virtual_size(), 512);
            let mut buf = vec![0xa5; usize::try_from(range.end - range.start).unwrap()];
            chain.read_at(&mut buf, GuestOffset::new(range.start)).expect("a range is read");
            let start = usize::try_from(range.start).unwrap();
            assert!(buf == images.top().model[start..start + buf.len()], "{range:x?} of {}", images.top());
        }
    });
}

/// An extent in the terms of `qemu-img map`.
fn entry(extent: &ChainExtent) -> MapEntry {
    MapEntry {
        start: extent.guest.get(),
        length: extent.len,
        depth: extent.depth as u64,
        present: extent.layer.is_some(),
        zero: extent.is_zero(),
        data: matches!(extent.kind, ExtentKind::Data { .. } | ExtentKind::Compressed),
        compressed: extent.kind == ExtentKind::Compressed,
        offset: match extent.kind {
            ExtentKind::Data { host } | ExtentKind::Zero { host: Some(host) } => Some(host.get()),
            _ => None,
        },
    }
}

/// Merges what touches and is alike. QEMU marks holes of the file within data, which is a matter of the file system, and
/// tells where space lies for subclusters that nobody holds.
fn plain(entries: impl IntoIterator<Item = MapEntry>) -> Vec<MapEntry> {
    let mut merged: Vec<MapEntry> = Vec::new();
    for mut entry in entries {
        entry.zero &= !entry.data;
        entry.offset = entry.offset.filter(|_| entry.present);
        if let Some(last) = merged.last_mut() {
            let offset = last.offset.map(|offset| offset + last.length);
            let grown = MapEntry { start: entry.start, length: entry.length, offset, ..last.clone() };
            if grown == entry && last.start + last.length == entry.start {
                last.length += entry.length;
                continue;
            }
        }
        merged.push(entry);
    }
    merged
}

#[test]
fn random_chains_map_as_qemu_maps_them() {
    let Some(qemu) = Qemu::find() else { return };
    cases("chains mapped", 30, |rng| {
        let images = Images::random(qemu, rng);
        let chain = images.open();
        let extents: Vec<_> = chain.extents(0..u64::MAX).map(|extent| extent.expect("an extent")).collect();
        assert!(extents.iter().all(|extent| extent.len > 0));
        let ours: Vec<_> = extents.iter().map(entry).collect();
        assert_eq!(ours, plain(ours.clone()), "coalesced");
        assert_eq!(ours, plain(qemu.map(&images.top().path)), "{}", images.top());

        // A part of the range is told as the whole is.
        let range = rng.range(chain.virtual_size(), 512);
        let part: Vec<_> = chain.extents(range.clone()).map(|extent| entry(&extent.expect("an extent"))).collect();
        assert_eq!(part, plain(cut(&ours, &range)), "{range:x?}");
    });
}

fn cut(entries: &[MapEntry], range: &std::ops::Range<u64>) -> Vec<MapEntry> {
    let inside = entries.iter().filter(|entry| entry.start < range.end && entry.start + entry.length > range.start);
    let cut = inside.map(|entry| {
        let start = entry.start.max(range.start);
        let end = (entry.start + entry.length).min(range.end);
        let offset = entry.offset.map(|offset| offset + (start - entry.start));
        MapEntry { start, length: end - start, offset, ..entry.clone() }
    });
    cut.collect()
}

/// What a commit of the upper layers moves, laid over what is left, is what the whole chain reads.
#[test]
fn the_extents_of_some_layers_are_what_a_commit_needs() {
    let Some(qemu) = Qemu::find() else { return };
    cases("some layers", 16, |rng| {
        let images = Images::random(qemu, rng);
        let chain = images.open();
        let layers = usize::try_from(rng.within(1..images.images.len() as u64)).unwrap();
        let mut model = images.images[images.images.len() - 1 - layers].model.clone();
        model.resize(images.top().model.len(), 0);
        for extent in chain.extents_of(0..layers, 0..u64::MAX) {
            let extent = extent.expect("an extent");
            assert!(extent.layer.is_none_or(|layer| layer < layers));
            let range = usize::try_from(extent.guest.get()).unwrap()..usize::try_from(extent.end()).unwrap();
            match extent.kind {
                ExtentKind::Unallocated => assert_eq!(extent.layer, None),
                ExtentKind::Zero { .. } => model[range].fill(0),
                _ => chain.read_at(&mut model[range], extent.guest).expect("data of an extent"),
            }
        }
        assert!(model == images.top().model, "{layers} layers of {}", images.top());
    });
}

#[test]
fn what_is_written_through_a_chain_qemu_reads() {
    let Some(qemu) = Qemu::find() else { return };
    cases("chains written", 20, |rng| {
        let images = Images::random(qemu, rng);
        let path = &images.top().path;
        let chain = Chain::open(path, &options(images.directory.path()).with_writable(1)).expect("opened for writing");
        let mut model = images.top().model.clone();
        for _ in 0..rng.within(1..12) {
            let range = rng.range(chain.virtual_size(), 512);
            let (offset, len) = (GuestOffset::new(range.start), range.end - range.start);
            let inside = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
            if rng.chance(2, 3) {
                let bytes = rng.bytes(inside.len());
                chain.write_at(&bytes, offset).expect("a write");
                model[inside].copy_from_slice(&bytes);
            } else {
                chain.write_zeroes_at(offset, len).expect("zeroes");
                model[inside].fill(0);
            }
        }
        assert!(content(&chain) == model, "before it is closed");
        chain.close().expect("closed");
        for image in images.images.iter().skip(usize::from(images.raw)) {
            qemu.assert_clean(&image.path);
        }
        assert!(qemu.content(path, None) == model, "{}", images.top());
        let below = &images.images[images.images.len() - 2];
        if images.images.len() > 2 || !images.raw {
            assert!(qemu.content(&below.path, None) == below.model, "what is below is untouched");
        }
    });
}

#[test]
fn chains_compare_as_qemu_compares_them() {
    let Some(qemu) = Qemu::find() else { return };
    cases("chains compared", 12, |rng| {
        let images = Images::random(qemu, rng);
        let chain = images.open();
        let copy = images.directory.path().join("copy");
        let resized = rng.chance(1, 2).then(|| chain.virtual_size() + 512 * rng.within(1..500));
        let mut model = images.top().model.clone();
        model.resize(usize::try_from(resized.unwrap_or(chain.virtual_size())).unwrap(), 0);
        let changed = rng.chance(1, 2).then(|| {
            let at = usize::try_from(rng.within(0..model.len() as u64)).unwrap();
            model[at] ^= 0x40;
            at as u64
        });
        std::fs::write(&copy, &model).expect("the copy is written");
        let other = Chain::open(&copy, &ChainOptions::default().with_format(Format::Raw)).expect("the copy is opened");
        let expected = changed.map_or(Comparison::Same, Comparison::DiffersAt);
        let go_on = || false;
        let plain = CompareOptions::default();
        assert_eq!(compare(&chain, &other, &plain, &go_on).expect("compared"), expected, "{}", images.top());
        assert_eq!(compare(&other, &chain, &plain, &go_on).expect("compared"), expected);
        let top = images.top().path.as_os_str();
        let args = ["compare", "-f", "qcow2", "-F", "raw"].map(std::ffi::OsStr::new);
        let run = qemu.try_img(&[&args[..], &[top, copy.as_os_str()]].concat());
        assert_eq!(run.code, i32::from(changed.is_some()), "{}{}", run.stdout, run.stderr);

        let strict = CompareOptions::default().with_strict(true);
        assert_eq!(compare(&chain, &chain, &strict, &go_on).expect("compared"), Comparison::Same);
        if resized.is_some() {
            assert_eq!(compare(&chain, &other, &strict, &go_on).expect("compared"), Comparison::SizeDiffers);
        }
    });
}

#[test]
fn strict_comparison_sees_allocation() {
    let Some(qemu) = Qemu::find() else { return };
    let directory = tempfile::tempdir().expect("a temporary directory");
    let [a, b] = ["a", "b"].map(|name| {
        let path = directory.path().join(name);
        qemu.img(&["create", "-q", "-f", "qcow2", &path.display().to_string(), "1M"]);
        path
    });
    qemu.io(&a, &["write -z 128k 64k"]);
    let (a, b) = (open(&a), open(&b));
    let strict = CompareOptions::default().with_strict(true);
    let at = Comparison::AllocationDiffersAt(128 << 10);
    assert_eq!(compare(&a, &b, &strict, &|| false).expect("compared"), at);
    assert_eq!(compare(&a, &b, &CompareOptions::default(), &|| false).expect("compared"), Comparison::Same);
    assert!(matches!(compare(&a, &a, &strict, &|| true), Ok(Comparison::Same)), "nothing to read, nothing to cancel");
}

#[test]
fn a_comparison_can_be_cancelled() {
    let Some(qemu) = Qemu::find() else { return };
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("a");
    qemu.img(&["create", "-q", "-f", "qcow2", &path.display().to_string(), "1M"]);
    qemu.io(&path, &["write -P 1 0 1M"]);
    let chain = open(&path);
    let result = compare(&chain, &chain, &CompareOptions::default(), &|| true);
    assert!(matches!(result, Err(Error::Cancelled)), "{result:?}");
}

/// A raw base, a short overlay on it, and a long one on top.
fn three_layers(qemu: Qemu, directory: &Path) -> PathBuf {
    let at = |name: &str| directory.join(name).display().to_string();
    std::fs::write(at("base.raw"), vec![1; 4 << 20]).expect("the base is written");
    qemu.img(&["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", &at("mid.qcow2"), "1M"]);
    qemu.io(Path::new(&at("mid.qcow2")), &["write -P 2 64k 64k", "write -z 128k 64k", "write -P 2 512k 64k"]);
    qemu.img(&["create", "-q", "-f", "qcow2", "-b", &at("mid.qcow2"), "-F", "qcow2", &at("top.qcow2"), "2M"]);
    qemu.io(Path::new(&at("top.qcow2")), &["write -P 3 512k 64k", "write -c -P 3 1216k 64k"]);
    directory.join("top.qcow2")
}

#[test]
fn what_lies_behind_a_short_layer_stays_hidden() {
    let Some(qemu) = Qemu::find() else { return };
    let directory = tempfile::tempdir().expect("a temporary directory");
    let chain = open(&three_layers(qemu, directory.path()));
    let bytes = content(&chain);
    assert_eq!(bytes.len(), 2 << 20);
    assert!(bytes[..64 << 10].iter().all(|byte| *byte == 1));
    let behind = &bytes[1 << 20..];
    assert!(behind[..192 << 10].iter().all(|byte| *byte == 0), "the base's ones stay hidden");
    assert!(behind[192 << 10..256 << 10].iter().all(|byte| *byte == 3));
    let hidden = chain.extents((1 << 20)..(1 << 20) + 512).next().expect("an extent").expect("readable");
    assert_eq!((hidden.layer, hidden.depth, hidden.kind), (None, 0, ExtentKind::Zero { host: None }));
}

#[test]
fn a_chain_is_described() {
    let Some(qemu) = Qemu::find() else { return };
    let directory = tempfile::tempdir().expect("a temporary directory");
    let chain = open(&three_layers(qemu, directory.path()));
    let description = chain.describe().expect("described");
    let [top, mid, base] = &description.layers[..] else { panic!("three layers") };
    assert_eq!(description.virtual_size, 2 << 20);
    assert_eq!((top.held.data, top.held.compressed, top.held.zero), (64 << 10, 64 << 10, 0));
    assert_eq!(top.visible, top.held);
    assert_eq!((mid.held.data, mid.held.zero), (128 << 10, 64 << 10));
    assert_eq!((mid.visible.data, mid.visible.zero), (64 << 10, 64 << 10));
    assert_eq!(base.held.total(), 4 << 20);
    assert_eq!(base.visible.total(), (1 << 20) - (192 << 10));
    let backing = mid.backing.as_ref().expect("a backing file");
    assert_eq!((backing.name.as_str(), backing.format.as_deref()), ("base.raw", Some("raw")));
    assert_eq!(backing.path, directory.path().join("base.raw"));
    assert_eq!((top.cluster_size, base.cluster_size, base.backing.is_none()), (Some(65536), None, true));
    let drawn = description.to_string();
    assert!(drawn.contains("└─ ") && drawn.contains("64 KiB of it hidden from the top"), "{drawn}");
}

#[cfg(feature = "json")]
#[test]
fn a_description_is_json() {
    let Some(qemu) = Qemu::find() else { return };
    let directory = tempfile::tempdir().expect("a temporary directory");
    let chain = open(&three_layers(qemu, directory.path()));
    let json = serde_json::to_value(chain.describe().expect("described")).expect("JSON");
    assert_eq!(json["virtual-size"], 2 << 20);
    assert_eq!(json["layers"][1]["format"], "qcow2");
    assert_eq!(json["layers"][1]["held"]["zero"], 64 << 10);
    assert_eq!(json["layers"][1]["backing"]["name"], "base.raw");
    assert_eq!(json["layers"][0]["path"], directory.path().join("top.qcow2").display().to_string());
}

#[test]
fn a_reader_reads_and_seeks() {
    let Some(qemu) = Qemu::find() else { return };
    let directory = tempfile::tempdir().expect("a temporary directory");
    let chain = std::sync::Arc::new(open(&three_layers(qemu, directory.path())));
    let mut reader = ChainReader::new(std::sync::Arc::clone(&chain));
    assert_eq!(reader.seek(SeekFrom::Start(64 << 10)).expect("seek"), 64 << 10);
    let mut byte = [0; 1];
    reader.read_exact(&mut byte).expect("read");
    assert_eq!(byte, [2]);
    assert_eq!(reader.seek(SeekFrom::Current(-2)).expect("seek"), (64 << 10) - 1);
    reader.read_exact(&mut byte).expect("read");
    assert_eq!(byte, [1]);
    assert_eq!(reader.seek(SeekFrom::End(-1)).expect("seek"), (2 << 20) - 1);
    assert_eq!(reader.read(&mut [0; 8]).expect("read"), 1);
    assert_eq!(reader.read(&mut [0; 8]).expect("read"), 0);
    assert!(reader.seek(SeekFrom::Current(-(4 << 20))).is_err());
    assert_eq!(reader.seek(SeekFrom::Start(u64::MAX)).expect("seek"), u64::MAX);
    assert_eq!(reader.read(&mut byte).expect("read"), 0);
}

#[test]
fn ranges_past_the_end_are_errors() {
    let Some(qemu) = Qemu::find() else { return };
    let directory = tempfile::tempdir().expect("a temporary directory");
    let chain = open(&three_layers(qemu, directory.path()));
    for offset in [(2 << 20) - 511, 2 << 20, u64::MAX - 511, u64::MAX] {
        let result = chain.read_at(&mut [0; 512], GuestOffset::new(offset));
        assert!(matches!(result, Err(Error::PastEnd { len: 512, size, .. }) if size == 2 << 20), "{result:?}");
    }
    chain.read_at(&mut [], GuestOffset::new(2 << 20)).expect("nothing at the end");
    assert_eq!(chain.extents((2 << 20)..u64::MAX).count(), 0);
    assert!(chain.write_at(&[0; 512], GuestOffset::ZERO).is_err(), "opened for reading");
}

#[test]
fn many_threads_read_one_chain() {
    let Some(qemu) = Qemu::find() else { return };
    let mut rng = Rng::new(11);
    let images = Images::random(qemu, &mut rng);
    let chain = images.open();
    std::thread::scope(|scope| {
        for seed in 0..8 {
            let (chain, model) = (&chain, &images.top().model);
            scope.spawn(move || {
                let mut rng = Rng::new(seed);
                for _ in 0..50 {
                    let range = rng.range(chain.virtual_size(), 512);
                    let mut buf = vec![0xa5; usize::try_from(range.end - range.start).unwrap()];
                    chain.read_at(&mut buf, GuestOffset::new(range.start)).expect("read");
                    let start = usize::try_from(range.start).unwrap();
                    assert!(buf == model[start..start + buf.len()]);
                }
            });
        }
    });
}

#[test]
fn a_hundred_layers_open_and_read() {
    let Some(qemu) = Qemu::find() else { return };
    let directory = tempfile::tempdir().expect("a temporary directory");
    let at = |index: usize| directory.path().join(format!("{index}")).display().to_string();
    qemu.img(&["create", "-q", "-f", "qcow2", &at(0), "8M"]);
    qemu.io(Path::new(&at(0)), &["write -P 7 0 64k"]);
    for index in 1..100 {
        // The size is told and the backing file not opened: a hundred layers would be opened a hundred times.
        let backing = format!("{}", index - 1);
        qemu.img(&["create", "-q", "-u", "-f", "qcow2", "-b", &backing, "-F", "qcow2", &at(index), "8M"]);
    }
    let top = PathBuf::from(at(99));
    let chain = open(&top);
    assert_eq!(chain.layers().len(), 100);
    let extents: Vec<_> = chain.extents(0..u64::MAX).map(|extent| extent.expect("an extent")).collect();
    assert_eq!(extents.len(), 2);
    assert_eq!((extents[0].layer, extents[0].len, extents[1].layer), (Some(99), 64 << 10, None));
    let mut buf = [0; 512];
    chain.read_at(&mut buf, GuestOffset::new(4096)).expect("read");
    assert_eq!(buf, [7; 512]);

    let shallow = options(directory.path()).with_max_depth(99);
    let result = Chain::open(&top, &shallow);
    assert!(matches!(&result, Err(Error::Depth { limit: 99, .. })), "{result:?}");
    Chain::open(&top, &shallow.with_max_depth(100)).expect("just deep enough");
}

#[test]
fn layers_are_locked_as_they_are_used() {
    let Some(qemu) = Qemu::find() else { return };
    let directory = tempfile::tempdir().expect("a temporary directory");
    let top = three_layers(qemu, directory.path());
    let writer = Chain::open(&top, &options(directory.path()).with_writable(1)).expect("opened for writing");
    assert!(!writer.top().node.is_read_only() && writer.layers()[1].node.is_read_only());
    let busy = |result: Result<Chain, Error>| match result {
        Err(Error::Storage(storage::Error::Busy { name, .. })) => name,
        other => panic!("not busy: {other:?}"),
    };
    assert_eq!(busy(Chain::open(&top, &options(directory.path()))), top.display().to_string());
    let mid = directory.path().join("mid.qcow2");
    assert_eq!(busy(Chain::open(&mid, &options(directory.path()).with_writable(1))), mid.display().to_string());
    Chain::open(&mid, &options(directory.path())).expect("two may read");
    let looking = options(directory.path()).with_lock(storage::LockMode::None);
    Chain::open(&top, &looking).expect("looking takes no locks");
    assert_ne!(qemu.try_img(&["info".as_ref(), top.as_os_str()]).code, 0, "QEMU sees our locks");
    drop(writer);
    qemu.info(&top);
}

#[test]
fn encrypted_layers_are_described_and_never_read() {
    let Some(qemu) = Qemu::find() else { return };
    let directory = tempfile::tempdir().expect("a temporary directory");
    let at = |name: &str| directory.path().join(name).display().to_string();
    let secret = ["--object", "secret,id=s,data=abc", "-o", "encrypt.format=luks,encrypt.key-secret=s"];
    let iterations = ["-o", "encrypt.iter-time=10"];
    let create = ["create", "-q", "-f", "qcow2"];
    qemu.img(&[&create[..], &secret, &iterations, &[&at("base"), "1M"]].concat());
    qemu.img(&[&create[..], &[&at("top"), "1M"]].concat());
    qemu.io(Path::new(&at("top")), &["write -z 0 64k"]);
    qemu.img(&["rebase", "-q", "-u", "-f", "qcow2", "-b", "base", "-F", "qcow2", &at("top")]);
    let chain = Chain::open(at("top"), &options(directory.path()).with_writable(1)).expect("it can be looked at");
    let description = chain.describe().expect("described");
    assert!(description.layers[1].flags.encrypted && !description.layers[0].flags.encrypted);
    // Even what the top alone decides is refused, before the first byte.
    let mut buf = [0xa5; 512];
    assert!(chain.read_at(&mut buf, GuestOffset::ZERO).is_err());
    assert_eq!(buf, [0xa5; 512]);
    assert!(chain.write_at(&buf, GuestOffset::ZERO).is_err());
    assert!(chain.write_zeroes_at(GuestOffset::ZERO, 512).is_err());
    assert!(chain.discard_at(GuestOffset::ZERO, 65536).is_err());
}

#[test]
fn extents_of_an_enormous_chain_come_at_once() {
    let Some(qemu) = Qemu::find() else { return };
    let directory = tempfile::tempdir().expect("a temporary directory");
    let at = |name: &str| directory.path().join(name).display().to_string();
    let size = "60T";
    qemu.img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", &at("base"), size]);
    qemu.io(Path::new(&at("base")), &["write -P 1 30T 64k", "write -P 1 59T 64k"]);
    qemu.img(&[
        "create",
        "-q",
        "-u",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=2M",
        "-b",
        "base",
        "-F",
        "qcow2",
        &at("top"),
        size,
    ]);
    qemu.io(Path::new(&at("top")), &["write -z 59T 2M", "write -P 2 60800G 64k"]);
    let chain = open(Path::new(&at("top")));
    let start = std::time::Instant::now();
    let found: Vec<_> = chain.extents(0..u64::MAX).map(|extent| extent.expect("an extent")).collect();
    let held: Vec<_> = found.iter().filter_map(|e| e.layer.map(|layer| (layer, e.guest.get() >> 30))).collect();
    assert_eq!(held, [(1, 30 << 10), (0, 59 << 10), (0, 60800)]);
    assert_eq!(found.last().expect("an end").end(), 60 << 40);
    chain.describe().expect("described");
    assert!(start.elapsed() < std::time::Duration::from_secs(5), "{:?}", start.elapsed());
}

/// Chains need no files: any [`storage::FileSystem`] will do, and the rules stay.
#[test]
fn a_chain_in_memory() {
    use qcow2_chain::image::{CreateOptions, Image};
    use std::sync::Arc;
    let names = Arc::new(storage::MemoryFileSystem::new());
    let create = |path: &str, backing: Option<&str>| {
        let bytes = Arc::new(storage::MemoryStorage::new(path));
        let mut options = CreateOptions::default();
        options.size = 1 << 20;
        options.backing = backing.map(|name| (name.as_bytes().to_vec(), b"qcow2".to_vec()));
        let shared: Arc<dyn storage::Storage> = Arc::clone(&bytes) as _;
        Image::create(shared, &options).expect("created").close().expect("closed");
        names.insert(path, bytes);
    };
    create("/vm/base", None);
    create("/vm/top", Some("base"));
    create("/vm/out", Some("../base"));
    create("/vm/one", Some("two"));
    create("/vm/two", Some("./one"));
    let shared: Arc<dyn storage::FileSystem> = Arc::clone(&names) as _;
    let beneath = options(Path::new("/vm"));

    let base = Chain::open_in(&shared, Path::new("/vm/base"), &beneath.clone().with_writable(1)).expect("opened");
    base.write_at(b"below", GuestOffset::new(70_000)).expect("written");
    base.close().expect("closed");
    let chain = Chain::open_in(&shared, Path::new("/vm/top"), &beneath.clone().with_writable(1)).expect("opened");
    chain.write_at(b"above", GuestOffset::new(70_005)).expect("written");
    let mut buf = [0; 12];
    chain.read_at(&mut buf, GuestOffset::new(69_999)).expect("read");
    assert_eq!(&buf, b"\0belowabove\0");
    chain.discard_at(GuestOffset::ZERO, 1 << 20).expect("discarded");
    chain.read_at(&mut buf, GuestOffset::new(69_999)).expect("read");
    assert_eq!(buf, [0; 12]);
    chain.close().expect("closed");

    let result = Chain::open_in(&shared, Path::new("/vm/one"), &beneath);
    assert!(matches!(result, Err(Error::Loop { .. })), "{result:?}");
    let result = Chain::open_in(&shared, Path::new("/vm/out"), &beneath);
    assert!(matches!(result, Err(Error::Refused { .. })), "{result:?}");
}

/// The digest is that of the bytes, however they are mapped and whatever layer holds them.
#[test]
fn a_digest_is_of_what_the_guest_reads() {
    let Some(qemu) = Qemu::find() else { return };
    cases("digests", 12, |rng| {
        let dir = tempfile::tempdir().unwrap();
        let mut base = RandomImage::create(qemu, dir.path().join("base.qcow2"), Shape::random(rng));
        base.apply_random(qemu, rng, 8);
        let mut top = RandomImage::create_over(qemu, dir.path().join("top.qcow2"), Shape::random(rng), &base);
        top.apply_random(qemu, rng, 8);
        let chain = Chain::open(&top.path, &ChainOptions::default().beneath(dir.path())).unwrap();
        assert_eq!(chain.digest(&|| false).unwrap(), crc32fast::hash(&top.model), "{top}");
    });
}
