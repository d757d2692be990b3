//! The program's `vm` verbs: output, refusals, exit codes, and the files that they leave.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};

use crate::support::holder::Holder;
use crate::support::qemu::Qemu;
use crate::support::ram;

fn command(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qcow2-chain"));
    command.arg("vm").args(args).current_dir(dir).env("TZ", "UTC").stdin(Stdio::null());
    command
}

fn vm(dir: &Path, args: &[&str]) -> Output {
    command(dir, args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs a verb that must succeed, and returns its output.
fn ok(dir: &Path, args: &[&str]) -> String {
    let run = vm(dir, args);
    assert!(run.status.success(), "{args:?}: {}", text(&run.stderr));
    text(&run.stdout)
}

fn as_json(dir: &Path, args: &[&str]) -> Value {
    serde_json::from_str(&ok(dir, args)).unwrap_or_else(|error| panic!("{args:?}: {error}"))
}

/// Runs a verb that must fail with this code, and returns its messages.
fn refused(dir: &Path, args: &[&str], code: i32) -> String {
    let run = vm(dir, args);
    assert_eq!(run.status.code(), Some(code), "{args:?}: {}{}", text(&run.stdout), text(&run.stderr));
    text(&run.stderr)
}

/// Creates a VM with a qcow2 volume over a base, and a raw volume.
fn web(qemu: Qemu) -> tempfile::TempDir {
    let dir = ram::dir();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    qemu.img(&["create", "-q", "-f", "qcow2", &path("base.qcow2"), "8M"]);
    qemu.img(&["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", &path("vda.qcow2")]);
    std::fs::write(dir.path().join("vdb.raw"), vec![7; 1 << 20]).unwrap();
    ok(dir.path(), &["init", "web.json", "--volume", "vda=vda.qcow2", "--volume", "vdb=vdb.raw,format=raw"]);
    dir
}

fn write(qemu: Qemu, dir: &Path, command: &str) {
    for volume in ["vda", "vdb"] {
        let path = ok(dir, &["path", "web.json", volume]);
        let path = path.trim_end();
        let format = if path.ends_with("raw") { "raw" } else { "qcow2" };
        assert_eq!(qemu.try_io(&dir.join(path), format, &[command]).code, 0, "{path}");
    }
}

/// Creates the VM of the advanced deletion, up to its hidden snapshot.
fn tree(qemu: Qemu) -> tempfile::TempDir {
    let dir = web(qemu);
    let steps = [
        &["snapshot", "web.json", "s1", "--description", "before the\nupgrade"][..],
        &["snapshot", "web.json", "s2"],
        &["snapshot", "web.json", "s3"],
        &["revert", "web.json", "s2"],
        &["snapshot", "web.json", "s4"],
        &["delete", "web.json", "s2"],
    ];
    for step in steps {
        write(qemu, dir.path(), "write -q -P 3 64k 128k");
        ok(dir.path(), step);
    }
    dir
}

/// Returns the recorded file names of a snapshot, hidden ones included.
fn recorded(dir: &Path, snapshot: &str) -> [String; 2] {
    let catalogue: Value = serde_json::from_slice(&std::fs::read(dir.join("web.json")).unwrap()).unwrap();
    let snapshots = catalogue["model"]["snapshots"].as_array().unwrap();
    let found = snapshots.iter().find(|known| known["name"] == snapshot).unwrap();
    ["vda", "vdb"].map(|volume| found["files"][volume]["path"].as_str().unwrap().to_owned())
}

/// Returns the file name of a volume's active file.
fn active(dir: &Path, volume: &str) -> String {
    let path = ok(dir, &["path", "web.json", volume]);
    Path::new(path.trim_end()).file_name().unwrap().to_str().unwrap().to_owned()
}

/// Removes the random parts of overlay names: a hyphen and 16 hexadecimal digits before `.qcow2`.
fn without_tokens(text: &str) -> String {
    let mut parts = text.split(".qcow2").map(|part| match part.len().checked_sub(17) {
        Some(at) if part.is_char_boundary(at) && part[at..].starts_with('-') => &part[..at],
        _ => part,
    });
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| text + ".qcow2" + part)
}

/// Returns all files of a directory with their content.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let file = |entry: std::io::Result<std::fs::DirEntry>| {
        let entry = entry.unwrap();
        (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())
    };
    std::fs::read_dir(dir).unwrap().map(file).collect()
}

