//! Recovery of interrupted deletions: with a file that is away, by id and not by name, and without
//! the journal.

use std::fs;
use std::time::Duration;

use super::world::{NEW, OLD, SLOW, World, can_trace, killed_if};

#[test]
fn recovery_with_missing_top_is_an_error() {
    for direction in ["commit", "pull"] {
        let Some(world) = World::with_snapshot() else { return };
        let top = world.active("vda");
        world.interrupt_delete(&["--direction", direction]);
        fs::create_dir(world.path("away")).unwrap();
        fs::rename(world.path(&top), world.path("away/top")).unwrap();
        for verb in [&["recover", "web.json"][..], &["delete", "web.json", "s1"]] {
            let run = world.vm(verb);
            assert_eq!(run.code, 1, "{direction}: {}{}", run.stdout, run.stderr);
            assert!(run.stderr.contains(&top), "the message does not name the missing file: {}", run.stderr);
            assert!(!run.stdout.contains("Completed"), "{}", run.stdout);
        }
        assert_eq!(world.state("s1").as_deref(), Some("merging"), "the snapshot was dropped without its data");
        fs::rename(world.path("away/top"), world.path(&top)).unwrap();
        world.ok(&["recover", "web.json"]);
        world.assert_reads(world.active("vda"), NEW);
        world.assert_reads(world.active("vda"), OLD);
        world.assert_sound();
    }
}

#[test]
fn recovery_with_missing_base_is_an_error() {
    for direction in ["commit", "pull"] {
        let Some(world) = World::with_snapshot() else { return };
        world.interrupt_delete(&["--direction", direction]);
        fs::rename(world.path("vda.qcow2"), world.path("away")).unwrap();
        let run = world.vm(&["recover", "web.json"]);
        assert_eq!(run.code, 1, "{direction}: {}{}", run.stdout, run.stderr);
        fs::rename(world.path("away"), world.path("vda.qcow2")).unwrap();
        world.ok(&["recover", "web.json"]);
        world.assert_reads(world.active("vda"), NEW);
        world.assert_reads(world.active("vda"), OLD);
    }
}

/// A hidden `s1`, a ready one of the same name, and an interrupted deletion of `s2` that merges the
/// hidden one.
fn reused_name() -> Option<World> {
    let world = World::with_volume()?;
    world.ok(&["snapshot", "web.json", "s1"]);
    world.write(&world.active("vda"), "-P 3 0 64k");
    world.ok(&["snapshot", "web.json", "s2"]);
    world.ok(&["revert", "web.json", "s1"]);
    world.write(&world.active("vda"), NEW);
    world.ok(&["snapshot", "web.json", "s3"]);
    world.ok(&["delete", "web.json", "s1"]);
    assert_eq!(world.state("s1").as_deref(), Some("hidden"));
    world.ok(&["snapshot", "web.json", "s1"]);
    let args = [&["delete", "web.json", "s2", "--direction", "commit"], &SLOW[..]].concat();
    world.interrupt(&args, Duration::from_millis(1500));
    let list = world.list();
    let merging = list["snapshots"].as_array()?.iter().any(|one| one["state"] == "merging");
    assert!(merging, "the hidden snapshot is not being merged: {list}");
    Some(world)
}

#[test]
fn recovery_with_reused_name_completes() {
    for journal in [true, false] {
        let Some(world) = reused_name() else { return };
        if !journal {
            fs::remove_file(world.path("web.json.journal")).unwrap();
        }
        world.ok(&["recover", "web.json", "--dry-run"]);
        world.ok(&["recover", "web.json"]);
        let list = world.list();
        let names: Vec<_> = list["snapshots"].as_array().unwrap().iter().map(|one| one["name"].clone()).collect();
        assert_eq!(names, ["s3", "s1"], "journal {journal}: {list}");
        assert_eq!(world.state("s1").as_deref(), Some("ready"));
        world.assert_reads(world.active("vda"), NEW);
        world.assert_reads(world.active("vda"), OLD);
        world.assert_sound();
    }
}

#[test]
fn recovery_leaves_no_temporary_files() {
    let build = World::with_volume;
    // Killed after the new catalogue was written beside the old one, and before it replaced it.
    let strange = |world: &World| -> Vec<_> { world.tree().into_keys().filter(|path| !is_of_set(path)).collect() };
    let wanted = |world: &World| world.exists("web.json.journal") && !strange(world).is_empty();
    if !can_trace() {
        return;
    }
    // A program that leaves nothing wherever it is killed has nothing to remove.
    let Some(world) = killed_if(build, &["snapshot", "web.json", "s1"], wanted) else { return };
    world.ok(&["recover", "web.json"]);
    let left = strange(&world);
    assert!(left.is_empty(), "recovery left {left:?}");
    world.assert_sound();
}

/// Returns `true` for an image, the catalogue, or its journal.
fn is_of_set(path: &std::path::Path) -> bool {
    let ends = |end: &str| path.to_string_lossy().ends_with(end);
    ends(".qcow2") || ends("web.json") || ends("web.json.journal")
}
