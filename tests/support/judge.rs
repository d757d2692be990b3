//! QEMU's word on a VM's files, beside the catalogue's.

use std::collections::HashMap;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use qcow2_chain::chain::Format;
use qcow2_chain::vm::{Model, SnapshotSet};
use serde_json::Value;

use super::qemu::Qemu;

/// What tells a file from what it was: inode, size, and the times of the last change of bytes and of the inode.
type Stamp = (u64, u64, [i64; 4]);

/// A file beneath another: its format, and the size that is recorded of it.
type Below = (PathBuf, Format, Option<u64>);

/// Judges the files of one VM again and again. A process of `qemu-img` is dear: what did not change since is not asked again.
#[derive(Debug)]
pub struct Judge {
    qemu: Qemu,
    checked: HashMap<PathBuf, Stamp>,
    described: HashMap<PathBuf, Vec<(PathBuf, Stamp)>>,
}

impl Judge {
    pub fn new(qemu: Qemu) -> Self {
        Self { qemu, checked: HashMap::new(), described: HashMap::new() }
    }

    /// Fails the test unless `qemu-img check` is content with every file, and `qemu-img info --backing-chain` tells of every
    /// file on which nothing stands the chain, formats and sizes that the catalogue tells.
    pub fn judge(&mut self, set: &SnapshotSet) {
        let model = set.model().expect("the catalogue reads");
        for (_, _, record) in model.records().filter(|(_, _, record)| record.file.format == Format::Qcow2) {
            let path = set.files().path(&record.file.path);
            let stamp = stamp(&path);
            if self.checked.get(&path) != Some(&stamp) {
                self.qemu.assert_clean(&path);
                self.checked.insert(path, stamp);
            }
        }
        for (path, format, below) in leaves(set, &model) {
            let files: Vec<PathBuf> =
                std::iter::once(&path).chain(below.iter().map(|(path, _, _)| path)).cloned().collect();
            let stamps: Vec<_> = files.iter().map(|path| (path.clone(), stamp(path))).collect();
            if self.described.get(&path) != Some(&stamps) {
                self.describe(&path, format, &below);
                self.described.insert(path, stamps);
            }
        }
    }

    /// The sizes and formats of a chain, as QEMU follows it from header to header.
    fn describe(&self, path: &Path, format: Format, below: &[Below]) {
        let args = ["info", "--backing-chain", "--output=json", "-f", format.name()].map(std::ffi::OsStr::new);
        let text = self.qemu.img(&[&args[..], &[path.as_os_str()]].concat());
        let told: Value = serde_json::from_str(&text).expect("info prints JSON");
        let told = told.as_array().expect("info prints an array");
        let name = |entry: &Value| PathBuf::from(entry["filename"].as_str().expect("a file has a name"));
        let found: Vec<PathBuf> = told.iter().skip(1).map(name).collect();
        let recorded: Vec<PathBuf> = below.iter().map(|(path, _, _)| path.clone()).collect();
        assert_eq!(found, recorded, "what {} stands on", path.display());
        for (entry, (path, format, size)) in told.iter().skip(1).zip(below) {
            assert_eq!(entry["format"].as_str(), Some(format.name()), "{}", path.display());
            if size.is_some() {
                assert_eq!(entry["virtual-size"].as_u64(), *size, "{}", path.display());
            }
        }
        for (upper, lower) in told.iter().zip(below) {
            let recorded = upper["backing-filename-format"].as_str();
            assert_eq!(recorded, Some(lower.1.name()), "the format that a header gives {}", lower.0.display());
        }
    }

    /// Fails the test unless QEMU reads a volume as these bytes.
    pub fn assert_content(&self, set: &SnapshotSet, volume: &str, content: &[u8]) {
        let model = set.model().expect("the catalogue reads");
        let format = model.volume(volume).expect("a volume").active.file.format;
        let path = set.active_path(volume).expect("a volume");
        if format == Format::Qcow2 {
            self.qemu.assert_content(&path, content);
        } else {
            assert!(std::fs::read(&path).expect("a raw file") == content, "{}", path.display());
        }
    }
}

fn stamp(path: &Path) -> Stamp {
    let of =
        |file: Metadata| (file.ino(), file.size(), [file.mtime(), file.mtime_nsec(), file.ctime(), file.ctime_nsec()]);
    std::fs::metadata(path).map(of).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The files on which nothing stands, each with its format and with what it stands on: path, format and recorded size.
fn leaves(set: &SnapshotSet, model: &Model) -> Vec<(PathBuf, Format, Vec<Below>)> {
    let size = |path: &str| {
        model.records().find(|(_, _, record)| record.file.path == path).map(|(_, _, record)| record.virtual_size)
    };
    let mut all = Vec::new();
    for (volume, on, record) in model.records() {
        let below = model.files_from(on, volume);
        let below = below.iter().map(|file| (set.files().path(&file.path), file.format, size(&file.path))).collect();
        all.push((set.files().path(&record.file.path), record.file.format, below));
    }
    let stood_on: Vec<PathBuf> =
        all.iter().filter_map(|(_, _, below): &(_, _, Vec<Below>)| Some(below.first()?.0.clone())).collect();
    all.retain(|(path, _, _)| !stood_on.contains(path));
    all
}
