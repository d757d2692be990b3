//! `vm tree`: snapshots and files, drawn.

use std::path::PathBuf;

use qcow2_chain::vm::SnapshotSet;

use super::drawing::draw;
use super::outcome::explain;
use crate::failure::Outcome;
use crate::output::emit;

/// Draw the snapshots, their files, and what stands on what
///
/// The line down the left side is what the VM reads, from its oldest file to those that it writes; other branches are
/// indented. ○ is a snapshot, ● the current one, ◌ a hidden one, ◐ one whose deletion was interrupted.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The VM's catalogue
    catalogue: PathBuf,
}

/// Runs the verb.
pub(crate) fn run(args: &Args) -> Outcome {
    let set = SnapshotSet::load(&args.catalogue).map_err(explain)?;
    let model = set.model().map_err(explain)?;
    emit(&draw(&model, set.files()))?;
    Ok(0)
}
