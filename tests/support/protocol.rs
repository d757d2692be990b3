//! Operations that change files, told in one way, so that every crash and every fault of each can be looked at.

use std::collections::{BTreeMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use qcow2_chain::image::{CheckOptions, CreateOptions, Fix, Image, OpenOptions, check};
use qcow2_chain::storage::crash::{Barrier, Log, Recorder, RecorderOptions, Tree};
use qcow2_chain::storage::fault::{Fault, Faults, FaultyFileSystem, Plan, Reach};
use qcow2_chain::storage::{Access, FileSystem, MemoryStorage};

use super::qemu::Qemu;
use super::rng::{Rng, cases, count};

/// What is wrong with a state, in words.
pub type Verdict = Result<(), String>;

/// An operation, what it starts from, and what must hold whenever it is cut off.
pub trait Protocol {
    /// What messages call it.
    fn what(&self) -> String;

    /// The files that it starts from.
    fn start(&self) -> &Tree;

    /// How its storages behave.
    fn recorder(&self) -> RecorderOptions {
        RecorderOptions::default()
    }

    /// Does it. `promised` is called whenever something is durable from then on, as a caller was told.
    ///
    /// # Errors
    /// What the library says.
    fn run(&self, names: &Arc<dyn FileSystem>, promised: &dyn Fn()) -> Verdict;

    /// Whether these files may be left by a crash after so many promises.
    ///
    /// # Errors
    /// What may not be.
    fn judge(&self, tree: &Tree, promises: usize) -> Verdict;

    /// Whether all that was promised by then has happened: nothing is lost and nothing is left.
    ///
    /// # Errors
    /// What is missing.
    fn judge_kept(&self, tree: &Tree, promises: usize) -> Verdict;

    /// What is done about a crash: the operation again, or a repair.
    ///
    /// # Errors
    /// What the library says.
    fn recover(&self, names: &Arc<dyn FileSystem>) -> Verdict;

    /// Whether recovery has nothing to write where it was made already.
    fn settles(&self) -> bool {
        true
    }

    /// Whether these files are what recovery must lead to.
    ///
    /// # Errors
    /// What is not.
    fn judge_recovered(&self, tree: &Tree) -> Verdict;
}

/// Any error as words.
pub fn wrong(what: impl std::fmt::Debug) -> String {
    format!("{what:?}")
}

/// The image of this name, open.
///
/// # Errors
/// What the library says.
pub fn open(names: &dyn FileSystem, path: &str, write: bool) -> Result<Image, String> {
    let access = if write { Access::write() } else { Access::read() };
    let storage = names.open(Path::new(path), &access).map_err(wrong)?;
    Image::open(storage, &OpenOptions::default().with_write(write)).map_err(wrong)
}

/// The bytes of this name in memory.
///
/// # Errors
/// Where there is no such file.
pub fn memory(tree: &Tree, path: &str) -> Result<Arc<MemoryStorage>, String> {
    let bytes = tree.get(Path::new(path)).ok_or_else(|| format!("{path} is gone"))?;
    Ok(Arc::new(MemoryStorage::with_bytes(path, bytes)))
}

/// Nothing is corrupt; clusters may be leaked where `leaks` says so.
///
/// # Errors
/// What check finds.
pub fn assert_sound(tree: &Tree, path: &str, leaks: bool) -> Verdict {
    let report = check(&*memory(tree, path)?, &CheckOptions::default()).map_err(wrong)?;
    if (report.corruptions, report.check_errors) != (0, 0) || (!leaks && report.leaks > 0) {
        return Err(format!("{path}: {report:?}"));
    }
    Ok(())
}

/// `check -r` of a file.
///
/// # Errors
/// What the library says.
pub fn repair(names: &dyn FileSystem, path: &str, fix: Fix) -> Verdict {
    let storage = names.open(Path::new(path), &Access::write()).map_err(wrong)?;
    check(&*storage, &CheckOptions::default().with_fix(fix)).map(drop).map_err(wrong)
}

/// An operation that was done once, and its log.
struct Done<'a> {
    protocol: &'a dyn Protocol,
    log: Log,
}

/// How much of it is looked at.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Random subsets between two syncs.
    pub samples: usize,
    /// Recovery is made, and crashed in its turn, from one state of so many.
    pub recover_every: usize,
    /// The most such recoveries of one log.
    pub recoveries: usize,
    /// Whether it is also looked at what was durable at each promise.
    pub promises: bool,
}

impl Effort {
    pub const ORDINARY: Self = Self { samples: 8, recover_every: 16, recoveries: 3, promises: true };
}

/// The one state to look at, if the environment variable `QCOW2_CHAIN_STATE` names it.
fn only() -> Option<usize> {
    std::env::var("QCOW2_CHAIN_STATE").ok().map(|text| text.parse().expect("QCOW2_CHAIN_STATE is a number"))
}

