//! `vm resize`: resizes a volume.

use std::path::PathBuf;

use qcow2_chain::vm::Refusal;

use super::hypervisor::HypervisorArgs;
use super::outcome::{OutputArgs, explain};
use crate::failure::Outcome;
use crate::resize::Target;

/// Resize a volume; its snapshots keep their sizes
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The VM's catalogue
    catalogue: PathBuf,
    /// The volume
    volume: String,
    /// The new size, or +SIZE or -SIZE to grow or shrink by (suffixes k M G T P E, powers of 1024)
    #[arg(value_name = "[+-]SIZE")]
    size: String,
    /// Allow the volume to become smaller: data past the new end is lost
    #[arg(long)]
    shrink: bool,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    hypervisor: HypervisorArgs,
}

/// Runs the verb.
pub(crate) fn run(args: &Args) -> Outcome {
    let target = Target::parse(&args.size)?;
    let set = args.hypervisor.load(&args.catalogue)?;
    let listing = set.list(false).map_err(explain)?;
    let volume = listing.volumes.iter().find(|volume| volume.name == args.volume);
    let unknown = || explain(Refusal::UnknownVolume { name: args.volume.clone() }.into());
    let size = target.from(volume.ok_or_else(unknown)?.virtual_size)?;
    let report = set.resize(&args.volume, size, args.shrink).map_err(explain)?;
    args.output.report("Volume resized.", &report)
}
