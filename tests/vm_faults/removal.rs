//! Files that a merge or a removal must leave alone: neighbours by name, files in use, and files
//! that others read.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use super::world::{NEW, OLD, SIZE, World};
use crate::support::holder::Holder;

const BOTH: [&str; 3] = ["commit", "pull", "auto"];

#[test]
fn merge_keeps_other_volume_with_suffix_new() {
    for direction in BOTH {
        let Some(world) = World::new() else { return };
        world.image("disk.img", "8M");
        world.image("disk.img.new", "8M");
        world.write("disk.img", "-P 7 0 64k");
        world.write("disk.img.new", "-P 7 0 6M");
        world.ok(&["init", "web.json", "--volume", "a=disk.img", "--volume", "b=disk.img.new"]);
        world.ok(&["snapshot", "web.json", "s1"]);
        world.write(&world.active("a"), "-P 8 0 2M");
        world.write(&world.active("b"), "-P 8 0 64k");
        world.ok(&["delete", "web.json", "s1", "--direction", direction]);
        world.assert_sound();
        world.assert_reads(world.active("a"), "-P 8 0 2M");
        world.assert_reads(world.active("b"), "-P 8 0 64k");
        world.assert_reads(world.active("b"), "-P 7 64k 5M");
    }
}

#[test]
fn merge_keeps_strangers_file_with_suffix_new() {
    for direction in BOTH {
        let Some(world) = World::with_snapshot() else { return };
        fs::write(world.path("vda.qcow2.new"), b"a stranger's notes").unwrap();
        let before = world.node("vda.qcow2.new");
        world.ok(&["delete", "web.json", "s1", "--direction", direction]);
        assert!(world.exists("vda.qcow2.new"), "{direction}: the file was removed");
        assert_eq!(world.node("vda.qcow2.new"), before, "{direction}: the file was changed");
    }
}

#[test]
fn catalogue_save_keeps_strangers_file_with_suffix_new() {
    let Some(world) = World::with_volume() else { return };
    fs::write(world.path("web.json.new"), b"a stranger's notes").unwrap();
    let before = world.node("web.json.new");
    // The snapshot may be refused.
    let run = world.vm(&["snapshot", "web.json", "s1"]);
    assert!(world.exists("web.json.new"), "the file was removed: {}{}", run.stdout, run.stderr);
    assert_eq!(world.node("web.json.new"), before, "the file was changed");
}

#[test]
fn delete_of_leaf_in_use_is_refused() {
    for options in [&[][..], &["-r"]] {
        let Some(world) = World::with_volume() else { return };
        world.ok(&["snapshot", "web.json", "s1"]);
        let leaf = world.active("vda");
        world.ok(&["snapshot", "web.json", "s2"]);
        world.ok(&["revert", "web.json", "s1"]);
        let held = Holder::open(&world.path(&leaf), options);
        let said = world.obstacle(&["delete", "web.json", "s2"]);
        assert!(said.contains(&leaf), "{said}");
        drop(held);
        world.ok(&["delete", "web.json", "s2"]);
        assert!(!world.exists(&leaf));
    }
}

#[test]
fn recovery_of_leaf_deletion_keeps_file_in_use() {
    let build = || {
        let world = World::with_volume()?;
        world.ok(&["snapshot", "web.json", "s1"]);
        world.ok(&["snapshot", "web.json", "s2"]);
        world.ok(&["revert", "web.json", "s1"]);
        Some(world)
    };
    let leaf = |world: &World| {
        let files = fs::read_dir(world.dir()).unwrap().map(|one| one.unwrap().file_name().into_string().unwrap());
        let active = world.active("vda");
        files.into_iter().find(|name| name.starts_with("web-vda.") && *name != active)
    };
    let wanted = |world: &World| world.exists("web.json.journal") && leaf(world).is_some();
    let Some(world) = super::world::killed_when(build, &["delete", "web.json", "s2"], wanted) else { return };
    let leaf = leaf(&world).expect("the leaf's file");
    let held = Holder::open(&world.path(&leaf), &[]);
    let run = world.vm(&["recover", "web.json"]);
    assert!(world.exists(&leaf), "{}{}", run.stdout, run.stderr);
    drop(held);
    world.ok(&["recover", "web.json"]);
    world.assert_sound();
}

