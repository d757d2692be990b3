//! Many VMs at once, many snapshots in one VM, and the cost of operations then.

use std::path::Path;
use std::sync::{Arc, Barrier};

use qcow2_chain::storage::{FileSystem, MemoryFileSystem};
use qcow2_chain::vm::{Refusal, SnapshotSet};

use crate::support::counted::{CountedFileSystem, Passed};
use crate::support::lab::{Lab, LabShape};
use crate::support::qemu::Qemu;
use crate::support::rng::{Rng, seed};
use crate::support::scene::{SHAPES, Scene};

mod cost;

#[test]
fn cc1_four_vms_on_four_threads() {
    let Some(qemu) = Qemu::find() else { return };
    let together = Barrier::new(4);
    std::thread::scope(|scope| {
        for shape in SHAPES {
            let together = &together;
            scope.spawn(move || {
                let mut scene = Scene::new(qemu, shape);
                scene.act("create s1");
                together.wait();
                scene.step("delete s1", "f0");
                scene.end();
            });
        }
    });
}

#[test]
#[cfg(feature = "cli")]
fn cc1_four_vms_in_four_processes() {
    let Some(qemu) = Qemu::find() else { return };
    let mut scenes = SHAPES.map(|shape| Scene::new(qemu, shape));
    for scene in &mut scenes {
        scene.act("create s1");
    }
    let start = |scene: &Scene| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_qcow2-chain"));
        command.args(["vm", "delete", "-q"]).arg(&scene.lab.catalogue).arg("s1").spawn().unwrap()
    };
    let running: Vec<_> = scenes.iter().map(start).collect();
    for (mut child, scene) in running.into_iter().zip(&mut scenes) {
        assert!(child.wait().unwrap().success());
        scene.lab.taken.remove("s1");
        assert_eq!(scene.states(), vec!["f0"; scene.volumes().len()]);
        scene.verify("deleted by another process");
        scene.end();
    }
}

