//! Small images with known content.

use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use qcow2_chain::chain::{Chain, ChainOptions, Format, Policy};
use qcow2_chain::format::{ClusterBits, GuestOffset};
use qcow2_chain::image::{CheckOptions, CreateOptions, Image, check};
use qcow2_chain::storage::{Access, FileStorage, LockMode};

use crate::support::rng::Rng;

/// The cluster size of all images, as a power of two.
const CLUSTER_BITS: u32 = 12;

/// A range of a disk to write and its byte; 0 writes zeroes.
pub type Write = (u64, u64, u8);

/// Random writes to a disk of `size` bytes, aligned to 512 bytes.
pub fn writes(size: u64, rng: &mut Rng) -> Vec<Write> {
    let write = |rng: &mut Rng| {
        let range = rng.range(size / 512, 128);
        let byte = if rng.chance(1, 5) { 0 } else { rng.pattern() };
        (range.start * 512, (range.end - range.start) * 512, byte)
    };
    (0..rng.within(1..4)).map(|_| write(rng)).collect()
}

/// Applies writes to the expected content of a disk.
pub fn apply(content: &mut [u8], writes: &[Write]) {
    for &(offset, len, byte) in writes {
        content[usize::try_from(offset).unwrap()..usize::try_from(offset + len).unwrap()].fill(byte);
    }
}

/// Creates an image of `size` bytes; `backing` is a name for the header and a format.
pub fn create(path: &Path, raw: bool, size: u64, backing: Option<(Vec<u8>, &str)>) {
    if raw {
        let file = std::fs::File::create_new(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        return file.set_len(size).expect("there is room");
    }
    let storage = FileStorage::create_new(path).unwrap_or_else(|error| panic!("{error}"));
    create_in(storage, size, backing);
}

/// Creates a qcow2 image inside a storage, for example a block device.
pub fn create_in(storage: FileStorage, size: u64, backing: Option<(Vec<u8>, &str)>) {
    let bits = ClusterBits::new(CLUSTER_BITS).expect("a cluster size");
    let mut options = CreateOptions::new(size).with_cluster_bits(bits);
    if let Some((name, format)) = backing {
        options = options.with_backing(name, format);
    }
    Image::create(Arc::new(storage), &options).expect("an image is created").close().expect("it closes");
}

/// Returns the format of an image by its first bytes. (No test writes these bytes to a raw disk.)
pub fn format_of(path: &Path) -> Format {
    let mut magic = [0; 4];
    let file = std::fs::File::open(path);
    match file.and_then(|file| file.read_exact_at(&mut magic, 0)) {
        Ok(()) if magic == *b"QFI\xfb" => Format::Qcow2,
        _ => Format::Raw,
    }
}

/// Writes to an image by the library.
pub fn write(path: &Path, writes: &[Write]) {
    let options = ChainOptions::default().with_policy(Policy::Any).with_format(format_of(path)).with_writable(1);
    let chain = Chain::open(path, &options).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    for &(offset, len, byte) in writes {
        let bytes = vec![byte; usize::try_from(len).unwrap()];
        chain.write_at(&bytes, GuestOffset::new(offset)).expect("the image is written");
    }
    chain.close().expect("the image closes");
}

/// The `qemu-io` commands for some writes.
pub fn commands(writes: &[Write]) -> Vec<String> {
    let command = |&(offset, len, byte): &Write| match byte {
        0 => format!("write -q -z {offset} {len}"),
        byte => format!("write -q -P {byte} {offset} {len}"),
    };
    writes.iter().map(command).collect()
}

/// Reads all that a guest sees of an image, by the names in the headers.
///
/// # Errors
/// A message if an image of the chain does not open or read.
pub fn read(path: &Path) -> Result<Vec<u8>, String> {
    let options = ChainOptions::default().with_policy(Policy::Any).with_format(format_of(path));
    let chain = Chain::open(path, &options.with_lock(LockMode::None));
    let chain = chain.map_err(|error| format!("{}: {error}", path.display()))?;
    let mut bytes = vec![0xee; usize::try_from(chain.virtual_size()).map_err(|error| error.to_string())?];
    chain.read_at(&mut bytes, GuestOffset::ZERO).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(bytes)
}

/// Compares what a guest sees of an image with `expected`.
///
/// # Errors
/// A message with the first difference.
pub fn compare(path: &Path, expected: &[u8]) -> Result<(), String> {
    let found = read(path)?;
    if found.len() != expected.len() {
        return Err(format!("{}: {} bytes instead of {}", path.display(), found.len(), expected.len()));
    }
    if found == expected {
        return Ok(());
    }
    match found.iter().zip(expected).position(|(found, expected)| found != expected) {
        None => Ok(()),
        Some(at) => Err(format!("{}: byte {at} is {:#x} instead of {:#x}", path.display(), found[at], expected[at])),
    }
}

/// Checks every cluster of an image: no corruption and no leaks.
///
/// # Errors
/// A message with what is wrong.
pub fn sound(path: &Path) -> Result<(), String> {
    if format_of(path) == Format::Raw {
        return Ok(());
    }
    let storage = FileStorage::open(path, &Access::read().with_lock(LockMode::None)).map_err(|e| e.to_string())?;
    let report = check(&storage, &CheckOptions::default()).map_err(|error| error.to_string())?;
    if (report.corruptions, report.leaks, report.check_errors) == (0, 0, 0) {
        return Ok(());
    }
    Err(format!("{}: {report:?}", path.display()))
}
