//! Ours beside qemu-img, in one run: the same work on copies of the same images, in turns, medians and ratios.
//!
//! ```text
//! cargo bench --features cli --bench side_by_side -- [OPTION ...] [WORK ...]
//!   --size MIB           megabytes of data (1024)
//!   --runs N             timed runs of each side (5)
//!   --quick              --size 32 --runs 3, and smaller disks where size is virtual: a minute
//!   --dir DIRECTORY      where the images are made
//!   --mount xfs|btrfs    make such a file system in a file there, and do the works that share blocks (root is needed)
//!   --peers PROGRAM      what benches/peers builds: other crates on the same images
//!   WORK                 only works whose name contains this
//! ```
//! `--make WORK DIRECTORY MIB` leaves the images of a work in a directory, for a profiler; `--job` is what our side runs.
//!
//! Each run is a whole process, started anew, and what it wrote is durable when it ends (`qemu-img` syncs as it closes an
//! image, `convert` only with `-t writeback`). The page cache is warm for all: each side runs once before, and that run is
//! dropped. Images are made with fixed seeds. A run that fails ends the harness.

mod images;
mod jobs;
mod mount;
mod run;
mod table;
mod vm;
mod works;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use images::{GIB, Images, MIB};
use mount::Mount;
use table::{Outcome, Table};
use works::{MADE, Program, Side, Work};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// A side that takes this long is run once.
const LONG: Duration = Duration::from_secs(30);

/// What the command line asks for.
struct Request {
    mib: u64,
    runs: usize,
    quick: bool,
    dir: PathBuf,
    mount: Option<String>,
    peers: Option<PathBuf>,
    only: Vec<String>,
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["--job", job @ ..] => return jobs::run(job),
        ["--make", name, dir, mib] => {
            let works = works::all(mib.parse()?, false);
            let work = works.iter().find(|work| work.name.contains(name)).ok_or("no such work")?;
            return work.images.make(Path::new(dir));
        }
        _ => {}
    }
    let request = parse(args)?;
    if Command::new("qemu-img").arg("--version").stdout(Stdio::null()).status().is_err() {
        println!("SKIPPED: qemu-img is missing, there is nothing to compare with");
        return Ok(());
    }
    let scratch = tempfile::tempdir_in(&request.dir)?;
    let mount = match &request.mount {
        None => None,
        Some(kind) => match Mount::new(kind, scratch.path(), 24 * request.mib * MIB + 2 * GIB) {
            Ok(mount) => Some(mount),
            Err(why) => {
                println!("SKIPPED: {why}");
                return Ok(());
            }
        },
    };
    let dir = mount.as_ref().map_or(scratch.path(), Mount::point);
    println!("{} MiB of data, {} runs each; {}", request.mib, request.runs, version()?);
    let works = if mount.is_some() { works::sharing(request.mib) } else { works::all(request.mib, request.quick) };
    measure_all(&works, &request, dir)
}

fn parse(args: Vec<String>) -> Result<Request> {
    let dir = std::env::temp_dir();
    let mut request = Request { mib: 1024, runs: 5, quick: false, dir, mount: None, peers: None, only: Vec::new() };
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} needs a value"));
        match arg.as_str() {
            "--quick" => (request.mib, request.runs, request.quick) = (32, 3, true),
            "--size" => request.mib = value()?.parse()?,
            "--runs" => request.runs = value()?.parse()?,
            "--dir" => request.dir = value()?.into(),
            "--mount" => request.mount = Some(value()?),
            // Relative to where the harness was started, not to the images.
            "--peers" => request.peers = Some(std::fs::canonicalize(value()?)?),
            option if option.starts_with('-') => return Err(format!("no option {option}").into()),
            _ => request.only.push(arg),
        }
    }
    Ok(request)
}

fn version() -> Result<String> {
    let text = Command::new("qemu-img").arg("--version").output()?.stdout;
    Ok(String::from_utf8_lossy(&text).lines().next().unwrap_or_default().to_owned())
}

fn measure_all(works: &[Work], request: &Request, dir: &Path) -> Result<()> {
    let origin = dir.join("origin");
    let mut made: Option<Images> = None;
    let mut table = Table::default();
    for work in works {
        if !request.only.is_empty() && !request.only.iter().any(|only| work.name.contains(only.as_str())) {
            continue;
        }
        // Works on the same images stand together: they are made once.
        if made != Some(work.images) {
            if made.is_some() {
                std::fs::remove_dir_all(&origin)?;
            }
            std::fs::create_dir(&origin)?;
            work.images.make(&origin)?;
            made = Some(work.images);
        }
        table.add(work, measure(work, request, dir, &origin)?);
    }
    table.summary();
    Ok(())
}

fn measure<'a>(work: &'a Work, request: &Request, dir: &Path, origin: &Path) -> Result<Vec<Outcome<'a>>> {
    let peers = request.peers.as_deref();
    let sides = work.sides.iter().filter(|side| side.program != Program::Peer || peers.is_some());
    let mut outcomes: Vec<Outcome> = sides.map(Outcome::new).collect();
    // The first run of each warms up, and is dropped; all the others are in turns, another one first each time: none
    // always meets the warmer machine.
    for run in 0..=request.runs {
        let count = outcomes.len();
        for turn in 0..count {
            let outcome = &mut outcomes[(turn + run) % count];
            if run > 0 && outcome.warm_up.is_some_and(|warm_up| warm_up.time > LONG) {
                continue;
            }
            let sample = fresh(work, dir, origin, |dir| outcome.side.timed(dir, peers))?;
            if run == 0 {
                outcome.warm_up = Some(sample);
            } else {
                outcome.samples.push(sample);
            }
        }
    }
    for outcome in &mut outcomes {
        if outcome.samples.is_empty() {
            outcome.samples.extend(outcome.warm_up);
        }
        if work.moves.is_some() && is_counted(outcome.side) {
            outcome.calls = fresh(work, dir, origin, |dir| outcome.side.calls(dir, peers))?;
        }
        outcome.samples.sort_by_key(|sample| sample.time);
    }
    Ok(outcomes)
}

fn is_counted(side: &Side) -> bool {
    matches!(side.program, Program::QemuImg | Program::Ours)
}

/// Runs in a directory with fresh copies of the files that the work changes; the others are the same files.
fn fresh<T>(work: &Work, dir: &Path, origin: &Path, run: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    let dir = if work.changes.is_empty() { origin.to_owned() } else { dir.join("run") };
    if !work.changes.is_empty() {
        std::fs::create_dir(&dir)?;
        for entry in std::fs::read_dir(origin)? {
            let entry = entry?;
            let (from, to) = (entry.path(), dir.join(entry.file_name()));
            let name = entry.file_name();
            if work.changes.iter().any(|beginning| name.as_encoded_bytes().starts_with(beginning.as_bytes())) {
                copy(&from, &to)?;
            } else {
                std::fs::hard_link(&from, &to)?;
            }
        }
    }
    Command::new("sync").arg("-f").arg(&dir).status()?;
    let done = run(&dir)?;
    if work.changes.is_empty() {
        for name in MADE {
            if dir.join(name).exists() {
                std::fs::remove_file(dir.join(name))?;
            }
        }
    } else {
        std::fs::remove_dir_all(&dir)?;
    }
    Ok(done)
}

/// A copy that keeps holes and shares no blocks, which would make the first writes to it dearer.
fn copy(from: &Path, to: &Path) -> Result<()> {
    let done = Command::new("cp").args(["--sparse=always", "--reflink=never"]).arg(from).arg(to).status()?;
    if done.success() { Ok(()) } else { Err("the images could not be copied".into()) }
}
