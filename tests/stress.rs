//! Several threads on one image: writes, zeroes, discards, flushes and reads at the same time, each thread with a model of
//! the part of the disk that is its own. The parts meet within clusters, so that neighbours share mappings.

use std::sync::Arc;

use qcow2_chain::format::{ClusterBits, GuestOffset, RefcountOrder};
use qcow2_chain::image::{CheckOptions, CreateOptions, Image, OpenOptions, check};
use qcow2_chain::storage::MemoryStorage;

use crate::support::rng::{Rng, cases, count};

const CLUSTER: u64 = 1024;
const THREADS: u64 = 4;
/// What belongs to one thread: no multiple of the cluster size.
const PART: u64 = 50_000;

/// Random things done to one part. Returns what it must hold then.
fn work(image: &Image, start: u64, rng: &mut Rng, steps: u64) -> Vec<u8> {
    let mut model = vec![0; usize::try_from(PART).unwrap()];
    for step in 0..steps {
        let range = rng.range(PART, 512);
        let span = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
        let (at, len) = (GuestOffset::new(start + range.start), range.end - range.start);
        match rng.within(0..10) {
            0..4 => {
                let byte = rng.pattern();
                image.write_at(&vec![byte; span.len()], at).unwrap();
                model[span].fill(byte);
            }
            4 => {
                image.write_zeroes_at(at, len).unwrap();
                model[span].fill(0);
            }
            5 | 6 => {
                image.discard_at(at, len).unwrap();
                // Whole clusters of the range, and nothing of the neighbours.
                let first = (start + range.start).next_multiple_of(CLUSTER);
                let last = (start + range.end) / CLUSTER * CLUSTER;
                if first < last {
                    let [first, last] = [first, last].map(|at| usize::try_from(at - start).unwrap());
                    model[first..last].fill(0);
                }
            }
            7 => image.flush().unwrap(),
            _ => {
                let mut read = vec![0xee; span.len()];
                image.read_at(&mut read, at).unwrap();
                assert!(read == model[span.clone()], "step {step}: {span:?} of the part at {start}");
            }
        }
    }
    model
}

#[test]
fn threads_on_one_image_see_their_own_writes_and_nobody_else_s() {
    cases("threads on one image", count("QCOW2_CHAIN_STRESS_CASES", 12), |rng| {
        let storage = Arc::new(MemoryStorage::new("disk"));
        let options = CreateOptions::new((THREADS * PART).next_multiple_of(512))
            .with_cluster_bits(ClusterBits::new(10).unwrap())
            .with_refcount_order(RefcountOrder::new(rng.pick(&[0, 4, 6])).unwrap());
        let image = Image::create(storage.clone(), &options).unwrap();
        let mut seeds: Vec<Rng> = (0..THREADS).map(|_| Rng::new(rng.next_u64())).collect();
        let models: Vec<Vec<u8>> = std::thread::scope(|scope| {
            let image = &image;
            let threads = seeds.iter_mut().enumerate();
            let running: Vec<_> =
                threads.map(|(number, rng)| scope.spawn(move || work(image, number as u64 * PART, rng, 300))).collect();
            running.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        image.close().unwrap();
        let report = check(&*storage, &CheckOptions::default()).unwrap();
        assert!(report.is_clean(), "{report:?}");
        let image = Image::open(storage, &OpenOptions::default()).unwrap();
        for (number, model) in models.iter().enumerate() {
            let mut read = vec![0xee; model.len()];
            image.read_at(&mut read, GuestOffset::new(number as u64 * PART)).unwrap();
            assert!(read == *model, "the part of thread {number}");
        }
    });
}
