//! Volumes on block devices (fault 6): loop devices, and logical volumes where LVM is there.

use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use qcow2_chain::storage::{Access, FileStorage};

use super::devices::{Loop, VolumeGroup, in_dev};
use super::directed::{MIB, Scene, whole};
use super::images;
use super::world::Grounds;

/// Writes a qcow2 image of 1 MiB into a device.
fn format(device: &Path, backing: Option<&Path>) {
    let storage = FileStorage::open(device, &Access::write()).expect("the device opens");
    let backing = backing.map(|path| (path.as_os_str().as_encoded_bytes().to_vec(), "qcow2"));
    images::create_in(storage, MIB, backing);
}

/// A VM whose volume is on a device, with a name that no other test uses in /dev.
fn scene<'a>(grounds: &'a Grounds, device: &Path, format: &str) -> (Scene<'a>, String) {
    let scene = Scene::new(grounds);
    std::fs::create_dir(scene.path("overlays")).expect("a directory");
    let number = scene.dir.file_name().expect("a name").to_string_lossy().into_owned();
    let vm = format!("block{}{number}", std::process::id());
    let volume = format!("--volume vda={},format={format}", device.display());
    let error = scene.refused(&format!("init web.json --vm {vm} {volume}"));
    assert!(error.contains("overlay_dir"), "{error}");
    scene.ok(&format!("init web.json --vm {vm} {volume},overlay_dir={}", scene.path("overlays").display()));
    (scene, vm)
}

/// Fails the test unless a path is still the device that it was, and /dev has no files of the VM.
fn assert_device(path: &Path, number: u64, vm: &str) {
    let found = std::fs::metadata(path).expect("the device is there");
    assert!(found.file_type().is_block_device() && found.rdev() == number, "{} was replaced", path.display());
    assert_eq!(in_dev(vm), Vec::<String>::new(), "files in /dev");
}

/// Snapshots, reverts and deletions of a volume whose first file is a device.
fn lead_a_life(grounds: &Grounds, device: &Path, format: &str) {
    let number = std::fs::metadata(device).expect("a device").rdev();
    images::write(device, &[whole(1)]);
    let (scene, vm) = scene(grounds, device, format);
    let active = || scene.active("web.json", "vda");
    for (name, byte) in [("s1", 2), ("s2", 3), ("s3", 4)] {
        scene.ok(&format!("snapshot web.json {name}"));
        assert_eq!(active().parent(), Some(scene.path("overlays").as_path()), "the overlay's directory");
        images::write(&active(), &[whole(byte)]);
        assert_device(device, number, &vm);
    }
    scene.ok("revert web.json s2");
    scene.reads(&active(), 2);
    scene.ok("delete web.json s3");
    images::write(&active(), &[whole(5)]);
    scene.ok("verify web.json --deep");
    // The device is the oldest file: a commit ends in it, a pull leaves it behind.
    scene.ok("delete web.json s2 --direction commit");
    scene.reads(&active(), 5);
    scene.reads(device, 1);
    let pulled = scene.ok("delete web.json s1 --direction pull");
    assert!(pulled.stdout.contains("released"), "the device is not reported: {}", pulled.stdout);
    scene.reads(&active(), 5);
    assert_eq!(active().parent(), Some(scene.path("overlays").as_path()), "the survivor's directory");
    scene.reads(device, 1);
    assert_device(device, number, &vm);
    scene.ok("verify web.json --deep");
}

/// A deletion by commit that ends in the device.
fn commit_into(grounds: &Grounds, device: &Path, format: &str) {
    let number = std::fs::metadata(device).expect("a device").rdev();
    images::write(device, &[whole(1)]);
    let (scene, vm) = scene(grounds, device, format);
    scene.ok("snapshot web.json s1");
    images::write(&scene.active("web.json", "vda"), &[(0, MIB / 2, 2)]);
    let expected = images::read(&scene.active("web.json", "vda")).expect("the volume reads");
    scene.ok("delete web.json s1");
    assert_device(device, number, &vm);
    let active = scene.active("web.json", "vda");
    assert_eq!(active, std::fs::canonicalize(device).expect("the device"), "the survivor's path");
    images::compare(&active, &expected).unwrap_or_else(|wrong| panic!("{wrong}"));
}

/// A device over a new file; it must outlive the grounds.
fn device(grounds: &Grounds, len: u64) -> Option<Loop> {
    Loop::new(&grounds.fresh("device"), len)
}

#[test]
fn raw_device_keeps_its_node_and_its_content() {
    let Some(grounds) = Grounds::new() else { return };
    let Some(device) = device(&grounds, MIB) else { return };
    lead_a_life(&grounds, &device.path, "raw");
    commit_into(&grounds, &device.path, "raw");
}

