//! Rebase, against `qemu-img rebase` on copies of the same chains, and at every instant of a crash.

use std::path::PathBuf;
use std::sync::Arc;

use qcow2_chain::chain::{Chain, Layer, Node};
use qcow2_chain::format::{ClusterBits, GuestOffset, HeaderCluster, Limits};
use qcow2_chain::image::{CheckOptions, CreateOptions, Image, OpenOptions, RawImage, check};
use qcow2_chain::merge::{Error, Onto, Phase, Progress, RebaseOptions, Step, rebase, rebase_unsafe};
use qcow2_chain::storage::crash::{CrashState, Recorder};
use qcow2_chain::storage::{MemoryStorage, Storage};

use crate::support::images::{backing_of, random_backing, random_header, random_image, try_shown};
use crate::support::layers::{copy_of, format_of, layer, layers, name_of, open};
use crate::support::qemu::Qemu;
use crate::support::recipe::Shape;
use crate::support::rng::{Rng, cases, trace};

/// Whether one sector is all that differs.
fn is_one_sector(a: &[u8], b: &[u8]) -> bool {
    a.chunks(512).zip(b.chunks(512)).filter(|(a, b)| a != b).count() <= 1
}

#[test]
fn every_crash_of_a_header_change_leaves_the_old_backing_file_or_the_new() {
    let [changed, refused, torn] = [const { std::sync::atomic::AtomicUsize::new(0) }; 3];
    let count = |counter: &std::sync::atomic::AtomicUsize| counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    cases("header changes", 1500, |rng| {
        let Some((start, old)) = random_header(rng) else { return };
        let new = random_backing(rng);
        let recorder = Recorder::new();
        let storage = Arc::new(recorder.storage("image", start.clone()));
        let image = Image::open(storage.clone(), &OpenOptions::default().with_write(true)).unwrap();
        let before = image.header();
        let name = new.as_ref().map(|(name, _)| name.as_slice());
        let format = new.as_ref().and_then(|(_, format)| format.as_deref());
        if let Err(error) = image.set_backing_file(name, format) {
            // There was no room; nothing was written.
            assert_eq!(recorder.crash_states(1, 1, |_| Ok::<(), ()>(())).unwrap(), 1, "{error}");
            if error.to_string().contains("safely") {
                assert!(before.header.cluster_size() <= 4096, "{error}");
                count(&refused);
            }
            return;
        }
        let mut last = None;
        recorder
            .crash_states(rng.next_u64(), 24, |state: &CrashState| {
                let bytes = &state[0];
                let header = HeaderCluster::decode(bytes, bytes.len() as u64, &Limits::default()).expect("decodes");
                let now = backing_of(&header);
                assert!(now == old || now == new, "neither the old backing file nor the new");
                let others = |header: &HeaderCluster| {
                    let mut header = header.clone();
                    header.set_backing(None, None);
                    header.remove_extension(0x5143_4750);
                    (header.header.backing_file_offset, header.header.backing_file_size) = (0, 0);
                    (header.header, header.extensions)
                };
                assert_eq!(others(&header), others(&before), "everything else stays");
                last = Some(header);
                Ok::<(), ()>(())
            })
            .unwrap();
        let last = last.unwrap();
        assert_eq!(backing_of(&last), new);
        assert!(last.extension(0x5143_4750).is_none(), "no gap is left");
        assert_eq!(backing_of(&image.header()), new);
        let mut bytes = vec![0; start.len()];
        storage.read_at(&mut bytes, 0).unwrap();
        count(&changed);
        if !is_one_sector(&start, &bytes) {
            count(&torn);
        }
        // The header in memory is the one of the file: what is written next goes over the right bytes.
        let gone = image.set_backing_file(None, None);
        assert_eq!(backing_of(&image.header()), if gone.is_ok() { None } else { new });
    });
    let [changed, refused, torn] = [changed, refused, torn].map(std::sync::atomic::AtomicUsize::into_inner);
    println!("{changed} changes, {torn} of them over several sectors; {refused} refused");
    assert!(torn > 300 && refused < 100);
}

