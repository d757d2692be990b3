//! Images outside the set that read its files, and bases that were changed from outside.

use std::fs;
use std::os::unix::fs::symlink;

use super::world::{NEW, OLD, SIZE, World, assert_refused, finish};

/// A set with `s1`, and a stopped clone of its frozen file, in the directory of this name.
fn with_clone(directory: &str) -> Option<World> {
    let world = World::with_snapshot()?;
    fs::create_dir_all(world.path(directory)).unwrap();
    let base = world.path("vda.qcow2");
    world.overlay(&format!("{directory}/clone.qcow2"), base.to_str().unwrap());
    Some(world)
}

/// Deletes `s1`; refused or done, the clone reads as before.
#[track_caller]
fn delete_keeps_clone(world: &World, clone: &str, more: &[&str]) {
    let args = [&["delete", "web.json", "s1"], more].concat();
    let (before, tree) = (world.node("vda.qcow2"), world.tree());
    let run = world.vm(&args);
    let said = format!("{}{}", run.stdout, run.stderr);
    assert!(
        world.exists("vda.qcow2") && world.node("vda.qcow2") == before,
        "{args:?} changed the clone's base: {said}"
    );
    world.assert_reads(clone, OLD);
    world.assert_reads(clone, "-P 0 8M 16M");
    if run.code == 0 {
        let released = run.stdout.lines().any(|line| line.contains("released") && line.contains("vda.qcow2"));
        assert!(released, "{args:?}: {said}");
        world.assert_reads(world.active("vda"), NEW);
        world.assert_reads(world.active("vda"), OLD);
        world.assert_sound();
    } else {
        assert_refused(&run, &args);
        super::world::assert_same(&tree, &world.tree(), "a refused deletion");
        assert!(said.contains("clone.qcow2"), "the message does not name the dependent: {said}");
    }
}

#[test]
fn delete_with_clone_in_directory_keeps_it() {
    for more in [&[][..], &["--direction", "commit"], &["--direction", "pull"], &["--direction", "auto"]] {
        let Some(world) = with_clone(".") else { return };
        delete_keeps_clone(&world, "clone.qcow2", more);
    }
}

#[test]
fn delete_with_clone_in_named_directory_keeps_it() {
    let Some(world) = with_clone("clones") else { return };
    delete_keeps_clone(&world, "clones/clone.qcow2", &["--dependents-in", "clones"]);
}

#[test]
fn delete_with_clone_by_any_name_keeps_it() {
    for name in ["vda.qcow2", "./vda.qcow2", "sub/../vda.qcow2", "linked/vda.qcow2", "link.qcow2"] {
        let Some(world) = World::with_snapshot() else { return };
        fs::create_dir(world.path("sub")).unwrap();
        symlink(".", world.path("linked")).unwrap();
        symlink("vda.qcow2", world.path("link.qcow2")).unwrap();
        world.overlay("clone.qcow2", name);
        delete_keeps_clone(&world, "clone.qcow2", &[]);
    }
}

#[test]
fn delete_with_clone_beside_base_in_other_directory_keeps_it() {
    let Some(world) = World::new() else { return };
    for directory in ["catalogue", "pool"] {
        fs::create_dir(world.path(directory)).unwrap();
    }
    world.image("pool/vda.qcow2", SIZE);
    world.write("pool/vda.qcow2", OLD);
    let run = |args: &[&str]| finish(world.command(args).current_dir(world.path("catalogue")));
    for args in [&["init", "web.json", "--volume", "vda=../pool/vda.qcow2"][..], &["snapshot", "web.json", "s1"]] {
        assert_eq!(run(args).code, 0, "{args:?}");
    }
    let active = world.active_of("catalogue/web.json", "vda");
    world.write(&active, NEW);
    world.overlay("pool/clone.qcow2", "vda.qcow2");
    let before = world.node("pool/vda.qcow2");
    let deleted = run(&["delete", "web.json", "s1"]);
    assert!(deleted.code == 0 || deleted.code == 1, "{}", deleted.stderr);
    assert!(world.exists("pool/vda.qcow2"), "the base of a clone was removed");
    assert_eq!(world.node("pool/vda.qcow2"), before, "the base of a clone was changed: {}", deleted.stdout);
    world.assert_reads("pool/clone.qcow2", "-P 0 8M 16M");
}

