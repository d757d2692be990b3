//! Merges by the hypervisor, one ugly turn each.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use qcow2_chain::image::{CreateOptions, Image};
use qcow2_chain::live::fake::{Call, FakeHypervisor, Turn};
use qcow2_chain::live::{Commit, FailureKind, Hypervisor, OnTimeout};
use qcow2_chain::merge::Direction;
use qcow2_chain::storage::crash::{Recorder, RecorderOptions, Tree};
use qcow2_chain::storage::{HostFileSystem, MemoryFileSystem};
use qcow2_chain::vm::{Error, MergeOptions, OfflineExecutor, Progress, Recovery, Refusal, State, VolumeStep};

use super::rig::{Rig, incomplete, kind};
use crate::support::lab::LabShape;
use crate::support::rng::{Rng, seed};

const DONE: [Turn; 12] = [
    Turn::LosesEvent,
    Turn::TellsNothing,
    Turn::NamesWrongDisk,
    Turn::JobIsSwift,
    Turn::JobStalls(100),
    Turn::RefusesPivot(3),
    Turn::PivotsLate(5),
    Turn::LosesAnswer { to: Call::Commit, done: true },
    Turn::LosesAnswer { to: Call::Pivot, done: true },
    Turn::LosesAnswer { to: Call::Pivot, done: false },
    Turn::LosesEvent,
    Turn::Disconnects(1 << 20),
];

#[test]
fn a_merge_with_what_the_vm_writes_is_done_whatever_is_told_of_it() {
    for turn in DONE {
        let mut rig = Rig::new();
        rig.create("s1");
        rig.fake.play(turn);
        rig.try_delete("s1").unwrap_or_else(|error| panic!("{turn:?}: {error:?}"));
        assert_eq!(rig.chain("vda"), ["vda.img"], "{turn:?}");
        rig.write_all();
        rig.settled_without("s1");
    }
}

#[test]
fn a_file_that_a_vm_was_started_on_before_the_recovery_is_not_removed() {
    let directory = tempfile::tempdir().unwrap();
    let names = Arc::new(HostFileSystem);
    let mut rig = Rig::off(names, directory.path(), LabShape::default(), Rng::new(seed()));
    rig.set().create("s1", &Default::default()).unwrap();
    rig.lab.taken.insert("s1".to_owned(), rig.lab.now.clone());
    // The catalogue forgets the second volume's overlay, and nothing more happens.
    let set = rig.flaky_set(Arc::new(OfflineExecutor), 2, true);
    assert!(set.delete("s1", &MergeOptions::default().with_direction(Direction::Commit), &()).is_err());
    let overlay = rig.path("vm-vdb.2.qcow2");
    assert!(overlay.exists());
    // The first volume's definition was brought up to date, the second one's was not.
    rig.define();
    rig.fake.define("vdb", &overlay).unwrap();
    rig.fake.start().unwrap();
    for set in [rig.set_with(Arc::new(OfflineExecutor)), rig.set()] {
        let error = set.recover(&()).unwrap_err();
        assert!(error.to_string().contains("in use") || matches!(error, Error::Incomplete { .. }), "{error:?}");
        assert!(overlay.exists(), "{error:?}");
    }
    rig.fake.stop();
    assert!(matches!(rig.set().recover(&()), Ok(Recovery::Completed(_))));
    assert!(!overlay.exists());
    rig.define();
    rig.settled_without("s1");
}

#[test]
fn a_merge_into_a_larger_file_is_refused_while_the_vm_runs() {
    let mut rig = Rig::off(Arc::new(MemoryFileSystem::new()), Path::new("/vm"), LabShape::default(), Rng::new(seed()));
    rig.set().create("s1", &Default::default()).unwrap();
    rig.lab.taken.insert("s1".to_owned(), rig.lab.now.clone());
    let size = rig.lab.now["vdb"].len() / 2;
    rig.set().resize("vdb", size as u64, true).unwrap();
    rig.lab.now.get_mut("vdb").unwrap().truncate(size);
    rig.start();
    rig.write_all();
    let error = rig.try_delete("s1").unwrap_err();
    assert!(matches!(error.refusal(), Some(Refusal::Running { .. })), "{error:?}");
    rig.settled();
    rig.fake.stop();
    rig.try_delete("s1").unwrap();
    rig.define();
    rig.settled_without("s1");
}

