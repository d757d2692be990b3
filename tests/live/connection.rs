//! Connections: their number, their end, and a daemon that hangs or is replaced.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use qcow2_chain::libvirt::{Libvirt, Listening};
use qcow2_chain::live::{Commit, FailureKind, Hypervisor as _, LiveExecutor};
use qcow2_chain::vm::{Executor, SnapshotOptions};

use crate::baseline;
use crate::guest::Guest;
use crate::hypervisor::{Hypervisor, wait_for};
use crate::lab::{Lab, chain};
use crate::scene::Scene;
use crate::snapshots::libvirt;

/// The open descriptors of this process. Other tests of this binary may open some at the same time.
fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// The largest difference between two counts of descriptors that is not a leak.
const NOISE: usize = 20;

#[test]
fn connections_5000_leave_no_descriptors() {
    let Some(hypervisor) = Hypervisor::get() else { return };
    drop(libvirt(&hypervisor, "nowhere", Listening::OwnLoop));
    let before = descriptors();
    for number in 0..5000 {
        let listening = if number % 2 == 0 { Listening::OwnLoop } else { Listening::Poll };
        let connection = libvirt(&hypervisor, "nowhere", listening);
        assert!(!connection.describe().unwrap().running);
        drop(connection);
        if number % 100 == 0 {
            assert!(descriptors() < before + NOISE, "after {number}: {} descriptors, was {before}", descriptors());
        }
    }
    assert!(descriptors() < before + NOISE, "{} descriptors, was {before}", descriptors());
}

#[test]
fn reconnection_leaves_no_descriptors() {
    let Some(hypervisor) = Hypervisor::get() else { return };
    let connections = [Listening::OwnLoop, Listening::Poll].map(|how| libvirt(&hypervisor, "nowhere", how));
    let describe = || {
        for connection in &connections {
            wait_for("the daemon answers", Duration::from_secs(30), || connection.describe().ok());
        }
    };
    describe();
    let before = descriptors();
    for _ in 0..8 {
        hypervisor.restart();
        describe();
    }
    // Each restart would leave a socket per connection, and its callbacks.
    assert!(descriptors() < before + 8, "{} descriptors, was {before}", descriptors());
}

/// Keep-alives end a call, and a time limit ends a connection attempt.
#[test]
fn hung_daemon_ends_calls_and_connection_attempts() {
    let Some(hypervisor) = Hypervisor::get() else { return };
    let connections = [Listening::OwnLoop, Listening::Poll].map(|how| libvirt(&hypervisor, "nowhere", how));
    let start = Instant::now();
    std::thread::scope(|scope| {
        let paused = hypervisor.pause();
        let uri = hypervisor.uri.clone();
        let calls = connections.each_ref().map(|connection| scope.spawn(|| connection.describe().unwrap_err()));
        let attempt = scope.spawn(move || Libvirt::connect(uri, "nowhere", Listening::Poll).unwrap_err());
        for thread in calls.into_iter().chain([attempt]) {
            let error = thread.join().unwrap();
            assert_eq!(error.kind, FailureKind::Unreachable, "{error:?}");
        }
        assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
        drop(paused);
    });
    for connection in &connections {
        wait_for("the daemon answers", Duration::from_secs(30), || connection.describe().ok());
    }
}

/// The time limit is the domain's: a limit of 2 seconds would fail the other program's command.
#[test]
fn agent_timeout_is_restored_after_a_snapshot() {
    let Some(hypervisor) = Hypervisor::get() else { return };
    let executor: fn(&Hypervisor, &str) -> Arc<dyn Executor> = |hypervisor, domain| {
        let live = LiveExecutor::new(Arc::new(libvirt(hypervisor, domain, Listening::OwnLoop)));
        Arc::new(live.with_agent_timeout(Duration::from_secs(2)))
    };
    let mut scene = Scene::start(&hypervisor, "live-agent", &["vda"], executor);
    scene.set.create("s1", &SnapshotOptions::default().with_quiesce(true)).unwrap();
    scene.guest.signal_agent("STOP");
    let answer = std::thread::scope(|scope| {
        let command = scope.spawn(|| hypervisor.try_virsh(&["domtime", "live-agent"]));
        std::thread::sleep(Duration::from_millis(3500));
        scene.guest.signal_agent("CONT");
        command.join().unwrap()
    });
    assert!(answer.as_ref().is_ok_and(|answer| answer.contains("Time")), "{answer:?}");
}

/// Copies a directory with `cp -a`.
fn copy(from: &Path, to: &Path) {
    crate::hypervisor::run("cp", &["-a", crate::lab::text(from), crate::lab::text(to)]);
}

#[test]
fn middle_merge_of_a_copied_directory_reads_the_copy() {
    let Some(hypervisor) = Hypervisor::get() else { return };
    let mut scene = Scene::start(&hypervisor, "live-copied", &["vda"], crate::snapshots::listening);
    scene.create_all(&["s1", "s2"], false);
    scene.delete("s1");
    scene.check("s2(R*)=f0; f2<-f0");
    scene.guest.power_off();
    let other = tempfile::tempdir().unwrap();
    let copied = other.path().join("vm");
    copy(scene.lab.path(), &copied);
    let active = scene.set.active_path("vda").unwrap();
    let files = chain(&copied.join(active.file_name().unwrap()));
    assert_eq!(files.len(), 2);
    for file in files {
        assert!(file.starts_with(&copied), "the copy reads {}", file.display());
    }
    scene.end();
}

/// virsh makes overlays with absolute backing names, for which libvirt refuses a relative commit.
#[test]
fn middle_commit_of_absolute_names_is_done() {
    let Some(hypervisor) = Hypervisor::get() else { return };
    let lab = Lab::new();
    let image = lab.disk("vda");
    let mut guest = Guest::start(&hypervisor, "live-absolute", &[("vda", &image)]);
    guest.start_writer();
    for snapshot in ["s1", "s2"] {
        baseline::create(&hypervisor, &guest, &lab, snapshot, false);
        guest.wait_for_records(20);
    }
    let path = |name: &str| lab.path().join(name);
    let connection = libvirt(&hypervisor, "live-absolute", Listening::OwnLoop);
    let (top, base) = (path("vda-s1"), image.clone());
    let commit = Commit { disk: "vda".into(), top, base, active: false, rate_limit: None };
    connection.commit(&commit).unwrap();
    wait_for("the commit ends", Duration::from_secs(30), || connection.job("vda").unwrap().is_none().then_some(()));
    wait_for("the chain is shorter", Duration::from_secs(10), || {
        (connection.describe().unwrap().disks[0].files.len() == 2).then_some(())
    });
    assert_eq!(chain(&path("vda-s2")), [path("vda-s2"), image]);
    guest.assert_chains();
    guest.stop_writer();
    guest.power_off();
}
