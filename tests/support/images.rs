//! Random images in memory, with what they show.

use std::sync::Arc;

use qcow2_chain::format::{
    AutoclearFeatures, BitmapDirectoryEntry, BitmapsExtension, ClusterBits, Extension, GuestOffset, HeaderCluster,
    HostOffset, Limits, RefcountOrder, Version, encode_bitmap_directory,
};
use qcow2_chain::image::{Backing as _, CreateOptions, Image};
use qcow2_chain::storage::MemoryStorage;

use super::ours::Bytes;
use super::rng::Rng;
use super::victim::Victim;

/// Options for a new image of any geometry with small clusters.
pub fn random_options(rng: &mut Rng, size: u64) -> CreateOptions {
    let version = if rng.chance(1, 4) { Version::V2 } else { Version::V3 };
    let extended = version == Version::V3 && rng.chance(1, 4);
    let bits = if extended { 14 } else { rng.pick(&[9, 9, 10, 12]) };
    let options = CreateOptions::new(size)
        .with_version(version)
        .with_cluster_bits(ClusterBits::new(bits).unwrap())
        .with_extended_l2(extended);
    match version {
        Version::V3 => options.with_refcount_order(RefcountOrder::new(rng.pick(&[0, 1, 3, 4, 5, 6])).unwrap()),
        Version::V2 => options,
    }
}

/// An image in memory with random content; what it shows is returned too. `over` names a backing file and says what that
/// shows.
pub fn random_image(rng: &mut Rng, size: u64, over: Option<(&str, &[u8])>) -> (Vec<u8>, Vec<u8>) {
    let options = random_options(rng, size);
    random_content(rng, options, over)
}

/// The same in this shape.
pub fn random_content(rng: &mut Rng, mut options: CreateOptions, over: Option<(&str, &[u8])>) -> (Vec<u8>, Vec<u8>) {
    let size = options.size;
    let mut model = over.map_or(Vec::new(), |(_, below)| below.to_vec());
    model.resize(usize::try_from(size).unwrap(), 0);
    let below = Bytes(model.clone());
    options.backing = over.map(|(name, _)| (name.as_bytes().to_vec(), b"qcow2".to_vec()));
    let storage = Arc::new(MemoryStorage::new("new"));
    let image = Image::create(storage.clone(), &options).unwrap();
    for _ in 0..rng.within(0..6) {
        let range = rng.range(size, 512);
        let (at, len) = (GuestOffset::new(range.start), range.end - range.start);
        let byte = if rng.chance(1, 4) { 0 } else { rng.within(1..4).try_into().unwrap() };
        if byte == 0 {
            image.write_zeroes_at_over(at, len, &below).unwrap();
        } else {
            image.write_at_over(&vec![byte; usize::try_from(len).unwrap()], at, &below).unwrap();
        }
        model[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()].fill(byte);
    }
    image.close().unwrap();
    (storage.to_vec(), model)
}

/// What an image shows over the given bytes, if it can be read.
pub fn try_shown(image: &Image, below: &[u8]) -> Option<Vec<u8>> {
    let mut content = vec![0; usize::try_from(image.virtual_size()).unwrap()];
    Bytes(below.to_vec()).read_at(&mut content, GuestOffset::ZERO).unwrap();
    image.read_present(&mut content, GuestOffset::ZERO, &mut Vec::new()).ok()?;
    Some(content)
}

/// A backing file's name and format.
pub type BackingName = Option<(Vec<u8>, Option<Vec<u8>>)>;

pub fn random_backing(rng: &mut Rng) -> BackingName {
    if rng.chance(1, 6) {
        return None;
    }
    let longest = rng.pick(&[8, 60, 400, 1023]);
    let len = usize::try_from(rng.within(1..longest + 1)).unwrap();
    let letter = rng.pattern();
    Some((
        vec![letter; len],
        rng.pick(&[None, Some(b"raw".to_vec()), Some(b"qcow2".to_vec()), Some(b"long-format".to_vec())]),
    ))
}

