//! Merges by the hypervisor, with one fault each.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use qcow2_chain::image::{CreateOptions, Image, OpenOptions};
use qcow2_chain::live::fake::{Call, FakeHypervisor, Fault};
use qcow2_chain::live::{FailureKind, Hypervisor};
use qcow2_chain::merge::Direction;
use qcow2_chain::storage::crash::{Recorder, RecorderOptions, Tree};
use qcow2_chain::storage::{Access, HostFileSystem, LockMode, MemoryFileSystem};
use qcow2_chain::vm::{Error, MergeOptions, OfflineExecutor, Progress, Recovery, Refusal, State};

use super::jobs::failing;
use super::rig::{Rig, incomplete, kind, name};
use crate::support::lab::LabShape;
use crate::support::rng::{Rng, seed};

const DONE: [Fault; 12] = [
    Fault::LosesEvent,
    Fault::NoEvents,
    Fault::NamesWrongDisk,
    Fault::JobIsSwift,
    Fault::JobStalls(100),
    Fault::RefusesPivot(3),
    Fault::PivotsLate(5),
    Fault::LosesAnswer { to: Call::Commit, done: true },
    Fault::LosesAnswer { to: Call::Pivot, done: true },
    Fault::LosesAnswer { to: Call::Pivot, done: false },
    Fault::LosesEvent,
    Fault::Disconnects(1 << 20),
];

#[test]
fn active_merge_survives_each_fault() {
    for fault in DONE {
        let mut rig = Rig::new();
        rig.create("s1");
        rig.fake.inject(fault);
        rig.try_delete("s1").unwrap_or_else(|error| panic!("{fault:?}: {error:?}"));
        assert_eq!(rig.chain("vda"), ["vda.img"], "{fault:?}");
        rig.write_all();
        rig.settled_without("s1");
    }
}

#[test]
fn recovery_keeps_a_file_that_a_started_vm_holds() {
    let directory = tempfile::tempdir().unwrap();
    let names = Arc::new(HostFileSystem);
    let mut rig = Rig::off(names, directory.path(), LabShape::default(), Rng::new(seed()));
    rig.set().create("s1", &Default::default()).unwrap();
    rig.lab.taken.insert("s1".to_owned(), rig.lab.now.clone());
    let overlay = rig.active("vdb");
    // The catalogue drops the second volume's overlay, and then the program ends.
    let set = rig.flaky_set(Arc::new(OfflineExecutor), 2, true);
    assert!(set.delete("s1", &MergeOptions::default().with_direction(Direction::Commit), &()).is_err());
    assert!(overlay.exists());
    // The definition has the new file of the first volume, and the old one of the second.
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
fn merge_into_larger_base_is_refused_while_running() {
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
fn merged_base_is_durable_before_the_catalogue() {
    // The hypervisor may have written the base without a sync, as for a VM with an unsafe cache
    // mode.
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
            let site = barrier.site.expect("sites are recorded");
            site.frames.first().map_or_else(String::new, |frame| frame.file.clone())
        });
        let sites: Vec<String> = sites.collect();
        let of = |file: &str| {
            let found = sites.iter().enumerate().filter(|(_, site)| site.ends_with(file));
            found.map(|(at, _)| at).collect::<Vec<_>>()
        };
        let (ours, catalogue) = (of("live/executor.rs"), of("catalogue.rs"));
        // The base, and the file above it if its header changed.
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
fn middle_merge_survives_each_fault() {
    let faults = DONE.into_iter().filter(|fault| !format!("{fault:?}").contains("Pivot"));
    for fault in faults {
        let mut rig = Rig::new();
        rig.create("s1");
        rig.create("s2");
        let active = name(&rig.active("vda"));
        rig.fake.inject(fault);
        rig.try_delete("s1").unwrap_or_else(|error| panic!("{fault:?}: {error:?}"));
        assert_eq!(rig.chain("vda"), [active.as_str(), "vda.img"], "{fault:?}");
        rig.write_all();
        rig.settled_without("s1");
    }
}

#[test]
fn merge_two_files_down_is_relinked_by_the_hypervisor() {
    let mut rig = Rig::new();
    ["s1", "s2", "s3"].iter().for_each(|name| rig.create(name));
    let before = rig.chain("vdb");
    assert_eq!(before.len(), 4);
    rig.try_delete("s1").unwrap();
    assert_eq!(rig.chain("vdb"), [before[0].as_str(), &before[1], "vdb.img"]);
    rig.settled_without("s1");
}

/// A directory that is copied or moved must not lead to the old one's files.
#[test]
fn middle_merge_keeps_relative_backing_names() {
    let mut rig = Rig::new();
    ["s1", "s2"].iter().for_each(|name| rig.create(name));
    rig.try_delete("s1").unwrap();
    for volume in rig.volumes() {
        let storage = rig.lab.names.open(&rig.active(&volume), &Access::read().with_lock(LockMode::None)).unwrap();
        let header = Image::open(storage, &OpenOptions::default().with_write(false)).unwrap().header();
        let first = name(&rig.set().snapshot_path("s2", &volume).unwrap());
        assert_eq!(header.backing_file.as_deref(), Some(first.as_bytes()));
    }
    rig.settled_without("s1");
}

/// Requests cancellation after a number of progress reports.
struct StopsAfter(AtomicU32);

impl Progress for StopsAfter {
    fn step(&self, step: &qcow2_chain::progress::Step<'_>) {
        assert!(step.done <= step.total);
        let _ = self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
    }

    fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::SeqCst) == 0
    }
}

