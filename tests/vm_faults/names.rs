//! Names that QEMU or a terminal takes for something else, names in other encodings, and chains
//! over several directories.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use super::world::{NEW, OLD, SIZE, World, assert_refused, assert_supported, finish};

const BOTH: [&str; 2] = ["commit", "pull"];

/// Takes snapshots, deletes one in each direction, and has QEMU open the active file at each step.
#[track_caller]
fn exercise(world: &World, catalogue: &str) {
    for (number, direction) in BOTH.into_iter().enumerate() {
        let (first, second) = (format!("a{number}"), format!("b{number}"));
        for name in [&first, &second] {
            world.ok(&["snapshot", catalogue, name]);
            let active = world.active_of(catalogue, "vda");
            world.assert_reads(&active, OLD);
            world.write(&active, NEW);
        }
        for name in [&first, &second] {
            world.ok(&["delete", catalogue, name, "--direction", direction]);
            let active = world.active_of(catalogue, "vda");
            world.assert_reads(&active, OLD);
            world.assert_reads(&active, NEW);
            world.ok(&["verify", catalogue, "--deep"]);
        }
    }
}

/// Fails unless `init` either refuses and makes no catalogue, or makes a set whose files QEMU
/// opens.
#[track_caller]
fn opens_or_is_refused(world: &World, catalogue: &str, args: &[&str]) {
    let run = world.vm(args);
    if run.code == 0 {
        exercise(world, catalogue);
    } else {
        assert_refused(&run, args);
        assert!(!world.exists(catalogue), "a refused init made {catalogue}");
    }
}

#[test]
fn volume_name_with_colon_opens_in_qemu() {
    let Some(world) = World::new() else { return };
    world.image("./disk:0.qcow2", SIZE);
    world.write("disk:0.qcow2", OLD);
    opens_or_is_refused(&world, "web.json", &["init", "web.json", "--volume", "vda=./disk:0.qcow2"]);
}

#[test]
fn base_name_with_colon_opens_in_qemu() {
    let Some(world) = World::new() else { return };
    world.image("./2026-01-01T10:00.qcow2", SIZE);
    world.write("2026-01-01T10:00.qcow2", OLD);
    world.overlay("vda.qcow2", "./2026-01-01T10:00.qcow2");
    opens_or_is_refused(&world, "web.json", &["init", "web.json", "--volume", "vda=vda.qcow2"]);
}

#[test]
fn vm_name_with_colon_is_refused() {
    let Some(world) = World::new() else { return };
    world.image("vda.qcow2", SIZE);
    let said = world.unchanged(&["init", "web.json", "--volume", "vda=vda.qcow2", "--vm", "web:1"]);
    assert!(said.contains("web:1"), "{said}");
}

#[test]
fn catalogue_name_with_colon_opens_in_qemu() {
    let Some(world) = World::new() else { return };
    world.image("vda.qcow2", SIZE);
    world.write("vda.qcow2", OLD);
    opens_or_is_refused(&world, "web:1.json", &["init", "web:1.json", "--volume", "vda=vda.qcow2"]);
}

#[test]
fn backing_name_with_colon_opens_in_qemu() {
    let Some(world) = World::new() else { return };
    world.image("./a:b.qcow2", SIZE);
    world.write("a:b.qcow2", OLD);
    let program = |args: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_qcow2-chain"));
        finish(command.args(args).current_dir(world.dir()))
    };
    let create =
        |name: &str, backing: &str| program(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", backing, name]);
    for (number, backing) in ["a:b.qcow2", "./a:b.qcow2"].into_iter().enumerate() {
        let name = format!("created{number}");
        if create(&name, backing).code == 0 {
            world.assert_reads(&name, OLD);
        }
        for verb in ["rebase", "pull"] {
            let name = format!("{verb}{number}");
            world.overlay(&name, "./a:b.qcow2");
            program(&[verb, "-q", "-F", "qcow2", "-b", backing, &name]);
            world.assert_reads(&name, OLD);
        }
    }
}

