//! `vm tree`: draws snapshots and files.

use std::path::PathBuf;

use qcow2_chain::vm::SnapshotSet;

use super::drawing::draw;
use super::outcome::explain;
use crate::failure::Outcome;
use crate::output::emit;

/// Draw snapshots, files and their backing order
///
/// The line on the left is the chain that the VM reads, from its oldest file to the active ones;
/// other branches are indented. ○ is a snapshot, ● the current one, ◌ a hidden one, ◐ one whose
/// deletion was interrupted.
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
