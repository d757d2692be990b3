//! What the integration tests share: QEMU's tools as judges, seeded randomness, random images with a model of their
//! content, and images that other people's programs made.

pub mod foreign;
pub mod memory;
pub mod ours;
pub mod qemu;
pub mod recipe;
pub mod rng;
pub mod stack;

use std::io::Write;

/// Says something that must be seen although the tests pass: `cargo test` swallows what `println!` prints, not this.
pub fn say(message: &str) {
    let _ = writeln!(std::io::stderr(), "{message}");
}
