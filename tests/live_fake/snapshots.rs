//! Snapshots, sizes and the guest agent, one ugly turn each.

use std::sync::Arc;
use std::time::Duration;

use qcow2_chain::live::fake::{Call, Turn};
use qcow2_chain::live::{FailureKind, Hypervisor};
use qcow2_chain::vm::{Error, OfflineExecutor, Recovery, Refusal, SnapshotOptions};

use super::rig::{Rig, kind};

#[test]
fn a_snapshot_whose_answer_was_lost_was_taken_if_the_vm_writes_the_overlays() {
    let mut rig = Rig::new();
    rig.fake.play(Turn::LosesAnswer { to: Call::Snapshot, done: true });
    rig.create("s1");
    assert_eq!(rig.chain("vda"), ["vm-vda.1.qcow2", "vda.img"]);
    rig.settled();
}

#[test]
fn a_snapshot_whose_answer_was_lost_was_not_taken_if_the_vm_writes_what_it_wrote() {
    let mut rig = Rig::new();
    rig.fake.play(Turn::LosesAnswer { to: Call::Snapshot, done: false });
    let error = rig.set().create("s1", &Default::default()).unwrap_err();
    assert_eq!(kind(&error), Some(FailureKind::Unreachable), "{error:?}");
    assert_eq!(rig.chain("vda"), ["vda.img"]);
    rig.write_all();
    rig.settled();
}

/// A snapshot is asked for, and nobody can be asked what became of it.
fn uncertain(rig: &mut Rig, done: bool) {
    rig.fake.play(Turn::LosesAnswer { to: Call::Snapshot, done });
    // Two descriptions come before it.
    rig.fake.play(Turn::Disconnects(3));
    let error = rig.set().create("s1", &Default::default()).unwrap_err();
    assert!(matches!(error, Error::Uncertain { .. }), "{error:?}");
    rig.all_played();
    assert!(rig.set().recover(&()).is_err(), "not without the hypervisor");
    rig.fake.reconnect();
}

#[test]
fn a_snapshot_of_which_nothing_is_known_is_settled_when_the_hypervisor_can_be_asked() {
    for (done, written) in [(true, true), (true, false), (false, true), (false, false)] {
        let mut rig = Rig::new();
        let before = rig.lab.now.clone();
        uncertain(&mut rig, done);
        if written {
            rig.write_all();
        }
        let recovery = rig.set().recover(&()).unwrap();
        assert_eq!(matches!(recovery, Recovery::Completed(_)), done, "{recovery:?}");
        if done {
            rig.lab.taken.insert("s1".to_owned(), before);
        }
        rig.settled();
    }
}

#[test]
fn overlays_that_a_vm_has_written_are_kept_although_it_is_gone() {
    for written in [true, false] {
        let mut rig = Rig::new();
        let before = rig.lab.now.clone();
        uncertain(&mut rig, true);
        if written {
            rig.write_all();
        }
        rig.fake.destroy();
        let recovery = rig.set_with(Arc::new(OfflineExecutor)).recover(&()).unwrap();
        assert_eq!(matches!(recovery, Recovery::Completed(_)), written, "{recovery:?}");
        if written {
            rig.lab.taken.insert("s1".to_owned(), before);
        }
        rig.define();
        rig.settled();
        rig.start();
        rig.write_all();
        rig.settled();
    }
}

#[test]
fn a_vm_that_dies_in_a_snapshot_may_have_written_the_overlays() {
    for forgets in [false, true] {
        let mut rig = Rig::new();
        rig.fake.play(Turn::DiesIn(Call::Snapshot));
        if forgets {
            rig.fake.play(Turn::ForgetsFiles);
        }
        let done = rig.set().create("s1", &Default::default());
        assert_eq!(done.is_ok(), !forgets, "{done:?}");
        rig.all_played();
        if forgets {
            // Not taken back: the VM was switched over, and what it wrote then would be lost.
            assert!(matches!(done, Err(Error::Uncertain { .. })), "{done:?}");
            assert!(rig.set().pending().unwrap().is_some());
            rig.set().recover(&()).unwrap();
        } else {
            rig.lab.taken.insert("s1".to_owned(), rig.lab.now.clone());
        }
        rig.settled();
    }
}

#[test]
fn a_vm_that_is_gone_before_a_snapshot_is_not_switched() {
    let mut rig = Rig::new();
    rig.fake.play(Turn::Dies(2));
    let error = rig.set().create("s1", &Default::default()).unwrap_err();
    assert_eq!(kind(&error), Some(FailureKind::Gone), "{error:?}");
    rig.set().recover(&()).unwrap();
    rig.settled();
    rig.start();
    rig.write_all();
    rig.settled();
}

