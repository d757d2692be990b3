//! An image of compressed clusters, whose L2 entries and streams are then changed, read.
//!
//! Invariants: no panic, memory bounded by a few clusters whatever a stream unpacks to. Unchanged, the image reads as what
//! was compressed. Changed, each cluster reads or does not, always the same way: alone, again, or as part of a larger read.
#![no_main]

use std::path::PathBuf;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use qcow2_chain::chain::{Chain, Layer, Node};
use qcow2_chain::format::{ClusterBits, CompressionType, GuestOffset};
use qcow2_chain::image::{CreateOptions, Image, OpenOptions, RawImage};
use qcow2_chain::merge::{ConvertOptions, ConvertTarget, convert};
use qcow2_chain::storage::MemoryStorage;
use qcow2_chain_fuzz::inputs::Compressed as Input;
use qcow2_chain_fuzz::limits;

fuzz_target!(|input: Input<'_>| {
    let bits = if input.extended_l2 { 14 } else { 9 + u32::from(input.cluster_bits % 8) };
    let cluster = 1_usize << bits;
    let len = cluster * (1 + usize::from(input.clusters % 8));
    let pattern = if input.content.is_empty() { &[7][..] } else { input.content };
    // Every cluster a little different, and none of zeroes alone.
    let content: Vec<u8> =
        (0..len).map(|at| pattern[at % pattern.len()] ^ (at / cluster) as u8 | u8::from(at % cluster == 0)).collect();
    let mut options = CreateOptions::new(len as u64)
        .with_cluster_bits(ClusterBits::new(bits).unwrap_or_default())
        .with_extended_l2(input.extended_l2);
    options.compression_type = if input.zstd { CompressionType::Zstd } else { CompressionType::Deflate };
    let bytes = compressed(&content, options);
    if input.entries.is_empty() && input.streams.is_empty() && input.cut == 0 {
        let image = Image::open(Arc::new(MemoryStorage::with_bytes("sound", bytes)), &OpenOptions::default());
        let mut read = vec![0; len];
        image.expect("what we wrote opens").read_at(&mut read, GuestOffset::ZERO).expect("what we wrote reads");
        assert!(read == content, "not what was compressed");
        return;
    }
    let bytes = damaged(bytes, &input);
    let storage = Arc::new(MemoryStorage::with_bytes("hostile", bytes));
    let open = || Image::open(storage.clone(), &OpenOptions::default().with_limits(limits()));
    let (Ok(image), Ok(again)) = (open(), open()) else { return };
    let mut whole = vec![0; len];
    let all = image.read_at(&mut whole, GuestOffset::ZERO);
    let mut good = true;
    // Backwards, so that nothing is where the other handle's caches have it.
    for index in (0..len / cluster).rev() {
        let (at, mut one, mut two) = (index * cluster, vec![1; cluster], vec![2; cluster]);
        let first = again.read_at(&mut one, GuestOffset::new(at as u64));
        let second = image.read_at(&mut two, GuestOffset::new(at as u64));
        assert_eq!(first.is_ok(), second.is_ok());
        if first.is_ok() {
            assert!(
                one == two && (all.is_err() || one == whole[at..at + cluster]),
                "cluster {index} reads differently"
            );
        }
        good &= first.is_ok();
    }
    assert_eq!(all.is_ok(), good);
});

fn compressed(content: &[u8], options: CreateOptions) -> Vec<u8> {
    let source = RawImage::open(Arc::new(MemoryStorage::with_bytes("source", content))).expect("a raw image");
    let chain = Chain::from_layers(Layer { node: Node::Raw(source), path: PathBuf::from("source") }, []);
    let target = Arc::new(MemoryStorage::new("target"));
    let how = ConvertOptions::default().with_compress(true).with_threads(1);
    convert(&chain, ConvertTarget::Qcow2(target.clone(), options), &how, &()).expect("a sound disk is converted");
    target.to_vec()
}

fn damaged(mut bytes: Vec<u8>, input: &Input<'_>) -> Vec<u8> {
    let word = |bytes: &[u8], at: usize| {
        bytes.get(at..at + 8).map_or(0, |word| word.iter().fold(0_u64, |value, byte| value << 8 | u64::from(*byte)))
    };
    let mask = (1_u64 << 56) - 512;
    let l2 = (word(&bytes, word(&bytes, 40) as usize) & mask) as usize;
    let first = bytes.len() / 2;
    for (index, second, flip) in input.entries.iter().take(16) {
        let at = l2 + usize::from(index % 16) * 8 + if *second { 8 } else { 0 };
        let value = word(&bytes, at) ^ flip;
        if let Some(field) = bytes.get_mut(at..at + 8) {
            field.copy_from_slice(&value.to_be_bytes());
        }
    }
    for (at, value) in input.streams.iter().take(64) {
        // Streams lie behind all tables.
        let behind = bytes.len().saturating_sub(first).max(1);
        if let Some(byte) = bytes.get_mut(first + usize::from(*at) % behind) {
            *byte = *value;
        }
    }
    let keep = bytes.len().saturating_sub(usize::from(input.cut));
    bytes.truncate(keep);
    bytes
}
