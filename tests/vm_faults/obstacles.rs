//! Obstacles that a plan can find: each is refused with `--dry-run` too, before anything is
//! recorded, and other verbs still work afterwards.

use std::fs;
use std::os::unix::fs::FileExt as _;

use super::world::{NEW, OLD, SIZE, World, assert_same, assert_supported, finish};

/// The byte of the incompatible features that are known.
const FEATURES: u64 = 79;
const DIRTY: u8 = 1;
const CORRUPT: u8 = 2;

/// Two volumes with a snapshot `ext`, of which the second one will have the obstacle.
fn two_volumes() -> Option<World> {
    let world = World::new()?;
    for name in ["a.qcow2", "b.qcow2"] {
        world.image(name, "8M");
        world.write(name, "-P 1 0 1M");
    }
    world.ok(&["init", "web.json", "--volume", "vda=a.qcow2", "--volume", "vdb=b.qcow2"]);
    world.ok(&["snapshot", "web.json", "ext"]);
    for volume in ["vda", "vdb"] {
        world.write(&world.active(volume), "-P 2 0 64k");
    }
    Some(world)
}

fn mark(world: &World, name: &str, feature: u8) {
    let file = fs::File::options().read(true).write(true).open(world.path(name)).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, FEATURES).unwrap();
    file.write_all_at(&[byte[0] | feature], FEATURES).unwrap();
}

/// The snapshot is still there, and can be reverted to and built upon.
#[track_caller]
fn set_still_works(world: &World) {
    assert_eq!(world.state("ext").as_deref(), Some("ready"));
    world.ok(&["snapshot", "web.json", "next"]);
    assert_eq!(world.state("next").as_deref(), Some("ready"));
}

#[test]
fn delete_with_internal_snapshot_in_overlay_is_refused() {
    for direction in ["commit", "pull", "auto"] {
        let Some(world) = two_volumes() else { return };
        let overlay = world.active("vdb");
        world.img(&["snapshot", "-c", "inner", &overlay]);
        let said = world.obstacle(&["delete", "web.json", "ext", "--direction", direction]);
        assert!(said.contains(&overlay) && said.contains("inner"), "{direction}: {said}");
        assert!(said.contains("--drop") || said.contains("qemu-img snapshot -d"), "no remedy is named: {said}");
        set_still_works(&world);
    }
}

#[test]
fn delete_with_internal_snapshot_dropped_completes() {
    let Some(world) = two_volumes() else { return };
    world.img(&["snapshot", "-c", "inner", &world.active("vdb")]);
    world.ok(&["delete", "web.json", "ext", "--drop", "inner"]);
    world.assert_reads(world.active("vdb"), "-P 2 0 64k");
    world.assert_reads(world.active("vdb"), "-P 1 64k 512k");
    world.assert_sound();
}

#[test]
fn delete_with_dropped_snapshot_of_other_name_is_refused() {
    let Some(world) = two_volumes() else { return };
    world.img(&["snapshot", "-c", "inner", &world.active("vdb")]);
    let said = world.obstacle(&["delete", "web.json", "ext", "--drop", "other"]);
    assert!(said.contains("inner") || said.contains("other"), "{said}");
}

/// A volume whose base has the internal snapshot `golden`, under the snapshot `ext`.
fn golden_base() -> Option<World> {
    let world = World::new()?;
    world.image("a.qcow2", "8M");
    world.write("a.qcow2", "-P 1 0 64k");
    world.img(&["snapshot", "-c", "golden", "a.qcow2"]);
    world.write("a.qcow2", "-P 2 0 64k");
    world.ok(&["init", "web.json", "--volume", "vda=a.qcow2"]);
    world.ok(&["snapshot", "web.json", "ext"]);
    world.write(&world.active("vda"), "-P 3 1M 5M");
    Some(world)
}

#[test]
fn delete_keeps_internal_snapshot_of_base() {
    for more in [&[][..], &["--direction", "auto"]] {
        let Some(world) = golden_base() else { return };
        let args = [&["delete", "web.json", "ext"], more].concat();
        let run = world.vm(&args);
        assert_supported(&run, &args);
        assert!(run.code == 0 || run.code == 1, "{}", run.stderr);
        assert!(world.exists("a.qcow2"), "the file with an internal snapshot was removed");
        assert!(world.img(&["snapshot", "-l", "a.qcow2"]).contains("golden"), "golden is gone: {}", run.stdout);
        let content = world.qemu.content(&world.path("a.qcow2"), Some("golden"));
        assert!(content[..65536] == vec![1; 65536], "golden reads otherwise");
        world.assert_reads(world.active("vda"), "-P 3 1M 5M");
    }
}

#[test]
fn pull_that_would_remove_internal_snapshot_is_refused() {
    let Some(world) = golden_base() else { return };
    let said = world.obstacle(&["delete", "web.json", "ext", "--direction", "pull"]);
    assert!(said.contains("a.qcow2") && said.contains("golden"), "{said}");
    world.ok(&["delete", "web.json", "ext", "--direction", "pull", "--drop", "golden"]);
    world.assert_reads(world.active("vda"), "-P 3 1M 5M");
    world.assert_reads(world.active("vda"), "-P 2 0 64k");
}

