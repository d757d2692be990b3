//! The rows of the acceptance table that need no running VM, one test for each. Files are numbered in the order of their
//! creation. `f1<-f0` means that f1 is backed by f0. A snapshot is ready (R), hidden (H) or merging (M), and current (*).

use std::sync::Arc;

use qcow2_chain::storage::fault::{Fault, Faults, FaultyFileSystem};
use qcow2_chain::storage::{FileSystem, HostFileSystem};
use qcow2_chain::vm::{Error, Recovery, SnapshotSet, State};

use crate::support::lab::LabShape;
use crate::support::qemu::Qemu;
use crate::support::ram;
use crate::support::scene::{SHAPES, Scene, Step, on_all_shapes, row};

/// Create, revert, and the deletions that follow.
const BASIC: &[Step] = &[
    ("C3", "create s1", "s1(R*)=f0; f1<-f0"),
    ("C4", "create s2 quiesced", "s1(R)=f0, s2(R*)=f1<-f0; f2<-f1"),
    ("R2", "revert s1", "s1(R*)=f0, s2(R)=f1<-f0; f3<-f0"),
    ("D1", "create s3", "s1(R)=f0, s2(R)=f1<-f0, s3(R*)=f3<-f0; f4<-f3"),
    ("D1", "delete s1", "s1(H)=f0, s2(R)=f1<-f0, s3(R*)=f3<-f0; f4<-f3"),
    ("D2", "delete s2", "s3(R*)=f0; f4<-f0"),
    ("D3", "delete s3", "f0"),
];

/// The advanced deletion.
const ADVANCED: &[Step] = &[
    ("AD1", "create s1", "s1(R*)=f0; f1<-f0"),
    ("AD1", "create s2", "s1(R)=f0, s2(R*)=f1<-f0; f2<-f1"),
    ("AD1", "create s3", "s1(R)=f0, s2(R)=f1<-f0, s3(R*)=f2<-f1; f3<-f2"),
    ("AD2", "revert s2", "s1(R)=f0, s2(R*)=f1<-f0, s3(R)=f2<-f1; f4<-f1"),
    ("AD3", "create s4", "s1(R)=f0, s2(R)=f1<-f0, s3(R)=f2<-f1, s4(R*)=f4<-f1; f5<-f4"),
    ("AD4", "delete s2", "s1(R)=f0, s2(H)=f1<-f0, s3(R)=f2<-f1, s4(R*)=f4<-f1; f5<-f4"),
    ("AD5", "delete s3", "s1(R)=f0, s4(R*)=f1<-f0; f5<-f1"),
    ("AD6", "create s5", "s1(R)=f0, s4(R)=f1<-f0, s5(R*)=f5<-f1; f6<-f5"),
    ("AD7", "revert s4", "s1(R)=f0, s4(R*)=f1<-f0, s5(R)=f5<-f1; f7<-f1"),
    ("AD8", "delete s4", "s1(R)=f0, s4(H*)=f1<-f0, s5(R)=f5<-f1; f7<-f1"),
    ("AD9", "delete s5", "s1(R*)=f0; f1<-f0"),
    ("AD10", "delete s1", "f0"),
];

/// A revert away from a hidden snapshot.
const AWAY: &[Step] = &[
    ("AR1", "create s1", "s1(R*)=f0; f1<-f0"),
    ("AR1", "create s2", "s1(R)=f0, s2(R*)=f1<-f0; f2<-f1"),
    ("AR2", "revert s1", "s1(R*)=f0, s2(R)=f1<-f0; f3<-f0"),
    ("AR3", "delete s1", "s1(H*)=f0, s2(R)=f1<-f0; f3<-f0"),
    ("AR4", "revert s2", "s2(R*)=f0; f4<-f0"),
];

/// Makes one test of each row of a script.
macro_rules! rows {
    ($script:ident: $($name:ident $row:literal),+ $(,)?) => {
        $(#[test]
        fn $name() {
            row($script, $row);
        })+
    };
}

rows!(BASIC: c3_the_first_snapshot "C3", c4_a_second_one_quiesced "C4", r2_revert "R2", d1_delete_what_two_need "D1",
      d2_delete_a_leaf_beside_a_hidden_one "D2", d3_delete_the_last "D3");
