//! Images that other people's programs made: what QEMU opens opens, holds the same, and is mapped the same.

use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;

use qcow2_chain::image::{Extent, ExtentKind, Image, OpenOptions};
use qcow2_chain::storage::MemoryStorage;

use crate::qemu::{assert_same_sectors, sectors_of_extents};
use crate::support::foreign::images;
use crate::support::qemu::Qemu;
use crate::support::say;

/// Images that QEMU opens and this library refuses, each with the reason.
const REFUSED: &[(&str, &str)] = &[
    ("invalid-qcow-large-json.img", "a snapshot table at offset 0, over the header"),
    ("qcow.bin", "the first 512 bytes of an image: the L1 table lies past the end"),
    ("file_header.1", "the first 512 bytes of an image"),
    ("qcow2.img", "the first 4 KiB of an image"),
];

/// How many bytes of data are compared of one image: two of them hold 250 MiB.
const MAX_COMPARED: u64 = 24 << 20;

#[test]
fn images_of_other_programs_are_read_as_qemu_reads_them() {
    let Some(qemu) = Qemu::find() else { return };
    let (mut opened, mut refused, mut compared) = (0, 0, 0);
    let mut wrong = Vec::new();
    let foreign = images();
    for image in &foreign {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = image.unpack(dir.path());
        let theirs = qemu.try_img(&["info".as_ref(), "-f".as_ref(), "qcow2".as_ref(), path.as_os_str()]);
        let ours = open(&path);
        match (theirs.code, ours) {
            (0, Ok(ours)) => {
                opened += 1;
                compared += u64::from(compare(qemu, &path, &ours));
            }
            (0, Err(error)) => {
                refused += 1;
                if !REFUSED.iter().any(|(name, _)| *name == image.name) {
                    wrong.push(format!("{}: qemu-img opens it, we say: {}", image.name, causes(&error)));
                }
            }
            (_, Ok(ours)) => {
                opened += 1;
                // An external data file that is missing keeps QEMU from opening; we look at metadata without it.
                if ours.data_access().is_ok() {
                    wrong.push(format!("{}: we open it, qemu-img says: {}", image.name, theirs.stderr));
                }
            }
            (_, Err(_)) => refused += 1,
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    if !foreign.is_empty() {
        say(&format!("foreign images: {opened} opened, {refused} refused, {compared} compared with qemu-img"));
    }
}

/// An error with what caused it.
fn causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn open(path: &Path) -> qcow2_chain::image::Result<Image> {
    let bytes = std::fs::read(path).expect("the image is read");
    Image::open(Arc::new(MemoryStorage::with_bytes(path.to_string_lossy(), bytes)), &OpenOptions::default())
}

/// Compares map and content with QEMU's where QEMU can tell them; returns whether it could.
fn compare(qemu: Qemu, path: &Path, image: &Image) -> bool {
    let name = path.display();
    let info = qemu.info(path);
    assert_eq!(info["virtual-size"].as_u64(), Some(image.virtual_size()), "{name}");
    assert_eq!(info["cluster-size"].as_u64(), Some(image.geometry().cluster_size()), "{name}");
    assert_eq!(info["backing-filename"].as_str().map(str::as_bytes), image.header().backing_file.as_deref(), "{name}");
    let snapshots = info["snapshots"].as_array().map_or(0, Vec::len);
    assert_eq!(image.snapshots().map(|snapshots| snapshots.len()).ok(), Some(snapshots), "{name}");
    if image.data_access().is_err() || image.header().backing_file.is_some() {
        return false;
    }
    let extents: Vec<Extent> =
        image.extents(0..image.virtual_size()).map(|extent| extent.expect("an extent")).collect();
    // Sector by sector is too much for the largest, which are empty.
    if image.virtual_size() <= 4 << 30 {
        assert_same_sectors(&sectors_of_extents(&extents, image.virtual_size()), &qemu.map(path), &name);
    }
    compare_data(qemu, path, image, &extents);
    true
}

fn compare_data(qemu: Qemu, path: &Path, image: &Image, extents: &[Extent]) {
    let raw = path.with_extension("raw");
    let args = ["convert", "-f", "qcow2", "-O", "raw", "-t", "unsafe"].map(std::ffi::OsStr::new);
    qemu.img(&[&args[..], &[path.as_os_str(), raw.as_os_str()]].concat());
    let mut file = std::fs::File::open(&raw).expect("what qemu-img wrote");
    let mut compared = 0;
    for extent in extents {
        let data = matches!(extent.kind, ExtentKind::Data { .. } | ExtentKind::Compressed);
        let mut at = extent.guest;
        let end = extent.guest.get() + if data { extent.len } else { 0 };
        while at.get() < end && compared < MAX_COMPARED {
            let len = usize::try_from((end - at.get()).min(1 << 20)).expect("a MiB");
            let (mut ours, mut theirs) = (vec![0; len], vec![0; len]);
            image.read_at(&mut ours, at).expect("data is read");
            file.seek(SeekFrom::Start(at.get())).expect("within the file");
            file.read_exact(&mut theirs).expect("as long as the disk");
            assert!(ours == theirs, "{}: other data near {at}", path.display());
            at = at.saturating_add(len as u64);
            compared += len as u64;
        }
    }
}
