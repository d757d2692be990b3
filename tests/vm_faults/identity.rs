//! Files that are known by several names or through links, and overlays of several VMs in one
//! directory.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::time::Duration;

use serde_json::Value;

use super::world::{NEW, OLD, SIZE, World, can_trace, ended, interrupted_create};

const BOTH: [&str; 2] = ["commit", "pull"];

/// Two directories with a catalogue each of the same name, and one volume each in a pool.
fn pool() -> Option<World> {
    let world = World::new()?;
    for directory in ["A", "B", "pool"] {
        fs::create_dir(world.path(directory)).unwrap();
    }
    for (catalogue, image, pattern) in [("A", "pool/a.qcow2", 1), ("B", "pool/b.qcow2", 2)] {
        world.image(image, "8M");
        world.write(image, &format!("-P {pattern} 0 1M"));
        world.ok(&["init", &format!("{catalogue}/web.json"), "--volume", &format!("vda={image}")]);
    }
    Some(world)
}

#[test]
fn snapshots_of_two_vms_at_once_keep_their_overlays_apart() {
    let Some(world) = pool() else { return };
    if !can_trace() {
        return;
    }
    // The first VM waits between its look at the directory and the creation of its overlay.
    let mut slow = std::process::Command::new("strace");
    slow.args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=fsync,fdatasync"]);
    slow.args(["-e", "inject=fsync,fdatasync:delay_enter=1500000:when=1"]);
    slow.arg(env!("CARGO_BIN_EXE_qcow2-chain")).args(["vm", "snapshot", "A/web.json", "s1"]).current_dir(world.dir());
    slow.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let slow = slow.spawn().expect("strace starts");
    world.wait_for("A/web.json.journal");
    world.ok(&["snapshot", "B/web.json", "s1"]);
    let of_b = world.active_of("B/web.json", "vda");
    let before = world.node(&of_b);
    let run = ended(slow);
    assert!(world.exists(&of_b), "the other VM's overlay is gone: {}", run.stderr);
    assert_eq!(world.node(&of_b), before, "the other VM's overlay was changed");
    world.assert_reads(&of_b, "-P 2 0 1M");
    let of_a = world.active_of("A/web.json", "vda");
    assert_ne!(of_a, of_b, "both catalogues name one file");
    world.assert_reads(&of_a, "-P 1 0 1M");
    assert_eq!(run.code, 0, "a snapshot failed because of another VM: {}", run.stderr);
}

#[test]
fn overlay_names_of_vms_with_one_stem_differ_after_removal() {
    // The number of a file that is gone is free again: a name must not depend on the files that
    // exist.
    let Some(world) = pool() else { return };
    world.ok(&["snapshot", "A/web.json", "s1"]);
    let of_a = world.active_of("A/web.json", "vda");
    fs::rename(world.path(&of_a), world.path("away")).unwrap();
    world.ok(&["snapshot", "B/web.json", "s1"]);
    let of_b = world.active_of("B/web.json", "vda");
    assert_ne!(of_a, of_b, "two VMs record one path for their overlays");
}

#[test]
fn overlay_names_of_joined_vm_and_volume_names_differ() {
    let Some(world) = World::new() else { return };
    world.image("1.qcow2", "8M");
    world.image("2.qcow2", "8M");
    world.ok(&["init", "1.json", "--vm", "a-b", "--volume", "c=1.qcow2"]);
    world.ok(&["init", "2.json", "--vm", "a", "--volume", "b-c=2.qcow2"]);
    world.ok(&["snapshot", "1.json", "s1"]);
    let first = world.active_of("1.json", "c");
    fs::rename(world.path(&first), world.path("away")).unwrap();
    world.ok(&["snapshot", "2.json", "s1"]);
    assert_ne!(world.active_of("2.json", "b-c"), first, "two VMs record one path for their overlays");
}

/// Puts another VM's overlay under the name that an interrupted snapshot planned. `prepare` makes
/// it, from `other.qcow2`.
#[track_caller]
fn strangers_file(overlay: bool, prepare: impl Fn(&World, &str)) {
    let Some((world, name)) = interrupted_create(overlay) else { return };
    let _ = fs::remove_file(world.path(&name));
    world.image("other.qcow2", "8M");
    world.write("other.qcow2", "-P 9 0 1M");
    prepare(&world, &name);
    let before = world.node(&name);
    // Undone or uncertain, both are right.
    let run = world.vm(&["recover", "web.json"]);
    assert!(run.code == 0 || run.code == 1, "{}{}", run.stdout, run.stderr);
    assert!(world.exists(&name), "recovery removed a stranger's file: {}{}", run.stdout, run.stderr);
    assert_eq!(world.node(&name), before, "recovery changed a stranger's file");
    assert_eq!(world.active("vda"), "vda.qcow2", "recovery adopted a stranger's file: {}{}", run.stdout, run.stderr);
    assert_eq!(world.state("s1"), None, "{}{}", run.stdout, run.stderr);
    world.assert_reads("vda.qcow2", OLD);
}

