//! `vm delete`: deletes a snapshot.

use std::path::PathBuf;

use qcow2_chain::vm::{MergeOptions, MergePreference, Request, State};

use super::bars::with_bars;
use super::hypervisor::HypervisorArgs;
use super::outcome::{OutputArgs, explain};
use super::safety::LossArgs;
use crate::failure::Outcome;
use crate::planning::MergeArgs;

/// Delete a snapshot
///
/// Without dependents, its files are removed. With one dependent, they are merged with it. With
/// several, the snapshot is hidden until one is left. The VM can be started after any interruption,
/// and the same command resumes the deletion.
///
/// A merge writes the lower file (commit), or the upper one (pull). The file that is written keeps
/// its path and its format; the other one is removed, or released if it may not be removed.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The VM's catalogue
    catalogue: PathBuf,
    /// The snapshot
    name: String,
    /// Direction of the merge. By default commit, and pull where the lower file may not be written
    #[arg(long, value_enum)]
    direction: Option<MergeDirection>,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// Show the progress, on a terminal for each volume
    #[arg(short, long)]
    progress: bool,
    #[command(flatten)]
    loss: LossArgs,
    #[command(flatten)]
    merge: MergeArgs,
    #[command(flatten)]
    hypervisor: HypervisorArgs,
}

/// The values of `--direction`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum MergeDirection {
    /// Write the data of the upper file into the lower one, or refuse.
    Commit,
    /// Write the data of the lower file into the upper one, or refuse.
    Pull,
    /// Choose the direction that moves less data.
    Auto,
}

impl From<MergeDirection> for MergePreference {
    fn from(direction: MergeDirection) -> Self {
        match direction {
            MergeDirection::Commit => Self::Commit,
            MergeDirection::Pull => Self::Pull,
            MergeDirection::Auto => Self::Auto,
        }
    }
}

/// Runs the verb.
pub(crate) fn run(args: &Args) -> Outcome {
    let set = args.hypervisor.load(&args.catalogue)?;
    let direction = args.direction.map(MergePreference::from).unwrap_or_default();
    let options = MergeOptions::default().with_direction(direction).with_rate_limit(args.merge.rate()?);
    let options = args.loss.apply(options);
    if args.merge.dry_run {
        let plan = set.plan(&Request::Delete { name: args.name.clone() }, &options).map_err(explain)?;
        args.merge.show(&plan)?;
        return Ok(0);
    }
    let done = with_bars(args.progress && !args.quiet, |face| set.delete(&args.name, &options, face));
    let report = done.map_err(explain)?;
    let line = match report.state {
        Some(State::Hidden) => format!("Snapshot {} hidden: several files depend on it.", args.name),
        _ => format!("Snapshot {} deleted.", args.name),
    };
    OutputArgs::new(args.quiet, args.merge.wants_json()).report(&line, &report)
}
