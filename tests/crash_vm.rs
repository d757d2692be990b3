//! Power failures at every instant of a VM's operations, bytes and names alike: before recovery the VM can be started, after it all
//! volumes are as before or as afterwards, nothing leaks, and nothing is left over. Recovery is crashed in its turn.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use qcow2_chain::merge::Direction;
use qcow2_chain::storage::crash::{Log, Recorder, RecorderOptions, State, Tree};
use qcow2_chain::storage::fault::{Fault, Faults, FaultyFileSystem, Plan};
use qcow2_chain::storage::{FileSystem, MemoryFileSystem, MemoryStorage};
use qcow2_chain::vm::{self, MergeOptions, Recovery};

use crate::support::lab::{Contents, Lab, LabShape};
use crate::support::rng::{Rng, cases, count};

/// An operation on a VM that was brought into a state in which it has something to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    Create,
    Revert,
    /// Reverting leaves a hidden snapshot with one thing on it, which is merged.
    RevertAndMerge(Direction),
    /// Nothing stands on the snapshot.
    DeleteLeaf,
    /// Nothing stands on it, and a hidden one beneath is then merged with another snapshot.
    DeleteLeafAndMerge(Direction),
    /// Nothing stands on it, and a hidden one beneath is then merged with the volumes.
    DeleteLeafAndMergeCurrent(Direction),
    /// A snapshot stands on it, and two things on that.
    DeleteInner(Direction),
    DeleteCurrent(Direction),
    /// Several things stand on it.
    Hide,
    Grow,
    Shrink,
}

const SHAPES: [Shape; 16] = [
    Shape::Create,
    Shape::Revert,
    Shape::RevertAndMerge(Direction::Commit),
    Shape::RevertAndMerge(Direction::Pull),
    Shape::DeleteLeaf,
    Shape::DeleteLeafAndMerge(Direction::Commit),
    Shape::DeleteLeafAndMerge(Direction::Pull),
    Shape::DeleteLeafAndMergeCurrent(Direction::Commit),
    Shape::DeleteLeafAndMergeCurrent(Direction::Pull),
    Shape::DeleteInner(Direction::Commit),
    Shape::DeleteInner(Direction::Pull),
    Shape::DeleteCurrent(Direction::Commit),
    Shape::DeleteCurrent(Direction::Pull),
    Shape::Hide,
    Shape::Grow,
    Shape::Shrink,
];

const SIZE: u64 = 2048;

impl Shape {
    fn direction(self) -> Direction {
        match self {
            Self::RevertAndMerge(direction)
            | Self::DeleteLeafAndMerge(direction)
            | Self::DeleteLeafAndMergeCurrent(direction)
            | Self::DeleteInner(direction)
            | Self::DeleteCurrent(direction) => direction,
            _ => Direction::Commit,
        }
    }

    /// What is done before: each word an operation, with the guest writing in between.
    fn before(self) -> &'static [&'static str] {
        match self {
            Self::Create | Self::Grow | Self::Shrink => &["+s1"],
            Self::Revert => &["+s1", "+s2"],
            Self::RevertAndMerge(_) => &["+s1", "+s2", "=s1", "-s1"],
            Self::DeleteLeaf => &["+s1", "+s2", "=s1"],
            Self::DeleteLeafAndMerge(_) => &["+s1", "+s2", "=s1", "+s3", "-s1"],
            Self::DeleteLeafAndMergeCurrent(_) => &["+s1", "+s2", "=s1", "-s1"],
            Self::DeleteInner(_) => &["+s1", "+s2", "+s3", "=s2"],
            Self::DeleteCurrent(_) => &["+s1"],
            Self::Hide => &["+s1", "+s2", "=s1"],
        }
    }

    fn run(self, lab: &Lab) -> vm::Result<()> {
        let options = MergeOptions::default().with_direction(self.direction());
        match self {
            Self::Create => lab.set.create("new", &Default::default()),
            Self::Revert => lab.set.revert("s1", &options, &()),
            Self::RevertAndMerge(_) => lab.set.revert("s2", &options, &()),
            Self::DeleteLeaf | Self::DeleteLeafAndMerge(_) | Self::DeleteLeafAndMergeCurrent(_) => {
                lab.set.delete("s2", &options, &())
            }
            Self::DeleteInner(_) | Self::DeleteCurrent(_) | Self::Hide => lab.set.delete("s1", &options, &()),
            Self::Grow => lab.set.resize("vda", SIZE + 1024, false),
            Self::Shrink => lab.set.resize("vda", SIZE - 1024, true),
        }
        .map(|_| ())
    }

    /// What is expected once it is done.
    fn expect(self, lab: &mut Lab) {
        match self {
            Self::Create => drop(lab.taken.insert("new".to_owned(), lab.now.clone())),
            Self::Revert => lab.now = lab.taken["s1"].clone(),
            Self::RevertAndMerge(_) => lab.now = lab.taken["s2"].clone(),
            Self::DeleteLeaf | Self::DeleteLeafAndMerge(_) | Self::DeleteLeafAndMergeCurrent(_) => {
                drop(lab.taken.remove("s2"));
            }
            Self::DeleteInner(_) | Self::DeleteCurrent(_) | Self::Hide => drop(lab.taken.remove("s1")),
            Self::Grow => lab.now.get_mut("vda").unwrap().resize(usize::try_from(SIZE).unwrap() + 1024, 0),
            Self::Shrink => lab.now.get_mut("vda").unwrap().truncate(usize::try_from(SIZE).unwrap() - 1024),
        }
    }
}

