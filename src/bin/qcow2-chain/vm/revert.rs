//! `vm revert`: all volumes go back to a snapshot.

use std::path::PathBuf;

use qcow2_chain::vm::{MergeOptions, Request};

use super::bars::with_bars;
use super::hypervisor::HypervisorArgs;
use super::telling::{TellArgs, explain};
use crate::failure::Outcome;
use crate::planning::MergeArgs;

/// Bring all volumes back to a snapshot: what was written since the last one is gone
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The VM's catalogue
    catalogue: PathBuf,
    /// The snapshot
    name: String,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    /// Show how far it is, where a hidden snapshot is merged away
    #[arg(short, long)]
    progress: bool,
    #[command(flatten)]
    merge: MergeArgs,
    #[command(flatten)]
    hypervisor: HypervisorArgs,
}

/// Does it.
pub(crate) fn run(args: &Args) -> Outcome {
    let set = args.hypervisor.load(&args.catalogue)?;
    let options = MergeOptions::default().with_rate_limit(args.merge.rate()?);
    if args.merge.dry_run {
        let plan = set.plan(&Request::Revert { name: args.name.clone() }, &options).map_err(explain)?;
        args.merge.show(&plan)?;
        return Ok(0);
    }
    let done = with_bars(args.progress && !args.quiet, |face| set.revert(&args.name, &options, face));
    let report = done.map_err(explain)?;
    let tell = TellArgs::new(args.quiet, args.merge.wants_json());
    tell.tell(&format!("Reverted to snapshot {}.", args.name), &report)
}