#[test]
fn delete_with_clone_of_raw_base_keeps_it() {
    for direction in ["commit", "pull"] {
        let Some(world) = World::new() else { return };
        fs::write(world.path("vda.img"), vec![1; 8 << 20]).unwrap();
        world.ok(&["init", "web.json", "--volume", "vda=vda.img,format=raw"]);
        world.ok(&["snapshot", "web.json", "s1"]);
        world.write(&world.active("vda"), "-P 2 0 1M");
        world.img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "vda.img", "clone.qcow2"]);
        let run = world.vm(&["delete", "web.json", "s1", "--direction", direction]);
        assert!(run.code == 0 || run.code == 1, "{}", run.stderr);
        let kept = world.exists("vda.img") && fs::read(world.path("vda.img")).unwrap() == vec![1; 8 << 20];
        assert!(kept, "{direction} changed the base of a clone: {}", run.stdout);
        world.assert_reads("clone.qcow2", "-P 1 0 8M");
    }
}

#[test]
fn delete_without_search_commits() {
    let Some(world) = with_clone(".") else { return };
    world.ok(&["delete", "web.json", "s1", "--no-dependents"]);
    assert_eq!(world.active("vda"), "vda.qcow2");
    world.assert_reads("vda.qcow2", NEW);
}

#[test]
fn delete_dry_run_names_the_dependent() {
    let Some(world) = with_clone(".") else { return };
    let before = world.tree();
    let run = world.vm(&["delete", "web.json", "s1", "--dry-run", "--direction", "commit"]);
    assert!(format!("{}{}", run.stdout, run.stderr).contains("clone.qcow2"), "{}{}", run.stdout, run.stderr);
    super::world::assert_same(&before, &world.tree(), "a dry run");
}

#[test]
fn delete_of_leaf_with_clone_keeps_its_file() {
    let Some(world) = World::with_volume() else { return };
    world.ok(&["snapshot", "web.json", "s1"]);
    let leaf = world.active("vda");
    world.write(&leaf, NEW);
    world.ok(&["snapshot", "web.json", "s2"]);
    world.ok(&["revert", "web.json", "s1"]);
    world.overlay("clone.qcow2", &leaf);
    let run = world.vm(&["delete", "web.json", "s2"]);
    assert!(run.code == 0 || run.code == 1, "{}", run.stderr);
    assert!(world.exists(&leaf), "the base of a clone was removed: {}", run.stdout);
    world.assert_reads("clone.qcow2", NEW);
    if run.code == 0 {
        assert!(run.stdout.contains("released"), "{}", run.stdout);
    }
}

#[test]
fn revert_with_clone_of_active_file_keeps_it() {
    let Some(world) = World::with_snapshot() else { return };
    let active = world.active("vda");
    world.overlay("clone.qcow2", &active);
    let run = world.vm(&["revert", "web.json", "s1"]);
    assert!(world.exists(&active), "the base of a clone was removed: {}", run.stdout);
    world.assert_reads("clone.qcow2", NEW);
}

#[test]
fn init_with_file_that_backs_another_is_refused() {
    let Some(world) = World::new() else { return };
    world.image("vda.qcow2", SIZE);
    world.overlay("clone.qcow2", "vda.qcow2");
    let said = world.unchanged(&["init", "web.json", "--volume", "vda=vda.qcow2"]);
    assert!(said.contains("clone.qcow2"), "the message does not name the dependent: {said}");
    // As a base it may be shared.
    world.ok(&["init", "web.json", "--volume", "vda=clone.qcow2"]);
    fs::remove_file(world.path("web.json")).unwrap();
    world.ok(&["init", "web.json", "--volume", "vda=vda.qcow2", "--no-dependents"]);
}