fn tree(names: &dyn FileSystem) -> Tree {
    let paths = names.list(Path::new("/vm")).expect("listed");
    let bytes = |path: &Path| {
        let storage = names.open(path, &qcow2_chain::storage::Access::read()).expect("opened");
        let mut bytes = vec![0; usize::try_from(storage.len().unwrap()).unwrap()];
        storage.read_at(&mut bytes, 0).unwrap();
        bytes
    };
    paths.into_iter().map(|path| (path.clone(), bytes(&path))).collect()
}

fn names_of(tree: &Tree) -> Arc<MemoryFileSystem> {
    let names = MemoryFileSystem::new();
    for (path, bytes) in tree {
        names.insert(path, Arc::new(MemoryStorage::with_bytes(path.display().to_string(), bytes)));
    }
    Arc::new(names)
}

/// An operation, what it starts from, and what is expected before and after it.
struct Case {
    shape: Shape,
    start: Tree,
    before: Lab,
    after: Lab,
}

impl Case {
    fn random(rng: &mut Rng, shape: Shape) -> Self {
        let raw = rng.chance(1, 3) && shape.direction() == Direction::Commit;
        let lab_shape = LabShape { volumes: 2, size: SIZE, cluster_bits: 9, extended_l2: false, raw };
        let names = Arc::new(MemoryFileSystem::new());
        let mut lab = Lab::new(names.clone(), Path::new("/vm"), lab_shape, rng);
        for step in shape.before() {
            if rng.chance(1, 6) {
                lab.resize("vdb", rng.within(2..8) * 512);
            }
            lab.write_all(rng);
            let name = &step[1..];
            match &step[..1] {
                "+" => lab.create(name),
                "=" => lab.revert(name),
                _ => lab.delete(name),
            }
        }
        lab.write_all(rng);
        lab.check().expect("what it starts from");
        let start = tree(&*names);
        let mut after = lab.on(names_of(&start)).unwrap();
        shape.expect(&mut after);
        Self { shape, start, before: lab, after }
    }

    /// The operation done under a recorder.
    fn record(&self, sites: bool) -> Log {
        let options = RecorderOptions::default().with_torn(".journal").with_torn("vm.json").with_sites(sites);
        let recorder = Recorder::with(options);
        let lab = self.before.on(Arc::new(recorder.names(&self.start))).expect("it loads");
        self.shape.run(&lab).unwrap_or_else(|error| panic!("{:?}: {error}", self.shape));
        recorder.mark();
        recorder.log()
    }

    fn contents(&self) -> [&Contents; 2] {
        [&self.before.now, &self.after.now]
    }

    /// Before recovery: a VM could start, from volumes that agree on whether it has happened, and no image is corrupt.
    fn judge_unrecovered(&self, lab: &Lab) -> Result<(), String> {
        let [before, after] = self.contents().map(|now| lab.can_start(now));
        // A resize has happened to the image before the catalogue knows.
        before.or(after)?;
        lab.check_files(false)
    }

    /// After recovery: all as before, or all as afterwards; where `Ok` was said, as afterwards.
    fn judge_recovered(&self, lab: &Lab, promised: bool) -> Result<(), String> {
        let afterwards = lab.check_against(&self.after.taken, &self.after.now);
        let good = match afterwards {
            Err(_) if !promised => lab
                .check_against(&self.before.taken, &self.before.now)
                .map_err(|before| format!("neither before ({before}) nor after ({})", afterwards.unwrap_err())),
            judged => judged,
        };
        good?;
        lab.check_files(true)
    }

    /// Judges a state, recovers it, judges again, and sees that a second recovery writes nothing.
    fn judge(&self, state: &Tree, promised: bool) -> Result<(), String> {
        let names = names_of(state);
        let lab = self.before.on(names.clone())?;
        if promised && lab.set.pending().map_err(|error| error.to_string())?.is_some() {
            return Err("it was said to be done and is not ended".to_owned());
        }
        self.judge_unrecovered(&lab)?;
        lab.set.recover(&()).map_err(|error| format!("recovery: {error}"))?;
        self.judge_recovered(&lab, promised).map_err(|wrong| format!("recovered: {wrong}"))?;
        let recovered = tree(&*names);
        match lab.set.recover(&()) {
            Ok(Recovery::Clean) if tree(&*names) == recovered => Ok(()),
            other => Err(format!("a second recovery is not idle: {other:?}")),
        }
    }

