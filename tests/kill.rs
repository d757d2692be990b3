//! The program really dies: `strace` kills it at every system call that changes a file or makes it durable. What is left is
//! judged by QEMU.

#![cfg(target_os = "linux")]

use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Instant;

use qcow2_chain::image::{CheckOptions, check};
use qcow2_chain::storage::{Access, FileSystem as _, HostFileSystem};

use crate::support::layers;
use crate::support::qemu::Qemu;
use crate::support::say;
use crate::support::stack::content;

/// All that changes a file, or makes it durable.
const CALLS: &str = "write,pwrite64,writev,pwritev,pwritev2,fdatasync,fsync,sync_file_range,ftruncate,fallocate,\
                     copy_file_range,sendfile,\
                     rename,renameat,renameat2,unlink,unlinkat";
/// Those that change none.
const HARMLESS: &str = "read pread64 preadv open openat openat2 close stat fstat lstat newfstatat statx lseek fcntl ioctl mmap \
                        access faccessat faccessat2 readlink readlinkat getcwd execve poll ppoll statfs fstatfs dup dup3 \
                        getdents64 fadvise64";
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

/// The bytes of a scene's files.
type Files = Vec<Vec<u8>>;

impl Scene {
    /// A base and an overlay with data, zeroes and discards in both, made by QEMU's tools.
    fn delta(qemu: Qemu, what: &'static str, options: &str) -> Self {
        let scene = Self { qemu, what, dir: tempfile::tempdir().unwrap(), files: &["base.qcow2", "top.qcow2"] };
        scene.create("base.qcow2", None, options, "768k");
        scene.io("base.qcow2", &["write -P 1 0 300k", "write -z 64k 20k", "write -P 2 600k 100k", "discard 128k 64k"]);
        scene.create("top.qcow2", Some("base.qcow2"), options, "1M");
        scene.fill_top();
        scene
    }

    /// The same with a layer between, shorter than both, and another base that holds almost the same.
    fn three(qemu: Qemu, what: &'static str, options: &str) -> Self {
        let files = &["base.qcow2", "middle.qcow2", "top.qcow2", "other.qcow2"];
        let scene = Self { qemu, what, dir: tempfile::tempdir().unwrap(), files };
        for base in ["base.qcow2", "other.qcow2"] {
            scene.create(base, None, options, "768k");
            scene.io(base, &["write -P 1 0 300k", "write -z 64k 20k", "write -P 2 600k 100k"]);
        }
        scene.io("other.qcow2", &["write -P 7 16k 10k", "write -P 3 32k 32k", "discard 620k 16k"]);
        scene.create("middle.qcow2", Some("base.qcow2"), options, "700k");
        scene.io("middle.qcow2", &["write -P 8 280k 60k", "write -z 610k 30k", "write -P 3 32k 32k"]);
        scene.create("top.qcow2", Some("middle.qcow2"), options, "1M");
        scene.fill_top();
        scene
    }

    /// Runs that are long enough to be left to the kernel.
    fn long_runs(qemu: Qemu) -> Self {
        let files = &["base.qcow2", "top.qcow2"];
        let scene = Self { qemu, what: "long runs", dir: tempfile::tempdir().unwrap(), files };
        scene.create("base.qcow2", None, "", "8M");
        scene.io("base.qcow2", &["write -P 1 0 2M", "write -P 2 6M 1500k"]);
        scene.create("top.qcow2", Some("base.qcow2"), "", "8M");
        scene.io("top.qcow2", &["write -P 3 3M 2M", "write -P 4 6M 64k"]);
        scene
    }

    fn with_bitmaps(qemu: Qemu, options: &str) -> Self {
        let scene = Self { what: "bitmaps", ..Self::delta(qemu, "", options) };
        for file in scene.files {
            let image = scene.path(file);
            qemu.img(&["bitmap".as_ref(), "--add".as_ref(), image.as_os_str(), "b0".as_ref()]);
            scene.io(file, &["write -P 6 8k 8k"]);
        }
        scene
    }