rows!(ADVANCED: ad1_three_snapshots "AD1", ad2_revert_to_the_second "AD2", ad3_a_second_branch "AD3",
      ad4_hide_what_two_branches_need "AD4", ad5_delete_one_branch "AD5", ad6_a_snapshot_on_the_merged_one "AD6",
      ad7_revert_to_the_merged_one "AD7", ad8_hide_the_current_one "AD8", ad9_delete_the_leaf_beside_the_volume "AD9",
      ad10_delete_the_last "AD10");
rows!(AWAY: ar1_two_snapshots "AR1", ar2_revert_to_the_first "AR2", ar3_hide_the_current_one "AR3",
      ar4_revert_away_from_the_hidden_one "AR4");

#[test]
fn d4_delete_the_oldest_of_three() {
    on_all_shapes(|scene| {
        ["create s1", "create s2", "create s3"].iter().for_each(|what| drop(scene.act(what)));
        scene.step("delete s1", "s2(R)=f0, s3(R*)=f2<-f0; f3<-f2");
    });
}

#[test]
fn d5_delete_the_branch_that_was_left() {
    on_all_shapes(|scene| {
        ["create s1", "create s2", "revert s1"].iter().for_each(|what| drop(scene.act(what)));
        scene.step("delete s2", "s1(R*)=f0; f3<-f0");
    });
}

/// Resizes all volumes of a scene. (Those of the scene's shapes begin with 48 or 96 KiB.)
fn resize(scene: &mut Scene, kib: u64) {
    for volume in scene.volumes() {
        let old = scene.lab.now[&volume].len() as u64;
        let report = scene.act(&format!("resize {volume} {kib}"));
        let changes: Vec<_> =
            report.resized.iter().map(|change| (change.volume.clone(), change.old, change.new)).collect();
        assert_eq!(changes, [(volume, old, kib << 10)]);
    }
}

#[test]
fn z1_a_snapshot_keeps_its_size() {
    on_all_shapes(|scene| {
        scene.act("create s1");
        resize(scene, 200);
        scene.verify("resize");
        assert_eq!(scene.states(), vec!["s1(R*)=f0; f1<-f0"; scene.volumes().len()]);
    });
}

#[test]
fn z2_revert_brings_the_size_back() {
    on_all_shapes(|scene| {
        scene.act("create s1");
        let before: Vec<_> = scene.lab.now.values().map(Vec::len).collect();
        resize(scene, 200);
        scene.step("revert s1", "s1(R*)=f0; f2<-f0");
        assert_eq!(scene.lab.now.values().map(Vec::len).collect::<Vec<_>>(), before);
    });
}

#[test]
fn z3_the_survivor_has_the_volumes_size() {
    on_all_shapes(|scene| {
        scene.act("create s1");
        resize(scene, 200);
        scene.step("delete s1", "f0");
    });
}

#[test]
fn z4_the_survivor_has_a_smaller_volumes_size() {
    on_all_shapes(|scene| {
        scene.act("create s1");
        resize(scene, 20);
        scene.step("delete s1", "f0");
    });
}

#[test]
fn z5_the_survivor_has_the_size_of_the_snapshot_on_it() {
    on_all_shapes(|scene| {
        scene.act("create s1");
        resize(scene, 200);
        scene.act("create s2");
        resize(scene, 300);
        scene.step("delete s1", "s2(R*)=f0; f2<-f0");
        scene.step("revert s2", "s2(R*)=f0; f3<-f0");
        scene.step("delete s2", "f0");
        assert!(scene.lab.now.values().all(|content| content.len() == 200 << 10));
    });
}

#[test]
fn x8_dependents_grown_then_smaller() {
    on_all_shapes(|scene| {
        scene.act("create s1");
        resize(scene, 200);
        scene.act("create s2");
        resize(scene, 30);
        scene.act("create s3");
        scene.step("delete s1", "s2(R)=f0, s3(R*)=f2<-f0; f3<-f2");
        scene.step("delete s2", "s3(R*)=f0; f3<-f0");
        scene.step("delete s3", "f0");
    });
}

