//! Codecs of the qcow2 format: bytes become typed values and back, without I/O and without state.
//!
//! Decoding validates once, into types that need no second look. Nothing here panics on any input, and nothing
//! allocates by a length that was not compared with a limit.
// Tests may index and add: a panic there is a failed test.
#![cfg_attr(not(test), warn(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::as_conversions))]

mod bitmap;
mod compressed;
mod cursor;
mod error;
mod extension;
mod features;
mod geometry;
mod header;
mod header_cluster;
mod l1;
mod l2;
pub mod limits;
mod refcount;
mod snapshot;
mod units;

pub use bitmap::*;
pub use compressed::*;
pub use error::*;
pub use extension::*;
pub use features::*;
pub use geometry::*;
pub use header::*;
pub use header_cluster::*;
pub use l1::*;
pub use l2::*;
pub use limits::Limits;
pub use refcount::*;
pub use snapshot::*;
pub use units::*;
