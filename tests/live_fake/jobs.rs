//! Jobs of the hypervisor that fail, exceed their time limit, are taken over, or belong to another
//! program.

use qcow2_chain::live::fake::{Call, Fault};
use qcow2_chain::live::{Commit, FailureKind, Hypervisor, OnTimeout};
use qcow2_chain::storage::Access;
use qcow2_chain::vm::{Error, MergeOptions, Refusal, State};

use super::rig::{Rig, incomplete, kind, name};

/// Deletes a snapshot, which must fail, and returns the cause.
pub fn failing(rig: &Rig, name: &str) -> Error {
    let error = rig.try_delete(name).expect_err("the deletion fails");
    let (source, _, left) = incomplete(error);
    assert!(!left.is_empty());
    assert_eq!(rig.lab.model().find(name).map(|known| known.state), Some(State::Merging));
    source
}

#[test]
fn failed_job_is_an_error_and_started_again() {
    for active in [true, false] {
        let mut rig = Rig::new();
        rig.create("s1");
        if !active {
            rig.create("s2");
        }
        let before = rig.chain("vda");
        rig.fake.inject(Fault::JobVanishes);
        let error = failing(&rig, "s1");
        assert_eq!(kind(&error), Some(FailureKind::Failed));
        assert!(error.to_string().contains("the job failed"), "{error}");
        assert_eq!(rig.chain("vda"), before, "the chain is unchanged");
        rig.write_all();
        rig.try_delete("s1").unwrap();
        rig.settled_without("s1");
    }
}

#[test]
fn vanished_job_without_events_is_started_again() {
    let mut rig = Rig::new();
    rig.create("s1");
    rig.fake.inject(Fault::NoEvents);
    rig.fake.inject(Fault::JobVanishes);
    let error = failing(&rig, "s1");
    assert!(error.to_string().contains("the job vanished"), "{error}");
    rig.write_all();
    rig.try_delete("s1").unwrap();
    rig.settled_without("s1");
}

#[test]
fn lost_commit_request_is_started_again() {
    let mut rig = Rig::new();
    rig.create("s1");
    rig.fake.inject(Fault::LosesAnswer { to: Call::Commit, done: false });
    assert_eq!(kind(&failing(&rig, "s1")), Some(FailureKind::Unreachable));
    assert!(!rig.fake.has_job("vda"));
    rig.write_all();
    rig.try_delete("s1").unwrap();
    rig.settled_without("s1");
}

#[test]
fn refused_switch_leaves_the_job() {
    let mut rig = Rig::new();
    rig.create("s1");
    rig.fake.inject(Fault::RefusesPivot(1000));
    let error = failing(&rig, "s1");
    assert_eq!(kind(&error), Some(FailureKind::Failed));
    assert!(error.to_string().contains("not ready for pivot"), "{error}");
    assert!(rig.fake.has_job("vda"));
    rig.write_all();
    rig.fake.clear_faults();
    rig.try_delete("s1").unwrap();
    rig.settled_without("s1");
}

#[test]
fn timeout_keep_leaves_a_job_that_is_taken_over() {
    let mut rig = Rig::new();
    rig.create("s1");
    rig.fake.inject(Fault::JobNeverEnds);
    let error = rig.hasty_set(OnTimeout::Keep).delete("s1", &Default::default(), &()).unwrap_err();
    assert!(error.is_timed_out());
    let (error, done, left) = incomplete(error);
    assert!(matches!(error, Error::TimedOut { ref disk, running: true, .. } if disk == "vda"), "{error:?}");
    assert_eq!((done, left), (vec!["vdb".to_owned()], vec!["vda".to_owned()]));
    assert!(rig.fake.has_job("vda"));
    assert_eq!(rig.chain("vda"), [name(&rig.active("vda")).as_str(), "vda.img"]);
    rig.write_all();
    rig.fake.clear_faults();
    // A second job on the disk would be refused.
    assert!(rig.try_delete("s1").is_ok());
    rig.settled_without("s1");
}

#[test]
fn timeout_abort_ends_the_job() {
    let mut rig = Rig::new();
    rig.create("s1");
    rig.fake.inject(Fault::JobNeverEnds);
    let error = rig.hasty_set(OnTimeout::Abort).delete("s1", &Default::default(), &()).unwrap_err();
    let (error, ..) = incomplete(error);
    assert!(matches!(error, Error::TimedOut { running: false, .. }), "{error:?}");
    assert!(!rig.fake.has_job("vda"));
    assert_eq!(rig.chain("vda"), [name(&rig.active("vda")).as_str(), "vda.img"]);
    rig.write_all();
    rig.try_delete("s1").unwrap();
    rig.settled_without("s1");
}

