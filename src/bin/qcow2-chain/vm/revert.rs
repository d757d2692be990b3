//! `vm revert`: reverts all volumes to a snapshot.

use std::path::PathBuf;

use qcow2_chain::vm::{MergeOptions, Request};

use super::bars::with_bars;
use super::hypervisor::HypervisorArgs;
use super::outcome::{OutputArgs, explain};
use super::safety::LossArgs;
use crate::failure::Outcome;
use crate::planning::MergeArgs;

/// Revert all volumes to a snapshot; data written since the last snapshot is discarded
#[expect(clippy::struct_excessive_bools, reason = "the command line has as many switches")]
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The VM's catalogue
    catalogue: PathBuf,
    /// The snapshot
    name: String,
    /// Detach volumes that the snapshot lacks
    #[arg(long)]
    detach_missing: bool,
    /// Accept overlays without attributes of the active file that may not be set (owner, ACL,
    /// label)
    #[arg(long)]
    ignore_attributes: bool,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// Show the progress of a merge that follows
    #[arg(short, long)]
    progress: bool,
    #[command(flatten)]
    loss: LossArgs,
    #[command(flatten)]
    merge: MergeArgs,
    #[command(flatten)]
    hypervisor: HypervisorArgs,
}

/// Runs the verb.
pub(crate) fn run(args: &Args) -> Outcome {
    let set = args.hypervisor.load(&args.catalogue)?;
    let options = MergeOptions::default()
        .with_rate_limit(args.merge.rate()?)
        .with_detach_missing(args.detach_missing)
        .with_ignore_attributes(args.ignore_attributes);
    let options = args.loss.apply(options);
    if args.merge.dry_run {
        let request = Request::Revert { name: args.name.clone(), detach_missing: args.detach_missing };
        let plan = set.plan(&request, &options).map_err(explain)?;
        args.merge.show(&plan)?;
        return Ok(0);
    }
    let done = with_bars(args.progress && !args.quiet, |face| set.revert(&args.name, &options, face));
    let report = done.map_err(explain)?;
    let output = OutputArgs::new(args.quiet, args.merge.wants_json());
    output.report(&format!("Reverted to snapshot {}.", args.name), &report)
}
