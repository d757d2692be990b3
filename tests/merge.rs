//! Commit, against `qemu-img commit` on a copy of the same chain, and against the model.

use std::path::Path;

use qcow2_chain::chain::Chain;
use qcow2_chain::merge::{AfterCommit, CommitOptions, Error, Progress, Step, commit};

use crate::support::layers::{self, copy_of};
use crate::support::qemu::Qemu;
use crate::support::recipe::{Op, RandomImage, Shape};
use crate::support::rng::{Rng, cases, trace};

/// A base, qcow2 or raw, and an overlay that names it relatively, both with random content.
struct Delta {
    base: RandomImage,
    base_format: &'static str,
    top: RandomImage,
}

impl Delta {
    fn random(qemu: Qemu, dir: &Path, rng: &mut Rng, base_shape: Shape, top_shape: Shape) -> Self {
        let raw = rng.chance(1, 5);
        let base = if raw {
            layers::raw(dir.join("base.img"), rng, base_shape)
        } else {
            qcow2_base(qemu, dir, rng, base_shape)
        };
        let base_format = if raw { "raw" } else { "qcow2" };
        let top_shape = Shape { preallocation: "off", ..top_shape };
        let path = dir.join("top.qcow2");
        let (name, size, options) = (path.to_string_lossy(), top_shape.size.to_string(), top_shape.options());
        qemu.img(&["create", "-q", "-f", "qcow2", "-b", "base.img", "-F", base_format, "-o", &options, &name, &size]);
        let mut top = RandomImage::from_model(path, top_shape, true, base.model.clone());
        top.apply_random(qemu, rng, 12);
        Self { base, base_format, top }
    }

    /// Whether the overlay is larger than a base that cannot be resized.
    fn cannot_grow(&self) -> bool {
        let fixed = self.base.shape.compat == "0.10" && !self.base.snapshots.is_empty();
        fixed && self.top.shape.size > self.base.shape.size
    }

    /// What the base holds after the overlay went into it: the overlay's content, and its own tail.
    fn merged(&self) -> Vec<u8> {
        let mut merged = self.top.model.clone();
        merged.extend(self.base.model.get(merged.len()..).unwrap_or_default());
        merged
    }
}

fn qcow2_base(qemu: Qemu, dir: &Path, rng: &mut Rng, shape: Shape) -> RandomImage {
    let mut base = RandomImage::create(qemu, dir.join("base.img"), shape);
    base.apply_random(qemu, rng, 12);
    base
}

fn open(dir: &Path, writable: usize) -> Chain {
    layers::open(&dir.join("top.qcow2"), "qcow2", writable)
}

/// Merges one random delta with our commit and with QEMU's, and compares everything that can be compared.
fn check_commit(qemu: Qemu, rng: &mut Rng, base_shape: Shape, top_shape: Shape) {
    let dir = tempfile::tempdir().unwrap();
    let ours = dir.path().join("ours");
    std::fs::create_dir(&ours).unwrap();
    let delta = Delta::random(qemu, &ours, rng, base_shape, top_shape);
    trace(&delta.base);
    trace(&delta.top);
    let theirs = copy_of(&ours, "theirs");
    let empty = rng.chance(1, 2);

    let name = theirs.join("top.qcow2").to_string_lossy().into_owned();
    let mut args = vec!["commit", "-q", "-f", "qcow2", &name];
    args.extend((!empty).then_some("-d"));
    let run = qemu.try_img(&args);

    let chain = open(&ours, 2);
    let after = if empty { AfterCommit::Empty } else { AfterCommit::Keep };
    let done = commit(&chain, &CommitOptions::default().with_after(after).with_allow_stale_snapshots(true), &());
    chain.close().expect("the chain closes");
    if delta.cannot_grow() {
        assert!(done.is_err() && run.code != 0, "version 2 with snapshots cannot grow: {done:?}, {run:?}");
        return;
    }
    done.expect("our commit");
    assert_eq!(run.code, 0, "QEMU's commit: {}{}{}", run.stderr, delta.base, delta.top);

    let base = |dir: &Path| dir.join("base.img").to_string_lossy().into_owned();
    let format = delta.base_format;
    let run = qemu.try_img(&["compare", "-f", format, "-F", format, &base(&ours), &base(&theirs)]);
    assert_eq!(run.code, 0, "{}{}{}{}", run.stdout, run.stderr, delta.base, delta.top);
    qemu.assert_clean(&ours.join("top.qcow2"));
    assert!(qemu.content(&ours.join("top.qcow2"), None) == delta.top.model, "the top reads as before: {}", delta.top);
    // An internal snapshot of the top shows the base where it holds nothing itself: what it shows now is what QEMU's commit
    // makes of it.
    for (name, _) in &delta.top.snapshots {
        let [ours, theirs] = [&ours, &theirs].map(|dir| qemu.content(&dir.join("top.qcow2"), Some(name)));
        assert!(ours == theirs, "{name} of the top: {}", delta.top);
    }
    if format == "raw" {
        assert!(std::fs::read(ours.join("base.img")).unwrap() == delta.merged(), "{}", delta.top);
        return;
    }
    qemu.assert_clean(&ours.join("base.img"));
    assert!(qemu.content(&ours.join("base.img"), None) == delta.merged(), "{}{}", delta.base, delta.top);
    for (name, model) in &delta.base.snapshots {
        // QEMU shows a snapshot in the image's present size.
        let shown = qemu.content(&ours.join("base.img"), Some(name));
        assert!(shown[..model.len()] == model[..], "{name} of the base: {}", delta.base);
    }
}

