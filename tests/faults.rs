//! Calls to the storage and to its names that fail, one after the other: the operation says so, nothing is lost, and the
//! next run on a healthy storage completes it.

use crate::protocols::{Convert, Create, HeaderChange, Merging, Rebase, Repair, Resize, Writer};
use crate::support::protocol::break_all;

// The floors are what the ordinary run reached when it was last changed, less a tenth: it may not quietly reach less.

#[test]
fn a_writer_survives_every_fault() {
    assert!(break_all("broken writers", 6, Writer::random) > 350);
}

#[test]
fn a_resize_survives_every_fault() {
    assert!(break_all("broken resizes", 4, Resize::random) > 215);
}

#[test]
fn a_creation_survives_every_fault() {
    assert!(break_all("broken creations", 4, Create::random) > 210);
}

#[test]
fn a_header_change_survives_every_fault() {
    assert!(break_all("broken header changes", 12, HeaderChange::random) > 380);
}

#[test]
fn a_rebase_survives_every_fault() {
    assert!(break_all("broken rebases", 2, Rebase::random) > 195);
}

#[test]
fn a_conversion_survives_every_fault() {
    assert!(break_all("broken conversions", 2, Convert::random) > 250);
}

#[test]
fn a_merge_survives_every_fault() {
    assert!(break_all("broken merges", 4, Merging::random) > 390);
}

#[test]
fn a_repair_survives_every_fault() {
    assert!(break_all("broken repairs", 10, Repair::random) > 900);
}