/// Rebases one random chain with our rebase and with QEMU's, and compares everything that can be compared.
fn check_rebase(qemu: Qemu, rng: &mut Rng, shapes: Vec<Shape>, other_shapes: Vec<Shape>) {
    let dir = tempfile::tempdir().unwrap();
    let ours = dir.path().join("ours");
    std::fs::create_dir(&ours).unwrap();
    let old = layers(qemu, &ours, rng, "old", shapes, 10);
    let mut new = layers(qemu, &ours, rng, "new", other_shapes, 10);
    if old.len() > 1 && rng.chance(1, 3) {
        // A sibling: the other chain shares a layer with this one.
        let shared = &old[usize::try_from(rng.within(0..old.len() as u64 - 1)).unwrap()];
        let shape = Shape::random(rng);
        new.push(layer(qemu, ours.join("sibling.qcow2"), rng, shape, Some(shared), 10));
    }
    let top = old.last().unwrap();
    if format_of(top) == "raw" {
        return;
    }
    old.iter().chain(&new).for_each(trace);
    let theirs = copy_of(&ours, "theirs");
    let index = usize::try_from(rng.within(0..old.len() as u64)).unwrap();
    let drop_equal = rng.chance(1, 3);
    let options = RebaseOptions::default().with_drop_equal(drop_equal);
    let chain = open(&top.path, "qcow2", 1);
    let before = chain.top().node.as_qcow2().unwrap().header();
    if !top.snapshots.is_empty() {
        let refused = rebase(&chain, Onto::Nothing, &options, &());
        assert!(matches!(refused, Err(Error::Refused { .. })), "{refused:?}");
        assert_eq!(chain.top().node.as_qcow2().unwrap().header(), before);
    }
    let options = options.with_ignore_snapshots(true);
    let (base, done) = match rng.within(0..3) {
        0 => (None, rebase(&chain, Onto::Nothing, &options, &())),
        1 if index > 0 => (Some(&old[old.len() - 1 - index]), rebase(&chain, Onto::Layer(index), &options, &())),
        _ => {
            let base = new.last().unwrap();
            let onto = open(&base.path, format_of(base), 0);
            (Some(base), rebase(&chain, Onto::Chain(&onto), &options, &()))
        }
    };
    done.expect("our rebase");
    chain.close().expect("the chain closes");

    let their_top = theirs.join(name_of(top));
    let (name, their_name) = (base.map_or(String::new(), name_of), their_top.to_string_lossy().into_owned());
    let mut args = vec!["rebase", "-q", "-f", "qcow2", "-b", &name];
    args.extend(base.into_iter().flat_map(|base| ["-F", format_of(base)]));
    args.push(&their_name);
    let run = qemu.try_img(&args);
    assert_eq!(run.code, 0, "QEMU's rebase: {}{}", run.stderr, top);

    let what = || format!("{top}onto {:?}, drop {drop_equal}", base.map(name_of));
    assert!(qemu.content(&top.path, None) == top.model, "the top reads as before: {}", what());
    qemu.assert_clean(&top.path);
    let run = qemu.try_img(&["compare", "-f", "qcow2", "-F", "qcow2", &top.path.to_string_lossy(), &their_name]);
    // QEMU 10.0 writes no zeroes into an image of version 2 without a backing file, where they would change nothing; then it
    // names one, which shows through.
    let shows_through = !top.backed && top.shape.compat == "0.10";
    assert!(run.code == 0 || shows_through, "{}{}{}", run.stdout, run.stderr, what());
    let [a, b] = [&top.path, &their_top].map(|path| qemu.info(path));
    for key in ["backing-filename", "backing-filename-format"] {
        assert_eq!(a[key], b[key], "{key}: {}", what());
    }
    // An internal snapshot shows the new backing file where it holds nothing itself, here as there.
    for (name, _) in &top.snapshots {
        let [ours, theirs] = [&top.path, &their_top].map(|path| qemu.content(path, Some(name)));
        assert!(ours == theirs || shows_through, "{name}: {}", what());
    }
}