#[test]
fn what_a_vm_was_switched_to_is_durable_before_the_catalogue_forgets_the_top() {
    // The hypervisor may have written the base without a sync, as it does for a VM whose cache is unsafe.
    for snapshots in [1, 2] {
        let recorder = Recorder::with(RecorderOptions::default().with_sites(true));
        let names = Arc::new(recorder.names(&Tree::new()));
        let mut rig = Rig::off(names, Path::new("/vm"), LabShape::default(), Rng::new(seed()));
        rig.fake.start().unwrap();
        for number in 1..=snapshots {
            rig.create(&format!("s{number}"));
        }
        let before = recorder.log().barriers().len();
        rig.try_delete("s1").unwrap();
        let sites = recorder.log().barriers().into_iter().skip(before).map(|barrier| {
            let site = barrier.site.expect("sites are noted");
            site.frames.first().map_or_else(String::new, |frame| frame.file.clone())
        });
        let sites: Vec<String> = sites.collect();
        let of = |file: &str| {
            let found = sites.iter().enumerate().filter(|(_, site)| site.ends_with(file));
            found.map(|(at, _)| at).collect::<Vec<_>>()
        };
        let (ours, catalogue) = (of("live/executor.rs"), of("vm/catalogue.rs"));
        // The base alone, or with the file above it, whose link is another one.
        assert_eq!(ours.len(), rig.volumes().len() * snapshots, "{sites:#?}");
        for volume in ours.chunks(snapshots) {
            assert!(
                catalogue.iter().any(|at| *at < volume[0]) && catalogue.iter().any(|at| at > volume.last().unwrap())
            );
        }
        rig.settled_without("s1");
    }
}

#[test]
fn a_merge_beneath_what_the_vm_writes_is_done_whatever_is_told_of_it() {
    let turns = DONE.into_iter().filter(|turn| !format!("{turn:?}").contains("Pivot"));
    for turn in turns {
        let mut rig = Rig::new();
        rig.create("s1");
        rig.create("s2");
        rig.fake.play(turn);
        rig.try_delete("s1").unwrap_or_else(|error| panic!("{turn:?}: {error:?}"));
        assert_eq!(rig.chain("vda"), ["vm-vda.3.qcow2", "vda.img"], "{turn:?}");
        rig.write_all();
        rig.settled_without("s1");
    }
}

#[test]
fn a_merge_two_files_beneath_is_relinked_by_the_hypervisor() {
    let mut rig = Rig::new();
    ["s1", "s2", "s3"].iter().for_each(|name| rig.create(name));
    rig.try_delete("s1").unwrap();
    assert_eq!(rig.chain("vdb"), ["vm-vdb.6.qcow2", "vm-vdb.4.qcow2", "vdb.img"]);
    rig.settled_without("s1");
}

/// Deletes a snapshot that cannot be, and tells why.
fn failing(rig: &Rig, name: &str) -> Error {
    let error = rig.try_delete(name).expect_err("it cannot be done");
    let (source, _, left) = incomplete(error);
    assert!(!left.is_empty());
    assert_eq!(rig.lab.model().find(name).map(|known| known.state), Some(State::Merging));
    source
}

#[test]
fn a_job_that_vanishes_is_an_error_and_begun_again() {
    for active in [true, false] {
        let mut rig = Rig::new();
        rig.create("s1");
        if !active {
            rig.create("s2");
        }
        let before = rig.chain("vda");
        rig.fake.play(Turn::JobVanishes);
        let error = failing(&rig, "s1");
        assert_eq!(kind(&error), Some(FailureKind::Failed));
        assert!(error.to_string().contains("the job failed"), "{error}");
        assert_eq!(rig.chain("vda"), before, "its chain is what it was");
        rig.write_all();
        rig.try_delete("s1").unwrap();
        rig.settled_without("s1");
    }
}

#[test]
fn a_job_that_vanishes_in_silence_is_an_error_and_begun_again() {
    let mut rig = Rig::new();
    rig.create("s1");
    rig.fake.play(Turn::TellsNothing);
    rig.fake.play(Turn::JobVanishes);
    let error = failing(&rig, "s1");
    assert!(error.to_string().contains("the job vanished"), "{error}");
    rig.write_all();
    rig.try_delete("s1").unwrap();
    rig.settled_without("s1");
}

#[test]
fn a_commit_that_was_not_heard_is_an_error_and_begun_again() {
    let mut rig = Rig::new();
    rig.create("s1");
    rig.fake.play(Turn::LosesAnswer { to: Call::Commit, done: false });
    assert_eq!(kind(&failing(&rig, "s1")), Some(FailureKind::Unreachable));
    assert!(!rig.fake.has_job("vda"));
    rig.write_all();
    rig.try_delete("s1").unwrap();
    rig.settled_without("s1");
}

