//! Merges of a running guest that are interrupted: T1 to T6, X6, X7.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use qcow2_chain::libvirt::Listening;
use qcow2_chain::live::{
    Commit, Description, Event, Hypervisor as Seam, HypervisorError, Job, LiveExecutor, NewTop, OnTimeout,
};
use qcow2_chain::vm::{Error, Executor, MergeOptions, SnapshotSet};

use crate::hypervisor::{Hypervisor, wait_for};
use crate::scene::Scene;
use crate::snapshots::{libvirt, listening, polling};

/// The data that was written since the snapshot.
const DELTA_MIB: u64 = 64;
/// A rate limit, in bytes per second, at which the commit takes eight seconds.
const SLOW: u64 = 8 << 20;

fn slowly() -> MergeOptions {
    MergeOptions::default().with_rate_limit(Some(SLOW))
}

fn with_timeout(hypervisor: &Hypervisor, domain: &str, on_timeout: OnTimeout) -> Arc<dyn Executor> {
    let libvirt = Arc::new(libvirt(hypervisor, domain, Listening::OwnLoop));
    Arc::new(LiveExecutor::new(libvirt).with_timeout(Duration::from_secs(1), on_timeout))
}

/// Starts a guest with one disk that has written since a snapshot.
fn written<'h>(
    hypervisor: &'h Hypervisor,
    name: &str,
    executor: fn(&Hypervisor, &str) -> Arc<dyn Executor>,
) -> Scene<'h> {
    let mut scene = Scene::start(hypervisor, name, &["vda"], executor);
    scene.create("s1", false);
    scene.guest.tell(&format!("fill vda {DELTA_MIB}"));
    scene
}

/// Returns virsh's description of the job on the guest's disk.
fn job(hypervisor: &Hypervisor, domain: &str) -> String {
    hypervisor.virsh(&["blockjob", domain, "vda", "--info", "--raw"])
}

fn timed_out(deleted: Result<qcow2_chain::vm::Report, Error>) {
    let Err(error) = deleted else { panic!("the deletion ended in time: {deleted:?}") };
    assert!(error.is_timed_out(), "{error}");
}

#[test]
fn t1_t2_timeout_abort_is_resumed() {
    let Some(hypervisor) = Hypervisor::get() else { return };
    let mut scene =
        written(&hypervisor, "live-t1", |hypervisor, domain| with_timeout(hypervisor, domain, OnTimeout::Abort));
    timed_out(scene.set.delete("s1", &slowly(), &()));
    assert_eq!(job(&hypervisor, "live-t1"), "");
    scene.check("s1(M*)=f0; f1<-f0");
    // A second attempt; the writes of the meantime are kept.
    timed_out(scene.set.delete("s1", &slowly(), &()));
    scene.check("s1(M*)=f0; f1<-f0");
    scene.set = SnapshotSet::load(scene.set.catalogue()).unwrap().with_executor(listening(&hypervisor, "live-t1"));
    scene.delete("s1");
    scene.check("f0");
    scene.end();
}

#[test]
fn t3_t4_job_that_is_kept_is_aborted_by_virsh() {
    let Some(hypervisor) = Hypervisor::get() else { return };
    let mut scene =
        written(&hypervisor, "live-t3", |hypervisor, domain| with_timeout(hypervisor, domain, OnTimeout::Keep));
    timed_out(scene.set.delete("s1", &slowly(), &()));
    assert!(job(&hypervisor, "live-t3").contains("Active Block Commit"));
    scene.check("s1(M*)=f0; f1<-f0");
    hypervisor.virsh(&["blockjob", "live-t3", "vda", "--abort"]);
    scene.check("s1(M*)=f0; f1<-f0");
    scene.set = SnapshotSet::load(scene.set.catalogue()).unwrap().with_executor(polling(&hypervisor, "live-t3"));
    scene.delete("s1");
    scene.check("f0");
    scene.end();
}