#[test]
fn rebase_agrees_with_qemu() {
    let Some(qemu) = Qemu::find() else { return };
    cases("rebase", 60, |rng| {
        let mut shapes = |range: std::ops::Range<u64>| {
            let count = rng.within(range);
            (0..count).map(|_| Shape::random(rng)).collect::<Vec<_>>()
        };
        let (old, new) = (shapes(1..5), shapes(1..4));
        check_rebase(qemu, rng, old, new);
    });
}

/// Chains whose sides are almost the same: most data is compared, and little differs.
#[test]
fn rebase_onto_a_copy_writes_only_what_differs() {
    let Some(qemu) = Qemu::find() else { return };
    cases("rebase onto a copy", 40, |rng| {
        let dir = tempfile::tempdir().unwrap();
        let shapes = vec![Shape::random(rng), Shape::random(rng)];
        let old = layers(qemu, dir.path(), rng, "old", shapes, 10);
        let (base, top) = (&old[0], &old[1]);
        if !top.snapshots.is_empty() {
            return;
        }
        let copy = dir.path().join("copy.raw");
        let mut bytes = base.model.clone();
        let changed = if rng.chance(1, 2) { rng.range(base.shape.size, 512) } else { 0..0 };
        bytes[usize::try_from(changed.start).unwrap()..usize::try_from(changed.end).unwrap()].fill(rng.pattern());
        std::fs::write(&copy, bytes).unwrap();
        let chain = open(&top.path, "qcow2", 1);
        let report = rebase(&chain, Onto::Chain(&open(&copy, "raw", 0)), &RebaseOptions::default(), &()).unwrap();
        chain.close().unwrap();
        let written = report.copied + report.copied_in_kernel;
        let unit = if top.shape.extended_l2 { top.shape.cluster_size / 32 } else { top.shape.cluster_size };
        let most = if changed.is_empty() { 0 } else { (changed.end - changed.start).next_multiple_of(unit) + unit };
        assert!(written <= most, "{report:?} for {changed:?}: {top}");
        qemu.assert_clean(&top.path);
        assert!(qemu.content(&top.path, None) == top.model, "{top}");
    });
}

fn memory_layer(name: &str, bytes: Vec<u8>) -> Layer {
    let storage = Arc::new(MemoryStorage::with_bytes(name, bytes));
    let node = Node::Qcow2(Image::open(storage, &OpenOptions::default()).unwrap());
    Layer { node, path: PathBuf::from(name) }
}

