//! Calls to the storage that fail, one after the other: a merge says so, the guest's disk stays, and the next run on
//! healthy storage completes it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use qcow2_chain::merge::Error;
use qcow2_chain::storage::crash::{Recorder, RecordingStorage};
use qcow2_chain::storage::fault::{Fault, Faults, FaultyStorage, Plan, Reach};
use qcow2_chain::storage::{self, Storage};
use qcow2_chain::{chain, image};

use crate::support::rng::{Rng, cases, count};
use crate::support::stack::{Merge, Stack, Verdict, content};

/// A chain, a merge to be made of it, and what must come out.
struct Subject {
    stack: Stack,
    merge: Merge,
    before: Vec<u8>,
    beneath: Vec<u8>,
}

/// What became of one run.
enum Ended {
    /// The fault's turn never came.
    Through,
    /// The merge failed.
    Failed,
    /// A call failed that the merge could do without, such as the punching of a hole.
    Survived,
}

impl Subject {
    fn random(rng: &mut Rng) -> Self {
        let depth = usize::try_from(rng.within(2..4)).unwrap();
        let stack = Stack::random(rng, depth);
        let merge = Merge::random(rng, depth);
        let before = stack.content().expect("the chain reads");
        let beneath = merge.beneath(&stack);
        Self { stack, merge, before, beneath }
    }

    /// The merge with one fault; then everything that must hold.
    fn run(&self, plan: Plan, at: u64, retry: bool, seed: u64) -> Result<Ended, String> {
        let recorder = Recorder::new();
        let healthy = Faults::new(plan);
        let inner: Vec<Arc<RecordingStorage>> = self
            .stack
            .files
            .iter()
            .enumerate()
            .map(|(n, bytes)| Arc::new(recorder.storage(&format!("layer{n}"), bytes.clone())))
            .collect();
        let faulty: Vec<Arc<FaultyStorage>> =
            inner.iter().map(|inner| Arc::new(FaultyStorage::new(inner.clone(), &healthy))).collect();
        let chain = match self.stack.open(&faulty, self.merge.writable()) {
            Ok(chain) => chain,
            Err(_) => return Ok(Ended::Failed),
        };
        let result = self.merge.run(&chain, self.stack.files.len());
        let struck = healthy.calls() > at;
        if !struck {
            result.map_err(|error| format!("without a fault: {error}"))?;
            return Ok(Ended::Through);
        }
        let files: Vec<_> = inner.iter().map(|inner| bytes(&**inner)).collect();
        self.judge(files)?;
        healthy.heal();
        let ended = match result {
            Ok(()) => Ended::Survived,
            Err(error) => {
                is_expected(&error)?;
                // The handle either still shows the right disk or says that it cannot.
                if content(&chain).is_ok_and(|now| now != self.before) {
                    return Err("the open chain shows another disk".to_owned());
                }
                if retry && self.merge.run(&chain, self.stack.files.len()).is_ok() {
                    let durable = self.stack.with_files(recorder.durable());
                    self.merge.is_complete(&durable, &self.before, &self.beneath)?;
                }
                Ended::Failed
            }
        };
        let closed = chain.close();
        // Whatever was on its way then: a power failure on top of it does no harm.
        recorder.crash_states(seed, 1, |state| self.judge(state.clone()))?;
        let files: Vec<_> = inner.iter().map(|inner| bytes(&**inner)).collect();
        self.rerun(files).map_err(|wrong| format!("{wrong} (close: {closed:?})"))?;
        Ok(ended)
    }

    fn judge(&self, files: Vec<Vec<u8>>) -> Verdict {
        let stack = self.stack.with_files(files);
        if stack.content()? != self.before {
            return Err("the guest sees another disk".to_owned());
        }
        stack.check(false)
    }

    fn rerun(&self, files: Vec<Vec<u8>>) -> Verdict {
        let stack = self.stack.with_files(files);
        let storages = stack.storages();
        let chain = stack.open(&storages, self.merge.writable())?;
        self.merge.run(&chain, stack.files.len()).map_err(|error| format!("again: {error}"))?;
        drop(chain);
        let done = self.stack.with_files(storages.iter().map(|storage| storage.to_vec()).collect());
        self.judge(done.files.clone())?;
        self.merge.is_complete(&done, &self.before, &self.beneath)
    }
}

fn bytes(storage: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(storage.len().unwrap()).unwrap()];
    storage.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// The error is the one that was injected, or one that follows from it.
fn is_expected(error: &Error) -> Verdict {
    let image = match error {
        Error::Image(error) | Error::Chain(chain::Error::Image(error)) => error,
        other => return Err(format!("an unexpected error: {other:?}")),
    };
    match image {
        image::Error::Storage(
            storage::Error::Io { .. } | storage::Error::NoSpace { .. } | storage::Error::Poisoned { .. },
        )
        | image::Error::Poisoned { .. } => Ok(()),
        other => Err(format!("an unexpected error: {other:?}")),
    }
}

/// Fails call after call of random merges. Returns how many runs failed.
fn break_merges(what: &str, usual: u64, plan: impl Fn(&mut Rng, u64) -> Plan + Sync) -> u64 {
    let failures = AtomicU64::new(0);
    cases(what, count("QCOW2_CHAIN_CRASH_CASES", usual), |rng| {
        let subject = Subject::random(rng);
        for at in 0.. {
            let plan = plan(rng, at);
            match subject.run(plan, at, rng.chance(1, 2), rng.next_u64()) {
                Ok(Ended::Through) => break,
                Ok(Ended::Failed) => drop(failures.fetch_add(1, Ordering::Relaxed)),
                Ok(Ended::Survived) => {}
                Err(wrong) => panic!("{:?}, {plan:?}: {wrong}", subject.merge),
            }
        }
    });
    let failures = failures.into_inner();
    println!("{failures} merges failed");
    failures
}

fn reach(rng: &mut Rng) -> Reach {
    rng.pick(&[Reach::Nothing, Reach::Half, Reach::All])
}

#[test]
fn a_call_that_fails_once_fails_the_merge_and_nothing_else() {
    let failures = break_merges("one broken call", 24, |rng, at| Fault::Io.at(at).with_reach(reach(rng)));
    assert!(failures > 300, "only {failures} merges failed");
}

#[test]
fn a_medium_that_breaks_for_good_fails_the_merge_and_nothing_else() {
    let failures = break_merges("broken for good", 16, |rng, at| Fault::Io.at(at).ever_after().with_reach(reach(rng)));
    assert!(failures > 200, "only {failures} merges failed");
}

#[test]
fn a_full_medium_fails_the_merge_and_nothing_else() {
    let failures = break_merges("no space", 24, |rng, at| {
        let plan = Fault::NoSpace.at(at).with_reach(rng.pick(&[Reach::Nothing, Reach::Half]));
        if rng.chance(1, 2) { plan.ever_after() } else { plan }
    });
    assert!(failures > 100, "only {failures} merges failed");
}
