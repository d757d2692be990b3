//! Snapshots of a VM with two volumes: taken, reverted to, deleted in the order that is hardest, step by step. After each step
//! the tree is drawn, and every volume and every snapshot is read and compared with what it must be.
//!
//! ```text
//! cargo run --release --example vm_snapshots [DIRECTORY]
//! ```
//! DIRECTORY, which is made, keeps the files; without it they lie in a temporary directory.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use qcow2_chain::chain::{Chain, ChainOptions};
use qcow2_chain::format::GuestOffset;
use qcow2_chain::image::{CreateOptions, Image};
use qcow2_chain::storage::FileStorage;
use qcow2_chain::vm::{AdoptOptions, Dependent, Model, Report, SnapshotId, SnapshotSet, State, VolumeSpec};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const MIB: u64 = 1 << 20;
const VOLUMES: [(&str, u64); 2] = [("root", 128 * MIB), ("data", 192 * MIB)];

fn main() -> Result<()> {
    match std::env::args_os().nth(1) {
        Some(directory) => {
            std::fs::create_dir(&directory)?;
            story(Path::new(&directory))
        }
        None => story(tempfile::tempdir()?.path()),
    }
}

fn story(directory: &Path) -> Result<()> {
    let started = std::time::Instant::now();
    let mut vm = Vm::new(directory)?;
    println!("A VM with two volumes, in {}\n", directory.display());
    for name in ["s1", "s2", "s3"] {
        vm.step(name, "taken", |set| set.create(name, &Default::default()))?;
    }
    vm.step("s2", "reverted to", |set| set.revert("s2", &Default::default(), &()))?;
    vm.step("s4", "taken", |set| set.create("s4", &Default::default()))?;
    // Two branches stand on s2: it is hidden until only one does.
    vm.step("s2", "deleted", |set| set.delete("s2", &Default::default(), &()))?;
    vm.step("s3", "deleted", |set| set.delete("s3", &Default::default(), &()))?;
    vm.step("s5", "taken", |set| set.create("s5", &Default::default()))?;
    vm.step("s4", "reverted to", |set| set.revert("s4", &Default::default(), &()))?;
    vm.step("s4", "deleted", |set| set.delete("s4", &Default::default(), &()))?;
    vm.step("s5", "deleted", |set| set.delete("s5", &Default::default(), &()))?;
    vm.step("s1", "deleted", |set| set.delete("s1", &Default::default(), &()))?;
    println!("Each volume is one file again, by its first name: {}, {}.", vm.active("root")?, vm.active("data")?);
    println!("Every digest was as expected, {} of them, in {:.1?}.", vm.compared, started.elapsed());
    Ok(())
}

/// The digest of each volume.
type Digests = BTreeMap<String, u32>;

struct Vm {
    set: SnapshotSet,
    /// What each snapshot must read as.
    taken: BTreeMap<String, Digests>,
    /// What the volumes must read as.
    now: Digests,
    writes: u64,
    compared: usize,
}

impl Vm {
    fn new(directory: &Path) -> Result<Self> {
        let mut specs = Vec::new();
        for (name, size) in VOLUMES {
            let path = directory.join(format!("{name}.qcow2"));
            Image::create(Arc::new(FileStorage::create_new(&path)?), &CreateOptions::new(size))?.close()?;
            specs.push(VolumeSpec::new(name, path));
        }
        let set = SnapshotSet::adopt(directory.join("vm.json"), &specs, &AdoptOptions::default())?;
        Ok(Self { set, taken: BTreeMap::new(), now: Digests::new(), writes: 0, compared: 0 })
    }

    /// The guest writes, something is done, and all of it is looked at.
    fn step(
        &mut self,
        snapshot: &str,
        done: &str,
        operation: impl FnOnce(&SnapshotSet) -> qcow2_chain::vm::Result<Report>,
    ) -> Result<()> {
        self.write()?;
        let report = operation(&self.set)?;
        match done {
            "taken" => drop(self.taken.insert(snapshot.to_owned(), self.now.clone())),
            "reverted to" => self.now.clone_from(&self.taken[snapshot]),
            _ => drop(self.taken.remove(snapshot)),
        }
        println!("{snapshot} {done}.{}", moved(&report));
        println!("{}", drawn(&self.set.model()?));
        self.verify()
    }

