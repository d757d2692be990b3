//! A directory with the images of one test, and the checks at its end.

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
    /// Creates an empty directory.
    pub fn new() -> Self {
        Self { directory: tempfile::Builder::new().prefix("live-").tempdir().unwrap() }
    }

    /// Returns its path.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Creates a qcow2 image of this name with an empty ext4 file system.
    pub fn disk(&self, name: &str) -> PathBuf {
        let path = self.path().join(name);
        fs::copy(base(), &path).unwrap();
        path
    }

    /// Returns the files of the directory.
    pub fn files(&self) -> BTreeSet<PathBuf> {
        fs::read_dir(self.path()).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    /// Asserts that these images, which no VM has open, are clean, and that the directory has no
    /// files but these.
    pub fn assert_clean(&self, images: &BTreeSet<PathBuf>, others: &BTreeSet<PathBuf>) {
        for image in images {
            run("qemu-img", &["check", "-q", text(image)]);
        }
        assert_eq!(self.files(), images | others);
    }
}

/// Returns the files of a chain by its headers, the active one first. A VM may have them open.
pub fn chain(active: &Path) -> Vec<PathBuf> {
    let answer = run("qemu-img", &["info", "-U", "--backing-chain", "--output=json", text(active)]);
    let layers: Value = serde_json::from_str(&answer).unwrap();
    layers.as_array().unwrap().iter().map(|layer| PathBuf::from(layer["filename"].as_str().unwrap())).collect()
}

/// Returns the virtual size of an image, in bytes.
pub fn virtual_size(image: &Path) -> u64 {
    let answer = run("qemu-img", &["info", "-U", "--output=json", text(image)]);
    serde_json::from_str::<Value>(&answer).unwrap()["virtual-size"].as_u64().unwrap()
}

/// Converts a path to an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Returns the initial image of every disk, which is created once.
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
        // Another process may have created an equal image first.
        fs::rename(image, &base).unwrap();
    }
    base
}
