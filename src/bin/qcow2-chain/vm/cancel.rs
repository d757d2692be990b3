//! `vm cancel`: calls off an interrupted deletion.

use std::path::PathBuf;

use super::hypervisor::HypervisorArgs;
use super::outcome::{OutputArgs, explain};
use crate::failure::Outcome;

/// Call off an interrupted deletion that has not changed any file
///
/// The snapshot is ready again. A deletion whose merge has changed a file can only be completed:
/// use vm recover.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The VM's catalogue
    catalogue: PathBuf,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    hypervisor: HypervisorArgs,
}

/// Runs the verb.
pub(crate) fn run(args: &Args) -> Outcome {
    let set = args.hypervisor.load(&args.catalogue)?;
    let report = set.cancel().map_err(explain)?;
    args.output.report(&format!("Called off: {}.", report.purpose), &report)
}
