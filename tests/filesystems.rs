//! Real file systems: one that becomes full, and those that share blocks between files.

#![cfg(target_os = "linux")]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use qcow2_chain::chain::{Chain, ChainOptions, Policy};
use qcow2_chain::format::GuestOffset;
use qcow2_chain::image::{self, CheckOptions, CreateOptions, Image, OpenOptions, check};
use qcow2_chain::merge::{
    AfterCommit, CommitOptions, ConvertOptions, ConvertTarget, Error, Onto, Progress, PullOptions, RebaseOptions,
    Report, commit, convert, pull, rebase,
};
use qcow2_chain::storage::{self, Access, FileStorage, Storage as _};

use crate::support::qemu::Qemu;
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

impl Progress for Filler<'_> {
    fn step(&self, step: &qcow2_chain::merge::Step) {
        let ballast = self.0.join("ballast");
        if step.done > 0 && !ballast.exists() {
            use std::io::Write as _;
            let mut file = std::fs::File::create(ballast).unwrap();
            while file.write_all(&[0xba; 4096]).is_ok() {}
        }
    }
}

/// A merge that moves what one of the two images holds into the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Merge {
    Commit,
    Pull,
    Rebase,
    Convert,
}

impl Merge {
    /// The chain that it works on, with `len` bytes of data in the layer that gives.
    fn prepare(self, dir: &Path, len: u64) {
        delta(dir, len);
        if matches!(self, Self::Pull | Self::Rebase) {
            std::fs::rename(dir.join("top.qcow2"), dir.join("middle.qcow2")).unwrap();
            let top = Arc::new(FileStorage::create_new(dir.join("top.qcow2")).unwrap());
            let options = CreateOptions::new(64 * MIB).with_backing("middle.qcow2", "qcow2");
            Image::create(top, &options).unwrap().close().unwrap();
        }
    }

    fn open(self, dir: &Path) -> Chain {
        open(
            dir,
            match self {
                Self::Commit => 2,
                Self::Pull | Self::Rebase => 1,
                Self::Convert => 0,
            },
        )
    }

    fn run(self, dir: &Path, chain: &Chain, progress: &dyn Progress) -> Result<Report, Error> {
        match self {
            Self::Commit => commit(chain, &CommitOptions::default().with_after(AfterCommit::Empty), progress),
            Self::Pull => pull(chain, &PullOptions::default(), progress),
            Self::Rebase => rebase(chain, Onto::Nothing, &RebaseOptions::default(), progress),
            Self::Convert => {
                let _ = std::fs::remove_file(dir.join("copy.qcow2"));
                let copy = Arc::new(FileStorage::create_new(dir.join("copy.qcow2")).unwrap());
                let target = ConvertTarget::Qcow2(copy, CreateOptions::default());
                convert(chain, target, &ConvertOptions::default().with_offload(true), progress)
            }
        }
    }

    /// The image that receives.
    fn receiver(self) -> &'static str {
        match self {
            Self::Commit => "base.qcow2",
            Self::Pull | Self::Rebase => "top.qcow2",
            Self::Convert => "copy.qcow2",
        }
    }
}

/// The bytes of every image but one.
fn all_but(dir: &Path, left_out: &str) -> Vec<Vec<u8>> {
    let names = ["base.qcow2", "middle.qcow2", "top.qcow2"];
    names.iter().filter(|name| **name != left_out).filter_map(|name| std::fs::read(dir.join(name)).ok()).collect()
}

