//! Power failures at every instant of every operation: the states that a recorder makes, judged by a model of the disk, by
//! our own check and, some of them, by QEMU's; and the harness itself, which must miss each barrier that is taken out.

use crate::protocols::{Convert, Create, HeaderChange, Merging, Rebase, Repair, Resize, Writer};
use crate::support::protocol::{Effort, crash};

#[test]
fn every_crash_of_a_writer_leaves_old_or_new_sectors_and_at_worst_leaks() {
    assert!(crash("crashed writers", 160, Effort::ORDINARY, Writer::random) > 5_000);
}

#[test]
fn every_crash_of_a_resize_leaves_the_old_disk_or_the_new() {
    assert!(crash("crashed resizes", 160, Effort::ORDINARY, Resize::random) > 2_000);
}

#[test]
fn every_crash_of_a_creation_leaves_no_image_or_a_whole_one() {
    assert!(crash("crashed creations", 160, Effort::ORDINARY, Create::random) > 2_000);
}

#[test]
fn every_crash_of_a_header_change_leaves_the_old_backing_file_or_the_new() {
    assert!(crash("crashed header changes", 400, Effort::ORDINARY, HeaderChange::random) > 2_000);
}

#[test]
fn every_crash_of_a_rebase_leaves_a_disk_that_reads_as_before() {
    assert!(crash("crashed rebases", 100, Effort::ORDINARY, Rebase::random) > 2_000);
}

#[test]
fn every_crash_of_a_conversion_leaves_no_image_or_a_whole_one() {
    assert!(crash("crashed conversions", 80, Effort::ORDINARY, Convert::random) > 2_000);
}

#[test]
fn every_crash_of_a_merge_leaves_the_disk_as_it_was_and_the_next_run_completes_it() {
    assert!(crash("crashed merges", 40, Effort::ORDINARY, Merging::random) > 2_000);
}

#[test]
fn every_crash_of_a_repair_makes_nothing_worse_and_the_next_run_completes_it() {
    assert!(crash("crashed repairs", 160, Effort::ORDINARY, Repair::random) > 2_000);
}
