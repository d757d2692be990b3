//! Many VMs at once, many snapshots in one, and what a snapshot costs then.

use std::path::Path;
use std::sync::{Arc, Barrier};

use qcow2_chain::storage::{FileSystem, MemoryFileSystem};
use qcow2_chain::vm::{Refusal, SnapshotSet};

use crate::support::counted::{CountedFileSystem, Passed};
use crate::support::lab::{Lab, LabShape};
use crate::support::qemu::Qemu;
use crate::support::rng::{Rng, seed};
use crate::support::scene::{SHAPES, Scene};

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
fn one_vm_lets_one_operation_in() {
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

/// What a snapshot and a revert cost at 3, 20 and 100 snapshots of a random tree, on volumes that hold so much.
fn costs(size: u64, data: usize) -> Vec<[Passed; 2]> {
    let mut rng = Rng::new(seed());
    let names = Arc::new(CountedFileSystem::default());
    let shape = LabShape { volumes: 2, size, cluster_bits: 12, ..LabShape::default() };
    let mut lab = Lab::new(Arc::clone(&names) as Arc<dyn FileSystem>, Path::new("/vm"), shape, &mut rng);
    let mut costs = Vec::new();
    for number in 1..=100 {
        for _ in 0..data {
            lab.write_all(&mut rng);
        }
        names.take();
        // Names of one length, so that the records of one number of snapshots are of one length.
        lab.create(&format!("s{number:03}"));
        let create = names.take();
        // Not the first one, which stands on nothing: there is less to look at.
        let target = format!("s{:03}", rng.within(2.min(number)..number + 1));
        names.take();
        lab.revert(&target);
        let revert = names.take();
        if [3, 20, 100].contains(&number) {
            costs.push([create, revert]);
        }
    }
    assert_eq!(lab.model().snapshots.len(), 100);
    lab.check().unwrap();
    // And gone again, in any order.
    while !lab.taken.is_empty() {
        let known: Vec<String> = lab.taken.keys().cloned().collect();
        lab.delete(&rng.pick(&known));
    }
    lab.check().unwrap();
    assert!(lab.model().snapshots.is_empty());
    costs
}

#[test]
fn a_hundred_snapshots_cost_no_more_than_three() {
    let [few, many] = [costs(64 << 10, 1), costs(64 << 10, 4)];
    let first = few[0];
    for (at, costs) in few.iter().chain(&many).enumerate() {
        for (which, (cost, first)) in ["create", "revert"].iter().zip(costs.iter().zip(&first)) {
            assert_eq!(cost.images.calls, first.images.calls, "{which}, {at}: calls to the images");
            // Names of files are in headers, and their numbers have more digits in the end.
            let bytes = cost.images.bytes.abs_diff(first.images.bytes);
            assert!(bytes < 64, "{which}, {at}: {bytes} bytes more or less passed the images");
            assert_eq!(cost.records.calls, first.records.calls, "{which}, {at}: calls to the records");
        }
    }
    // The catalogue is one file, and is written as a whole: a snapshot of two volumes takes less than 2 KiB of it. It is
    // read and written a few times.
    let [three, hundred] = [few[0][0].records.bytes, few[2][0].records.bytes];
    assert!(hundred - three < 97 * 2048 * 4, "{three} bytes of records, then {hundred}");
}

#[test]
fn a_larger_disk_costs_no_more() {
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
fn a_hundred_snapshots_in_a_line_are_deleted_from_the_middle() {
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
