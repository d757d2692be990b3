//! Worlds that are built on purpose.
