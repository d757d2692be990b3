//! Operations by virsh alone. These tests prove that the guest and the checks are right.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::content::Content;
use crate::guest::{Agent, Guest};
use crate::hypervisor::{Hypervisor, wait_for};
use crate::lab::{Lab, chain, text};

const TARGETS: [&str; 3] = ["vda", "vdb", "vdc"];

/// Runs `virsh snapshot-create-as`: one new overlay per disk, named after the snapshot.
pub fn create(hypervisor: &Hypervisor, guest: &Guest<'_>, lab: &Lab, snapshot: &str, quiesce: bool) {
    let mut arguments: Vec<String> =
        ["snapshot-create-as", &guest.name, snapshot, "--disk-only", "--atomic", "--no-metadata"]
            .map(str::to_owned)
            .to_vec();
    if quiesce {
        arguments.push("--quiesce".to_owned());
    }
    for target in guest.images().into_keys() {
        let file = lab.path().join(format!("{target}-{snapshot}"));
        arguments.extend(["--diskspec".to_owned(), format!("{target},snapshot=external,file={}", text(&file))]);
    }
    hypervisor.virsh(&arguments);
}

/// Runs `virsh blockcommit` of the active file into the one below it, and returns the time.
pub fn commit(hypervisor: &Hypervisor, guest: &Guest<'_>, target: &str) -> Duration {
    let start = Instant::now();
    hypervisor.virsh(&["blockcommit", &guest.name, target, "--active", "--pivot", "--wait", "--shallow"]);
    start.elapsed()
}

#[test]
fn guest_boots_writes_and_powers_off() {
    let Some(hypervisor) = Hypervisor::get() else { return };
    let lab = Lab::new();
    let images = TARGETS.map(|target| lab.disk(target));
    let disks: Vec<(&str, &Path)> = TARGETS.into_iter().zip(images.iter().map(AsRef::as_ref)).collect();
    let mut guest = Guest::start(&hypervisor, "live-boots", &disks);
    guest.start_writer();
    guest.wait_for_records(300);
    let next = guest.stop_writer();
    guest.assert_chains();
    guest.power_off();
    lab.assert_clean(&images.iter().cloned().collect(), &BTreeSet::new());
    assert_eq!(guest.records().len() as u64, next);
    for (target, image) in disks {
        let content = Content::read(image, target);
        content.assert_holds(guest.records_of(target));
        assert_eq!(content.appended, guest.records_of(target));
    }
}

#[test]
fn quiesced_snapshot_is_committed_while_the_guest_writes() {
    let Some(hypervisor) = Hypervisor::get() else { return };
    let lab = Lab::new();
    let images = TARGETS.map(|target| lab.disk(target));
    let disks: Vec<(&str, &Path)> = TARGETS.into_iter().zip(images.iter().map(AsRef::as_ref)).collect();
    let mut guest = Guest::start(&hypervisor, "live-commit", &disks);
    guest.start_writer();
    guest.wait_for_records(100);
    let before = guest.records().len();
    create(&hypervisor, &guest, &lab, "s1", true);
    guest.wait_for_records(100);

    // The files of the snapshot no longer change.
    let frozen: Vec<u64> = disks.iter().filter_map(|(target, image)| Content::read(image, target).last()).collect();
    for (target, image) in &disks {
        let fsynced = guest.records().into_iter().take(before).filter(|record| record.serial == *target);
        Content::read(image, target).assert_holds(fsynced.map(|record| record.number));
    }
    let (low, high) = (frozen.iter().min().unwrap(), frozen.iter().max().unwrap());
    assert!(high - low < 2 * TARGETS.len() as u64, "not at one instant: {frozen:?}");

    for target in TARGETS {
        assert_eq!(chain(&guest.images()[target]).len(), 2);
        commit(&hypervisor, &guest, target);
        assert_eq!(guest.images()[target], lab.path().join(target));
    }
    guest.wait_for_records(100);
    guest.assert_chains();
    guest.stop_writer();
    guest.power_off();
    let overlays = TARGETS.map(|target| lab.path().join(format!("{target}-s1")));
    lab.assert_clean(&images.iter().cloned().collect(), &overlays.into());
    for (target, image) in disks {
        assert_eq!(Content::read(image, target).appended, guest.records_of(target));
    }
}

#[test]
fn ten_disks_of_which_seven_are_hot_added() {
    let Some(hypervisor) = Hypervisor::get() else { return };
    let lab = Lab::new();
    let images = TARGETS.map(|target| lab.disk(target));
    let disks: Vec<(&str, &Path)> = TARGETS.into_iter().zip(images.iter().map(AsRef::as_ref)).collect();
    let mut guest = Guest::start(&hypervisor, "live-ten", &disks);
    for target in ["vdd", "vde", "vdf", "vdg", "vdh", "vdi", "vdj"] {
        guest.hot_add(target, &lab.disk(target));
    }
    assert_eq!(guest.images().len(), 10);
    guest.start_writer();
    guest.wait_for_records(100);
    create(&hypervisor, &guest, &lab, "s1", false);
    guest.wait_for_records(100);
    guest.destroy();
    for (target, image) in guest.images() {
        assert_eq!(image, lab.path().join(format!("{target}-s1")));
        Content::read(&image, &target).assert_holds(guest.records_of(&target));
    }
}

#[test]
fn guest_without_agent_or_with_a_hung_one() {
    let Some(hypervisor) = Hypervisor::get() else { return };
    let lab = Lab::new();
    let image = lab.disk("vda");
    for (agent, error) in [(Agent::NotConfigured, "agent is not configured"), (Agent::Absent, "agent is not connected")]
    {
        let mut guest = Guest::define(&hypervisor, "live-no-agent", agent, &[("vda", &image)]);
        guest.boot();
        let said = guest.try_agent("guest-ping").unwrap_err();
        assert!(said.contains(error), "{said}");
        guest.power_off();
    }
    let mut guest = Guest::start(&hypervisor, "live-hung", &[("vda", &image)]);
    guest.signal_agent("STOP");
    let said = guest.try_agent("guest-ping").unwrap_err();
    assert!(said.contains("not available") || said.contains("timed out"), "{said}");
    guest.signal_agent("CONT");
    wait_for("the agent is back", Duration::from_secs(30), || guest.try_agent("guest-ping").ok());
    // The guest still freezes: the writer waits.
    guest.start_writer();
    guest.wait_for_records(10);
    guest.try_agent("guest-fsfreeze-freeze").unwrap();
    let frozen = guest.records().len();
    std::thread::sleep(Duration::from_millis(500));
    assert!(guest.records().len() <= frozen + 1);
    guest.try_agent("guest-fsfreeze-thaw").unwrap();
    guest.wait_for_records(10);
}