#[test]
fn list_json_has_exactly_these_members() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = tree(qemu);
    let snapshot = |name: &str, state: &str, parent: Option<&str>, current: bool| {
        let [vda, vdb] = recorded(dir.path(), name);
        let files = json!({"vda": vda, "vdb": vdb});
        json!({"name": name, "state": state, "parent": parent, "current": current, "files": files})
    };
    let s1 = snapshot("s1", "ready", None, false);
    let s2 = snapshot("s2", "hidden", Some("s1"), false);
    let on_s2 = |parent| [snapshot("s3", "ready", Some(parent), false), snapshot("s4", "ready", Some(parent), true)];
    let [vda, vdb] = ["vda", "vdb"].map(|volume| active(dir.path(), volume));
    let volumes = json!([
        {"name": "vda", "active": vda, "virtual-size": 8 << 20},
        {"name": "vdb", "active": vdb, "virtual-size": 1 << 20},
    ]);
    let [s3, s4] = on_s2("s1");
    let listed = json!({"vm": "web", "current": "s4", "volumes": volumes, "snapshots": [s1, s3, s4]});
    assert_eq!(as_json(dir.path(), &["list", "web.json", "--json"]), listed);
    let [s3, s4] = on_s2("s2");
    let listed = json!({"vm": "web", "current": "s4", "volumes": volumes, "snapshots": [s1, s2, s3, s4]});
    assert_eq!(as_json(dir.path(), &["list", "web.json", "--all", "--json"]), listed);
    let shown = ok(dir.path(), &["list", "web.json"]);
    assert!(shown.contains("before the upgrade") && !shown.contains("s2"), "{shown}");
    assert!(ok(dir.path(), &["list", "web.json", "--all"]).contains("s2        hidden  s1"));
}

#[test]
fn tree_draws_branches_and_files() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = tree(qemu);
    let drawn = ok(dir.path(), &["tree", "web.json"]);
    // Dates differ, and so do sizes on disk, at the ends of lines, and the random parts of names.
    let line = |line: &str| match line.find("  20") {
        Some(date) => line[..date].to_owned() + line.get(date + 21..).unwrap_or_default(),
        None => line.to_owned(),
    };
    let stable: Vec<String> = drawn.lines().map(line).map(|line| without_tokens(&line)).collect();
    let expected = "\
web: 2 volumes, 3 snapshots, 1 hidden

◇ bases
│   vda  base.qcow2
│
○ s1  before the upgrade
│   vda  vda.qcow2  8 MiB
│   vdb  vdb.raw    1 MiB
│
◌ s2  deleted, kept for s3 and s4
│   vda  web-vda.1.qcow2  8 MiB
│   vdb  web-vdb.2.qcow2  1 MiB
│
├─○ s3
│     vda  web-vda.3.qcow2  8 MiB
│     vdb  web-vdb.4.qcow2  1 MiB
│
● s4  current
│   vda  web-vda.7.qcow2  8 MiB
│   vdb  web-vdb.8.qcow2  1 MiB
│
▶ the VM writes
    vda  web-vda.9.qcow2   8 MiB
    vdb  web-vdb.10.qcow2  1 MiB";
    let expected: Vec<&str> = expected.lines().collect();
    for (found, expected) in stable.iter().zip(&expected) {
        assert!(found.starts_with(expected), "{found:?} for {expected:?} in\n{drawn}");
    }
    assert_eq!(stable.len(), expected.len(), "{drawn}");
}

#[test]
fn dry_run_changes_nothing_report_lists_changes() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = tree(qemu);
    let before = files(dir.path());
    let plan = without_tokens(&ok(dir.path(), &["delete", "web.json", "s3", "--dry-run"]));
    for line in ["remove web-vda.3.qcow2", "into web-vda.1.qcow2", "relink web-vdb.10.qcow2 to web-vdb.2.qcow2"] {
        assert!(plan.contains(line), "{plan}");
    }
    let plan = as_json(dir.path(), &["delete", "web.json", "s3", "--dry-run", "--direction", "pull", "--json"]);
    assert_eq!(plan["costs"]["vda"]["direction"], "pull");
    assert!(files(dir.path()) == before, "a plan changed something");

    let report = as_json(dir.path(), &["delete", "web.json", "s3", "--direction", "commit", "--json"]);
    assert_eq!(report["purpose"], json!({"delete": {"id": 3, "name": "s3"}}));
    assert_eq!(report["merged"]["vdb"]["direction"], "commit");
    let size = as_json(dir.path(), &["resize", "web.json", "vda", "+1M", "--json"]);
    assert_eq!(size["resized"], json!([{"volume": "vda", "old": 8 << 20, "new": 9 << 20}]));
    let back = as_json(dir.path(), &["revert", "web.json", "s4", "--json"]);
    assert_eq!(back["resized"], json!([{"volume": "vda", "old": 9 << 20, "new": 8 << 20}]));
    assert_eq!(as_json(dir.path(), &["recover", "web.json", "--json"])["state"], "clean");
    assert_eq!(ok(dir.path(), &["recover", "web.json", "--dry-run"]), "No operation was interrupted.\n");
    let path = ok(dir.path(), &["path", "web.json", "vda", "--snapshot", "s1"]);
    assert_eq!(path, "vda.qcow2\n");
}

