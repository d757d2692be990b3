//! Images and chains that somebody made to do harm.

mod bombs;
mod fields;
mod names;
#[cfg(target_os = "linux")]
mod races;
#[cfg(feature = "vm")]
mod records;
mod treat;