#[test]
fn a_switch_that_is_always_refused_leaves_the_job_for_later() {
    let mut rig = Rig::new();
    rig.create("s1");
    rig.fake.play(Turn::RefusesPivot(1000));
    let error = failing(&rig, "s1");
    assert_eq!(kind(&error), Some(FailureKind::Failed));
    assert!(error.to_string().contains("not ready for pivot"), "{error}");
    assert!(rig.fake.has_job("vda"));
    rig.write_all();
    rig.fake.behave();
    rig.try_delete("s1").unwrap();
    rig.settled_without("s1");
}

#[test]
fn after_the_time_that_is_allowed_the_job_goes_on_and_is_taken_over() {
    let mut rig = Rig::new();
    rig.create("s1");
    rig.fake.play(Turn::JobNeverEnds);
    let error = rig.hasty_set(OnTimeout::Keep).delete("s1", &Default::default(), &()).unwrap_err();
    assert!(error.is_timed_out());
    let (error, done, left) = incomplete(error);
    assert!(matches!(error, Error::TimedOut { ref disk, running: true, .. } if disk == "vda"), "{error:?}");
    assert_eq!((done, left), (vec!["vdb".to_owned()], vec!["vda".to_owned()]));
    assert!(rig.fake.has_job("vda"));
    assert_eq!(rig.chain("vda"), ["vm-vda.1.qcow2", "vda.img"]);
    rig.write_all();
    rig.fake.behave();
    // A second job beside the first would be refused.
    assert!(rig.try_delete("s1").is_ok());
    rig.settled_without("s1");
}

#[test]
fn after_the_time_that_is_allowed_the_job_is_ended_where_that_is_wanted() {
    let mut rig = Rig::new();
    rig.create("s1");
    rig.fake.play(Turn::JobNeverEnds);
    let error = rig.hasty_set(OnTimeout::Abort).delete("s1", &Default::default(), &()).unwrap_err();
    let (error, ..) = incomplete(error);
    assert!(matches!(error, Error::TimedOut { running: false, .. }), "{error:?}");
    assert!(!rig.fake.has_job("vda"));
    assert_eq!(rig.chain("vda"), ["vm-vda.1.qcow2", "vda.img"]);
    rig.write_all();
    rig.try_delete("s1").unwrap();
    rig.settled_without("s1");
}

#[test]
fn an_end_that_was_not_heard_is_told_as_a_failure() {
    let mut rig = Rig::new();
    rig.create("s1");
    rig.fake.play(Turn::JobNeverEnds);
    rig.fake.play(Turn::LosesAnswer { to: Call::Abort, done: false });
    let error = rig.hasty_set(OnTimeout::Abort).delete("s1", &Default::default(), &()).unwrap_err();
    let (error, ..) = incomplete(error);
    assert_eq!(kind(&error), Some(FailureKind::Unreachable), "{error:?}");
    assert!(rig.fake.has_job("vda"));
    rig.fake.behave();
    rig.try_delete("s1").unwrap();
    rig.settled_without("s1");
}

#[test]
fn an_end_whose_answer_was_lost_is_an_end() {
    let mut rig = Rig::new();
    rig.create("s1");
    rig.fake.play(Turn::JobNeverEnds);
    rig.fake.play(Turn::LosesAnswer { to: Call::Abort, done: true });
    let error = rig.hasty_set(OnTimeout::Abort).delete("s1", &Default::default(), &()).unwrap_err();
    let (error, ..) = incomplete(error);
    assert!(matches!(error, Error::TimedOut { running: false, .. }), "{error:?}");
    rig.try_delete("s1").unwrap();
    rig.settled_without("s1");
}

/// Stops after so many steps.
struct StopsAfter(AtomicU32);

impl Progress for StopsAfter {
    fn step(&self, step: &VolumeStep<'_>) {
        assert!(step.done <= step.total);
        let _ = self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
    }

    fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::SeqCst) == 0
    }
}

#[test]
fn a_job_that_is_taken_over_keeps_to_the_rate_that_is_wanted_now() {
    let mut rig = Rig::new();
    rig.create("s1");
    rig.fake.play(Turn::JobNeverEnds);
    for rate_limit in [Some(1000), Some(2000), None] {
        let options = MergeOptions::default().with_rate_limit(rate_limit);
        let error = rig.hasty_set(OnTimeout::Keep).delete("s1", &options, &()).unwrap_err();
        assert!(error.is_timed_out(), "{error:?}");
        assert!(rig.fake.has_job("vda"));
        assert_eq!(rig.fake.rate_limit("vda"), rate_limit);
    }
    rig.fake.behave();
    rig.try_delete("s1").unwrap();
    rig.settled_without("s1");
}