#[test]
fn init_guesses_no_format_and_names_remedy() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = web(qemu);
    let error = refused(dir.path(), &["init", "other.json", "--volume", "vdb=vdb.raw"], 1);
    assert!(error.contains("format=raw"), "{error}");
    let error = refused(dir.path(), &["init", "web.json", "--volume", "vda=vda.qcow2"], 1);
    assert!(error.contains("a catalogue exists already"), "{error}");
    for wrong in ["vda", "vda=vda.qcow2,size=3", "vda=vda.qcow2,cluster_size=3", "v/a=vda.qcow2", "vda=none.qcow2"] {
        refused(dir.path(), &["init", "other.json", "--volume", wrong], 1);
    }
    let error = refused(dir.path(), &["init", "other.json", "--volume", "vda=vda.qcow2", "--probe"], 1);
    assert!(error.contains("--probe is not supported"), "{error}");
    assert!(!dir.path().join("other.json").exists());
    // An existing chain becomes snapshots, also from another working directory.
    ok(dir.path(), &["snapshot", "web.json", "s1"]);
    let elsewhere = ram::dir();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let overlay = active(dir.path(), "vda");
    let volume = format!("vda={}", at(&overlay));
    ok(elsewhere.path(), &["init", &at("adopted.json"), "--volume", &volume, "--snapshot", "old"]);
    let listed = as_json(elsewhere.path(), &["list", &at("adopted.json"), "--json"]);
    assert_eq!(listed["snapshots"][0]["files"]["vda"], json!(at("vda.qcow2")));
    let recorded = std::fs::read_to_string(dir.path().join("adopted.json")).unwrap();
    assert!(recorded.contains(&format!("\"{overlay}\"")), "relative paths beneath the catalogue: {recorded}");
}

#[test]
fn resize_accepts_sizes_of_qemu_img() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = web(qemu);
    let size = |dir: &Path| as_json(dir, &["list", "web.json", "--json"])["volumes"][0]["virtual-size"].clone();
    for (args, expected) in [(&["12M"][..], 12 << 20), (&["+512k"], 25 << 19), (&["-512k", "--shrink"], 12 << 20)] {
        ok(dir.path(), &[&["resize", "web.json", "vda"][..], args].concat());
        assert_eq!(size(dir.path()), json!(expected), "{args:?}");
    }
    let error = refused(dir.path(), &["resize", "web.json", "vda", "-1M"], 1);
    assert!(error.contains("--shrink"), "{error}");
    refused(dir.path(), &["resize", "web.json", "vda", "1X"], 1);
    let error = refused(dir.path(), &["resize", "web.json", "vdx", "1M"], 1);
    assert!(error.contains("no volume is named vdx") && error.contains("vm list"), "{error}");
    assert_eq!(size(dir.path()), json!(12 << 20));
}

#[test]
fn operations_on_open_active_file_are_refused() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = tree(qemu);
    let active = ok(dir.path(), &["path", "web.json", "vda"]);
    let before = files(dir.path());
    let held = Holder::open(&dir.path().join(active.trim_end()), &[]);
    for args in [
        &["snapshot", "web.json", "s9"][..],
        &["revert", "web.json", "s1"],
        &["delete", "web.json", "s4"],
        &["delete", "web.json", "s3"],
        &["resize", "web.json", "vda", "1G"],
    ] {
        let error = refused(dir.path(), args, 1);
        assert!(error.contains("is in use") && error.contains("Stop the VM"), "{args:?}: {error}");
        assert!(files(dir.path()) == before, "{args:?}: something changed");
        assert_eq!(
            ok(dir.path(), &["recover", "web.json", "--dry-run"]),
            "No operation was interrupted.\n",
            "{args:?}"
        );
    }
    drop(held);
    ok(dir.path(), &["delete", "web.json", "s3"]);
}

