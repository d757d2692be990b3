//! `vm detach`: detaches a volume.

use std::path::PathBuf;

use qcow2_chain::vm::SnapshotSet;

use super::outcome::{explain, released};
use crate::failure::Outcome;
use crate::output::say;

/// Detach a volume from a VM; its file stays, and snapshots keep theirs
///
/// The file may be missing, so that a lost volume does not block the others. A revert to a snapshot
/// that has the volume attaches it again.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The VM's catalogue
    catalogue: PathBuf,
    /// The volume
    volume: String,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
}

/// Runs the verb.
pub(crate) fn run(args: &Args) -> Outcome {
    let set = SnapshotSet::load(&args.catalogue).map_err(explain)?;
    let file = set.detach(&args.volume).map_err(explain)?;
    say(args.quiet, &format!("Volume {} detached.{}", args.volume, released(&[file])))?;
    Ok(0)
}