impl<'a> Done<'a> {
    fn new(protocol: &'a dyn Protocol, sites: bool) -> Result<Self, String> {
        let recorder = Recorder::with(protocol.recorder().with_sites(sites));
        let names: Arc<dyn FileSystem> = Arc::new(recorder.names(protocol.start()));
        protocol.run(&names, &|| recorder.mark())?;
        recorder.mark();
        Ok(Self { protocol, log: recorder.log() })
    }

    /// Looks at every state. Returns how many there were, those of crashed recoveries included.
    fn judge(&self, log: &Log, seed: u64, effort: Effort) -> Result<usize, String> {
        let protocol = self.protocol;
        let (mut seen, mut nested, mut recoveries) = (HashSet::new(), 0, 0);
        let states = log.each_state(seed, effort.samples, |state| {
            if only().is_some_and(|only| only != state.number) {
                return Ok(());
            }
            let tree = state.tree();
            if !seen.insert(hash(&(&tree, state.marks))) {
                return Ok(());
            }
            let found = protocol.judge(&tree, state.marks).and_then(|()| {
                let number = state.number + usize::try_from(seed % 64).unwrap_or(0);
                let wanted = number.is_multiple_of(effort.recover_every) && recoveries < effort.recoveries;
                if wanted || only().is_some() {
                    recoveries += 1;
                    nested += self.recover(&tree, seed, state.marks)?;
                }
                Ok(())
            });
            found.map_err(|wrong| format!("QCOW2_CHAIN_STATE={}: {wrong}", state.number))
        })?;
        if effort.promises {
            self.judge_promises(log)?;
        }
        Ok(states + nested)
    }

    fn judge_promises(&self, log: &Log) -> Verdict {
        for promises in 1..=log.last().marks {
            let durable = log.up_to(promises - 1).durable().tree();
            let kept =
                self.protocol.judge(&durable, promises).and_then(|()| self.protocol.judge_kept(&durable, promises));
            kept.map_err(|wrong| format!("promise {promises} was not kept: {wrong}"))?;
        }
        Ok(())
    }

    /// Recovers from a state, and crashes that too: recovery from there leads to the same. Made once more, it does nothing.
    fn recover(&self, tree: &Tree, seed: u64, promises: usize) -> Result<usize, String> {
        let (log, recovered) = recovered_from(self.protocol, tree)?;
        self.protocol.judge_recovered(&recovered).map_err(|wrong| format!("recovered: {wrong}"))?;
        let (again, _) = recovered_from(self.protocol, &recovered)?;
        if self.protocol.settles() && !again.is_unchanged() {
            return Err("a recovery with nothing left to do wrote something".to_owned());
        }
        // Where there is no telling that it was done, it is begun again from nothing.
        let promises = if self.protocol.settles() { promises } else { 0 };
        let mut number = 0;
        log.each_state(seed, 2, |state| {
            number += 1;
            let tree = state.tree();
            let judged = self.protocol.judge(&tree, promises).and_then(|()| {
                if number % 5 != 0 {
                    return Ok(());
                }
                let (_, recovered) = recovered_from(self.protocol, &tree)?;
                self.protocol.judge_recovered(&recovered)
            });
            judged.map_err(|wrong| format!("recovery crashed, state {}: {wrong}", state.number))
        })
    }
}

fn recovered_from(protocol: &dyn Protocol, tree: &Tree) -> Result<(Log, Tree), String> {
    let recorder = Recorder::with(protocol.recorder());
    let names = Arc::new(recorder.names(tree));
    let seam: Arc<dyn FileSystem> = names.clone();
    protocol.recover(&seam).map_err(|wrong| format!("recovery fails: {wrong}"))?;
    let log = recorder.log();
    let durable = log.durable().tree();
    if durable != names.tree() {
        return Err("recovery returned Ok, but not all of it is durable".to_owned());
    }
    Ok((log, durable))
}

fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// The crash states that the ordinary run has looked at so far.
static STATES: AtomicU64 = AtomicU64::new(0);

/// Looks at every crash of random cases of an operation, and at a sample of them with `qemu-img check`. Returns how many
/// states there were.
pub fn crash<P: Protocol>(what: &str, usual: u64, effort: Effort, random: impl Fn(&mut Rng) -> P + Sync) -> u64 {
    let seen = AtomicU64::new(0);
    let factor = count("QCOW2_CHAIN_CRASH_CASES", 80);
    cases(what, (usual * factor).div_ceil(80), |rng| {
        let protocol = random(rng);
        let seed = rng.next_u64();
        let judged = Done::new(&protocol, false).and_then(|done| {
            let states = done.judge(&done.log, seed, effort)?;
            if rng.chance(1, 8) {
                ask_qemu(&done.log, seed)?;
            }
            Ok(states)
        });
        match judged {
            Ok(states) => seen.fetch_add(states as u64, Ordering::Relaxed),
            Err(wrong) => panic!("{}: {wrong}", protocol.what()),
        };
    });
    let seen = seen.into_inner();
    let all = STATES.fetch_add(seen, Ordering::Relaxed) + seen;
    println!("{what}: {seen} crash states; {all} in this run so far");
    seen
}