/// Replaces the file of the first disk as soon as its merge has started.
struct SwapsFile<'a>(&'a FakeHypervisor, PathBuf);

impl Progress for SwapsFile<'_> {
    fn step(&self, step: &qcow2_chain::progress::Step<'_>) {
        if step.volume == "vda" {
            self.0.replace("vda", &self.1).expect("replaced");
        }
    }
}

#[test]
fn replaced_file_is_not_a_completed_merge() {
    for active in [true, false] {
        let mut rig = Rig::new();
        rig.create("s1");
        if !active {
            rig.create("s2");
        }
        let (top, other) = (rig.overlay_of("vda", "s1"), rig.path("other.qcow2"));
        Image::create(rig.lab.names.create_new(&other).unwrap(), &CreateOptions::new(1 << 20)).unwrap();
        let error = rig.set().delete("s1", &Default::default(), &SwapsFile(&rig.fake, other)).unwrap_err();
        let (error, _, left) = incomplete(error);
        assert_eq!((kind(&error), left), (Some(FailureKind::Gone), vec!["vda".to_owned()]), "{error:?}");
        assert!(rig.lab.names.exists(&top).unwrap(), "the top may have the only copy");
    }
}

/// A VM that was started on a snapshot's file writes another file than the catalogue's active one.
#[test]
fn merge_is_refused_if_the_vm_writes_another_file() {
    let mut rig = Rig::new();
    ["s1", "s2"].iter().for_each(|name| rig.create(name));
    rig.fake.stop();
    rig.define();
    let frozen = rig.set().snapshot_path("s2", "vda").unwrap();
    rig.fake.define("vda", &frozen).unwrap();
    rig.fake.start().unwrap();
    assert!(rig.try_delete("s1").is_err());
    assert!(!rig.fake.has_job("vda"));
    assert!(rig.lab.names.exists(&frozen).unwrap());
}

/// The VM was started on a file that the catalogue does not have, above the base of the merge. That
/// the top is not in use does not prove that it was merged.
#[test]
fn unused_top_is_not_a_completed_merge() {
    let mut rig = Rig::new();
    ["s1", "s2", "s3"].iter().for_each(|name| rig.create(name));
    rig.fake.stop();
    let (top, other) = (rig.overlay_of("vda", "s1"), rig.path("other.qcow2"));
    let options = CreateOptions::new(rig.lab.now["vda"].len() as u64).with_backing("vda.img", "qcow2");
    Image::create(rig.lab.names.create_new(&other).unwrap(), &options).unwrap().close().unwrap();
    rig.define();
    rig.fake.define("vda", &other).unwrap();
    rig.fake.start().unwrap();
    let error = rig.try_delete("s1").unwrap_err();
    assert!(rig.lab.names.exists(&top).unwrap(), "{error:?}");
    rig.fake.stop();
    rig.lab.names.unlink(&other).unwrap();
    rig.define();
    if rig.lab.model().find("s1").is_some_and(|known| known.state == State::Merging) {
        rig.set().recover(&()).unwrap();
        rig.settled_without("s1");
    } else {
        rig.settled();
    }
}

/// A second disk of the VM has the top or the base open. Merging would change it, or remove its
/// file.
#[test]
fn merge_is_refused_if_another_disk_shares_a_file() {
    let mut rig = Rig::off(Arc::new(MemoryFileSystem::new()), Path::new("/vm"), LabShape::default(), Rng::new(seed()));
    rig.set().create("s1", &Default::default()).unwrap();
    rig.lab.taken.insert("s1".to_owned(), rig.lab.now.clone());
    rig.define();
    let clone = rig.path("clone.qcow2");
    let options = CreateOptions::new(rig.lab.now["vda"].len() as u64).with_backing("vda.img", "qcow2");
    Image::create(rig.lab.names.create_new(&clone).unwrap(), &options).unwrap().close().unwrap();
    rig.fake.add_disk("vdz", &clone).unwrap();
    rig.fake.start().unwrap();
    let before = rig.chain("vda");
    let error = rig.try_delete("s1").unwrap_err();
    assert!(error.refusal().is_some() || format!("{error:?}").contains("share it"), "{error:?}");
    assert!(!rig.fake.has_job("vda"));
    assert_eq!(rig.chain("vda"), before);
}

