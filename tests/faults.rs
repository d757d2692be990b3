//! Calls to the storage and to its names that fail, one after the other: the operation says so, nothing is lost, and the
//! next run on a healthy storage completes it.

use crate::protocols::{Convert, Create, HeaderChange, Merging, Rebase, Repair, Resize, Writer};
use crate::support::protocol::break_all;

// The floors are what the ordinary run reached when it was last changed, less a tenth: it may not quietly reach less.

#[test]
fn a_writer_survives_every_fault() {
    assert!(break_all("broken writers", 8, Writer::random) > 1);
}

#[test]
fn a_resize_survives_every_fault() {
    assert!(break_all("broken resizes", 8, Resize::random) > 1);
}

#[test]
fn a_creation_survives_every_fault() {
    assert!(break_all("broken creations", 8, Create::random) > 1);
}

#[test]
fn a_header_change_survives_every_fault() {
    assert!(break_all("broken header changes", 16, HeaderChange::random) > 1);
}

#[test]
fn a_rebase_survives_every_fault() {
    assert!(break_all("broken rebases", 6, Rebase::random) > 1);
}

#[test]
fn a_conversion_survives_every_fault() {
    assert!(break_all("broken conversions", 4, Convert::random) > 1);
}

#[test]
fn a_merge_survives_every_fault() {
    assert!(break_all("broken merges", 8, Merging::random) > 1);
}

#[test]
fn a_repair_survives_every_fault() {
    assert!(break_all("broken repairs", 16, Repair::random) > 1);
}