#[test]
fn interrupted_deletion_is_resumed() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = web(qemu);
    ok(dir.path(), &["snapshot", "web.json", "s1"]);
    write(qemu, dir.path(), "write -q -P 9 0 1M");
    let slowly = ["delete", "web.json", "s1", "-p", "--rate-limit", "100k", "--direction", "commit"];
    let mut child = command(dir.path(), &slowly).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // The first line of progress follows the installation of the signal handlers.
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 20]).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(300));
    kill(nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGINT).unwrap();
    let ended = child.wait_with_output().unwrap();
    let said = text(&ended.stderr);
    assert_eq!(ended.status.code(), Some(130), "{said}");
    assert!(said.contains("cancelled") && said.contains("Run the same command again"), "{said}");
    let error = refused(dir.path(), &["snapshot", "web.json", "s2"], 1);
    assert!(error.contains("delete snapshot s1") && error.contains("vm recover"), "{error}");
    let listed = as_json(dir.path(), &["list", "web.json", "--json"]);
    assert_eq!(listed["snapshots"][0]["state"], "merging");
    assert!(ok(dir.path(), &["tree", "web.json"]).contains("◐ s1"));
    assert_eq!(ok(dir.path(), &["recover", "web.json", "--dry-run"]), "Would be completed: delete snapshot s1.\n");
    ok(dir.path(), &["delete", "web.json", "s1"]);
    assert_eq!(active(dir.path(), "vda"), "vda.qcow2");
    let mut expected = vec![9; 1 << 20];
    assert!(std::fs::read(dir.path().join("vdb.raw")).unwrap() == expected);
    expected.resize(8 << 20, 0);
    qemu.assert_content(&dir.path().join("vda.qcow2"), &expected);
    qemu.assert_clean(&dir.path().join("vda.qcow2"));
}

#[test]
fn verify_reports_leaks_missing_files_and_orphans() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = tree(qemu);
    assert_eq!(ok(dir.path(), &["verify", "web.json", "--deep"]), "10 images, all as recorded.\n");
    let digests = as_json(dir.path(), &["verify", "web.json", "--digests", "--json"]);
    assert_eq!(digests["digests"].as_array().unwrap().len(), 8, "three snapshots and the present, two volumes");
    // A cluster at the end of a file that no table refers to.
    let [vda, vdb] = recorded(dir.path(), "s3");
    let leaky = dir.path().join(&vda);
    let sound = std::fs::read(&leaky).unwrap();
    let bytes = leaked(sound.clone());
    std::fs::write(&leaky, bytes).unwrap();
    ok(dir.path(), &["verify", "web.json"]);
    let run = vm(dir.path(), &["verify", "web.json", "--deep"]);
    assert_eq!(run.status.code(), Some(3), "{}", text(&run.stdout));
    assert!(
        text(&run.stdout).contains(&format!("{vda}: 1 clusters are allocated and unused")),
        "{}",
        text(&run.stdout)
    );
    std::fs::write(&leaky, sound).unwrap();

    std::fs::write(dir.path().join("web-vdb.99-5eed.qcow2"), b"").unwrap();
    std::fs::rename(dir.path().join(&vdb), dir.path().join("elsewhere")).unwrap();
    let run = vm(dir.path(), &["verify", "web.json", "--json"]);
    assert_eq!(run.status.code(), Some(2));
    let told: Value = serde_json::from_slice(&run.stdout).unwrap();
    let problems: Vec<_> = told["problems"].as_array().unwrap().iter().map(|p| (&p["kind"], &p["file"])).collect();
    let expected = [(&json!("missing"), &json!(vdb)), (&json!("orphan"), &json!("web-vdb.99-5eed.qcow2"))];
    assert_eq!(problems, expected);
}

/// Adds a cluster with a refcount of 1 to an image. Refcounts have 16 bits, and the first block is at entry 0 of the table.
fn leaked(mut image: Vec<u8>) -> Vec<u8> {
    let be64 =
        |image: &[u8], at: usize| usize::try_from(u64::from_be_bytes(image[at..at + 8].try_into().unwrap())).unwrap();
    let block = be64(&image, be64(&image, 48));
    let cluster = image.len().div_ceil(65536);
    image.resize((cluster + 1) * 65536, 0);
    image[block + 2 * cluster + 1] = 1;
    image
}

#[test]
fn changed_lists_ranges_between_snapshots() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = web(qemu);
    ok(dir.path(), &["snapshot", "web.json", "s1"]);
    write(qemu, dir.path(), "write -q -P 3 64k 128k");
    ok(dir.path(), &["snapshot", "web.json", "s2"]);
    write(qemu, dir.path(), "write -q -z 512k 64k");
    let changed = |from, to, volume| ok(dir.path(), &["changed", "web.json", from, to, volume]);
    assert_eq!(changed("s1", "s2", "vda"), "65536 131072\n");
    assert_eq!(changed("s2", "-", "vdb"), "524288 65536 zero\n");
    assert_eq!(changed("s2", "s2", "vdb"), "");
    assert_eq!(changed("-", "s1", "vda"), "", "nothing was written before");
    let told = as_json(dir.path(), &["changed", "web.json", "s1", "-", "vda", "--json"]);
    // Zeroes over unallocated clusters are no change.
    let ranges = json!([{"offset": 65536, "len": 131_072, "zero": false}]);
    let expected = json!({"volume": "vda", "from": "s1", "to": null, "virtual-size": 8 << 20, "ranges": ranges});
    assert_eq!(told, expected);
    let error = refused(dir.path(), &["changed", "web.json", "s1", "s9", "vda"], 1);
    assert!(error.contains("no snapshot is named s9"), "{error}");
}
