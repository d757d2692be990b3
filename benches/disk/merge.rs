//! Deltas become one: commit.

use criterion::{BatchSize, Criterion, Throughput};
use qcow2_chain::chain::Chain;
use qcow2_chain::merge::{CommitOptions, commit};

use crate::setup::{Bed, options, shuffled};

/// A delta of 64 MiB in 64 KiB clusters, written in random order, goes into its backing file; durable at the end.
pub(crate) fn commit_delta(c: &mut Criterion) {
    const SIZE: u64 = 64 << 20;
    let bed = Bed::new();
    let order = shuffled(SIZE >> 16);
    bed.written("full", &options(SIZE, 16), &order);
    for base in ["full", "empty"] {
        bed.written(&format!("delta of {base}"), &options(SIZE, 16).with_backing(base, "qcow2"), &order);
    }
    let mut group = c.benchmark_group("commit");
    group.sample_size(10).throughput(Throughput::Bytes(SIZE));
    let merge = |chain: &mut Chain| {
        let report = commit(chain, &CommitOptions::default(), &()).expect("merged");
        assert_eq!(report.copied + report.copied_in_kernel, SIZE);
    };
    group.bench_function("64 MiB of fragments into an empty base", |b| {
        // The delta is kept and only the base changes, so that it alone is made anew.
        let fresh = || {
            bed.create("empty", &options(SIZE, 16)).close().expect("closed");
            bed.open_chain("delta of empty", 2)
        };
        b.iter_batched_ref(fresh, merge, BatchSize::PerIteration);
    });
    group.bench_function("64 MiB of fragments over a full base", |b| {
        b.iter_batched_ref(|| bed.open_chain("delta of full", 2), merge, BatchSize::PerIteration);
    });
    group.finish();
}
