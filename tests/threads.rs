//! Merges that are large enough for several threads: they do what small ones do, and a call that fails in any of the threads
//! fails the merge and nothing else.

use std::sync::Arc;

use qcow2_chain::chain::{Chain, Layer, Node};
use qcow2_chain::format::GuestOffset;
use qcow2_chain::image::{CheckOptions, CreateOptions, Image, OpenOptions, check};
use qcow2_chain::merge::{
    AfterCommit, CommitOptions, Error, Onto, PullOptions, RebaseOptions, Report, commit, pull, rebase,
};
use qcow2_chain::storage::fault::{Fault, Faults, FaultyStorage};
use qcow2_chain::storage::{MemoryStorage, Storage};

use crate::support::rng::{Rng, cases};
use crate::support::stack::content;

const CLUSTER: u64 = 1 << 16;
const CLUSTERS: u64 = 512;
const NAMES: [&str; 3] = ["top", "middle", "base"];

/// The files of three layers, the top first, each with data in half of its clusters.
#[derive(Clone)]
struct Layers(Vec<Vec<u8>>);

impl Layers {
    fn random(rng: &mut Rng) -> Self {
        let make = |(number, name): (usize, &&str)| {
            let storage = Arc::new(MemoryStorage::new(*name));
            let mut options = CreateOptions::new(CLUSTERS * CLUSTER);
            if let Some(below) = NAMES.get(number + 1) {
                options = options.with_backing(*below, "qcow2");
            }
            let image = Image::create(storage.clone(), &options).unwrap();
            // In another order than the guest's: an odd factor walks all clusters once.
            let (start, step) = (rng.within(0..CLUSTERS), rng.within(0..CLUSTERS) | 1);
            for at in 0..CLUSTERS / 2 {
                let cluster = (start + at * step) % CLUSTERS;
                let byte = u8::try_from(rng.within(1..255)).unwrap();
                image.write_at(&[byte; 1 << 16], GuestOffset::new(cluster * CLUSTER)).unwrap();
            }
            image.close().unwrap();
            storage.to_vec()
        };
        Self(NAMES.iter().enumerate().map(make).collect())
    }

    /// The chain from the top's file downwards, as far as the files name each other.
    fn open<S: Storage + 'static>(storages: &[Arc<S>]) -> Result<Chain, qcow2_chain::image::Error> {
        let mut layers = Vec::new();
        let mut next = Some(0);
        while let Some(number) = next {
            let image = Image::open(storages[number].clone(), &OpenOptions::default().with_write(true))?;
            let below = image.header().backing_file;
            next = below.map(|name| NAMES.iter().position(|known| known.as_bytes() == name).unwrap());
            layers.push(Layer { node: Node::Qcow2(image), path: NAMES[number].into() });
        }
        let mut layers = layers.into_iter();
        Ok(Chain::from_layers(layers.next().unwrap(), layers))
    }

    fn storages(&self) -> Vec<Arc<MemoryStorage>> {
        self.0.iter().zip(NAMES).map(|(bytes, name)| Arc::new(MemoryStorage::with_bytes(name, bytes.clone()))).collect()
    }
}

#[derive(Clone, Copy, Debug)]
enum Merge {
    Commit(usize),
    Pull,
    Rebase,
}

impl Merge {
    fn run(self, chain: &Chain) -> Result<Report, Error> {
        match self {
            Self::Commit(base) => {
                let after = if base == 1 { AfterCommit::Empty } else { AfterCommit::Keep };
                commit(chain, &CommitOptions::default().with_base(base).with_after(after), &())
            }
            // Where the header is switched already, the rest is done.
            Self::Pull | Self::Rebase if chain.layers().len() < 3 => Ok(Report::default()),
            Self::Pull => pull(chain, &PullOptions::default(), &()),
            Self::Rebase => rebase(chain, Onto::Layer(2), &RebaseOptions::default(), &()),
        }
    }

    /// The guest's disk is this one, nothing is corrupt, and what was merged into shows it too.
    fn judge(self, storages: &[Arc<MemoryStorage>], disk: &[u8], complete: bool) {
        let chain = Layers::open(storages).unwrap();
        assert!(content(&chain).unwrap() == disk, "{self:?}: the guest sees another disk");
        for storage in storages {
            let report = check(&**storage, &CheckOptions::default()).unwrap();
            assert_eq!((report.corruptions, report.check_errors), (0, 0), "{self:?}: {report:?}");
        }
        if !complete {
            return;
        }
        match self {
            Self::Commit(base) => {
                let mut layers = chain.into_layers().into_iter().skip(base);
                let based = Chain::from_layers(layers.next().unwrap(), layers);
                assert!(content(&based).unwrap() == disk, "{self:?}: the base does not hold what was merged");
            }
            Self::Pull => assert_eq!(chain.layers().len(), 1),
            Self::Rebase => assert_eq!(chain.layers().len(), 2),
        }
    }
}

const MERGES: [Merge; 4] = [Merge::Commit(1), Merge::Commit(2), Merge::Pull, Merge::Rebase];

#[test]
fn large_merges_do_what_small_ones_do() {
    cases("large merges", 4, |rng| {
        let layers = Layers::random(rng);
        let disk = content(&Layers::open(&layers.storages()).unwrap()).unwrap();
        for merge in MERGES {
            let storages = layers.storages();
            let chain = Layers::open(&storages).unwrap();
            let report = merge.run(&chain).unwrap();
            chain.close().unwrap();
            assert!(report.copied + report.copied_in_kernel > 4 << 20, "{merge:?}: {report:?} is no work for threads");
            merge.judge(&storages, &disk, true);
        }
    });
}

#[test]
fn a_call_that_fails_in_any_thread_fails_the_merge_and_nothing_else() {
    cases("large merges with a fault", 8, |rng| {
        let layers = Layers::random(rng);
        let disk = content(&Layers::open(&layers.storages()).unwrap()).unwrap();
        for merge in MERGES {
            let fault = [Fault::Io, Fault::NoSpace, Fault::Sync][usize::try_from(rng.within(0..3)).unwrap()];
            let most = if fault == Fault::Sync { 6 } else { 60 };
            let plan = fault.at(rng.within(0..most));
            let plan = if rng.chance(1, 2) { plan.ever_after() } else { plan };
            let inner = layers.storages();
            let faults = Faults::new(plan);
            let faulty: Vec<_> =
                inner.iter().map(|inner| Arc::new(FaultyStorage::new(inner.clone(), &faults))).collect();
            let Ok(chain) = Layers::open(&faulty) else { continue };
            let done = merge.run(&chain).is_ok();
            drop(chain);
            merge.judge(&inner, &disk, done);
            // On healthy storage it is completed.
            let chain = Layers::open(&inner).unwrap();
            merge.run(&chain).unwrap();
            chain.close().unwrap();
            merge.judge(&inner, &disk, true);
        }
    });
}
