//! Power failures at every instant of a merge: the guest sees the same disk, and running the merge again completes it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use qcow2_chain::merge::AfterCommit;
use qcow2_chain::storage::crash::{CrashState, Recorder, RecordingStorage};
use qcow2_chain::storage::{self, Storage};

use crate::support::rng::{Rng, cases, count};
use crate::support::stack::{Merge, Stack, Verdict};

/// One merge under the recorder, done, and what it started from.
struct Recorded {
    stack: Stack,
    merge: Merge,
    before: Vec<u8>,
    beneath: Vec<u8>,
    recorder: Arc<Recorder>,
    storages: Vec<Arc<Traced>>,
}

impl Recorded {
    fn random(rng: &mut Rng, recorder: Arc<Recorder>, sites: Option<&Sites>) -> Self {
        let depth = usize::try_from(rng.within(2..4)).unwrap();
        let stack = Stack::random(rng, depth);
        let merge = Merge::random(rng, depth);
        Self::of(stack, merge, recorder, sites)
    }

    fn of(stack: Stack, merge: Merge, recorder: Arc<Recorder>, sites: Option<&Sites>) -> Self {
        let before = stack.content().expect("the chain reads");
        let beneath = merge.beneath(&stack);
        let files = stack.files.iter().enumerate();
        let storages: Vec<Arc<Traced>> = files
            .map(|(n, bytes)| recorder.storage(&format!("layer{n}"), bytes.clone()))
            .map(|inner| Arc::new(Traced { inner, sites: sites.cloned() }))
            .collect();
        let chain = stack.open(&storages, merge.writable()).expect("the chain opens");
        merge.run(&chain, stack.files.len()).unwrap_or_else(|error| panic!("{merge:?}: {error}"));
        Self { stack, merge, before, beneath, recorder, storages }
    }

    /// The files as the merge left them, durable or not.
    fn files(&self) -> CrashState {
        let read = |storage: &Arc<Traced>| {
            let mut bytes = vec![0; usize::try_from(storage.len().unwrap()).unwrap()];
            storage.read_at(&mut bytes, 0).unwrap();
            bytes
        };
        self.storages.iter().map(read).collect()
    }

    /// The guest's disk is the same and no image is corrupt.
    fn judge(&self, state: &CrashState) -> Verdict {
        let state = self.stack.with_files(state.clone());
        if state.content()? != self.before {
            return Err("the guest sees another disk".to_owned());
        }
        state.check(false)
    }

    /// All that was promised has happened.
    fn judge_complete(&self, state: &CrashState) -> Verdict {
        self.judge(state)?;
        self.merge.is_complete(&self.stack.with_files(state.clone()), &self.before, &self.beneath)
    }

    /// The merge made again from a state completes it, and leaks can be repaired.
    fn rerun(&self, state: &CrashState) -> Verdict {
        let state = self.stack.with_files(state.clone());
        let storages = state.storages();
        let chain = state.open(&storages, self.merge.writable())?;
        self.merge.run(&chain, state.files.len()).map_err(|error| format!("again: {error}"))?;
        chain.close().map_err(|error| format!("close: {error}"))?;
        let done = self.stack.with_files(storages.iter().map(|storage| storage.to_vec()).collect());
        self.judge_complete(&done.files).map_err(|wrong| format!("made again: {wrong}"))?;
        let repaired = done.without_leaks()?;
        repaired.check(true)?;
        self.judge_complete(&repaired.files).map_err(|wrong| format!("without leaks: {wrong}"))
    }

    /// All states, the promise of `Ok`, and every so many states the merge made again.
    fn judge_all(&self, seed: u64, samples: usize, again: usize) -> Result<usize, String> {
        let mut number = 0;
        let states = self.recorder.crash_states(seed, samples, |state| {
            number += 1;
            self.judge(state)?;
            if number % again == 0 { self.rerun(state) } else { Ok(()) }
        })?;
        let durable = self.recorder.durable();
        self.judge_complete(&durable).map_err(|wrong| format!("returned Ok, but {wrong}"))?;
        if self.files() != durable {
            return Err("returned Ok, but not all of it is durable".to_owned());
        }
        Ok(states)
    }
}

#[test]
fn every_crash_of_a_merge_leaves_the_disk_as_it_was_and_the_next_run_completes_it() {
    let states = AtomicUsize::new(0);
    cases("crashed merges", count("QCOW2_CHAIN_CRASH_CASES", 80), |rng| {
        let recorded = Recorded::random(rng, Recorder::new(), None);
        match recorded.judge_all(rng.next_u64(), 8, 11) {
            Ok(seen) => states.fetch_add(seen, Ordering::Relaxed),
            Err(wrong) => panic!("{:?}: {wrong}", recorded.merge),
        };
    });
    println!("{} crash states", states.into_inner());
}

/// Where the syncs of a run were called from, in order.
type Sites = Arc<Mutex<Vec<std::backtrace::Backtrace>>>;

/// A recording storage that notes who syncs it.
#[derive(Debug)]
struct Traced {
    inner: RecordingStorage,
    sites: Option<Sites>,
}

