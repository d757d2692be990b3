//! `vm delete`: a snapshot is removed, merged, or hidden.

use std::path::PathBuf;

use qcow2_chain::vm::{MergeOptions, Request, State};

use super::bars::with_bars;
use super::hypervisor::HypervisorArgs;
use super::telling::{TellArgs, explain};
use crate::commit::Way;
use crate::failure::Outcome;
use crate::planning::MergeArgs;

/// Delete a snapshot
///
/// Its files are removed where nothing stands on them, merged with the one thing that does, or kept out of sight while
/// several do. Whatever interrupts it, the VM can be started, and running it again goes on.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The VM's catalogue
    catalogue: PathBuf,
    /// The snapshot
    name: String,
    /// Which way to merge: the lower file takes in the upper one, or the upper one the lower, or whichever moves less
    #[arg(long, value_enum, default_value = "auto")]
    direction: Way,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    /// Show how far it is, each volume by itself on a terminal
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
    let options = MergeOptions::default().with_direction(args.direction.into()).with_rate_limit(args.merge.rate()?);
    if args.merge.dry_run {
        let plan = set.plan(&Request::Delete { name: args.name.clone() }, &options).map_err(explain)?;
        args.merge.show(&plan)?;
        return Ok(0);
    }
    let done = with_bars(args.progress && !args.quiet, |face| set.delete(&args.name, &options, face));
    let report = done.map_err(explain)?;
    let line = match report.state {
        Some(State::Hidden) => format!("Snapshot {} hidden: several things stand on its files.", args.name),
        _ => format!("Snapshot {} deleted.", args.name),
    };
    TellArgs::new(args.quiet, args.merge.wants_json()).tell(&line, &report)
}