/// An image with a random header: version, cluster size, backing file, further extensions.
pub fn random_header(rng: &mut Rng) -> Option<(Vec<u8>, BackingName)> {
    let version = rng.pick(&[Version::V2, Version::V3, Version::V3]);
    let bits = rng.pick(&[9, 10, 11, 12, 13, 16]);
    let storage = Arc::new(MemoryStorage::new("new"));
    let options = CreateOptions::new(1 << 20).with_version(version).with_cluster_bits(ClusterBits::new(bits).unwrap());
    Image::create(storage.clone(), &options).unwrap().close().unwrap();
    let mut bytes = storage.to_vec();
    let mut header = HeaderCluster::decode(&bytes, bytes.len() as u64, &Limits::default()).unwrap();
    for number in 0..rng.within(0..4) {
        let len = usize::try_from(rng.within(0..200)).unwrap();
        let data = rng.bytes(len);
        header.set_extension(Extension::Unknown { kind: 0x7000_0000 + u32::try_from(number).unwrap(), data });
    }
    let backing = random_backing(rng);
    if let Some((name, format)) = &backing {
        header.set_backing(Some(name), format.as_deref());
    }
    let encoded = header.encode_over(&bytes[..1 << bits]).ok()?;
    bytes[..encoded.len()].copy_from_slice(&encoded);
    Some((bytes, backing))
}

pub fn backing_of(header: &HeaderCluster) -> BackingName {
    header.backing_file.clone().map(|name| (name, header.backing_format().map(<[u8]>::to_vec)))
}

/// An autoclear bit that nobody knows.
pub const UNKNOWN: u64 = 1 << 17;

/// Gives an image a bitmap that records, and a feature that this library does not know: both must go before data changes.
pub fn vouch(rng: &mut Rng, image: &mut Vec<u8>) {
    let header = HeaderCluster::decode(image, image.len() as u64, &Limits::default()).expect("decodes");
    if header.header.version == Version::V2 {
        return;
    }
    let mut victim = Victim { bytes: std::mem::take(image) };
    let cluster = victim.cluster_size();
    let (directory, len) =
        (victim.len().next_multiple_of(cluster), victim.len().next_multiple_of(cluster) + 2 * cluster);
    if victim.refcount_byte(len / cluster).is_none() {
        *image = victim.bytes;
        return;
    }
    victim.bytes.resize(usize::try_from(len).unwrap(), 0);
    victim.set_refcount(directory / cluster, true);
    victim.set_refcount(directory / cluster + 1, true);
    let entry = BitmapDirectoryEntry {
        bitmap_table_offset: HostOffset::new(directory + cluster),
        bitmap_table_size: 1,
        flags: BitmapDirectoryEntry::AUTO,
        kind: 1,
        granularity_bits: 16,
        name: b"bitmap".to_vec(),
        extra_data: Vec::new(),
    };
    let encoded = encode_bitmap_directory(&[entry]);
    let at = usize::try_from(directory).unwrap();
    victim.bytes[at..at + encoded.len()].copy_from_slice(&encoded);
    let mut header = header;
    // The unknown feature alone, the bitmap alone, or both: each has a barrier of its own.
    header.header.autoclear_features.0 |= rng.pick(&[UNKNOWN, 0, UNKNOWN]) | AutoclearFeatures::BITMAPS;
    header.set_extension(Extension::Bitmaps(BitmapsExtension {
        nb_bitmaps: 1,
        bitmap_directory_size: encoded.len() as u64,
        bitmap_directory_offset: HostOffset::new(directory),
    }));
    let first = header.encode_over(&victim.bytes[..header.header.geometry().cluster_len()]).expect("it has room");
    victim.bytes[..first.len()].copy_from_slice(&first);
    *image = victim.bytes;
}