#[test]
fn t4_deletion_fails_if_virsh_aborts_its_job() {
    let Some(hypervisor) = Hypervisor::get() else { return };
    for (name, executor) in [("live-t4", listening as fn(&Hypervisor, &str) -> _), ("live-t4-polls", polling)] {
        let mut scene = written(&hypervisor, name, executor);
        let (set, options) = (&scene.set, slowly());
        let failed = std::thread::scope(|scope| {
            let deleting = scope.spawn(move || set.delete("s1", &options, &()));
            wait_for("the job", Duration::from_secs(10), || {
                job(&hypervisor, name).contains("Active Block Commit").then_some(())
            });
            std::thread::sleep(Duration::from_millis(500));
            hypervisor.virsh(&["blockjob", name, "vda", "--abort"]);
            deleting.join().unwrap()
        });
        assert!(failed.is_err(), "{failed:?}");
        scene.check("s1(M*)=f0; f1<-f0");
        scene.delete("s1");
        scene.check("f0");
        scene.end();
    }
}

#[test]
fn t5_t6_no_timeout_waits_for_the_job() {
    let Some(hypervisor) = Hypervisor::get() else { return };
    let mut scene = written(&hypervisor, "live-t5", |hypervisor, domain| {
        let live = LiveExecutor::new(Arc::new(libvirt(hypervisor, domain, Listening::OwnLoop)));
        Arc::new(live.with_timeout(Duration::ZERO, OnTimeout::Abort))
    });
    // While the guest writes faster than the rate limit, the job never becomes ready.
    scene.guest.stop_writer();
    let start = Instant::now();
    scene.set.delete("s1", &slowly(), &()).unwrap();
    assert!(start.elapsed() > Duration::from_secs(3), "the rate limit had no effect: {:?}", start.elapsed());
    scene.guest.start_writer();
    scene.check("f0");
    scene.create("s2", false);
    scene.guest.tell(&format!("fill vda {DELTA_MIB}"));
    scene.delete("s2");
    scene.check("f0");
    scene.end();
}

#[test]
fn x6_guest_destroyed_during_a_merge() {
    let Some(hypervisor) = Hypervisor::get() else { return };
    for (name, executor) in [("live-x6", listening as fn(&Hypervisor, &str) -> _), ("live-x6-polls", polling)] {
        let mut scene = written(&hypervisor, name, executor);
        let (set, guest) = (&scene.set, &mut scene.guest);
        let options = slowly();
        let (failed, noticed) = std::thread::scope(|scope| {
            let deleting = scope.spawn(move || set.delete("s1", &options, &()));
            wait_for("the job", Duration::from_secs(10), || {
                job(&hypervisor, name).contains("Active Block Commit").then_some(())
            });
            std::thread::sleep(Duration::from_secs(1));
            guest.destroy();
            let destroyed = Instant::now();
            (deleting.join().unwrap(), destroyed.elapsed())
        });
        assert!(failed.is_err(), "{failed:?}");
        assert!(noticed < Duration::from_secs(3), "noticed after {noticed:?}");
        scene.check("s1(M*)=f0; f1<-f0");
        scene.delete("s1");
        scene.check("f0");
        scene.boot();
        scene.check("f0");
        scene.end();
    }
}

#[test]
fn libvirtd_restarted_during_a_merge() {
    let Some(hypervisor) = Hypervisor::get() else { return };
    for (name, executor) in
        [("live-libvirtd", listening as fn(&Hypervisor, &str) -> _), ("live-libvirtd-polls", polling)]
    {
        let mut scene = written(&hypervisor, name, executor);
        let (set, options) = (&scene.set, slowly());
        let deleted = std::thread::scope(|scope| {
            let deleting = scope.spawn(move || set.delete("s1", &options, &()));
            wait_for("the job", Duration::from_secs(10), || {
                job(&hypervisor, name).contains("Active Block Commit").then_some(())
            });
            hypervisor.restart();
            deleting.join().unwrap()
        });
        println!("{name}: {:?}", deleted.as_ref().map(|_| ()));
        // The job belongs to QEMU and continues. A poll may miss the restart.
        if deleted.is_err() {
            scene.check("s1(M*)=f0; f1<-f0");
            scene.delete("s1");
        }
        scene.check("f0");
        // The same set connects to the new daemon and receives its events.
        scene.create("s2", true);
        scene.check("s2(R*)=f0; f2<-f0");
        scene.delete("s2");
        scene.check("f0");
        scene.end();
    }
}

/// The point where the deleting program stops, so that it can be killed there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// The job is ready, and the guest is not switched.
    Ready,
    /// The guest is switched, and the answer is not processed.
    Switched,
}