    /// Some megabytes to each volume, here and there, none of them aligned to anything.
    fn write(&mut self) -> Result<()> {
        for (name, size) in VOLUMES {
            let chain = open(&self.set.active_path(name)?)?;
            for part in 0..16 {
                self.writes += 1;
                let at = (self.writes * 7_654_321 + part * 5_000_011) % (size - MIB);
                chain.write_at(&pattern(self.writes, 300_000), GuestOffset::new(at))?;
            }
            chain.write_zeroes_at(GuestOffset::new((self.writes * 1_234_567) % (size - MIB)), MIB)?;
            self.now.insert(name.to_owned(), chain.digest(&|| false)?);
            chain.close()?;
        }
        Ok(())
    }

    /// Reads everything.
    fn verify(&mut self) -> Result<()> {
        for (volume, digest) in &self.now {
            if self.set.open_active(volume)?.digest(&|| false)? != *digest {
                return Err(format!("volume {volume} reads otherwise").into());
            }
            self.compared += 1;
        }
        for (snapshot, digests) in &self.taken {
            for (volume, digest) in digests {
                if self.set.open(snapshot, volume)?.digest(&|| false)? != *digest {
                    return Err(format!("{volume} of snapshot {snapshot} reads otherwise").into());
                }
                self.compared += 1;
            }
        }
        Ok(())
    }

    fn active(&self, volume: &str) -> Result<String> {
        Ok(self.set.active_path(volume)?.file_name().unwrap_or_default().to_string_lossy().into_owned())
    }
}

/// Opens a volume for writing as the VM would: by what the headers say.
fn open(path: &Path) -> Result<Chain> {
    let directory = path.parent().unwrap_or(Path::new("."));
    Ok(Chain::open(path, &ChainOptions::default().beneath(directory).with_writable(1))?)
}

/// Bytes that no other write has.
fn pattern(number: u64, len: u64) -> Vec<u8> {
    (0..len).map(|at| (number.wrapping_mul(2_654_435_761) ^ (at / 512).wrapping_mul(40_503)).to_le_bytes()[1]).collect()
}

/// What a step moved.
fn moved(report: &Report) -> String {
    let bytes: u64 = report.merged.values().map(|merged| merged.copied + merged.copied_in_kernel).sum();
    let removed = report.removed.len();
    match (report.merged.is_empty(), removed) {
        (true, 0) => String::new(),
        (true, _) => format!(" {removed} files removed"),
        (false, _) => format!(" {} MiB merged, {removed} files removed", bytes / MIB),
    }
}

/// The tree, each snapshot with its file of the first volume.
fn drawn(model: &Model) -> String {
    let mut out = String::new();
    let roots: Vec<_> = model.snapshots.values().filter(|snapshot| snapshot.parent.is_none()).collect();
    roots.iter().for_each(|root| draw(model, root.id, 1, &mut out));
    if roots.is_empty() {
        out += &volumes(model, 1);
    }
    out
}

fn draw(model: &Model, id: SnapshotId, depth: usize, out: &mut String) {
    let Some(snapshot) = model.snapshot(id) else { return };
    let mark = if snapshot.state == State::Hidden { "◌" } else { "○" };
    let hidden = if snapshot.state == State::Hidden { ", hidden" } else { "" };
    let file = snapshot.files.get("root").map_or("", |record| &record.file.path);
    *out += &format!("{:indent$}{mark} {}{hidden} ({file})\n", "", snapshot.name, indent = 2 * depth);
    for dependent in model.deps(id) {
        match dependent {
            Dependent::Snapshot(child) => draw(model, child, depth + 1, out),
            Dependent::Volumes => *out += &volumes(model, depth + 1),
        }
    }
}

fn volumes(model: &Model, depth: usize) -> String {
    let file = model.volume("root").map_or("", |volume| &volume.active.file.path);
    format!("{:indent$}▶ the VM ({file})\n", "", indent = 2 * depth)
}
