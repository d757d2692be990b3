//! Images and chains that somebody made to do harm.

mod bombs;
mod fields;
mod names;
#[cfg(target_os = "linux")]
mod races;
mod treat;
