//! `vm delete` on files of the host, killed at random instants. Before recovery the VM can be started; after it, all is as
//! before the deletion or as after it.

use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use qcow2_chain::storage::HostFileSystem;
use qcow2_chain::vm::SnapshotSet;

use crate::support::judge::Judge;
use crate::support::lab::{Lab, LabShape};
use crate::support::qemu::Qemu;
use crate::support::rng::{Rng, count, seed};
use crate::support::{ram, say};

const SIGKILL: i32 = 9;

/// Creates a VM in which the deletion of a leaf also merges the hidden snapshot beneath it.
fn tree(dir: &Path, rng: &mut Rng) -> Lab {
    let shape = LabShape { volumes: 2, size: 1 << 20, cluster_bits: 9, extended_l2: false, raw: true };
    let mut lab = Lab::new(Arc::new(HostFileSystem), dir, shape, rng);
    let write = |lab: &mut Lab, rng: &mut Rng| (0..8).for_each(|_| lab.write_all(rng));
    for name in ["s1", "s2", "s3"] {
        write(&mut lab, rng);
        lab.create(name);
    }
    lab.revert("s2");
    write(&mut lab, rng);
    lab.create("s4");
    write(&mut lab, rng);
    lab.delete("s2");
    lab
}

fn program(verb: &str, catalogue: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qcow2-chain"));
    command.args(["vm", verb]).arg(catalogue).args(more);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Runs the program and kills it after some time. Returns true if the signal ended it.
fn killed(mut command: Command, after: Duration) -> bool {
    let mut child = command.spawn().unwrap();
    std::thread::sleep(after);
    let _ = child.kill();
    let status = child.wait().unwrap();
    assert!(status.success() || status.signal() == Some(SIGKILL), "{status}");
    status.signal() == Some(SIGKILL)
}

/// Copies the files, and returns a lab with the same expectations of the copy.
fn copy(lab: &Lab, from: &Path, to: &Path) -> Lab {
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
    let mut copy = lab.on(Arc::new(HostFileSystem)).unwrap();
    copy.catalogue = to.join("vm.json");
    copy.set = SnapshotSet::load(&copy.catalogue).unwrap();
    copy
}

/// Asserts that every path in the catalogue exists, the volumes have their content, and QEMU opens them.
fn can_start(qemu: Qemu, lab: &Lab, what: &str) {
    lab.can_start(&lab.now).unwrap_or_else(|wrong| panic!("{what}: {wrong}"));
    for volume in lab.now.keys() {
        let path = lab.set.active_path(volume).unwrap();
        let args = ["info", "--backing-chain", "--output=json"].map(std::ffi::OsStr::new);
        qemu.img(&[&args[..], &[path.as_os_str()]].concat());
    }
}

#[test]
fn killed_deletion_vm_starts_and_recovers() {
    let Some(qemu) = Qemu::find() else { return };
    let kills = count("QCOW2_CHAIN_KILLS", 20);
    let mut rng = Rng::new(seed());
    println!("{kills} kills, seed {:#x}", seed());
    let origin = ram::dir();
    let lab = tree(origin.path(), &mut rng);
    let before = lab.model();
    // The duration and the outcome without a kill.
    let dir = ram::dir();
    let undisturbed = copy(&lab, origin.path(), dir.path());
    let started = Instant::now();
    assert!(program("delete", &undisturbed.catalogue, &["s3"]).status().unwrap().success());
    let time = started.elapsed();
    let after = undisturbed.model();

    let (mut deaths, mut unfinished, mut backwards, mut attempts) = (0, 0, 0, 0);
    while deaths < kills {
        attempts += 1;
        assert!(attempts < 10 * kills, "it is done before it can be killed");
        let dir = ram::dir();
        let mut lab = copy(&lab, origin.path(), dir.path());
        let delay = time.mul_f64(rng.within(0..1050) as f64 / 1000.0);
        if !killed(program("delete", &lab.catalogue, &["s3"]), delay) {
            continue;
        }
        deaths += 1;
        let what = format!("kill {deaths}, after {delay:?} of {time:?}");
        can_start(qemu, &lab, &what);
        unfinished += u64::from(lab.set.pending().unwrap().is_some());
        // The recovery is killed as well, sometimes.
        if rng.chance(1, 3) && killed(program("recover", &lab.catalogue, &[]), delay / 2) {
            can_start(qemu, &lab, &what);
        }
        assert!(program("recover", &lab.catalogue, &[]).status().unwrap().success(), "{what}");
        if lab.model().snapshots == before.snapshots {
            backwards += 1;
        } else {
            assert_eq!(lab.model().snapshots, after.snapshots, "{what}: neither before nor after");
            lab.taken.remove("s3");
        }
        lab.check().unwrap_or_else(|wrong| panic!("{what}: {wrong}"));
        Judge::new(qemu).judge(&lab.set);
    }
    say(&format!(
        "vm delete: {deaths} kills within {time:.1?}, {unfinished} left unfinished, {backwards} recovered to before"
    ));
    assert!(unfinished > 0, "none of {deaths} kills met it at work");
}
