//! Power failures at every instant: the states that a recording storage makes, judged by our own reader and check.

use std::sync::Arc;

use qcow2_chain::format::{ClusterBits, GuestOffset, RefcountOrder, Version};
use qcow2_chain::image::{CheckOptions, CreateOptions, Image, OpenOptions, ResizeOptions, check};
use qcow2_chain::storage::crash::{CrashState, Recorder};
use qcow2_chain::storage::{MemoryStorage, Storage};

use crate::support::rng::{Rng, cases};

const SECTOR: usize = 512;

/// A disk and, sector by sector, everything that it held since it was last known to be durable.
struct History {
    now: Vec<u8>,
    past: Vec<Vec<u8>>,
}

impl History {
    fn new(now: Vec<u8>) -> Self {
        Self { past: vec![now.clone()], now }
    }

    fn change(&mut self, at: u64, len: u64, pattern: u8) {
        let at = usize::try_from(at).unwrap();
        self.now[at..at + usize::try_from(len).unwrap()].fill(pattern);
        self.past.push(self.now.clone());
    }

    /// Whether each sector is one that the disk once held.
    fn allows(&self, content: &[u8]) -> bool {
        content.len() == self.now.len()
            && (0..content.len()).step_by(SECTOR).all(|at| {
                let sector = at..(at + SECTOR).min(content.len());
                self.past.iter().rev().any(|then| then[sector.clone()] == content[sector.clone()])
            })
    }
}

fn options(rng: &mut Rng, size: u64) -> CreateOptions {
    let version = if rng.chance(1, 4) { Version::V2 } else { Version::V3 };
    let extended = version == Version::V3 && rng.chance(1, 4);
    let bits = if extended { 14 } else { rng.pick(&[9, 10, 12]) };
    let mut options = CreateOptions::new(size)
        .with_version(version)
        .with_cluster_bits(ClusterBits::new(bits).unwrap())
        .with_extended_l2(extended);
    if version == Version::V3 {
        options = options.with_refcount_order(RefcountOrder::new(rng.pick(&[0, 3, 4, 6])).unwrap());
    }
    options
}

fn new_image(rng: &mut Rng, size: u64) -> Vec<u8> {
    let storage = Arc::new(MemoryStorage::new("new"));
    let image = Image::create(storage.clone(), &options(rng, size)).expect("create");
    for _ in 0..rng.within(0..6) {
        let range = rng.range(size, 512);
        image
            .write_at(
                &vec![rng.pattern(); usize::try_from(range.end - range.start).unwrap()],
                GuestOffset::new(range.start),
            )
            .unwrap();
    }
    image.close().expect("close");
    storage.to_vec()
}

fn content(bytes: &[u8]) -> Vec<u8> {
    let storage = Arc::new(MemoryStorage::with_bytes("state", bytes));
    let image = Image::open(storage, &OpenOptions::default()).expect("a crash leaves an image that opens");
    let mut content = vec![0; usize::try_from(image.virtual_size()).unwrap()];
    image.read_at(&mut content, GuestOffset::ZERO).expect("a crash leaves an image that reads");
    content
}

/// At worst leaks; with `-r leaks`, nothing.
fn assert_sound(bytes: &[u8], what: &str) {
    let storage = MemoryStorage::with_bytes("state", bytes);
    let report = check(&storage, &CheckOptions::default()).expect("check");
    assert_eq!((report.corruptions, report.check_errors), (0, 0), "{what}: {report:?}");
}

/// Random writes, zeroes, discards and flushes on one image.
fn random_changes(rng: &mut Rng, image: &Image, disk: &mut History) {
    let size = disk.now.len() as u64;
    for _ in 0..rng.within(1..8) {
        let range = rng.range(size, 512);
        let (offset, len) = (GuestOffset::new(range.start), range.end - range.start);
        match rng.within(0..6) {
            0..3 => {
                let pattern = rng.pattern();
                image.write_at(&vec![pattern; usize::try_from(len).unwrap()], offset).unwrap();
                disk.change(range.start, len, pattern);
            }
            3 => {
                image.write_zeroes_at(offset, len).unwrap();
                disk.change(range.start, len, 0);
            }
            4 => {
                image.discard_at(offset, len).unwrap();
                let mut now = vec![0; disk.now.len()];
                image.read_at(&mut now, GuestOffset::ZERO).unwrap();
                disk.now.clone_from(&now);
                disk.past.push(now);
            }
            _ => {
                image.flush().unwrap();
            }
        }
    }
}

