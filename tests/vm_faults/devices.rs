//! Volumes on block devices: refused without a directory for overlays, and never renamed, replaced
//! or removed.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::world::{World, is_root};
use crate::support::say;

/// A loop device over a new file of a world, with links as a logical volume has. It is detached at
/// the end.
struct Device(PathBuf);

impl Device {
    fn new(world: &World, name: &str, len: u64) -> Option<Self> {
        let file = world.path(format!("{name}.store"));
        fs::File::create(&file).unwrap().set_len(len).unwrap();
        let made = Command::new("losetup").args(["--find", "--show"]).arg(&file).output();
        let device = match made {
            Ok(made) if made.status.success() => Self(PathBuf::from(String::from_utf8_lossy(&made.stdout).trim())),
            _ => {
                say("SKIPPED: no loop device can be made");
                return None;
            }
        };
        fs::create_dir_all(world.path("vg")).unwrap();
        symlink(&device.0, world.path("vg").join(name)).unwrap();
        Some(device)
    }

    /// Gives the device the present length of its file.
    fn extend(&self, world: &World, name: &str, len: u64) {
        fs::File::options().write(true).open(world.path(format!("{name}.store"))).unwrap().set_len(len).unwrap();
        let status = Command::new("losetup").arg("--set-capacity").arg(&self.0).status().unwrap();
        assert!(status.success());
    }

    fn name(&self) -> &str {
        self.0.to_str().unwrap()
    }