#[test]
fn volume_path_without_utf8_opens_or_is_refused() {
    let Some(world) = World::new() else { return };
    let name = OsStr::from_bytes(b"disk\xff.qcow2");
    world.image("plain.qcow2", SIZE);
    world.write("plain.qcow2", OLD);
    fs::rename(world.path("plain.qcow2"), world.path(Path::new(name))).unwrap();
    let mut command = world.command(&["init", "web.json", "--volume"]);
    let run = finish(command.arg(OsStr::from_bytes(b"vda=disk\xff.qcow2")));
    if run.code == 0 {
        world.ok(&["snapshot", "web.json", "s1"]);
        world.assert_reads(world.active("vda"), OLD);
    } else {
        assert_eq!(run.code, 1, "{}", run.stderr);
        assert!(run.stderr.contains("UTF-8"), "the message does not name the problem: {}", run.stderr);
        assert!(!world.exists("web.json"));
    }
}

#[test]
fn base_path_without_utf8_opens_or_is_refused() {
    let Some(world) = World::new() else { return };
    let name = OsStr::from_bytes(b"base\xff.qcow2");
    world.image("plain.qcow2", SIZE);
    world.write("plain.qcow2", OLD);
    fs::rename(world.path("plain.qcow2"), world.path(Path::new(name))).unwrap();
    let mut command = std::process::Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]).arg(name).arg("vda.qcow2");
    assert_eq!(finish(command.current_dir(world.dir())).code, 0);
    opens_or_is_refused(&world, "web.json", &["init", "web.json", "--volume", "vda=vda.qcow2"]);
}

#[test]
fn directory_path_without_utf8_opens_or_is_refused() {
    let Some(world) = World::new() else { return };
    let directory = world.path(Path::new(OsStr::from_bytes(b"vm\xff")));
    fs::create_dir(&directory).unwrap();
    world.image("plain.qcow2", SIZE);
    world.write("plain.qcow2", OLD);
    fs::rename(world.path("plain.qcow2"), directory.join("vda.qcow2")).unwrap();
    // Relative paths, as a user types them in that directory.
    let run = |args: &[&str]| finish(world.command(args).current_dir(&directory));
    let args = ["init", "web.json", "--volume", "vda=vda.qcow2"];
    let init = run(&args);
    if init.code == 0 {
        let taken = run(&["snapshot", "web.json", "s1"]);
        assert_eq!(taken.code, 0, "{}", taken.stderr);
        let active = run(&["path", "web.json", "vda"]).stdout;
        world.assert_reads(directory.join(active.trim_end()), OLD);
    } else {
        assert_refused(&init, &args);
        assert!(!directory.join("web.json").exists());
    }
}

#[test]
fn control_characters_in_names_are_refused() {
    let Some(world) = World::new() else { return };
    world.image("base.qcow2", SIZE);
    world.overlay("vda.qcow2", "base.qcow2");
    let odd = "a\n\u{1b}[31mb";
    for args in [
        &["init", "web.json", "--volume", "vda=vda.qcow2", "--snapshot", odd][..],
        &["init", "web.json", "--volume", "vda=vda.qcow2", "--vm", odd],
        &["init", "web.json", "--volume", &format!("{odd}=vda.qcow2")],
        &["init", "web.json", "--volume", "vda=vda.qcow2", "--snapshot", "a\u{85}b"],
    ] {
        let said = world.unchanged(args);
        assert!(!said.contains('\u{1b}'), "the message repeats the escape sequence: {said:?}");
    }
    world.ok(&["init", "web.json", "--volume", "vda=vda.qcow2"]);
    for name in [odd, "a\u{7f}b", "a\u{9b}31mb", "tab\there"] {
        let said = world.unchanged(&["snapshot", "web.json", name]);
        assert!(!said.chars().any(|one| one.is_control() && one != '\n'), "{said:?}");
    }
}

#[test]
fn control_characters_in_paths_are_refused() {
    let Some(world) = World::new() else { return };
    world.image("a\u{1b}[31mb.qcow2", SIZE);
    let said = world.unchanged(&["init", "web.json", "--volume", "vda=a\u{1b}[31mb.qcow2"]);
    assert!(!said.contains('\u{1b}'), "{said:?}");
}

