//! Read-only views of a snapshot set: listing, verification, changed ranges and export.

pub(super) mod changed;
pub(super) mod export;
pub(super) mod listing;
pub(super) mod verify;
