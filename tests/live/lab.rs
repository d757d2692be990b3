//! A directory with the images of one test, and what must hold of them at its end.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;

use crate::hypervisor::run;

/// Virtual size of a fresh disk, in MiB.
pub const DISK_MIB: u64 = 1024;

/// The directory.
#[derive(Debug)]
pub struct Lab {
    directory: TempDir,
}

impl Lab {
    /// An empty one.
    pub fn new() -> Self {
        Self { directory: tempfile::Builder::new().prefix("live-").tempdir().unwrap() }
    }

    /// Where the images lie.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// A fresh ext4 file system on a qcow2 image of this name.
    pub fn disk(&self, name: &str) -> PathBuf {
        let path = self.path().join(name);
        fs::copy(base(), &path).unwrap();
        path
    }

    /// The files that are there.
    pub fn files(&self) -> BTreeSet<PathBuf> {
        fs::read_dir(self.path()).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    /// No VM has them open: every image is clean, and the directory holds these files and no others.
    pub fn assert_clean(&self, images: &BTreeSet<PathBuf>, others: &BTreeSet<PathBuf>) {
        for image in images {
            run("qemu-img", &["check", "-q", text(image)]);
        }
        assert_eq!(self.files(), images | others);
    }
}

/// The files of a chain, the active one first, as its headers say. May be asked while a VM has them open.
pub fn chain(active: &Path) -> Vec<PathBuf> {
    let answer = run("qemu-img", &["info", "-U", "--backing-chain", "--output=json", text(active)]);
    let layers: Value = serde_json::from_str(&answer).unwrap();
    layers.as_array().unwrap().iter().map(|layer| PathBuf::from(layer["filename"].as_str().unwrap())).collect()
}

/// The virtual size in bytes that a header tells.
pub fn virtual_size(image: &Path) -> u64 {
    let answer = run("qemu-img", &["info", "-U", "--output=json", text(image)]);
    serde_json::from_str::<Value>(&answer).unwrap()["virtual-size"].as_u64().unwrap()
}

/// A path as an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The image that every disk starts as, made once.
fn base() -> PathBuf {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/live");
    fs::create_dir_all(&directory).unwrap();
    let base = directory.join(format!("base-{DISK_MIB}.qcow2"));
    if !base.exists() {
        let making = tempfile::tempdir_in(&directory).unwrap();
        let (raw, image) = (making.path().join("raw"), making.path().join("qcow2"));
        fs::File::create(&raw).unwrap().set_len(DISK_MIB << 20).unwrap();
        run("mkfs.ext4", &["-q", "-m", "0", "-J", "size=8", text(&raw)]);
        run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", text(&raw), text(&image)]);
        // Another process may have been faster; its image is as good.
        fs::rename(image, &base).unwrap();
    }
    base
}