#[test]
fn every_crash_of_a_rebase_leaves_a_disk_that_reads_as_before() {
    let [seen, switched] = [const { std::sync::atomic::AtomicUsize::new(0) }; 2];
    let count = |counter: &std::sync::atomic::AtomicUsize| counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    cases("crashed rebases", 300, |rng| {
        let sizes: [u64; 4] = std::array::from_fn(|_| rng.within(8..96) * 512);
        let (base, base_model) = random_image(rng, sizes[0], None);
        let (middle, middle_model) = random_image(rng, sizes[1], Some(("base", &base_model)));
        let (other, other_model) = random_image(rng, sizes[2], None);
        let alone = rng.chance(1, 5);
        let over = (!alone).then_some(("middle", &middle_model[..]));
        let (top, model) = random_image(rng, sizes[3], over);
        let recorder = Recorder::new();
        let storage = Arc::new(recorder.storage("top", top));
        let image = Image::open(storage, &OpenOptions::default().with_write(true)).unwrap();
        let top = Layer { node: Node::Qcow2(image), path: PathBuf::from("top") };
        let mut below = vec![memory_layer("middle", middle), memory_layer("base", base)];
        if alone {
            below.clear();
        }
        let chain = Chain::from_layers(top, below);
        let onto_other = Chain::from_layers(memory_layer("other", other), []);
        let onto = match rng.within(0..3) {
            0 if !alone => Onto::Nothing,
            1 if !alone => Onto::Layer(2),
            _ => Onto::Chain(&onto_other),
        };
        let options = RebaseOptions::default().with_drop_equal(rng.chance(1, 2));
        rebase(&chain, onto, &options, &()).unwrap();
        let new = match onto {
            Onto::Nothing => None,
            Onto::Layer(_) => Some(&b"base"[..]),
            Onto::Chain(_) => Some(&b"other"[..]),
        };
        let mut last = None;
        let states = recorder.crash_states(rng.next_u64(), 24, |state: &CrashState| {
            let storage = Arc::new(MemoryStorage::with_bytes("state", state[0].clone()));
            let report = check(&*storage, &CheckOptions::default()).unwrap();
            assert_eq!((report.corruptions, report.check_errors), (0, 0), "{report:?}");
            let image = Image::open(storage, &OpenOptions::default()).unwrap();
            let backing = image.header().backing_file;
            let below = match backing.as_deref() {
                None => &[][..],
                Some(b"middle") => &middle_model,
                Some(b"base") => &base_model,
                Some(b"other") => &other_model,
                name => panic!("a name that nobody gave: {name:?}"),
            };
            assert!(try_shown(&image, below).unwrap() == model, "over {backing:?} in {onto:?}");
            count(if backing.as_deref() == new { &switched } else { &seen });
            last = Some((backing, report.leaks));
            Ok::<(), ()>(())
        });
        assert!(states.unwrap() > 1);
        assert_eq!(last, Some((new.map(<[u8]>::to_vec), 0)), "rebase did not make itself durable");
    });
    let [seen, switched] = [seen, switched].map(std::sync::atomic::AtomicUsize::into_inner);
    println!("{seen} states over the old backing file, {switched} over the new");
    assert!(seen > 1000 && switched > 1000);
}

/// The harness sees a missing barrier: without the sync of the data, the header can be ahead of it.
#[test]
fn a_rebase_without_its_barriers_is_found() {
    let fails_without = |number: usize| {
        (0..20).any(|seed| {
            let mut rng = Rng::new(0x5eba + seed);
            let (base, base_model) = random_image(&mut rng, 20 << 10, None);
            let (top, model) = random_image(&mut rng, 20 << 10, Some(("base", &base_model)));
            let recorder = Recorder::without_sync(number);
            let storage = Arc::new(recorder.storage("top", top));
            let image = Image::open(storage, &OpenOptions::default().with_write(true)).unwrap();
            let top = Layer { node: Node::Qcow2(image), path: PathBuf::from("top") };
            let chain = Chain::from_layers(top, [memory_layer("base", base)]);
            rebase(&chain, Onto::Nothing, &RebaseOptions::default(), &()).unwrap();
            let found = recorder.crash_states(seed, 24, |state: &CrashState| {
                let storage = Arc::new(MemoryStorage::with_bytes("state", state[0].clone()));
                let Ok(image) = Image::open(storage, &OpenOptions::default()) else { return Err(()) };
                let below = if image.header().backing_file.is_some() { &base_model[..] } else { &[] };
                if try_shown(&image, below).is_some_and(|content| content == model) { Ok(()) } else { Err(()) }
            });
            found.is_err()
        })
    };
    assert!(fails_without(0) && fails_without(1), "the barrier before the header is not proved");
}