/// A set with `s1` over `vda.qcow2`, and a clone of that file that was made afterwards.
fn with_clone() -> Option<World> {
    let world = World::new()?;
    world.image("vda.qcow2", "8M");
    world.write("vda.qcow2", "-P 1 0 64k");
    world.ok(&["init", "web.json", "--volume", "vda=vda.qcow2"]);
    world.ok(&["snapshot", "web.json", "s1"]);
    world.overlay("clone.qcow2", "vda.qcow2");
    world.write(&world.active("vda"), "-P 2 0 4M");
    Some(world)
}

/// Deletes `s1`, which may be refused but may not touch the frozen file.
#[track_caller]
fn delete_keeps_base(world: &World, base: &str, more: &[&str]) {
    let args = [&["delete", "web.json", "s1"], more].concat();
    let (before, tree) = (world.node(base), world.tree());
    let run = world.vm(&args);
    assert!(world.exists(base), "{args:?} removed {base}: {}{}", run.stdout, run.stderr);
    assert_eq!(world.node(base), before, "{args:?} changed {base}: {}{}", run.stdout, run.stderr);
    if run.code == 0 {
        let said = run.stdout.lines().any(|line| line.contains("released") && line.contains(base));
        assert!(said, "{args:?} does not report {base} as released: {}", run.stdout);
        assert_eq!(world.state("s1"), None);
        world.assert_reads(world.active("vda"), "-P 2 0 4M");
        world.assert_sound();
    } else {
        super::world::assert_refused(&run, &args);
        super::world::assert_same(&tree, &world.tree(), "a refused deletion");
    }
}

#[test]
fn pull_from_base_in_use_releases_it() {
    for more in [&["--direction", "pull"][..], &["--direction", "auto"], &[]] {
        let Some(world) = with_clone() else { return };
        let clone = Holder::open(&world.path("clone.qcow2"), &[]);
        delete_keeps_base(&world, "vda.qcow2", more);
        drop(clone);
        world.assert_reads("clone.qcow2", "-P 1 0 64k");
    }
}

#[test]
fn pull_from_base_read_by_hidden_clone_keeps_it() {
    // The clone is where no search finds it, but it runs.
    let Some(world) = World::with_snapshot() else { return };
    fs::create_dir(world.path("elsewhere")).unwrap();
    let base = world.path("vda.qcow2");
    world.overlay("elsewhere/clone.qcow2", base.to_str().unwrap());
    let clone = Holder::open(&world.path("elsewhere/clone.qcow2"), &[]);
    let before = world.node("vda.qcow2");
    let run = world.vm(&["delete", "web.json", "s1", "--direction", "pull"]);
    assert!(run.code == 0 || run.code == 1, "{}", run.stderr);
    assert!(world.exists("vda.qcow2"), "a file in use was removed: {}", run.stdout);
    assert_eq!(world.node("vda.qcow2"), before, "a file in use was replaced: {}", run.stdout);
    drop(clone);
    world.assert_reads("elsewhere/clone.qcow2", OLD);
}

#[test]
fn commit_into_base_in_use_is_refused() {
    let Some(world) = with_clone() else { return };
    let clone = Holder::open(&world.path("clone.qcow2"), &[]);
    world.obstacle(&["delete", "web.json", "s1", "--direction", "commit"]);
    drop(clone);
}

#[test]
fn pull_from_read_only_template_releases_it() {
    for more in [&["--direction", "pull"][..], &["--direction", "auto"], &[]] {
        let Some(world) = World::new() else { return };
        world.image("tmpl.qcow2", SIZE);
        world.write("tmpl.qcow2", OLD);
        fs::set_permissions(world.path("tmpl.qcow2"), fs::Permissions::from_mode(0o444)).unwrap();
        world.overlay("web.qcow2", "tmpl.qcow2");
        world.ok(&["init", "web.json", "--volume", "vda=web.qcow2", "--snapshot", "s1"]);
        world.overlay("other.qcow2", "tmpl.qcow2");
        world.write("web.qcow2", "-P 2 0 4M");
        delete_keeps_base(&world, "tmpl.qcow2", more);
        world.assert_reads("other.qcow2", OLD);
    }
}

