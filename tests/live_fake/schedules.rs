//! Thousands of random schedules: operations on a VM that runs, stops, dies and starts, under a
//! hypervisor with random faults, with a guest that writes between any two calls. No schedule loses
//! data of a snapshot or of the guest, and each set can be settled.

use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use qcow2_chain::live::fake::{FakeHypervisor, Fault};
use qcow2_chain::live::{
    Commit, Description, Event, Hypervisor, Job, LiveExecutor, NewTop, OnTimeout, Result as Answer,
};
use qcow2_chain::storage::MemoryFileSystem;
use qcow2_chain::vm::{
    self, Error, Executor, MergeOptions, MergePreference, OfflineExecutor, Progress, Purpose, Recovery, Refusal,
    SnapshotOptions, SnapshotSet,
};

use super::rig::{Rig, write};
use crate::support::lab::{Contents, LabShape, read};
use crate::support::rng::{Rng, cases, count, trace};

/// The guest and its data.
#[derive(Debug)]
struct Guest {
    rng: Rng,
    now: Contents,
    /// The contents of the disks at the last request for a snapshot.
    at_snapshot: Option<Contents>,
}

/// The hypervisor with a guest that writes between any two calls.
#[derive(Debug)]
struct Busy {
    fake: Arc<FakeHypervisor>,
    guest: Mutex<Guest>,
}

impl Busy {
    fn work(&self, times: u64, of: u64) {
        let mut guest = self.guest.lock().unwrap();
        if !self.fake.is_running() || self.fake.is_frozen() || !guest.rng.chance(times, of) {
            return;
        }
        let Guest { rng, now, .. } = &mut *guest;
        for (disk, content) in now.iter_mut() {
            // The guest sees a new size at once.
            content.resize(usize::try_from(self.fake.size(disk).expect("a size")).unwrap(), 0);
            if rng.chance(2, 3) {
                write(&self.fake, disk, content, rng);
            }
        }
    }

    fn between<T>(&self, call: impl FnOnce() -> T) -> T {
        self.work(1, 6);
        let answer = call();
        self.work(1, 6);
        answer
    }
}

impl Hypervisor for Busy {
    fn describe(&self) -> Answer<Description> {
        self.between(|| self.fake.describe())
    }

    fn snapshot(&self, disks: &[NewTop], quiesce: bool) -> Answer<()> {
        self.work(1, 2);
        let mut guest = self.guest.lock().unwrap();
        guest.at_snapshot = Some(guest.now.clone());
        drop(guest);
        let answer = self.fake.snapshot(disks, quiesce);
        self.work(1, 2);
        answer
    }

    fn set_agent_timeout(&self, at_most: Option<Duration>) -> Answer<()> {
        self.between(|| self.fake.set_agent_timeout(at_most))
    }

    fn thaw(&self) -> Answer<()> {
        self.between(|| self.fake.thaw())
    }

    fn commit(&self, commit: &Commit) -> Answer<()> {
        self.between(|| self.fake.commit(commit))
    }

    fn job(&self, disk: &str) -> Answer<Option<Job>> {
        self.between(|| self.fake.job(disk))
    }

    fn set_rate_limit(&self, disk: &str, rate_limit: Option<u64>) -> Answer<()> {
        self.between(|| self.fake.set_rate_limit(disk, rate_limit))
    }

    fn abort(&self, disk: &str) -> Answer<()> {
        self.between(|| self.fake.abort(disk))
    }

    fn pivot(&self, disk: &str) -> Answer<()> {
        self.work(1, 2);
        let answer = self.fake.pivot(disk);
        self.work(1, 2);
        answer
    }

    fn resize(&self, disk: &str, size: u64) -> Answer<()> {
        self.between(|| self.fake.resize(disk, size))
    }

    fn wait(&self, disk: &str, at_most: Duration) -> Option<Event> {
        self.fake.wait(disk, at_most)
    }

    fn now(&self) -> Duration {
        self.fake.now()
    }
}

/// Requests cancellation at random.
struct Moody(Mutex<Rng>);

