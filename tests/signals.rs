//! Signals, and standard streams that cannot be written: the program's exit codes and messages.

use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};

const PROGRAM: &str = env!("CARGO_BIN_EXE_qcow2-chain");
/// The data of the overlay, which takes four seconds to commit with [`SLOWLY`].
const DATA: usize = 4 << 20;
const SLOWLY: [&str; 4] = ["commit", "--rate-limit", "1M", "top.qcow2"];
/// Bits of the signals in the masks of a process's status.
const HANDLED: u64 = 1 << (2 - 1) | 1 << (10 - 1) | 1 << (15 - 1);

/// A directory with an overlay that is full of data.
fn directory() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    std::fs::write(path("data.raw"), vec![7; DATA]).unwrap();
    std::fs::write(path("base.raw"), vec![0; DATA]).unwrap();
    for line in [
        &["convert", "-q", "-f", "raw", "-O", "qcow2", "data.raw", "top.qcow2"][..],
        &["rebase", "-q", "-u", "-b", "base.raw", "-F", "raw", "top.qcow2"],
    ] {
        let done = Command::new(PROGRAM).args(line).current_dir(directory.path()).output().unwrap();
        assert!(done.status.success(), "{line:?}: {}", text(&done.stderr));
    }
    directory
}

fn start(directory: &Path, line: &[&str], error: Stdio) -> Child {
    let mut command = Command::new(PROGRAM);
    command.args(line).current_dir(directory).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(error).spawn().unwrap()
}

/// Starts the program by a shell that ignores SIGINT, as a script's background job does.
fn start_ignoring_sigint(directory: &Path, line: &[&str]) -> Child {
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' INT; exec \"$0\" \"$@\"", PROGRAM]).args(line).current_dir(directory);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn send(child: &Child, signal: Signal) {
    kill(nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
}

/// The lines of the status of each thread of a process that begin with `SigBlk:`, as masks, by the
/// thread's name.
fn blocked_signals(child: &Child) -> Vec<(String, u64)> {
    let threads = std::fs::read_dir(format!("/proc/{}/task", child.id())).unwrap();
    let masks = threads.filter_map(|thread| {
        let status = std::fs::read_to_string(thread.ok()?.path().join("status")).ok()?;
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        Some((field("Name:")?.to_owned(), u64::from_str_radix(field("SigBlk:")?, 16).ok()?))
    });
    masks.collect()
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}: not within 20 s");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until the thread that receives the signals runs, and the merge has begun.
fn wait_for_work(child: &Child) {
    wait_until("the program works", || blocked_signals(child).iter().any(|(name, _)| name == "signals"));
    std::thread::sleep(Duration::from_millis(400));
}

fn line_of(stream: &mut impl std::io::Read) -> String {
    let mut line = String::new();
    while !line.ends_with('\n') {
        let mut byte = [0];
        assert_eq!(stream.read(&mut byte).unwrap(), 1, "the stream ended after {line:?}");
        line.push(char::from(byte[0]));
    }
    line
}

fn full() -> Stdio {
    std::fs::File::options().write(true).open("/dev/full").unwrap().into()
}

/// The base has the data of the overlay.
fn assert_committed(directory: &Path) {
    assert!(std::fs::read(directory.join("base.raw")).unwrap() == vec![7; DATA], "the base has other data");
}

fn assert_cancelled(ended: &Output) {
    let message = text(&ended.stderr);
    assert_eq!(ended.status.code(), Some(130), "{message}");
    assert!(message.contains("cancelled"), "{message}");
}

#[test]
fn sigint_and_sigterm_cancel_a_merge() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let directory = directory();
        let child = start(directory.path(), &SLOWLY, Stdio::piped());
        wait_for_work(&child);
        send(&child, signal);
        assert_cancelled(&child.wait_with_output().unwrap());
        let again = start(directory.path(), &["commit", "top.qcow2"], Stdio::piped()).wait_with_output().unwrap();
        assert!(again.status.success(), "{}", text(&again.stderr));
        assert_committed(directory.path());
    }
}