#[test]
fn pull_from_read_only_base_without_dependents_releases_it() {
    let Some(world) = World::with_snapshot() else { return };
    fs::set_permissions(world.path("vda.qcow2"), fs::Permissions::from_mode(0o444)).unwrap();
    let base = world.node("vda.qcow2");
    let report = world.ok(&["delete", "web.json", "s1", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert!(world.exists("vda.qcow2") && world.node("vda.qcow2") == base, "the read-only base was changed");
    assert!(report["released"].to_string().contains("vda.qcow2"), "{report}");
    world.assert_reads(world.active("vda"), OLD);
    world.assert_reads(world.active("vda"), NEW);
}

#[test]
fn pull_from_protected_base_reports_it_as_released() {
    let Some(world) = World::new() else { return };
    world.image("vda.qcow2", SIZE);
    world.write("vda.qcow2", OLD);
    world.ok(&["init", "web.json", "--volume", "vda=vda.qcow2,protected=on"]);
    world.ok(&["snapshot", "web.json", "s1"]);
    world.write(&world.active("vda"), "-P 2 0 4M");
    delete_keeps_base(&world, "vda.qcow2", &[]);
}

#[test]
fn pull_keeps_path_and_format_of_survivor_over_raw() {
    let Some(world) = World::new() else { return };
    fs::write(world.path("vda.img"), vec![1; 8 << 20]).unwrap();
    world.ok(&["init", "web.json", "--volume", "vda=vda.img,format=raw"]);
    world.ok(&["snapshot", "web.json", "s1"]);
    let overlay = world.active("vda");
    world.write(&overlay, "-P 2 0 1M");
    world.ok(&["delete", "web.json", "s1", "--direction", "pull"]);
    assert_eq!(world.active("vda"), overlay, "the survivor of a pull took another path");
    world.assert_reads(&overlay, "-P 2 0 1M");
    world.assert_reads(&overlay, "-P 1 1M 7M");
    if world.exists("vda.img") {
        let bytes = fs::read(world.path("vda.img")).unwrap();
        assert!(bytes == vec![1; 8 << 20], "vda.img holds something else than its raw disk");
    }
    world.assert_sound();
}

#[test]
fn commit_keeps_path_and_format_of_survivor_over_raw() {
    let Some(world) = World::new() else { return };
    fs::write(world.path("vda.img"), vec![1; 8 << 20]).unwrap();
    world.ok(&["init", "web.json", "--volume", "vda=vda.img,format=raw"]);
    world.ok(&["snapshot", "web.json", "s1"]);
    // More data in the overlay than in the base: a direction by cost would pull.
    world.write(&world.active("vda"), "-P 2 0 8M");
    world.ok(&["delete", "web.json", "s1"]);
    assert_eq!(world.active("vda"), "vda.img");
    assert!(fs::read(world.path("vda.img")).unwrap() == vec![2; 8 << 20]);
    world.assert_sound();
}

#[test]
fn delete_by_default_returns_to_the_first_file() {
    let Some(world) = World::new() else { return };
    world.image("vda.qcow2", "8M");
    world.write("vda.qcow2", "-P 1 0 64k");
    world.ok(&["init", "web.json", "--volume", "vda=vda.qcow2"]);
    let first = fs::metadata(world.path("vda.qcow2")).unwrap();
    world.ok(&["snapshot", "web.json", "s1"]);
    world.write(&world.active("vda"), "-P 2 1M 6M");
    world.ok(&["delete", "web.json", "s1"]);
    assert_eq!(world.active("vda"), "vda.qcow2");
    let inode = |meta: &fs::Metadata| std::os::unix::fs::MetadataExt::ino(meta);
    let now = fs::metadata(world.path("vda.qcow2")).unwrap();
    assert_eq!(inode(&now), inode(&first), "another file took the name of the first one");
}
