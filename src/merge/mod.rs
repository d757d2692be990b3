//! Deltas become one. OWNER: later
