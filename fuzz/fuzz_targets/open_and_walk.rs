//! A hostile image, opened for reading, and walked.
//!
//! Invariants: no panic; memory stays far below the fuzzer's limit whatever the image claims; time is bounded by the file's
//! length and the range asked for. Extents come in order, without gaps or overlaps, and never empty. What an image holds
//! does not depend on how it is asked: a read that succeeds gives zeroes where the extents say zeroes. Checking gives a
//! report or an error and, asked to repair nothing, changes not one byte.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use qcow2_chain::format::GuestOffset;
use qcow2_chain::image::{CheckOptions, ExtentKind, Image, OpenOptions, check};
use qcow2_chain::storage::MemoryStorage;
use qcow2_chain_fuzz::inputs::Walk as Input;
use qcow2_chain_fuzz::limits;

/// How many extents are looked at: an image of this size has fewer, unless it lies about its size.
const MAX_EXTENTS: usize = 20_000;

fuzz_target!(|input: Input<'_>| {
    let bytes = match input {
        Input::Made(hostile) => hostile.bytes(),
        Input::Raw(bytes) => bytes.to_vec(),
    };
    let storage = Arc::new(MemoryStorage::with_bytes("hostile", bytes.clone()));
    let mut options = CheckOptions::default();
    options.limits = limits();
    let _ = check(&*storage, &options);
    if let Ok(image) = Image::open(storage.clone(), &OpenOptions::default().with_limits(limits())) {
        let _ = (image.snapshots(), image.bitmaps(), image.data_access());
        walk(&image);
    }
    assert!(storage.to_vec() == bytes, "looking at an image changed it");
});

fn walk(image: &Image) {
    let size = image.virtual_size();
    let mut at = 0;
    for extent in image.extents(0..size).take(MAX_EXTENTS) {
        let Ok(extent) = extent else { return };
        assert_eq!(extent.guest, GuestOffset::new(at), "a gap or an overlap");
        assert!(extent.len > 0 && extent.len <= size - at, "an extent past the end");
        let mut buf = vec![0xa5; usize::try_from(extent.len).unwrap_or(usize::MAX).min(4096)];
        let mut holes = Vec::new();
        let read = image.read_present(&mut buf, extent.guest, &mut holes);
        match (read, extent.kind) {
            (Ok(()), ExtentKind::Unallocated) => assert_eq!(holes, [(0, buf.len())]),
            (Ok(()), ExtentKind::Zero { .. }) => assert!(holes.is_empty() && buf.iter().all(|byte| *byte == 0)),
            (Ok(()), _) => assert!(holes.is_empty()),
            (Err(_), _) => {}
        }
        at += extent.len;
    }
}
