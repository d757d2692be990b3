//! Images as an enemy would make them, storages that fail once, and many threads on one image.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use qcow2_chain::format::{ClusterBits, GuestOffset, RefcountOrder, Version};
use qcow2_chain::image::{CheckOptions, CreateOptions, Error, Image, OpenOptions, Preallocation, ResizeOptions, check};
use qcow2_chain::storage::{self, MemoryStorage, Storage};

use crate::support::rng::{Rng, cases, trace};

fn options(rng: &mut Rng) -> CreateOptions {
    let mut options = CreateOptions::new(0);
    options.extended_l2 = rng.chance(1, 3);
    let bits = if options.extended_l2 { 14 } else { rng.pick(&[9, 9, 10, 12]) };
    options.cluster_bits = ClusterBits::new(bits).unwrap();
    options.size = rng.within(1..200) << bits;
    options.refcount_order = RefcountOrder::new(u32::try_from(rng.within(0..7)).unwrap()).unwrap();
    if !options.extended_l2 && rng.chance(1, 4) {
        options.version = Version::V2;
        options.refcount_order = RefcountOrder::default();
    }
    if rng.chance(1, 4) {
        options.preallocation = Preallocation::Metadata;
    }
    options
}

/// One random operation; what it says does not matter, only that it says something.
fn poke(image: &Image, rng: &mut Rng) {
    let size = image.virtual_size();
    let unit = image.geometry().cluster_size();
    let end = size.clamp(1, 4 << 20);
    let base = if rng.chance(1, 8) { size.saturating_sub(end) } else { 0 };
    let Range { start, end } = rng.range(end, unit);
    let (at, len) = (GuestOffset::new(base + start), (end - start).min(64 << 10));
    let mut buf = vec![0x5a; usize::try_from(len).unwrap()];
    match rng.within(0..12) {
        0..5 => drop(image.write_at(&buf, at)),
        5 => drop(image.write_zeroes_at(at, len)),
        6 => drop(image.discard_at(at, len)),
        7 => drop(image.flush()),
        8 => drop(image.read_at(&mut buf, at)),
        9 => drop(image.extents(base..base + (4 << 20)).take(1000).filter(std::result::Result::is_ok).count()),
        10 => drop(image.snapshots().and_then(|_| image.bitmaps())),
        _ => {
            let size = (rng.within(0..300) * unit / 2) & !511;
            drop(image.resize(size, &ResizeOptions::default().with_shrink(true)));
        }
    }
}

/// Overwrites words of an image's metadata with what hurts.
fn mutate(bytes: &mut [u8], cluster: usize, rng: &mut Rng) {
    let clusters = (bytes.len() / cluster) as u64;
    let metadata: Vec<usize> = (0..bytes.len() / 8)
        .filter(|word| {
            let word = &bytes[word * 8..word * 8 + 8];
            // Data is 0x5a all over: the rest is metadata. Words that hold nothing are seldom of interest.
            word != [0x5a; 8] && word != [0; 8]
        })
        .collect();
    for _ in 0..rng.within(1..4) {
        let word = if rng.chance(3, 4) {
            rng.pick(&metadata)
        } else {
            usize::try_from(rng.within(0..bytes.len() as u64 / 8)).unwrap()
        };
        let flags = rng.pick(&[0, 1, 1 << 63, 1 << 63, 1 << 63 | 1, 1 << 62, 3 << 62]);
        let value = match rng.within(0..8) {
            0..4 => flags | (rng.within(0..clusters + 2) * cluster as u64),
            4 => flags | rng.next_u64() & 0x00ff_ffff_ffff_fe00,
            5 => u64::MAX >> rng.within(0..64),
            6 => 0,
            _ => {
                let old = u64::from_be_bytes(bytes[word * 8..word * 8 + 8].try_into().unwrap());
                old ^ 1 << rng.within(0..64)
            }
        };
        bytes[word * 8..word * 8 + 8].copy_from_slice(&value.to_be_bytes());
    }
}

#[test]
fn no_operation_on_a_hostile_image_panics() {
    cases("hostile images that are written", 1500, |rng| {
        let options = options(rng);
        let sound = Arc::new(MemoryStorage::new("sound"));
        let image = Image::create(sound.clone(), &options).expect("created");
        for _ in 0..rng.within(0..12) {
            poke(&image, rng);
        }
        image.close().expect("closed");
        let mut bytes = sound.to_vec();
        let cluster = 1 << options.cluster_bits.get();
        mutate(&mut bytes, cluster, rng);
        let hostile = Arc::new(MemoryStorage::with_capacity_limit("hostile", 64 << 20));
        if hostile.write_at(&bytes, 0).is_err() {
            return;
        }
        let open = OpenOptions::default().with_write(true);
        for _ in 0..2 {
            let Ok(image) = Image::open(hostile.clone(), &open) else { return };
            for _ in 0..12 {
                poke(&image, rng);
            }
            drop(image.close());
        }
    });
}

