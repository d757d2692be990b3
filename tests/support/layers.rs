//! Chains of files in a directory, each layer with random content, made by QEMU's tools.

use std::path::{Path, PathBuf};

use qcow2_chain::chain::{Chain, ChainOptions, Format, Policy};

use super::qemu::Qemu;
use super::recipe::{RandomImage, Shape};
use super::rng::Rng;

/// A raw image with a few runs of data.
pub fn raw(path: PathBuf, rng: &mut Rng, shape: Shape) -> RandomImage {
    let mut model = vec![0; usize::try_from(shape.size).unwrap()];
    for _ in 0..4 {
        let range = rng.range(shape.size, 512);
        model[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()].fill(rng.pattern());
    }
    std::fs::write(&path, &model).unwrap();
    RandomImage::from_model(path, shape, false, model)
}

/// A layer over another one of its directory, which it names relatively; what is over nothing is raw now and then, and its
/// name says so. `ops` random things happen to it.
pub fn layer(
    qemu: Qemu,
    path: PathBuf,
    rng: &mut Rng,
    shape: Shape,
    over: Option<&RandomImage>,
    ops: u64,
) -> RandomImage {
    let Some(over) = over else {
        if rng.chance(1, 4) {
            return raw(path.with_extension("raw"), rng, shape);
        }
        let mut base = RandomImage::create(qemu, path, shape);
        base.apply_random(qemu, rng, ops);
        return base;
    };
    let shape = Shape { preallocation: "off", ..shape };
    let (size, options, name) = (shape.size.to_string(), shape.options(), name_of(over));
    let file = path.to_string_lossy().into_owned();
    qemu.img(&["create", "-q", "-f", "qcow2", "-b", &name, "-F", format_of(over), "-o", &options, &file, &size]);
    let mut image = RandomImage::from_model(path, shape, true, over.model.clone());
    image.apply_random(qemu, rng, ops);
    image
}

/// Layers from the base up, in a directory.
pub fn layers(qemu: Qemu, dir: &Path, rng: &mut Rng, prefix: &str, shapes: Vec<Shape>, ops: u64) -> Vec<RandomImage> {
    let mut images: Vec<RandomImage> = Vec::new();
    for (number, shape) in shapes.into_iter().enumerate() {
        let path = dir.join(format!("{prefix}{number}.qcow2"));
        let image = layer(qemu, path, rng, shape, images.last(), ops);
        images.push(image);
    }
    images
}

/// The name that other images of the directory call it.
pub fn name_of(image: &RandomImage) -> String {
    image.path.file_name().unwrap().to_string_lossy().into_owned()
}

/// `raw` or `qcow2`, as the name says.
pub fn format_of(image: &RandomImage) -> &'static str {
    if image.path.extension().is_some_and(|extension| extension == "raw") { "raw" } else { "qcow2" }
}

/// The chain that begins at `path`, following backing files in its directory.
pub fn open(path: &Path, format: &str, writable: usize) -> Chain {
    let policy = Policy::Beneath(vec![path.parent().unwrap().to_owned()]);
    let format = if format == "raw" { Format::Raw } else { Format::Qcow2 };
    let options = ChainOptions::default().with_policy(policy).with_writable(writable).with_format(format);
    Chain::open(path, &options).expect("the chain opens")
}

/// A new directory with copies of another one's files.
pub fn copy_of(dir: &Path, name: &str) -> PathBuf {
    let copy = dir.with_file_name(name);
    std::fs::create_dir(&copy).unwrap();
    for file in std::fs::read_dir(dir).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), copy.join(file.file_name())).unwrap();
    }
    copy
}