/// Somebody gives the VM's first disk another file as soon as its merge is under way.
struct SwapsFile<'a>(&'a FakeHypervisor, PathBuf);

impl Progress for SwapsFile<'_> {
    fn step(&self, step: &VolumeStep<'_>) {
        if step.volume == "vda" {
            self.0.replace("vda", &self.1).expect("replaced");
        }
    }
}

#[test]
fn a_disk_that_has_other_files_is_no_merge_that_was_done() {
    for active in [true, false] {
        let mut rig = Rig::new();
        rig.create("s1");
        if !active {
            rig.create("s2");
        }
        let (top, other) = (rig.path("vm-vda.1.qcow2"), rig.path("other.qcow2"));
        Image::create(rig.lab.names.create_new(&other).unwrap(), &CreateOptions::new(1 << 20)).unwrap();
        let error = rig.set().delete("s1", &Default::default(), &SwapsFile(&rig.fake, other)).unwrap_err();
        let (error, _, left) = incomplete(error);
        assert_eq!((kind(&error), left), (Some(FailureKind::Gone), vec!["vda".to_owned()]), "{error:?}");
        assert!(rig.lab.names.exists(&top).unwrap(), "its top may be all that there is");
    }
}

/// The VM writes something else than the catalogue says: another program put a file of its own on top, or it was started on a
/// snapshot's file. Neither is for a merge to make permanent.
#[test]
fn what_the_catalogue_takes_for_written_must_be_written_and_nothing_else() {
    let mut rig = Rig::new();
    ["s1", "s2"].iter().for_each(|name| rig.create(name));
    rig.fake.stop();
    rig.define();
    // The file that s2 froze.
    rig.fake.define("vda", rig.path("vm-vda.1.qcow2")).unwrap();
    rig.fake.start().unwrap();
    let (error, ..) = incomplete(rig.try_delete("s1").unwrap_err());
    assert!(error.to_string().contains("by the hypervisor not only read"), "{error}");
    assert!(!rig.fake.has_job("vda"));
    assert!(rig.lab.names.exists(&rig.path("vm-vda.1.qcow2")).unwrap());
}

#[test]
fn a_merge_is_cancelled_with_its_job() {
    let mut rig = Rig::new();
    rig.create("s1");
    let error = rig.set().delete("s1", &Default::default(), &StopsAfter(2.into())).unwrap_err();
    assert!(matches!(error, Error::Cancelled), "{error:?}");
    assert!(!rig.fake.has_job("vda"));
    assert_eq!(rig.chain("vda"), ["vm-vda.1.qcow2", "vda.img"]);
    rig.write_all();
    assert!(matches!(rig.set().recover(&()), Ok(Recovery::Completed(_))));
    rig.settled_without("s1");
}

#[test]
fn x6_a_vm_that_is_destroyed_in_mid_merge_is_noticed_and_resumed_offline() {
    for turns in [vec![Turn::Dies(8)], vec![Turn::Dies(8), Turn::LosesEvent], vec![Turn::DiesIn(Call::Commit)]] {
        let mut rig = Rig::new();
        rig.create("s1");
        turns.iter().for_each(|turn| rig.fake.play(*turn));
        let error = failing(&rig, "s1");
        assert_eq!(kind(&error), Some(FailureKind::Gone), "{turns:?}: {error:?}");
        assert!(!rig.fake.is_running());
        assert!(matches!(rig.set_with(std::sync::Arc::new(OfflineExecutor)).recover(&()), Ok(Recovery::Completed(_))));
        rig.define();
        rig.settled_without("s1");
        rig.start();
        rig.write_all();
        rig.settled();
    }
}

#[test]
fn x6_a_vm_that_was_destroyed_and_started_again_is_merged_by_its_hypervisor() {
    let mut rig = Rig::new();
    rig.create("s1");
    rig.fake.play(Turn::Dies(8));
    failing(&rig, "s1");
    rig.start();
    rig.write_all();
    rig.try_delete("s1").unwrap();
    rig.settled_without("s1");
}