    fn with_snapshots(qemu: Qemu, options: &str, files: &[&str]) -> Self {
        let scene = Self { what: "internal snapshots", ..Self::delta(qemu, "", options) };
        for file in files {
            let image = scene.path(file);
            qemu.img(&["snapshot".as_ref(), "-c".as_ref(), "s0".as_ref(), image.as_os_str()]);
            scene.io(file, &["write -P 6 8k 8k"]);
        }
        scene
    }

    fn create(&self, name: &str, backing: Option<&str>, options: &str, size: &str) {
        let path = self.path(name).to_string_lossy().into_owned();
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend(backing.into_iter().flat_map(|backing| ["-b", backing, "-F", "qcow2"]));
        args.extend([path.as_str(), size]);
        self.qemu.img(&args);
    }

    fn io(&self, name: &str, commands: &[&str]) {
        self.qemu.io(&self.path(name), commands);
    }

    fn fill_top(&self) {
        let writes = ["write -P 3 30k 100k", "write -z 200k 128k", "write -P 4 700k 200k", "write -c -P 5 960k 64k"];
        self.io("top.qcow2", &writes);
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn read(&self, dir: &Path) -> Files {
        self.files.iter().map(|file| std::fs::read(dir.join(file)).unwrap()).collect()
    }

    /// What each file shows, over its backing files in that directory. Read by this crate.
    fn shown(&self, dir: &Path) -> Files {
        let shown = |file: &&str| content(&layers::open(&dir.join(file), "qcow2", 0)).unwrap();
        self.files.iter().map(shown).collect()
    }

    fn copy(&self) -> tempfile::TempDir {
        let copy = tempfile::tempdir().unwrap();
        for file in self.files {
            std::fs::copy(self.path(file), copy.path().join(file)).unwrap();
        }
        copy
    }

    /// Runs the program on copies and kills it at every call that it makes of those in [`CALLS`]. Returns how often it died.
    ///
    /// After each death the top is what it was, or `after` where that is given, and no image is worse than leaky: QEMU
    /// judges. The same command then completes: all files show what they show after a run that nobody disturbed.
    fn kill_everywhere(&self, args: &[&str], after: Option<&[u8]>) -> usize {
        let started = Instant::now();
        let (start, before) = (self.read(self.dir.path()), self.qemu.content(&self.path("top.qcow2"), None));
        let undisturbed = self.copy();
        let made = calls_made(args, undisturbed.path());
        let end = self.shown(undisturbed.path());
        self.judge(undisturbed.path(), &start, &[after.unwrap_or(&before)], &format!("{}: {args:?}", self.what));

        let mut deaths = 0;
        let mut seen = vec![start.clone()];
        for call in CALLS.split(',').filter(|call| made.iter().any(|made| made == call)) {
            for number in 1.. {
                let copy = self.copy();
                let what = format!("{}: {args:?} killed at {call} {number}", self.what);
                let status = killed_at(call, number, args, copy.path());
                if status.signal() != Some(SIGKILL) {
                    assert!(status.success(), "{what}: {status}");
                    assert!(self.shown(copy.path()) == end, "{what}: other content");
                    break;
                }
                deaths += 1;
                let state = self.read(copy.path());
                if seen.contains(&state) {
                    continue; // one call later, before a sync: there is nothing new to see
                }
                self.judge(copy.path(), &start, &[&before, after.unwrap_or(&before)], &what);
                seen.push(state);
                self.complete(args, copy.path(), &end, &what);
            }
        }
        let (states, elapsed) = (seen.len(), started.elapsed());
        say(&format!(
            "{}: {args:?} died at {deaths} of {} calls, {states} states, {elapsed:.1?}",
            self.what,
            made.len()
        ));
        // Two threads that make a call at once count as one.
        assert!(2 * deaths >= made.len(), "{}: {args:?}: {deaths} deaths for {made:?}", self.what);
        deaths
    }

    /// QEMU's word on what is left. What no byte of was changed is as sound as before.
    fn judge(&self, dir: &Path, start: &Files, tops: &[&[u8]], what: &str) {
        let now = self.qemu.content(&dir.join("top.qcow2"), None);
        assert!(tops.contains(&&now[..]), "{what}: another disk");
        for (file, before) in self.files.iter().zip(start) {
            if std::fs::read(dir.join(file)).unwrap() != *before {
                let check = self.qemu.check(&dir.join(file), None);
                assert!(check.code == 0 || check.code == 3, "{what}: {file}: {check:?}");
            }
        }
    }

    fn complete(&self, args: &[&str], dir: &Path, end: &Files, what: &str) {
        let again = program(args, dir).stderr(Stdio::piped()).output().unwrap();
        // A pull that was complete but for its exit code has nothing left to pull.
        let text = String::from_utf8_lossy(&again.stderr);
        let nothing_left = args[0] == "pull" && text.contains("does not have a backing file");
        assert!(again.status.success() || nothing_left, "{what}, again: {text}");
        assert!(self.shown(dir) == *end, "{what}, again: other content than undisturbed");
        for file in self.files {
            let storage = HostFileSystem.open(&dir.join(file), &Access::read()).unwrap();
            let report = check(&*storage, &CheckOptions::default()).unwrap();
            assert_eq!((report.corruptions, report.check_errors), (0, 0), "{what}, again: {file}: {report:?}");
        }
    }
}

fn program(args: &[&str], dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qcow2-chain"));
    command.args(args).current_dir(dir).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Runs the program under `strace`, which kills it when one of its threads makes this call for the so-manieth time.
/// (`strace` counts each call by itself, and each thread by itself.)
fn killed_at(call: &str, number: usize, args: &[&str], dir: &Path) -> ExitStatus {
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("trace={call}")]);
    command.args(["-e", &format!("inject={call}:signal=KILL:when={number}")]);
    command.arg(env!("CARGO_BIN_EXE_qcow2-chain")).args(args).current_dir(dir);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().expect("strace starts")
}

