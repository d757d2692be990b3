//! How many L2 tables a walk may meet.
//!
//! 4 million L1 entries may all name one L2 table of 262,144 entries, in a file of 40 MiB. Whoever walks such an image is
//! kept busy with 10^12 entries. A file has no more L2 tables than clusters, so a walk that meets more meets some of them
//! again, which no sound image makes it do.

use std::sync::PoisonError;

use crate::format::{FormatError, GuestOffset};

use super::Result;
use super::state::State;

/// So many tables are met before it is asked how long the file is.
const UNASKED: u64 = 4;

/// The L2 tables that one walk has met.
#[derive(Debug)]
pub(super) struct TableCount {
    met: u64,
    allowed: u64,
    /// The L1 index that was met last.
    last: Option<u64>,
}

impl Default for TableCount {
    fn default() -> Self {
        Self { met: 0, allowed: UNASKED, last: None }
    }
}

impl TableCount {
    /// Notes that the walk has come to this guest address.
    ///
    /// # Errors
    /// [`super::Error::Corrupt`] where it has now met more L2 tables than there can be.
    pub(super) fn enter(&mut self, state: &State, position: GuestOffset) -> Result<()> {
        let index = state.geometry.l1_index(position);
        let entry = state.l1.get(super::as_len(index));
        if self.last.replace(index) == Some(index) || entry.is_none_or(|entry| entry.l2_table().is_none()) {
            return Ok(());
        }
        self.met += 1;
        if self.met > self.allowed {
            // The file may have been longer when the walk began.
            self.allowed = self.allowed.max(most_tables(state)?);
        }
        if self.met <= self.allowed {
            return Ok(());
        }
        let at = state.header.header.l1_table_offset;
        let expected = format!("at most {}, as many as the file has clusters", self.allowed);
        Err(state.corrupt(FormatError::corrupt("L1 table", at.get(), "L2 tables", self.met, expected)))
    }
}

/// The L2 tables that lie in the file, and those that are not there yet.
fn most_tables(state: &State) -> Result<u64> {
    let unwritten = state.l2.lock().unwrap_or_else(PoisonError::into_inner).dirty_count() as u64;
    Ok(state.geometry.clusters_for(state.storage.len()?).saturating_add(unwritten))
}