    /// One of each `every` states, and, of every `nested`th of them, every state of its recovery.
    fn judge_all(&self, log: &Log, seed: u64, samples: usize, every: usize, nested: usize) -> Result<usize, String> {
        let durable = log.durable();
        self.judge(&durable.tree(), durable.marks > 0).map_err(|wrong| format!("after Ok: {wrong}"))?;
        let mut more = 0;
        let judged = log.each_state(seed, samples, |state: &State| {
            if state.number % every != usize::try_from(seed).unwrap_or_default() % every {
                return Ok(());
            }
            let said = |wrong| format!("state {}: {wrong}", state.number);
            self.judge(&state.tree(), state.marks > 0).map_err(said)?;
            if nested > 0 && (state.number / every).is_multiple_of(nested) {
                more += self.judge_recovery(&state.tree(), seed, every, state.marks > 0).map_err(said)?;
            }
            Ok::<(), String>(())
        })?;
        Ok(judged + more)
    }

    fn judge_recovery(&self, state: &Tree, seed: u64, every: usize, promised: bool) -> Result<usize, String> {
        let recorder = Recorder::with(RecorderOptions::default().with_torn(".journal").with_torn("vm.json"));
        let lab = self.before.on(Arc::new(recorder.names(state)))?;
        lab.set.recover(&()).map_err(|error| format!("recorded recovery: {error}"))?;
        recorder.log().each_state(seed, 1, |state| {
            if state.number % every != 0 {
                return Ok(());
            }
            self.judge(&state.tree(), promised)
                .map_err(|wrong| format!("recovery crashed in state {}: {wrong}", state.number))
        })
    }
}

/// Of how many states one is judged: of all, where more cases are asked for.
fn every() -> usize {
    if std::env::var_os("QCOW2_CHAIN_CRASH_CASES").is_some() { 1 } else { 4 }
}

/// Runs `case` for each shape; so many times, where the environment says so.
fn each_shape(what: &str, case: impl Fn(&mut Rng, Shape) + Sync) {
    for shape in SHAPES {
        cases(&format!("{what} of {shape:?}"), count("QCOW2_CHAIN_CRASH_CASES", 1), |rng| case(rng, shape));
    }
}

#[test]
fn every_crash_leaves_a_vm_that_starts_and_recovers() {
    each_shape("crashes", |rng, shape| {
        let case = Case::random(rng, shape);
        let judged = case.judge_all(&case.record(false), rng.next_u64() >> 8, 1, every(), 61);
        let judged = judged.unwrap_or_else(|wrong| panic!("{shape:?}: {wrong}"));
        println!("{shape:?}: {judged} states");
    });
}

/// The barriers of this floor that no run fails without, and why they stay.
const COVERED: [(&str, &str); 0] = [];

#[test]
fn every_barrier_of_the_floor_is_needed() {
    let proofs = Mutex::new(BTreeMap::<String, (usize, usize)>::new());
    each_shape("barriers", |rng, shape| {
        let case = Case::random(rng, shape);
        let log = case.record(true);
        for barrier in log.barriers() {
            let site = barrier.site.expect("sites are noted");
            let Some(frame) = site.frames.first().filter(|frame| frame.file.contains("src/vm/")) else { continue };
            let source = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(&frame.file)).unwrap();
            let line = source.lines().nth(frame.line as usize - 1).unwrap_or_default().trim().to_owned();
            let name = format!("{}: {line}", frame.file);
            let known = proofs.lock().unwrap().get(&name).is_some_and(|(proved, _)| *proved > 0);
            // Once is enough to show that a barrier is needed.
            let proved =
                known || case.judge_all(&log.without(|n| n == barrier.number), rng.next_u64() >> 8, 1, 1, 0).is_err();
            let mut proofs = proofs.lock().unwrap();
            let (proved_by, runs) = proofs.entry(name).or_default();
            *proved_by += usize::from(proved);
            *runs += 1;
        }
    });
    let proofs = proofs.into_inner().unwrap();
    for (site, (proved, runs)) in &proofs {
        println!("{proved:5} of {runs:5}  {site}");
    }
    let covered = |site: &str| COVERED.iter().any(|(line, _)| site.contains(line));
    let unproved: Vec<_> = proofs.iter().filter(|(site, (proved, _))| *proved == 0 && !covered(site)).collect();
    assert!(unproved.is_empty(), "no run fails without: {unproved:#?}");
}

