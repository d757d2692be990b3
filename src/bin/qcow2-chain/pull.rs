//! `pull`: an image takes in what lies beneath it. No verb of qemu-img; QEMU calls the job `block-stream`.

use std::path::PathBuf;

use qcow2_chain::chain::{Chain, Format};
use qcow2_chain::merge::{self, PullOptions};
use qcow2_chain::storage::LockMode;

use crate::commit::{find, with_progress};
use crate::failure::{Failure, Outcome};
use crate::open;
use crate::options::{PolicyArgs, Unserved};
use crate::output::say;

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
    options.writable = 1;
    let chain = Chain::open(&args.file, &options).map_err(open::explain)?;
    if chain.layers().len() < 2 {
        return Err(Failure::new("Image does not have a backing file"));
    }
    let base = args.base.as_ref().map(|base| find(chain.layers(), base, &args.file)).transpose()?;
    let options = PullOptions::default().with_base(base);
    let pulled = with_progress(args.progress && !args.quiet, |face| merge::pull(&chain, &options, face));
    chain.close()?;
    pulled?;
    say(args.quiet, "Image pulled.")?;
    Ok(0)
}