#[test]
fn concurrent_operations_on_one_vm_are_refused() {
    let mut rng = Rng::new(seed());
    let names: Arc<dyn FileSystem> = Arc::new(qcow2_chain::storage::HostFileSystem);
    let dir = crate::support::ram::dir();
    let mut lab = Lab::new(Arc::clone(&names), dir.path(), LabShape::default(), &mut rng);
    lab.create("s1");
    // Each has a set of its own, as programs have.
    let set = |_| SnapshotSet::load(&lab.catalogue).unwrap();
    let sets: Vec<SnapshotSet> = (0..8).map(set).collect();
    let together = Barrier::new(sets.len());
    let done: Vec<_> = std::thread::scope(|scope| {
        let work = |set| {
            let together = &together;
            scope.spawn(move || {
                together.wait();
                SnapshotSet::delete(set, "s1", &Default::default(), &())
            })
        };
        let running: Vec<_> = sets.iter().map(work).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(done.iter().filter(|done| done.is_ok()).count(), 1, "{done:?}");
    for error in done.iter().filter_map(|done| done.as_ref().err()) {
        let refused = matches!(error.refusal(), Some(Refusal::Locked { .. } | Refusal::UnknownSnapshot { .. }));
        assert!(refused, "{error}");
    }
    lab.taken.remove("s1");
    lab.check().unwrap();
}

/// The recorded files before an operation, and its cost.
type Cost = (u64, Passed);

/// Returns the costs of a snapshot and a revert at 3, 20 and 100 snapshots of a random tree. Before each snapshot the
/// guest writes `data` times.
fn costs(size: u64, data: usize) -> Vec<[Cost; 2]> {
    let mut rng = Rng::new(seed());
    let names = Arc::new(CountedFileSystem::default());
    let shape = LabShape { volumes: 2, size, cluster_bits: 12, ..LabShape::default() };
    let mut lab = Lab::new(Arc::clone(&names) as Arc<dyn FileSystem>, Path::new("/vm"), shape, &mut rng);
    let mut costs = Vec::new();
    for number in 1..=100 {
        for _ in 0..data {
            lab.write_all(&mut rng);
        }
        let files = |lab: &Lab| lab.model().records().count() as u64;
        let before = files(&lab);
        names.take();
        // Names of one length, so that the records of one number of snapshots are of one length.
        lab.create(&format!("s{number:03}"));
        let create = (before, names.take());
        // Not the first one, which has no backing file: there is less to read.
        let target = format!("s{:03}", rng.within(2.min(number)..number + 1));
        let before = files(&lab);
        names.take();
        lab.revert(&target);
        let revert = (before, names.take());
        if [3, 20, 100].contains(&number) {
            costs.push([create, revert]);
        }
    }
    assert_eq!(lab.model().snapshots.len(), 100);
    lab.check().unwrap();
    // Delete all, in random order.
    while !lab.taken.is_empty() {
        let known: Vec<String> = lab.taken.keys().cloned().collect();
        lab.delete(&rng.pick(&known));
    }
    lab.check().unwrap();
    assert!(lab.model().snapshots.is_empty());
    costs
}

/// The calls for each recorded file: a snapshot opens it, to detect a VM that writes a frozen file. A revert searches for
/// images that depend on the files that it removes, and also resolves the path of each file of the set. None is read.
const CALLS_FOR_EACH_FILE: [u64; 2] = [1, 2];

/// Besides one look at each recorded file, the cost does not depend on the number of snapshots.
#[test]
fn snapshot_at_100_snapshots_costs_as_much_as_at_3() {
    let [few, many] = [costs(64 << 10, 1), costs(64 << 10, 4)];
    let first = few[0];
    for (at, costs) in few.iter().chain(&many).enumerate() {
        for (which, name) in ["create", "revert"].into_iter().enumerate() {
            let ((files, cost), (first_files, first)) = (costs[which], first[which]);
            let more = (files - first_files) * CALLS_FOR_EACH_FILE[which];
            assert_eq!(cost.images.calls, first.images.calls + more, "{name}, {at}: calls to the images");
            // Names of files are in headers, and their numbers have more digits in the end.
            let bytes = cost.images.bytes.abs_diff(first.images.bytes);
            assert!(bytes < 64, "{name}, {at}: {bytes} bytes more or less passed the images");
            assert_eq!(cost.records.calls, first.records.calls, "{name}, {at}: calls to the records");
        }
    }
    // The catalogue is one file, and is written as a whole: a snapshot of two volumes takes less than 2 KiB of it. It is
    // read and written a few times.
    let [three, hundred] = [few[0][0].1.records.bytes, few[2][0].1.records.bytes];
    assert!(hundred - three < 97 * 2048 * 4, "{three} bytes of records, then {hundred}");
}

#[test]
fn snapshot_of_larger_disk_costs_no_more() {
    let names = |size: u64| {
        let mut rng = Rng::new(seed());
        let names = Arc::new(CountedFileSystem::default());
        let shape = LabShape { volumes: 2, size, cluster_bits: 16, ..LabShape::default() };
        let mut lab = Lab::new(Arc::clone(&names) as Arc<dyn FileSystem>, Path::new("/vm"), shape, &mut rng);
        names.take();
        lab.create("s1");
        let create = names.take();
        lab.revert("s1");
        [create, names.take()]
    };
    let [small, large] = [names(64 << 10), names(16 << 20)];
    for (small, large) in small.iter().zip(&large) {
        assert_eq!((small.images, small.records.calls), (large.images, large.records.calls), "full of data, 256 times");
    }
}

#[test]
fn hundred_snapshots_in_line_are_deleted_from_middle() {
    let mut rng = Rng::new(seed());
    let names: Arc<dyn FileSystem> = Arc::new(MemoryFileSystem::new());
    let mut lab = Lab::new(names, Path::new("/vm"), LabShape { volumes: 1, ..LabShape::default() }, &mut rng);
    for number in 0..100 {
        lab.write_all(&mut rng);
        lab.create(&format!("s{number}"));
    }
    for number in [50, 49, 51, 0, 99] {
        lab.delete(&format!("s{number}"));
        lab.check().unwrap();
    }
    assert_eq!(lab.model().snapshots.len(), 95);
}
