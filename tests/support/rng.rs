//! Seeded random numbers (splitmix64): the same seed gives the same test on every machine.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, Ordering};

use super::say;

/// The seed used where the environment variable `QCOW2_CHAIN_SEED` names no other.
const DEFAULT_SEED: u64 = 0x5143_4f57_3221;

/// A small random number generator.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A generator that always gives the same numbers for one seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number of `range`, which must not be empty.
    pub fn within(&mut self, range: Range<u64>) -> u64 {
        assert!(range.start < range.end, "empty range {range:?}");
        range.start + self.next_u64() % (range.end - range.start)
    }

    /// Whether something happens that happens `times` out of `of`.
    pub fn chance(&mut self, times: u64, of: u64) -> bool {
        self.within(0..of) < times
    }

    /// One of these.
    pub fn pick<T: Clone>(&mut self, choices: &[T]) -> T {
        let index = self.within(0..choices.len() as u64);
        choices[usize::try_from(index).unwrap()].clone()
    }

    /// A byte other than 0, so that data never looks like a hole.
    pub fn pattern(&mut self) -> u8 {
        u8::try_from(self.within(1..256)).unwrap()
    }

    /// Random bytes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend_from_slice(&self.next_u64().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }

    /// A range within `0..end`: mostly short, sometimes long, mostly aligned to 512 bytes, never empty.
    pub fn range(&mut self, end: u64, unit: u64) -> Range<u64> {
        let longest = match self.within(0..8) {
            0 => end,
            1 | 2 => (unit * 8).min(end),
            3..6 => (unit * 2).min(end),
            _ => 4096.min(end),
        };
        let mut start = self.within(0..end);
        let mut len = self.within(0..longest) + 1;
        match self.within(0..4) {
            0 => {}
            1 => (start, len) = (start - start % unit, len.next_multiple_of(unit)),
            _ => (start, len) = (start - start % 512, len.next_multiple_of(512)),
        }
        start..(start + len).min(end)
    }
}

/// The seed of this run.
pub fn seed() -> u64 {
    let Ok(text) = std::env::var("QCOW2_CHAIN_SEED") else { return DEFAULT_SEED };
    let parsed = text.strip_prefix("0x").map_or_else(|| text.parse(), |hex| u64::from_str_radix(hex, 16));
    parsed.unwrap_or_else(|_| panic!("QCOW2_CHAIN_SEED={text}: not a number"))
}

/// The one case to run, if the environment variable `QCOW2_CHAIN_CASE` names it.
fn only() -> Option<u64> {
    std::env::var("QCOW2_CHAIN_CASE").ok().map(|text| text.parse().expect("QCOW2_CHAIN_CASE is a number"))
}

/// Prints what a case is about, where it runs alone: hundreds of cases would drown the one that matters.
pub fn trace(what: &impl std::fmt::Display) {
    if only().is_some() {
        println!("{what}");
    }
}

/// How many cases to run: `usual`, or what the environment variable of this name says.
pub fn count(variable: &str, usual: u64) -> u64 {
    let Ok(text) = std::env::var(variable) else { return usual };
    text.parse().unwrap_or_else(|_| panic!("{variable}={text}: not a number"))
}

/// Runs `case` once for each of `count` cases, on as many threads as there are processors, each with a generator of its
/// own. A case that fails says how it is run again alone: its number in `QCOW2_CHAIN_CASE`, with the same seed.
pub fn cases(what: &str, count: u64, case: impl Fn(&mut Rng) + Sync) {
    let seed = seed();
    let only = only();
    println!("{what}: {count} cases, seed {seed:#x}");
    let next = AtomicU64::new(0);
    let work = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                return;
            }
            if only.is_some_and(|only| only != number) {
                continue;
            }
            let mut rng = Rng::new(seed ^ number.wrapping_mul(0xd6e8_feb8_6659_fd93));
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| case(&mut rng))) {
                next.store(count, Ordering::Relaxed);
                say(&format!("{what}: case {number} failed: QCOW2_CHAIN_SEED={seed:#x} QCOW2_CHAIN_CASE={number}"));
                resume_unwind(panic);
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        work();
        for other in others {
            other.join().unwrap_or_else(|panic| resume_unwind(panic));
        }
    });
}

#[test]
fn a_seed_always_gives_the_same_numbers() {
    let mut rng = Rng::new(0);
    assert_eq!([rng.next_u64(), rng.next_u64()], [0xe220_a839_7b1d_cdaf, 0x6e78_9e6a_a1b9_65f4]);
    assert_eq!(Rng::new(7).bytes(19), Rng::new(7).bytes(19));
}

#[test]
fn ranges_are_never_empty_and_never_reach_past_the_end() {
    let mut rng = Rng::new(seed());
    for _ in 0..10_000 {
        let end = rng.within(1..5_000_000);
        let unit = 1 << rng.within(9..22);
        let range = rng.range(end, unit);
        assert!(range.start < range.end && range.end <= end, "{range:?} of {end}");
    }
}

#[test]
fn every_case_runs_exactly_once() {
    if only().is_some() {
        return;
    }
    let runs = AtomicU64::new(0);
    cases("counting", 100, |_| {
        runs.fetch_add(1, Ordering::Relaxed);
    });
    assert_eq!(runs.into_inner(), 100);
}
