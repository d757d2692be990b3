//! What the parts cost, on real files in a temporary directory: `cargo bench`, or `cargo bench -- read` for some.

mod image;
mod merge;
mod setup;

use criterion::{criterion_group, criterion_main};

criterion_group! {
    name = disk;
    config = setup::criterion();
    targets = image::open, image::l2_table, image::extents, image::allocate, image::compare_images, image::read, image::write_overlay, image::check_image, merge::commit_delta
}
criterion_main!(disk);
