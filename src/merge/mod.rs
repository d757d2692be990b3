//! Deltas become one. Tmp.
