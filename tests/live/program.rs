//! The program's `vm` verbs on a running guest.

use std::io::Read as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use qcow2_chain::vm::{AdoptOptions, SnapshotSet, VolumeSpec};

use crate::guest::Agent;
use crate::hypervisor::{Hypervisor, wait_for};
use crate::lab::{DISK_MIB, Lab};
use crate::scene::Scene;
use crate::snapshots::listening;

fn vm(scene: &Scene<'_>, arguments: &[&str]) -> Output {
    let catalogue = scene.set.catalogue().to_str().unwrap();
    let (verb, rest) = arguments.split_first().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_qcow2-chain"));
    command.args(["vm", verb, catalogue]).args(rest).output().unwrap()
}

fn done(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn verbs_reach_a_running_guest_only_with_connect() {
    let Some(hypervisor) = Hypervisor::get() else { return };
    let mut scene = Scene::start(&hypervisor, "live-program", &["vda", "vdb"], listening);
    scene.create("s1", false);
    let live = ["--connect", hypervisor.uri.as_str(), "--domain", "live-program"];
    let with = |arguments: &[&'static str]| [arguments, &live].concat();

    for arguments in [vec!["delete", "s1"], vec!["snapshot", "s2"], vec!["resize", "vda", "+512M"]] {
        let refused = vm(&scene, &arguments);
        let said = String::from_utf8_lossy(&refused.stderr);
        assert_eq!(refused.status.code(), Some(1), "{arguments:?}: {said}");
        assert!(said.contains("in use") && said.contains("--connect URI --domain NAME"), "{arguments:?}: {said}");
        scene.check("s1(R*)=f0; f1<-f0");
    }
    let refused = vm(&scene, &with(&["revert", "s1"]));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("while the VM is running"), "{refused:?}");
    let plan = done(&vm(&scene, &with(&["delete", "s1", "--dry-run"])));
    assert!(plan.contains("commit vm-vda.1-") && plan.contains("pull is not possible"), "{plan}");

    let text = done(&vm(&scene, &with(&["delete", "s1", "-p", "--timeout", "60", "--on-timeout", "abort"])));
    assert!(text.contains("Snapshot s1 deleted."), "{text}");
    scene.check("f0");
    done(&vm(&scene, &with(&["snapshot", "s2", "--quiesce", "--agent-timeout", "20"])));
    done(&vm(&scene, &with(&["resize", "vda", "+512M"])));
    assert_eq!(scene.guest.tell("size vda"), ((DISK_MIB + 512) << 20).to_string());
    assert!(done(&vm(&scene, &with(&["verify"]))).contains("all as recorded"));
    assert!(done(&vm(&scene, &with(&["recover"]))).contains("No operation was interrupted."));
    done(&vm(&scene, &with(&["delete", "s2"])));
    scene.check("f0");

    let unknown = vm(&scene, &["snapshot", "s3", "--connect", "qemu:///nowhere", "--domain", "live-program"]);
    assert_eq!(unknown.status.code(), Some(1), "{unknown:?}");
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("qemu:///nowhere"), "{unknown:?}");
    scene.end();
}

#[test]
fn guest_that_cannot_be_frozen_gives_one_error() {
    let Some(hypervisor) = Hypervisor::get() else { return };
    let scene = Scene::start_with(&hypervisor, "live-no-agent", (&["vda"], &[]), Agent::Absent, listening);
    let live = ["s1", "--quiesce", "--connect", hypervisor.uri.as_str(), "--domain", "live-no-agent"];
    let refused = vm(&scene, &[&["snapshot"][..], &live].concat());
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("agent is not connected"), "{said}");
    assert!(!said.contains("libvirt: "), "libvirt printed it too: {said}");
    scene.check("f0");
    scene.end();
}

/// Starts a deletion by a relative path of the catalogue, as in the README.
fn start_deleting(scene: &Scene<'_>, live: &[&str; 4]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qcow2-chain"));
    command.args(["vm", "delete", "vm.json", "s1", "--rate-limit", "8M"]).args(live).current_dir(scene.lab.path());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn send(child: &Child, signal: &str) {
    crate::hypervisor::run("kill", &["-s", signal, &child.id().to_string()]);
}

#[test]
fn signals_reach_a_live_merge() {
    let Some(hypervisor) = Hypervisor::get() else { return };
    let mut scene = Scene::start(&hypervisor, "live-signals", &["vda"], listening);
    scene.create("s1", false);
    scene.guest.tell("fill vda 64");
    let live = ["--connect", hypervisor.uri.as_str(), "--domain", "live-signals"];
    for signal in ["INT", "TERM"] {
        let mut child = start_deleting(&scene, &live);
        let job = || hypervisor.virsh(&["blockjob", "live-signals", "vda", "--info", "--raw"]);
        wait_for("the job", Duration::from_secs(20), || job().contains("Active Block Commit").then_some(()));
        std::thread::sleep(Duration::from_millis(500));
        send(&child, "USR1");
        let mut line = String::new();
        while !line.ends_with('\n') {
            let mut byte = [0];
            assert_eq!(child.stderr.as_mut().unwrap().read(&mut byte).unwrap(), 1, "no progress after {line:?}");
            line.push(char::from(byte[0]));
        }
        assert!(line.starts_with("    (") && line.ends_with("/100%)\n"), "{line:?}");
        send(&child, signal);
        let ended = child.wait_with_output().unwrap();
        assert_eq!(ended.status.code(), Some(130), "{signal}: {ended:?}");
        assert_eq!(job(), "", "{signal}: the job was ended");
        scene.check("s1(M*)=f0; f1<-f0");
    }
    scene.delete("s1");
    scene.check("f0");
    scene.end();
}

/// libvirt looks paths up from its own working directory.
#[test]
fn relative_catalogue_path_is_merged_live() {
    let Some(hypervisor) = Hypervisor::get() else { return };
    let mut scene = Scene::start(&hypervisor, "live-relative", &["vda"], listening);
    scene.create("s1", false);
    let live = ["--connect", hypervisor.uri.as_str(), "--domain", "live-relative"];
    scene.guest.stop_writer();
    done(&start_deleting(&scene, &live).wait_with_output().unwrap());
    scene.guest.start_writer();
    scene.check("f0");
    scene.end();
}

/// A connection attempt cannot be cancelled; the signal has its default action until the work begins.
#[test]
fn sigint_ends_a_connection_attempt_to_a_hung_daemon() {
    let Some(hypervisor) = Hypervisor::get() else { return };
    let lab = Lab::new();
    let volumes = [VolumeSpec::new("vda", lab.disk("vda.qcow2"))];
    SnapshotSet::adopt(lab.path().join("vm.json"), &volumes, &AdoptOptions::default()).unwrap();
    let paused = hypervisor.pause();
    let mut command = Command::new(env!("CARGO_BIN_EXE_qcow2-chain"));
    command.args(["vm", "delete", "vm.json", "s1", "--connect", hypervisor.uri.as_str(), "--domain", "nowhere"]);
    let mut child = command.current_dir(lab.path()).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(1));
    assert!(child.try_wait().unwrap().is_none(), "it waits for the daemon");
    send(&child, "INT");
    let start = Instant::now();
    assert_eq!(child.wait().unwrap().signal(), Some(2));
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    drop(paused);
}
