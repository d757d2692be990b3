//! The images that the sides work on: the same in every run, by fixed seeds.

use std::error::Error;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use qcow2_chain::chain::{Chain, ChainOptions};
use qcow2_chain::format::GuestOffset;
use qcow2_chain::image::{CreateOptions, Image, Preallocation};
use qcow2_chain::storage::FileStorage;

use crate::vm;

pub(crate) const CLUSTER: u64 = 64 << 10;
pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const GIB: u64 = 1 << 30;
pub(crate) const TIB: u64 = 1 << 40;

pub(crate) type Done = Result<(), Box<dyn Error>>;

/// Which images a work needs. Sizes are in megabytes of data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Images {
    /// A VM of two volumes; so much data in what a deletion merges.
    Vm(u64, vm::Shape),
    /// So much data in random clusters, over an empty base four times as large.
    OverEmpty(u64),
    /// Two layers of so much data each, in random clusters, over a base that is full in its first half: a disk four times
    /// as large. `top.qcow2` is over `mid.qcow2` over `base.qcow2`; `one.qcow2` is a sole layer over the base.
    TwoLayers(u64),
    /// One cluster in the base, one in the layer on it, nothing in the top: a disk of so many bytes.
    Sparse(u64),
    /// A disk of so many bytes whose metadata is all there, and nothing else.
    Metadata(u64),
    /// Two images with the same data, in other places of their files.
    Twins(u64),
    /// So many layers over a full image of so much data: each holds its share of it in random clusters.
    Deep(u64, u64),
    /// A full image, written front to back, under an empty overlay.
    Full(u64),
    /// Data that shrinks to a half, plain (`text.qcow2`) and compressed both ways.
    Text(u64),
}

impl Images {
    /// Makes them in an empty directory.
    pub(crate) fn make(self, dir: &Path) -> Done {
        match self {
            Self::Vm(mib, shape) => vm::make(dir, mib, shape),
            Self::OverEmpty(mib) => {
                create(dir, "base.qcow2", &CreateOptions::new(4 * mib * MIB))?.close()?;
                layer(dir, "top.qcow2", "base.qcow2", 4 * mib, mib, 2)
            }
            Self::TwoLayers(mib) => {
                full(dir, "base.qcow2", 4 * mib, 2 * mib, 1)?;
                layer(dir, "mid.qcow2", "base.qcow2", 4 * mib, mib, 2)?;
                layer(dir, "top.qcow2", "mid.qcow2", 4 * mib, mib, 3)?;
                layer(dir, "one.qcow2", "base.qcow2", 4 * mib, mib, 4)
            }
            Self::Sparse(size) => sparse(dir, size),
            Self::Metadata(size) => {
                let options = CreateOptions::new(size).with_preallocation(Preallocation::Metadata);
                Ok(create(dir, "top.qcow2", &options)?.close()?)
            }
            Self::Twins(mib) => {
                full(dir, "top.qcow2", mib, mib, 0)?;
                let twin = create(dir, "twin.qcow2", &CreateOptions::new(mib * MIB))?;
                scatter(&twin, mib * MIB / CLUSTER, mib * MIB / CLUSTER, 0, 9)?;
                Ok(twin.close()?)
            }
            Self::Deep(layers, mib) => deep(dir, layers, mib),
            Self::Full(mib) => {
                full(dir, "base.qcow2", mib, mib, 1)?;
                empty(dir, "top.qcow2", "base.qcow2", mib * MIB)
            }
            Self::Text(mib) => text(dir, mib),
        }
    }
}

fn create(dir: &Path, name: &str, options: &CreateOptions) -> Result<Image, Box<dyn Error>> {
    Ok(Image::create(Arc::new(FileStorage::create_new(dir.join(name))?), options)?)
}

fn empty(dir: &Path, name: &str, backing: &str, size: u64) -> Done {
    Ok(create(dir, name, &CreateOptions::new(size).with_backing(backing, "qcow2"))?.close()?)
}

/// Random numbers that are the same in every run.
fn random(seed: u64) -> impl Iterator<Item = u64> {
    let mut state = seed;
    std::iter::repeat_with(move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    })
}

/// The numbers below `count` in random order: sorted by a random key.
pub(crate) fn shuffled(count: u64, seed: u64) -> Vec<u64> {
    let mut keyed: Vec<_> = random(seed).zip(0..count).collect();
    keyed.sort_unstable();
    keyed.into_iter().map(|(_, number)| number).collect()
}