#[test]
fn commit_agrees_with_qemu() {
    let Some(qemu) = Qemu::find() else { return };
    cases("commit", 60, |rng| {
        let (base, top) = (Shape::random(rng), Shape::random(rng));
        check_commit(qemu, rng, base, top);
    });
}

/// The corners that random shapes reach rarely.
#[test]
fn commit_agrees_with_qemu_at_the_extremes() {
    let Some(qemu) = Qemu::find() else { return };
    let plain = Shape {
        size: 4 << 20,
        compat: "1.1",
        cluster_size: 64 << 10,
        refcount_bits: 16,
        extended_l2: false,
        lazy_refcounts: false,
        compression_type: "zlib",
        preallocation: "off",
    };
    let v2 = Shape { compat: "0.10", ..plain.clone() };
    let shapes = [
        (v2.clone(), v2),
        (Shape { refcount_bits: 1, ..plain.clone() }, Shape { refcount_bits: 1, ..plain.clone() }),
        (Shape { refcount_bits: 64, ..plain.clone() }, Shape { refcount_bits: 2, ..plain.clone() }),
        (Shape { cluster_size: 512, ..plain.clone() }, Shape { cluster_size: 2 << 20, ..plain.clone() }),
        (Shape { cluster_size: 2 << 20, ..plain.clone() }, Shape { cluster_size: 512, ..plain.clone() }),
        (Shape { extended_l2: true, ..plain.clone() }, plain.clone()),
        (plain.clone(), Shape { extended_l2: true, ..plain.clone() }),
        (
            Shape { extended_l2: true, ..plain.clone() },
            Shape { extended_l2: true, cluster_size: 16 << 10, ..plain.clone() },
        ),
        (Shape { size: 1 << 20, ..plain.clone() }, plain.clone()),
        (plain.clone(), Shape { size: 1 << 20, ..plain.clone() }),
        (plain.clone(), Shape { compression_type: "zstd", ..plain.clone() }),
    ];
    cases("commit at the extremes", shapes.len() as u64 * 3, |rng| {
        let (base, top) = rng.pick(&shapes);
        check_commit(qemu, rng, base, top);
    });
}

/// A merge that is cancelled leaves a chain that reads as before, and the next run completes it.
#[test]
fn a_cancelled_commit_changes_nothing_that_the_guest_sees() {
    struct Stop(std::sync::atomic::AtomicU64);
    impl Progress for Stop {
        fn step(&self, _step: &Step<'_>) {}
        fn is_cancelled(&self) -> bool {
            self.0.fetch_sub(1, std::sync::atomic::Ordering::SeqCst) == 0
        }
    }
    let Some(qemu) = Qemu::find() else { return };
    cases("cancelled commits", 30, |rng| {
        let dir = tempfile::tempdir().unwrap();
        let (base, top) = (Shape::random(rng), Shape::random(rng));
        let mut delta = Delta::random(qemu, dir.path(), rng, base, top);
        if delta.cannot_grow() {
            return;
        }
        delta.top.apply(qemu, vec![Op::Fill(0..delta.top.shape.size.min(4096), 0x5a)]);
        let chain = open(dir.path(), 2);
        let stop = Stop(rng.within(0..3).into());
        match commit(&chain, &CommitOptions::default().with_allow_stale_snapshots(true), &stop) {
            Err(Error::Cancelled) | Ok(_) => {}
            Err(other) => panic!("{other}: {}", delta.top),
        }
        chain.close().unwrap();
        assert!(qemu.content(&delta.top.path, None) == delta.top.model, "{}", delta.top);
        if delta.base_format == "qcow2" {
            qemu.assert_clean(&delta.base.path);
        }
        let chain = open(dir.path(), 2);
        commit(&chain, &CommitOptions::default().with_allow_stale_snapshots(true), &()).unwrap();
        chain.close().unwrap();
        qemu.assert_clean(&delta.top.path);
        assert!(qemu.content(&delta.top.path, None) == delta.top.model, "{}", delta.top);
    });
}
