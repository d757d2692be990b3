//! `qemu-img` and `qemu-io` as judges. Only tests start them; the library never does.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::Value;

use super::say;

/// How many tests went without their judge.
static SKIPPED: AtomicUsize = AtomicUsize::new(0);

/// The tools, known to be there.
#[derive(Clone, Copy, Debug)]
pub struct Qemu(());

/// What a tool answered.
#[derive(Clone, Debug)]
pub struct Run {
    /// The exit code; -1 where a signal ended it.
    pub code: i32,
    /// What it printed.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
}

/// One element of `qemu-img map --output=json`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapEntry {
    pub start: u64,
    pub length: u64,
    pub depth: u64,
    pub present: bool,
    pub zero: bool,
    pub data: bool,
    pub compressed: bool,
    pub offset: Option<u64>,
}

/// The numbers of `qemu-img check --output=json`, 0 where it prints none, and its exit code.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Check {
    pub code: i32,
    pub corruptions: u64,
    pub leaks: u64,
    pub check_errors: u64,
    pub corruptions_fixed: u64,
    pub leaks_fixed: u64,
    pub allocated_clusters: u64,
    pub total_clusters: u64,
    pub fragmented_clusters: u64,
    pub compressed_clusters: u64,
    pub image_end_offset: u64,
}

impl Qemu {
    /// The tools, or `None` with a loud word where they are missing: then the test has nothing to compare with and
    /// returns. With `QCOW2_CHAIN_REQUIRE_QEMU=1`, as in CI, missing tools fail the test.
    pub fn find() -> Option<Self> {
        static FOUND: OnceLock<bool> = OnceLock::new();
        let found = *FOUND.get_or_init(|| ["qemu-img", "qemu-io"].into_iter().all(answers));
        if found {
            return Some(Self(()));
        }
        let required = std::env::var("QCOW2_CHAIN_REQUIRE_QEMU").is_ok_and(|value| value == "1");
        assert!(!required, "QCOW2_CHAIN_REQUIRE_QEMU=1, and qemu-img or qemu-io is missing");
        let so_far = SKIPPED.fetch_add(1, Ordering::Relaxed) + 1;
        say(&format!("SKIPPED ({so_far} so far): qemu tools missing"));
        None
    }

    /// Runs `qemu-img` with these arguments, whatever it answers.
    pub fn try_img<S: AsRef<std::ffi::OsStr>>(self, args: &[S]) -> Run {
        run(Command::new("qemu-img").args(args))
    }

    /// Runs `qemu-img` with these arguments and returns what it printed. Anything but success fails the test.
    pub fn img<S: AsRef<std::ffi::OsStr>>(self, args: &[S]) -> String {
        self.try_img(args).success("qemu-img", &render(args))
    }

    /// Runs these `qemu-io` commands on an image in one process, whatever it answers. Discards reach the image, and
    /// nothing waits for the disk: the tests' images are thrown away.
    pub fn try_io<S: AsRef<str>>(self, image: &Path, format: &str, commands: &[S]) -> Run {
        let mut command = Command::new("qemu-io");
        command.args(["-d", "unmap", "-t", "unsafe", "-f", format]);
        for each in commands {
            command.args(["-c", each.as_ref()]);
        }
        run(command.arg(image))
    }

    /// Runs these `qemu-io` commands on a qcow2 image in one process. Anything but success fails the test.
    pub fn io<S: AsRef<str>>(self, image: &Path, commands: &[S]) -> String {
        let text: Vec<&str> = commands.iter().map(AsRef::as_ref).collect();
        self.try_io(image, "qcow2", commands).success("qemu-io", &text.join("; "))
    }

    /// `qemu-img map --output=json` of an image and its backing files.
    pub fn map(self, image: &Path) -> Vec<MapEntry> {
        let text =
            self.img(&["map".as_ref(), "--output=json".as_ref(), "-f".as_ref(), "qcow2".as_ref(), image.as_os_str()]);
        let json: Value = serde_json::from_str(&text).expect("map prints JSON");
        json.as_array().expect("map prints an array").iter().map(MapEntry::from_json).collect()
    }

    /// `qemu-img info --output=json`.
    pub fn info(self, image: &Path) -> Value {
        let text = self.img(&["info".as_ref(), "--output=json".as_ref(), image.as_os_str()]);
        serde_json::from_str(&text).expect("info prints JSON")
    }

    /// `qemu-img check --output=json`, with `-r` where `repair` says what (`leaks` or `all`).
    pub fn check(self, image: &Path, repair: Option<&str>) -> Check {
        let mut args = vec!["check", "--output=json", "-f", "qcow2"];
        args.extend(repair.into_iter().flat_map(|what| ["-r", what]));
        let run = run(Command::new("qemu-img").args(args).arg(image));
        let json: Value = serde_json::from_str(&run.stdout).unwrap_or(Value::Null);
        let number = |name: &str| json[name].as_u64().unwrap_or(0);
        Check {
            code: run.code,
            corruptions: number("corruptions"),
            leaks: number("leaks"),
            check_errors: number("check-errors"),
            corruptions_fixed: number("corruptions-fixed"),
            leaks_fixed: number("leaks-fixed"),
            allocated_clusters: number("allocated-clusters"),
            total_clusters: number("total-clusters"),
            fragmented_clusters: number("fragmented-clusters"),
            compressed_clusters: number("compressed-clusters"),
            image_end_offset: number("image-end-offset"),
        }
    }

