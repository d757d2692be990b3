//! A VM that was switched over, and nobody knows: what it wrote since must not be undone by merging again.

use std::sync::Arc;

use qcow2_chain::live::LiveExecutor;
use qcow2_chain::live::fake::{Call, Turn};
use qcow2_chain::vm::{Error, Executor, OfflineExecutor, Recovery};

use super::rig::{Rig, incomplete, write};

/// The first disk is switched over or not, nobody hears of it, and the guest writes where the old files hold other data.
fn switched(done: bool) -> Rig {
    let mut rig = Rig::new();
    rig.create("s1");
    rig.write_all();
    rig.fake.play(Turn::LosesAnswer { to: Call::Pivot, done });
    rig.fake.play(Turn::JobIsSwift);
    // The connection goes with the answer: what comes before it is a description, one more, and three calls about the job.
    let mut calls = 0;
    loop {
        let fresh = rig.fake.unplayed();
        assert_eq!(fresh.len(), 2);
        rig.fake.play(Turn::Disconnects(calls));
        let Err(error) = rig.set().delete("s1", &Default::default(), &()) else { panic!("it was heard of") };
        if !rig.fake.unplayed().contains(&Turn::LosesAnswer { to: Call::Pivot, done }) {
            let (error, ..) = incomplete(error);
            assert!(matches!(error, Error::Uncertain { .. }), "{error:?}");
            break;
        }
        // Not that far yet: everything as before, and one call more.
        rig.fake.destroy();
        rig.fake.behave();
        rig.fake.play(Turn::LosesAnswer { to: Call::Pivot, done });
        rig.fake.play(Turn::JobIsSwift);
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
fn a_vm_that_writes_the_base_is_not_merged_again() {
    for done in [true, false] {
        let mut rig = switched(done);
        assert_eq!(rig.chain("vda").len(), 2 - usize::from(done));
        assert!(matches!(rig.set().recover(&()), Ok(Recovery::Completed(_))));
        assert_eq!(rig.chain("vda"), ["vda.img"]);
        rig.settled_without("s1");
    }
}

#[test]
fn a_vm_that_wrote_the_base_and_is_off_is_not_merged_again() {
    for done in [true, false] {
        let mut rig = switched(done);
        rig.fake.destroy();
        // Its definition tells.
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
fn without_its_hypervisor_nobody_knows_and_whoever_does_can_say_it() {
    for done in [true, false] {
        let mut rig = switched(done);
        rig.fake.destroy();
        let offline = rig.set_with(Arc::new(OfflineExecutor));
        for _ in 0..2 {
            let (error, ..) = incomplete(offline.recover(&()).unwrap_err());
            assert!(matches!(error, Error::Uncertain { source: None, .. }), "{error:?}");
        }
        let domain = LiveExecutor::new(rig.fake.clone()).domain("vm").unwrap();
        let reconciled = offline.reconcile(Some(&domain), false, &()).unwrap();
        assert!(matches!(reconciled.recovery, Some(Recovery::Completed(_))), "{reconciled:?}");
        rig.define();
        rig.settled_without("s1");
    }
}

#[test]
fn a_switch_that_is_known_is_not_forgotten_with_the_catalogue() {
    for (saved, destroyed) in [(false, false), (false, true), (true, false), (true, true)] {
        for fails_at in 0.. {
            let mut rig = Rig::new();
            rig.create("s1");
            rig.write_all();
            let live = Arc::new(LiveExecutor::new(rig.fake.clone()));
            if rig.flaky_set(live, fails_at, saved).delete("s1", &Default::default(), &()).is_ok() {
                assert!(fails_at > 2, "begun, each volume, done");
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
