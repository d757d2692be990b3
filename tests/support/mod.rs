//! What the integration tests share: QEMU's tools as judges, seeded randomness, random images with a model of their
//! content, and images that other people's programs made.

#[cfg(feature = "vm")]
pub mod counted;
pub mod foreign;
#[cfg(target_os = "linux")]
pub mod holder;
pub mod images;
#[cfg(all(feature = "vm", unix))]
pub mod judge;
#[cfg(feature = "vm")]
pub mod lab;
pub mod layers;
pub mod memory;
pub mod ours;
pub mod protocol;
pub mod qemu;
pub mod ram;
pub mod recipe;
pub mod rng;
#[cfg(all(feature = "vm", unix))]
pub mod scene;
pub mod stack;
pub mod states;
pub mod victim;

use std::io::Write;

/// Says something that must be seen although the tests pass: `cargo test` swallows what `println!` prints, not this.
pub fn say(message: &str) {
    let _ = writeln!(std::io::stderr(), "{message}");
}
