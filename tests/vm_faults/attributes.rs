//! Owner, group, mode, ACL and extended attributes of overlays, of merged files and of the
//! catalogue.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use super::world::{
    FILL, NEW, OLD, SIZE, World, assert_refused, assert_same, assert_supported, can_trace, finish, is_root,
};
use crate::support::qemu::Run;
use crate::support::say;

const OWNER: (u32, u32, u32) = (64055, 108, 0o600);
const NOBODY: u32 = 65534;

fn attributes(path: &Path) -> (u32, u32, u32) {
    let meta = fs::metadata(path).unwrap();
    (meta.uid(), meta.gid(), meta.mode() & 0o7777)
}

fn set(path: &Path, (owner, group, mode): (u32, u32, u32)) {
    chown(path, Some(owner), Some(group)).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// A set whose volume belongs to another user.
fn foreign() -> Option<World> {
    if !is_root() {
        return None;
    }
    let world = World::new()?;
    world.image("vda.qcow2", "8M");
    world.write("vda.qcow2", "-P 1 0 128k");
    set(&world.path("vda.qcow2"), OWNER);
    world.ok(&["init", "web.json", "--volume", "vda=vda.qcow2"]);
    Some(world)
}

#[test]
fn overlay_has_owner_and_mode_of_active_file() {
    for mode in [0o600, 0o640, 0o660, 0o644] {
        let Some(world) = foreign() else { return };
        let wanted = (OWNER.0, OWNER.1, mode);
        set(&world.path("vda.qcow2"), wanted);
        world.ok(&["snapshot", "web.json", "s1"]);
        assert_eq!(attributes(&world.path(world.active("vda"))), wanted, "after a snapshot");
        world.ok(&["revert", "web.json", "s1"]);
        assert_eq!(attributes(&world.path(world.active("vda"))), wanted, "after a revert");
    }
}

#[test]
fn merge_keeps_owner_and_mode_of_survivor() {
    for direction in ["commit", "pull", "auto"] {
        let Some(world) = foreign() else { return };
        world.ok(&["snapshot", "web.json", "s1"]);
        world.write(&world.active("vda"), "-P 2 1M 4M");
        world.ok(&["delete", "web.json", "s1", "--direction", direction]);
        assert_eq!(attributes(&world.path(world.active("vda"))), OWNER, "{direction}");
    }
}

/// The octal mode that is the last argument of a traced system call.
fn last_mode(line: &str) -> u32 {
    let last = line.split(") = ").next().and_then(|call| call.rsplit(", ").find(|part| part.starts_with('0')));
    u32::from_str_radix(last.unwrap_or_default(), 8).unwrap_or_else(|error| panic!("{line}: {error}"))
}

#[test]
fn overlay_mode_is_independent_of_umask() {
    for mask in ["077", "000"] {
        let Some(world) = foreign() else { return };
        let wanted = (OWNER.0, OWNER.1, 0o640);
        set(&world.path("vda.qcow2"), wanted);
        let mut command = Command::new("sh");
        let script = format!("umask {mask}; exec \"$0\" vm snapshot web.json s1");
        let run = finish(command.args(["-c", &script, env!("CARGO_BIN_EXE_qcow2-chain")]).current_dir(world.dir()));
        assert_eq!(run.code, 0, "{}", run.stderr);
        assert_eq!(attributes(&world.path(world.active("vda"))), wanted, "umask {mask}");
    }
}

#[test]
fn overlay_is_never_more_readable_than_active_file() {
    let Some(world) = foreign() else { return };
    if !can_trace() {
        return;
    }
    set(&world.path("vda.qcow2"), (OWNER.0, OWNER.1, 0o640));
    let trace = tempfile::NamedTempFile::new().unwrap();
    let mut command = Command::new("strace");
    let calls = "trace=?open,openat,?creat,?chmod,fchmod,fchmodat,?chown,?lchown,fchown,fchownat";
    command.args(["-f", "-qq", "-y", "-e", calls, "-o"]).arg(trace.path());
    command.arg(env!("CARGO_BIN_EXE_qcow2-chain")).args(["vm", "snapshot", "web.json", "s1"]);
    let run = finish(command.current_dir(world.dir()));
    assert_eq!(run.code, 0, "{}", run.stderr);
    let overlay = world.active("vda");
    let text = fs::read_to_string(trace.path()).unwrap();
    let calls: Vec<&str> = text.lines().filter(|line| line.contains(&*overlay) || line.contains("O_TMPFILE")).collect();
    let created = calls.iter().position(|line| line.contains("O_CREAT") || line.contains("O_TMPFILE"));
    let created = created.unwrap_or_else(|| panic!("the creation was not traced: {text}"));
    assert_eq!(last_mode(calls[created]) & 0o077, 0, "created readable by others: {}", calls[created]);
    // The group may read it only once the group is that of the source.
    let owned = calls.iter().rposition(|line| line.contains("chown"));
    let opened = calls.iter().position(|line| line.contains("chmod") && last_mode(line) & 0o077 != 0);
    assert!(owned.is_some() && opened.is_some() && owned < opened, "opened up before it had its owner: {calls:#?}");
    assert_eq!(attributes(&world.path(&overlay)), (OWNER.0, OWNER.1, 0o640));
}

#[test]
fn catalogue_keeps_its_owner_and_mode() {
    let Some(world) = foreign() else { return };
    let wanted = (64055, 108, 0o600);
    set(&world.path("web.json"), wanted);
    for args in [
        &["snapshot", "web.json", "s1"][..],
        &["revert", "web.json", "s1"],
        &["resize", "web.json", "vda", "16M"],
        &["delete", "web.json", "s1"],
    ] {
        world.ok(args);
        assert_eq!(attributes(&world.path("web.json")), wanted, "after {args:?}");
    }
}

/// Runs a line of Python, or says that it is missing.
fn python(world: &World, code: &str) -> Option<String> {
    let mut command = Command::new("python3");
    let output = command.args(["-c", code]).current_dir(world.dir()).stdin(Stdio::null()).output();
    match output {
        Ok(output) if output.status.success() => Some(String::from_utf8_lossy(&output.stdout).into_owned()),
        _ => {
            say("SKIPPED: extended attributes cannot be set by python3 on this file system");
            None
        }
    }
}

/// Code that sets an ACL by which the user 1234 reads and writes a file of mode 0660.
const ACL: &str = "import os,struct; e=[(1,6,0xffffffff),(2,6,1234),(4,0,0xffffffff),(16,6,0xffffffff),(32,0,0xffffffff)]; \
    os.setxattr('vda.qcow2','system.posix_acl_access',struct.pack('<I',2)+b''.join(struct.pack('<HHI',*x) for x in e))";

fn read_attribute(world: &World, file: &str, name: &str) -> String {
    let code =
        format!("import os; print(os.getxattr('{file}','{name}').hex() if '{name}' in os.listxattr('{file}') else '')");
    python(world, &code).unwrap_or_default()
}

#[test]
fn overlay_has_acl_and_attributes_of_active_file() {
    if !is_root() {
        return;
    }
    let Some(world) = World::on_disk() else { return };
    world.image("vda.qcow2", "8M");
    world.write("vda.qcow2", "-P 1 0 128k");
    let label =
        "import os; os.setxattr('vda.qcow2','user.owner',b'vm-17'); os.setxattr('vda.qcow2','trusted.mark',b'x')";
    if python(&world, ACL).is_none() || python(&world, label).is_none() {
        return;
    }
    world.ok(&["init", "web.json", "--volume", "vda=vda.qcow2"]);
    let names = ["system.posix_acl_access", "user.owner", "trusted.mark"];
    let wanted = names.map(|name| read_attribute(&world, "vda.qcow2", name));
    assert!(wanted.iter().all(|value| value.len() > 1), "{wanted:?}");
    let check = |when: &str| {
        let active = world.active("vda");
        for (name, wanted) in names.iter().zip(&wanted) {
            assert_eq!(&read_attribute(&world, &active, name), wanted, "{name} of {active} {when}");
        }
    };
    world.ok(&["snapshot", "web.json", "s1"]);
    check("after a snapshot");
    world.write(&world.active("vda"), "-P 2 1M 4M");
    world.ok(&["delete", "web.json", "s1", "--direction", "pull"]);
    check("after a pull");
}

#[test]
fn catalogue_keeps_its_acl() {
    if !is_root() {
        return;
    }
    let Some(world) = World::on_disk() else { return };
    world.image("vda.qcow2", "8M");
    world.ok(&["init", "web.json", "--volume", "vda=vda.qcow2"]);
    if python(&world, &ACL.replace("vda.qcow2", "web.json")).is_none() {
        return;
    }
    let wanted = read_attribute(&world, "web.json", "system.posix_acl_access");
    world.ok(&["snapshot", "web.json", "s1"]);
    assert_eq!(read_attribute(&world, "web.json", "system.posix_acl_access"), wanted);
}

/// A world where another user may run the program and change the directory.
fn shared() -> Option<World> {
    if !is_root() {
        return None;
    }
    let world = World::on_disk()?;
    fs::set_permissions(world.dir(), fs::Permissions::from_mode(0o777)).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_qcow2-chain"), world.path("program")).unwrap();
    Some(world)
}

/// Runs a verb as a user without rights.
fn as_nobody(world: &World, args: &[&str]) -> Run {
    let mut command = Command::new(world.path("program"));
    finish(command.arg("vm").args(args).current_dir(world.dir()).uid(NOBODY).gid(NOBODY))
}

#[test]
fn snapshot_without_right_to_set_owner_is_refused() {
    let Some(world) = shared() else { return };
    world.image("vda.qcow2", "8M");
    world.write("vda.qcow2", "-P 1 0 128k");
    set(&world.path("vda.qcow2"), (0, 0, 0o666));
    let made = as_nobody(&world, &["init", "web.json", "--volume", "vda=vda.qcow2"]);
    assert_eq!(made.code, 0, "{}", made.stderr);
    let before = world.tree();
    let args = ["snapshot", "web.json", "s1"];
    let run = as_nobody(&world, &args);
    assert_refused(&run, &args);
    assert_same(&before, &world.tree(), "a refused snapshot");
    assert!(run.stderr.contains("--ignore-attributes"), "the message names no way out: {}", run.stderr);
    let run = as_nobody(&world, &["snapshot", "web.json", "s1", "--ignore-attributes"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    world.assert_reads(world.active("vda"), "-P 1 0 128k");
}

#[test]
fn merge_without_right_to_write_is_refused() {
    for (locked, direction) in [("base", "commit"), ("top", "pull")] {
        let Some(world) = shared() else { return };
        world.image("vda.qcow2", SIZE);
        world.write("vda.qcow2", OLD);
        set(&world.path("vda.qcow2"), (NOBODY, NOBODY, 0o644));
        let made = as_nobody(&world, &["init", "web.json", "--volume", "vda=vda.qcow2"]);
        assert_eq!(made.code, 0, "{}", made.stderr);
        let taken = as_nobody(&world, &["snapshot", "web.json", "s1"]);
        assert_eq!(taken.code, 0, "{}", taken.stderr);
        let active = world.active("vda");
        world.write(&active, NEW);
        let file = if locked == "base" { "vda.qcow2" } else { &active };
        set(&world.path(file), (0, 0, 0o644));
        let before = world.tree();
        let args = ["delete", "web.json", "s1", "--direction", direction];
        for more in [&["--dry-run"][..], &[]] {
            let run = as_nobody(&world, &[&args[..], more].concat());
            assert_refused(&run, &args);
            assert_supported(&run, &args);
            assert!(run.stderr.contains(file), "{direction}: {}", run.stderr);
            assert_same(&before, &world.tree(), "a refused deletion");
        }
    }
}

/// Creates a set with its images in `pool`, and a leaf snapshot `s2`. Returns the path of the leaf's
/// file.
fn leaf_in_pool() -> Option<(World, String)> {
    let world = shared()?;
    fs::create_dir(world.path("pool")).unwrap();
    set(&world.path("pool"), (NOBODY, NOBODY, 0o755));
    world.image("pool/vda.qcow2", SIZE);
    set(&world.path("pool/vda.qcow2"), (NOBODY, NOBODY, 0o644));
    for args in [
        &["init", "web.json", "--volume", "vda=pool/vda.qcow2"][..],
        &["snapshot", "web.json", "s1"],
        &["snapshot", "web.json", "s2"],
        &["revert", "web.json", "s1"],
    ] {
        let run = as_nobody(&world, args);
        assert_eq!(run.code, 0, "{args:?}: {}", run.stderr);
    }
    let mut names = fs::read_dir(world.path("pool")).unwrap().map(|entry| entry.unwrap().file_name());
    let leaf = names.find(|name| name.to_string_lossy().starts_with("web-vda.1-")).unwrap();
    Some((world, format!("pool/{}", leaf.to_string_lossy())))
}

#[test]
fn delete_without_right_to_remove_is_refused() {
    // The mode and owner of the directory, and the owner of the file.
    for (directory, file) in [((0, 0, 0o755), NOBODY), ((0, 0, 0o1777), 0)] {
        let Some((world, leaf)) = leaf_in_pool() else { return };
        set(&world.path(&leaf), (file, file, 0o666));
        set(&world.path("pool"), directory);
        let before = world.tree();
        let args = ["delete", "web.json", "s2"];
        for more in [&["--dry-run"][..], &[]] {
            let run = as_nobody(&world, &[&args[..], more].concat());
            assert_refused(&run, &args);
            assert!(run.stderr.contains(&leaf), "{}", run.stderr);
            assert_same(&before, &world.tree(), "a refused deletion");
        }
        // The owner of the directory may remove the file.
        set(&world.path("pool"), (NOBODY, NOBODY, directory.2));
        let run = as_nobody(&world, &args);
        assert_eq!(run.code, 0, "{}", run.stderr);
        assert!(!world.exists(&leaf));
    }
}

#[test]
fn delete_of_immutable_file_is_refused() {
    let Some((world, leaf)) = leaf_in_pool() else { return };
    let chattr = |flag: &str| Command::new("chattr").arg(flag).arg(world.path(&leaf)).output();
    if !chattr("+i").is_ok_and(|done| done.status.success()) {
        say("SKIPPED: immutable files need chattr and a file system that has them");
        return;
    }
    let before = world.tree();
    let args = ["delete", "web.json", "s2"];
    let runs = [world.vm(&[&args[..], &["--dry-run"]].concat()), world.vm(&args)];
    let after = world.tree();
    // An immutable file could not be removed with the directory of the test.
    chattr("-i").unwrap();
    for run in runs {
        assert_refused(&run, &args);
        assert!(run.stderr.contains(&leaf) && run.stderr.contains("immutable"), "{}", run.stderr);
    }
    assert_same(&before, &after, "a refused deletion");
    world.ok(&args);
}

#[test]
fn verify_and_dry_run_with_read_only_journal_complete() {
    let Some(world) = shared() else { return };
    world.image("vda.qcow2", SIZE);
    for what in [OLD, FILL] {
        world.write("vda.qcow2", what);
    }
    world.ok(&["init", "web.json", "--volume", "vda=vda.qcow2"]);
    world.ok(&["snapshot", "web.json", "s1"]);
    world.write(&world.active("vda"), NEW);
    world.interrupt_delete(&[]);
    for name in ["web.json.journal", "web.json"] {
        set(&world.path(name), (0, 0, 0o444));
    }
    let lock = world.path("web.json.lock");
    if lock.exists() {
        fs::set_permissions(lock, fs::Permissions::from_mode(0o666)).unwrap();
    }
    for args in [&["verify", "web.json"][..], &["recover", "web.json", "--dry-run"]] {
        let (root, nobody) = (world.vm(args), as_nobody(&world, args));
        assert_eq!(nobody.code, root.code, "{args:?}: {}", nobody.stderr);
        assert_eq!(nobody.stdout, root.stdout, "{args:?}: {}", nobody.stderr);
        assert_ne!(nobody.code, 1, "{args:?}: {}", nobody.stderr);
    }
}
