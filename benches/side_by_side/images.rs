//! The images that the two sides work on.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use qcow2_chain::format::GuestOffset;
use qcow2_chain::image::{CreateOptions, Image, Preallocation};
use qcow2_chain::storage::FileStorage;

const CLUSTER: u64 = 64 << 10;
const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;

pub type Done = Result<(), Box<dyn Error>>;

fn create(path: &Path, options: &CreateOptions) -> Result<Image, Box<dyn Error>> {
    Ok(Image::create(Arc::new(FileStorage::create_new(path)?), options)?)
}

/// Bytes that differ from cluster to cluster and between seeds.
fn cluster(number: u64, seed: u64) -> Vec<u8> {
    let mut state = (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ seed;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.take(usize::try_from(CLUSTER / 8).unwrap_or_default()).flatten().collect()
}

/// Writes `count` clusters of a disk of `slots`, in random order, at random places.
fn scatter(image: &Image, slots: u64, count: u64, seed: u64) -> Done {
    // An odd stride walks all slots of a power of two once, in an order that is nothing like sequential.
    let stride = (slots / 3 * 2) | 1;
    for number in 0..count {
        let slot = (number * stride + seed) % slots;
        image.write_at(&cluster(slot, seed), GuestOffset::new(slot * CLUSTER))?;
    }
    Ok(())
}

/// `mib` of data in random clusters, over an empty base four times as large.
pub fn delta_over_empty(dir: &Path, mib: u64) -> Done {
    create(&dir.join("base.qcow2"), &CreateOptions::new(4 * mib * MIB))?.close()?;
    delta(dir, mib)
}

/// The same over a base that holds data everywhere in its first half.
pub fn delta_over_full(dir: &Path, mib: u64) -> Done {
    let base = create(&dir.join("base.qcow2"), &CreateOptions::new(4 * mib * MIB))?;
    for number in 0..2 * mib * MIB / CLUSTER {
        base.write_at(&cluster(number, 1), GuestOffset::new(number * CLUSTER))?;
    }
    base.close()?;
    delta(dir, mib)
}

fn delta(dir: &Path, mib: u64) -> Done {
    let options = CreateOptions::new(4 * mib * MIB).with_backing("base.qcow2", "qcow2");
    let top = create(&dir.join("top.qcow2"), &options)?;
    scatter(&top, 4 * mib * MIB / CLUSTER, mib * MIB / CLUSTER, 2)?;
    Ok(top.close()?)
}

/// 64 KiB of data in a base of 1 TiB, under an empty overlay.
pub fn sparse(dir: &Path, _mib: u64) -> Done {
    let base = create(&dir.join("base.qcow2"), &CreateOptions::new(TIB))?;
    base.write_at(&cluster(7, 3), GuestOffset::new(TIB / 2))?;
    base.close()?;
    let options = CreateOptions::new(TIB).with_backing("base.qcow2", "qcow2");
    Ok(create(&dir.join("top.qcow2"), &options)?.close()?)
}

/// 1 TiB whose metadata is all there.
pub fn metadata(dir: &Path, _mib: u64) -> Done {
    let options = CreateOptions::new(TIB).with_preallocation(Preallocation::Metadata);
    Ok(create(&dir.join("top.qcow2"), &options)?.close()?)
}

/// Two images with the same data, in other places of their files.
pub fn twins(dir: &Path, mib: u64) -> Done {
    let slots = mib * MIB / CLUSTER;
    let top = create(&dir.join("top.qcow2"), &CreateOptions::new(mib * MIB))?;
    scatter(&top, slots, slots, 0)?;
    top.close()?;
    let twin = create(&dir.join("twin.qcow2"), &CreateOptions::new(mib * MIB))?;
    for slot in 0..slots {
        twin.write_at(&cluster(slot, 0), GuestOffset::new(slot * CLUSTER))?;
    }
    Ok(twin.close()?)
}
