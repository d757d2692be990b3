//! Whether an image seems to have been preallocated: then clusters that are allocated may be holes of the file.

use qcow2_chain::format::{RefcountBlock, RefcountTableEntry};
use qcow2_chain::image::Image;

use crate::failure::Failure;

/// Whether the image uses clearly more clusters than its file occupies. QEMU looks for holes only then, and so must
/// who wants to print what QEMU prints.
pub(crate) fn seems(image: &Image) -> Result<bool, Failure> {
    let storage = image.storage();
    let Some(occupied) = storage.allocated_len()? else { return Ok(false) };
    let geometry = image.geometry();
    let clusters = storage.len()?.div_ceil(geometry.cluster_size());
    let occupied = occupied / geometry.cluster_size();
    let threshold = (occupied + 2).max(occupied / 9 * 10 + occupied % 9 * 10 / 9);
    if clusters < threshold {
        return Ok(false);
    }
    Ok(used_clusters(image, clusters)? >= threshold)
}

/// How many of the first `clusters` clusters have a refcount.
fn used_clusters(image: &Image, clusters: u64) -> Result<u64, Failure> {
    let (storage, geometry) = (image.storage(), image.geometry());
    let header = image.header().header;
    // No more blocks than the file has clusters to count, whatever the header says of the table.
    let per_block = geometry.cluster_size() * 8 / u64::from(geometry.refcount_order().bits());
    let blocks = clusters.div_ceil(per_block);
    let mut used = 0;
    for block in 0..blocks.min(u64::from(header.refcount_table_clusters) * geometry.cluster_size() / 8) {
        let mut entry = [0; 8];
        storage.read_at(&mut entry, header.refcount_table_offset.get().saturating_add(block * 8))?;
        let Some(offset) = RefcountTableEntry(u64::from_be_bytes(entry)).block() else { continue };
        let mut bytes = vec![0; geometry.cluster_len()].into_boxed_slice();
        storage.read_at(&mut bytes, offset.get())?;
        let counts = RefcountBlock::decode(bytes, geometry)?;
        let end = usize::try_from((clusters - block * per_block).min(per_block)).unwrap_or(usize::MAX);
        let mut at = 0;
        while let Some((start, len)) = counts.used_run(at).filter(|(start, _)| *start < end) {
            at = end.min(start + len);
            used += (at - start) as u64;
        }
    }
    Ok(used)
}