    /// Fails the test unless `qemu-img check` finds nothing at all, not even a leak.
    pub fn assert_clean(self, image: &Path) {
        let run = self.try_img(&["check".as_ref(), "-f".as_ref(), "qcow2".as_ref(), image.as_os_str()]);
        assert_eq!(run.code, 0, "qemu-img check {}:\n{}{}", image.display(), run.stdout, run.stderr);
    }

    /// Fails the test unless `qemu-img compare` finds the guest of `image` and the raw bytes `model` the same, sizes
    /// included. (`compare -s` is no help: it also wants the same holes.)
    pub fn assert_content(self, image: &Path, model: &[u8]) {
        let raw = image.with_extension("model");
        std::fs::write(&raw, model).expect("the model is written");
        let args = ["compare", "-f", "qcow2", "-F", "raw"].map(std::ffi::OsStr::new);
        let run = self.try_img(&[&args[..], &[image.as_os_str(), raw.as_os_str()]].concat());
        assert_eq!(run.code, 0, "qemu-img compare {} with the model:\n{}{}", image.display(), run.stdout, run.stderr);
        assert_eq!(self.info(image)["virtual-size"].as_u64(), Some(model.len() as u64), "virtual size");
        std::fs::remove_file(raw).expect("the model is removed");
    }

    /// The guest's bytes as `qemu-img` reads them; `snapshot` names an internal snapshot to read instead, in the size that
    /// the disk had then.
    pub fn content(self, image: &Path, snapshot: Option<&str>) -> Vec<u8> {
        let Some(snapshot) = snapshot else { return self.convert(image, None) };
        // `convert -l` gives a snapshot the disk's present size, so it is applied to a copy. Under bitmaps QEMU refuses to.
        let copy = image.with_extension("applied");
        std::fs::copy(image, &copy).expect("the image is copied");
        for bitmap in self.info(&copy)["format-specific"]["data"]["bitmaps"].as_array().into_iter().flatten() {
            let name = bitmap["name"].as_str().expect("a bitmap has a name");
            self.img(&["bitmap".as_ref(), "--remove".as_ref(), copy.as_os_str(), name.as_ref()]);
        }
        let run = self.try_img(&["snapshot".as_ref(), "-a".as_ref(), snapshot.as_ref(), copy.as_os_str()]);
        // Applying raises refcounts first, which narrow ones may not hold.
        let bytes = if run.code == 0 { self.convert(&copy, None) } else { self.convert(image, Some(snapshot)) };
        std::fs::remove_file(copy).expect("the copy is removed");
        bytes
    }

    /// `qemu-img convert` to a raw file.
    fn convert(self, image: &Path, snapshot: Option<&str>) -> Vec<u8> {
        let raw = image.with_extension("content");
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-t", "unsafe", "-f", "qcow2", "-O", "raw"]);
        command.args(snapshot.into_iter().flat_map(|name| ["-l", name])).arg(image).arg(&raw);
        run(&mut command).success("qemu-img convert", &image.to_string_lossy());
        let bytes = std::fs::read(&raw).expect("what qemu-img wrote is read");
        std::fs::remove_file(raw).expect("what qemu-img wrote is removed");
        bytes
    }
}

impl Run {
    /// What was printed; anything but exit code 0 fails the test.
    fn success(self, tool: &str, what: &str) -> String {
        assert_eq!(self.code, 0, "{tool} {what}:\n{}{}", self.stdout, self.stderr);
        self.stdout
    }
}

impl MapEntry {
    fn from_json(entry: &Value) -> Self {
        let number = |name: &str| entry[name].as_u64();
        let flag = |name: &str| entry[name].as_bool().unwrap_or_else(|| panic!("map entry without {name}: {entry}"));
        Self {
            start: number("start").expect("map entry has a start"),
            length: number("length").expect("map entry has a length"),
            depth: number("depth").expect("map entry has a depth"),
            present: flag("present"),
            zero: flag("zero"),
            data: flag("data"),
            compressed: flag("compressed"),
            offset: number("offset"),
        }
    }
}

/// Whether a tool is there and runs.
fn answers(tool: &str) -> bool {
    let status = Command::new(tool).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

fn run(command: &mut Command) -> Run {
    let output = command.stdin(Stdio::null()).output().expect("the tool starts");
    Run {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

fn render<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> String {
    let args: Vec<_> = args.iter().map(|arg| arg.as_ref().to_string_lossy()).collect();
    args.join(" ")
}