/// The size of a sparse disk costs nothing.
#[test]
fn a_sparse_disk_is_rebased_by_what_it_holds() {
    let sparse = |name: &str, size: u64, backing: Option<&str>, byte: u8| {
        let storage = Arc::new(MemoryStorage::new(name));
        let mut options = CreateOptions::new(size).with_cluster_bits(ClusterBits::new(21).unwrap());
        options.backing = backing.map(|name| (name.as_bytes().to_vec(), b"qcow2".to_vec()));
        let image = Image::create(storage.clone(), &options).unwrap();
        for at in [0, size / 2, size - (4 << 20)] {
            image.write_at(&vec![byte; 2 << 20], GuestOffset::new(at)).unwrap();
        }
        image.close().unwrap();
        storage.to_vec()
    };
    for onto_nothing in [true, false] {
        let size = 64 << 40;
        let top = Arc::new(MemoryStorage::new("top"));
        let mut options = CreateOptions::new(size).with_cluster_bits(ClusterBits::new(21).unwrap());
        options.backing = Some((b"base".to_vec(), b"qcow2".to_vec()));
        let image = Image::create(top, &options).unwrap();
        let top = Layer { node: Node::Qcow2(image), path: PathBuf::from("top") };
        let chain = Chain::from_layers(top, [memory_layer("base", sparse("base", size, None, 1))]);
        let other = Chain::from_layers(memory_layer("other", sparse("other", size / 2, None, 2)), []);
        let onto = if onto_nothing { Onto::Nothing } else { Onto::Chain(&other) };
        let report = rebase(&chain, onto, &RebaseOptions::default(), &()).unwrap();
        let (copied, zeroed) = (report.copied + report.copied_in_kernel, report.zeroed);
        assert_eq!((copied, zeroed), (6 << 20, if onto_nothing { 0 } else { 4 << 20 }), "{report:?}");
    }
}

/// What both sides share is not read, and what equals the new backing file can be dropped.
#[test]
fn what_is_the_same_is_neither_read_nor_kept() {
    let size = 1 << 20;
    let image = |name: &str, backing: Option<&str>, fill: &[(u64, u8)]| {
        let storage = Arc::new(MemoryStorage::new(name));
        let mut options = CreateOptions::new(size).with_cluster_bits(ClusterBits::new(12).unwrap());
        options.backing = backing.map(|name| (name.as_bytes().to_vec(), b"qcow2".to_vec()));
        let image = Image::create(storage.clone(), &options).unwrap();
        for (at, byte) in fill {
            image.write_at(&[*byte; 8192], GuestOffset::new(*at)).unwrap();
        }
        image.close().unwrap();
        storage
    };
    let open = |storage: &Arc<MemoryStorage>, write: bool| {
        let image = Image::open(storage.clone(), &OpenOptions::default().with_write(write)).unwrap();
        Layer { node: Node::Qcow2(image), path: PathBuf::from(storage.name()) }
    };
    let base = image("base", None, &[(0, 1), (65536, 2), (131_072, 3)]);
    let old = image("old", Some("base"), &[(0, 4)]);
    let new = image("new", Some("base"), &[(4096, 4), (196_608, 5)]);
    let top = image("top", Some("old"), &[(196_608, 5), (262_144, 6)]);
    let chain = Chain::from_layers(open(&top, true), [open(&old, false), open(&base, false)]);
    let onto = Chain::from_layers(open(&new, false), [open(&base, false)]);
    let mut before = vec![0; 1 << 20];
    chain.read_at(&mut before, GuestOffset::ZERO).unwrap();
    let report = rebase(&chain, Onto::Chain(&onto), &RebaseOptions::default().with_drop_equal(true), &()).unwrap();
    // Of the first three clusters the old chain holds two and the new one the last two; the second reads the same in both.
    assert_eq!((report.compared, report.copied, report.zeroed), (8192, 4096, 4096), "{report:?}");
    assert_eq!(report.dropped, 8192, "{report:?}");
    let chain = Chain::from_layers(open(&top, false), [open(&new, false), open(&base, false)]);
    let mut after = vec![0; 1 << 20];
    chain.read_at(&mut after, GuestOffset::ZERO).unwrap();
    assert!(after == before);
    assert_eq!(check(&*top, &CheckOptions::default()).unwrap().leaks, 0);
}