#[test]
fn revert_that_would_remove_internal_snapshot_is_refused() {
    let Some(world) = World::with_snapshot() else { return };
    let active = world.active("vda");
    world.img(&["snapshot", "-c", "week-of-work", &active]);
    let said = world.obstacle(&["revert", "web.json", "s1"]);
    assert!(said.contains(&active) && said.contains("week-of-work"), "{said}");
    world.ok(&["revert", "web.json", "s1", "--drop", "week-of-work"]);
    assert!(!world.exists(&active));
    world.assert_sound();
}

#[test]
fn delete_of_leaf_with_internal_snapshot_is_refused() {
    let Some(world) = World::with_volume() else { return };
    world.ok(&["snapshot", "web.json", "s1"]);
    let leaf = world.active("vda");
    world.img(&["snapshot", "-c", "inner", &leaf]);
    world.ok(&["snapshot", "web.json", "s2"]);
    world.ok(&["revert", "web.json", "s1"]);
    let said = world.obstacle(&["delete", "web.json", "s2"]);
    assert!(said.contains(&leaf) && said.contains("inner"), "{said}");
    world.ok(&["delete", "web.json", "s2", "--drop", "inner"]);
}

#[test]
fn delete_that_would_lose_bitmap_of_top_is_refused() {
    let Some(world) = two_volumes() else { return };
    let overlay = world.active("vdb");
    world.img(&["bitmap", "--add", "-f", "qcow2", &overlay, "backup0"]);
    let said = world.obstacle(&["delete", "web.json", "ext", "--direction", "commit"]);
    assert!(said.contains("backup0") && said.contains(&overlay), "{said}");
    world.ok(&["delete", "web.json", "ext", "--direction", "commit", "--drop", "backup0"]);
    world.assert_sound();
}

#[test]
fn delete_never_loses_bitmap_of_base_silently() {
    for direction in ["commit", "pull"] {
        let Some(world) = World::new() else { return };
        world.image("a.qcow2", "8M");
        world.write("a.qcow2", "-P 1 0 64k");
        world.img(&["bitmap", "--add", "-f", "qcow2", "a.qcow2", "backup0"]);
        world.ok(&["init", "web.json", "--volume", "vda=a.qcow2"]);
        world.ok(&["snapshot", "web.json", "ext"]);
        world.write(&world.active("vda"), "-P 2 0 64k");
        let before = world.tree();
        let run = world.vm(&["delete", "web.json", "ext", "--direction", direction]);
        if run.code == 0 {
            let survivor = world.active("vda");
            let info = world.qemu.info(&world.path(&survivor));
            let bitmaps = info["format-specific"]["data"]["bitmaps"].to_string();
            assert!(bitmaps.contains("backup0") && !bitmaps.contains("in-use"), "the bitmap is lost: {bitmaps}");
        } else {
            assert!(run.stderr.contains("backup0"), "{}", run.stderr);
            assert_same(&before, &world.tree(), "a refused deletion");
        }
    }
}

#[test]
fn revert_that_would_lose_bitmap_is_refused() {
    let Some(world) = World::with_snapshot() else { return };
    let active = world.active("vda");
    world.img(&["bitmap", "--add", "-f", "qcow2", &active, "backup0"]);
    let said = world.obstacle(&["revert", "web.json", "s1"]);
    assert!(said.contains(&active) && said.contains("backup0"), "{said}");
    world.ok(&["revert", "web.json", "s1", "--drop", "backup0"]);
}

#[test]
fn delete_with_corrupt_base_is_refused() {
    for direction in ["commit", "pull"] {
        let Some(world) = two_volumes() else { return };
        mark(&world, "b.qcow2", CORRUPT);
        let said = world.obstacle(&["delete", "web.json", "ext", "--direction", direction]);
        assert!(said.contains("b.qcow2") && said.contains("check"), "{direction}: {said}");
        assert_eq!(world.state("ext").as_deref(), Some("ready"));
    }
}

#[test]
fn delete_with_corrupt_overlay_is_refused() {
    for direction in ["commit", "pull"] {
        let Some(world) = two_volumes() else { return };
        let overlay = world.active("vdb");
        mark(&world, &overlay, CORRUPT);
        let said = world.obstacle(&["delete", "web.json", "ext", "--direction", direction]);
        assert!(said.contains(&overlay) && said.contains("check"), "{direction}: {said}");
        assert_eq!(world.state("ext").as_deref(), Some("ready"));
    }
}

