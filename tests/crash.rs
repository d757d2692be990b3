//! Power failures at every instant of every operation: the states that a recorder makes, judged by a model of the disk, by
//! our own check and, some of them, by QEMU's; and the harness itself, which must miss each barrier that is taken out.

use crate::protocols::{Convert, Create, HeaderChange, Merging, Rebase, Remove, Repair, Resize, Writer};
use std::collections::BTreeSet;
use std::path::Path;

use crate::support::protocol::{Effort, Proofs, Protocol, crash, take_out};
use crate::support::rng::Rng;

#[test]
fn every_crash_of_a_writer_leaves_old_or_new_sectors_and_at_worst_leaks() {
    assert!(crash("crashed writers", 80, Effort::ORDINARY, Writer::random) > 4_000);
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
fn every_crash_of_a_commit_that_removes_leaves_no_layer_without_what_it_stands_on() {
    assert!(crash("crashed commits that remove", 10, Effort::ORDINARY, Remove::random) > 1_000);
}

#[test]
fn every_crash_of_a_repair_makes_nothing_worse_and_the_next_run_completes_it() {
    assert!(crash("crashed repairs", 20, Effort::ORDINARY, Repair::random) > 1_000);
}

/// Barriers that no run needs, by the operation, what their line says, and why they are there all the same.
const COVERED: [(&str, &str, &str); 8] = [
    ("create", "state.is_dirty()", "an image that is closed cannot know that its creation was durable"),
    ("rebase", "state.is_dirty()", "closing the chain: the header change before it was durable"),
    ("convert", "storage.sync()?; // barrier: all that the header names", "the header is kept back until the very end"),
    ("convert", "a promise: the image is there", "the header is kept back until the very end"),
    ("merge", "a promise: the disk has its new size", "a resize alone promises it; in a merge the last flush follows"),
    ("remove", "a promise: the disk has its new size", "a resize alone promises it; in a merge the last flush follows"),
    (
        "check",
        "barrier: every repair before the word",
        "a program that was killed leaves writes that only the system holds; a recording begins with what is durable",
    ),
    ("convert", "barrier: data, refcounts", "no header leads to the mappings yet; the last barrier covers all"),
];

/// Lines that call for a sync and are no barrier of an operation.
const PASSED_ON: [&str; 3] = [
    "self.inner.sync()",
    // Without a writer nothing is dirty, and `Image::flush` answers by itself.
    "return Ok(self.storage.sync()?);",
    // The corrupt bit: the error that led there is what the caller hears of.
    "Ok(storage.sync()?)",
];

/// For each operation and each barrier in it, some run without that barrier fails one of the tests above: its order is needed,
/// or what it promises. A barrier that no operation here reaches fails this test too.
#[test]
fn every_barrier_of_every_operation_is_proved() {
    let operations: [(&str, Proofs); 9] = [
        ("write", prove("write", 160, Writer::random)),
        ("resize", prove("resize", 24, Resize::random)),
        ("create", prove("create", 12, Create::random)),
        ("header", prove("header", 12, HeaderChange::random)),
        ("rebase", prove("rebase", 8, Rebase::random)),
        ("convert", prove("convert", 6, Convert::random)),
        ("merge", prove("merge", 20, Merging::random)),
        ("remove", prove("remove", 10, Remove::random)),
        ("check", prove("check", 160, Repair::random)),
    ];
    let mut lines: BTreeSet<&str> = BTreeSet::new();
    let mut unproved = Vec::new();
    for (operation, proofs) in &operations {
        for (name, (proved, _)) in proofs {
            if *proved == 0 {
                unproved.push(format!("{operation}: {name}"));
            }
            lines.insert(name);
        }
    }
    assert!(unproved.is_empty(), "no run fails without: {unproved:#?}");
    let missed: Vec<String> =
        barriers_in_the_source().into_iter().filter(|name| !lines.contains(&**name) && !is_covered(name)).collect();
    assert!(missed.is_empty(), "no operation reaches: {missed:#?}");
}

fn prove<P: Protocol>(operation: &str, usual: u64, random: impl Fn(&mut Rng) -> P + Sync) -> Proofs {
    let covered = |name: &str| COVERED.iter().any(|(of, line, _)| *of == operation && name.contains(line));
    take_out(&format!("barriers of {operation}"), usual, covered, random)
}

fn is_covered(name: &str) -> bool {
    COVERED.iter().any(|(_, line, _)| name.contains(line))
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
