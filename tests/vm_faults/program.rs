//! The program's surroundings: standard output and error that cannot be written, ignored signals,
//! directories that are missing, and files of other VMs.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::world::{NEW, OLD, SLOW, World, signal};

/// Runs a verb with standard error that fails every write.
fn with_full_stderr(world: &World, args: &[&str]) -> i32 {
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let status = world.command(args).stdout(Stdio::null()).stderr(full).status().unwrap();
    status.code().unwrap_or(-1)
}

#[test]
fn exit_codes_with_full_standard_error_are_kept() {
    let Some(world) = World::with_snapshot() else { return };
    assert_eq!(with_full_stderr(&world, &["snapshot", "web.json", "s1"]), 1, "a refusal");
    assert_eq!(with_full_stderr(&world, &["list", "none.json"]), 1, "a failure");
    assert_eq!(with_full_stderr(&world, &["delete", "web.json", "s1", "--no-such-option"]), 1, "a wrong option");
    fs::rename(world.path("vda.qcow2"), world.path("away")).unwrap();
    assert_eq!(with_full_stderr(&world, &["verify", "web.json"]), 2, "a problem");
}

#[test]
fn progress_request_with_full_standard_error_keeps_signals_working() {
    let Some(world) = World::with_snapshot() else { return };
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let args = [&["delete", "web.json", "s1"], &SLOW[..]].concat();
    let mut child = world.command(&args).stdout(Stdio::null()).stderr(full).spawn().unwrap();
    world.wait_for("web.json.journal");
    std::thread::sleep(Duration::from_millis(300));
    signal(&child, Signal::SIGUSR1);
    std::thread::sleep(Duration::from_millis(200));
    signal(&child, Signal::SIGINT);
    let end = Instant::now() + Duration::from_secs(4);
    let code = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status.code();
        }
        if Instant::now() > end {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("SIGINT does not end the program after SIGUSR1");
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(code, Some(130), "SIGINT was lost after SIGUSR1");
    world.ok(&["recover", "web.json"]);
    world.assert_reads(world.active("vda"), NEW);
}

#[test]
fn ignored_interrupt_stays_ignored() {
    for name in ["INT", "TERM"] {
        let Some(world) = World::with_snapshot() else { return };
        let mut command = Command::new("sh");
        let script = format!("trap '' {name}; exec \"$0\" vm delete web.json s1 --rate-limit 4M");
        command.args(["-c", &script, env!("CARGO_BIN_EXE_qcow2-chain")]).current_dir(world.dir());
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        world.wait_for("web.json.journal");
        std::thread::sleep(Duration::from_millis(300));
        signal(&child, if name == "INT" { Signal::SIGINT } else { Signal::SIGTERM });
        let status = child.wait().unwrap();
        assert_eq!(status.code(), Some(0), "an ignored SIG{name} ended the deletion: {status}");
        assert_eq!(world.state("s1"), None);
        world.assert_reads(world.active("vda"), NEW);
    }
}

