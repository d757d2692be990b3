//! Deleting a snapshot of a VM with two volumes: ours in one call, beside what an agent does today, which is `qemu-img commit -d`,
//! `rebase -u` and `rm`, one volume after the other. (`rebase -u` is not synced to the directory, and no journal is kept.)

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use qcow2_chain::chain::{Chain, ChainOptions};
use qcow2_chain::format::GuestOffset;
use qcow2_chain::image::{CreateOptions, Image};
use qcow2_chain::storage::FileStorage;
use qcow2_chain::vm::{AdoptOptions, SnapshotSet, VolumeSpec};

use crate::images::{CLUSTER, Done, Images, MIB, noise, shuffled};
use crate::works::{Program, Work};

const VOLUMES: [&str; 2] = ["a", "b"];
const CATALOGUE: &str = "vm.json";

/// Which snapshots there are, and which is deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// s1, s2, s3 in a line: s1 goes, and with it a file of s2.
    Line,
    /// Two branches on a hidden snapshot: one goes, and the other is merged with the hidden one.
    Branches,
}

/// The files that a deletion changes, the beginning of each name: an overlay's name ends in random digits. Other files are
/// shared between the runs.
const LINE: &[&str] = &[CATALOGUE, "a.qcow2", "b.qcow2", "vm-a.1-", "vm-b.2-", "vm-a.3-", "vm-b.4-"];
const BRANCHES: &[&str] = &[CATALOGUE, "vm-a.1-", "vm-b.2-", "vm-a.7-", "vm-b.8-", "vm-a.9-", "vm-b.10-"];

/// The works, with so many megabytes in each file that is merged.
pub(crate) fn works(mib: u64) -> Vec<Work> {
    let work = |name: &str, shape, changes, snapshot| {
        Work::new(name, Images::Vm(mib, shape), None)
            .changing(changes)
            .moving(2 * mib)
            .side("qemu-img, rm", Program::Agent, &["agent", name_of(shape)])
            .side("ours", Program::Ours, &["vm", "delete", "-q", CATALOGUE, snapshot])
            .floor(&["write-and-sync", &(2 * mib).to_string()])
    };
    vec![
        work("vm delete in a line (D4), 2 volumes", Shape::Line, LINE, "s1"),
        work("vm delete of a branch (AD5), 2 volumes", Shape::Branches, BRANCHES, "s3"),
    ]
}

fn name_of(shape: Shape) -> &'static str {
    match shape {
        Shape::Line => "line",
        Shape::Branches => "branches",
    }
}

/// Makes the VM in an empty directory. Both sides commit all of `mib`; the file beneath holds a quarter more.
pub(crate) fn make(dir: &Path, mib: u64, shape: Shape) -> Done {
    let mut specs = Vec::new();
    for volume in VOLUMES {
        let path = dir.join(format!("{volume}.qcow2"));
        Image::create(Arc::new(FileStorage::create_new(&path)?), &CreateOptions::new(4 * mib * MIB))?.close()?;
        specs.push(VolumeSpec::new(volume, path));
    }
    let set = SnapshotSet::adopt(dir.join(CATALOGUE), &specs, &AdoptOptions::default())?;
    let more = mib + mib / 4;
    match shape {
        Shape::Line => {
            write(&set, more, 1)?;
            set.create("s1", &Default::default())?;
            write(&set, mib, 2)?;
            set.create("s2", &Default::default())?;
            write(&set, 1, 3)?;
            set.create("s3", &Default::default())?;
        }
        Shape::Branches => {
            set.create("s1", &Default::default())?;
            write(&set, more, 1)?;
            set.create("s2", &Default::default())?;
            write(&set, 1, 2)?;
            set.create("s3", &Default::default())?;
            set.revert("s2", &Default::default(), &())?;
            write(&set, mib, 3)?;
            set.create("s4", &Default::default())?;
            set.delete("s2", &Default::default(), &())?;
        }
    }
    write(&set, 1, 4)
}

/// The guest writes so much to each volume, in random clusters.
fn write(set: &SnapshotSet, mib: u64, seed: u64) -> Done {
    for volume in VOLUMES {
        let path = set.active_path(volume)?;
        let directory = path.parent().ok_or("no directory")?;
        let chain = Chain::open(&path, &ChainOptions::default().beneath(directory).with_writable(1))?;
        let slots = chain.virtual_size() / CLUSTER;
        for slot in shuffled(slots, seed).into_iter().take((mib * MIB / CLUSTER) as usize) {
            chain.write_at(&noise(slot, seed), GuestOffset::new(slot * CLUSTER))?;
        }
        chain.close()?;
    }
    Ok(())
}

/// What an agent does, in the current directory: for each volume the merged file, the one beneath it, the one above it, and
/// one that is removed with it. Each is given by the beginning of its name.
pub(crate) fn agent(shape: &str) -> Done {
    let volumes = match shape {
        "line" => [("vm-a.1-", "a.", "vm-a.3-", None), ("vm-b.2-", "b.", "vm-b.4-", None)],
        "branches" => {
            [("vm-a.7-", "vm-a.1-", "vm-a.9-", Some("vm-a.3-")), ("vm-b.8-", "vm-b.2-", "vm-b.10-", Some("vm-b.4-"))]
        }
        other => return Err(format!("no shape {other}").into()),
    };
    for (top, base, above, gone) in volumes {
        let (top, base, above) = (named(top)?, named(base)?, named(above)?);
        if let Some(gone) = gone {
            std::fs::remove_file(named(gone)?)?;
        }
        img(&["commit", "-q", "-d", "-f", "qcow2", &top])?;
        img(&["rebase", "-q", "-u", "-f", "qcow2", "-b", &base, "-F", "qcow2", &above])?;
        std::fs::remove_file(top)?;
    }
    Ok(())
}

/// The file of the current directory whose name begins so.
fn named(beginning: &str) -> std::result::Result<String, Box<dyn std::error::Error>> {
    for entry in std::fs::read_dir(".")? {
        match entry?.file_name().into_string() {
            Ok(name) if name.starts_with(beginning) => return Ok(name),
            _ => {}
        }
    }
    Err(format!("no file is named {beginning}...").into())
}

fn img(args: &[&str]) -> Done {
    let status = Command::new("qemu-img").args(args).status()?;
    if status.success() { Ok(()) } else { Err(format!("qemu-img {args:?}: {status}").into()) }
}
