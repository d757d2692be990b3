//! A VM that was switched to its base, with the answer lost: merging again would undo its later
//! writes.

use std::sync::Arc;

use qcow2_chain::live::LiveExecutor;
use qcow2_chain::live::fake::{Call, Fault};
use qcow2_chain::vm::{Error, Executor, OfflineExecutor, Recovery};

use super::rig::{Rig, incomplete, write};

/// The first disk is switched or not, the answer is lost, and the guest writes over data of the old
/// files.
fn switched(done: bool) -> Rig {
    let mut rig = Rig::new();
    rig.create("s1");
    rig.write_all();
    rig.fake.inject(Fault::LosesAnswer { to: Call::Pivot, done });
    rig.fake.inject(Fault::JobIsSwift);
    // The connection breaks with the answer. The number of calls before is found by trial.
    let mut calls = 0;
    loop {
        let fresh = rig.fake.pending_faults();
        assert_eq!(fresh.len(), 2);
        rig.fake.inject(Fault::Disconnects(calls));
        let Err(error) = rig.set().delete("s1", &Default::default(), &()) else { panic!("the answer arrived") };
        if !rig.fake.pending_faults().contains(&Fault::LosesAnswer { to: Call::Pivot, done }) {
            let (error, ..) = incomplete(error);
            assert!(matches!(error, Error::Uncertain { .. }), "{error:?}");
            break;
        }
        // The connection broke too early: one more call.
        rig.fake.destroy();
        rig.fake.clear_faults();
        rig.fake.inject(Fault::LosesAnswer { to: Call::Pivot, done });
        rig.fake.inject(Fault::JobIsSwift);
        rig.start();
        calls += 1;
    }
    rig.fake.reconnect();
    let journal = rig.path("vm.json.journal");
    let journal = rig.lab.names.open(&journal, &qcow2_chain::storage::Access::read()).unwrap();
    let mut text = vec![0; usize::try_from(journal.len().unwrap()).unwrap()];
    journal.read_at(&mut text, 0).unwrap();
    assert!(String::from_utf8_lossy(&text).contains("switching"), "the switch is recorded");
    for _ in 0..8 {
        rig.write_all();
    }
    rig
}

#[test]
fn running_vm_on_the_base_is_not_merged_again() {
    for done in [true, false] {
        let mut rig = switched(done);
        assert_eq!(rig.chain("vda").len(), 2 - usize::from(done));
        assert!(matches!(rig.set().recover(&()), Ok(Recovery::Completed(_))));
        assert_eq!(rig.chain("vda"), ["vda.img"]);
        rig.settled_without("s1");
    }
}

#[test]
fn stopped_vm_on_the_base_is_not_merged_again() {
    for done in [true, false] {
        let mut rig = switched(done);
        rig.fake.destroy();
        // The definition decides.
        assert!(matches!(rig.set().recover(&()), Ok(Recovery::Completed(_))));
        rig.define();
        rig.settled_without("s1");
        rig.start();
        for volume in rig.volumes() {
            write(&rig.fake, &volume, rig.lab.now.get_mut(&volume).unwrap(), &mut rig.rng);
        }
        rig.settled();
    }
}

#[test]
fn recovery_without_hypervisor_is_uncertain() {
    for done in [true, false] {
        let mut rig = switched(done);
        rig.fake.destroy();
        let offline = rig.set_with(Arc::new(OfflineExecutor));
        for _ in 0..2 {
            let error = offline.recover(&()).unwrap_err();
            assert!(matches!(error, Error::Uncertain { source: None, .. }), "{error:?}");
        }
        let domain = LiveExecutor::new(rig.fake.clone()).domain("vm").unwrap().expect("a hypervisor");
        let reconciled = offline.reconcile(Some(&domain), false, &()).unwrap();
        assert!(matches!(reconciled.recovery, Some(Recovery::Completed(_))), "{reconciled:?}");
        rig.define();
        rig.settled_without("s1");
    }
}

#[test]
fn known_switch_survives_a_failed_catalogue() {
    for (saved, destroyed) in [(false, false), (false, true), (true, false), (true, true)] {
        for fails_at in 0.. {
            let mut rig = Rig::new();
            rig.create("s1");
            rig.write_all();
            let live = Arc::new(LiveExecutor::new(rig.fake.clone()));
            if rig.flaky_set(live, fails_at, saved).delete("s1", &Default::default(), &()).is_ok() {
                assert!(fails_at > 2, "at the start, for each volume, and at the end");
                break;
            }
            (0..8).for_each(|_| rig.write_all());
            if destroyed {
                rig.fake.destroy();
                rig.set_with(Arc::new(OfflineExecutor)).recover(&()).unwrap();
                rig.define();
            } else {
                rig.set().recover(&()).unwrap();
            }
            if rig.lab.model().find("s1").is_some() {
                rig.settled();
            } else {
                rig.settled_without("s1");
            }
        }
    }
}
