//! The rows of the acceptance table on a running guest.

use std::path::Path;
use std::sync::Arc;

use qcow2_chain::libvirt::{Libvirt, Listening};
use qcow2_chain::live::LiveExecutor;
use qcow2_chain::vm::{Error, Executor, Refusal};

use crate::guest::Agent;
use crate::hypervisor::{Hypervisor, wait_for};
use crate::lab::{DISK_MIB, virtual_size};
use crate::scene::Scene;

pub const TARGETS: [&str; 3] = ["vda", "vdb", "vdc"];

/// Creates an executor with events.
pub fn listening(hypervisor: &Hypervisor, domain: &str) -> Arc<dyn Executor> {
    Arc::new(LiveExecutor::new(Arc::new(libvirt(hypervisor, domain, Listening::OwnLoop))))
}

/// Creates an executor that polls.
pub fn polling(hypervisor: &Hypervisor, domain: &str) -> Arc<dyn Executor> {
    Arc::new(LiveExecutor::new(Arc::new(libvirt(hypervisor, domain, Listening::Poll))))
}

pub fn libvirt(hypervisor: &Hypervisor, domain: &str, how: Listening) -> Libvirt {
    Libvirt::connect(&*hypervisor.uri, domain, how).unwrap()
}

#[test]
fn c1_c2_r1_r2_d1_d2_d3() {
    let Some(hypervisor) = Hypervisor::get() else { return };
    let mut scene = Scene::start(&hypervisor, "live-basic", &TARGETS, listening);
    scene.create("s1", false);
    scene.check("s1(R*)=f0; f1<-f0");
    scene.create("s2", true);
    scene.check("s1(R)=f0, s2(R*)=f1<-f0; f2<-f1");
    let refused = scene.revert_stopped("s1");
    assert!(matches!(refused, Err(Error::Refused(Refusal::Running { .. }))), "{refused:?}");
    scene.check("s1(R)=f0, s2(R*)=f1<-f0; f2<-f1");
    scene.revert("s1");
    scene.check("s1(R*)=f0, s2(R)=f1<-f0; f3<-f0");
    scene.create("s3", true);
    scene.delete("s1");
    scene.check("s1(H)=f0, s2(R)=f1<-f0, s3(R*)=f3<-f0; f4<-f3");
    scene.delete("s2");
    scene.check("s3(R*)=f0; f4<-f0");
    scene.delete("s3");
    scene.check("f0");
    scene.end();
}

fn d4_d5(name: &str, executor: fn(&Hypervisor, &str) -> Arc<dyn Executor>) {
    let Some(hypervisor) = Hypervisor::get() else { return };
    let mut scene = Scene::start(&hypervisor, name, &TARGETS, executor);
    scene.create_all(&["s1", "s2", "s3"], false);
    scene.delete("s1");
    scene.check("s2(R)=f0, s3(R*)=f2<-f0; f3<-f2");
    scene.delete("s3");
    scene.check("s2(R*)=f0; f2<-f0");
    scene.delete("s2");
    scene.check("f0");
    scene.create_all(&["s1", "s2"], true);
    scene.revert("s1");
    scene.delete("s2");
    scene.check("s1(R*)=f0; f6<-f0");
    scene.end();
}

#[test]
fn d4_d5_with_events() {
    d4_d5("live-events", listening);
}

#[test]
fn d4_d5_without_events() {
    d4_d5("live-polls", polling);
}

#[test]
fn x3_other_branch_is_merged_by_the_library() {
    let Some(hypervisor) = Hypervisor::get() else { return };
    let mut scene = Scene::start(&hypervisor, "live-x3", &TARGETS, listening);
    scene.create_all(&["s1", "s2", "s3"], false);
    scene.revert("s1");
    scene.delete("s2");
    scene.check("s1(R*)=f0, s3(R)=f1<-f0; f4<-f0");
    scene.revert("s3");
    scene.check("s1(R)=f0, s3(R*)=f1<-f0; f5<-f1");
    scene.end();
}

#[test]
fn z1_z4_z5_disks_grow_between_snapshots() {
    let Some(hypervisor) = Hypervisor::get() else { return };
    let mut scene = Scene::start(&hypervisor, "live-grow", &TARGETS, listening);
    let size = |path: &Path| virtual_size(path) >> 20;
    scene.create("s1", false);
    let report = scene.resize("vdb", DISK_MIB + 1024);
    let changes: Vec<_> = report.resized.iter().map(|change| (change.volume.as_str(), change.new >> 20)).collect();
    assert_eq!(changes, [("vdb", DISK_MIB + 1024)]);
    scene.check("s1(R*)=f0; f1<-f0");
    assert_eq!(scene.guest.tell("size vdb"), ((DISK_MIB + 1024) << 20).to_string());
    assert_eq!(size(&scene.set.snapshot_path("s1", "vdb").unwrap()), DISK_MIB);
    scene.delete("s1");
    scene.check("f0");
    assert_eq!(size(&scene.set.active_path("vdb").unwrap()), DISK_MIB + 1024);
    assert_eq!(size(&scene.set.active_path("vda").unwrap()), DISK_MIB);

    scene.create("s1", false);
    scene.resize("vda", DISK_MIB + 512);
    scene.create("s2", false);
    scene.resize("vda", DISK_MIB + 1024);
    scene.delete("s1");
    scene.check("s2(R*)=f0; f3<-f0");
    assert_eq!(size(&scene.set.snapshot_path("s2", "vda").unwrap()), DISK_MIB + 512);
    let report = scene.revert("s2");
    assert_eq!(report.resized.len(), 1);
    assert_eq!(scene.guest.tell("size vda"), ((DISK_MIB + 512) << 20).to_string());
    scene.check("s2(R*)=f0; f4<-f0");
    scene.end();
}

