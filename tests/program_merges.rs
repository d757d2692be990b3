//! The program's verbs at work: what they say of what they did, how they answer signals, what they leave when they are
//! stopped.

#![cfg(unix)]

use std::io::Read as _;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use serde_json::Value;

use crate::support::layers;
use crate::support::qemu::Qemu;
use crate::support::say;
use crate::support::stack::content;

const NAMES: [&str; 4] = ["base", "middle", "top", "other"];
const MIB: u64 = 1 << 20;

/// Three layers of 16 MiB with some MiB of data in each, and another base.
fn chain(qemu: Qemu) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let create = |name: &str, backing: Option<&str>, commands: &[&str]| {
        let path = dir.path().join(name);
        let file = path.to_string_lossy().into_owned();
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        args.extend(backing.into_iter().flat_map(|backing| ["-b", backing, "-F", "qcow2"]));
        qemu.img(&[&args[..], &[&file, "16M"]].concat());
        qemu.io(&path, commands);
    };
    create("base", None, &["write -P 1 0 6M", "write -P 2 8M 2M"]);
    create("middle", Some("base"), &["write -P 3 1M 4M", "write -z 8M 1M"]);
    create("top", Some("middle"), &["write -P 4 2M 4M", "write -P 5 12M 1M"]);
    create("other", None, &["write -P 1 0 5M", "write -P 2 8M 3M"]);
    dir
}