/// Lets QEMU judge one state of a log: clusters may be leaked, nothing may be worse, for every image in it.
fn ask_qemu(log: &Log, seed: u64) -> Verdict {
    let Some(qemu) = Qemu::find() else { return Ok(()) };
    let states = log.each_state(seed, 8, |_| Ok::<(), ()>(())).unwrap_or(1) as u64;
    let chosen = usize::try_from(seed % states).unwrap_or(0);
    let directory = tempfile::tempdir().map_err(wrong)?;
    log.each_state(seed, 8, |state| {
        if state.number != chosen {
            return Ok(());
        }
        let tree = state.tree();
        let path = |file: &Path| directory.path().join(file.file_name().unwrap_or_default());
        for (file, bytes) in &tree {
            std::fs::write(path(file), bytes).map_err(wrong)?;
        }
        for (file, bytes) in &tree {
            let sound = check(&MemoryStorage::with_bytes("state", bytes), &CheckOptions::default());
            let Ok(report) = sound else { continue };
            if report.check_errors > 0 || !put_backing(bytes, directory.path())? {
                continue;
            }
            let theirs = qemu.check(&path(file), None);
            let expected = (report.corruptions, report.leaks);
            if !matches!(theirs.code, 0 | 2 | 3) || (theirs.corruptions, theirs.leaks) != expected {
                return Err(format!("QEMU says {theirs:?} of state {chosen}, we say {expected:?}"));
            }
        }
        Ok(())
    })
    .map(drop)
}

/// Sees to it that an image's backing file is there: QEMU wants to open it. Tells whether that can be done.
fn put_backing(bytes: &[u8], directory: &Path) -> Result<bool, String> {
    let storage = Arc::new(MemoryStorage::with_bytes("state", bytes));
    let Ok(image) = Image::open(storage, &OpenOptions::default()) else { return Ok(false) };
    let header = image.header();
    let Some(name) = header.backing_file.as_deref() else { return Ok(true) };
    let Some(name) = std::str::from_utf8(name)
        .ok()
        .filter(|name| name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit()))
    else {
        return Ok(false);
    };
    let path = directory.join(name);
    if name.len() > 100 || header.backing_format().is_none_or(|format| format.len() > 5) {
        return Ok(false);
    }
    if !path.exists() {
        let empty = Arc::new(MemoryStorage::new("empty"));
        if header.backing_format() == Some(b"qcow2") {
            Image::create(empty.clone(), &CreateOptions::new(512)).map_err(wrong)?;
        }
        std::fs::write(path, empty.to_vec()).map_err(wrong)?;
    }
    Ok(true)
}

/// A barrier's name: the file, and what the line that calls for it says of itself.
pub fn name_of(barrier: &Barrier) -> String {
    let Some(frame) = barrier.site.as_ref().and_then(|site| site.frames.first()) else { return "unknown".to_owned() };
    let source = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(&frame.file)).unwrap_or_default();
    let line = source.lines().nth(frame.line.saturating_sub(1) as usize).unwrap_or_default();
    format!("{}: {}", frame.file, line.trim())
}

/// How often each barrier, by its name, was taken out, and in how many of these runs something was found.
pub type Proofs = BTreeMap<String, (usize, usize)>;

/// How often a barrier is taken out before it counts as unproved.
const MOST_TRIES: usize = 40;

