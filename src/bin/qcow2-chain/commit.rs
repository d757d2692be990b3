//! `commit`: what an overlay holds goes into its backing file.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use qcow2_chain::chain::{Chain, Format, Layer};
use qcow2_chain::merge::{self, AfterCommit, CommitOptions, Direction, PullOptions, Step};
use qcow2_chain::storage::LockMode;

use crate::failure::{Failure, Outcome};
use crate::interrupt::Interrupt;
use crate::open;
use crate::options::{PolicyArgs, Unserved, cache_mode};
use crate::planning::{MergeArgs, explain, warn_of_snapshots};
use crate::progress::Progress;

/// Merge an image into its backing file
///
/// The image is empty afterwards (unless -d or -b is given), and reads as before. Whatever interrupts it, running it again
/// completes it.
#[derive(clap::Args, Debug)]
#[command(args_override_self = true)]
pub(crate) struct Args {
    /// The image's format (qcow2)
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Merge into BASE, an image of the chain, instead of the backing file; implies --drop
    #[arg(short, long, value_name = "BASE")]
    base: Option<PathBuf>,
    /// Do not empty the image: it will be removed
    #[arg(short, long)]
    drop: bool,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    /// Show how far it is
    #[arg(short, long)]
    progress: bool,
    /// Accepted and without effect
    #[arg(short = 't', long, value_name = "CACHE")]
    cache: Option<String>,
    #[arg(short, long, hide = true, value_name = "RATE")]
    rate: Option<String>,
    /// Which way: the base takes in what is above it, or FILE takes in what is beneath it down to the base and then
    /// stands on what is beneath the base, or whichever moves less
    #[arg(long, value_enum, default_value = "commit")]
    direction: Way,
    /// Refuse if an image in DIR, other than those of the chain, is over a layer that changes (repeatable)
    #[arg(long, value_name = "DIR")]
    dependents_in: Vec<PathBuf>,
    #[command(flatten)]
    merge: MergeArgs,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    unserved: Unserved,
    /// The image
    file: PathBuf,
}

/// Does it.
pub(crate) fn run(args: &Args) -> Outcome {
    args.unserved.refuse()?;
    cache_mode(args.cache.as_deref())?;
    if args.rate.is_some() {
        return Err(Failure::unserved("--rate", "the I/O limits of a control group"));
    }
    let format = open::format(&args.file, args.format.as_deref())?;
    let base = match &args.base {
        None => 1,
        // Which layer it is must be known before any is opened for writing.
        Some(base) => {
            let looked = args.policy.chain_options(&args.file, format, LockMode::Read);
            let chain = Chain::open(&args.file, &looked).map_err(open::explain)?;
            find(chain.layers(), base, &args.file)?
        }
    };
    let rate = args.merge.rate()?;
    let direction = direction(args, format, base)?;
    let Some(direction) = direction else { return Ok(0) };
    let mut options = args.policy.chain_options(&args.file, format, LockMode::Read);
    options.writable = if direction == Direction::Pull { 1 } else { base + 1 };
    let chain = Chain::open(&args.file, &options).map_err(open::explain)?;
    if chain.layers().len() < 2 {
        return Err(Failure::new("Image does not have a backing file"));
    }
    if direction == Direction::Pull {
        let below = (base + 1 < chain.layers().len()).then_some(base + 1);
        let options = PullOptions::default().with_base(below).with_rate_limit(rate).with_allow_stale_snapshots(true);
        return pull(chain, &options, &args.merge, args.progress, args.quiet);
    }
    warn_of_snapshots(chain.layers().get(..base).unwrap_or_default())?;
    let keep = args.drop || args.base.is_some();
    let options = CommitOptions::default().with_base(base).with_rate_limit(rate).with_allow_stale_snapshots(true);
    let mut options = options.with_after(if keep { AfterCommit::Keep } else { AfterCommit::Empty });
    options.dependents_in.clone_from(&args.dependents_in);
    let done = with_progress(args.progress && !args.quiet, |face| merge::commit(&chain, &options, face));
    let report = done.map_err(|error| explain(error, &chain, base))?;
    args.merge.tell(args.quiet, "Image committed.", "commit", &report)
}