#[test]
fn every_failing_call_leaves_a_vm_that_recovers() {
    each_shape("failing calls", |rng, shape| {
        let case = Case::random(rng, shape);
        let mut failed = 0;
        // A part of the calls, unless more is asked for.
        let step = rng.within(1..every() as u64 + 1);
        for call in (0..).map(|number| number * step + 3 % step) {
            let fault = rng.pick(&[Fault::Io, Fault::Io, Fault::NoSpace]);
            let plan = if rng.chance(1, 2) { fault.at(call) } else { fault.at(call).ever_after() };
            let faults = Faults::new(plan);
            let recorder = Recorder::new();
            let names = Arc::new(recorder.names(&case.start));
            let faulty: Arc<dyn FileSystem> = Arc::new(FaultyFileSystem::new(names.clone(), &faults));
            let lab = match case.before.on(faulty) {
                Ok(lab) => lab,
                Err(_) => continue, // the catalogue could not be read
            };
            let done = shape.run(&lab);
            let promised = done.is_ok();
            failed += usize::from(!promised);
            if faults.calls() <= call && fault == Fault::Io {
                done.unwrap_or_else(|error| panic!("{shape:?}: nothing failed: {error}"));
                break;
            }
            // What it left, and what of that survives a power failure on top of it.
            for left in [tree(&*names), recorder.log().durable().tree()] {
                let judged = case.judge(&left, promised);
                judged.unwrap_or_else(|wrong| panic!("{shape:?}, {plan:?}, call {call}: {wrong} (it said {done:?})"));
            }
        }
        assert!(failed > 3, "{shape:?}: {failed} calls failed");
    });
}

/// The syncs of recovery that make durable what it sees, by their source lines: whether a state shows that they are needed. Journal
/// and catalogue lie in one directory here, so that the sync of it for the one covers the other's.
type Settled = Mutex<BTreeMap<String, bool>>;

impl Case {
    /// The operation fails by a fault; the same system recovers; then power fails, during the recovery or after it. Tells
    /// whether the fault came to pass.
    fn fail_and_recover(&self, plan: Plan, settled: &Settled) -> bool {
        let faults = Faults::new(plan);
        let recorder = Recorder::with(RecorderOptions::default().with_sites(true));
        let names = Arc::new(recorder.names(&self.start));
        let Ok(lab) = self.before.on(Arc::new(FaultyFileSystem::new(names.clone(), &faults))) else { return true };
        if self.shape.run(&lab).is_ok() {
            return false;
        }
        let failed_at = recorder.log().barriers().len();
        recorder.mark();
        self.before.on(names).unwrap().set.recover(&()).unwrap();
        recorder.mark();
        let log = recorder.log();
        self.judge_after_failure(&log).unwrap_or_else(|wrong| panic!("{:?}, {plan:?}: {wrong}", self.shape));
        for barrier in log.barriers().into_iter().skip(failed_at) {
            let site = barrier.site.expect("sites are noted");
            let Some(frame) = site.frames.iter().find(|frame| frame.file.contains("src/vm/")) else { continue };
            if frame.function.ends_with("::settle") {
                let name = format!("{}:{}", frame.file, frame.line);
                let known = settled.lock().unwrap().get(&name).copied().unwrap_or_default();
                let needed =
                    known || self.judge_after_failure(&log.without(|number| number == barrier.number)).is_err();
                settled.lock().unwrap().insert(name, needed);
            }
        }
        true
    }

    fn judge_after_failure(&self, log: &Log) -> Result<usize, String> {
        log.each_state(7, 1, |state| {
            if state.marks == 0 {
                return Ok(()); // before anything failed
            }
            let lab = self.before.on(names_of(&state.tree()))?;
            if state.marks > 1 && lab.set.pending().map_err(|error| error.to_string())?.is_some() {
                return Err("recovery was said to be done".to_owned());
            }
            self.judge(&state.tree(), false)
        })
    }
}

#[test]
fn recovery_builds_on_nothing_that_may_be_lost() {
    let settled = Settled::default();
    each_shape("failures and recoveries", |rng, shape| {
        let quick = every() > 1;
        if quick && !matches!(shape, Shape::DeleteLeaf | Shape::Revert) {
            return; // a part of the shapes and calls, unless more is asked for
        }
        let case = Case::random(rng, shape);
        let step = if quick { 5 } else { 1 };
        (0..).take_while(|&call| case.fail_and_recover(Fault::Sync.at(call), &settled)).for_each(drop);
        let calls = (0..).map(|number| number * step);
        calls.take_while(|&call| case.fail_and_recover(Fault::Io.at(call).ever_after(), &settled)).for_each(drop);
    });
    println!("{settled:?}");
}