#[test]
fn mv1_ten_disks_of_which_eight_are_hot_added() {
    let Some(hypervisor) = Hypervisor::get() else { return };
    let added = ["vdc", "vdd", "vde", "vdf", "vdg", "vdh", "vdi", "vdj"];
    let mut scene = Scene::start_with(&hypervisor, "live-mv1", (&["vda", "vdb"], &added), Agent::Running, listening);
    scene.create("s1", true);
    scene.create("s2", false);
    scene.check("s1(R)=f0, s2(R*)=f1<-f0; f2<-f1");
    scene.delete("s1");
    scene.check("s2(R*)=f0; f2<-f0");
    scene.delete("s2");
    scene.check("f0");
    scene.end();
}

#[test]
fn cc1_four_guests_delete_at_once() {
    let Some(hypervisor) = Hypervisor::get() else { return };
    let mut scenes: Vec<Scene<'_>> = ["live-cc1", "live-cc2", "live-cc3", "live-cc4"]
        .map(|name| Scene::start(&hypervisor, name, &["vda"], listening))
        .into();
    for scene in &mut scenes {
        scene.create("s1", true);
        scene.guest.tell("fill vda 32");
    }
    std::thread::scope(|scope| {
        let threads: Vec<_> = scenes.iter_mut().map(|scene| scope.spawn(|| scene.delete("s1"))).collect();
        threads.into_iter().for_each(|thread| drop(thread.join().unwrap()));
    });
    for scene in scenes {
        scene.check("f0");
        scene.end();
    }
}

/// Requests a snapshot that must be refused without a change, and returns the reason.
fn refused(scene: &mut Scene<'_>, name: &str) -> String {
    let options = qcow2_chain::vm::SnapshotOptions::default().with_quiesce(true);
    let refused = scene.set.create(name, &options);
    let Err(Error::Refused(Refusal::Quiesce { why })) = refused else { panic!("{refused:?}") };
    scene.check("f0");
    why
}

#[test]
fn c2_without_agent_is_refused() {
    let Some(hypervisor) = Hypervisor::get() else { return };
    for (name, agent) in [("live-none", Agent::NotConfigured), ("live-absent", Agent::Absent)] {
        let mut scene = Scene::start_with(&hypervisor, name, (&TARGETS, &[]), agent, listening);
        let why = refused(&mut scene, "s1");
        assert!(why.contains("agent"), "{why}");
        scene.create("s1", false);
        scene.check("s1(R*)=f0; f1<-f0");
        scene.end();
    }
}

#[test]
fn c2_hung_agent_is_refused_and_the_guest_thawed() {
    let Some(hypervisor) = Hypervisor::get() else { return };
    let executor: fn(&Hypervisor, &str) -> Arc<dyn Executor> = |hypervisor, domain| {
        let live = LiveExecutor::new(Arc::new(libvirt(hypervisor, domain, Listening::OwnLoop)));
        Arc::new(live.with_agent_timeout(std::time::Duration::from_secs(2)))
    };
    let mut scene = Scene::start(&hypervisor, "live-hung", &TARGETS, executor);
    scene.guest.signal_agent("STOP");
    let start = std::time::Instant::now();
    std::thread::scope(|scope| {
        let set = &scene.set;
        let options = qcow2_chain::vm::SnapshotOptions::default().with_quiesce(true);
        let create = scope.spawn(move || set.create("s1", &options));
        std::thread::sleep(std::time::Duration::from_secs(6));
        scene.guest.signal_agent("CONT");
        let refused = create.join().unwrap();
        assert!(matches!(refused, Err(Error::Refused(Refusal::Quiesce { .. }))), "{refused:?}");
    });
    assert!(start.elapsed() < std::time::Duration::from_secs(60));
    // A freeze that the agent executed late was undone.
    wait_for("the guest thaws", std::time::Duration::from_secs(30), || {
        let status = scene.guest.try_agent("guest-fsfreeze-status").ok()?;
        status.contains("thawed").then_some(())
    });
    scene.check("f0");
    scene.create("s1", true);
    scene.check("s1(R*)=f0; f1<-f0");
    scene.end();
}
