//! `pull`: an image takes in what lies beneath it. No verb of qemu-img; QEMU calls the job `block-stream`.

use std::path::PathBuf;

use qcow2_chain::chain::{Chain, Format};
use qcow2_chain::merge::{self, PullOptions};
use qcow2_chain::storage::LockMode;

use crate::commit::{self, find};
use crate::failure::{Failure, Outcome};
use crate::open;
use crate::options::{PolicyArgs, Unserved};
use crate::planning::MergeArgs;

/// Take what the layers beneath an image hold into the image
///
/// The image reads as before, and needs those layers no more. Nothing but the image is written. Whatever interrupts it,
/// running it again completes it.
#[derive(clap::Args, Debug)]
#[command(args_override_self = true)]
pub(crate) struct Args {
    /// The image's format (qcow2)
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// The image of the chain on which FILE sits afterwards; by default none
    #[arg(short, long, value_name = "BASE")]
    base: Option<PathBuf>,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    /// Show how far it is
    #[arg(short, long)]
    progress: bool,
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
    if open::format(&args.file, args.format.as_deref())? == Format::Raw {
        return Err(Failure::new("a raw image has no backing file"));
    }
    let mut options = args.policy.chain_options(&args.file, Format::Qcow2, LockMode::Read);
    let rate = args.merge.rate()?;
    options.writable = usize::from(!args.merge.dry_run);
    let chain = Chain::open(&args.file, &options).map_err(open::explain)?;
    if chain.layers().len() < 2 {
        return Err(Failure::new("Image does not have a backing file"));
    }
    let base = args.base.as_ref().map(|base| find(chain.layers(), base, &args.file)).transpose()?;
    if args.merge.dry_run {
        // What is pulled ends above the layer that is sat on.
        let last = base.unwrap_or(chain.layers().len()) - 1;
        args.merge.show(&merge::plan(&chain, last)?)?;
        return Ok(0);
    }
    let options = PullOptions::default().with_base(base).with_rate_limit(rate).with_allow_stale_snapshots(true);
    commit::pull(chain, &options, &args.merge, args.progress, args.quiet)
}
