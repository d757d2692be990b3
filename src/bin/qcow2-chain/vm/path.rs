//! `vm path`: prints the path of a volume's file.

use std::path::PathBuf;

use qcow2_chain::vm::SnapshotSet;

use super::outcome::explain;
use crate::failure::Outcome;
use crate::output::emit_bytes;

/// Print the path of a volume's active file, or of a snapshot's file
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The VM's catalogue
    catalogue: PathBuf,
    /// The volume
    volume: String,
    /// Print the path of this snapshot's file
    #[arg(long, value_name = "NAME")]
    snapshot: Option<String>,
}

/// Runs the verb.
pub(crate) fn run(args: &Args) -> Outcome {
    let set = SnapshotSet::load(&args.catalogue).map_err(explain)?;
    let path = match &args.snapshot {
        Some(snapshot) => set.snapshot_path(snapshot, &args.volume),
        None => set.active_path(&args.volume),
    };
    let mut line = path.map_err(explain)?.into_os_string();
    line.push("\n");
    emit_bytes(line.as_encoded_bytes())?;
    Ok(0)
}
