//! `check -r leaks` and `check -r all` on a damaged image.
//!
//! Invariants: no panic, bounded memory and time. When a repair says that nothing is wrong any more, a check says the same,
//! and the image opens for writing. A second repair finds nothing that the first could have mended, and writes nothing.
//! Whatever it finds, repairing loses nothing: data that the damaged image still reads as it was written reads the same
//! afterwards.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use qcow2_chain::format::GuestOffset;
use qcow2_chain::image::{CheckOptions, Fix, Image, OpenOptions, check};
use qcow2_chain::storage::MemoryStorage;
use qcow2_chain_fuzz::inputs::Repair;
use qcow2_chain_fuzz::limits;

/// What is compared at once: no cluster is smaller.
const SECTOR: usize = 512;

fuzz_target!(|input: Repair| {
    let (hostile, all) = input;
    let sound = hostile.sound();
    // What looks like data in an image that never was sound may be tables.
    if hostile.is_given() && !is_clean(&sound) {
        return;
    }
    let model = contents(&sound);
    let storage = Arc::new(MemoryStorage::with_bytes("damaged", hostile.damage(sound)));
    let before = contents(&storage.to_vec());
    let mut options = CheckOptions::default().with_limits(limits());
    options.fix = if all { Fix::All } else { Fix::Leaks };
    let repaired = check(&*storage, &options);
    let after = contents(&storage.to_vec());
    // Zeroes may be read by chance, from tables that are none.
    let is_data = |sector: &[u8]| sector.iter().any(|byte| *byte != 0);
    for (number, sector) in model.iter().enumerate() {
        let Some(sector) = sector.as_ref().filter(|sector| is_data(sector)) else { continue };
        if before.get(number).and_then(Option::as_ref) == Some(sector) {
            assert!(
                after.get(number).and_then(Option::as_ref) == Some(sector),
                "sector {number} is lost: {repaired:?}"
            );
        }
    }
    let Ok(repaired) = repaired else { return };
    let bytes = storage.to_vec();
    let looked =
        check(&*storage, &CheckOptions::default().with_limits(limits())).expect("what was repaired is checked");
    assert_eq!(repaired.is_clean(), looked.is_clean(), "{repaired:?}, and then {looked:?}");
    if repaired.is_clean() {
        check(&*storage, &options).expect("what was repaired is repaired");
        assert!(storage.to_vec() == bytes, "a repair of what is sound wrote");
        // Of what check does not look at, sizes and features may still keep it from opening; then for reading too.
        let read = Image::open(storage.clone(), &OpenOptions::default().with_limits(limits()));
        let write = Image::open(storage.clone(), &OpenOptions::default().with_write(true).with_limits(limits()));
        assert_eq!(read.is_ok(), write.is_ok(), "{write:?}");
    }
});

fn is_clean(bytes: &[u8]) -> bool {
    let storage = MemoryStorage::with_bytes("given", bytes);
    check(&storage, &CheckOptions::default().with_limits(limits())).is_ok_and(|report| report.is_clean())
}

/// What a guest reads, sector by sector; nothing where it gets an error.
fn contents(bytes: &[u8]) -> Vec<Option<Vec<u8>>> {
    let storage = Arc::new(MemoryStorage::with_bytes("contents", bytes));
    let Ok(image) = Image::open(storage, &OpenOptions::default().with_limits(limits())) else { return Vec::new() };
    let sectors = image.virtual_size().min(2 << 20) / SECTOR as u64;
    let read = |number: u64| {
        let mut buf = vec![0; SECTOR];
        image.read_present(&mut buf, GuestOffset::new(number * SECTOR as u64), &mut Vec::new()).ok().map(|()| buf)
    };
    (0..sectors).map(read).collect()
}
