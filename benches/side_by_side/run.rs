//! One run of one side: time, memory, system calls.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::works::{Program, Side};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// How long, how much work of processors, and how much memory at the most, in KiB.
#[derive(Clone, Copy)]
pub(crate) struct Sample {
    pub(crate) time: Duration,
    /// User and system time of all threads, in steps of 10 ms: other programs on the machine change it little.
    pub(crate) cpu: Duration,
    pub(crate) rss: u64,
}

/// What strace counted in a run of its own, not timed.
#[derive(Clone, Copy)]
pub(crate) struct Calls {
    pub(crate) all: u64,
    /// `fsync`, `fdatasync`, `msync`.
    pub(crate) syncs: u64,
}

/// The program and its first arguments.
fn program(program: Program, peers: Option<&Path>) -> Result<Vec<String>> {
    Ok(match program {
        Program::QemuImg => vec!["qemu-img".to_owned()],
        Program::QemuIo => vec!["qemu-io".to_owned()],
        Program::Ours => vec![env!("CARGO_BIN_EXE_qcow2-chain").to_owned()],
        Program::Job => vec![std::env::current_exe()?.to_string_lossy().into_owned(), "--job".to_owned()],
        Program::Peer => vec![peers.ok_or("no peers")?.to_string_lossy().into_owned()],
    })
}

impl Side {
    fn command(&self, dir: &Path, peers: Option<&Path>, before: &[&str]) -> Result<Command> {
        let words: Vec<String> =
            before.iter().map(|&word| word.to_owned()).chain(program(self.program, peers)?).collect();
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).args(&self.args).current_dir(dir).stdout(Stdio::null());
        Ok(command)
    }

    /// Runs to the end. What fails ends the harness: nothing is dropped.
    pub(crate) fn timed(&self, dir: &Path, peers: Option<&Path>) -> Result<Sample> {
        let mut command = self.command(dir, peers, &[])?;
        let started = Instant::now();
        let before = cpu_of_children();
        let mut child = command.spawn()?;
        let status = PathBuf::from(format!("/proc/{}/status", child.id()));
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let watch = scope.spawn(|| watch(&status, &done));
            let end = child.wait();
            let time = started.elapsed();
            done.store(true, Ordering::Relaxed);
            let rss = watch.join().map_err(|_| "the memory could not be watched")?;
            let end = end?;
            let cpu = cpu_of_children().saturating_sub(before);
            if end.success() { Ok(Sample { time, cpu, rss }) } else { Err(format!("{command:?}: {end}").into()) }
        })
    }

    /// Counts the system calls of one more run; none if strace is missing.
    pub(crate) fn calls(&self, dir: &Path, peers: Option<&Path>) -> Result<Option<Calls>> {
        if Command::new("strace").arg("-V").stdout(Stdio::null()).status().is_err() {
            return Ok(None);
        }
        let counted = dir.join("calls");
        let mut command = self.command(dir, peers, &["strace", "-f", "-c", "-o", "calls"])?;
        if !command.status()?.success() {
            return Err(format!("{command:?} failed").into());
        }
        let text = std::fs::read_to_string(&counted)?;
        std::fs::remove_file(&counted)?;
        let mut calls = Calls { all: 0, syncs: 0 };
        for line in text.lines() {
            // % time, seconds, usecs/call, calls, maybe errors, name
            let words: Vec<&str> = line.split_whitespace().collect();
            let (Some(number), Some(&name)) = (words.get(3).and_then(|word| word.parse::<u64>().ok()), words.last())
            else {
                continue;
            };
            match name {
                "total" => {}
                "fsync" | "fdatasync" | "msync" => {
                    (calls.all, calls.syncs) = (calls.all + number, calls.syncs + number)
                }
                _ => calls.all += number,
            }
        }
        Ok(Some(calls))
    }
}

/// The processor time of all children that have ended; 0 where the kernel does not tell.
fn cpu_of_children() -> Duration {
    let text = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Behind the name in parentheses: the fields from the third on, of which 16 and 17 are wanted, in 1/100 s.
    let fields = text.rsplit_once(')').map_or("", |(_, fields)| fields).split_whitespace();
    let ticks: u64 = fields.skip(13).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    Duration::from_millis(10 * ticks)
}

/// The process's own high-water mark, looked at until it is gone.
fn watch(status: &Path, done: &AtomicBool) -> u64 {
    let (mut rss, mut pause) = (0, Duration::from_micros(200));
    while !done.load(Ordering::Relaxed) {
        let text = std::fs::read_to_string(status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let mark = line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok());
        rss = rss.max(mark.unwrap_or_default());
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(4));
    }
    rss
}
