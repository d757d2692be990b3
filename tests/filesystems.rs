//! Real file systems: one that becomes full, and those that share blocks between files.

#![cfg(target_os = "linux")]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use qcow2_chain::chain::{Chain, ChainOptions, Policy};
use qcow2_chain::format::GuestOffset;
use qcow2_chain::image::{self, CreateOptions, Image};
use qcow2_chain::merge::{AfterCommit, CommitOptions, Error, PullOptions, commit, pull};
use qcow2_chain::storage::{self, FileStorage, Storage as _};

use crate::support::say;
use crate::support::stack::content;

const MIB: u64 = 1 << 20;

/// A file system that is unmounted when this is dropped.
struct Mount(PathBuf, #[expect(dead_code, reason = "holds the file that is mounted")] tempfile::TempDir);

impl Mount {
    fn new(what: &str, arguments: &[&str], dir: tempfile::TempDir) -> Option<Self> {
        let point = dir.path().join("mounted");
        std::fs::create_dir(&point).unwrap();
        let run = Command::new("mount").args(arguments).arg(&point).stderr(Stdio::null()).status();
        if run.is_ok_and(|status| status.success()) {
            return Some(Self(point, dir));
        }
        say(&format!("SKIPPED: {what} cannot be mounted (root is needed)"));
        None
    }

    /// A file system in memory of this many bytes.
    fn tmpfs(size: u64) -> Option<Self> {
        let options = format!("size={size}");
        Self::new("tmpfs", &["-t", "tmpfs", "-o", &options, "none"], tempfile::tempdir().unwrap())
    }

    /// A new file system made by `mkfs`, in a file of this many bytes.
    fn made_by(mkfs: &str, arguments: &[&str], size: u64) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::File::create(&file).unwrap().set_len(size).unwrap();
        let run = Command::new(mkfs).args(arguments).arg(&file).stdout(Stdio::null()).stderr(Stdio::null()).status();
        if !run.is_ok_and(|status| status.success()) {
            say(&format!("SKIPPED: {mkfs} is missing or fails"));
            return None;
        }
        Self::new(mkfs, &["-o", "loop", &file.to_string_lossy()], dir)
    }

    /// The bytes that are free, once everything is on the medium.
    fn free(&self) -> u64 {
        let _ = Command::new("sync").arg("-f").arg(&self.0).status();
        let probe = FileStorage::create_new(self.0.join("probe")).unwrap();
        let free = probe.free_space().unwrap().expect("a file system knows");
        std::fs::remove_file(self.0.join("probe")).unwrap();
        free
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

fn open(dir: &Path, writable: usize) -> Chain {
    let options = ChainOptions::default().with_policy(Policy::Beneath(vec![dir.to_owned()])).with_writable(writable);
    Chain::open(dir.join("top.qcow2"), &options).expect("the chain opens")
}

/// An empty base and an overlay with `len` bytes of data in it, both of 64 MiB.
fn delta(dir: &Path, len: u64) {
    let base = Arc::new(FileStorage::create_new(dir.join("base.qcow2")).unwrap());
    Image::create(base, &CreateOptions::new(64 * MIB)).unwrap().close().unwrap();
    let top = Arc::new(FileStorage::create_new(dir.join("top.qcow2")).unwrap());
    let options = CreateOptions::new(64 * MIB).with_backing("base.qcow2", "qcow2");
    Image::create(top, &options).unwrap().close().unwrap();
    let chain = open(dir, 1);
    for at in 0..len / MIB {
        let bytes = vec![u8::try_from(at % 250 + 1).unwrap(); usize::try_from(MIB).unwrap()];
        chain.write_at(&bytes, GuestOffset::new(at * MIB)).unwrap();
    }
    chain.close().unwrap();
}

/// Fills the file system up from the merge's own progress, when it has begun to copy.
struct Filler<'a>(&'a Path);

impl qcow2_chain::merge::Progress for Filler<'_> {
    fn step(&self, step: &qcow2_chain::merge::Step) {
        let ballast = self.0.join("ballast");
        if step.done > 0 && !ballast.exists() {
            use std::io::Write as _;
            let mut file = std::fs::File::create(ballast).unwrap();
            while file.write_all(&[0xba; 4096]).is_ok() {}
        }
    }
}

