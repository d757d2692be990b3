//! A hostile image, opened for writing, and written.
//!
//! Invariants: no panic, bounded memory and time. What was written and acknowledged is read back, on any image that takes
//! the write. An image that `check` calls clean before is clean after: never a corruption, nor a leak once closed. Two things
//! count as not clean that `check`, as QEMU's, does not look at: refcounts behind the file's end, which become leaks where it
//! grows. And of given images only, a flag COPIED that is missing, which costs a copy and no data: two entries shared a cluster
//! (a table and itself, a compressed cluster and a standard one), and one of them leads elsewhere now.
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
    let grown_storage = MemoryStorage::with_bytes("grown", &grown);
    // A data cluster behind the end is sound in the longer copy only.
    let sound = [&*storage, &grown_storage].iter().all(|storage| report(storage).as_ref().is_some_and(clean));
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
            assert!(!sound || buf.iter().all(|read| *read == byte), "written, not read");
        }
    }
    if image.close().is_ok() && sound {
        let mut after = report(&storage);
        if let Some(report) = after.as_mut().filter(|_| given) {
            let missing = report.findings.iter().filter(|finding| finding.text.ends_with("flag is missing"));
            report.corruptions -= missing.count() as u64;
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
