//! A hostile image, opened for writing, and written.
//!
//! Invariants: no panic, bounded memory and time. What was written and acknowledged is read back, on any image that takes
//! the write. An image that `check` calls clean before is clean after: never a corruption, nor a leak once closed. Two things
//! count as not clean that `check`, as QEMU's, does not look at: refcounts behind the file's end, which become leaks where it
//! grows. And of given images only, an entry that shared its cluster with another may be left with it alone, and lack COPIED.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use qcow2_chain::format::GuestOffset;
use qcow2_chain::image::{CheckOptions, CheckReport, Image, OpenOptions, check};
use qcow2_chain::storage::MemoryStorage;
use qcow2_chain_fuzz::inputs::Write;
use qcow2_chain_fuzz::{Step, limits};

fuzz_target!(|input: Write| {
    let (hostile, steps, repair) = input;
    let given = hostile.is_given();
    let storage = Arc::new(MemoryStorage::with_bytes("hostile", hostile.bytes()));
    if repair {
        let mut options = CheckOptions::default();
        options.fix = qcow2_chain::image::Fix::All;
        options.limits = limits();
        let _ = check(&*storage, &options);
    }
    // What stands behind the end is looked at as well, as far as the steps can make the file grow.
    let grown = storage.to_vec().into_iter().chain(std::iter::repeat_n(0, 2 << 20)).collect::<Vec<_>>();
    let before = report(&MemoryStorage::with_bytes("grown", &grown));
    let Ok(image) = Image::open(storage.clone(), &OpenOptions::default().with_write(true).with_limits(limits())) else {
        return;
    };
    if image.virtual_size() > 1 << 30 {
        return;
    }
    for step in steps.into_iter().take(8) {
        if step.apply(&image).is_err() {
            continue;
        }
        if let Step::Write { offset, len, byte } = step
            && image.virtual_size() > 0
        {
            let offset = u64::from(offset) % image.virtual_size();
            let len = u64::from(len).min(image.virtual_size() - offset);
            let mut buf = vec![!byte; len as usize];
            image.read_at(&mut buf, GuestOffset::new(offset)).expect("what was written can be read");
            // Only an image without faults promises that no two guest clusters share a host cluster.
            assert!(!before.as_ref().is_some_and(clean) || buf.iter().all(|read| *read == byte), "written, not read");
        }
    }
    if image.close().is_ok() && before.as_ref().is_some_and(clean) {
        let mut after = report(&storage);
        if let Some(report) = after.as_mut().filter(|_| given) {
            let alone = report.findings.iter().filter(|finding| finding.text.ends_with("flag is missing")).count();
            report.corruptions -= alone as u64;
        }
        assert!(after.as_ref().is_some_and(clean), "clean before, and now {after:?}");
    }
});

fn report(storage: &MemoryStorage) -> Option<CheckReport> {
    let mut options = CheckOptions::default();
    options.limits = limits();
    check(storage, &options).ok()
}

fn clean(report: &CheckReport) -> bool {
    report.corruptions == 0 && report.leaks == 0 && report.check_errors == 0
}