/// Runs a verb whose standard output is a pipe that nothing reads.
fn with_closed_stdout(world: &World, args: &[&str]) -> crate::support::qemu::Run {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = world.command(args).stdout(writer).output().unwrap();
    crate::support::qemu::Run {
        code: output.status.code().unwrap_or(-1),
        stdout: String::new(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

#[test]
fn completed_operations_with_closed_standard_output_exit_with_0() {
    let Some(world) = World::with_volume() else { return };
    let mut codes = Vec::new();
    for args in [
        &["snapshot", "web.json", "s1"][..],
        &["snapshot", "web.json", "s2"],
        &["revert", "web.json", "s1"],
        &["resize", "web.json", "vda", "48M"],
        &["delete", "web.json", "s2"],
        &["recover", "web.json"],
    ] {
        let run = with_closed_stdout(&world, args);
        codes.push((args[0], run.code, run.stderr));
    }
    assert_eq!(world.state("s1").as_deref(), Some("ready"), "{codes:?}");
    assert!(codes.iter().all(|(_, code, _)| *code == 0), "all was done, and the exit codes are {codes:?}");
}

#[test]
fn completed_operation_with_full_standard_output_is_reported() {
    let Some(world) = World::with_volume() else { return };
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let output = world.command(&["snapshot", "web.json", "s1"]).stdout(full).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(world.state("s1").as_deref(), Some("ready"), "{said}");
    let told = output.status.success() || said.contains("Snapshot s1 created");
    assert!(told, "{:?} for a snapshot that was taken: {said}", output.status.code());
}

#[test]
fn verify_ignores_overlays_of_other_vms() {
    let Some(world) = World::new() else { return };
    for directory in ["A", "B", "pool"] {
        fs::create_dir(world.path(directory)).unwrap();
    }
    for (catalogue, image) in [("A/web.json", "pool/a.qcow2"), ("B/web.json", "pool/b.qcow2")] {
        world.image(image, "8M");
        world.ok(&["init", catalogue, "--volume", &format!("vda={image}")]);
        world.ok(&["snapshot", catalogue, "s1"]);
    }
    for catalogue in ["A/web.json", "B/web.json"] {
        let run = world.vm(&["verify", catalogue]);
        assert_eq!(run.code, 0, "{catalogue}: {}{}", run.stdout, run.stderr);
    }
}

#[test]
fn verify_reports_own_leftover_overlay() {
    // The counterpart: a file that is the set's own, and that the catalogue does not name.
    let Some(world) = World::with_snapshot() else { return };
    let own = world.active("vda");
    fs::copy(world.path("web.json"), world.path("backup")).unwrap();
    world.ok(&["snapshot", "web.json", "s2"]);
    let newer = world.active("vda");
    fs::copy(world.path("backup"), world.path("web.json")).unwrap();
    let run = world.vm(&["verify", "web.json"]);
    assert_eq!(run.code, 2, "{}{}", run.stdout, run.stderr);
    assert!(run.stdout.contains(&newer) && !run.stdout.contains(&format!("{own}:")), "{}", run.stdout);
}

#[test]
fn verify_with_missing_directory_reports_all_findings() {
    let Some(world) = World::new() else { return };
    fs::create_dir(world.path("store")).unwrap();
    for (image, volume) in [("store/a.qcow2", "vda"), ("b.qcow2", "vdb")] {
        world.image(image, "8M");
        let _ = volume;
    }
    world.ok(&["init", "web.json", "--volume", "vda=store/a.qcow2", "--volume", "vdb=b.qcow2"]);
    world.ok(&["snapshot", "web.json", "s1"]);
    let (lost, other) = (world.active("vda"), world.active("vdb"));
    fs::rename(world.path("store"), world.path("unmounted")).unwrap();
    fs::rename(world.path(&other), world.path("away")).unwrap();
    for args in [&["verify", "web.json"][..], &["verify", "web.json", "--deep"]] {
        let run = world.vm(args);
        assert_eq!(run.code, 2, "{args:?}: {}{}", run.stdout, run.stderr);
        for name in [&lost, &other] {
            assert!(run.stdout.contains(name.as_str()), "{name} is not reported: {}{}", run.stdout, run.stderr);
        }
    }
    fs::rename(world.path("unmounted"), world.path("store")).unwrap();
    fs::rename(world.path("away"), world.path(&other)).unwrap();
    world.ok(&["verify", "web.json"]);
}

#[test]
fn interrupt_before_first_record_changes_nothing() {
    if !super::world::can_trace() {
        return;
    }
    let Some(world) = World::with_snapshot() else { return };
    let before = world.tree();
    // The program needs seconds to open the catalogue, and the signal arrives meanwhile.
    let mut command = Command::new("strace");
    command.args(["-D", "-f", "-qq", "-o", "/dev/null", "-P", "web.json", "-e", "trace=openat"]);
    command.args(["-e", "inject=openat:delay_enter=2500000:when=1"]);
    command.arg(env!("CARGO_BIN_EXE_qcow2-chain")).args(["vm", "delete", "web.json", "s1"]);
    command.current_dir(world.dir()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // With -D the child is the program, and strace its grandchild.
    let child = command.spawn().expect("strace starts");
    let end = Instant::now() + Duration::from_secs(20);
    let exe = format!("/proc/{}/exe", child.id());
    while !fs::read_link(&exe).is_ok_and(|exe| exe.ends_with("qcow2-chain")) && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(500));
    signal(&child, Signal::SIGINT);
    let run = super::world::ended(child);
    // Until the verb listens, the signal has its default action (-1), which a shell reports as 130.
    assert!(matches!(run.code, 130 | -1), "{}: {}{}", run.code, run.stdout, run.stderr);
    super::world::assert_same(&before, &world.tree(), "an interrupted deletion that had not begun");
    world.assert_reads(world.active("vda"), OLD);
}