/// Stopped while it gives up what is equal, a rebase has its new backing file already, and reads as before.
#[test]
fn a_rebase_stopped_while_dropping_stands_on_its_new_backing_file() {
    struct Stop(std::sync::atomic::AtomicBool);
    impl Progress for Stop {
        fn step(&self, step: &Step<'_>) {
            self.0.fetch_or(step.phase == Phase::Emptying, std::sync::atomic::Ordering::SeqCst);
        }
        fn is_cancelled(&self) -> bool {
            self.0.load(std::sync::atomic::Ordering::SeqCst)
        }
    }
    cases("rebases stopped late", 30, |rng| {
        let size = rng.within(8..96) * 512;
        let (base, base_model) = random_image(rng, size, None);
        let (other, other_model) = random_image(rng, size, None);
        let (top, model) = random_image(rng, size, Some(("base", &base_model)));
        let storage = Arc::new(MemoryStorage::with_bytes("top", top));
        let image = Image::open(storage.clone(), &OpenOptions::default().with_write(true)).unwrap();
        let top = Layer { node: Node::Qcow2(image), path: PathBuf::from("top") };
        let chain = Chain::from_layers(top, [memory_layer("base", base)]);
        let onto = Chain::from_layers(memory_layer("other", other), []);
        let options = RebaseOptions::default().with_drop_equal(true);
        let done = rebase(&chain, Onto::Chain(&onto), &options, &Stop(false.into()));
        // Where the top holds nothing, there is nothing to stop at.
        assert!(matches!(done, Ok(_) | Err(Error::Cancelled)), "{done:?}");
        let header = chain.top().node.as_qcow2().unwrap().header();
        assert_eq!(header.backing_file.as_deref(), Some(&b"other"[..]));
        for settle in [false, true] {
            if settle {
                chain.flush().unwrap();
            }
            let state = Arc::new(MemoryStorage::with_bytes("state", storage.to_vec()));
            let report = check(&*state, &CheckOptions::default()).unwrap();
            assert_eq!((report.corruptions, report.check_errors), (0, 0), "{report:?}");
            let image = Image::open(state, &OpenOptions::default()).unwrap();
            assert!(try_shown(&image, &other_model).unwrap() == model, "flushed {settle}");
        }
    });
}

#[test]
fn what_cannot_be_rebased_is_refused() {
    let mut rng = Rng::new(1);
    let (base, _) = random_image(&mut rng, 8192, None);
    let chain = |writable: bool| {
        let mut rng = Rng::new(2);
        let (top, _) = random_image(&mut rng, 8192, Some(("base", &[])));
        let storage = Arc::new(MemoryStorage::with_bytes("top", top));
        let image = Image::open(storage, &OpenOptions::default().with_write(writable)).unwrap();
        let top = Layer { node: Node::Qcow2(image), path: PathBuf::from("top") };
        Chain::from_layers(top, [memory_layer("base", base.clone())])
    };
    let refused = |chain: &Chain, onto: Onto<'_>, why: &str| {
        let done = rebase(chain, onto, &RebaseOptions::default(), &());
        let Err(Error::Refused { why: found, .. }) = done else { panic!("{done:?}") };
        assert!(found.contains(why), "{found}");
    };
    refused(&chain(false), Onto::Nothing, "not open for writing");
    refused(&chain(true), Onto::Layer(0), "no such layer");
    refused(&chain(true), Onto::Layer(2), "no such layer");
    let raw = Layer {
        node: Node::Raw(RawImage::open(Arc::new(MemoryStorage::with_bytes("raw", [1; 512]))).unwrap()),
        path: PathBuf::from("raw"),
    };
    refused(&Chain::from_layers(raw, []), Onto::Nothing, "raw");
    let top = chain(true);
    refused(&top, Onto::Chain(&top), "its own backing file");

    let image = top.top().node.as_qcow2().unwrap();
    assert!(matches!(rebase_unsafe(image, Some(b"x"), None), Err(Error::Refused { .. })));
    rebase_unsafe(image, Some(b"elsewhere/x"), Some(b"raw")).unwrap();
    assert_eq!(backing_of(&image.header()), Some((b"elsewhere/x".to_vec(), Some(b"raw".to_vec()))));
    rebase_unsafe(image, None, None).unwrap();
    assert_eq!(backing_of(&image.header()), None);
}