    /// Fails unless the node is the block device still, and so is what the link leads to.
    #[track_caller]
    fn assert_intact(&self, world: &World, name: &str) {
        let node = fs::symlink_metadata(&self.0).unwrap_or_else(|error| panic!("{}: {error}", self.name()));
        assert!(node.file_type().is_block_device(), "{} is no device any more", self.name());
        let link = world.path("vg").join(name);
        assert!(fs::symlink_metadata(&link).is_ok_and(|meta| meta.is_symlink()), "vg/{name} is no link any more");
        assert_eq!(fs::metadata(&link).unwrap().rdev(), node.rdev());
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

const MIB: u64 = 1 << 20;

/// A world with the device `vg/NAME`. Overlays go to the directory `overlays`.
fn world() -> Option<World> {
    if !is_root() {
        return None;
    }
    let world = World::on_disk()?;
    fs::create_dir(world.path("overlays")).unwrap();
    Some(world)
}

/// Fills a device with a qcow2 image.
fn image(world: &World, device: &Device, size: &str) {
    world.image(device.name(), size);
    world.qemu.io(&device.0, &["write -q -P 1 0 64k"]);
}

#[test]
fn init_with_device_without_overlay_directory_is_refused() {
    let Some(world) = world() else { return };
    let (Some(raw), Some(qcow2)) = (Device::new(&world, "raw", 8 * MIB), Device::new(&world, "image", 16 * MIB)) else {
        return;
    };
    image(&world, &qcow2, "8M");
    for volume in [
        format!("vda={},format=raw", raw.name()),
        "vda=vg/raw,format=raw".to_owned(),
        format!("vda={}", qcow2.name()),
        "vda=vg/image".to_owned(),
    ] {
        let said = world.unchanged(&["init", "web.json", "--volume", &volume]);
        assert!(said.contains("overlay_dir"), "the message names no remedy: {said}");
    }
    raw.assert_intact(&world, "raw");
    qcow2.assert_intact(&world, "image");
}

#[test]
fn init_with_overlay_directory_on_devtmpfs_is_refused() {
    let Some(world) = world() else { return };
    let Some(raw) = Device::new(&world, "raw", 8 * MIB) else { return };
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    let devtmpfs = mounts.lines().any(|line| line.starts_with("devtmpfs /dev devtmpfs"));
    if !devtmpfs {
        return say("SKIPPED: /dev is no devtmpfs");
    }
    // Supported with another directory, so that the refusal is about this one.
    let volume = format!("vda={},format=raw,overlay_dir=overlays", raw.name());
    world.ok(&["init", "other.json", "--volume", &volume]);
    let volume = format!("vda={},format=raw,overlay_dir=/dev", raw.name());
    world.unchanged(&["init", "web.json", "--volume", &volume]);
}

/// Takes a snapshot, writes, and deletes it; returns what was reported.
#[track_caller]
fn round(world: &World, direction: &str) -> String {
    world.ok(&["snapshot", "web.json", "s1"]);
    let overlay = world.active("vda");
    assert!(overlay.contains("overlays/"), "the overlay is not in the named directory: {overlay}");
    world.assert_reads(&overlay, "-P 1 0 64k");
    world.write(&overlay, "-P 2 1M 4M");
    let said = world.ok(&["delete", "web.json", "s1", "--direction", direction]);
    world.ok(&["verify", "web.json"]);
    said
}

#[test]
fn commit_into_qcow2_on_device_keeps_device() {
    let Some(world) = world() else { return };
    let Some(device) = Device::new(&world, "image", 16 * MIB) else { return };
    image(&world, &device, "8M");
    world.ok(&["init", "web.json", "--volume", "vda=vg/image,overlay_dir=overlays"]);
    round(&world, "commit");
    device.assert_intact(&world, "image");
    world.assert_reads(&device.0, "-P 2 1M 4M");
    let active = world.active("vda");
    assert!(fs::metadata(world.path(&active)).unwrap().file_type().is_block_device(), "{active}");
    assert_eq!(fs::read_dir(world.path("overlays")).unwrap().count(), 0, "an overlay is left");
}

/// The node that the link of a logical volume leads to may be that of another volume after a restart.
#[test]
fn link_to_device_is_recorded_by_its_own_name() {
    let Some(world) = world() else { return };
    let (Some(first), Some(second)) = (Device::new(&world, "raw", 8 * MIB), Device::new(&world, "other", 8 * MIB))
    else {
        return;
    };
    assert_eq!(world.qemu.try_io(&first.0, "raw", &["write -q -P 1 0 64k"]).code, 0);
    world.ok(&["init", "web.json", "--volume", "vda=vg/raw,format=raw,overlay_dir=overlays"]);
    assert!(world.active("vda").ends_with("vg/raw"), "{}", world.active("vda"));
    world.ok(&["snapshot", "web.json", "s1"]);
    world.write(&world.active("vda"), "-P 2 1M 1M");
    // The volume has the other node now.
    let copied = Command::new("cp").args([&first.0, &second.0]).status().unwrap();
    assert!(copied.success());
    fs::remove_file(world.path("vg/raw")).unwrap();
    symlink(&second.0, world.path("vg/raw")).unwrap();
    let said = world.ok(&["delete", "web.json", "s1"]);
    assert!(world.misread_as("raw", &second.0, "-P 2 1M 1M").is_none(), "{said}");
    assert!(world.misread_as("raw", &first.0, "-P 0 1M 1M").is_none(), "the other node was written");
}

#[test]
fn pull_from_qcow2_on_device_releases_it() {
    let Some(world) = world() else { return };
    let Some(device) = Device::new(&world, "image", 16 * MIB) else { return };
    image(&world, &device, "8M");
    world.ok(&["init", "web.json", "--volume", "vda=vg/image,overlay_dir=overlays"]);
    let said = round(&world, "pull");
    device.assert_intact(&world, "image");
    assert!(said.contains("released"), "{said}");
    let active = world.active("vda");
    world.assert_reads(&active, "-P 2 1M 4M");
    world.assert_reads(&active, "-P 1 0 64k");
    // The device reads as at the snapshot.
    world.assert_reads(&device.0, "-P 0 1M 4M");
}

#[test]
fn commit_into_raw_device_keeps_device() {
    let Some(world) = world() else { return };
    let Some(device) = Device::new(&world, "raw", 8 * MIB) else { return };
    assert_eq!(world.qemu.try_io(&device.0, "raw", &["write -q -P 1 0 64k"]).code, 0);
    world.ok(&["init", "web.json", "--volume", "vda=vg/raw,format=raw,overlay_dir=overlays"]);
    round(&world, "commit");
    device.assert_intact(&world, "raw");
    let wrong = world.misread_as("raw", &device.0, "-P 2 1M 4M");
    assert!(wrong.is_none(), "{wrong:?}");
}

#[test]
fn revert_over_chain_of_devices_keeps_them() {
    let Some(world) = world() else { return };
    let (Some(base), Some(top)) = (Device::new(&world, "base", 16 * MIB), Device::new(&world, "top", 16 * MIB)) else {
        return;
    };
    image(&world, &base, "8M");
    world.overlay(top.name(), base.name());
    world.ok(&[
        "init",
        "web.json",
        "--volume",
        "vda=vg/top,overlay_dir=overlays",
        "--snapshot",
        "s1",
        "--allow",
        "/dev",
    ]);
    let said = world.ok(&["revert", "web.json", "s1"]);
    base.assert_intact(&world, "base");
    top.assert_intact(&world, "top");
    assert!(said.contains("released"), "{said}");
    world.assert_reads(world.active("vda"), "-P 1 0 64k");
}

/// A raw device of 8 MiB with a snapshot, and an active file of this size.
fn resized(size: &[&str]) -> Option<(World, Device)> {
    let world = world()?;
    let device = Device::new(&world, "raw", 8 * MIB)?;
    assert_eq!(world.qemu.try_io(&device.0, "raw", &["write -q -P 1 0 64k"]).code, 0);
    world.ok(&["init", "web.json", "--volume", "vda=vg/raw,format=raw,overlay_dir=overlays"]);
    world.ok(&["snapshot", "web.json", "s1"]);
    world.ok(&[&["resize", "web.json", "vda"], size].concat());
    world.write(&world.active("vda"), "-P 2 1M 1M");
    Some((world, device))
}

#[test]
fn commit_into_too_small_device_is_refused() {
    let Some((world, device)) = resized(&["12M"]) else { return };
    let said = world.obstacle(&["delete", "web.json", "s1", "--direction", "commit"]);
    assert!(said.contains("raw") || said.contains(device.name()), "{said}");
    // LVM rounds to extents: the device is larger than the disk after its extension.
    device.extend(&world, "raw", 16 * MIB);
    world.ok(&["delete", "web.json", "s1", "--direction", "commit"]);
    let wrong = world.misread_as("raw", &device.0, "-P 2 1M 1M");
    assert!(wrong.is_none(), "{wrong:?}");
    device.assert_intact(&world, "raw");
    world.ok(&["verify", "web.json"]);
    // A raw device has no size of its own: the guest sees all of it, and zeroes past its old disk.
    assert_eq!(world.list()["volumes"][0]["virtual-size"], 16 * MIB);
    let wrong = world.misread_as("raw", &device.0, "-P 0 12M 4M");
    assert!(wrong.is_none(), "{wrong:?}");
}

#[test]
fn commit_of_shrunk_overlay_into_device_completes() {
    let Some((world, device)) = resized(&["4M", "--shrink"]) else { return };
    world.ok(&["delete", "web.json", "s1", "--direction", "commit"]);
    device.assert_intact(&world, "raw");
    let wrong = world.misread_as("raw", &device.0, "-P 2 1M 1M");
    assert!(wrong.is_none(), "{wrong:?}");
    world.ok(&["verify", "web.json"]);
}

#[test]
fn raw_device_larger_than_disk_is_accepted() {
    let Some(world) = world() else { return };
    let Some(device) = Device::new(&world, "raw", 8 * MIB) else { return };
    assert_eq!(world.qemu.try_io(&device.0, "raw", &["write -q -P 1 0 64k"]).code, 0);
    world.ok(&["init", "web.json", "--volume", "vda=vg/raw,format=raw,overlay_dir=overlays"]);
    world.ok(&["snapshot", "web.json", "s1"]);
    device.extend(&world, "raw", 16 * MIB);
    // The extents that LVM adds hold what was there before.
    assert_eq!(world.qemu.try_io(&device.0, "raw", &["write -q -P 0xff 8M 8M"]).code, 0);
    world.write(&world.active("vda"), "-P 2 1M 4M");
    world.ok(&["delete", "web.json", "s1"]);
    for part in ["-P 2 1M 4M", "-P 0 8M 8M"] {
        let wrong = world.misread_as("raw", Path::new(device.name()), part);
        assert!(wrong.is_none(), "{wrong:?}");
    }
}