/// A small image with one word of it replaced, open for writing.
fn with_word(at: impl FnOnce(&[u8]) -> usize, value: u64) -> (Arc<MemoryStorage>, Image) {
    let storage = Arc::new(MemoryStorage::new("hostile"));
    let image = Image::create(storage.clone(), &CreateOptions::new(1 << 20)).expect("created");
    image.write_at(&[0x5a; 65536], GuestOffset::ZERO).expect("written");
    image.close().expect("closed");
    let bytes = storage.to_vec();
    storage.write_at(&value.to_be_bytes(), at(&bytes) as u64).expect("memory");
    let image = Image::open(storage.clone(), &OpenOptions::default().with_write(true)).expect("opened");
    (storage, image)
}

fn word(bytes: &[u8], at: usize) -> usize {
    usize::try_from(u64::from_be_bytes(*bytes[at..].first_chunk().expect("within"))).expect("small")
}

#[test]
fn data_that_would_go_into_the_header_is_refused() {
    // The entry of guest cluster 0 reserves the refcount table's cluster for zeroes, or says that data lies there.
    let entry = |bytes: &[u8]| word(bytes, word(bytes, 40)) & 0xff_ffff_ffff_fe00;
    let template = with_word(|_| 0, 0x5146_49fb_0000_0003).0.to_vec();
    let table = word(&template, 48) as u64;
    for flags in [1 << 63, 1 << 63 | 1] {
        for len in [512, 65536] {
            let (storage, image) = with_word(entry, flags | table);
            let refused = image.write_at(&vec![1; len], GuestOffset::ZERO);
            assert!(matches!(refused, Err(Error::Overlap { .. })), "{refused:?}");
            assert!(matches!(image.flush(), Err(Error::Poisoned { .. })));
            let at = word(&template, 48);
            assert_eq!(storage.to_vec()[at..at + 65536], template[at..at + 65536]);
        }
    }
}

#[test]
fn an_l2_table_in_other_metadata_is_never_written() {
    let template = with_word(|_| 0, 0x5146_49fb_0000_0003).0.to_vec();
    let (l1, table) = (word(&template, 40), word(&template, 48));
    for other in [l1, table, word(&template, table)] {
        let (storage, image) = with_word(|_| l1, 1 << 63 | other as u64);
        let before = storage.to_vec();
        let refused = image.write_zeroes_at(GuestOffset::new(65536), 65536);
        assert!(matches!(refused, Err(Error::Overlap { .. })), "{refused:?}");
        // Only the corrupt bit, in the header, has changed.
        assert!(storage.to_vec()[65536..] == before[65536..]);
    }
}

/// A storage that fails when told to.
#[derive(Debug)]
struct Failing {
    inner: MemoryStorage,
    /// How many more writes and syncs succeed; one fails, and all is well again.
    fuse: AtomicU64,
    burnt: AtomicBool,
}

impl Failing {
    fn new() -> Arc<Self> {
        let inner = MemoryStorage::new("failing");
        Arc::new(Self { inner, fuse: AtomicU64::new(u64::MAX), burnt: AtomicBool::new(false) })
    }

    fn arm(&self, operations: u64) {
        self.burnt.store(false, Ordering::SeqCst);
        self.fuse.store(operations, Ordering::SeqCst);
    }

    fn burn(&self) -> storage::Result<()> {
        if self.fuse.fetch_sub(1, Ordering::SeqCst) == 0 {
            self.fuse.store(u64::MAX, Ordering::SeqCst);
            self.burnt.store(true, Ordering::SeqCst);
            return Err(storage::Error::NoSpace { name: "failing".to_owned(), need: 1 });
        }
        Ok(())
    }
}