#[test]
fn recovery_of_create_keeps_strangers_overlay() {
    strangers_file(false, |world, name| world.overlay(name, "other.qcow2"));
}

#[test]
fn recovery_of_create_keeps_strangers_written_overlay() {
    strangers_file(false, |world, name| {
        world.overlay(name, "other.qcow2");
        world.write(name, "-P 8 2M 2M");
    });
}

#[test]
fn recovery_of_create_keeps_file_that_replaced_the_overlay() {
    strangers_file(true, |world, name| {
        world.overlay(name, "other.qcow2");
        world.write(name, "-P 8 2M 2M");
    });
}

#[test]
fn recovery_of_create_keeps_file_that_is_no_image() {
    strangers_file(false, |world, name| fs::write(world.path(name), b"a stranger's notes").unwrap());
}

#[test]
fn init_resolves_link_to_active_file() {
    for direction in BOTH {
        let Some(world) = World::new() else { return };
        fs::create_dir(world.path("pool")).unwrap();
        fs::create_dir(world.path("vm")).unwrap();
        world.image("pool/real.qcow2", SIZE);
        world.write("pool/real.qcow2", OLD);
        symlink("../pool/real.qcow2", world.path("vm/disk.0")).unwrap();
        let link = world.node("vm/disk.0");
        world.ok(&["init", "web.json", "--volume", "vda=vm/disk.0"]);
        let active = world.path(world.active("vda"));
        assert_eq!(active, world.path("pool/real.qcow2"), "the catalogue records a link");
        world.ok(&["snapshot", "web.json", "s1"]);
        let overlay = world.active("vda");
        assert!(world.path(&overlay).starts_with(world.path("pool")), "the overlay is beside the link: {overlay}");
        world.write(&overlay, NEW);
        world.ok(&["delete", "web.json", "s1", "--direction", direction]);
        assert_eq!(world.node("vm/disk.0"), link, "the link was changed");
        let active = world.active("vda");
        world.assert_reads(&active, OLD);
        world.assert_reads(&active, NEW);
        let images = fs::read_dir(world.path("pool")).unwrap().count();
        assert_eq!(images, 1, "a file is left that nothing reports");
        world.assert_sound();
    }
}

#[test]
fn init_resolves_linked_directory() {
    let Some(world) = World::new() else { return };
    fs::create_dir(world.path("real")).unwrap();
    symlink("real", world.path("linked")).unwrap();
    world.image("real/vda.qcow2", SIZE);
    world.ok(&["init", "web.json", "--volume", "vda=linked/vda.qcow2"]);
    assert_eq!(world.path(world.active("vda")), world.path("real/vda.qcow2"));
}

#[test]
fn file_replaced_by_link_is_not_removed() {
    let Some(world) = World::with_snapshot() else { return };
    let overlay = world.active("vda");
    fs::create_dir(world.path("moved")).unwrap();
    let target = world.path("moved").join(&overlay);
    fs::rename(world.path(&overlay), &target).unwrap();
    symlink(&target, world.path(&overlay)).unwrap();
    // Refused, or done with the link left in place; a path that became a link is never removed.
    let run = world.vm(&["revert", "web.json", "s1"]);
    assert!(world.exists(&overlay) && target.exists(), "{}{}", run.stdout, run.stderr);
}

#[test]
fn catalogue_link_is_resolved() {
    let Some(world) = World::new() else { return };
    fs::create_dir(world.path("cats")).unwrap();
    world.image("vda.qcow2", SIZE);
    let volume = format!("vda={}", world.path("vda.qcow2").display());
    world.ok(&["init", "cats/web.json", "--volume", &volume]);
    symlink("cats/web.json", world.path("web.json")).unwrap();
    let link = world.node("web.json");
    world.ok(&["snapshot", "web.json", "s1"]);
    assert_eq!(world.node("web.json"), link, "the link was replaced by a copy of the catalogue");
    let names = |catalogue: &str| -> Vec<Value> {
        let list: Value = serde_json::from_str(&world.ok(&["list", catalogue, "--json"])).unwrap();
        list["snapshots"].as_array().unwrap().iter().map(|one| one["name"].clone()).collect()
    };
    assert_eq!(names("cats/web.json"), names("web.json"), "the two paths lead to two catalogues");
    world.ok(&["snapshot", "cats/web.json", "s2"]);
    world.ok(&["delete", "web.json", "s2"]);
    assert_eq!(names("cats/web.json"), names("web.json"));
    let beside: Vec<_> = fs::read_dir(world.dir()).unwrap().map(|one| one.unwrap().file_name()).collect();
    let odd: Vec<_> = beside.iter().filter(|name| name.to_string_lossy().starts_with("web.json.")).collect();
    assert!(odd.is_empty(), "a lock or journal is beside the link: {odd:?}");
}