/// Bytes that do not shrink, and that differ from cluster to cluster and between seeds.
pub(crate) fn noise(number: u64, seed: u64) -> Vec<u8> {
    random(number << 8 | seed).take(CLUSTER as usize / 8).flat_map(u64::to_le_bytes).collect()
}

/// Writes `count` clusters of a disk of `slots`, each at a random place, in random order. Places follow from `seed`, and what
/// is written from the place and `content`.
fn scatter(image: &Image, slots: u64, count: u64, content: u64, seed: u64) -> Done {
    for slot in shuffled(slots, seed).into_iter().take(count as usize) {
        image.write_at(&noise(slot, content), GuestOffset::new(slot * CLUSTER))?;
    }
    Ok(())
}

/// A disk of `size` megabytes whose first `mib` are written front to back.
fn full(dir: &Path, name: &str, size: u64, mib: u64, seed: u64) -> Done {
    let image = create(dir, name, &CreateOptions::new(size * MIB))?;
    for slot in 0..mib * MIB / CLUSTER {
        image.write_at(&noise(slot, seed), GuestOffset::new(slot * CLUSTER))?;
    }
    Ok(image.close()?)
}

fn layer(dir: &Path, name: &str, backing: &str, size: u64, mib: u64, seed: u64) -> Done {
    let image = create(dir, name, &CreateOptions::new(size * MIB).with_backing(backing, "qcow2"))?;
    scatter(&image, size * MIB / CLUSTER, mib * MIB / CLUSTER, seed, seed)?;
    Ok(image.close()?)
}

fn sparse(dir: &Path, size: u64) -> Done {
    let base = create(dir, "base.qcow2", &CreateOptions::new(size))?;
    base.write_at(&noise(7, 3), GuestOffset::new(size / 2))?;
    base.close()?;
    let mid = create(dir, "mid.qcow2", &CreateOptions::new(size).with_backing("base.qcow2", "qcow2"))?;
    mid.write_at(&noise(8, 3), GuestOffset::new(size / 4))?;
    mid.close()?;
    empty(dir, "top.qcow2", "mid.qcow2", size)
}

fn deep(dir: &Path, layers: u64, mib: u64) -> Done {
    let name = |number| if number == layers { "top.qcow2".to_owned() } else { format!("layer-{number}.qcow2") };
    full(dir, &name(1), mib, mib, 1)?;
    for number in 2..=layers {
        layer(dir, &name(number), &name(number - 1), mib, (mib / layers).max(1), number)?;
    }
    Ok(())
}

/// Words of a small vocabulary, the frequent ones first: about as compressible as programs and documents are.
fn text(dir: &Path, mib: u64) -> Done {
    let letters: Vec<u8> = random(11).flat_map(u64::to_le_bytes).take(1 << 16).collect();
    let image = create(dir, "text.qcow2", &CreateOptions::new(mib * MIB))?;
    for slot in 0..mib * MIB / CLUSTER {
        let mut cluster = Vec::with_capacity(CLUSTER as usize + 16);
        for choice in random(slot << 8 | 12) {
            // The smallest of four choices of ten bits each: a falling distribution.
            let word = (0..4).map(|number| choice >> (10 * number) & 0x3ff).min().unwrap_or_default() as usize;
            cluster.extend_from_slice(&letters[word * 16..word * 16 + 3 + word % 13]);
            if cluster.len() >= CLUSTER as usize {
                break;
            }
        }
        image.write_at(&cluster[..CLUSTER as usize], GuestOffset::new(slot * CLUSTER))?;
    }
    image.close()?;
    for (kind, name) in [("zlib", "deflate.qcow2"), ("zstd", "zstd.qcow2")] {
        // By the other side, whose images are what one meets.
        let kind = format!("compression_type={kind}");
        let args = ["convert", "-c", "-O", "qcow2", "-o", &kind, "text.qcow2", name];
        if !Command::new("qemu-img").args(args).current_dir(dir).status()?.success() {
            return Err("the images could not be compressed".into());
        }
    }
    Ok(())
}

/// The chain under an image, for our side's jobs.
pub(crate) fn open(image: &Path, writable: usize) -> Result<Chain, Box<dyn Error>> {
    let dir = image.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok(Chain::open(image, &ChainOptions::default().beneath(dir).with_writable(writable))?)
}
