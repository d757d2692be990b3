//! Any bytes as an L2 table, refcount block, compressed descriptor, snapshot table or bitmap directory.
//!
//! Invariants: no panic. L2: an entry that is accepted and set again decodes to itself. Refcounts: a block's bytes survive
//! reading and setting every entry, and the searches find what a plain loop finds. Descriptors: decode and encode are
//! inverse to each other. Snapshots and bitmaps: what decodes encodes to bytes that decode to the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qcow2_chain::format::{
    BitmapsExtension, ClusterBits, CompressedDescriptor, Geometry, HostOffset, L2Table, Limits, RefcountBlock,
    RefcountOrder, Version, decode_bitmap_directory, decode_snapshots, encode_bitmap_directory, encode_snapshots,
};
use qcow2_chain_fuzz::inputs::Tables as Input;

fuzz_target!(|input: Input<'_>| {
    let bits = ClusterBits::new(9 + u32::from(input.cluster_bits % 13)).expect("within the limits");
    let order = RefcountOrder::new(u32::from(input.refcount_order % 7)).expect("within the limits");
    descriptor(input.words[0], bits);
    snapshots(&input);
    bitmaps(&input);
    // Tables of at most 16 KiB: a larger one has nothing new to say.
    let small = ClusterBits::new(bits.get().min(14)).expect("within the limits");
    if let Some(geometry) = Geometry::new(small, order, input.extended_l2) {
        l2_table(&input, geometry);
        refcount_block(&input, geometry);
    }
});

/// One cluster filled with the input's bytes, over and over.
fn cluster(input: &Input<'_>, geometry: Geometry) -> Box<[u8]> {
    let len = geometry.cluster_len();
    if input.bytes.is_empty() {
        return vec![0; len].into_boxed_slice();
    }
    input.bytes.iter().copied().cycle().take(len).collect()
}

fn l2_table(input: &Input<'_>, geometry: Geometry) {
    let version = if input.version_2 { Version::V2 } else { Version::V3 };
    let table = L2Table::decode(cluster(input, geometry), geometry, version).expect("one cluster long");
    let mut copy = L2Table::empty(geometry, version);
    let at = HostOffset::new(input.words[0]);
    for index in 0..table.len().min(256) {
        let Ok(entry) = table.get(index, at) else { continue };
        copy.set(index, &entry);
        assert_eq!(copy.get(index, at).expect("what was set is read"), entry);
    }
}

fn refcount_block(input: &Input<'_>, geometry: Geometry) {
    let block = RefcountBlock::decode(cluster(input, geometry), geometry).expect("one cluster long");
    let mut copy = RefcountBlock::empty(geometry);
    for index in 0..block.len() {
        copy.set(index, block.get(index));
    }
    assert_eq!(copy.as_bytes(), block.as_bytes());
    let from = input.count as usize % block.len();
    let free = (from..block.len()).find(|index| block.get(*index) == 0);
    let used = (from..block.len()).find(|index| block.get(*index) != 0);
    assert_eq!(block.next_free(from), free);
    assert_eq!(block.next_used(from), used);
}

fn descriptor(word: u64, bits: ClusterBits) {
    let decoded = CompressedDescriptor::decode(word, bits);
    assert!(decoded.sectors >= 1 && decoded.max_len() >= 1);
    assert_eq!(CompressedDescriptor::decode(decoded.encode(bits), bits), decoded);
}

fn snapshots(input: &Input<'_>) {
    let table = HostOffset::new(input.words[1]);
    let Ok((entries, len)) = decode_snapshots(input.bytes, input.count, table, &Limits::default()) else { return };
    assert!(len <= input.bytes.len());
    let encoded = encode_snapshots(&entries);
    let (again, _) = decode_snapshots(&encoded, input.count, table, &Limits::default()).expect("what encodes decodes");
    assert_eq!(again, entries);
}

fn bitmaps(input: &Input<'_>) {
    let extension = BitmapsExtension {
        nb_bitmaps: input.count,
        bitmap_directory_size: input.bytes.len() as u64,
        bitmap_directory_offset: HostOffset::new(input.words[1]),
    };
    let Ok(entries) = decode_bitmap_directory(input.bytes, &extension) else { return };
    let encoded = encode_bitmap_directory(&entries);
    let extension = BitmapsExtension { bitmap_directory_size: encoded.len() as u64, ..extension };
    assert_eq!(decode_bitmap_directory(&encoded, &extension).expect("what encodes decodes"), entries);
}
