//! Power failures at every instant of every operation: the states that a recorder makes, judged by a model of the disk, by
//! our own check and, some of them, by QEMU's; and the harness itself, which must miss each barrier that is taken out.

use crate::protocols::{Convert, Create, HeaderChange, Merging, Rebase, Repair, Resize, Writer};
use std::collections::BTreeMap;
use std::path::Path;

use crate::support::protocol::{Effort, Proofs, crash, take_out};

#[test]
fn every_crash_of_a_writer_leaves_old_or_new_sectors_and_at_worst_leaks() {
    assert!(crash("crashed writers", 80, Effort::ORDINARY, Writer::random) > 8_000);
}

#[test]
fn every_crash_of_a_resize_leaves_the_old_disk_or_the_new() {
    assert!(crash("crashed resizes", 40, Effort::ORDINARY, Resize::random) > 2_000);
}

#[test]
fn every_crash_of_a_creation_leaves_no_image_or_a_whole_one() {
    assert!(crash("crashed creations", 24, Effort::ORDINARY, Create::random) > 2_000);
}

#[test]
fn every_crash_of_a_header_change_leaves_the_old_backing_file_or_the_new() {
    assert!(crash("crashed header changes", 400, Effort::ORDINARY, HeaderChange::random) > 2_000);
}

#[test]
fn every_crash_of_a_rebase_leaves_a_disk_that_reads_as_before() {
    assert!(crash("crashed rebases", 20, Effort::ORDINARY, Rebase::random) > 2_000);
}

#[test]
fn every_crash_of_a_conversion_leaves_no_image_or_a_whole_one() {
    assert!(crash("crashed conversions", 6, Effort::ORDINARY, Convert::random) > 2_000);
}

#[test]
fn every_crash_of_a_merge_leaves_the_disk_as_it_was_and_the_next_run_completes_it() {
    assert!(crash("crashed merges", 20, Effort::ORDINARY, Merging::random) > 2_000);
}

#[test]
fn every_crash_of_a_repair_makes_nothing_worse_and_the_next_run_completes_it() {
    assert!(crash("crashed repairs", 120, Effort::ORDINARY, Repair::random) > 2_000);
}

/// Barriers that no run needs, by the operation, what their line says, and why they are there all the same.
const COVERED: [(&str, &str, &str); 0] = [];

/// Lines that call for a sync and are no barrier of an operation: they pass the call on.
const PASSED_ON: [&str; 1] = ["self.inner.sync()"];

/// For each operation and each barrier in it, some run without that barrier fails one of the tests above: its order is needed,
/// or what it promises. A barrier that no operation here reaches fails this test too.
#[test]
fn every_barrier_of_every_operation_is_proved() {
    let operations: [(&str, Proofs); 8] = [
        ("write", take_out("barriers of a writer", 60, Writer::random)),
        ("resize", take_out("barriers of a resize", 60, Resize::random)),
        ("create", take_out("barriers of a creation", 30, Create::random)),
        ("header", take_out("barriers of a header change", 60, HeaderChange::random)),
        ("rebase", take_out("barriers of a rebase", 30, Rebase::random)),
        ("convert", take_out("barriers of a conversion", 30, Convert::random)),
        ("merge", take_out("barriers of a merge", 60, Merging::random)),
        ("check", take_out("barriers of a repair", 200, Repair::random)),
    ];
    let mut lines: BTreeMap<&str, bool> = BTreeMap::new();
    let mut unproved = Vec::new();
    for (operation, proofs) in &operations {
        for (name, (proved, runs)) in proofs {
            println!("{operation:8} {proved:3} of {runs:3}  {name}");
            let covered = COVERED.iter().any(|(of, line, _)| of == operation && name.contains(line));
            if *proved == 0 && !covered {
                unproved.push(format!("{operation}: {name}"));
            }
            *lines.entry(name).or_default() |= *proved > 0;
        }
    }
    assert!(unproved.is_empty(), "no run fails without: {unproved:#?}");
    let missed: Vec<String> =
        barriers_in_the_source().into_iter().filter(|name| !lines.contains_key(&**name)).collect();
    assert!(missed.is_empty(), "no operation reaches: {missed:#?}");
}

/// The lines of the library above the storages that call for a sync, named as the recorder names them.
fn barriers_in_the_source() -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut folders = ["src/image", "src/chain", "src/merge"].map(|folder| root.join(folder)).to_vec();
    let mut barriers = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            let shipped = text.split("#[cfg(test)]\nmod ").next().unwrap();
            let calls = |line: &&str| line.contains(".sync()") || line.contains(".sync_dir(");
            let lines = shipped.lines().map(str::trim).filter(calls).filter(|line| !PASSED_ON.contains(line));
            let file = path.strip_prefix(root).unwrap().display().to_string();
            barriers.extend(lines.map(|line| format!("{file}: {line}")));
        }
    }
    barriers
}
