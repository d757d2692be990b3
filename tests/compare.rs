//! Comparison on several threads: of all that differs, the first counts, whichever thread comes upon it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use qcow2_chain::chain::{Chain, CompareOptions, Comparison, Error, Layer, Node, compare};
use qcow2_chain::format::{ClusterBits, GuestOffset};
use qcow2_chain::image::{CreateOptions, Image, OpenOptions};
use qcow2_chain::progress::{Progress, Step};
use qcow2_chain::storage::fault::{Fault, Faults, FaultyStorage};
use qcow2_chain::storage::{MemoryStorage, Storage};

use crate::support::rng::{Rng, cases};

const SIZE: u64 = 24 << 20;

/// An image in memory with data and zeroes in many places, the same for the same seed.
fn image(seed: u64) -> Arc<MemoryStorage> {
    let storage = Arc::new(MemoryStorage::new("image"));
    let options = CreateOptions::new(SIZE).with_cluster_bits(ClusterBits::new(12).unwrap());
    let image = Image::create(storage.clone(), &options).unwrap();
    let mut rng = Rng::new(seed);
    for _ in 0..60 {
        let range = rng.range(SIZE, 4096);
        let len = (range.end - range.start).min(900_000);
        let bytes = vec![rng.pattern(); usize::try_from(len).unwrap()];
        image.write_at(&bytes, GuestOffset::new(range.start)).unwrap();
    }
    image.close().unwrap();
    storage
}

fn chain(storage: Arc<dyn Storage>, write: bool) -> Chain {
    let image = Image::open(storage, &OpenOptions::default().with_write(write)).unwrap();
    Chain::from_layers(Layer { node: Node::Qcow2(image), path: "image".into() }, [])
}

#[test]
fn the_first_of_many_differences_is_told() {
    cases("many differences", 40, |rng| {
        let seed = rng.next_u64();
        let (a, b) = (chain(image(seed), false), chain(image(seed), true));
        assert_eq!(compare(&a, &b, &CompareOptions::default(), &|| false).unwrap(), Comparison::Same);
        let places: Vec<u64> = (0..rng.within(1..6)).map(|_| rng.within(0..SIZE)).collect();
        for place in &places {
            let mut byte = [0];
            b.read_at(&mut byte, GuestOffset::new(*place)).unwrap();
            b.write_at(&[!byte[0]], GuestOffset::new(*place)).unwrap();
        }
        // A place that was drawn twice is as before.
        let odd = places.iter().filter(|place| places.iter().filter(|other| other == place).count() % 2 == 1);
        let first = odd.min().copied();
        let expected = first.map_or(Comparison::Same, Comparison::DiffersAt);
        assert_eq!(compare(&a, &b, &CompareOptions::default(), &|| false).unwrap(), expected);
        assert_eq!(compare(&b, &a, &CompareOptions::default(), &|| false).unwrap(), expected);
        let Some(first) = first else { return };
        for (end, found) in [(first, Comparison::Same), (first + 1, expected)] {
            let options = CompareOptions::default().with_end(Some(end));
            assert_eq!(compare(&a, &b, &options, &|| false).unwrap(), found, "up to {end}");
        }
    });
}

/// Each call of the storage fails once. A difference at the very start is found before any of the data behind it matters.
#[test]
fn what_cannot_be_read_is_an_error_and_never_the_same() {
    let bytes = image(3);
    let same = chain(image(3), false);
    let (mut failed, mut calls) = (0, 0);
    loop {
        let faults = Faults::new(Fault::Io.at(calls));
        let faulty = Arc::new(FaultyStorage::new(bytes.clone(), &faults));
        if let Ok(image) = Image::open(faulty, &OpenOptions::default()) {
            let broken = Chain::from_layers(Layer { node: Node::Qcow2(image), path: "image".into() }, []);
            let done = compare(&broken, &same, &CompareOptions::default(), &|| false);
            if faults.calls() <= calls {
                assert_eq!(done.unwrap(), Comparison::Same);
                break;
            }
            assert!(matches!(done, Err(Error::Image(_))), "call {calls}: {done:?}");
            failed += 1;
        }
        calls += 1;
    }
    assert!(failed > 10, "only {failed} calls failed");
}

#[test]
fn a_comparison_tells_how_far_it_is() {
    let (a, b) = (chain(image(5), false), chain(image(5), false));
    let (calls, furthest) = (AtomicU64::new(0), AtomicU64::new(0));
    let watch = Watch { calls: &calls, furthest: &furthest, stop: u64::MAX };
    let found = compare(&a, &b, &CompareOptions::default(), &watch).unwrap();
    assert_eq!(found, Comparison::Same);
    assert!(calls.into_inner() > 5 && (SIZE / 2..SIZE).contains(&furthest.into_inner()));
    let stopped = compare(
        &a,
        &b,
        &CompareOptions::default(),
        &Watch { calls: &AtomicU64::new(0), furthest: &AtomicU64::new(0), stop: SIZE / 4 },
    );
    assert!(matches!(stopped, Err(Error::Cancelled)), "{stopped:?}");
}

/// Counts the calls and cancels past an offset.
struct Watch<'a> {
    calls: &'a AtomicU64,
    furthest: &'a AtomicU64,
    stop: u64,
}

impl Progress for Watch<'_> {
    fn step(&self, step: &Step<'_>) {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.furthest.fetch_max(step.done, Ordering::Relaxed);
    }

    fn is_cancelled(&self) -> bool {
        self.furthest.load(Ordering::Relaxed) > self.stop
    }
}
