//! Power failures at every instant of a VM's operations, of contents and of names. Before recovery the
//! VM can be started. After it, all volumes are as before or as afterwards, nothing leaks, and no file
//! is left over. Recovery is crashed in its turn.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use qcow2_chain::storage::crash::{Log, Recorder, RecorderOptions, State};
use qcow2_chain::storage::fault::{Fault, Faults, FaultyFileSystem, Plan};
use qcow2_chain::storage::{FileSystem, MemoryFileSystem};
use qcow2_chain::vm::Recovery;

use crate::support::lab::{Contents, Lab, LabShape};
use crate::support::rng::{Rng, cases, count};

mod shapes;

use shapes::{SHAPES, SIZE, Shape};

/// An operation, the files at its start, and the expectations before and after it.
struct Case {
    shape: Shape,
    start: MemoryFileSystem,
    before: Lab,
    after: Lab,
}

impl Case {
    fn random(rng: &mut Rng, shape: Shape) -> Self {
        let lab_shape = LabShape { volumes: 2, size: SIZE, cluster_bits: 9, extended_l2: false, raw: rng.chance(1, 3) };
        let files = Arc::new(MemoryFileSystem::new());
        let mut before = Lab::new(files.clone(), Path::new("/vm"), lab_shape, rng);
        shape.prepare(&mut before, &files, rng);
        let start = files.copy();
        let mut after = before.on(Arc::new(start.copy())).expect("the VM loads");
        shape.expect(&mut after, &before);
        Self { shape, start, before, after }
    }

    /// Does the operation under a recorder.
    fn record(&self, sites: bool) -> Log {
        let options = RecorderOptions::default().with_torn(".journal").with_torn("vm.json").with_sites(sites);
        let recorder = Recorder::with(options);
        let lab = self.before.on(Arc::new(recorder.file_system(&self.start))).expect("it loads");
        self.shape.run(&lab).unwrap_or_else(|error| panic!("{:?}: {error}", self.shape));
        recorder.mark();
        recorder.log()
    }

    fn contents(&self) -> [&Contents; 2] {
        [&self.before.now, &self.after.now]
    }

    /// Checks that a VM could start before recovery: all volumes are as before or all as afterwards, and no image is corrupt.
    fn judge_unrecovered(&self, lab: &Lab) -> Result<(), String> {
        let [before, after] = self.contents().map(|now| lab.can_start(now));
        // An image is resized before the catalogue records it.
        before.or(after)?;
        lab.check_files(false)
    }

    /// Checks that after recovery all is as before or all as afterwards; as afterwards if `Ok` was promised.
    fn judge_recovered(&self, lab: &Lab, promised: bool) -> Result<(), String> {
        let afterwards = lab.check_against(&self.after);
        let good = match afterwards {
            Err(_) if !promised => lab
                .check_against(&self.before)
                .map_err(|before| format!("neither before ({before}) nor after ({})", afterwards.unwrap_err())),
            judged => judged,
        };
        good?;
        if promised {
            self.shape.check_promise(lab)?;
        }
        lab.check_files(true)
    }

    /// Judges a state, recovers it, judges it again, and checks that a second recovery writes nothing.
    fn judge(&self, state: &MemoryFileSystem, promised: bool) -> Result<(), String> {
        let names = Arc::new(state.copy());
        let lab = self.before.on(names.clone())?;
        if promised && lab.set.pending().map_err(|error| error.to_string())?.is_some() {
            return Err("the operation returned Ok and is pending".to_owned());
        }
        self.judge_unrecovered(&lab)?;
        lab.set.recover(&()).map_err(|error| format!("recovery: {error}"))?;
        self.judge_recovered(&lab, promised).map_err(|wrong| format!("recovered: {wrong}"))?;
        let recovered = names.to_map();
        match lab.set.recover(&()) {
            Ok(Recovery::Clean) if names.to_map() == recovered => Ok(()),
            other => Err(format!("a second recovery writes: {other:?}")),
        }
    }

