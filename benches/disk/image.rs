//! One image: open, extents, read, write, check.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, Throughput};
use qcow2_chain::chain::{Chain, CompareOptions, Comparison, compare};
use qcow2_chain::format::{GuestOffset, HostOffset, L2Entry, L2Table, Version};
use qcow2_chain::image::{CheckOptions, Image, OpenOptions, Preallocation, check};
use qcow2_chain::storage::{Access, FileStorage, MemoryStorage};

use crate::setup::{Bed, noise, options, random, shuffled};

/// Clusters of the fragmented image.
const CLUSTERS: u64 = 16_384;

pub(crate) fn open(c: &mut Criterion) {
    let bed = Bed::new();
    bed.written("image", &options(CLUSTERS << 12, 12), &shuffled(CLUSTERS));
    bed.create("huge", &options(1 << 46, 16)).close().expect("closed");
    let mut group = c.benchmark_group("open");
    for (what, name) in [("64 MiB in 4 KiB clusters", "image"), ("64 TiB, empty", "huge")] {
        group.bench_function(what, |b| {
            b.iter(|| Image::open_path(bed.path(name), &OpenOptions::default()).expect("an image"));
        });
    }
    // What a chain costs over its layers: each is a file to open, a header, an L1 table.
    bed.written("layer 1", &options(64 << 20, 16), &[0]);
    for layer in 2..=100 {
        let below = format!("layer {}", layer - 1);
        bed.written(&format!("layer {layer}"), &options(64 << 20, 16).with_backing(below, "qcow2"), &[layer]);
    }
    group.bench_function("a chain of 100 layers", |b| b.iter(|| bed.open_chain("layer 100", 0)));
    group.finish();
}

/// One L2 table of 8,192 entries: decoded one by one, and told in runs.
pub(crate) fn l2_table(c: &mut Criterion) {
    let geometry = {
        let storage = Arc::new(MemoryStorage::new("image"));
        Image::create(storage, &options(1 << 30, 16)).expect("a new image").geometry()
    };
    let tables = [("in a row", 1_u64), ("each alone", 2)].map(|(what, step)| {
        let mut table = L2Table::empty(geometry, Version::V3);
        for index in 0..table.len() {
            let host = HostOffset::new(((index as u64 + 1) * step) << 16);
            table.set(index, &L2Entry::data(geometry, host));
        }
        (what, table)
    });
    let mut group = c.benchmark_group("L2 table");
    for (what, table) in &tables {
        group.throughput(Throughput::Elements(table.len() as u64));
        group.bench_function(format!("entries {what}, decoded"), |b| {
            b.iter(|| {
                for index in 0..table.len() {
                    black_box(table.get(index, HostOffset::ZERO).expect("sound"));
                }
            });
        });
        group.bench_function(format!("entries {what}, in runs"), |b| {
            b.iter(|| {
                let mut index = 0;
                while index < table.len() {
                    index += black_box(table.run(index, table.len() - index));
                }
            });
        });
    }
    group.finish();
}

/// Writes of single clusters in random order, in memory: what allocating and mapping cost without a file.
pub(crate) fn allocate(c: &mut Criterion) {
    let (order, cluster) = (shuffled(CLUSTERS), noise(4 << 10));
    let mut group = c.benchmark_group("allocate");
    group.sample_size(10).throughput(Throughput::Elements(CLUSTERS));
    group.bench_function("16,384 clusters of 4 KiB", |b| {
        let fresh = || {
            let storage = Arc::new(MemoryStorage::new("image"));
            Image::create(storage, &options(CLUSTERS << 12, 12)).expect("a new image")
        };
        let write = |image: &mut Image| {
            for &index in &order {
                image.write_at(&cluster, GuestOffset::new(index << 12)).expect("written");
            }
            image.flush().expect("flushed");
        };
        b.iter_batched_ref(fresh, write, BatchSize::PerIteration);
    });
    group.finish();
}

/// Two images with the same data, in other places of their files.
pub(crate) fn compare_images(c: &mut Criterion) {
    const SIZE: u64 = 256 << 20;
    let bed = Bed::new();
    bed.written("sequential", &options(SIZE, 16), &(0..SIZE >> 16).collect::<Vec<_>>());
    bed.written("random", &options(SIZE, 16), &shuffled(SIZE >> 16));
    let (a, b) = (bed.open_chain("sequential", 0), bed.open_chain("random", 0));
    let mut group = c.benchmark_group("compare");
    group.sample_size(10).throughput(Throughput::Bytes(SIZE));
    group.bench_function("256 MiB, equal", |bench| {
        bench.iter(|| {
            let found = compare(&a, &b, &CompareOptions::default(), &|| false).expect("compared");
            assert_eq!(found, Comparison::Same);
        });
    });
    group.finish();
}