/// Runs the program to its end and returns the calls of [`CALLS`] that it made, in order. A sweep that does not know a call
/// proves nothing about it: any other that could change a file fails the test.
fn calls_made(args: &[&str], dir: &Path) -> Vec<String> {
    let log = tempfile::NamedTempFile::new().unwrap();
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-e", "trace=%desc,%file", "-o"]).arg(log.path());
    command.arg(env!("CARGO_BIN_EXE_qcow2-chain")).args(args).current_dir(dir);
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
    assert!(status.success(), "{args:?}: {status}");
    let mut made = Vec::new();
    for line in std::fs::read_to_string(log.path()).unwrap().lines() {
        // A process number, then the call; or the rest of one, or a signal.
        let Some((call, _)) = line.split_whitespace().nth(1).and_then(|call| call.split_once('(')) else { continue };
        if CALLS.split(',').any(|known| known == call) {
            made.push(call.to_owned());
        } else {
            assert!(HARMLESS.split_whitespace().any(|known| known == call), "{call} is not swept: {line}");
        }
    }
    made
}

fn tools() -> Option<Qemu> {
    let qemu = Qemu::find()?;
    can_trace().then_some(qemu)
}

/// Versions 2 and 3, and subclusters.
const SHAPES: [(&str, &str); 3] = [
    ("version 2", "compat=0.10,cluster_size=4k"),
    ("version 3", V3),
    ("subclusters", "compat=1.1,cluster_size=16k,extended_l2=on"),
];
const V3: &str = "compat=1.1,cluster_size=4k";

#[test]
fn a_commit_that_is_killed_leaves_the_disk_and_is_completed() {
    let Some(qemu) = tools() else { return };
    let mut deaths = 0;
    for (what, options) in SHAPES {
        for args in [&["commit", "-q", "top.qcow2"][..], &["commit", "-q", "-d", "top.qcow2"]] {
            deaths += Scene::delta(qemu, what, options).kill_everywhere(args, None);
        }
    }
    assert!(deaths >= 40, "only {deaths} deaths");
}