#[test]
fn timeout_with_lost_abort_request_is_a_failure() {
    let mut rig = Rig::new();
    rig.create("s1");
    rig.fake.inject(Fault::JobNeverEnds);
    rig.fake.inject(Fault::LosesAnswer { to: Call::Abort, done: false });
    let error = rig.hasty_set(OnTimeout::Abort).delete("s1", &Default::default(), &()).unwrap_err();
    let (error, ..) = incomplete(error);
    assert_eq!(kind(&error), Some(FailureKind::Unreachable), "{error:?}");
    assert!(rig.fake.has_job("vda"));
    rig.fake.clear_faults();
    rig.try_delete("s1").unwrap();
    rig.settled_without("s1");
}

#[test]
fn timeout_with_lost_abort_answer_is_a_timeout() {
    let mut rig = Rig::new();
    rig.create("s1");
    rig.fake.inject(Fault::JobNeverEnds);
    rig.fake.inject(Fault::LosesAnswer { to: Call::Abort, done: true });
    let error = rig.hasty_set(OnTimeout::Abort).delete("s1", &Default::default(), &()).unwrap_err();
    let (error, ..) = incomplete(error);
    assert!(matches!(error, Error::TimedOut { running: false, .. }), "{error:?}");
    rig.try_delete("s1").unwrap();
    rig.settled_without("s1");
}

#[test]
fn adopted_job_gets_the_present_rate_limit() {
    let mut rig = Rig::new();
    rig.create("s1");
    rig.fake.inject(Fault::JobNeverEnds);
    for rate_limit in [Some(1000), Some(2000), None] {
        let options = MergeOptions::default().with_rate_limit(rate_limit);
        let error = rig.hasty_set(OnTimeout::Keep).delete("s1", &options, &()).unwrap_err();
        assert!(error.is_timed_out(), "{error:?}");
        assert!(rig.fake.has_job("vda"));
        assert_eq!(rig.fake.rate_limit("vda"), rate_limit);
    }
    rig.fake.clear_faults();
    rig.try_delete("s1").unwrap();
    rig.settled_without("s1");
}

/// The owner of a job may switch the VM at any time. A process that takes the job over and dies
/// must leave a record of it.
#[test]
fn adopted_job_is_journalled() {
    let mut rig = Rig::new();
    rig.create("s1");
    rig.fake.inject(Fault::JobNeverEnds);
    assert!(rig.hasty_set(OnTimeout::Keep).delete("s1", &Default::default(), &()).unwrap_err().is_timed_out());
    let before = started_records(&rig);
    assert!(rig.hasty_set(OnTimeout::Keep).delete("s1", &Default::default(), &()).unwrap_err().is_timed_out());
    assert_eq!(started_records(&rig), before + 1, "the second process recorded the job before it could be switched");
    rig.fake.clear_faults();
    rig.try_delete("s1").unwrap();
    rig.settled_without("s1");
}

/// The number of records of started jobs in the journal.
fn started_records(rig: &Rig) -> usize {
    let journal = rig.lab.names.open(&rig.path("vm.json.journal"), &Access::read()).unwrap();
    let mut text = vec![0; usize::try_from(journal.len().unwrap()).unwrap()];
    journal.read_at(&mut text, 0).unwrap();
    String::from_utf8_lossy(&text).matches("started").count()
}

#[test]
fn foreign_job_on_the_disk_is_left_alone() {
    let mut rig = Rig::new();
    rig.create("s1");
    rig.create("s2");
    let (top, base) = (rig.active("vda"), rig.overlay_of("vda", "s1"));
    let other = Commit { disk: "vda".into(), top, base, active: true, rate_limit: None };
    // The job copies nothing yet, since that would change the snapshot.
    rig.fake.inject(Fault::JobStalls(1000));
    rig.fake.commit(&other).unwrap();
    let error = rig.try_delete("s1").unwrap_err();
    assert!(matches!(error.refusal(), Some(Refusal::Obstacle { .. })), "{error:?}");
    assert!(error.to_string().contains("block job (active commit)"), "{error}");
    assert!(rig.lab.model().merging().is_none() && rig.fake.has_job("vda"));
    rig.fake.abort("vda").unwrap();
    rig.try_delete("s1").unwrap();
    rig.settled_without("s1");
}
