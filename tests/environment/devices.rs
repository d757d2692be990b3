//! Loop devices, logical volumes and mounted file systems, which are given back when they are
//! dropped.

use std::ffi::OsStr;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::stat::{Mode, SFlag, mknod};

use super::program::tool;
use crate::support::say;

/// A loop device over a file.
#[derive(Debug)]
pub struct Loop {
    pub path: PathBuf,
    backing: PathBuf,
    /// The device number, to create the node again if the program under test removed it.
    number: u64,
}

impl Loop {
    /// Attaches a device over a new file of `len` bytes, or returns `None` where that is not
    /// possible.
    pub fn new(backing: &Path, len: u64) -> Option<Self> {
        let file = std::fs::File::create(backing).expect("a file for a device");
        file.set_len(len).expect("there is room");
        let made = tool("losetup", &["--find".as_ref(), "--show".as_ref(), backing.as_os_str()]);
        let Some(path) = made else {
            say("SKIPPED: no loop device can be attached (root is needed)");
            return None;
        };
        let number = std::os::unix::fs::MetadataExt::rdev(&std::fs::metadata(&path).expect("a device"));
        Some(Self { path: path.into(), backing: backing.to_owned(), number })
    }

    /// Changes the length of the device.
    pub fn extend(&self, len: u64) {
        let file = std::fs::File::options().write(true).open(&self.backing).expect("the device's file");
        file.set_len(len).expect("there is room");
        let done = tool("losetup", &["--set-capacity".as_ref(), self.path.as_os_str()]);
        assert!(done.is_some(), "{} is not extended", self.path.display());
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let is_device = |path: &Path| path.metadata().is_ok_and(|found| found.file_type().is_block_device());
        if !is_device(&self.path) {
            let _ = std::fs::remove_file(&self.path);
            let _ = mknod(&self.path, SFlag::S_IFBLK, Mode::from_bits_truncate(0o660), self.number);
        }
        let _ = tool("losetup", &["--detach".as_ref(), self.path.as_os_str()]);
        let _ = std::fs::remove_file(&self.backing);
    }
}

/// A mounted file system.
#[derive(Debug)]
pub struct Mount(PathBuf);

impl Mount {
    /// Mounts a new ext4 of 64 MiB in a file, or a tmpfs where ext4 is not available; `None`
    /// without root.
    pub fn new(directory: &Path) -> Option<Self> {
        let (file, point) = (directory.join("other.ext4"), directory.join("other"));
        std::fs::create_dir(&point).expect("a mount point");
        std::fs::File::create(&file).and_then(|file| file.set_len(64 << 20)).expect("there is room");
        let made = tool("mkfs.ext4", &["-q".as_ref(), "-F".as_ref(), file.as_os_str()]).is_some();
        if made && tool("mount", &["-o".as_ref(), "loop".as_ref(), file.as_os_str(), point.as_os_str()]).is_some() {
            return Some(Self(point));
        }
        let options = ["-t", "tmpfs", "-o", "size=64m", "none"].map(OsStr::new);
        if tool("mount", &[&options[..], &[point.as_os_str()]].concat()).is_some() {
            return Some(Self(point));
        }
        say("SKIPPED: no second file system can be mounted (root is needed)");
        None
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).stderr(Stdio::null()).status();
    }
}

/// A volume group on a loop device.
#[derive(Debug)]
pub struct VolumeGroup {
    name: String,
    /// Detached after the group is removed.
    _device: Loop,
}

impl VolumeGroup {
    /// Creates a group of 32 MiB, or returns `None` where LVM or the device mapper is missing.
    pub fn new(directory: &Path) -> Option<Self> {
        if lvm("vgs", &[]).is_none() || !Path::new("/sys/class/misc/device-mapper").exists() {
            say("SKIPPED: logical volumes need lvm2, the device mapper and root");
            return None;
        }
        std::fs::create_dir_all(directory).expect("a directory");
        let device = Loop::new(&directory.join("physical"), 32 << 20)?;
        let name = format!("qcow2chain{}", std::process::id());
        let made = lvm("pvcreate", &["-qq".as_ref(), device.path.as_os_str()])
            .and_then(|_| lvm("vgcreate", &["-s".as_ref(), "1m".as_ref(), name.as_ref(), device.path.as_os_str()]));
        if made.is_none() {
            say("SKIPPED: no volume group can be created");
            return None;
        }
        Some(Self { name, _device: device })
    }

    /// Creates a logical volume of some MiB and returns its path, a link as LVM makes it.
    pub fn volume(&self, name: &str, mib: u64) -> PathBuf {
        let size = format!("{mib}m");
        let args = ["-y", "-Wn", "-n", name, "-L", &size, &self.name].map(OsStr::new);
        assert!(lvm("lvcreate", &args).is_some(), "logical volume {name}");
        Path::new("/dev").join(&self.name).join(name)
    }

    /// Extends a logical volume to some MiB.
    pub fn extend(&self, name: &str, mib: u64) {
        let (size, volume) = (format!("{mib}m"), format!("{}/{name}", self.name));
        assert!(lvm("lvextend", &["-L".as_ref(), size.as_ref(), volume.as_ref()]).is_some(), "{volume}");
    }
}

impl Drop for VolumeGroup {
    fn drop(&mut self) {
        let _ = lvm("vgremove", &["-f".as_ref(), "-y".as_ref(), self.name.as_ref()]);
    }
}

/// Runs a command of LVM so that it does not wait for udev, which containers lack.
fn lvm(command: &str, args: &[&OsStr]) -> Option<String> {
    let config = "activation{udev_sync=0 udev_rules=0} devices{use_devicesfile=0}";
    tool(command, &[&["--config".as_ref(), OsStr::new(config)], args].concat())
}

/// The entries of /dev whose names contain `part`: nothing may be created there.
pub fn in_dev(part: &str) -> Vec<String> {
    let entries = std::fs::read_dir("/dev").expect("/dev is read").flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).filter(|name| name.contains(part)).collect()
}
