//! Snapshots, sizes and the guest agent, with one fault each.

use std::sync::Arc;
use std::time::Duration;

use qcow2_chain::live::fake::{Call, Fault};
use qcow2_chain::live::{FailureKind, Hypervisor};
use qcow2_chain::vm::{Error, OfflineExecutor, Recovery, Refusal, SnapshotOptions};

use super::rig::{Rig, kind, name};

#[test]
fn snapshot_with_lost_answer_is_found_taken() {
    let mut rig = Rig::new();
    rig.fake.inject(Fault::LosesAnswer { to: Call::Snapshot, done: true });
    rig.create("s1");
    assert_eq!(rig.chain("vda"), [name(&rig.active("vda")).as_str(), "vda.img"]);
    rig.settled();
}

#[test]
fn snapshot_with_lost_request_is_found_not_taken() {
    let mut rig = Rig::new();
    rig.fake.inject(Fault::LosesAnswer { to: Call::Snapshot, done: false });
    let error = rig.set().create("s1", &Default::default()).unwrap_err();
    assert_eq!(kind(&error), Some(FailureKind::Unreachable), "{error:?}");
    assert_eq!(rig.chain("vda"), ["vda.img"]);
    rig.write_all();
    rig.settled();
}

/// Requests a snapshot whose answer is lost together with the connection.
fn uncertain(rig: &mut Rig, done: bool) {
    rig.fake.inject(Fault::LosesAnswer { to: Call::Snapshot, done });
    // The calls before it are three descriptions.
    rig.fake.inject(Fault::Disconnects(3));
    let error = rig.set().create("s1", &Default::default()).unwrap_err();
    assert!(matches!(error, Error::Uncertain { .. }), "{error:?}");
    rig.assert_all_injected();
    assert!(rig.set().recover(&()).is_err(), "recovery needs the hypervisor");
    rig.fake.reconnect();
}