    /// Judges one of each `every` states, and every state of the recovery of each `nested`th of them.
    fn judge_all(&self, log: &Log, seed: u64, samples: usize, every: usize, nested: usize) -> Result<usize, String> {
        let durable = log.durable();
        self.judge(&durable.file_system(), durable.marks > 0).map_err(|wrong| format!("after Ok: {wrong}"))?;
        let mut more = 0;
        let judged = log.each_state(seed, samples, |state: &State| {
            if state.number % every != usize::try_from(seed).unwrap_or_default() % every {
                return Ok(());
            }
            let said = |wrong| format!("state {}: {wrong}", state.number);
            self.judge(&state.file_system(), state.marks > 0).map_err(said)?;
            if nested > 0 && (state.number / every).is_multiple_of(nested) {
                more += self.judge_recovery(&state.file_system(), seed, every, state.marks > 0).map_err(said)?;
            }
            Ok::<(), String>(())
        })?;
        Ok(judged + more)
    }

    fn judge_recovery(
        &self,
        state: &MemoryFileSystem,
        seed: u64,
        every: usize,
        promised: bool,
    ) -> Result<usize, String> {
        let recorder = Recorder::with(RecorderOptions::default().with_torn(".journal").with_torn("vm.json"));
        let lab = self.before.on(Arc::new(recorder.file_system(state)))?;
        lab.set.recover(&()).map_err(|error| format!("recorded recovery: {error}"))?;
        recorder.log().each_state(seed, 1, |state| {
            if state.number % every != 0 {
                return Ok(());
            }
            self.judge(&state.file_system(), promised)
                .map_err(|wrong| format!("recovery crashed in state {}: {wrong}", state.number))
        })
    }
}

/// Returns the number of states of which one is judged: 1 if the environment asks for more cases.
fn every() -> usize {
    if std::env::var_os("QCOW2_CHAIN_CRASH_CASES").is_some() { 1 } else { 4 }
}

/// Runs `case` for each shape, several times if the environment asks for more cases.
fn each_shape(what: &str, case: impl Fn(&mut Rng, Shape) + Sync) {
    for shape in SHAPES {
        cases(&format!("{what} of {shape:?}"), count("QCOW2_CHAIN_CRASH_CASES", 1), |rng| case(rng, shape));
    }
}

#[test]
fn crash_at_any_point_vm_starts_and_recovers() {
    each_shape("crashes", |rng, shape| {
        let case = Case::random(rng, shape);
        let judged = case.judge_all(&case.record(false), rng.next_u64() >> 8, 1, every(), 61);
        let judged = judged.unwrap_or_else(|wrong| panic!("{shape:?}: {wrong}"));
        println!("{shape:?}: {judged} states");
    });
}

/// The barriers of the tier without which no run fails, with the reason why they stay.
const COVERED: [(&str, &str); 4] = [
    ("journal.rs: Ok(self.file_system.sync_dir(directory_of(&self.path))?)", SETTLE),
    ("journal.rs: self.storage.sync()?;", SETTLE),
    ("catalogue.rs: self.file_system.sync_dir(directory)?;", SETTLE),
    ("files.rs: storage.sync()?;", "the repair synced before; this sync does not rely on that"),
];
const SETTLE: &str = "a cancellation settles journal and catalogue, which are durable when the case starts; see \
                      recovery_after_failure_settles_before_it_builds";

#[test]
fn any_barrier_removed_some_state_fails() {
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
    let covered = |site: &str| COVERED.iter().any(|(line, _)| site.ends_with(line));
    let unproved: Vec<_> = proofs.iter().filter(|(site, (proved, _))| *proved == 0 && !covered(site)).collect();
    assert!(unproved.is_empty(), "no run fails without: {unproved:#?}");
}

#[test]
fn any_call_fails_vm_starts_and_recovers() {
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
            let names = Arc::new(recorder.file_system(&case.start));
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
            for left in [recorder.log().last(), recorder.log().durable()].map(|state| state.file_system()) {
                let judged = case.judge(&left, promised);
                judged.unwrap_or_else(|wrong| panic!("{shape:?}, {plan:?}, call {call}: {wrong} (it said {done:?})"));
            }
        }
        assert!(failed > 1, "{shape:?}: {failed} calls failed");
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
        let names = Arc::new(recorder.file_system(&self.start));
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
            let lab = self.before.on(Arc::new(state.file_system()))?;
            if state.marks > 1 && lab.set.pending().map_err(|error| error.to_string())?.is_some() {
                return Err("recovery returned Ok, and an operation is pending".to_owned());
            }
            self.judge(&state.file_system(), false)
        })
    }
}

#[test]
fn recovery_after_failure_settles_before_it_builds() {
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
