//! A chain of hostile overlays, merged: commit, pull, rebase, convert.
//!
//! Invariants: no panic, bounded memory and time. Where check finds nothing wrong in the layers before, the guest's disk
//! reads the same before and after, whether the merge succeeds or not, and no layer is corrupt afterwards. A plan says what
//! it costs without changing anything.
#![no_main]

use std::path::Path;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use qcow2_chain::chain::{Chain, ChainOptions, Policy};
use qcow2_chain::format::GuestOffset;
use qcow2_chain::image::{CheckOptions, CreateOptions, Fix, check};
use qcow2_chain::merge::{
    AfterCommit, CommitOptions, ConvertOptions, ConvertTarget, Onto, PullOptions, RebaseOptions, commit, convert, plan,
    pull, rebase,
};
use qcow2_chain::storage::{FileSystem, MemoryFileSystem, MemoryStorage};
use qcow2_chain_fuzz::inputs::{Merge, Merges as Input};
use qcow2_chain_fuzz::{Step, limits};

const NAMES: [&str; 3] = ["top", "mid", "base"];
/// A disk of more than this is not read whole.
const MAX_SIZE: u64 = 4 << 20;

fuzz_target!(|input: Input| {
    let names = Arc::new(MemoryFileSystem::new());
    let depth = if input.three { 3 } else { 2 };
    for (number, hostile) in input.layers.into_iter().take(depth).enumerate() {
        let backing = NAMES[..depth].get(number + 1).map(|name| (name.as_bytes().to_vec(), b"qcow2".to_vec()));
        let storage = Arc::new(MemoryStorage::with_bytes(NAMES[number], hostile.over(backing).bytes()));
        if input.repair {
            let _ = check(&*storage, &CheckOptions::default().with_fix(Fix::All).with_limits(limits()));
        }
        names.insert(NAMES[number], storage);
    }
    // What an overlay alone refused: writes to parts of clusters, the rest of which lies below.
    if let Ok(chain) = open(&names, 1)
        && chain.virtual_size() <= MAX_SIZE
    {
        for step in input.steps.iter().flatten().take(6) {
            let _ = apply(*step, &chain);
        }
        let _ = chain.close();
    }
    let sound = (0..depth).all(|number| is_sound(&names, NAMES[number]));
    let before = disk(&names);
    for merge in input.merges {
        let Ok(chain) = open(&names, depth) else { return };
        let _ = (plan(&chain, 1), chain.describe());
        if chain.virtual_size() > MAX_SIZE {
            return;
        }
        let done = run(merge, &chain, depth);
        drop(chain);
        if sound {
            assert!(disk(&names) == before, "{merge:?} changed the disk: {done:?}");
            let corrupt = (0..depth).find(|number| !is_sound(&names, NAMES[*number]));
            assert_eq!(corrupt, None, "{merge:?}: {done:?}");
        }
    }
});

fn open(names: &Arc<MemoryFileSystem>, writable: usize) -> Result<Chain, qcow2_chain::chain::Error> {
    let names: Arc<dyn FileSystem> = names.clone();
    let options = ChainOptions::default().with_policy(Policy::Any).with_limits(limits()).with_writable(writable);
    Chain::open_in(&names, Path::new(NAMES[0]), &options)
}

fn disk(names: &Arc<MemoryFileSystem>) -> Option<Vec<u8>> {
    let chain = open(names, 0).ok().filter(|chain| chain.virtual_size() <= MAX_SIZE)?;
    let mut bytes = vec![0; usize::try_from(chain.virtual_size()).ok()?];
    chain.read_at(&mut bytes, GuestOffset::ZERO).ok().map(|()| bytes)
}

fn is_sound(names: &MemoryFileSystem, name: &str) -> bool {
    let Some(storage) = names.get(name) else { return true };
    let report = check(&*storage, &CheckOptions::default().with_limits(limits()));
    report.is_ok_and(|report| report.corruptions == 0 && report.check_errors == 0)
}

fn apply(step: Step, chain: &Chain) -> Result<(), qcow2_chain::chain::Error> {
    let size = chain.virtual_size().max(1);
    let clip = |offset: u32, len: u64| {
        let offset = u64::from(offset) % size;
        (GuestOffset::new(offset), len.min(size - offset))
    };
    match step {
        Step::Write { offset, len, byte } => {
            let (offset, len) = clip(offset, u64::from(len));
            chain.write_at(&vec![byte; len as usize], offset)
        }
        Step::Zero { offset, len } => {
            let (offset, len) = clip(offset, u64::from(len));
            chain.write_zeroes_at(offset, len)
        }
        Step::Discard { offset, len } => {
            let (offset, len) = clip(offset, u64::from(len));
            chain.discard_at(offset, len)
        }
    }
}

fn run(merge: Merge, chain: &Chain, depth: usize) -> Result<(), qcow2_chain::merge::Error> {
    match merge {
        Merge::Commit { base, empty } => {
            let base = if base { depth - 1 } else { 1 };
            let after = if empty && base == 1 { AfterCommit::Empty } else { AfterCommit::Keep };
            commit(chain, &CommitOptions::default().with_base(base).with_after(after), &()).map(drop)
        }
        Merge::Pull { base } => {
            let base = [None, Some(1), Some(2)][usize::from(base % 3)];
            pull(chain, &PullOptions::default().with_base(base), &()).map(drop)
        }
        Merge::Rebase { layer, drop_equal } => {
            let onto = if layer { Onto::Layer(depth - 1) } else { Onto::Nothing };
            rebase(chain, onto, &RebaseOptions::default().with_drop_equal(drop_equal), &()).map(drop)
        }
        Merge::Convert { compress } => {
            let target = ConvertTarget::Qcow2(Arc::new(MemoryStorage::new("target")), CreateOptions::default());
            let how = ConvertOptions::default().with_compress(compress).with_threads(1);
            convert(chain, target, &how, &()).map(drop)
        }
    }
}