/// A hypervisor whose `pivot` never returns.
#[derive(Debug)]
struct Stopping {
    inner: qcow2_chain::libvirt::Libvirt,
    stop: Stop,
    reached: PathBuf,
}

impl Seam for Stopping {
    fn describe(&self) -> Result<Description, HypervisorError> {
        self.inner.describe()
    }
    fn snapshot(&self, disks: &[NewTop], quiesce: bool) -> Result<(), HypervisorError> {
        self.inner.snapshot(disks, quiesce)
    }
    fn set_agent_timeout(&self, at_most: Option<Duration>) -> Result<(), HypervisorError> {
        self.inner.set_agent_timeout(at_most)
    }
    fn thaw(&self) -> Result<(), HypervisorError> {
        self.inner.thaw()
    }
    fn commit(&self, commit: &Commit) -> Result<(), HypervisorError> {
        self.inner.commit(commit)
    }
    fn job(&self, disk: &str) -> Result<Option<Job>, HypervisorError> {
        self.inner.job(disk)
    }
    fn set_rate_limit(&self, disk: &str, rate_limit: Option<u64>) -> Result<(), HypervisorError> {
        self.inner.set_rate_limit(disk, rate_limit)
    }
    fn abort(&self, disk: &str) -> Result<(), HypervisorError> {
        self.inner.abort(disk)
    }
    fn pivot(&self, disk: &str) -> Result<(), HypervisorError> {
        if self.stop == Stop::Switched {
            self.inner.pivot(disk)?;
        }
        std::fs::write(&self.reached, "").unwrap();
        loop {
            std::thread::park();
        }
    }
    fn resize(&self, disk: &str, size: u64) -> Result<(), HypervisorError> {
        self.inner.resize(disk, size)
    }
    fn wait(&self, disk: &str, at_most: Duration) -> Option<Event> {
        self.inner.wait(disk, at_most)
    }
}

/// The environment variable with the arguments of the deleting program: URI, domain, catalogue,
/// stop point, and the file that it creates there.
const DELETE: &str = "QCOW2_CHAIN_LIVE_DELETE";

/// The program that [`killed`] starts and kills. Without its variable it does nothing.
#[test]
fn deleting_program() {
    let Ok(line) = std::env::var(DELETE) else { return };
    let [uri, domain, catalogue, stop, reached] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
    let inner = qcow2_chain::libvirt::Libvirt::connect(uri, domain, Listening::OwnLoop).unwrap();
    let stop = if stop == "Ready" { Stop::Ready } else { Stop::Switched };
    let live = LiveExecutor::new(Arc::new(Stopping { inner, stop, reached: PathBuf::from(reached) }));
    let set = SnapshotSet::load(catalogue).unwrap().with_executor(Arc::new(live));
    panic!("the deletion returned: {:?}", set.delete("s1", &MergeOptions::default(), &()));
}

fn start_deleting(hypervisor: &Hypervisor, domain: &str, catalogue: &Path, stop: Stop, reached: &Path) -> Child {
    let line = format!("{} {domain} {} {stop:?} {}", hypervisor.uri, catalogue.display(), reached.display());
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "jobs::deleting_program", "--nocapture"])
        .env(DELETE, line)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// Kills the program while the guest writes; another program completes the deletion.
fn killed(name: &str, stop: Stop) {
    let Some(hypervisor) = Hypervisor::get() else { return };
    let mut scene = written(&hypervisor, name, listening);
    let directory = tempfile::tempdir().unwrap();
    let reached = directory.path().join("reached");
    let mut program = start_deleting(&hypervisor, name, scene.set.catalogue(), stop, &reached);
    wait_for("the switch", Duration::from_secs(60), || reached.exists().then_some(()));
    program.kill().unwrap();
    program.wait().unwrap();

    assert_eq!(job(&hypervisor, name).contains("Active Block Commit"), stop == Stop::Ready);
    scene.guest.wait_for_records(50);
    let report = scene.delete("s1");
    assert_eq!(report.removed.len(), 1);
    assert_eq!(job(&hypervisor, name), "");
    scene.check("f0");
    scene.end();
}

#[test]
fn x7_program_killed_while_the_job_is_ready() {
    killed("live-x7", Stop::Ready);
}

#[test]
fn x7_program_killed_after_the_switch() {
    killed("live-x7-switched", Stop::Switched);
}