#[test]
fn a_vm_that_went_back_to_the_files_beneath_written_overlays_is_for_people_to_judge() {
    let mut rig = Rig::new();
    rig.fake.play(Turn::ForgetsFiles);
    uncertain(&mut rig, true);
    rig.write_all();
    rig.fake.destroy();
    rig.fake.start().unwrap();
    assert_eq!(rig.chain("vda"), ["vda.img"]);
    let error = rig.set().recover(&()).unwrap_err();
    assert!(matches!(error, Error::Uncertain { .. }), "{error:?}");
    assert!(rig.lab.names.exists(&rig.path("vm-vda.1.qcow2")).unwrap(), "what was written is kept");
    // Started where it wrote last, it goes on.
    rig.fake.destroy();
    for volume in rig.volumes() {
        let written = rig.path(&format!("vm-{volume}.{}.qcow2", if volume == "vda" { 1 } else { 2 }));
        rig.fake.define(&volume, written).unwrap();
    }
    rig.fake.start().unwrap();
    assert!(matches!(rig.set().recover(&()), Ok(Recovery::Completed(_))));
}

fn quiesced() -> SnapshotOptions {
    SnapshotOptions::default().with_quiesce(true)
}

#[test]
fn c2_a_quiesced_snapshot_freezes_and_thaws_once() {
    let mut rig = Rig::new();
    rig.set().create("s1", &quiesced()).unwrap();
    rig.lab.taken.insert("s1".to_owned(), rig.lab.now.clone());
    assert_eq!(rig.fake.freezes_and_thaws(), (1, 1));
    rig.write_all();
    rig.settled();
}

#[test]
fn without_an_agent_a_quiesced_snapshot_is_refused_and_nothing_is_changed() {
    let mut rig = Rig::new();
    rig.fake.play(Turn::HasNoAgent);
    let error = rig.set().create("s1", &quiesced()).unwrap_err();
    assert!(matches!(error.refusal(), Some(Refusal::Quiesce { why }) if why.contains("agent")), "{error:?}");
    assert_eq!(rig.chain("vda"), ["vda.img"]);
    assert_eq!(rig.fake.freezes_and_thaws(), (0, 0));
    rig.write_all();
    rig.settled();
}

#[test]
fn a_guest_that_freezes_too_late_is_let_go() {
    let mut rig = Rig::new();
    rig.fake.play(Turn::FreezesLate(Duration::from_secs(5)));
    let start = rig.fake.now();
    let error = rig.set().create("s1", &quiesced()).unwrap_err();
    assert!(matches!(error.refusal(), Some(Refusal::Quiesce { .. })), "{error:?}");
    assert!(!error.to_string().contains("may be frozen"), "{error}");
    let took = rig.fake.now() - start;
    assert!((Duration::from_secs(35)..Duration::from_secs(40)).contains(&took), "the agent's limit was set: {took:?}");
    assert_eq!(rig.fake.freezes_and_thaws(), (1, 1));
    rig.write_all();
    rig.settled();
}

#[test]
fn a_guest_that_cannot_be_let_go_is_told_of() {
    let rig = Rig::new();
    rig.fake.play(Turn::FreezesLate(Duration::from_secs(500)));
    let error = rig.set().create("s1", &quiesced()).unwrap_err();
    assert!(error.to_string().contains("the guest may be frozen"), "{error}");
    assert!(rig.fake.is_frozen());
    assert_eq!(rig.chain("vda"), ["vda.img"]);
}

#[test]
fn a_disk_is_resized_whatever_is_answered() {
    for (turn, done) in [
        (None, true),
        (Some(Turn::LosesAnswer { to: Call::Resize, done: true }), true),
        (Some(Turn::LosesAnswer { to: Call::Resize, done: false }), false),
        (Some(Turn::DiesIn(Call::Resize)), true),
    ] {
        let mut rig = Rig::new();
        rig.create("s1");
        let old = rig.lab.now["vda"].len();
        turn.into_iter().for_each(|turn| rig.fake.play(turn));
        let result = rig.set().resize("vda", old as u64 + 8192, false);
        assert_eq!(result.is_ok(), done, "{turn:?}: {result:?}");
        if done {
            let changes = result.unwrap().resized;
            assert_eq!(
                changes.iter().map(|change| (change.old, change.new)).collect::<Vec<_>>(),
                [(old as u64, old as u64 + 8192)]
            );
            rig.lab.now.get_mut("vda").unwrap().resize(old + 8192, 0);
        } else {
            assert_eq!(kind(&result.unwrap_err()), Some(FailureKind::Unreachable));
        }
        rig.settled();
        assert_eq!(rig.lab.model().volume("vda").unwrap().active.virtual_size, rig.lab.now["vda"].len() as u64);
    }
}
