//! The command line program, for a running guest.

use std::path::Path;
use std::process::{Command, Output};

use crate::hypervisor::Hypervisor;
use crate::scene::Scene;
use crate::snapshots::{TARGETS, listening};

fn program(arguments: &[&str], catalogue: &Path, rest: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qcow2-chain"));
    command.arg("vm").args(arguments).arg(catalogue).args(rest).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout)
}

#[test]
fn snapshot_resize_and_delete_with_connect_and_without() {
    let Some(hypervisor) = Hypervisor::get() else { return };
    let name = "live-program";
    let mut scene = Scene::start(&hypervisor, name, &TARGETS, listening);
    let catalogue = scene.set.catalogue().to_owned();
    let connect = ["--connect", &hypervisor.uri, "--domain", name];

    // Without a hypervisor to ask it is not touched, and the program says why.
    let refused = program(&["snapshot"], &catalogue, &["s1"]);
    assert!(!refused.status.success());
    assert!(said(&refused).contains("--connect"), "{}", said(&refused));
    scene.check("f0");

    for (verb, rest, state) in [
        ("snapshot", &["s1", "--quiesce"][..], "s1(R*)=f0; f1<-f0"),
        ("snapshot", &["s2"], "s1(R)=f0, s2(R*)=f1<-f0; f2<-f1"),
        ("resize", &["vda", "1536M"], "s1(R)=f0, s2(R*)=f1<-f0; f2<-f1"),
        ("delete", &["s1"], "s2(R*)=f0; f2<-f0"),
        ("delete", &["s2"], "f0"),
    ] {
        let before = scene.fsynced();
        let done = program(&[verb], &catalogue, &[rest, &connect].concat());
        assert!(done.status.success(), "{verb}: {}", said(&done));
        assert!(!said(&done).contains("libvirt:"), "libvirt's own words: {}", said(&done));
        if verb == "snapshot" {
            scene.taken(rest[0], before);
        }
        scene.check(state);
    }
    let refused = program(&["revert"], &catalogue, &[&["s1"][..], &connect].concat());
    assert!(!refused.status.success());
    assert_eq!(scene.guest.tell("size vda"), (1536_u64 << 20).to_string());
    scene.end();
}