#[test]
fn e1_a_revert_reports_one_size_change() {
    on_all_shapes(|scene| {
        scene.act("create s1");
        let old = scene.lab.now["vda"].len() as u64;
        scene.act("resize vda 200");
        let report = scene.step("revert s1", "s1(R*)=f0; f2<-f0");
        let changes: Vec<_> =
            report.resized.iter().map(|change| (change.volume.as_str(), change.old, change.new)).collect();
        assert_eq!(changes, [("vda", 200 << 10, old)]);
    });
}

#[test]
fn e2_the_change_is_of_the_volume_that_was_resized() {
    let Some(qemu) = Qemu::find() else { return };
    let mut scene = Scene::new(qemu, LabShape { volumes: 2, ..SHAPES[2] });
    scene.act("create s1");
    let old = scene.lab.now["vdb"].len() as u64;
    scene.act("resize vdb 200");
    let report = scene.step("revert s1", "s1(R*)=f0; f2<-f0");
    let changes: Vec<_> =
        report.resized.iter().map(|change| (change.volume.as_str(), change.old, change.new)).collect();
    assert_eq!(changes, [("vdb", 200 << 10, old)]);
    scene.end();
}

#[test]
fn x1_both_branches_over_a_hidden_snapshot_are_relinked() {
    on_all_shapes(|scene| {
        for what in ["create s1", "create s2", "create s3", "revert s2", "create s4", "delete s2"] {
            scene.act(what);
        }
        scene.step("delete s1", "s2(H)=f0, s3(R)=f2<-f0, s4(R*)=f4<-f0; f5<-f4");
        scene.step("revert s3", "s2(H)=f0, s3(R*)=f2<-f0, s4(R)=f4<-f0; f6<-f2");
    });
}

#[test]
fn x2_a_hidden_current_snapshot_keeps_its_other_child() {
    on_all_shapes(|scene| {
        for what in ["create s1", "create s2", "revert s1", "create s3", "revert s1"] {
            scene.act(what);
        }
        scene.step("delete s1", "s1(H*)=f0, s2(R)=f1<-f0, s3(R)=f3<-f0; f5<-f0");
        scene.step("delete s2", "s1(H*)=f0, s3(R)=f3<-f0; f5<-f0");
        scene.step("delete s3", "f0");
    });
}

#[test]
fn mv1_ten_volumes() {
    let Some(qemu) = Qemu::find() else { return };
    let mut scene = Scene::new(qemu, LabShape { volumes: 10, ..SHAPES[2] });
    scene.act("create s1");
    scene.act("create s2");
    let report = scene.step("delete s1", "s2(R*)=f0; f2<-f0");
    assert_eq!(report.merged.len(), 10);
    let report = scene.step("delete s2", "f0");
    assert_eq!(report.merged.len(), 10);
    scene.end();
}

/// Copies a VM's files into a new directory, and loads the set there in this file system.
fn copy_of(scene: &Scene, names: Arc<dyn FileSystem>) -> (tempfile::TempDir, SnapshotSet) {
    let dir = ram::dir();
    for entry in std::fs::read_dir(scene.dir()).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    let set = SnapshotSet::load_in(names, dir.path().join("vm.json")).unwrap();
    (dir, set)
}

/// Returns the file system of the host with these faults.
fn failing(faults: &Arc<Faults>) -> Arc<dyn FileSystem> {
    Arc::new(FaultyFileSystem::new(Arc::new(HostFileSystem), faults))
}

