//! A comparison of a VM's catalogue with its files as QEMU reads them.

use std::collections::HashMap;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use qcow2_chain::chain::Format;
use qcow2_chain::vm::{Model, SnapshotSet};
use serde_json::Value;

use super::qemu::Qemu;

/// The data by which a change of a file is detected: inode, size, and the times of the last changes.
type Stamp = (u64, u64, [i64; 4]);

/// A backing file: its path, its format and its recorded size.
type Below = (PathBuf, Format, Option<u64>);

/// Judges the files of one VM, after each step. Files that did not change since are not judged again, as each judgement
/// starts a process.
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

    /// Asserts that `qemu-img check` finds no fault in any file, and that for each file without overlays `qemu-img info
    /// --backing-chain` prints the chain, formats and sizes of the catalogue.
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

    /// Asserts the sizes and formats of a chain, as QEMU follows it from header to header.
    fn describe(&self, path: &Path, format: Format, below: &[Below]) {
        let args = ["info", "--backing-chain", "--output=json", "-f", format.name()].map(std::ffi::OsStr::new);
        let text = self.qemu.img(&[&args[..], &[path.as_os_str()]].concat());
        let told: Value = serde_json::from_str(&text).expect("info prints JSON");
        let told = told.as_array().expect("info prints an array");
        let name = |entry: &Value| PathBuf::from(entry["filename"].as_str().expect("a file has a name"));
        let found: Vec<PathBuf> = told.iter().skip(1).map(name).collect();
        let recorded: Vec<PathBuf> = below.iter().map(|(path, _, _)| path.clone()).collect();
        assert_eq!(found, recorded, "the backing files of {}", path.display());
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

    /// Asserts that QEMU reads this content from a volume.
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

/// Returns the files without overlays, each with its format and its backing files.
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
    let backing: Vec<PathBuf> =
        all.iter().filter_map(|(_, _, below): &(_, _, Vec<Below>)| Some(below.first()?.0.clone())).collect();
    all.retain(|(path, _, _)| !backing.contains(path));
    all
}