#[test]
fn a_commit_past_a_layer_is_killed() {
    let Some(qemu) = tools() else { return };
    let scene = Scene::three(qemu, "three layers", V3);
    let deaths = scene.kill_everywhere(&["commit", "-q", "-b", "base.qcow2", "top.qcow2"], None);
    assert!(deaths >= 5, "only {deaths} deaths");
}

#[test]
fn a_commit_between_images_with_bitmaps_and_snapshots_is_killed() {
    let Some(qemu) = tools() else { return };
    let mut deaths = 0;
    for args in [&["commit", "-q", "top.qcow2"][..], &["commit", "-q", "-d", "top.qcow2"]] {
        deaths += Scene::with_bitmaps(qemu, V3).kill_everywhere(args, None);
        deaths += Scene::with_snapshots(qemu, V3, &["base.qcow2", "top.qcow2"]).kill_everywhere(args, None);
    }
    let old = Scene::with_snapshots(qemu, "compat=0.10,cluster_size=4k", &["top.qcow2"]);
    deaths += old.kill_everywhere(&["commit", "-q", "top.qcow2"], None);
    assert!(deaths >= 30, "only {deaths} deaths");
}

#[test]
fn a_pull_that_is_killed_leaves_the_disk_and_is_completed() {
    let Some(qemu) = tools() else { return };
    let mut deaths = 0;
    for (what, options) in SHAPES {
        deaths += Scene::delta(qemu, what, options).kill_everywhere(&["pull", "-q", "top.qcow2"], None);
        let args = ["pull", "-q", "-b", "base.qcow2", "top.qcow2"];
        deaths += Scene::three(qemu, what, options).kill_everywhere(&args, None);
    }
    for scene in [Scene::with_bitmaps(qemu, V3), Scene::with_snapshots(qemu, V3, &["base.qcow2", "top.qcow2"])] {
        deaths += scene.kill_everywhere(&["pull", "-q", "top.qcow2"], None);
    }
    assert!(deaths >= 40, "only {deaths} deaths");
}

#[test]
fn a_shrink_that_is_killed_leaves_the_old_disk_or_the_new() {
    let Some(qemu) = tools() else { return };
    let args = ["resize", "-q", "--shrink", "top.qcow2", "300k"];
    let mut deaths = 0;
    let shapes = SHAPES.map(|(what, options)| Scene::delta(qemu, what, options));
    for scene in shapes
        .into_iter()
        .chain([Scene::with_bitmaps(qemu, V3), Scene::with_snapshots(qemu, V3, &["base.qcow2", "top.qcow2"])])
    {
        let after = qemu.content(&scene.path("top.qcow2"), None)[..300 << 10].to_vec();
        deaths += scene.kill_everywhere(&args, Some(&after));
    }
    assert!(deaths >= 20, "only {deaths} deaths");
}

#[test]
fn a_rebase_that_is_killed_leaves_the_disk_and_is_completed() {
    let Some(qemu) = tools() else { return };
    let mut deaths = 0;
    for (what, options) in SHAPES {
        let scene = Scene::three(qemu, what, options);
        for args in [
            &["rebase", "-b", "", "top.qcow2"][..],
            &["rebase", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"],
            &["rebase", "--drop-equal", "-b", "other.qcow2", "-F", "qcow2", "top.qcow2"],
        ] {
            deaths += scene.kill_everywhere(args, None);
        }
    }
    for scene in [Scene::with_bitmaps(qemu, V3), Scene::with_snapshots(qemu, V3, &["base.qcow2", "top.qcow2"])] {
        let args = ["rebase", "--ignore-snapshots", "-b", "", "top.qcow2"];
        deaths += scene.kill_everywhere(&args, None);
    }
    assert!(deaths >= 40, "only {deaths} deaths");
}

#[test]
fn a_merge_of_long_runs_is_killed() {
    let Some(qemu) = tools() else { return };
    let scene = Scene::long_runs(qemu);
    let mut deaths = 0;
    for args in [&["commit", "-q", "top.qcow2"][..], &["pull", "-q", "top.qcow2"]] {
        deaths += scene.kill_everywhere(args, None);
    }
    assert!(deaths >= 12, "only {deaths} deaths");
}
