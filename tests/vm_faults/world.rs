//! A directory with images, the program, and the checks that the tests share.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::support::qemu::{Qemu, Run};
use crate::support::{ram, say};

/// The size of most disks.
pub const SIZE: &str = "32M";
/// The first bytes, which the base holds.
pub const OLD: &str = "-P 1 0 1M";
/// Bytes that only the base holds; pulling them at [`SLOW`] takes seconds.
pub const FILL: &str = "-P 3 24M 8M";
/// Bytes that the guest writes after a snapshot; merging them at [`SLOW`] takes seconds.
pub const NEW: &str = "-P 2 8M 16M";
/// A rate that leaves time to interrupt a merge.
pub const SLOW: [&str; 2] = ["--rate-limit", "2M"];

/// A file as a test compares it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    inode: u64,
    mode: u32,
    owner: (u32, u32),
    /// The length and CRC-32 of a regular file.
    content: Option<(u64, u32)>,
    target: Option<PathBuf>,
}

/// All files beneath a directory, without lock files.
pub type Tree = BTreeMap<PathBuf, Node>;

/// A directory with images and catalogues. The program runs in it.
pub struct World {
    pub qemu: Qemu,
    dir: tempfile::TempDir,
}

impl World {
    /// Creates an empty directory. Returns `None` without QEMU's tools.
    pub fn new() -> Option<Self> {
        Some(Self { qemu: Qemu::find()?, dir: ram::dir() })
    }

    /// Creates an empty directory outside `/dev`.
    pub fn on_disk() -> Option<Self> {
        Some(Self { qemu: Qemu::find()?, dir: tempfile::tempdir().expect("a directory") })
    }

    /// Creates a set with the volume `vda` of [`SIZE`], with [`OLD`] and [`FILL`] in it.
    pub fn with_volume() -> Option<Self> {
        let world = Self::new()?;
        world.image("vda.qcow2", SIZE);
        world.write("vda.qcow2", OLD);
        world.write("vda.qcow2", FILL);
        world.ok(&["init", "web.json", "--volume", "vda=vda.qcow2"]);
        Some(world)
    }

    /// Creates a set with the snapshot `s1` and [`NEW`] in the active file.
    pub fn with_snapshot() -> Option<Self> {
        let world = Self::with_volume()?;
        world.ok(&["snapshot", "web.json", "s1"]);
        world.write(&world.active("vda"), NEW);
        Some(world)
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir().join(name)
    }

    pub fn exists(&self, name: impl AsRef<Path>) -> bool {
        fs::symlink_metadata(self.path(name)).is_ok()
    }

