//! Internal snapshots and bitmaps as QEMU writes them.

use qcow2_chain::image::{Image, OpenOptions};
use qcow2_chain::storage::{Access, FileStorage};
use std::sync::Arc;

use super::support::qemu::Qemu;

#[test]
fn qemu_s_snapshots_and_bitmaps_are_listed() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("image.qcow2");
    let name = path.to_str().expect("UTF-8");
    qemu.img(&["create", "-q", "-f", "qcow2", name, "3M"]);
    qemu.img(&["snapshot", "-c", "first", name]);
    qemu.img(&["resize", "-q", name, "5M"]);
    qemu.img(&["snapshot", "-c", "second, with a longer name", name]);
    qemu.img(&["bitmap", "--add", "-g", "32768", name, "dirt"]);
    qemu.img(&["bitmap", "--add", "--disable", name, "more dirt"]);

    let storage = FileStorage::open(&path, &Access::read()).expect("the image");
    let image = Image::open(Arc::new(storage), &OpenOptions::default()).expect("QEMU's image");
    let snapshots = image.snapshots().expect("QEMU's table");
    let told: Vec<_> =
        snapshots.iter().map(|entry| (entry.id.as_slice(), entry.name.as_slice(), entry.disk_size())).collect();
    let expected: [(&[u8], &[u8], _); 2] =
        [(b"1", b"first", Some(3 << 20)), (b"2", b"second, with a longer name", Some(5 << 20))];
    assert_eq!(told, expected);
    let bitmaps = image.bitmaps().expect("QEMU's directory");
    let told: Vec<_> =
        bitmaps.iter().map(|entry| (entry.name.as_slice(), entry.granularity_bits, entry.flags)).collect();
    let expected: [(&[u8], _, _); 2] = [(b"dirt", 15, 2), (b"more dirt", 16, 0)];
    assert_eq!(told, expected);
}