impl Progress for Moody {
    fn step(&self, _step: &qcow2_chain::progress::Step<'_>) {}

    fn is_cancelled(&self) -> bool {
        self.0.lock().unwrap().chance(1, 40)
    }
}

/// A request.
#[derive(Clone, Debug)]
enum Operation {
    Create(String, bool),
    Revert(String),
    Delete(String),
    Grow(String, u64),
}

/// A VM and its manager program.
struct World {
    rig: Rig,
    busy: Arc<Busy>,
    number: u32,
    reach: Arc<Reach>,
}

impl World {
    fn new(rng: &mut Rng, reach: Arc<Reach>) -> Self {
        let (size, cluster_bits) = rng.pick(&[(64 << 9, 9), (64 << 9, 9), (24 << 9, 9), (16 << 12, 12)]);
        let shape = LabShape {
            volumes: 2 + usize::from(rng.chance(1, 4)),
            size,
            cluster_bits,
            extended_l2: false,
            raw: rng.chance(1, 4),
        };
        let rig = Rig::off(Arc::new(MemoryFileSystem::new()), Path::new("/vm"), shape, Rng::new(rng.next_u64()));
        let guest = Guest { rng: Rng::new(rng.next_u64()), now: rig.lab.now.clone(), at_snapshot: None };
        let busy = Arc::new(Busy { fake: Arc::clone(&rig.fake), guest: Mutex::new(guest) });
        Self { rig, busy, number: 0, reach }
    }

    fn live(&mut self) -> Arc<dyn Executor> {
        // The time limit ends the wait for a job that never ends.
        let then = if self.rig.rng.chance(1, 2) { OnTimeout::Keep } else { OnTimeout::Abort };
        Arc::new(LiveExecutor::new(self.busy.clone()).with_timeout(Duration::from_secs(20), then))
    }

    /// The set of a new process. It may have no hypervisor while the VM is off, and its catalogue
    /// may fail.
    fn any_set(&mut self) -> SnapshotSet {
        let offline = !self.rig.fake.is_running() && self.rig.rng.chance(1, 2);
        let executor = if offline { Arc::new(OfflineExecutor) } else { self.live() };
        let rng = &mut self.rig.rng;
        if !rng.chance(1, 6) {
            return self.rig.set_with(executor);
        }
        let (fails_at, saved) = (u32::try_from(rng.within(0..5)).unwrap(), rng.chance(1, 2));
        trace(&format!("  catalogue fails at {fails_at}, saved: {saved}"));
        self.rig.flaky_set(executor, fails_at, saved)
    }

    fn now(&self) -> Contents {
        self.busy.guest.lock().unwrap().now.clone()
    }

    /// Returns true if the definition of the VM names its last active files.
    fn may_start(&self) -> bool {
        self.rig.fake.is_defined_as_written()
    }

    fn power(&mut self) {
        let fake = Arc::clone(&self.rig.fake);
        if !fake.is_running() {
            if self.may_start() {
                trace(&"  start");
                self.define_the_dropped();
                fake.start().expect("a VM can be started at any time");
            }
        } else if self.rig.rng.chance(1, 2) {
            trace(&"  stop");
            fake.stop();
        } else {
            trace(&"  destroy");
            fake.destroy();
        }
    }

    fn operation(&mut self) -> Operation {
        let known: Vec<String> = self.rig.lab.taken.keys().cloned().collect();
        let rng = &mut self.rig.rng;
        match rng.within(0..10) {
            3..6 if !known.is_empty() => Operation::Delete(rng.pick(&known)),
            6..8 if !known.is_empty() => Operation::Delete(rng.pick(&known)),
            8 if !known.is_empty() => Operation::Revert(rng.pick(&known)),
            9 => {
                let volumes: Vec<String> = self.rig.lab.now.keys().cloned().collect();
                let volume = rng.pick(&volumes);
                let size = self.busy.guest.lock().unwrap().now[&volume].len() as u64;
                Operation::Grow(volume, size + 512 * rng.within(0..20))
            }
            _ => {
                self.number += 1;
                Operation::Create(format!("s{}", self.number), rng.chance(1, 3))
            }
        }
    }

    fn run(&mut self, operation: &Operation) -> vm::Result<()> {
        let set = self.any_set();
        let rng = &mut self.rig.rng;
        let direction = rng.pick(&[MergePreference::Auto, MergePreference::CommitElsePull, MergePreference::Pull]);
        let options = MergeOptions::default().with_direction(direction);
        let moody = Moody(Mutex::new(Rng::new(rng.next_u64())));
        let progress: &dyn Progress = if rng.chance(1, 4) { &moody } else { &() };
        self.busy.guest.lock().unwrap().at_snapshot = None;
        let done = match operation {
            Operation::Create(name, quiesce) => set.create(name, &SnapshotOptions::default().with_quiesce(*quiesce)),
            Operation::Revert(name) => set.revert(name, &options, progress),
            Operation::Delete(name) => set.delete(name, &options, progress),
            Operation::Grow(volume, size) => set.resize(volume, *size, false),
        };
        done.map(|_| ())
    }

