//! The program's `vm` verbs on a running guest.

use std::process::{Command, Output};

use crate::guest::Agent;
use crate::hypervisor::Hypervisor;
use crate::lab::DISK_MIB;
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
fn the_verbs_reach_a_running_guest_and_refuse_it_where_they_are_not_told_how() {
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
    assert!(plan.contains("commit") && !plan.contains("pull"), "{plan}");

    let told = done(&vm(&scene, &with(&["delete", "s1", "-p", "--timeout", "60", "--on-timeout", "abort"])));
    assert!(told.contains("Snapshot s1 deleted."), "{told}");
    scene.check("f0");
    done(&vm(&scene, &with(&["snapshot", "s2", "--quiesce", "--agent-timeout", "20"])));
    done(&vm(&scene, &with(&["resize", "vda", "+512M"])));
    assert_eq!(scene.guest.tell("size vda"), ((DISK_MIB + 512) << 20).to_string());
    assert!(done(&vm(&scene, &with(&["verify"]))).contains("all as recorded"));
    assert!(done(&vm(&scene, &with(&["recover"]))).contains("Nothing was interrupted."));
    done(&vm(&scene, &with(&["delete", "s2"])));
    scene.check("f0");

    let unknown = vm(&scene, &["snapshot", "s3", "--connect", "qemu:///nowhere", "--domain", "live-program"]);
    assert_eq!(unknown.status.code(), Some(1), "{unknown:?}");
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("qemu:///nowhere"), "{unknown:?}");
    scene.end();
}

#[test]
fn a_guest_that_cannot_be_frozen_gives_one_error() {
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