pub(crate) fn extents(c: &mut Criterion) {
    let bed = Bed::new();
    bed.written("fragmented", &options(CLUSTERS << 12, 12), &shuffled(CLUSTERS));
    bed.written("sparse", &options(1 << 46, 16), &[0, 77, 1 << 20, (1 << 30) - 1]);
    let preallocated = options(64 << 30, 16).with_preallocation(Preallocation::Metadata);
    bed.create("preallocated", &preallocated).close().expect("closed");
    let mut group = c.benchmark_group("extents");
    let cases =
        [("16,384 fragments", "fragmented"), ("4 clusters of 64 TiB", "sparse"), ("64 GiB in one run", "preallocated")];
    for (what, name) in cases {
        let image = Image::open_path(bed.path(name), &OpenOptions::default()).expect("an image");
        group.bench_function(what, |b| {
            b.iter(|| image.extents(0..image.virtual_size()).map(|extent| extent.expect("sound").len).sum::<u64>());
        });
    }
    group.finish();
}

pub(crate) fn read(c: &mut Criterion) {
    const SIZE: u64 = 256 << 20;
    let bed = Bed::new();
    bed.written("sequential", &options(SIZE, 16), &(0..SIZE >> 16).collect::<Vec<_>>());
    bed.written("random", &options(SIZE, 16), &shuffled(SIZE >> 16));
    let mut group = c.benchmark_group("read");
    for name in ["sequential", "random"] {
        let image = Image::open_path(bed.path(name), &OpenOptions::default()).expect("an image");
        let mut buf = vec![0; 1 << 20];
        group.throughput(Throughput::Bytes(64 << 20));
        group.bench_function(format!("64 MiB by 1 MiB, clusters in {name} order"), |b| {
            b.iter(|| {
                for offset in (0..64_u64 << 20).step_by(1 << 20) {
                    image.read_at(&mut buf, GuestOffset::new(offset)).expect("read");
                }
                black_box(&buf);
            });
        });
        let offsets: Vec<_> = random(3).take(4096).map(|random| (random % (SIZE >> 12)) << 12).collect();
        group.throughput(Throughput::Bytes(4096 << 12));
        group.bench_function(format!("4,096 random 4 KiB, clusters in {name} order"), |b| {
            b.iter(|| {
                for &offset in &offsets {
                    image.read_at(&mut buf[..4096], GuestOffset::new(offset)).expect("read");
                }
                black_box(&buf);
            });
        });
    }
    group.finish();
}

/// Every iteration writes into an overlay of its own and makes it durable. The overlay's creation is not counted.
pub(crate) fn write_overlay(c: &mut Criterion) {
    const SIZE: u64 = 256 << 20;
    let bed = Bed::new();
    bed.written("base", &options(SIZE, 16), &(0..SIZE >> 16).collect::<Vec<_>>());
    let overlay = options(SIZE, 16).with_backing("base", "qcow2");
    let sequential: Vec<_> = (0..32_u64 << 20).step_by(64 << 10).collect();
    let scattered: Vec<_> = random(5).take(1024).map(|random| (random % (SIZE >> 12)) << 12).collect();
    let mut group = c.benchmark_group("write into a fresh overlay");
    group.sample_size(10);
    for (what, offsets, len) in
        [("32 MiB by 64 KiB", &sequential, 64 << 10), ("1,024 random 4 KiB over a base", &scattered, 4 << 10)]
    {
        let data = noise(len);
        group.throughput(Throughput::Bytes((offsets.len() * len) as u64));
        group.bench_function(what, |b| {
            let fresh = || {
                bed.create("overlay", &overlay).close().expect("closed");
                bed.open_chain("overlay", 1)
            };
            let write = |chain: &mut Chain| {
                for &offset in offsets {
                    chain.write_at(&data, GuestOffset::new(offset)).expect("written");
                }
                chain.flush().expect("durable");
            };
            b.iter_batched_ref(fresh, write, BatchSize::PerIteration);
        });
    }
    group.finish();
}

pub(crate) fn check_image(c: &mut Criterion) {
    let bed = Bed::new();
    bed.written("fragmented", &options(CLUSTERS << 12, 12), &shuffled(CLUSTERS));
    let preallocated = options(64 << 30, 16).with_preallocation(Preallocation::Metadata);
    bed.create("preallocated", &preallocated).close().expect("closed");
    let mut group = c.benchmark_group("check");
    for (what, name) in [("16,384 clusters of 4 KiB", "fragmented"), ("64 GiB, 1,048,576 clusters", "preallocated")] {
        group.bench_function(what, |b| {
            let storage = FileStorage::open(bed.path(name), &Access::read()).expect("an image");
            b.iter(|| assert!(check(&storage, &CheckOptions::default()).expect("checked").is_clean()));
        });
    }
    group.finish();
}