#[test]
fn init_with_frozen_file_that_backs_another_is_refused() {
    let Some(world) = World::new() else { return };
    world.image("tmpl.qcow2", SIZE);
    world.overlay("vda.qcow2", "tmpl.qcow2");
    fs::create_dir(world.path("clones")).unwrap();
    let base = world.path("tmpl.qcow2");
    world.overlay("clones/clone.qcow2", base.to_str().unwrap());
    let args = ["init", "web.json", "--volume", "vda=vda.qcow2", "--snapshot", "golden", "--dependents-in", "clones"];
    let said = world.unchanged(&args);
    assert!(said.contains("clone.qcow2"), "the message does not name the dependent: {said}");
}

/// A set over a template, with a snapshot.
fn over_template() -> Option<World> {
    let world = World::new()?;
    world.image("tmpl.qcow2", SIZE);
    world.write("tmpl.qcow2", OLD);
    world.write("tmpl.qcow2", "-P 5 4M 1M");
    world.overlay("vda.qcow2", "tmpl.qcow2");
    world.ok(&["init", "web.json", "--volume", "vda=vda.qcow2"]);
    world.ok(&["snapshot", "web.json", "s1"]);
    world.assert_sound();
    // The clocks of file systems are coarse.
    std::thread::sleep(std::time::Duration::from_millis(50));
    Some(world)
}

/// `verify` reports the base, `accept-base` settles it.
#[track_caller]
fn changed_base_is_found_and_accepted(world: &World) {
    let run = world.vm(&["verify", "web.json"]);
    assert_eq!(run.code, 2, "the change was not found: {}{}", run.stdout, run.stderr);
    assert!(run.stdout.contains("tmpl.qcow2"), "{}", run.stdout);
    let said = world.unchanged(&["snapshot", "web.json", "s2"]);
    assert!(said.contains("tmpl.qcow2") && said.contains("accept-base"), "{said}");
    world.unchanged(&["delete", "web.json", "s1"]);
    world.ok(&["accept-base", "web.json", "tmpl.qcow2"]);
    world.assert_sound();
    for args in [&["snapshot", "web.json", "s2"][..], &["delete", "web.json", "s1"], &["revert", "web.json", "s2"]] {
        world.ok(args);
    }
    world.assert_sound();
}

#[test]
fn base_changed_in_place_is_found_and_accepted() {
    let Some(world) = over_template() else { return };
    let len = fs::metadata(world.path("tmpl.qcow2")).unwrap().len();
    // Into clusters that are allocated: length, header and L1 table stay.
    world.write("tmpl.qcow2", "-P 6 4M 1M");
    assert_eq!(fs::metadata(world.path("tmpl.qcow2")).unwrap().len(), len);
    changed_base_is_found_and_accepted(&world);
}

#[test]
fn base_with_new_internal_snapshot_is_accepted() {
    let Some(world) = over_template() else { return };
    world.img(&["snapshot", "-c", "mark", "tmpl.qcow2"]);
    world.img(&["snapshot", "-d", "mark", "tmpl.qcow2"]);
    changed_base_is_found_and_accepted(&world);
}

#[test]
fn base_replaced_by_copy_is_accepted() {
    let Some(world) = over_template() else { return };
    world.img(&["convert", "-O", "qcow2", "tmpl.qcow2", "copy"]);
    fs::rename(world.path("copy"), world.path("tmpl.qcow2")).unwrap();
    changed_base_is_found_and_accepted(&world);
}

#[test]
fn accept_base_of_other_file_is_refused() {
    let Some(world) = over_template() else { return };
    for file in ["vda.qcow2", "none.qcow2"] {
        world.unchanged(&["accept-base", "web.json", file]);
    }
}