fn start(dir: &Path, args: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qcow2-chain"));
    command.args(args).current_dir(dir).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

fn run(dir: &Path, args: &[&str]) -> Output {
    start(dir, args).wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn json(dir: &Path, args: &[&str]) -> Value {
    let run = run(dir, args);
    assert!(run.status.success(), "{args:?}: {}", text(&run.stderr));
    serde_json::from_slice(&run.stdout).unwrap_or_else(|error| panic!("{args:?}: {error}: {}", text(&run.stdout)))
}

/// What the guest reads.
fn disk(dir: &Path) -> Vec<u8> {
    content(&layers::open(&dir.join("top"), "qcow2", 0)).unwrap()
}

fn signal(child: &Child, signal: Signal) {
    kill(nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
}

/// Waits until a verb that was started with `-p` tells that something has moved.
fn wait_for_the_middle(child: &mut Child) {
    let out = child.stdout.as_mut().unwrap();
    let mut line = String::new();
    loop {
        let mut byte = [0];
        assert_eq!(out.read(&mut byte).unwrap(), 1, "ended early: {line}");
        line.push(char::from(byte[0]));
        if byte[0] == b'\r' {
            if !line.contains("(0.00/") {
                return;
            }
            line.clear();
        }
    }
}

#[test]
fn what_a_merge_did_is_told_as_json() {
    let Some(qemu) = Qemu::find() else { return };
    for (args, operation, moved, zeroed) in [
        (&["commit", "--json", "top"][..], "commit", 5, 0),
        (&["commit", "--json", "-q", "-b", "base", "top"], "commit", 6, 1),
        (&["commit", "--output=json", "--direction", "pull", "top"], "pull", 1, 1),
        (&["pull", "--json", "top"], "pull", 3, 1),
        (&["pull", "--output", "json", "-b", "base", "top"], "pull", 1, 1),
        (&["rebase", "--json", "-b", "base", "-F", "qcow2", "top"], "rebase", 1, 1),
        (&["rebase", "--json", "-b", "", "top"], "rebase", 3, 0),
    ] {
        let dir = chain(qemu);
        let before = disk(dir.path());
        let report = json(dir.path(), args);
        let number = |key: &str| report[key].as_u64().unwrap_or_else(|| panic!("{args:?}: {key} in {report}"));
        assert_eq!(report["operation"], operation, "{args:?}");
        assert_eq!(number("copied") + number("copied-in-kernel"), moved * MIB, "{args:?}: {report}");
        assert_eq!(number("zeroed"), zeroed * MIB, "{args:?}: {report}");
        assert_eq!((number("compressed"), number("dropped")), (0, 0), "{report}");
        assert_eq!(report["bitmaps-invalidated"], Value::Array(Vec::new()));
        assert!(disk(dir.path()) == before, "{args:?}: another disk");
    }
}

#[test]
fn a_rebase_is_planned_and_limited_as_other_merges_are() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = chain(qemu);
    let before = std::fs::read(dir.path().join("top")).unwrap();
    let plan = json(dir.path(), &["rebase", "--dry-run", "--json", "-b", "other", "-F", "qcow2", "top"]);
    // 0 to 2 MiB and nothing from 6 on of the old side is data; of the new one 0 to 5 MiB, and 8 to 11.
    assert_eq!(plan["receiver"], "top", "{plan}");
    let megabytes = |key: &str| plan[key].as_u64().unwrap_or_else(|| panic!("{key} in {plan}")) / MIB;
    assert_eq!(["data", "zeroes", "compared"].map(megabytes), [0, 2, 3], "{plan}");
    let human = run(dir.path(), &["rebase", "--dry-run", "-b", "", "top"]);
    assert!(text(&human.stdout).starts_with("rebase of top\n"), "{}", text(&human.stdout));
    assert!(text(&human.stdout).contains("moves      3 MiB of data"), "{}", text(&human.stdout));
    let refused = run(dir.path(), &["rebase", "-u", "--dry-run", "-b", "other", "-F", "qcow2", "top"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains("is not supported, use "), "{}", text(&refused.stderr));
    assert!(std::fs::read(dir.path().join("top")).unwrap() == before, "a plan wrote something");

    let begun = std::time::Instant::now();
    let limited = run(dir.path(), &["rebase", "--rate-limit", "6M", "-b", "", "top"]);
    assert!(limited.status.success(), "{}", text(&limited.stderr));
    assert!(begun.elapsed() >= Duration::from_millis(300), "{:?}", begun.elapsed());
    for verb in ["commit", "pull", "rebase"] {
        let wrong = run(dir.path(), &[verb, "--rate-limit", "much", "-b", "", "top"]);
        assert_eq!(wrong.status.code(), Some(1), "{verb}");
    }
}

/// Interrupted in the middle, every verb says what it leaves, and that is so.
#[test]
fn ctrl_c_says_what_state_the_chain_is_in() {
    let Some(qemu) = Qemu::find() else { return };
    for (args, says) in [
        (&["commit"][..], "top reads as before; middle may hold a part"),
        (&["commit", "-b", "base"], "top reads as before; base may hold a part"),
        (&["pull"], "top reads as before and still stands on its old backing file"),
        (&["pull", "-b", "base"], "top reads as before and still stands on its old backing file"),
        (&["rebase", "-b", ""], "top reads as before and still stands on its old backing file"),
    ] {
        let dir = chain(qemu);
        let before = disk(dir.path());
        let backing = qemu.info(&dir.path().join("top"))["backing-filename"].clone();
        let line = [args, &["-p", "--rate-limit", "1M", "top"]].concat();
        let mut child = start(dir.path(), &line);
        wait_for_the_middle(&mut child);
        signal(&child, Signal::SIGINT);
        let ended = child.wait_with_output().unwrap();
        let said = text(&ended.stderr);
        assert_eq!(ended.status.code(), Some(130), "{line:?}: {said}");
        assert!(said.contains(&format!("cancelled: {says}")) && said.contains("The same command again"), "{said}");
        assert!(disk(dir.path()) == before, "{line:?}: another disk");
        assert_eq!(qemu.info(&dir.path().join("top"))["backing-filename"], backing, "{line:?}");
        let again = run(dir.path(), &[args, &["top"]].concat());
        assert!(again.status.success(), "{line:?}: {}", text(&again.stderr));
        assert!(disk(dir.path()) == before, "{line:?}: another disk");
        for name in NAMES {
            qemu.assert_clean(&dir.path().join(name));
        }
    }
}

/// A conversion that is interrupted leaves no image, and says so.
#[test]
fn ctrl_c_says_what_a_conversion_leaves() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = chain(qemu);
    for (args, says) in [
        (&["-c", "-O", "qcow2"][..], "copy is no image yet"),
        (&["-B", "other", "-F", "qcow2", "-O", "qcow2"], "copy reads as the source, and still stands on it"),
    ] {
        // It may be done before the signal comes.
        let stopped = (0..20).find_map(|_| {
            let mut child = start(dir.path(), &[&["convert", "-p", "-m", "1"], args, &["top", "copy"]].concat());
            wait_for_the_middle(&mut child);
            signal(&child, Signal::SIGINT);
            let ended = child.wait_with_output().unwrap();
            (ended.status.code() == Some(130)).then_some(ended)
        });
        let Some(stopped) = stopped else {
            say(&format!("SKIPPED: {args:?} was never interrupted"));
            continue;
        };
        assert!(text(&stopped.stderr).contains(&format!("cancelled: {says}")), "{}", text(&stopped.stderr));
        let check =
            qemu.try_img(&["check".as_ref(), "-f".as_ref(), "qcow2".as_ref(), dir.path().join("copy").as_os_str()]);
        if args[0] == "-c" {
            assert_ne!(check.code, 0, "half an image passes for one");
        } else {
            assert!(qemu.content(&dir.path().join("copy"), None) == disk(dir.path()), "another disk");
        }
    }
}

/// `-p` draws from nothing to all; a verb that says a line at its end says it behind that.
#[test]
fn progress_is_drawn_from_nothing_to_all() {
    let Some(qemu) = Qemu::find() else { return };
    for (args, last) in [
        (&["commit", "-p", "-t", "none", "-f", "qcow2", "top"][..], "\nImage committed.\n"),
        (&["commit", "-p", "-t", "unsafe", "-d", "-b", "base", "top"], "\nImage committed.\n"),
        (&["pull", "-p", "top"], "\nImage pulled.\n"),
        (&["rebase", "-p", "-t", "none", "-T", "unsafe", "-f", "qcow2", "-F", "qcow2", "-b", "base", "top"], "\n"),
        (&["rebase", "-p", "-b", "", "top"], "\n"),
        (&["rebase", "-p", "-u", "-F", "qcow2", "-b", "base", "top"], "\n"),
        (&["compare", "-p", "-s", "top", "top"], "Images are identical.\n\n"),
        (&["convert", "-p", "-t", "writeback", "-T", "none", "-W", "-m", "2", "-O", "raw", "top", "copy"], "\n"),
        (&["convert", "-p", "-B", "other", "-F", "qcow2", "-O", "qcow2", "top", "copy"], "\n"),
    ] {
        let dir = chain(qemu);
        let done = run(dir.path(), args);
        assert!(done.status.success(), "{args:?}: {}", text(&done.stderr));
        let shown = text(&done.stdout);
        assert!(shown.starts_with("    (0.00/100%)\r"), "{args:?}: {shown:?}");
        assert!(shown.ends_with(&format!("    (100.00/100%)\r{last}")), "{args:?}: {shown:?}");
        let parts = shown.split("/100%)\r").filter_map(|part| part.strip_prefix("    ("));
        let parts: Vec<f64> = parts.map(|part| part.parse().unwrap()).collect();
        assert!(parts.is_sorted(), "{args:?}: {shown:?}");
        if args[0] != "pull" {
            let quiet = run(dir.path(), &[&[args[0], "-q"], &args[1..]].concat());
            assert!(quiet.status.success() && quiet.stdout.is_empty(), "-q silences -p: {args:?}");
        }
    }
}

/// Without `-p`, SIGUSR1 prints one line on standard error, as qemu-img does.
#[test]
fn sigusr1_tells_how_far_it_is() {
    let Some(qemu) = Qemu::find() else { return };
    for args in [&["commit"][..], &["pull"], &["rebase", "-b", ""]] {
        let dir = chain(qemu);
        let mut child = start(dir.path(), &[args, &["-q", "--rate-limit", "2M", "top"]].concat());
        // What it does when a signal comes before it listens is the system's affair: it ends. So it must work by then.
        let position = |child: &Child| std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        while !position(&child).lines().any(|line| line.starts_with("SigBlk:") && !line.ends_with("0000")) {
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_millis(300));
        signal(&child, Signal::SIGUSR1);
        let mut line = String::new();
        let err = child.stderr.as_mut().unwrap();
        while !line.ends_with('\n') {
            let mut byte = [0];
            assert_eq!(err.read(&mut byte).unwrap(), 1, "{args:?} ended without a word: {line}");
            line.push(char::from(byte[0]));
        }
        let part = line.strip_prefix("    (").and_then(|rest| rest.strip_suffix("/100%)\n"));
        let part: f64 = part.unwrap_or_else(|| panic!("{line:?}")).parse().unwrap();
        assert!((0.0..100.0).contains(&part), "{line:?}");
        let ended = child.wait_with_output().unwrap();
        assert!(ended.status.success(), "{args:?}: {}", text(&ended.stderr));
    }
}

/// A backing file whose format is not recorded is refused, and with `--probe` taken for what it looks like.
#[test]
fn an_unrecorded_format_is_probed_only_where_that_is_asked_for() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = chain(qemu);
    let top = dir.path().join("top");
    // As older tools leave it: a name without a format. The header extension becomes one that nobody knows.
    let mut bytes = std::fs::read(&top).unwrap();
    let at = bytes.windows(4).position(|word| word == 0xe279_2aca_u32.to_be_bytes()).expect("the format's extension");
    bytes[at..at + 4].copy_from_slice(&0x7fff_0001_u32.to_be_bytes());
    std::fs::write(&top, bytes).unwrap();
    for args in [&["map", "top"][..], &["commit", "top"], &["pull", "top"], &["info", "--backing-chain", "top"]] {
        let refused = run(dir.path(), args);
        assert_eq!(refused.status.code(), Some(1), "{args:?}");
        assert!(text(&refused.stderr).contains("--probe"), "{args:?}: {}", text(&refused.stderr));
    }
    for args in [&["map", "--probe", "top"][..], &["compare", "--probe", "top", "top"], &["commit", "--probe", "top"]] {
        let probed = run(dir.path(), args);
        assert!(probed.status.success(), "{args:?}: {}", text(&probed.stderr));
    }
    qemu.assert_clean(&top);
}