impl Storage for Traced {
    fn name(&self) -> &str {
        self.inner.name()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> storage::Result<()> {
        self.inner.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> storage::Result<()> {
        self.inner.write_at(buf, offset)
    }
    fn len(&self) -> storage::Result<u64> {
        self.inner.len()
    }
    fn set_len(&self, len: u64) -> storage::Result<()> {
        self.inner.set_len(len)
    }
    fn sync(&self) -> storage::Result<()> {
        if let Some(sites) = &self.sites {
            sites.lock().unwrap().push(std::backtrace::Backtrace::force_capture());
        }
        self.inner.sync()
    }
    fn punch_range(&self, range: std::ops::Range<u64>) -> storage::Result<()> {
        self.inner.punch_range(range)
    }
}

/// What calls a sync: the library's functions, and the line of its source, which says what the sync is for.
fn site(trace: &std::backtrace::Backtrace) -> String {
    let text = trace.to_string();
    let names = text.lines().filter_map(|line| line.split_once(": ")).map(|(_, name)| name.trim());
    // Either way of mangling: `qcow2_chain::image::<impl ..>::f` or `<qcow2_chain::image::Image>::f::<T>`, which coverage
    // builds have.
    let plain =
        names.map(|name| name.strip_suffix('>').and_then(|name| name.split_once("::<")).map_or(name, |(f, _)| f));
    let ours = plain.filter(|name| name.trim_start_matches('<').starts_with("qcow2_chain::"));
    let ours = ours.filter(|name| !name.contains("{{closure}}") && !name.contains("{closure#"));
    let names = ours.map(|name| name.rsplit("::").next().unwrap_or(name));
    let path: Vec<&str> =
        names.filter(|name| !["exclusive", "shared", "guard", "changing", "peek"].contains(name)).collect();
    let place = text.lines().filter_map(|line| line.trim().strip_prefix("at ")).find(|at| at.contains("src/image/"));
    let line = place.and_then(|place| {
        let mut parts = place.rsplit(':').skip(1);
        let line: usize = parts.next()?.parse().ok()?;
        let file = parts.next()?.trim_start_matches("./");
        let source = std::fs::read_to_string(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).ok()?;
        Some(source.lines().nth(line - 1)?.trim().to_owned())
    });
    format!("{}: {}", path[..path.len().min(3)].join(" < "), line.unwrap_or_default())
}

/// Syncs that a merge could do without, because another follows that serves the same end: who calls, which, and why it is
/// there all the same.
const COVERED: [(&str, &str, &str); 6] = [
    (
        "make_empty",
        "barrier: data, refcounts",
        "emptying writes nothing that a mapping waits for; the flush cannot know",
    ),
    ("make_empty", "what was freed stays free", "the file is cut and synced after it, where there is something to cut"),
    ("grow", "what was freed stays free", "the merge's last flush follows"),
    ("shrink", "barrier: data, refcounts", "cutting writes nothing that a mapping waits for; the flush cannot know"),
    ("shrink", "barrier: the new size", "the tests of resizing prove it; what a merge cuts off is shown by no layer"),
    ("grow", "sync", "a resize alone promises it; in a merge the last flush follows"),
];

/// For each sync of commit and pull, some run without it fails: the test above proves it. What is a promise and not an
/// order fails where `Ok` must mean durable.
#[test]
fn every_barrier_of_a_merge_is_proved() {
    let proofs: Mutex<BTreeMap<String, (usize, usize)>> = Mutex::default();
    cases("barriers taken out", count("QCOW2_CHAIN_CRASH_CASES", 80) / 2, |rng| {
        let depth = usize::try_from(rng.within(2..4)).unwrap();
        let stack = Stack::random(rng, depth);
        let merge = if rng.chance(1, 2) {
            Merge::Commit { base: 1, after: AfterCommit::Empty, shrink: false }
        } else {
            Merge::random(rng, depth)
        };
        let sites = Sites::default();
        let whole = Recorded::of(stack.clone(), merge, Recorder::new(), Some(&sites));
        let sites = std::mem::take(&mut *sites.lock().unwrap());
        assert_eq!(sites.len(), whole.recorder.syncs());
        for (number, trace) in sites.iter().enumerate() {
            let without = Recorded::of(stack.clone(), merge, Recorder::without_sync(number), None);
            let proved = without.judge_all(rng.next_u64(), 2, usize::MAX).is_err();
            let site = site(trace);
            let mut proofs = proofs.lock().unwrap();
            let (proved_by, runs) = proofs.entry(site).or_default();
            *proved_by += usize::from(proved);
            *runs += 1;
        }
    });
    let proofs = proofs.into_inner().unwrap();
    for (site, (proved, runs)) in &proofs {
        println!("{proved:5} of {runs:5}  {site}");
    }
    let covered = |site: &str| {
        let (path, line) = site.split_once(": ").unwrap_or_default();
        COVERED.iter().any(|(caller, sync, _)| path.contains(caller) && line.contains(sync))
    };
    let unproved = proofs.iter().filter(|(site, (proved, _))| *proved == 0 && !covered(site));
    let unproved: Vec<&String> = unproved.map(|(site, _)| site).collect();
    assert!(unproved.is_empty(), "no run fails without: {unproved:#?}");
}