#[test]
fn all_threads_of_a_merge_block_signals() {
    let directory = directory();
    let mut child = start(directory.path(), &SLOWLY, Stdio::piped());
    wait_for_work(&child);
    for (thread, mask) in blocked_signals(&child) {
        // The kernel shows a thread that waits for signals without those that it waits for.
        if thread == "signals" {
            continue;
        }
        assert_eq!(mask & HANDLED, HANDLED, "thread {thread} would run a signal's default action");
    }
    send(&child, Signal::SIGINT);
    child.wait().unwrap();
}

#[test]
fn sigusr1_reports_progress() {
    let directory = directory();
    let mut child = start(directory.path(), &SLOWLY, Stdio::piped());
    wait_for_work(&child);
    for _ in 0..2 {
        send(&child, Signal::SIGUSR1);
        let line = line_of(child.stderr.as_mut().unwrap());
        assert!(line.starts_with("    (") && line.ends_with("/100%)\n"), "{line:?}");
    }
    send(&child, Signal::SIGINT);
    assert_cancelled(&child.wait_with_output().unwrap());
}

#[test]
fn ignored_sigint_stays_ignored() {
    let directory = directory();
    let child = start_ignoring_sigint(directory.path(), &SLOWLY);
    wait_for_work(&child);
    send(&child, Signal::SIGINT);
    send(&child, Signal::SIGINT);
    let ended = child.wait_with_output().unwrap();
    assert!(ended.status.success(), "{:?}: {}", ended.status, text(&ended.stderr));
    assert_committed(directory.path());
}

#[test]
fn ignored_sigint_leaves_sigterm() {
    let directory = directory();
    let child = start_ignoring_sigint(directory.path(), &SLOWLY);
    wait_for_work(&child);
    send(&child, Signal::SIGINT);
    send(&child, Signal::SIGTERM);
    assert_cancelled(&child.wait_with_output().unwrap());
}

/// A verb that cannot be stopped ends by the signal's default action.
#[test]
fn sigint_ends_a_program_that_does_not_listen() {
    use std::os::unix::fs::FileExt as _;
    let directory = tempfile::tempdir().unwrap();
    let sparse = std::fs::File::create(directory.path().join("sparse.raw")).unwrap();
    (0..2000_u64).for_each(|block| sparse.write_all_at(&[7; 4096], block << 17).unwrap());
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        // More output than a pipe holds, which this test does not read.
        let line = ["map", "-f", "raw", "--output=json", "sparse.raw"];
        let mut child = start(directory.path(), &line, Stdio::null());
        std::thread::sleep(Duration::from_secs(2));
        assert!(child.try_wait().unwrap().is_none(), "the program waits for its reader");
        for (thread, mask) in blocked_signals(&child) {
            assert_eq!(mask & HANDLED, 0, "thread {thread} blocks signals");
        }
        send(&child, signal);
        assert_eq!(child.wait().unwrap().signal(), Some(signal as i32));
    }
}

#[test]
fn full_standard_error_keeps_exit_codes() {
    let directory = directory();
    for (line, code) in [
        (&["info", "missing.qcow2"][..], 1),
        (&["compare", "missing.qcow2", "top.qcow2"], 2),
        (&["nonsense"], 1),
        (&["vm", "list", "missing.json"], 1),
    ] {
        let ended = start(directory.path(), line, full()).wait_with_output().unwrap();
        let readable = start(directory.path(), line, Stdio::piped()).wait_with_output().unwrap();
        assert_eq!(readable.status.code(), Some(code), "{line:?}: {}", text(&readable.stderr));
        assert_eq!(ended.status.code(), Some(code), "{line:?}");
    }
}

#[test]
fn full_standard_error_keeps_signals() {
    let directory = directory();
    let child = start(directory.path(), &SLOWLY, full());
    wait_for_work(&child);
    send(&child, Signal::SIGUSR1);
    std::thread::sleep(Duration::from_millis(200));
    send(&child, Signal::SIGINT);
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(130));
}