#[test]
fn a_commit_that_runs_out_of_space_says_so_and_is_completed_when_there_is_room() {
    let Some(mount) = Mount::tmpfs(40 * MIB) else { return };
    let dir = mount.0.as_path();
    delta(dir, 12 * MIB);
    let before = content(&open(dir, 0)).unwrap();
    let after = CommitOptions::default().with_after(AfterCommit::Empty);

    // Not enough from the start: nothing is written.
    std::fs::write(dir.join("first"), vec![1; usize::try_from(24 * MIB).unwrap()]).unwrap();
    let base = std::fs::read(dir.join("base.qcow2")).unwrap();
    let chain = open(dir, 2);
    let refused = commit(&chain, &after, &());
    assert!(matches!(refused, Err(Error::NoSpace { .. })), "{refused:?}");
    drop(chain);
    assert!(std::fs::read(dir.join("base.qcow2")).unwrap() == base, "the base was written");
    std::fs::remove_file(dir.join("first")).unwrap();

    // Enough at first, taken by another half-way.
    let chain = open(dir, 2);
    let full = commit(&chain, &after, &Filler(dir));
    let is_full = matches!(&full, Err(Error::Image(image::Error::Storage(storage::Error::NoSpace { .. }))));
    assert!(is_full, "{full:?}");
    assert!(content(&chain).unwrap() == before, "the open chain shows another disk");
    drop(chain);
    assert!(content(&open(dir, 0)).unwrap() == before, "the guest sees another disk");

    std::fs::remove_file(dir.join("ballast")).unwrap();
    let chain = open(dir, 2);
    commit(&chain, &after, &()).expect("there is room");
    chain.close().unwrap();
    assert!(content(&open(dir, 0)).unwrap() == before, "the guest sees another disk");
    assert!(std::fs::metadata(dir.join("top.qcow2")).unwrap().len() < MIB, "the overlay is not empty");
}

/// Commits and pulls 32 MiB and returns how many bytes of the file system each took.
fn share_blocks(mount: &Mount) {
    let data = 32 * MIB;
    for pulled in [false, true] {
        let dir = mount.0.join(if pulled { "pull" } else { "commit" });
        std::fs::create_dir(&dir).unwrap();
        delta(&dir, data);
        if pulled {
            // What the overlay took in from the base goes into an overlay of its own.
            std::fs::rename(dir.join("top.qcow2"), dir.join("middle.qcow2")).unwrap();
            let top = Arc::new(FileStorage::create_new(dir.join("top.qcow2")).unwrap());
            let options = CreateOptions::new(64 * MIB).with_backing("middle.qcow2", "qcow2");
            Image::create(top, &options).unwrap().close().unwrap();
        }
        let before = content(&open(&dir, 0)).unwrap();
        let free = mount.free();
        let chain = open(&dir, if pulled { 1 } else { 2 });
        let report = if pulled {
            pull(&chain, &PullOptions::default(), &())
        } else {
            commit(&chain, &CommitOptions::default(), &())
        };
        let report = report.expect("the merge");
        chain.close().unwrap();
        let taken = free.saturating_sub(mount.free());
        say(&format!("{}: {report:?}, {taken} bytes taken", dir.display()));
        assert!(report.copied_in_kernel >= data / 2, "{report:?}");
        assert!(taken < data / 4, "{taken} bytes of the file system for {data} bytes of data");
        assert!(content(&open(&dir, 0)).unwrap() == before, "the guest sees another disk");
    }
}

#[test]
fn blocks_are_shared_on_xfs() {
    if let Some(mount) = Mount::made_by("mkfs.xfs", &["-q", "-m", "reflink=1"], 512 * MIB) {
        share_blocks(&mount);
    }
}

#[test]
fn blocks_are_shared_on_btrfs() {
    if let Some(mount) = Mount::made_by("mkfs.btrfs", &["-q"], 512 * MIB) {
        share_blocks(&mount);
    }
}