#[test]
fn init_with_impossible_overlay_geometry_is_refused() {
    let Some(world) = World::new() else { return };
    world.image("vda.qcow2", SIZE);
    let volume = "vda=vda.qcow2,cluster_size=4k,extended_l2=on";
    let said = world.unchanged(&["init", "web.json", "--volume", volume]);
    assert!(said.contains("extended_l2") || said.contains("cluster_size"), "{said}");
    // The smallest possible one.
    world.ok(&["init", "web.json", "--volume", "vda=vda.qcow2,cluster_size=16k,extended_l2=on"]);
    world.ok(&["snapshot", "web.json", "s1"]);
}

/// A chain of three images in two directories, with these names in the headers, as a set with two
/// snapshots.
fn two_directories(world: &World, other: &Path, names: [&str; 2]) {
    fs::create_dir_all(world.path("a")).unwrap();
    fs::create_dir_all(other).unwrap();
    world.image("a/root.qcow2", SIZE);
    world.write("a/root.qcow2", OLD);
    let mid = other.join("mid.qcow2");
    world.overlay(mid.to_str().unwrap(), names[0]);
    world.qemu.io(&mid, &["write -q -P 3 2M 64k"]);
    world.overlay("a/top.qcow2", names[1]);
    world.write("a/top.qcow2", NEW);
    let allow = [world.dir(), other].map(|path| path.to_str().unwrap().to_owned());
    world.ok(&[
        "init",
        "web.json",
        "--volume",
        "vda=a/top.qcow2",
        "--snapshot",
        "s0",
        "--snapshot",
        "s1",
        "--allow",
        &allow[0],
        "--allow",
        &allow[1],
    ]);
}

/// Deletes both snapshots, the upper one first or last, and has QEMU open what is left.
#[track_caller]
fn delete_over_directories(world: &World, direction: &str, order: [&str; 2]) {
    for name in order {
        let args = ["delete", "web.json", name, "--direction", direction];
        let before = world.tree();
        let run = world.vm(&args);
        assert_supported(&run, &args);
        if run.code != 0 {
            assert!(!world.exists("web.json.journal"), "{args:?} cannot go on: {}", run.stderr);
            super::world::assert_same(&before, &world.tree(), &format!("{args:?} was refused"));
            continue;
        }
        let active = world.active("vda");
        for what in [OLD, "-P 3 2M 64k", NEW] {
            world.assert_reads(&active, what);
        }
        world.assert_sound();
    }
    assert!(world.list()["snapshots"].as_array().is_some_and(Vec::is_empty), "the snapshots are not deleted");
}

#[test]
fn delete_over_two_directories_opens_in_qemu() {
    for direction in BOTH {
        for order in [["s1", "s0"], ["s0", "s1"]] {
            let Some(world) = World::new() else { return };
            let at = |name: &str| world.path(name).to_str().unwrap().to_owned();
            two_directories(&world, &world.path("b"), [&at("a/root.qcow2"), &at("b/mid.qcow2")]);
            delete_over_directories(&world, direction, order);
        }
    }
}

#[test]
fn delete_over_two_directories_by_relative_names_opens_in_qemu() {
    for direction in BOTH {
        for order in [["s1", "s0"], ["s0", "s1"]] {
            let Some(world) = World::new() else { return };
            two_directories(&world, &world.path("b"), ["../a/root.qcow2", "../b/mid.qcow2"]);
            delete_over_directories(&world, direction, order);
        }
    }
}

#[test]
fn delete_over_two_file_systems_completes() {
    for direction in BOTH {
        for order in [["s1", "s0"], ["s0", "s1"]] {
            let (Some(world), Ok(other)) = (World::new(), tempfile::tempdir()) else { return };
            let mid = other.path().join("mid.qcow2");
            two_directories(
                &world,
                other.path(),
                [world.path("a/root.qcow2").to_str().unwrap(), mid.to_str().unwrap()],
            );
            delete_over_directories(&world, direction, order);
        }
    }
}