impl Storage for Failing {
    fn name(&self) -> &'static str {
        "failing"
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> storage::Result<()> {
        self.inner.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> storage::Result<()> {
        self.burn()?;
        self.inner.write_at(buf, offset)
    }
    fn len(&self) -> storage::Result<u64> {
        self.inner.len()
    }
    fn set_len(&self, len: u64) -> storage::Result<()> {
        self.burn()?;
        self.inner.set_len(len)
    }
    fn sync(&self) -> storage::Result<()> {
        Ok(())
    }
    fn punch_range(&self, range: Range<u64>) -> storage::Result<()> {
        self.inner.punch_range(range)
    }
}

/// The content of an image that has no backing file.
fn content(image: &Image) -> Vec<u8> {
    let mut all = vec![0; usize::try_from(image.virtual_size()).unwrap()];
    image.read_at(&mut all, GuestOffset::ZERO).expect("read");
    all
}

#[track_caller]
fn assert_sound(storage: &dyn Storage) {
    let report = check(storage, &CheckOptions::default()).expect("checked");
    assert_eq!(report.corruptions, 0, "{report:?}");
}

#[test]
fn an_operation_that_failed_once_is_repeated_without_harm() {
    cases("storages that fail once", 60, |rng| {
        let options = options(rng);
        let storage = Failing::new();
        let image = Image::create(storage.clone(), &options).expect("created");
        let unit = image.geometry().cluster_size();
        let mut model = content(&image);
        for _ in 0..rng.within(4..30) {
            storage.arm(if rng.chance(1, 2) { rng.within(0..12) } else { u64::MAX });
            let kind = rng.within(0..10);
            let byte = rng.pattern();
            let range = if model.is_empty() { 0..0 } else { rng.range(model.len() as u64, unit) };
            let new_size = (rng.within(0..400) * unit / 2) & !511;
            let (at, len) = (GuestOffset::new(range.start), range.end - range.start);
            let span = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
            trace(&format!("{kind} on {range:?}, or size {new_size}"));
            // Tried until it succeeds: the storage fails once.
            for attempt in 0.. {
                assert!(attempt < 3, "fails for ever");
                let done = match kind {
                    0..5 => image.write_at(&vec![byte; span.len()], at),
                    5 => image.write_zeroes_at(at, len),
                    6 | 7 => image.flush(),
                    _ => image.resize(new_size, &ResizeOptions::default().with_shrink(true)),
                };
                match done {
                    Ok(()) => break,
                    Err(Error::Storage(storage::Error::NoSpace { .. })) => trace(&"the storage failed"),
                    Err(error) => panic!("{error}"),
                }
            }
            match kind {
                0..5 => model[span].fill(byte),
                5 => model[span].fill(0),
                6 | 7 => {}
                _ => model.resize(usize::try_from(new_size).unwrap(), 0),
            }
            assert!(content(&image) == model, "operation {kind} on {range:?}, {options:?}");
        }
        storage.arm(u64::MAX);
        image.close().expect("closed");
        assert_sound(&*storage);
        let image = Image::open(storage, &OpenOptions::default()).expect("opened");
        assert!(content(&image) == model);
    });
}

#[test]
fn threads_on_one_image_do_not_disturb_one_another() {
    cases("many threads", 24, |rng| {
        let mut options = options(rng);
        const THREADS: u64 = 4;
        // Not whole clusters: neighbours share some.
        let part = rng.within(3..60) * 512 * 7;
        options.size = part * THREADS;
        let storage = Arc::new(MemoryStorage::new("shared"));
        let image = Arc::new(Image::create(storage.clone(), &options).expect("created"));
        let models: Vec<Vec<u8>> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..THREADS)
                .map(|number| {
                    let (image, mut rng) = (Arc::clone(&image), Rng::new(rng.next_u64()));
                    scope.spawn(move || work(&image, number * part, part, &mut rng))
                })
                .collect();
            workers.into_iter().map(|worker| worker.join().expect("no panic")).collect()
        });
        assert!(content(&image) == models.concat());
        Arc::into_inner(image).expect("the last").close().expect("closed");
        let report = check(&*storage, &CheckOptions::default()).expect("checked");
        assert!(report.corruptions == 0 && report.leaks == 0, "{report:?}");
        let image = Image::open(storage, &OpenOptions::default()).expect("opened");
        assert!(content(&image) == models.concat());
    });
}

/// One thread's life in its part of the disk; returns what the part must hold.
fn work(image: &Image, start: u64, len: u64, rng: &mut Rng) -> Vec<u8> {
    let unit = image.geometry().cluster_size();
    let mut model = vec![0; usize::try_from(len).unwrap()];
    for _ in 0..120 {
        let range = rng.range(len, unit);
        let span = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
        let (at, count) = (GuestOffset::new(start + range.start), range.end - range.start);
        match rng.within(0..16) {
            0..7 => {
                let byte = rng.pattern();
                image.write_at(&vec![byte; span.len()], at).expect("written");
                model[span].fill(byte);
            }
            7 | 8 => {
                image.write_zeroes_at(at, count).expect("zeroed");
                model[span].fill(0);
            }
            9 | 10 => {
                image.discard_at(at, count).expect("discarded");
                // Whole clusters read as zeroes, what is left of others stays.
                let first = (start + range.start).next_multiple_of(unit);
                let mut end = start + range.end;
                if end != image.virtual_size() {
                    end -= end % unit;
                }
                if first < end {
                    let (first, end) = (first - start, end - start);
                    model[usize::try_from(first).unwrap()..usize::try_from(end).unwrap()].fill(0);
                }
            }
            11 => image.flush().expect("flushed"),
            _ => {
                let mut buf = vec![0xee; span.len()];
                image.read_at(&mut buf, at).expect("read");
                assert!(buf == model[span], "read of {range:?} at {start}");
            }
        }
    }
    model
}
