//! Merges a delta into its backing file, and shows that no byte of the disk changed.
//!
//! Without arguments: builds a small chain in a temporary directory, writes to both layers, and merges.
//! With the path of an overlay: merges that overlay into its backing file, which must lie in the same directory or beneath
//! it. The overlay is emptied, as by `qemu-img commit`.
//!
//! ```text
//! cargo run --release --example commit_delta [OVERLAY]
//! ```

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qcow2_chain::chain::{Chain, ChainOptions, Policy};
use qcow2_chain::format::GuestOffset;
use qcow2_chain::image::{CreateOptions, Image};
use qcow2_chain::merge::{AfterCommit, CommitOptions, commit};
use qcow2_chain::storage::FileStorage;

const MIB: u64 = 1 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    if let Some(overlay) = std::env::args_os().nth(1) {
        return merge(Path::new(&overlay));
    }
    let directory = tempfile::tempdir()?;
    println!("A chain of two layers, in {}\n", directory.path().display());
    let overlay = build(directory.path())?;
    merge(&overlay)
}

/// A base of 256 MiB with some data, and an overlay of 320 MiB that changes part of it.
fn build(directory: &Path) -> Result<PathBuf, Box<dyn Error>> {
    let (base, overlay) = (directory.join("base.qcow2"), directory.join("overlay.qcow2"));
    let storage = Arc::new(FileStorage::create_new(&base)?);
    let image = Image::create(storage, &CreateOptions::new(256 * MIB))?;
    for number in 0..48 {
        image.write_at(&pattern(number, MIB), GuestOffset::new(4 * number * MIB))?;
    }
    image.close()?;

    let options = CreateOptions::new(320 * MIB).with_backing("base.qcow2", "qcow2");
    Image::create(Arc::new(FileStorage::create_new(&overlay)?), &options)?.close()?;
    let chain = Chain::open(&overlay, &open_options(&overlay, 1))?;
    for number in 0..64 {
        // Not aligned to anything: the clusters around are completed from the base.
        chain.write_at(&pattern(1000 + number, 300_000), GuestOffset::new(number * 5_000_011))?;
    }
    chain.write_zeroes_at(GuestOffset::new(8 * MIB), 6 * MIB)?;
    chain.close()?;
    Ok(overlay)
}

/// Merges an overlay into its backing file and compares the disk before and after.
fn merge(overlay: &Path) -> Result<(), Box<dyn Error>> {
    let chain = Chain::open(overlay, &open_options(overlay, 2))?;
    println!("Before:\n{}", chain.describe()?);
    let before = chain.digest(&|| false)?;

    let started = std::time::Instant::now();
    let report = commit(&chain, &CommitOptions::default().with_after(AfterCommit::Empty), &())?;
    let elapsed = started.elapsed();
    println!(
        "Merged in {elapsed:.1?}: {} bytes copied, {} of them by the kernel, {} bytes zeroed\n",
        report.copied + report.copied_in_kernel,
        report.copied_in_kernel,
        report.zeroed
    );
    println!("After:\n{}", chain.describe()?);

    let after = chain.digest(&|| false)?;
    let size = chain.virtual_size();
    chain.close()?;
    if after != before {
        return Err("the disk changed".into());
    }
    println!("Every byte of the disk is as before ({} MiB, digest {before:08x}).", size / MIB);
    Ok(())
}

/// Backing files are opened beneath the overlay's own directory only.
fn open_options(overlay: &Path, writable: usize) -> ChainOptions {
    let directory = overlay.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    ChainOptions::default().with_policy(Policy::Beneath(vec![directory.to_owned()])).with_writable(writable)
}

/// Bytes that no other `number` has.
fn pattern(number: u64, len: u64) -> Vec<u8> {
    (0..len).map(|at| (number.wrapping_mul(2_654_435_761) ^ (at / 512).wrapping_mul(40_503)).to_le_bytes()[1]).collect()
}
