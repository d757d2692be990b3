//! `vm accept-base`: records the present fingerprint of a base.

use std::path::PathBuf;

use qcow2_chain::vm::SnapshotSet;

use super::outcome::explain;
use crate::failure::Outcome;
use crate::output::say;

/// State that the content of a base is right, after it was moved, copied or changed
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The VM's catalogue
    catalogue: PathBuf,
    /// The base
    file: PathBuf,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
}

/// Runs the verb.
pub(crate) fn run(args: &Args) -> Outcome {
    let set = SnapshotSet::load(&args.catalogue).map_err(explain)?;
    set.accept_base(&args.file).map_err(explain)?;
    say(args.quiet, &format!("{}: accepted as it is now.", args.file.display()))?;
    Ok(0)
}
