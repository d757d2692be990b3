//! Measure: how large an image would become, by QEMU's arithmetic.

use std::ops::Range;

use crate::chain::{Chain, Node};
use crate::format::limits::{MAX_L1_ENTRIES, MAX_OFFSET};
use crate::format::{BitmapDirectoryEntry, Geometry, Version};
use crate::image::{self, CreateOptions, Preallocation};

use super::Result;

/// What `qemu-img measure` tells of an image that is to be made, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Measurement {
    /// The file's length with the data that there is. An upper bound: the metadata of a full disk is counted.
    pub required: u64,
    /// The file's length once the guest has written everything.
    pub fully_allocated: u64,
    /// What the source's bitmaps would take in addition; `None` where source or target cannot have any.
    pub bitmaps: Option<u64>,
}

impl Measurement {
    /// The measure of a new qcow2 image of `options.size` bytes in which these guest ranges, sorted and disjoint, are
    /// data. Over a backing file, all may have to be copied.
    ///
    /// # Errors
    /// [`super::Error::Image`] with [`image::Error::Refused`] for a geometry that there is not and [`image::Error::Limit`] for a
    /// disk that is too large for it; an error among the ranges.
    pub fn of_qcow2(options: &CreateOptions, data: impl IntoIterator<Item = Result<Range<u64>>>) -> Result<Self> {
        let geometry = Geometry::new(options.cluster_bits, options.refcount_order, options.extended_l2);
        let geometry = geometry.ok_or_else(|| image::Error::Refused {
            file: NEW.to_owned(),
            why: "extended L2 entries need clusters of at least 16 KiB".to_owned(),
        })?;
        let size = geometry.cluster_size();
        let disk = checked_disk(geometry, options.size)?;
        let mut needed = 0;
        let mut covered = 0;
        for range in data {
            let range = range?;
            let first = (range.start - range.start % size).max(covered);
            let end = range.end.next_multiple_of(size).max(first);
            needed += end - first;
            covered = end;
        }
        if options.backing.is_some() || matches!(options.preallocation, Preallocation::Falloc | Preallocation::Full) {
            needed = disk;
        }
        let metadata = full_metadata(geometry, disk);
        Ok(Self { required: metadata + needed, fully_allocated: metadata + disk, bitmaps: None })
    }

    /// The measure of a raw file: holes count.
    #[must_use]
    pub const fn of_raw(size: u64) -> Self {
        Self { required: size, fully_allocated: size, bitmaps: None }
    }
}

/// How large the qcow2 image would be at most to which `source` is converted with these options; without a source, the
/// empty image of `options.size` bytes. Only metadata is read. For a raw target, see [`Measurement::of_raw`].
///
/// ```
/// use qcow2_chain::image::CreateOptions;
/// use qcow2_chain::merge::{Measurement, measure};
///
/// let size = measure(None, &CreateOptions::new(1 << 30))?;
/// assert_eq!((size.required, size.fully_allocated), (393_216, 1_074_135_040));
/// assert_eq!(Measurement::of_raw(1 << 30).required, 1 << 30);
/// # Ok::<(), qcow2_chain::merge::Error>(())
/// ```
///
/// # Errors
/// As [`Measurement::of_qcow2`], and what reading the source's metadata gives.
pub fn measure(source: Option<&Chain>, options: &CreateOptions) -> Result<Measurement> {
    let Some(source) = source else {
        // What an empty overlay shows of its backing file, it does not hold.
        return Measurement::of_qcow2(&CreateOptions { backing: None, ..options.clone() }, []);
    };
    let options = CreateOptions { size: source.virtual_size(), ..options.clone() };
    let extents = source.extents(0..options.size).filter_map(|extent| match extent {
        Ok(extent) if extent.is_zero() => None,
        Ok(extent) => Some(Ok(extent.guest.get()..extent.end())),
        Err(error) => Some(Err(error.into())),
    });
    let mut measured = Measurement::of_qcow2(&options, extents)?;
    measured.bitmaps = bitmaps(source, &options)?;
    Ok(measured)
}

/// The disk in whole clusters, if one L1 table can map it.
fn checked_disk(geometry: Geometry, size: u64) -> Result<u64> {
    if geometry.l1_entries_for(size) > MAX_L1_ENTRIES || size > MAX_OFFSET {
        let what = format!("a disk of {size} bytes with clusters of {} bytes", geometry.cluster_size());
        return Err(image::Error::Limit { file: NEW.to_owned(), what }.into());
    }
    Ok(size.next_multiple_of(geometry.cluster_size()))
}

/// What messages call the image that is only measured.
const NEW: &str = "new image";

/// The bytes of all metadata of a full disk, as QEMU counts: whole clusters of L1 and L2 entries, and refcounts that count
/// themselves.
fn full_metadata(geometry: Geometry, disk: u64) -> u64 {
    let size = geometry.cluster_size();
    let l2_entries = (disk / size).next_multiple_of(geometry.l2_entries());
    let l2_tables = l2_entries / geometry.l2_entries();
    let l1_bytes = (l2_tables * 8).next_multiple_of(size);
    let known = size + l2_tables * size + l1_bytes;
    let clusters = (known + disk) / size;
    let mut counting = 0;
    loop {
        let blocks = (clusters + counting).div_ceil(geometry.refcount_block_entries());
        let tables = blocks.div_ceil(size / 8);
        if blocks + tables == counting {
            return known + counting * size;
        }
        counting = blocks + tables;
    }
}

/// What the bitmaps of a source's top would take: all of their bits, their tables, and the directory.
fn bitmaps(source: &Chain, options: &CreateOptions) -> Result<Option<u64>> {
    let Node::Qcow2(image) = &source.top().node else { return Ok(None) };
    if options.version < Version::V3 || image.header().header.version < Version::V3 {
        return Ok(None);
    }
    let cluster = 1_u64 << options.cluster_bits.get();
    let mut total = 0;
    let mut directory = 0;
    for bitmap in image.bitmaps()? {
        let granularity = 1_u64.checked_shl(bitmap.granularity_bits.into()).unwrap_or(u64::MAX);
        let clusters = options.size.div_ceil(granularity).div_ceil(8).div_ceil(cluster);
        total += clusters * cluster + (clusters * 8).next_multiple_of(cluster);
        // Extra data is not taken over.
        directory += BitmapDirectoryEntry { extra_data: Vec::new(), ..bitmap }.encoded_len() as u64;
    }
    Ok(Some(total + directory.next_multiple_of(cluster)))
}