#[test]
fn qcow2_on_a_device_keeps_its_node_and_its_content() {
    let Some(grounds) = Grounds::new() else { return };
    let Some(device) = device(&grounds, 4 * MIB) else { return };
    format(&device.path, None);
    lead_a_life(&grounds, &device.path, "qcow2");
    format(&device.path, None);
    commit_into(&grounds, &device.path, "qcow2");
}

/// A chain of two devices: reverts and pulls release them.
#[test]
fn chain_of_devices_is_released_and_not_removed() {
    let Some(grounds) = Grounds::new() else { return };
    let (Some(lower), Some(upper)) = (device(&grounds, 4 * MIB), device(&grounds, 4 * MIB)) else { return };
    format(&lower.path, None);
    images::write(&lower.path, &[whole(1)]);
    format(&upper.path, Some(&lower.path));
    images::write(&upper.path, &[whole(2)]);
    let scene = Scene::new(&grounds);
    std::fs::create_dir(scene.path("overlays")).expect("a directory");
    let numbers = [&lower, &upper].map(|device| std::fs::metadata(&device.path).expect("a device").rdev());
    let vm = format!("chain{}", std::process::id());
    let more = format!("overlay_dir={} --allow /dev --snapshot s1", scene.path("overlays").display());
    scene.ok(&format!("init web.json --vm {vm} --volume vda={},format=qcow2,{more}", upper.path.display()));
    let report = scene.ok("revert web.json s1");
    assert!(report.stdout.contains("released"), "the upper device is not reported: {}", report.stdout);
    scene.reads(&upper.path, 2);
    scene.reads(&scene.active("web.json", "vda"), 1);
    scene.ok("delete web.json s1 --direction pull");
    scene.reads(&scene.active("web.json", "vda"), 1);
    for (device, number) in [&lower, &upper].into_iter().zip(numbers) {
        assert_device(&device.path, number, &vm);
    }
}

/// Sizes: a device that is too small is refused before anything is recorded; a larger one is
/// accepted.
#[test]
fn device_too_small_is_refused_and_a_larger_one_accepted() {
    let Some(grounds) = Grounds::new() else { return };
    let Some(device) = device(&grounds, MIB) else { return };
    let (scene, vm) = scene(&grounds, &device.path, "raw");
    let number = std::fs::metadata(&device.path).expect("a device").rdev();
    scene.ok("snapshot web.json s1");
    scene.ok("resize web.json vda 1536k");
    let active = scene.active("web.json", "vda");
    images::write(&active, &[(0, MIB + MIB / 2, 7)]);
    let expected = images::read(&active).expect("the volume reads");
    let planned = scene.refused("delete web.json s1 --direction commit --dry-run");
    let refused = scene.refused("delete web.json s1 --direction commit");
    assert_eq!(planned, refused, "the plan and the operation refuse for the same reason");
    device.extend(4 * MIB);
    scene.ok("delete web.json s1 --direction commit");
    assert_device(&device.path, number, &vm);
    let merged = std::fs::read(&device.path).expect("the device reads");
    assert!(merged[..expected.len()] == expected[..], "the device does not hold what was merged");
    // QEMU takes the length of a raw device for the size of the disk.
    scene.ok("snapshot web.json s2");
    let disk = images::read(&scene.active("web.json", "vda")).expect("the volume reads");
    assert!(disk.starts_with(&expected), "the volume does not hold what was merged");
}

#[test]
fn logical_volumes_keep_their_names_and_their_content() {
    let Some(grounds) = Grounds::new() else { return };
    let Some(group) = VolumeGroup::new(&grounds.fresh("group")) else { return };
    let raw: PathBuf = group.volume("raw", 1);
    lead_a_life(&grounds, &raw, "raw");
    commit_into(&grounds, &raw, "raw");
    let image = group.volume("image", 4);
    format(&image, None);
    lead_a_life(&grounds, &image, "qcow2");
    // LVM rounds to extents: a volume that was extended is larger than the disk.
    group.extend("raw", 3);
    commit_into_larger(&grounds, &raw);
}

/// A raw volume that is larger than the disk takes in an overlay.
fn commit_into_larger(grounds: &Grounds, device: &Path) {
    let number = std::fs::metadata(device).expect("a device").rdev();
    let (scene, vm) = scene(grounds, device, "raw");
    scene.ok("snapshot web.json s1");
    let active = scene.active("web.json", "vda");
    images::write(&active, &[whole(9)]);
    let expected = images::read(&active).expect("the volume reads");
    scene.ok("delete web.json s1");
    assert_device(device, number, &vm);
    images::compare(device, &expected).unwrap_or_else(|wrong| panic!("{wrong}"));
}
