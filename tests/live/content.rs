//! The content of an image, read outside the guest.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::hypervisor::run;
use crate::lab::text;
use crate::record::{SIZE, SLOTS, number};

/// The records of one disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content {
    serial: String,
    /// Numbers of the appended records, in order.
    pub appended: Vec<u64>,
    /// Numbers of the records that are written in place, by slot.
    slots: Vec<Option<u64>>,
}

impl Content {
    /// Reads an image that no process writes. Its file system may be in any crash state: the
    /// journal is replayed on a copy, and fsck must then find no errors. A record that is damaged
    /// fails the test.
    pub fn read(image: &Path, serial: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let raw = directory.path().join("raw");
        run("qemu-img", &["convert", "-U", "-O", "raw", text(image), text(&raw)]);
        run("e2fsck", &["-E", "journal_only", "-p", text(&raw)]);
        run("e2fsck", &["-f", "-n", text(&raw)]);
        let file = |name: &str| {
            let file = directory.path().join(name);
            run("debugfs", &["-R", &format!("dump /{name} {}", text(&file)), text(&raw)]);
            // Its exit status is 0 for a missing file too.
            fs::read(&file).unwrap_or_default()
        };
        let whole = |name: &str, index: usize, bytes: &[u8]| {
            number(serial, bytes).unwrap_or_else(|| panic!("{serial}: record at {index} of {name} is not whole"))
        };
        let (appended, slots) = (file("records"), file("slots"));
        let appended = appended.chunks(SIZE).enumerate().map(|(index, bytes)| whole("records", index, bytes));
        let slots = slots.chunks(SIZE).enumerate().map(|(index, bytes)| {
            let written = bytes.iter().any(|&byte| byte != 0);
            written.then(|| whole("slots", index, bytes))
        });
        Self { serial: serial.to_owned(), appended: appended.collect(), slots: slots.collect() }
    }

    /// Asserts that the image has each of these records, which the guest had fsynced. No record
    /// occurs twice, and each slot has its latest fsynced record or a later one.
    pub fn assert_holds(&self, fsynced: impl IntoIterator<Item = u64>) {
        let serial = &self.serial;
        let appended: BTreeSet<u64> = self.appended.iter().copied().collect();
        assert_eq!(appended.len(), self.appended.len(), "{serial}: a record occurs twice");
        for number in fsynced {
            assert!(appended.contains(&number), "{serial}: record {number} was fsynced and is gone");
            let slot = self.slots.get(usize::try_from(number % SLOTS).unwrap()).copied().flatten();
            assert!(
                slot.is_some_and(|found| found >= number && found % SLOTS == number % SLOTS),
                "{serial}: the slot of record {number} has {slot:?}, not it or a later one"
            );
        }
    }

    /// Returns the highest number that was appended.
    pub fn last(&self) -> Option<u64> {
        self.appended.iter().copied().max()
    }
}

#[test]
fn damaged_record_is_detected() {
    let mut bytes = crate::record::record("vda", 7);
    assert_eq!(number("vda", &bytes), Some(7));
    assert_eq!(number("vdb", &bytes), None);
    bytes[SIZE - 1] ^= 1;
    assert_eq!(number("vda", &bytes), None);
}
