//! The program really dies: `strace` kills it at every system call that changes a file. What is left is judged by QEMU.

#![cfg(target_os = "linux")]

use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Instant;

use crate::support::qemu::Qemu;
use crate::support::say;

/// All that changes a file, or makes it durable.
const CALLS: &str = "pwrite64,pwritev,fdatasync,fsync,ftruncate,fallocate,copy_file_range";
const SIGKILL: i32 = 9;

/// Whether processes can be traced here.
fn can_trace() -> bool {
    let run = Command::new("strace").args(["-f", "-e", "trace=fsync", "true"]).stdin(Stdio::null()).output();
    let works = run.is_ok_and(|run| run.status.success());
    if !works {
        say("SKIPPED: strace is missing or may not trace");
    }
    works
}

/// A chain in a directory: what is killed works on copies of it.
struct Scene {
    qemu: Qemu,
    what: &'static str,
    dir: tempfile::TempDir,
    files: &'static [&'static str],
}

impl Scene {
    /// A base and an overlay with data, zeroes and discards in both, made by QEMU's tools.
    fn delta(qemu: Qemu, what: &'static str, options: &str) -> Self {
        let scene = Self { qemu, what, dir: tempfile::tempdir().unwrap(), files: &["base.qcow2", "top.qcow2"] };
        let [base, top] = ["base.qcow2", "top.qcow2"].map(|name| scene.dir.path().join(name));
        let (base, top) = (base.to_string_lossy(), top.to_string_lossy());
        qemu.img(&["create", "-q", "-f", "qcow2", "-o", options, &base, "768k"]);
        let io = |image: &str, commands: &[&str]| qemu.io(Path::new(image), commands);
        io(&base, &["write -P 1 0 300k", "write -z 64k 20k", "write -P 2 600k 100k", "discard 128k 64k"]);
        qemu.img(&["create", "-q", "-f", "qcow2", "-o", options, "-b", "base.qcow2", "-F", "qcow2", &top, "1M"]);
        io(&top, &["write -P 3 30k 100k", "write -z 200k 128k", "write -P 4 700k 200k", "write -c -P 5 960k 64k"]);
        scene
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs the program on a copy until no call is left at which it can be killed. Returns how often it died.
    ///
    /// After each death `top` is what it was, or `after` where that is given; no image is worse than leaky; and the same
    /// command completes.
    fn kill_everywhere(&self, args: &[&str], top: &str, after: Option<&[u8]>) -> usize {
        let before = self.qemu.content(&self.path(top), None);
        let started = Instant::now();
        for number in 1.. {
            let copy = tempfile::tempdir().unwrap();
            for file in self.files {
                std::fs::copy(self.path(file), copy.path().join(file)).unwrap();
            }
            let status = killed_at(number, args, copy.path());
            let died = status.signal() == Some(SIGKILL);
            assert!(died || status.success(), "{}: {args:?} at call {number}: {status}", self.what);
            let judge = |when: &str, done: bool| {
                let what = format!("{}: {args:?} {when} call {number}", self.what);
                let now = self.qemu.content(&copy.path().join(top), None);
                let is_after = after.is_none_or(|after| now == after);
                assert!(if done { is_after } else { is_after || now == before }, "{what}: another disk");
                assert!(after.is_some() || now == before, "{what}: another disk");
                for file in self.files {
                    let check = self.qemu.check(&copy.path().join(file), None);
                    assert!(check.code == 0 || check.code == 3, "{what}: {file}: {check:?}");
                }
            };
            judge("killed at", !died);
            if !died {
                say(&format!("{}: {args:?} died at {} calls in {:.1?}", self.what, number - 1, started.elapsed()));
                return number - 1;
            }
            let again = program(args, copy.path()).status().unwrap();
            assert!(again.success(), "{}: {args:?} again after call {number}: {again}", self.what);
            judge("made again after", true);
        }
        unreachable!("the loop ends by returning")
    }
}

fn program(args: &[&str], dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qcow2-chain"));
    command.args(args).current_dir(dir).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Runs the program under `strace`, which kills it when it makes the call with this number, counted from 1.
fn killed_at(number: usize, args: &[&str], dir: &Path) -> ExitStatus {
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("trace={CALLS}")]);
    command.args(["-e", &format!("inject={CALLS}:signal=KILL:when={number}")]);
    command.arg(env!("CARGO_BIN_EXE_qcow2-chain")).args(args).current_dir(dir);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().expect("strace starts")
}

fn tools() -> Option<Qemu> {
    let qemu = Qemu::find()?;
    can_trace().then_some(qemu)
}

const V3: &str = "compat=1.1,cluster_size=4k";

#[test]
fn a_commit_that_is_killed_leaves_the_disk_and_is_completed() {
    let Some(qemu) = tools() else { return };
    let mut deaths = 0;
    for (what, options) in [("version 2", "compat=0.10,cluster_size=4k"), ("version 3", V3)] {
        deaths += Scene::delta(qemu, what, options).kill_everywhere(&["commit", "-q", "top.qcow2"], "top.qcow2", None);
    }
    assert!(deaths >= 20, "only {deaths} deaths");
}

#[test]
fn a_commit_between_images_with_bitmaps_and_snapshots_is_killed() {
    let Some(qemu) = tools() else { return };
    let scene = Scene::delta(qemu, "bitmaps", V3);
    for file in scene.files {
        let image = scene.path(file);
        qemu.img(&["bitmap".as_ref(), "--add".as_ref(), image.as_os_str(), "b0".as_ref()]);
        qemu.io(&image, &["write -P 6 8k 8k"]);
    }
    let mut deaths = scene.kill_everywhere(&["commit", "-q", "top.qcow2"], "top.qcow2", None);
    let scene = Scene::delta(qemu, "internal snapshots", V3);
    for file in scene.files {
        let image = scene.path(file);
        qemu.img(&["snapshot".as_ref(), "-c".as_ref(), "s0".as_ref(), image.as_os_str()]);
        qemu.io(&image, &["write -P 6 8k 8k"]);
    }
    deaths += scene.kill_everywhere(&["commit", "-q", "-d", "top.qcow2"], "top.qcow2", None);
    assert!(deaths >= 15, "only {deaths} deaths");
}

#[test]
fn a_shrink_that_is_killed_leaves_the_old_disk_or_the_new() {
    let Some(qemu) = tools() else { return };
    let scene = Scene::delta(qemu, "shrink", V3);
    let after = qemu.content(&scene.path("top.qcow2"), None)[..300 << 10].to_vec();
    let args = ["resize", "-q", "--shrink", "top.qcow2", "300k"];
    let deaths = scene.kill_everywhere(&args, "top.qcow2", Some(&after));
    assert!(deaths >= 4, "only {deaths} deaths");
}

#[test]
fn a_rebase_that_is_killed_leaves_the_disk_and_is_completed() {
    let Some(qemu) = tools() else { return };
    let help = program(&["rebase", "--help"], Path::new(".")).status();
    if !help.is_ok_and(|status| status.success()) {
        say("SKIPPED: the program has no rebase");
        return;
    }
    let scene = Scene::delta(qemu, "rebase", V3);
    let deaths = scene.kill_everywhere(&["rebase", "-f", "qcow2", "-b", "", "top.qcow2"], "top.qcow2", None);
    assert!(deaths >= 4, "only {deaths} deaths");
}
