//! What the benches share: images on real files in a temporary directory, the same ones in every run.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use criterion::Criterion;
use qcow2_chain::chain::{Chain, ChainOptions};
use qcow2_chain::format::{ClusterBits, GuestOffset};
use qcow2_chain::image::{CreateOptions, Image};
use qcow2_chain::storage::FileStorage;

/// What every bench here allows itself: all of them together take a minute or two.
pub(crate) fn criterion() -> Criterion {
    let (warm_up, measurement) = (Duration::from_millis(500), Duration::from_secs(3));
    Criterion::default().sample_size(20).warm_up_time(warm_up).measurement_time(measurement)
}

/// A directory for images, gone with the value.
pub(crate) struct Bed(tempfile::TempDir);

impl Bed {
    /// A new directory beside the program, not in `/tmp`, which may be memory.
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory"))
    }

    /// The directory.
    pub(crate) fn dir(&self) -> &Path {
        self.0.path()
    }

    /// A path in it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A new image, open for writing. One of that name is replaced.
    pub(crate) fn create(&self, name: &str, options: &CreateOptions) -> Image {
        let path = self.path(name);
        let _ = std::fs::remove_file(&path);
        let storage = FileStorage::create_new(&path).expect("a new file");
        Image::create(Arc::new(storage), options).expect("a new image")
    }

    /// An image whose clusters are written in this order, one by one.
    pub(crate) fn written(&self, name: &str, options: &CreateOptions, order: &[u64]) {
        let image = self.create(name, options);
        let cluster = noise(1 << options.cluster_bits.get());
        for &index in order {
            image.write_at(&cluster, GuestOffset::new(index * cluster.len() as u64)).expect("written");
        }
        image.close().expect("closed");
    }

    /// A chain with its top open for writing.
    pub(crate) fn open_chain(&self, name: &str, writable: usize) -> Chain {
        let options = ChainOptions::default().beneath(self.dir()).with_writable(writable);
        Chain::open(self.path(name), &options).expect("a chain")
    }
}

/// Options for this size and cluster size.
pub(crate) fn options(size: u64, cluster_bits: u32) -> CreateOptions {
    CreateOptions::new(size).with_cluster_bits(ClusterBits::new(cluster_bits).expect("within the limits"))
}

/// Random numbers that are the same in every run.
pub(crate) fn random(seed: u64) -> impl Iterator<Item = u64> {
    let mut state = seed | 1;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    })
}

/// The numbers below `count` in a random order.
pub(crate) fn shuffled(count: u64) -> Vec<u64> {
    let mut keyed: Vec<_> = random(count).zip(0..count).collect();
    keyed.sort_unstable();
    keyed.into_iter().map(|(_, number)| number).collect()
}

/// Bytes that do not shrink and are no holes.
pub(crate) fn noise(len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = random(7).take(len.div_ceil(8)).flat_map(u64::to_le_bytes).collect();
    bytes.truncate(len);
    bytes
}