#[test]
fn a_merge_that_runs_out_of_space_says_so_and_is_completed_when_there_is_room() {
    for merge in [Merge::Commit, Merge::Pull, Merge::Rebase] {
        let Some(mount) = Mount::tmpfs(40 * MIB) else { return };
        let dir = mount.0.as_path();
        merge.prepare(dir, 12 * MIB);
        let before = content(&open(dir, 0)).unwrap();

        // Not enough from the start: nothing is written.
        std::fs::write(dir.join("first"), vec![1; usize::try_from(24 * MIB).unwrap()]).unwrap();
        let files = all_but(dir, "");
        let chain = merge.open(dir);
        match merge.run(dir, &chain, &()) {
            Err(Error::NoSpace { file, need, have }) => {
                assert!(file.ends_with(merge.receiver()) && need == 12 * MIB && have < need, "{file} {need} {have}");
            }
            done => panic!("{merge:?}: {done:?}"),
        }
        drop(chain);
        assert!(all_but(dir, "") == files, "{merge:?} wrote something");
        std::fs::remove_file(dir.join("first")).unwrap();

        // Enough at first, taken by another half-way.
        let others = all_but(dir, merge.receiver());
        let chain = merge.open(dir);
        let full = merge.run(dir, &chain, &Filler(dir));
        let is_full = matches!(&full, Err(Error::Image(image::Error::Storage(storage::Error::NoSpace { .. }))));
        assert!(is_full, "{merge:?}: {full:?}");
        let text = full.unwrap_err().to_string();
        assert!(text.contains(merge.receiver()) && text.contains("space"), "{text}");
        assert!(content(&chain).unwrap() == before, "{merge:?}: the open chain shows another disk");
        drop(chain);
        assert!(content(&open(dir, 0)).unwrap() == before, "{merge:?}: the guest sees another disk");
        assert!(all_but(dir, merge.receiver()) == others, "{merge:?} wrote more than the receiver");
        for name in ["base.qcow2", "top.qcow2"] {
            let file = FileStorage::open(dir.join(name), &Access::read()).unwrap();
            let report = check(&file, &CheckOptions::default()).unwrap();
            assert_eq!((report.corruptions, report.check_errors), (0, 0), "{merge:?}: {name}: {report:?}");
        }

        std::fs::remove_file(dir.join("ballast")).unwrap();
        let chain = merge.open(dir);
        merge.run(dir, &chain, &()).expect("there is room");
        chain.close().unwrap();
        let chain = open(dir, 0);
        assert!(content(&chain).unwrap() == before, "{merge:?}: the guest sees another disk");
        if merge == Merge::Commit {
            assert!(std::fs::metadata(dir.join("top.qcow2")).unwrap().len() < MIB, "the overlay is not empty");
        } else {
            assert_eq!(chain.layers().len(), 1, "{merge:?}: still over something");
        }
    }
}

/// Merges 32 MiB in every way: the report says that the kernel copied them, and the file system that they took no room.
fn share_blocks(mount: &Mount) {
    let data = 32 * MIB;
    for merge in [Merge::Commit, Merge::Pull, Merge::Rebase, Merge::Convert] {
        let dir = mount.0.join(format!("{merge:?}"));
        std::fs::create_dir(&dir).unwrap();
        merge.prepare(&dir, data);
        let before = content(&open(&dir, 0)).unwrap();
        let free = mount.free();
        let chain = merge.open(&dir);
        // The overlay keeps its blocks, or sharing them would not be seen.
        let report = match merge {
            Merge::Commit => commit(&chain, &CommitOptions::default(), &()),
            _ => merge.run(&dir, &chain, &()),
        };
        let report = report.expect("the merge");
        chain.close().unwrap();
        let taken = free.saturating_sub(mount.free());
        say(&format!("{}: {report:?}, {taken} bytes taken", dir.display()));
        assert_eq!(report.copied_in_kernel + report.copied, data, "{report:?}");
        assert!(report.copied_in_kernel >= data / 2, "{report:?}");
        assert!(taken < data / 4, "{taken} bytes of the file system for {data} bytes of data");
        assert!(content(&open(&dir, 0)).unwrap() == before, "the guest sees another disk");
        if merge == Merge::Convert {
            let copy = Image::open_path(dir.join("copy.qcow2"), &OpenOptions::default()).unwrap();
            let mut read = vec![0; before.len()];
            copy.read_at(&mut read, GuestOffset::ZERO).unwrap();
            assert!(read == before, "the copy holds another disk");
        }
        if let Some(qemu) = Qemu::find() {
            qemu.assert_clean(&dir.join(merge.receiver()));
        }
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