#[test]
fn uncertain_snapshot_is_settled_by_the_hypervisor() {
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
fn written_overlays_are_kept_after_the_vm_stopped() {
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
fn vm_that_stops_during_a_snapshot_keeps_overlays() {
    for forgets in [false, true] {
        let mut rig = Rig::new();
        rig.fake.inject(Fault::DiesIn(Call::Snapshot));
        if forgets {
            rig.fake.inject(Fault::ForgetsFiles);
        }
        let done = rig.set().create("s1", &Default::default());
        assert_eq!(done.is_ok(), !forgets, "{done:?}");
        rig.assert_all_injected();
        if forgets {
            // The VM was switched and may have written: nothing is undone.
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
fn vm_that_stops_before_a_snapshot_is_not_switched() {
    let mut rig = Rig::new();
    rig.fake.inject(Fault::Dies(2));
    let error = rig.set().create("s1", &Default::default()).unwrap_err();
    assert_eq!(kind(&error), Some(FailureKind::Gone), "{error:?}");
    rig.set().recover(&()).unwrap();
    rig.settled();
    rig.start();
    rig.write_all();
    rig.settled();
}

#[test]
fn vm_restarted_below_written_overlays_is_uncertain() {
    let mut rig = Rig::new();
    rig.fake.inject(Fault::ForgetsFiles);
    uncertain(&mut rig, true);
    let written: Vec<_> =
        rig.volumes().into_iter().map(|volume| (rig.fake.files(&volume)[0].clone(), volume)).collect();
    rig.write_all();
    rig.fake.destroy();
    rig.fake.start().unwrap();
    assert_eq!(rig.chain("vda"), ["vda.img"]);
    let error = rig.set().recover(&()).unwrap_err();
    assert!(matches!(error, Error::Uncertain { .. }), "{error:?}");
    assert!(written.iter().all(|(overlay, _)| rig.lab.names.exists(overlay).unwrap()), "written overlays are kept");
    // Recovery completes once the VM runs on the overlays again.
    rig.fake.destroy();
    for (overlay, volume) in written {
        rig.fake.define(&volume, overlay).unwrap();
    }
    rig.fake.start().unwrap();
    assert!(matches!(rig.set().recover(&()), Ok(Recovery::Completed(_))));
}

fn quiesced() -> SnapshotOptions {
    SnapshotOptions::default().with_quiesce(true)
}

#[test]
fn c2_quiesced_snapshot_freezes_and_thaws_once() {
    let mut rig = Rig::new();
    rig.set().create("s1", &quiesced()).unwrap();
    rig.lab.taken.insert("s1".to_owned(), rig.lab.now.clone());
    assert_eq!(rig.fake.freezes_and_thaws(), (1, 1));
    rig.write_all();
    rig.settled();
}

/// The time limit belongs to the VM: other users of the agent must not inherit it.
#[test]
fn agent_timeout_is_restored_after_each_snapshot() {
    for fault in [None, Some(Fault::HasNoAgent), Some(Fault::FreezesLate(Duration::from_secs(5)))] {
        let rig = Rig::new();
        fault.into_iter().for_each(|fault| rig.fake.inject(fault));
        let done = rig.set().create("s1", &quiesced());
        assert_eq!(done.is_ok(), fault.is_none(), "{fault:?}: {done:?}");
        assert_eq!(rig.fake.agent_timeout(), None, "{fault:?}");
        rig.assert_all_injected();
    }
}

#[test]
fn quiesced_snapshot_without_agent_is_refused() {
    let mut rig = Rig::new();
    rig.fake.inject(Fault::HasNoAgent);
    let error = rig.set().create("s1", &quiesced()).unwrap_err();
    assert!(matches!(error.refusal(), Some(Refusal::Quiesce { why }) if why.contains("agent")), "{error:?}");
    assert_eq!(rig.chain("vda"), ["vda.img"]);
    assert_eq!(rig.fake.freezes_and_thaws(), (0, 0));
    rig.write_all();
    rig.settled();
}

#[test]
fn guest_that_freezes_late_is_thawed() {
    let mut rig = Rig::new();
    rig.fake.inject(Fault::FreezesLate(Duration::from_secs(5)));
    let start = rig.fake.now();
    let error = rig.set().create("s1", &quiesced()).unwrap_err();
    assert!(matches!(error.refusal(), Some(Refusal::Quiesce { .. })), "{error:?}");
    assert!(!error.to_string().contains("may be frozen"), "{error}");
    let took = rig.fake.now() - start;
    assert!(
        (Duration::from_secs(35)..Duration::from_secs(40)).contains(&took),
        "the time limit of the agent was set: {took:?}"
    );
    assert_eq!(rig.fake.freezes_and_thaws(), (1, 1));
    rig.write_all();
    rig.settled();
}

#[test]
fn guest_that_cannot_be_thawed_is_reported() {
    let rig = Rig::new();
    rig.fake.inject(Fault::FreezesLate(Duration::from_secs(500)));
    let error = rig.set().create("s1", &quiesced()).unwrap_err();
    assert!(error.to_string().contains("the guest may be frozen"), "{error}");
    assert!(rig.fake.is_frozen());
    assert_eq!(rig.chain("vda"), ["vda.img"]);
}

#[test]
fn resize_survives_each_fault() {
    for (fault, done) in [
        (None, true),
        (Some(Fault::LosesAnswer { to: Call::Resize, done: true }), true),
        (Some(Fault::LosesAnswer { to: Call::Resize, done: false }), false),
        (Some(Fault::DiesIn(Call::Resize)), true),
    ] {
        let mut rig = Rig::new();
        rig.create("s1");
        let old = rig.lab.now["vda"].len();
        fault.into_iter().for_each(|fault| rig.fake.inject(fault));
        let result = rig.set().resize("vda", old as u64 + 8192, false);
        assert_eq!(result.is_ok(), done, "{fault:?}: {result:?}");
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