#[test]
fn x7_a_manager_that_dies_at_any_call_leaves_the_rest_to_the_next() {
    let mut ready = 0;
    for calls in 0.. {
        let mut rig = Rig::new();
        rig.create("s1");
        rig.fake.play(Turn::Disconnects(calls));
        let died = rig.try_delete("s1").is_err();
        if died {
            let recovery = rig.set().recover(&());
            assert!(matches!(recovery, Err(_) | Ok(Recovery::Clean)), "the hypervisor cannot be asked: {recovery:?}");
        }
        rig.fake.behave();
        rig.write_all();
        let mirrors = rig.fake.describe().unwrap().disks.into_iter().filter_map(|disk| disk.mirror);
        ready += mirrors.filter(|mirror| mirror.ready).count();
        let recovery = rig.set().recover(&()).unwrap();
        if !died {
            assert_eq!(recovery, Recovery::Clean);
            rig.settled_without("s1");
            break;
        }
        if recovery == Recovery::Clean {
            rig.settled();
        } else {
            rig.settled_without("s1");
        }
    }
    assert!(ready > 0, "a job was ready and adopted");
}

#[test]
fn a_job_that_somebody_else_runs_on_the_disk_is_let_be() {
    let mut rig = Rig::new();
    rig.create("s1");
    rig.create("s2");
    let (top, base) = (rig.path("vm-vda.3.qcow2"), rig.path("vm-vda.1.qcow2"));
    let other = Commit { disk: "vda".into(), top, base, active: true, rate_limit: None };
    // It copies nothing yet, or the snapshot would be spoiled by it.
    rig.fake.play(Turn::JobStalls(1000));
    rig.fake.commit(&other).unwrap();
    let error = failing(&rig, "s1");
    assert!(error.to_string().contains("another job is running"), "{error}");
    assert!(rig.fake.has_job("vda"));
    rig.fake.abort("vda").unwrap();
    rig.try_delete("s1").unwrap();
    rig.settled_without("s1");
}

#[test]
fn x3_files_off_the_chain_are_merged_while_the_vm_runs() {
    let mut rig = Rig::new();
    ["s1", "s2", "s3"].iter().for_each(|name| rig.create(name));
    rig.fake.stop();
    rig.set().revert("s1", &Default::default(), &()).unwrap();
    rig.lab.now = rig.lab.taken["s1"].clone();
    rig.start();
    rig.write_all();
    let before = rig.chain("vda");
    // The hypervisor would refuse a job on other files than its own.
    rig.fake.play(Turn::LosesAnswer { to: Call::Commit, done: false });
    rig.try_delete("s2").unwrap();
    assert_eq!(rig.chain("vda"), before);
    assert_eq!(rig.fake.unplayed().len(), 1, "it was not asked to merge");
    rig.settled_without("s2");
}

#[test]
fn revert_is_refused_while_the_vm_runs() {
    let mut rig = Rig::new();
    rig.create("s1");
    let before = rig.chain("vda");
    let error = rig.set().revert("s1", &Default::default(), &()).unwrap_err();
    assert!(matches!(error.refusal(), Some(Refusal::Running { operation: "revert" })), "{error:?}");
    assert_eq!(rig.chain("vda"), before);
    rig.settled();
}

/// Stops when it is asked so often.
struct StopsWhenAsked(AtomicU32);

impl Progress for StopsWhenAsked {
    fn step(&self, _step: &VolumeStep<'_>) {}

    fn is_cancelled(&self) -> bool {
        self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| Some(left.saturating_sub(1))) == Ok(0)
    }
}

#[test]
fn an_offline_merge_that_was_interrupted_anywhere_goes_on_when_the_vm_runs() {
    for direction in [Direction::Commit, Direction::Pull] {
        let mut refused = 0;
        for asked in 0.. {
            let mut rig = Rig::new();
            ["s1", "s2"].iter().for_each(|name| rig.create(name));
            rig.fake.stop();
            let options = MergeOptions::default().with_direction(direction);
            let done = rig.set().delete("s1", &options, &StopsWhenAsked(asked.into()));
            rig.start();
            rig.write_all();
            if done.is_ok() {
                rig.settled_without("s1");
                break;
            }
            if let Err(error) = rig.set().recover(&()) {
                let (error, ..) = incomplete(error);
                assert!(matches!(error.refusal(), Some(Refusal::Running { .. })), "{error:?}");
                refused += 1;
                rig.fake.stop();
                rig.fake.start().expect("it can be started all the same");
                rig.write_all();
                rig.fake.stop();
                rig.set().recover(&()).unwrap();
                rig.define();
            }
            rig.settled_without("s1");
        }
        assert_eq!(refused > 0, direction == Direction::Pull, "a hypervisor merges downwards");
    }
}