#[test]
fn cancelled_merge_ends_its_job() {
    let mut rig = Rig::new();
    rig.create("s1");
    let error = rig.set().delete("s1", &Default::default(), &StopsAfter(2.into())).unwrap_err();
    assert!(matches!(error, Error::Cancelled), "{error:?}");
    assert!(!rig.fake.has_job("vda"));
    assert_eq!(rig.chain("vda"), [name(&rig.active("vda")).as_str(), "vda.img"]);
    rig.write_all();
    assert!(matches!(rig.set().recover(&()), Ok(Recovery::Completed(_))));
    rig.settled_without("s1");
}

#[test]
fn x6_destroyed_vm_is_noticed_and_merged_offline() {
    for faults in [vec![Fault::Dies(8)], vec![Fault::Dies(8), Fault::LosesEvent], vec![Fault::DiesIn(Call::Commit)]] {
        let mut rig = Rig::new();
        rig.create("s1");
        faults.iter().for_each(|fault| rig.fake.inject(*fault));
        let error = failing(&rig, "s1");
        assert_eq!(kind(&error), Some(FailureKind::Gone), "{faults:?}: {error:?}");
        assert!(!rig.fake.is_running());
        // Without the hypervisor it is not known which file the VM wrote last.
        let blind = rig.set_with(std::sync::Arc::new(OfflineExecutor)).recover(&());
        assert!(blind.as_ref().is_err_and(Error::is_uncertain), "{blind:?}");
        assert!(matches!(rig.set().recover(&()), Ok(Recovery::Completed(_))));
        rig.define();
        rig.settled_without("s1");
        rig.start();
        rig.write_all();
        rig.settled();
    }
}

#[test]
fn x6_restarted_vm_is_merged_by_the_hypervisor() {
    let mut rig = Rig::new();
    rig.create("s1");
    rig.fake.inject(Fault::Dies(8));
    failing(&rig, "s1");
    rig.start();
    rig.write_all();
    rig.try_delete("s1").unwrap();
    rig.settled_without("s1");
}

#[test]
fn x7_death_at_any_call_is_completed_by_the_next_process() {
    let mut ready = 0;
    for calls in 0.. {
        let mut rig = Rig::new();
        rig.create("s1");
        rig.fake.inject(Fault::Disconnects(calls));
        let died = rig.try_delete("s1").is_err();
        if died {
            let recovery = rig.set().recover(&());
            assert!(matches!(recovery, Err(_) | Ok(Recovery::Clean)), "the hypervisor is unreachable: {recovery:?}");
        }
        rig.fake.clear_faults();
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
fn x3_other_branch_is_merged_by_the_library() {
    let mut rig = Rig::new();
    ["s1", "s2", "s3"].iter().for_each(|name| rig.create(name));
    rig.fake.stop();
    rig.set().revert("s1", &Default::default(), &()).unwrap();
    rig.lab.now = rig.lab.taken["s1"].clone();
    rig.start();
    rig.write_all();
    let before = rig.chain("vda");
    // A call of the hypervisor would consume this fault.
    rig.fake.inject(Fault::LosesAnswer { to: Call::Commit, done: false });
    rig.try_delete("s2").unwrap();
    assert_eq!(rig.chain("vda"), before);
    assert_eq!(rig.fake.pending_faults().len(), 1, "the hypervisor was not called");
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

/// Requests cancellation at the query of this number.
struct StopsWhenAsked(AtomicU32);

impl Progress for StopsWhenAsked {
    fn step(&self, _step: &qcow2_chain::progress::Step<'_>) {}

    fn is_cancelled(&self) -> bool {
        self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| Some(left.saturating_sub(1))) == Ok(0)
    }
}

#[test]
fn interrupted_offline_merge_is_completed_while_running() {
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
            if rig.set().pending().unwrap().is_none() {
                // It was cancelled before its first record.
                assert!(rig.lab.model().find("s1").is_some());
                continue;
            }
            if let Err(error) = rig.set().recover(&()) {
                let (error, ..) = incomplete(error);
                assert!(matches!(error.refusal(), Some(Refusal::Running { .. })), "{error:?}");
                refused += 1;
                rig.fake.stop();
                rig.fake.start().expect("the VM can be started");
                rig.write_all();
                rig.fake.stop();
                rig.set().recover(&()).unwrap();
                rig.define();
            }
            rig.settled_without("s1");
        }
        assert_eq!(refused > 0, direction == Direction::Pull, "only a pull needs a VM that is off");
    }
}
