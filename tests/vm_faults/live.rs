//! Deletions that a hypervisor worked on, recovered without one: uncertain until the caller states
//! the VM's file.

use std::sync::Arc;
use std::time::Duration;

use qcow2_chain::live::fake::{FakeHypervisor, Fault};
use qcow2_chain::live::{Hypervisor as _, LiveExecutor, OnTimeout};
use qcow2_chain::storage::{FileSystem, HostFileSystem};
use qcow2_chain::vm::SnapshotSet;

use super::world::World;

/// A running VM on a set with `s1`, whose guest wrote 2 to the first MiB.
fn running() -> Option<(World, Arc<FakeHypervisor>)> {
    let world = World::new()?;
    world.image("vda.qcow2", "8M");
    world.write("vda.qcow2", "-P 1 0 2M");
    world.ok(&["init", "web.json", "--volume", "vda=vda.qcow2"]);
    world.ok(&["snapshot", "web.json", "s1"]);
    let names: Arc<dyn FileSystem> = Arc::new(HostFileSystem);
    let active = world.path(world.active("vda"));
    let fake = Arc::new(FakeHypervisor::new(names, [("vda", active)]));
    fake.start().expect("started");
    fake.write("vda", 0, &vec![2; 1 << 20]).expect("written");
    Some((world, fake))
}

fn set(world: &World, fake: &Arc<FakeHypervisor>) -> SnapshotSet {
    let executor = LiveExecutor::new(fake.clone()).with_timeout(Duration::from_secs(10), OnTimeout::Keep);
    SnapshotSet::load(world.path("web.json")).expect("a catalogue").with_executor(Arc::new(executor))
}

/// The deletion of `s1` timed out, its job went on, and the VM was switched by hand. Then the guest
/// wrote 9.
fn switched_by_hand() -> Option<World> {
    let (world, fake) = running()?;
    fake.inject(Fault::JobNeverEnds);
    let error = set(&world, &fake).delete("s1", &Default::default(), &()).expect_err("it times out");
    assert!(error.is_timed_out(), "{error:?}");
    fake.clear_faults();
    let switched = (0..1000).any(|_| {
        let _ = fake.wait("vda", Duration::from_secs(1));
        let _ = fake.job("vda");
        fake.pivot("vda").is_ok()
    });
    assert!(switched, "the job did not become ready");
    for _ in 0..100 {
        let _ = fake.describe();
    }
    assert_eq!(fake.files("vda"), [world.path("vda.qcow2")], "the VM was not switched");
    fake.write("vda", 0, &vec![9; 1 << 20]).expect("written");
    fake.stop();
    world.assert_reads("vda.qcow2", "-P 9 0 1M");
    Some(world)
}

#[test]
fn recovery_of_live_merge_without_hypervisor_is_uncertain() {
    let Some(world) = switched_by_hand() else { return };
    for args in [&["recover", "web.json"][..], &["delete", "web.json", "s1"]] {
        let run = world.vm(args);
        assert_eq!(run.code, 1, "{args:?}: {}{}", run.stdout, run.stderr);
        let said = run.stderr.to_lowercase();
        assert!(said.contains("uncertain"), "{said}");
        assert!(!run.stderr.contains("VM can be started"), "{said}");
        assert!(run.stderr.contains("--vm-runs-on"), "the message names no way out: {said}");
        world.assert_reads("vda.qcow2", "-P 9 0 1M");
    }
}

#[test]
fn recovery_of_live_merge_with_base_stated_keeps_its_data() {
    for verb in ["recover", "reconcile"] {
        let Some(world) = switched_by_hand() else { return };
        world.ok(&[verb, "web.json", "--vm-runs-on", "vda.qcow2"]);
        assert_eq!(world.active("vda"), "vda.qcow2");
        assert_eq!(world.state("s1"), None);
        world.assert_reads("vda.qcow2", "-P 9 0 1M");
        world.assert_reads("vda.qcow2", "-P 1 1M 1M");
        world.assert_sound();
    }
}

#[test]
fn recovery_of_live_merge_with_top_stated_merges_it() {
    let Some((world, fake)) = running() else { return };
    fake.inject(Fault::JobNeverEnds);
    set(&world, &fake).delete("s1", &Default::default(), &()).expect_err("it times out");
    let top = world.active("vda");
    // The VM is off and was never switched.
    fake.destroy();
    let run = world.vm(&["recover", "web.json"]);
    assert_eq!(run.code, 1, "{}{}", run.stdout, run.stderr);
    assert!(run.stderr.to_lowercase().contains("uncertain"), "{}", run.stderr);
    world.ok(&["recover", "web.json", "--vm-runs-on", &top]);
    world.assert_reads(world.active("vda"), "-P 2 0 1M");
    world.assert_reads(world.active("vda"), "-P 1 1M 1M");
    world.assert_sound();
}

#[test]
fn live_delete_of_leaf_that_the_vm_runs_on_is_refused() {
    let Some(world) = World::new() else { return };
    world.image("vda.qcow2", "8M");
    world.ok(&["init", "web.json", "--volume", "vda=vda.qcow2"]);
    world.ok(&["snapshot", "web.json", "s1"]);
    let leaf = world.active("vda");
    world.ok(&["snapshot", "web.json", "s2"]);
    world.ok(&["revert", "web.json", "s1"]);
    let fake = Arc::new(FakeHypervisor::new(Arc::new(HostFileSystem), [("vda", world.path(&leaf))]));
    fake.start().expect("started");
    let before = world.tree();
    let refused = set(&world, &fake).delete("s2", &Default::default(), &());
    assert!(refused.is_err(), "the file that the VM runs on was removed");
    super::world::assert_same(&before, &world.tree(), "a refused deletion");
}

#[test]
fn live_operations_with_vm_on_wrong_file_are_refused() {
    let Some(world) = World::with_snapshot() else { return };
    // The definition was not brought up to date after the snapshot.
    let fake = Arc::new(FakeHypervisor::new(Arc::new(HostFileSystem), [("vda", world.path("vda.qcow2"))]));
    fake.start().expect("started");
    let before = world.tree();
    let taken = set(&world, &fake).create("s2", &Default::default());
    assert!(taken.is_err(), "a snapshot was taken of files that the VM does not write");
    let deleted = set(&world, &fake).delete("s1", &Default::default(), &());
    assert!(deleted.is_err(), "a deletion wrote the file that the VM runs on");
    let reverted = set(&world, &fake).revert("s1", &Default::default(), &());
    assert!(reverted.is_err());
    super::world::assert_same(&before, &world.tree(), "refused operations");
}

#[test]
fn live_verify_with_vm_on_wrong_file_reports_it() {
    // The hypervisor's name of the disk is not the volume's.
    let Some(world) = World::with_snapshot() else { return };
    let fake = Arc::new(FakeHypervisor::new(Arc::new(HostFileSystem), [("sda", world.path("vda.qcow2"))]));
    fake.start().expect("started");
    let found = set(&world, &fake).verify(&Default::default(), &()).expect("verified");
    assert!(!found.is_sound(), "a VM on the frozen file is not reported");
    let problems = format!("{:?}", found.problems);
    assert!(problems.contains("vda.qcow2"), "{problems}");
}