    /// Corrects a definition that names a file without a record: its merge or revert was recorded
    /// after the VM stopped, and the file is removed. Only while a snapshot is being taken may the
    /// definition be newer than the catalogue.
    fn define_the_dropped(&self) {
        let pending = self.rig.lab.set.pending().expect("the journal reads").and_then(|pending| pending.operation);
        if matches!(pending, Some(Purpose::Create { .. })) {
            return;
        }
        let model = self.rig.lab.model();
        for volume in &model.volumes {
            let defined = &self.rig.fake.files(&volume.name)[0];
            if !model.records().any(|(_, _, record)| self.rig.path(&record.file.path) == *defined) {
                self.rig.fake.define(&volume.name, self.rig.path(&volume.active.file.path)).unwrap();
            }
        }
        let Some(Purpose::Revert { name }) = pending else { return };
        // Where the catalogue has the revert, the guest starts with the snapshot's contents, and
        // writes before the recovery.
        let lab = &self.rig.lab;
        let reads = |volume: &str| lab.open_as_qemu(volume, false).and_then(|chain| read(&chain));
        if lab.taken[&name].iter().all(|(volume, content)| reads(volume).as_ref() == Ok(content)) {
            self.busy.guest.lock().unwrap().now = lab.taken[&name].clone();
        }
    }

    /// No operation is pending: the definition of a VM that is off follows the catalogue.
    fn define_if_off(&self) {
        if !self.rig.fake.is_running() {
            self.rig.define();
        }
    }

    /// Runs one operation, and recovery if it failed.
    fn step(&mut self, deep: bool) -> Result<(), String> {
        let operation = self.operation();
        if self.rig.rng.chance(2, 3) {
            for _ in 0..self.rig.rng.within(1..4) {
                let fault = Fault::from_random(self.rig.rng.next_u64());
                trace(&format!("  fault {fault:?}"));
                self.rig.fake.inject(fault);
            }
        }
        let was_running = self.rig.fake.is_running();
        trace(&format!("{operation:?}, running: {was_running}"));
        let done = self.run(&operation);
        // The content of a snapshot that was taken without the hypervisor.
        let off = self.now();
        trace(&format!("  {:?}", done.as_ref().map_err(ToString::to_string)));
        if let Err(error) = &done
            && matches!(operation, Operation::Revert(_))
            && was_running
        {
            let refused = matches!(error.refusal(), Some(Refusal::Running { .. }));
            if !refused && !matches!(error, Error::Hypervisor { .. }) && self.rig.fake.is_running() {
                return Err(format!("revert while running: {error:?}"));
            }
        }
        self.settle(was_running, done.is_ok())?;
        self.judge(&operation, &off, done.is_ok(), deep)
    }

    fn settle(&mut self, was_running: bool, done: bool) -> Result<(), String> {
        if !was_running && !self.rig.fake.is_running() {
            self.rig.define();
        }
        for attempt in 0..12 {
            if attempt >= 6 {
                self.rig.fake.clear_faults();
            } else if self.rig.rng.chance(1, 2) {
                self.rig.fake.reconnect();
            }
            self.busy.work(1, 2);
            let must = attempt >= 9;
            if must && self.rig.fake.is_running() {
                // A pull can only be completed while the VM is off.
                self.rig.fake.stop();
            } else if !done && self.rig.rng.chance(1, 3) {
                self.power();
                self.busy.work(1, 2);
            }
            let executor = self.live();
            let set = if must { self.rig.set_with(executor) } else { self.any_set() };
            let running = self.rig.fake.is_running();
            match set.recover(&()) {
                Ok(recovery) => {
                    trace(&format!("  recovery, running: {running}: {recovery:?}"));
                    self.reach.note(done, &recovery);
                    self.rig.fake.clear_faults();
                    return self.wind_up(&recovery, done);
                }
                Err(error) => {
                    trace(&format!("  recovery, running: {running}: {error:?}"));
                    if must {
                        return Err(format!("it cannot be settled: {error:?}"));
                    }
                    if !running && !was_running {
                        self.rig.define();
                    }
                }
            }
        }
        unreachable!("the last attempts return")
    }