#[test]
fn x4_killed_at_each_point() {
    let Some(qemu) = Qemu::find() else { return };
    let mut scene = Scene::new(qemu, LabShape { volumes: 2, ..SHAPES[2] });
    for what in ["create s1", "create s2", "create s3", "revert s2", "create s4", "delete s2"] {
        scene.act(what);
    }
    // A leaf is removed, and the hidden snapshot beneath it merged.
    let operate = |set: SnapshotSet| set.with_jobs(1).delete("s3", &Default::default(), &());
    let (mut undone, mut completed, mut clean) = (0, 0, 0);
    for call in 0.. {
        let faults = Faults::new(Fault::Io.at(u64::MAX));
        let (_dir, set) = copy_of(&scene, failing(&faults));
        let opened = faults.calls();
        drop(set);
        let faults = Faults::new(Fault::Io.at(opened + call).ever_after());
        let (dir, set) = copy_of(&scene, failing(&faults));
        let died = operate(set);
        let catalogue = dir.path().join("vm.json");
        let mut lab = scene.lab.on(Arc::new(HostFileSystem)).unwrap();
        (lab.set, lab.catalogue) = (SnapshotSet::load(&catalogue).unwrap(), catalogue);
        if died.is_ok() {
            lab.taken.remove("s3");
            lab.check().unwrap();
            break;
        }
        let now = lab.now.clone();
        lab.can_start(&now).unwrap_or_else(|wrong| panic!("killed at call {call}: {wrong}"));
        match lab.set.recover(&()).unwrap_or_else(|error| panic!("killed at call {call}: {error}")) {
            Recovery::Clean => clean += 1,
            Recovery::Undone { .. } => undone += 1,
            _ => completed += 1,
        }
        if lab.model().find("s3").is_none() {
            lab.taken.remove("s3");
            assert_eq!(lab.model().snapshots.len(), 2, "killed at call {call}: all of it or nothing");
        } else {
            assert_eq!(lab.model(), scene.lab.model(), "killed at call {call}: all of it or nothing");
        }
        lab.check().unwrap_or_else(|wrong| panic!("killed at call {call}: {wrong}"));
        if call % 16 == 0 {
            crate::support::judge::Judge::new(qemu).judge(&lab.set);
        }
        assert!(matches!(lab.set.recover(&()).unwrap(), Recovery::Clean), "killed at call {call}");
    }
    assert!(clean > 0 && undone > 0 && completed > 20, "clean {clean}, undone {undone}, completed {completed}");
}

#[test]
fn x5_the_second_of_three_volumes_fails() {
    let Some(qemu) = Qemu::find() else { return };
    let mut scene = Scene::new(qemu, SHAPES[2]);
    scene.act("create s1");
    scene.act("create s2");
    scene.lab.write_all(&mut crate::support::rng::Rng::new(5));
    let healthy = Faults::new(Fault::Io.at(u64::MAX));
    let (_dir, set) = copy_of(&scene, failing(&healthy));
    let opened = healthy.calls();
    set.with_jobs(1).delete("s1", &Default::default(), &()).unwrap();
    let (mut seen, mut alone) = (0, 0);
    for call in opened..healthy.calls() {
        let faults = Faults::new(Fault::Io.at(call));
        let (dir, set) = copy_of(&scene, failing(&faults));
        // Some calls may fail: their result is not needed.
        let Err(error) = set.with_jobs(1).delete("s1", &Default::default(), &()) else { continue };
        let Error::Incomplete { volume, done, left, .. } = &error else { continue };
        if volume != "vdb" {
            continue;
        }
        seen += 1;
        // If the journal failed, the third volume fails as well.
        alone += u64::from(left == &["vdb"]);
        assert!(done.contains(&"vda".to_owned()) && left.contains(&"vdb".to_owned()), "{error}");
        let left = left.clone();
        let mut lab = scene.lab.on(Arc::new(HostFileSystem)).unwrap();
        lab.catalogue = dir.path().join("vm.json");
        lab.set = SnapshotSet::load(&lab.catalogue).unwrap();
        let model = lab.model();
        assert_eq!(model.find("s1").unwrap().state, State::Merging);
        // It may have failed after its record, when its file was removed.
        let unmerged = &model.find("s1").unwrap().files;
        assert!(unmerged.keys().all(|volume| left.contains(volume)), "call {call}: the others are recorded");
        let now = lab.now.clone();
        lab.can_start(&now).unwrap_or_else(|wrong| panic!("call {call}: {wrong}"));
        let report = lab.set.delete("s1", &Default::default(), &()).unwrap();
        assert!(report.merged.keys().all(|volume| left.contains(volume)), "resumed at the second: {report:?}");
        lab.taken.remove("s1");
        lab.check().unwrap_or_else(|wrong| panic!("call {call}: {wrong}"));
        if seen % 8 == 1 {
            crate::support::judge::Judge::new(qemu).judge(&lab.set);
        }
    }
    assert!(seen > 5 && alone > 0, "the second volume failed {seen} times, {alone} alone");
}