#[test]
fn delete_with_dirty_image_completes_or_is_refused() {
    for (overlay, direction) in [(true, "commit"), (true, "pull"), (false, "commit"), (false, "pull")] {
        let Some(world) = two_volumes() else { return };
        let name = if overlay { world.active("vdb") } else { "b.qcow2".to_owned() };
        mark(&world, &name, DIRTY);
        let before = world.tree();
        let args = ["delete", "web.json", "ext", "--direction", direction];
        let plan = world.vm(&[&args[..], &["--dry-run"]].concat());
        assert_same(&before, &world.tree(), "a dry run");
        let run = world.vm(&args);
        assert_eq!(plan.code, run.code, "the plan and the deletion disagree: {}{}", plan.stderr, run.stderr);
        if run.code == 0 {
            world.assert_reads(world.active("vdb"), "-P 2 0 64k");
            world.assert_reads(world.active("vdb"), "-P 1 64k 512k");
            world.assert_sound();
        } else {
            assert!(run.stderr.contains(&name), "{}", run.stderr);
            assert_same(&before, &world.tree(), "a refused deletion");
        }
    }
}

#[test]
fn delete_with_resized_disk_over_version_2_completes_or_is_refused() {
    for direction in ["commit", "pull"] {
        let Some(world) = World::new() else { return };
        world.img(&["create", "-q", "-f", "qcow2", "-o", "compat=0.10", "a.qcow2", "8M"]);
        world.write("a.qcow2", "-P 1 0 64k");
        world.img(&["snapshot", "-c", "golden", "a.qcow2"]);
        world.ok(&["init", "web.json", "--volume", "vda=a.qcow2"]);
        world.ok(&["snapshot", "web.json", "ext"]);
        world.ok(&["resize", "web.json", "vda", "16M"]);
        world.write(&world.active("vda"), "-P 2 12M 64k");
        let before = world.tree();
        let args = ["delete", "web.json", "ext", "--direction", direction];
        let plan = world.vm(&[&args[..], &["--dry-run"]].concat());
        let run = world.vm(&args);
        assert_eq!(plan.code, run.code, "the plan and the deletion disagree: {}{}", plan.stderr, run.stderr);
        assert!(world.img(&["snapshot", "-l", "a.qcow2"]).contains("golden"), "golden is gone: {}", run.stdout);
        if run.code == 0 {
            world.assert_reads(world.active("vda"), "-P 2 12M 64k");
            world.assert_sound();
        } else {
            assert_same(&before, &world.tree(), "a refused deletion");
        }
    }
}

#[test]
fn delete_over_longest_file_name_completes() {
    for direction in ["commit", "pull"] {
        let Some(world) = World::new() else { return };
        let name = format!("{}.qcow2", "n".repeat(249));
        world.image(&name, SIZE);
        world.write(&name, OLD);
        world.ok(&["init", "web.json", "--volume", &format!("vda={name}")]);
        world.ok(&["snapshot", "web.json", "s1"]);
        world.write(&world.active("vda"), NEW);
        world.ok(&["delete", "web.json", "s1", "--direction", direction]);
        world.assert_reads(world.active("vda"), OLD);
        world.assert_reads(world.active("vda"), NEW);
        world.assert_sound();
    }
}

#[test]
fn snapshot_with_too_long_overlay_name_is_refused() {
    let Some(world) = World::new() else { return };
    world.image("vda.qcow2", SIZE);
    let name = "v".repeat(245);
    let args = ["init", "web.json", "--volume", "vda=vda.qcow2", "--vm", &name];
    let run = world.vm(&args);
    if run.code == 0 {
        world.unchanged(&["snapshot", "web.json", "s1"]);
    } else {
        assert!(!world.exists("web.json"));
    }
}

/// Runs a verb with a limit of open files.
fn limited(world: &World, limit: u32, args: &[&str]) -> crate::support::qemu::Run {
    let mut command = std::process::Command::new("sh");
    command.args(["-c", &format!("ulimit -n {limit}; exec \"$0\" vm \"$@\""), env!("CARGO_BIN_EXE_qcow2-chain")]);
    finish(command.args(args).current_dir(world.dir()))
}

#[test]
fn delete_with_too_few_descriptors_is_refused() {
    let Some(world) = World::new() else { return };
    let volumes: Vec<String> = (0..4).map(|number| format!("v{number}=v{number}.qcow2")).collect();
    for number in 0..4 {
        world.image(&format!("v{number}.qcow2"), "4M");
    }
    let args: Vec<&str> = volumes.iter().flat_map(|volume| ["--volume", volume]).collect();
    world.ok(&[&["init", "web.json"], &args[..]].concat());
    for number in 0..10 {
        world.ok(&["snapshot", "web.json", &format!("s{number}")]);
        for volume in 0..4 {
            world.write(&world.active(&format!("v{volume}")), &format!("-P {} {number}00k 64k", number + 1));
        }
    }
    let args = ["delete", "web.json", "s9"];
    for limit in 10..=200 {
        let before = world.tree();
        let run = limited(&world, limit, &args);
        if run.code == 0 {
            world.assert_sound();
            break;
        }
        assert!(!world.exists("web.json.journal"), "stuck in mid-merge with {limit} descriptors: {}", run.stderr);
        assert_same(&before, &world.tree(), &format!("refused with {limit} descriptors ({})", run.stderr));
        assert!(limit < 200, "never enough descriptors: {}", run.stderr);
    }
}