    /// Returns a command that runs a `vm` verb in the directory.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qcow2-chain"));
        command.arg("vm").args(args).current_dir(self.dir()).env("TZ", "UTC").stdin(Stdio::null());
        command
    }

    pub fn vm(&self, args: &[&str]) -> Run {
        finish(&mut self.command(args))
    }

    /// Runs a verb that must succeed. Returns its standard output.
    #[track_caller]
    pub fn ok(&self, args: &[&str]) -> String {
        let run = self.vm(args);
        assert_eq!(run.code, 0, "{args:?}: {}{}", run.stdout, run.stderr);
        run.stdout
    }

    /// Runs a verb that must be refused. Returns its standard error.
    #[track_caller]
    pub fn refused(&self, args: &[&str]) -> String {
        let run = self.vm(args);
        assert_refused(&run, args);
        run.stderr
    }

    /// Runs a verb that must be refused and must change nothing. Returns its standard error.
    #[track_caller]
    pub fn unchanged(&self, args: &[&str]) -> String {
        let before = self.tree();
        let said = self.refused(args);
        assert_same(&before, &self.tree(), &format!("{args:?} was refused ({said}) and changed files"));
        said
    }

    /// Runs a deletion or revert that must be refused, with `--dry-run` and without.
    #[track_caller]
    pub fn obstacle(&self, args: &[&str]) -> String {
        self.unchanged(&[args, &["--dry-run"]].concat());
        self.unchanged(args)
    }

    /// Creates a qcow2 image with the program of QEMU.
    pub fn image(&self, name: &str, size: &str) {
        self.img(&["create", "-q", "-f", "qcow2", name, size]);
    }

    /// Creates an overlay over a qcow2 image, named as given.
    pub fn overlay(&self, name: &str, base: &str) {
        self.img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, name]);
    }

    /// Runs `qemu-img` in the directory.
    #[track_caller]
    pub fn img(&self, args: &[&str]) -> String {
        let run = finish(Command::new("qemu-img").args(args).current_dir(self.dir()));
        assert_eq!(run.code, 0, "qemu-img {args:?}: {}", run.stderr);
        run.stdout
    }

    /// Writes by `qemu-io`; the arguments are those of its `write`.
    #[track_caller]
    pub fn write(&self, name: &str, what: &str) {
        self.qemu.io(&self.path(name), &[format!("write -q {what}")]);
    }

    /// Returns the reason why QEMU does not read this from a qcow2 image and its backing files.
    pub fn misread(&self, name: impl AsRef<Path>, what: &str) -> Option<String> {
        self.misread_as("qcow2", name, what)
    }

    pub fn misread_as(&self, format: &str, name: impl AsRef<Path>, what: &str) -> Option<String> {
        let read = format!("read {what}");
        let mut command = Command::new("qemu-io");
        command.args(["-r", "-f", format, "-c", &read]).arg(self.path(name));
        let run = finish(command.current_dir("/"));
        let wrong = run.code != 0 || run.stdout.contains("verification failed") || run.stdout.contains("failed");
        wrong.then(|| format!("{}{}", run.stdout, run.stderr))
    }

    #[track_caller]
    pub fn assert_reads(&self, name: impl AsRef<Path>, what: &str) {
        let name = name.as_ref();
        let wrong = self.misread(name, what);
        assert!(wrong.is_none(), "{} does not read {what}: {}", name.display(), wrong.unwrap_or_default());
    }

    /// Returns the path of the file that the VM writes, as the program prints it.
    #[track_caller]
    pub fn active(&self, volume: &str) -> String {
        self.active_of("web.json", volume)
    }

    #[track_caller]
    pub fn active_of(&self, catalogue: &str, volume: &str) -> String {
        self.ok(&["path", catalogue, volume]).trim_end().to_owned()
    }

    #[track_caller]
    pub fn list(&self) -> Value {
        serde_json::from_str(&self.ok(&["list", "web.json", "--all", "--json"])).expect("JSON")
    }

    /// Returns the state of the snapshot of this name, if there is one. The last one of the name
    /// counts.
    #[track_caller]
    pub fn state(&self, snapshot: &str) -> Option<String> {
        let list = self.list();
        let found = list["snapshots"].as_array()?.iter().rfind(|one| one["name"] == snapshot)?;
        found["state"].as_str().map(str::to_owned)
    }

    /// Fails unless all is as recorded and nothing is under way.
    #[track_caller]
    pub fn assert_sound(&self) {
        self.ok(&["verify", "web.json", "--deep"]);
        assert!(!self.exists("web.json.journal"), "a journal is left");
    }

    pub fn tree(&self) -> Tree {
        let mut tree = Tree::new();
        collect(self.dir(), &mut tree);
        tree
    }

    /// Returns what identifies a file, its attributes and its content.
    #[track_caller]
    pub fn node(&self, name: impl AsRef<Path>) -> Node {
        node(&self.path(name))
    }

    /// Starts a slow deletion of `s1` and interrupts it in the middle of the first merge.
    #[track_caller]
    pub fn interrupt_delete(&self, more: &[&str]) {
        self.interrupt(&[&["delete", "web.json", "s1"], &SLOW[..], more].concat(), Duration::from_millis(800));
        assert_eq!(self.state("s1").as_deref(), Some("merging"), "the deletion was not interrupted in its merge");
    }

    /// Starts a verb, sends SIGINT a while after its journal was made, and waits for its end.
    #[track_caller]
    pub fn interrupt(&self, args: &[&str], after: Duration) {
        let child = self.start(args);
        self.wait_for("web.json.journal");
        std::thread::sleep(after);
        signal(&child, Signal::SIGINT);
        let run = ended(child);
        assert_eq!(run.code, 130, "{args:?} was not interrupted: {}{}", run.stdout, run.stderr);
    }

    pub fn start(&self, args: &[&str]) -> Child {
        let mut command = self.command(args);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("the program starts")
    }

    /// Waits until a file exists.
    #[track_caller]
    pub fn wait_for(&self, name: &str) {
        let end = Instant::now() + Duration::from_secs(20);
        while !self.exists(name) {
            assert!(Instant::now() < end, "{name} was not made");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Kills a verb on entry to the `number`th of these system calls. Returns if it was killed.
    pub fn kill_at(&self, calls: &str, number: u32, args: &[&str]) -> bool {
        let mut command = Command::new("strace");
        command.args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("trace={calls}")]);
        command.args(["-e", &format!("inject={calls}:signal=KILL:when={number}")]);
        command.arg(env!("CARGO_BIN_EXE_qcow2-chain")).arg("vm").args(args).current_dir(self.dir());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let status = command.status().expect("strace starts");
        !status.success()
    }
}

/// Runs a command to its end.
pub fn finish(command: &mut Command) -> Run {
    let output = command.stdin(Stdio::null()).output().expect("the program starts");
    Run {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Waits for the end of a program whose output is in pipes.
pub fn ended(mut child: Child) -> Run {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    child.stdout.take().map(|mut pipe| pipe.read_to_end(&mut stdout));
    child.stderr.take().map(|mut pipe| pipe.read_to_end(&mut stderr));
    let status = child.wait().expect("the program ends");
    Run {
        code: status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&stdout).into_owned(),
        stderr: String::from_utf8_lossy(&stderr).into_owned(),
    }
}

pub fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(child.id()).expect("a pid")), signal).expect("the program runs");
}