    /// Checks that no job and no frozen guest is left.
    fn wind_up(&mut self, recovery: &Recovery, done: bool) -> Result<(), String> {
        if done && *recovery != Recovery::Clean {
            return Err(format!("the operation had reported success: {recovery:?}"));
        }
        for volume in self.rig.volumes() {
            if self.rig.fake.has_job(&volume) {
                return Err(format!("{volume}: a job is left"));
            }
        }
        self.define_if_off();
        if self.rig.fake.is_frozen() {
            // The error reported that the guest may be frozen.
            self.rig.fake.stop();
        }
        Ok(())
    }

    /// Compares everything with the model.
    fn judge(&mut self, operation: &Operation, off: &Contents, done: bool, deep: bool) -> Result<(), String> {
        let model = self.rig.lab.model();
        let listed = |name: &String| model.find(name).is_some();
        let at_snapshot = self.busy.guest.lock().unwrap().at_snapshot.clone();
        match operation {
            Operation::Create(name, _) if listed(name) => {
                self.rig.lab.taken.insert(name.clone(), at_snapshot.unwrap_or_else(|| off.clone()));
            }
            Operation::Delete(name) if !listed(name) => drop(self.rig.lab.taken.remove(name)),
            Operation::Create(..) if done => return Err("the snapshot is not there".to_owned()),
            Operation::Delete(_) if done => return Err("the snapshot is there".to_owned()),
            _ => {}
        }
        self.follow_sizes(operation, done)?;
        let now = self.now();
        let deep = deep || !done;
        let as_it_is = self.rig.check_against(&now, deep);
        if let (Operation::Revert(name), Some(taken)) = (operation, self.rig.lab.taken.get(operation.name()))
            && (done || as_it_is.is_err())
        {
            self.rig
                .check_against(taken, deep)
                .map_err(|wrong| format!("after revert to {name}: {wrong}; {as_it_is:?}"))?;
            self.busy.guest.lock().unwrap().now = taken.clone();
            return Ok(());
        }
        as_it_is
    }

    /// Follows the size of a disk after a request to grow it.
    fn follow_sizes(&mut self, operation: &Operation, done: bool) -> Result<(), String> {
        let Operation::Grow(volume, size) = operation else { return Ok(()) };
        let is = self.rig.lab.model().volume(volume).map(|volume| volume.active.virtual_size).unwrap();
        let mut guest = self.busy.guest.lock().unwrap();
        let content = guest.now.get_mut(volume).unwrap();
        if is != *size && (done || is != content.len() as u64) {
            return Err(format!("{volume} has {is} bytes, not {size}"));
        }
        content.resize(usize::try_from(is).unwrap(), 0);
        Ok(())
    }
}

impl Operation {
    fn name(&self) -> &str {
        match self {
            Self::Create(name, _) | Self::Revert(name) | Self::Delete(name) | Self::Grow(name, _) => name,
        }
    }
}

/// The number of outcomes over all schedules.
#[derive(Debug, Default)]
struct Reach {
    done: AtomicU32,
    failed: AtomicU32,
    completed: AtomicU32,
    undone: AtomicU32,
}

impl Reach {
    fn note(&self, done: bool, recovery: &Recovery) {
        let counter = match recovery {
            Recovery::Completed(_) => &self.completed,
            Recovery::Undone { .. } => &self.undone,
            _ if done => &self.done,
            _ => &self.failed,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn random_schedules_lose_no_data_and_can_be_settled() {
    let schedules = count("QCOW2_CHAIN_LIVE_SCHEDULES", 700);
    let reach = Arc::new(Reach::default());
    cases("schedules of a running VM", schedules, |rng| {
        let mut world = World::new(rng, Arc::clone(&reach));
        let steps = rng.within(4..12);
        for step in 0..steps {
            if rng.chance(1, 3) {
                world.power();
            }
            world.busy.work(3, 4);
            world.step(step + 1 == steps).unwrap_or_else(|wrong| panic!("step {step}: {wrong}"));
        }
    });
    // All outcomes occur.
    let each =
        |counter: &AtomicU32, least: u64| assert!(u64::from(counter.load(Ordering::Relaxed)) > least, "{reach:?}");
    each(&reach.done, 4 * schedules);
    each(&reach.failed, schedules / 5);
    each(&reach.completed, schedules / 2);
    each(&reach.undone, schedules / 25);
}