/// Pulls; what this verb and `pull` share.
pub(crate) fn pull(chain: Chain, options: &PullOptions, merge: &MergeArgs, progress: bool, quiet: bool) -> Outcome {
    warn_of_snapshots(chain.layers().get(..1).unwrap_or_default())?;
    let done = with_progress(progress && !quiet, |face| merge::pull(&chain, options, face));
    let report = done.map_err(|error| explain(error, &chain, 0))?;
    chain.close()?;
    merge.tell(quiet, "Image pulled.", "pull", &report)
}

/// Which way to go; none where the plan was all that was asked for, and is printed.
fn direction(args: &Args, format: Format, base: usize) -> Result<Option<Direction>, Failure> {
    if !args.merge.dry_run
        && let Some(direction) = args.direction.direction()
    {
        return Ok(Some(direction));
    }
    let looked = args.policy.chain_options(&args.file, format, LockMode::Read);
    let chain = Chain::open(&args.file, &looked).map_err(open::explain)?;
    if chain.layers().len() < 2 {
        return Err(Failure::new("Image does not have a backing file"));
    }
    let plan = merge::plan(&chain, base)?;
    if args.merge.dry_run {
        args.merge.show(&plan)?;
        return Ok(None);
    }
    Ok(Some(plan.cheapest))
}

/// The values of `--direction`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Way {
    /// The base takes in what is above it.
    Commit,
    /// The image takes in what is beneath it.
    Pull,
    /// Whichever moves less data.
    Auto,
}

impl Way {
    /// Returns the direction, or `None` if the estimate decides.
    fn direction(self) -> Option<Direction> {
        match self {
            Self::Commit => Some(Direction::Commit),
            Self::Pull => Some(Direction::Pull),
            Self::Auto => None,
        }
    }
}

/// The layer of this name: by its path, or as the same file.
pub(crate) fn find(layers: &[Layer], base: &Path, top: &Path) -> Result<usize, Failure> {
    let real = std::fs::canonicalize(base).ok();
    let is_it =
        |layer: &Layer| layer.path == base || (real.is_some() && std::fs::canonicalize(&layer.path).ok() == real);
    layers.iter().skip(1).position(is_it).map(|index| index + 1).ok_or_else(|| {
        let (base, top) = (base.display(), top.display());
        Failure::new(format!("Did not find '{base}' in the backing chain of '{top}'"))
    })
}

/// Runs a merge and draws its steps, where that is `wanted`.
pub(crate) fn with_progress<T>(
    wanted: bool,
    merge: impl FnOnce(&dyn merge::Progress) -> merge::Result<T>,
) -> merge::Result<T> {
    let face = Face::new(wanted);
    let merged = merge(&face);
    face.end(merged.is_ok());
    merged
}

/// Draws the steps of a merge, tells of them where a signal asks, and stops it on Ctrl-C.
pub(crate) struct Face(Mutex<Progress>, Interrupt);

impl Face {
    /// Draws nothing unless `wanted`. To be made before any other thread is started.
    pub(crate) fn new(wanted: bool) -> Self {
        let interrupt = Interrupt::listen();
        Self(Mutex::new(Progress::new(wanted)), interrupt)
    }

    /// Says that `done` of `total` is done.
    pub(crate) fn set(&self, done: u64, total: u64) {
        self.1.note(done, total);
        if let Ok(progress) = self.0.lock() {
            progress.set(done, total);
        }
    }

    /// Ends the drawing, of what is done or was given up.
    pub(crate) fn end(&self, done: bool) {
        if done {
            self.set(1, 1);
        }
        if let Ok(progress) = self.0.lock() {
            progress.end();
        }
    }
}

impl qcow2_chain::progress::Progress for Face {
    fn step(&self, step: &Step<'_>) {
        if step.total > 0 {
            self.set(step.done, step.total);
        }
    }

    fn is_cancelled(&self) -> bool {
        self.1.asked()
    }
}