/// Fails unless a verb exited with 1 for a reason other than its command line.
#[track_caller]
pub fn assert_refused(run: &Run, args: &[&str]) {
    assert_eq!(run.code, 1, "{args:?} was not refused: {}{}", run.stdout, run.stderr);
    assert_supported(run, args);
}

/// Fails where the program does not have the verb or option.
#[track_caller]
pub fn assert_supported(run: &Run, args: &[&str]) {
    assert!(!run.stderr.contains("Usage:"), "{args:?} is not supported: {}", run.stderr);
    assert!(!run.stderr.contains("panicked"), "{args:?}: {}", run.stderr);
}

#[track_caller]
pub fn assert_same(before: &Tree, after: &Tree, what: &str) {
    for (path, node) in before {
        assert_eq!(after.get(path), Some(node), "{what}: {}", path.display());
    }
    let new: Vec<_> = after.keys().filter(|path| !before.contains_key(*path)).collect();
    assert!(new.is_empty(), "{what}: new files {new:?}");
}

fn collect(directory: &Path, tree: &mut Tree) {
    for entry in fs::read_dir(directory).expect("a directory") {
        let path = entry.expect("an entry").path();
        if path.extension().is_some_and(|extension| extension == "lock") {
            continue;
        }
        if fs::symlink_metadata(&path).expect("an entry").is_dir() {
            collect(&path, tree);
        }
        tree.insert(path.clone(), node(&path));
    }
}

#[track_caller]
fn node(path: &Path) -> Node {
    let meta = fs::symlink_metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let content = meta.is_file().then(|| {
        let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        (meta.len(), crc32fast::hash(&bytes))
    });
    // The inode of a directory stays; its length and times are of no interest.
    Node {
        inode: meta.ino(),
        mode: meta.mode(),
        owner: (meta.uid(), meta.gid()),
        content,
        target: fs::read_link(path).ok(),
    }
}

/// Returns `true` if strace can trace here. Prints a message otherwise.
pub fn can_trace() -> bool {
    let run = Command::new("strace").args(["-qq", "-o", "/dev/null", "true"]).stderr(Stdio::null()).status();
    let traces = run.is_ok_and(|status| status.success());
    if !traces {
        say("SKIPPED: strace is missing or may not trace");
    }
    traces
}

/// Returns `true` for root. Prints a message otherwise.
pub fn is_root() -> bool {
    let root = fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0);
    if !root {
        say("SKIPPED: root is needed");
    }
    root
}

/// The system calls after which an operation may be at a new stage.
const STAGES: [&str; 3] = ["?rename,?renameat,?renameat2", "fsync,fdatasync", "?unlink,?unlinkat"];

/// Builds worlds and kills the verb at one system call after another, until a world is in the
/// wanted state. Returns `None` where nothing can be traced.
#[track_caller]
pub fn killed_when(build: impl Fn() -> Option<World>, args: &[&str], wanted: impl Fn(&World) -> bool) -> Option<World> {
    if !can_trace() {
        return None;
    }
    let found = killed_if(build, args, wanted);
    assert!(found.is_some(), "{args:?} was never killed in the wanted state");
    found
}

/// As [`killed_when`], for a state that may not occur.
pub fn killed_if(build: impl Fn() -> Option<World>, args: &[&str], wanted: impl Fn(&World) -> bool) -> Option<World> {
    for number in 1..=12 {
        for calls in STAGES {
            let world = build()?;
            if world.kill_at(calls, number, args) && wanted(&world) {
                return Some(world);
            }
        }
    }
    None
}

/// Returns the names of qcow2 files in a journal, without those of `known`.
pub fn planned(world: &World, known: &[&str]) -> Vec<String> {
    let Ok(bytes) = fs::read(world.path("web.json.journal")) else { return Vec::new() };
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let names = text.split('"').filter(|part| part.ends_with(".qcow2"));
    let mut names: Vec<String> = names.map(|name| name.rsplit('/').next().unwrap_or(name).to_owned()).collect();
    names.sort();
    names.dedup();
    names.retain(|name| !known.contains(&name.as_str()));
    names
}

/// A world in which the creation of `s1` was killed after its journal and before its catalogue. The
/// overlay exists if `overlay`. Returns its planned name, too.
#[track_caller]
pub fn interrupted_create(overlay: bool) -> Option<(World, String)> {
    let build = || {
        let world = World::new()?;
        world.image("vda.qcow2", "8M");
        world.write("vda.qcow2", OLD);
        world.ok(&["init", "web.json", "--volume", "vda=vda.qcow2"]);
        Some(world)
    };
    let name = |world: &World| planned(world, &["vda.qcow2"]).pop();
    let wanted = |world: &World| {
        let Some(name) = name(world) else { return false };
        let opens = world.misread(&name, "0 64k").is_none();
        world.state("s1").is_none() && if overlay { opens } else { !world.exists(&name) }
    };
    let world = killed_when(build, &["snapshot", "web.json", "s1"], wanted)?;
    let name = name(&world)?;
    Some((world, name))
}