/// Runs random changes on a recorded image; returns the disk's history and the recorder.
fn recorded(rng: &mut Rng, recorder: &Arc<Recorder>) -> History {
    let size = rng.within(8..96) * 512;
    let start = new_image(rng, size);
    let mut disk = History::new(content(&start));
    let storage = Arc::new(recorder.storage("image", start));
    let image = Image::open(storage, &OpenOptions::default().with_write(true)).unwrap();
    random_changes(rng, &image, &mut disk);
    image.close().unwrap();
    disk
}

#[test]
fn every_crash_of_a_writer_leaves_old_or_new_sectors_and_at_worst_leaks() {
    let states = std::sync::atomic::AtomicUsize::new(0);
    cases("crashed writers", 400, |rng| {
        let recorder = Recorder::new();
        let disk = recorded(rng, &recorder);
        let seen = recorder.crash_states(rng.next_u64(), 24, |state: &CrashState| {
            assert!(disk.allows(&content(&state[0])), "a sector was never written so");
            assert_sound(&state[0], "after a crash");
            Ok::<(), ()>(())
        });
        states.fetch_add(seen.unwrap(), std::sync::atomic::Ordering::Relaxed);
        assert!(content(&recorder.durable()[0]) == disk.now, "close did not make everything durable");
    });
    println!("{} crash states", states.into_inner());
}

#[test]
fn every_crash_of_a_resize_leaves_the_old_disk_or_the_new() {
    cases("crashed resizes", 300, |rng| {
        let old = rng.within(8..96) * 512;
        let new = rng.within(1..160) * 512;
        let start = new_image(rng, old);
        let recorder = Recorder::new();
        let before = content(&start);
        let mut after = before.clone();
        after.resize(usize::try_from(new).unwrap(), 0);
        let storage = Arc::new(recorder.storage("image", start));
        let image = Image::open(storage, &OpenOptions::default().with_write(true)).unwrap();
        image.resize(new, &ResizeOptions::default().with_shrink(true)).unwrap();
        drop(image);
        let seen = recorder.crash_states(rng.next_u64(), 24, |state: &CrashState| {
            let now = content(&state[0]);
            assert!(now == before || now == after, "from {old} to {new}: neither the old disk nor the new");
            assert_sound(&state[0], "after a crash");
            Ok::<(), ()>(())
        });
        assert!(seen.unwrap() > 1 || old == new);
        assert!(content(&recorder.durable()[0]) == after, "resize did not make itself durable");
    });
}

/// The harness sees a missing barrier: for each sync that a writer makes, some run without it fails.
#[test]
fn a_barrier_left_out_is_found() {
    let fails_without = |number: usize| {
        (0..60).any(|case| {
            let mut rng = Rng::new(0xba22 + case);
            let recorder = Recorder::without_sync(number);
            let disk = recorded(&mut rng, &recorder);
            if recorder.syncs() <= number {
                return false;
            }
            let found = recorder.crash_states(case, 24, |state: &CrashState| {
                let storage = MemoryStorage::with_bytes("state", state[0].clone());
                let sound = check(&storage, &CheckOptions::default()).is_ok_and(|report| report.corruptions == 0);
                if sound && disk.allows(&content(&state[0])) { Ok(()) } else { Err(()) }
            });
            found.is_err()
        })
    };
    // The first flush of a writer: data and refcounts before mappings, then mappings before frees.
    assert!(fails_without(0), "the barrier before mappings is not proved");
    assert!(fails_without(1), "the barrier before frees is not proved");
}

#[test]
fn the_recorder_is_a_storage_like_any_other() {
    let recorder = Recorder::new();
    let storage = recorder.storage("image", vec![1; 2048]);
    storage.punch_range(512..1024).unwrap();
    storage.set_len(1536).unwrap();
    let mut bytes = vec![9; 2048];
    storage.read_at(&mut bytes, 0).unwrap();
    assert_eq!([&bytes[..512], &bytes[1024..1536]], [&[1; 512], &[1; 512]]);
    assert!(bytes[512..1024].iter().chain(&bytes[1536..]).all(|&byte| byte == 0));
}
