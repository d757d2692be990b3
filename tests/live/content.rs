//! What an image holds, seen from outside the guest.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::hypervisor::run;
use crate::lab::text;
use crate::record::{SIZE, number};

/// The records of one disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content {
    serial: String,
    /// Numbers of the appended records, in order.
    pub appended: Vec<u64>,
    /// Numbers of the records that are written in place.
    pub slots: Vec<u64>,
}

impl Content {
    /// Reads an image that nobody writes to. Its file system may have been cut off at any moment: the journal is replayed on
    /// a copy, after which fsck must find nothing. A record that is not whole fails the test.
    pub fn read(image: &Path, serial: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let raw = directory.path().join("raw");
        run("qemu-img", &["convert", "-U", "-O", "raw", text(image), text(&raw)]);
        run("e2fsck", &["-E", "journal_only", "-p", text(&raw)]);
        run("e2fsck", &["-f", "-n", text(&raw)]);
        let records = |name: &str| {
            let file = directory.path().join(name);
            run("debugfs", &["-R", &format!("dump /{name} {}", text(&file)), text(&raw)]);
            // debugfs says nothing with its exit status where there is no such file.
            let bytes = fs::read(&file).unwrap_or_default();
            let numbers = bytes.chunks(SIZE).enumerate().map(|(index, bytes)| {
                number(serial, bytes).unwrap_or_else(|| panic!("{serial}: record at {index} of {name} is not whole"))
            });
            numbers.collect()
        };
        Self { serial: serial.to_owned(), appended: records("records"), slots: records("slots") }
    }

    /// Every one of these records, which the guest had fsynced, is there, and none twice.
    pub fn assert_holds(&self, fsynced: impl IntoIterator<Item = u64>) {
        let appended: BTreeSet<u64> = self.appended.iter().copied().collect();
        assert_eq!(appended.len(), self.appended.len(), "{}: a record stands twice", self.serial);
        let slots: BTreeSet<u64> = self.slots.iter().copied().collect();
        let mut last = Vec::new();
        for number in fsynced {
            assert!(appended.contains(&number), "{}: record {number} was fsynced and is gone", self.serial);
            last.push(number);
        }
        // A slot holds the latest of its records, and what was fsynced there last or what came after it.
        for number in last.iter().rev().take(self.slots.len().saturating_sub(1)) {
            assert!(slots.contains(number) || slots.iter().any(|later| later > number), "{}: slot", self.serial);
        }
    }

    /// The highest number that was appended.
    pub fn last(&self) -> Option<u64> {
        self.appended.iter().copied().max()
    }
}