/// Takes each barrier out of random cases of an operation, all its calls at once; not those that others cover.
pub fn take_out<P: Protocol>(
    what: &str,
    usual: u64,
    covered: impl Fn(&str) -> bool + Sync,
    random: impl Fn(&mut Rng) -> P + Sync,
) -> Proofs {
    let begun = std::time::Instant::now();
    let proofs: Mutex<Proofs> = Mutex::default();
    let effort = Effort { samples: 4, recover_every: 4, recoveries: 3, promises: true };
    cases(what, usual, |rng| {
        let protocol = random(rng);
        let seed = rng.next_u64();
        let done = Done::new(&protocol, true).unwrap_or_else(|wrong| panic!("{}: {wrong}", protocol.what()));
        let mut sites: BTreeMap<String, HashSet<usize>> = BTreeMap::new();
        for barrier in done.log.barriers() {
            sites.entry(name_of(&barrier)).or_default().insert(barrier.number);
        }
        for (name, numbers) in sites.into_iter().filter(|(name, _)| !covered(name)) {
            // One proof is enough, and most are found by the first run.
            if proofs.lock().unwrap().get(&name).is_some_and(|(proved, runs)| *proved > 0 || *runs >= MOST_TRIES) {
                continue;
            }
            let without = done.log.without(|number| numbers.contains(&number));
            let proved = done.judge(&without, seed, effort).is_err();
            let mut proofs = proofs.lock().unwrap();
            let (found, runs) = proofs.entry(name).or_default();
            *found += usize::from(proved);
            *runs += 1;
        }
    });
    let proofs = proofs.into_inner().unwrap();
    println!("{what}: {:?}", begun.elapsed());
    for (name, (proved, runs)) in &proofs {
        println!("{proved:4} of {runs:3}  {name}");
    }
    proofs
}

/// What became of a run with a fault in it.
enum Ended {
    /// The fault's turn never came.
    Through,
    Failed,
    /// A call failed that could be done without, such as the punching of a hole.
    Survived,
}

/// Runs an operation with one fault; then everything that must hold.
fn with_fault(protocol: &dyn Protocol, plan: Plan, at: u64, seed: u64) -> Result<Ended, String> {
    let recorder = Recorder::with(protocol.recorder());
    let inner = Arc::new(recorder.names(protocol.start()));
    let faults = Faults::new(plan);
    let names: Arc<dyn FileSystem> = Arc::new(FaultyFileSystem::new(inner.clone(), &faults));
    let result = protocol.run(&names, &|| recorder.mark());
    if faults.calls() <= at {
        result.map_err(|error| format!("without a fault: {error}"))?;
        return Ok(Ended::Through);
    }
    let log = recorder.log();
    let promises = log.last().marks;
    protocol.judge(&inner.tree(), promises)?;
    let (_, recovered) = recovered_from(protocol, &inner.tree())?;
    protocol.judge_recovered(&recovered)?;
    // Whatever was on its way then: a power failure on top of it does no harm.
    log.each_state(seed, 1, |state| protocol.judge(&state.tree(), state.marks))?;
    match result {
        Ok(()) => {
            recorder.mark();
            let log = recorder.log();
            protocol.judge_kept(&log.durable().tree(), promises + 1)?;
            Ok(Ended::Survived)
        }
        Err(error) if is_expected(&error) => Ok(Ended::Failed),
        Err(error) => Err(format!("an unexpected error: {error}")),
    }
}

/// The error is the one that was injected, or one that follows from it.
fn is_expected(error: &str) -> bool {
    ["injected", "NoSpace", "Poisoned"].iter().any(|known| error.contains(known))
}

/// Faults that are worth trying at the same call.
fn plans(rng: &mut Rng, at: u64) -> Vec<Plan> {
    let reach = rng.pick(&[Reach::Nothing, Reach::Half, Reach::All]);
    let some = rng.pick(&[Reach::Nothing, Reach::Half]);
    let plans = [
        Fault::Io.at(at).with_reach(reach),
        Fault::Io.at(at).with_reach(reach).ever_after(),
        Fault::NoSpace.at(at).with_reach(some),
        Fault::NoSpace.at(at).with_reach(some).ever_after(),
        Fault::Interrupted.at(at).with_reach(some),
        Fault::Sync.at(at),
        Fault::Sync.at(at).ever_after(),
    ];
    plans.to_vec()
}

/// Fails call after call of random cases of an operation, in every way. Returns how many calls failed so that the operation
/// did too.
pub fn break_all<P: Protocol>(what: &str, usual: u64, random: impl Fn(&mut Rng) -> P + Sync) -> u64 {
    let failures = AtomicU64::new(0);
    let factor = count("QCOW2_CHAIN_CRASH_CASES", 80);
    cases(what, (usual * factor).div_ceil(80), |rng| {
        let protocol = random(rng);
        let mut through = [false; 7];
        for at in 0.. {
            for (kind, plan) in plans(rng, at).into_iter().enumerate() {
                if through[kind] {
                    continue;
                }
                match with_fault(&protocol, plan, at, rng.next_u64()) {
                    Ok(Ended::Through) => {}
                    Ok(Ended::Failed) => {
                        failures.fetch_add(1, Ordering::Relaxed);
                        continue;
                    }
                    Ok(Ended::Survived) => continue,
                    Err(wrong) => panic!("{}, {plan:?}: {wrong}", protocol.what()),
                }
                through[kind] = true;
            }
            if through == [true; 7] {
                break;
            }
        }
    });
    let failures = failures.into_inner();
    println!("{what}: {failures} failed");
    failures
}
