//! Ours beside qemu-img, in one run: the same work on copies of the same images, in turns, medians and ratios.
//!
//! ```text
//! cargo bench --bench side_by_side -- [--quick] [--size MIB] [--runs N] [--dir DIRECTORY] [WORK ...]
//! ```
//! `--make WORK DIRECTORY MIB` leaves the images of a work in a directory, `--job JOB DIRECTORY` does our side's job on them,
//! both for a profiler.
//!
//! Both are whole processes, started anew for each run, and both end durably. Images are made with fixed seeds, so that two
//! runs of the harness do the same. A run that fails ends the harness: nothing is dropped.

mod images;
mod jobs;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What is measured: how the images are made, and what each side is told.
struct Work {
    name: &'static str,
    /// Makes the images in a directory, given the megabytes of data.
    make: fn(&Path, u64) -> images::Done,
    /// What our side does; see [`jobs::run`].
    job: &'static str,
    /// What qemu-img is told, in the directory.
    qemu: &'static [&'static str],
    /// Whether the work changes the images, so that each run needs a fresh copy.
    changes: bool,
}

const WORKS: &[Work] = &[
    Work {
        name: "commit, random clusters into an empty base",
        make: images::delta_over_empty,
        job: "commit",
        qemu: &["commit", "-q", "-f", "qcow2", "top.qcow2"],
        changes: true,
    },
    Work {
        name: "commit, random clusters into a full base",
        make: images::delta_over_full,
        job: "commit",
        qemu: &["commit", "-q", "-f", "qcow2", "top.qcow2"],
        changes: true,
    },
    Work {
        name: "pull (flatten in place), random clusters",
        make: images::delta_over_full,
        job: "pull",
        qemu: &["rebase", "-q", "-f", "qcow2", "-b", "", "top.qcow2"],
        changes: true,
    },
    Work {
        name: "flatten 64 KiB of data, 1 TiB virtual",
        make: images::sparse,
        job: "pull",
        qemu: &["rebase", "-q", "-f", "qcow2", "-b", "", "top.qcow2"],
        changes: true,
    },
    Work {
        name: "check, metadata of 1 TiB",
        make: images::metadata,
        job: "check",
        qemu: &["check", "-q", "-f", "qcow2", "top.qcow2"],
        changes: false,
    },
    Work {
        name: "map, metadata of 1 TiB",
        make: images::metadata,
        job: "map",
        qemu: &["map", "-f", "qcow2", "--output=json", "top.qcow2"],
        changes: false,
    },
    Work {
        name: "compare, equal data",
        make: images::twins,
        job: "compare",
        qemu: &["compare", "-q", "-f", "qcow2", "-F", "qcow2", "top.qcow2", "twin.qcow2"],
        changes: false,
    },
];

/// What the command line asks for.
struct Request {
    mib: u64,
    runs: usize,
    dir: PathBuf,
    only: Vec<String>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|first| first == "--job") {
        return jobs::run(&args[1], Path::new(&args[2]));
    }
    if args.first().is_some_and(|first| first == "--make") {
        let work = WORKS.iter().find(|work| work.name.contains(&args[1])).ok_or("no such work")?;
        return (work.make)(Path::new(&args[2]), args[3].parse()?);
    }
    args.retain(|arg| arg != "--bench");
    let request = parse(args)?;
    if Command::new("qemu-img").arg("--version").stdout(Stdio::null()).status().is_err() {
        println!("SKIPPED: qemu-img is missing, there is nothing to compare with");
        return Ok(());
    }
    let scratch = tempfile::tempdir_in(&request.dir)?;
    println!("{} MiB of data, {} runs each, medians; {}", request.mib, request.runs, version()?);
    println!("{:<44} {:>10} {:>10} {:>8}   {:>9} {:>9}", "work", "qemu-img", "ours", "ratio", "RSS qemu", "RSS ours");
    for work in WORKS {
        if request.only.is_empty() || request.only.iter().any(|only| work.name.contains(only.as_str())) {
            measure(work, &request, scratch.path())?;
        }
    }
    Ok(())
}