#[test]
fn init_through_catalogue_link_keeps_the_link() {
    let Some(world) = World::new() else { return };
    fs::create_dir(world.path("cats")).unwrap();
    world.image("vda.qcow2", SIZE);
    let volume = format!("vda={}", world.path("vda.qcow2").display());
    symlink("cats/web.json", world.path("web.json")).unwrap();
    let link = world.node("web.json");
    let run = world.vm(&["init", "web.json", "--volume", &volume]);
    assert_eq!(world.node("web.json"), link, "the link was replaced: {}{}", run.stdout, run.stderr);
    assert_eq!(run.code == 0, world.exists("cats/web.json"), "{}", run.stderr);
}

#[test]
fn operations_through_catalogue_link_share_the_lock() {
    let Some(world) = World::new() else { return };
    fs::create_dir(world.path("cats")).unwrap();
    world.image("vda.qcow2", SIZE);
    let volume = format!("vda={}", world.path("vda.qcow2").display());
    world.ok(&["init", "cats/web.json", "--volume", &volume]);
    world.ok(&["snapshot", "cats/web.json", "s1"]);
    world.write(&world.active_of("cats/web.json", "vda"), NEW);
    symlink("cats/web.json", world.path("web.json")).unwrap();
    let slow = world.start(&["delete", "cats/web.json", "s1", "--rate-limit", "4M", "--direction", "commit"]);
    world.wait_for("cats/web.json.journal");
    std::thread::sleep(Duration::from_millis(200));
    let said = world.refused(&["delete", "web.json", "s1"]);
    let done = ended(slow);
    assert_eq!(done.code, 0, "{}", done.stderr);
    assert!(!said.contains("vda.qcow2"), "stopped by an image's lock and not by the catalogue's: {said}");
    assert!(!world.exists("web.json.lock"), "the operation through the link took another lock");
}

#[test]
fn init_with_one_file_as_two_volumes_is_refused() {
    let Some(world) = World::new() else { return };
    fs::create_dir(world.path("real")).unwrap();
    symlink("real", world.path("linked")).unwrap();
    world.image("real/a.qcow2", SIZE);
    symlink("a.qcow2", world.path("real/link.qcow2")).unwrap();
    fs::hard_link(world.path("real/a.qcow2"), world.path("real/hard.qcow2")).unwrap();
    for other in ["real/link.qcow2", "real/hard.qcow2", "linked/a.qcow2", "real/../real/a.qcow2"] {
        let args = ["init", "web.json", "--volume", "vda=real/a.qcow2", "--volume", &format!("vdb={other}")];
        let said = world.unchanged(&args);
        assert!(said.contains("a.qcow2"), "{other}: {said}");
    }
    assert_eq!(fs::metadata(world.path("real/a.qcow2")).unwrap().nlink(), 2);
}

#[test]
fn init_with_one_raw_file_as_two_volumes_is_refused() {
    let Some(world) = World::new() else { return };
    fs::write(world.path("a.img"), vec![1; 1 << 20]).unwrap();
    fs::hard_link(world.path("a.img"), world.path("b.img")).unwrap();
    world.unchanged(&["init", "web.json", "--volume", "vda=a.img,format=raw", "--volume", "vdb=b.img,format=raw"]);
}

#[test]
fn init_with_one_frozen_file_under_two_names_is_refused() {
    let Some(world) = World::new() else { return };
    fs::create_dir(world.path("real")).unwrap();
    symlink("real", world.path("linked")).unwrap();
    world.image("real/tmpl.qcow2", SIZE);
    let at = |name: &str| world.path(name).to_str().unwrap().to_owned();
    world.overlay("a.qcow2", &at("real/tmpl.qcow2"));
    world.overlay("b.qcow2", &at("linked/tmpl.qcow2"));
    let said = world.unchanged(&[
        "init",
        "web.json",
        "--volume",
        "vda=a.qcow2",
        "--volume",
        "vdb=b.qcow2",
        "--snapshot",
        "golden",
        "--allow-any",
    ]);
    assert!(said.contains("tmpl.qcow2"), "{said}");
}
