//! A VM that writes a recorded file other than the active one, as after a start by an outdated
//! definition.

use std::fs;

use super::world::{NEW, OLD, World};
use crate::support::holder::Holder;

#[test]
fn operations_with_frozen_file_written_are_refused() {
    let Some(world) = World::with_snapshot() else { return };
    let held = Holder::open(&world.path("vda.qcow2"), &[]);
    for args in [&["snapshot", "web.json", "s2"][..], &["revert", "web.json", "s1"], &["delete", "web.json", "s1"]] {
        let said = world.unchanged(args);
        assert!(said.contains("vda.qcow2"), "{args:?} does not name the file: {said}");
    }
    drop(held);
    world.ok(&["snapshot", "web.json", "s2"]);
}

#[test]
fn operations_with_file_of_other_branch_written_are_refused() {
    let Some(world) = World::with_volume() else { return };
    world.ok(&["snapshot", "web.json", "s1"]);
    let other = world.active("vda");
    world.ok(&["snapshot", "web.json", "s2"]);
    world.ok(&["revert", "web.json", "s1"]);
    let held = Holder::open(&world.path(&other), &[]);
    for args in [&["snapshot", "web.json", "s3"][..], &["revert", "web.json", "s1"], &["delete", "web.json", "s2"]] {
        let said = world.unchanged(args);
        assert!(said.contains(&other), "{args:?} does not name the file: {said}");
    }
    drop(held);
}

#[test]
fn dry_run_with_frozen_file_written_is_refused() {
    let Some(world) = World::with_snapshot() else { return };
    let held = Holder::open(&world.path("vda.qcow2"), &[]);
    for verb in ["revert", "delete"] {
        let said = world.unchanged(&[verb, "web.json", "s1", "--dry-run"]);
        assert!(said.contains("vda.qcow2"), "{said}");
    }
    drop(held);
}

#[test]
fn verify_with_frozen_file_written_reports_all_findings() {
    let Some(world) = World::with_volume() else { return };
    for name in ["s1", "s2", "s3"] {
        world.ok(&["snapshot", "web.json", name]);
    }
    let list = world.list();
    let file = |number: usize| list["snapshots"][number]["files"]["vda"].as_str().unwrap().to_owned();
    let active = world.active("vda");
    // Another finding beside it: an active file that is gone.
    fs::rename(world.path(&active), world.path("away")).unwrap();
    let written = file(1);
    let held = Holder::open(&world.path(&written), &[]);
    let run = world.vm(&["verify", "web.json"]);
    assert_eq!(run.code, 2, "{}{}", run.stdout, run.stderr);
    for name in [&written, &active] {
        assert!(run.stdout.contains(name.as_str()), "{name} is not reported: {}{}", run.stdout, run.stderr);
    }
    drop(held);
    fs::rename(world.path("away"), world.path(&active)).unwrap();
    world.assert_sound();
}

#[test]
fn snapshot_with_frozen_file_read_completes() {
    // A backup that reads a snapshot's file is no VM on the wrong file.
    let Some(world) = World::with_snapshot() else { return };
    let held = Holder::open(&world.path("vda.qcow2"), &["-r"]);
    world.ok(&["snapshot", "web.json", "s2"]);
    world.ok(&["verify", "web.json"]);
    drop(held);
}

#[test]
fn verify_with_active_file_written_is_sound() {
    // The VM runs on the right file: that is no problem.
    let Some(world) = World::with_snapshot() else { return };
    let held = Holder::open(&world.path(world.active("vda")), &[]);
    world.ok(&["verify", "web.json"]);
    drop(held);
    world.assert_reads(world.active("vda"), OLD);
    world.assert_reads(world.active("vda"), NEW);
}