fn parse(args: Vec<String>) -> Result<Request, Box<dyn Error>> {
    let mut request = Request { mib: 1024, runs: 5, dir: std::env::temp_dir(), only: Vec::new() };
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} needs a value"));
        match arg.as_str() {
            "--quick" => (request.mib, request.runs) = (64, 3),
            "--size" => request.mib = value()?.parse()?,
            "--runs" => request.runs = value()?.parse()?,
            "--dir" => request.dir = value()?.into(),
            _ => request.only.push(arg),
        }
    }
    Ok(request)
}

fn version() -> Result<String, Box<dyn Error>> {
    let text = Command::new("qemu-img").arg("--version").output()?.stdout;
    Ok(String::from_utf8_lossy(&text).lines().next().unwrap_or_default().to_owned())
}

/// One side of one run: how long, and how much memory at the most, in KiB.
#[derive(Clone, Copy)]
struct Sample {
    time: Duration,
    rss: u64,
}

fn measure(work: &Work, request: &Request, scratch: &Path) -> Result<(), Box<dyn Error>> {
    let origin = scratch.join("origin");
    std::fs::create_dir(&origin)?;
    (work.make)(&origin, request.mib)?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for run in 0..request.runs {
        // In turns, the first one changing: neither always meets the warmer machine.
        for mine in if run % 2 == 0 { [true, false] } else { [false, true] } {
            let dir = if work.changes { copy(&origin, &scratch.join("run"))? } else { origin.clone() };
            Command::new("sync").status()?;
            let sample = if mine {
                let me = std::env::current_exe()?;
                timed(Command::new(me).args(["--job", work.job]).arg(&dir))?
            } else {
                timed(Command::new("qemu-img").args(work.qemu).current_dir(&dir))?
            };
            if mine {
                ours.push(sample)
            } else {
                theirs.push(sample)
            }
            if work.changes {
                std::fs::remove_dir_all(&dir)?;
            }
        }
    }
    std::fs::remove_dir_all(&origin)?;
    let (ours, theirs) = (median(ours), median(theirs));
    println!(
        "{:<44} {:>8.3} s {:>8.3} s {:>7.1}x   {:>5} MiB {:>5} MiB",
        work.name,
        theirs.time.as_secs_f64(),
        ours.time.as_secs_f64(),
        theirs.time.as_secs_f64() / ours.time.as_secs_f64(),
        theirs.rss >> 10,
        ours.rss >> 10
    );
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<PathBuf, Box<dyn Error>> {
    // `cp` keeps holes, and shares blocks where the file system can.
    let done = Command::new("cp").args(["-r", "--sparse=always"]).arg(from).arg(to).status()?;
    if done.success() { Ok(to.to_owned()) } else { Err("the images could not be copied".into()) }
}

/// Runs a process to its end. Memory is sampled while it runs: its own high-water mark.
fn timed(command: &mut Command) -> Result<Sample, Box<dyn Error>> {
    let started = Instant::now();
    let mut child = command.stdout(Stdio::null()).spawn()?;
    let status = PathBuf::from(format!("/proc/{}/status", child.id()));
    let mut rss = 0;
    let mut pause = Duration::from_micros(200);
    loop {
        if let Some(status) = child.try_wait()? {
            let time = started.elapsed();
            return if status.success() {
                Ok(Sample { time, rss })
            } else {
                Err(format!("{command:?}: {status}").into())
            };
        }
        rss = rss.max(high_water(&status));
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(2));
    }
}

fn high_water(status: &Path) -> u64 {
    let text = std::fs::read_to_string(status).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or_default()
}

fn median(mut samples: Vec<Sample>) -> Sample {
    samples.sort_by_key(|sample| sample.time);
    let rss = samples.iter().map(|sample| sample.rss).max().unwrap_or_default();
    Sample { rss, ..samples[samples.len() / 2] }
}
