//! `vm snapshot`: creates a snapshot.

use std::path::PathBuf;

use qcow2_chain::vm::SnapshotOptions;

use super::hypervisor::HypervisorArgs;
use super::outcome::{OutputArgs, explain};
use crate::failure::Outcome;

/// Create a snapshot of all volumes, or of none
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The VM's catalogue
    catalogue: PathBuf,
    /// The snapshot's name
    name: String,
    /// A description, kept in the catalogue
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    description: String,
    /// Let the guest agent of a running VM flush and freeze its file systems first
    #[arg(long)]
    quiesce: bool,
    /// Accept overlays without attributes of the active file that may not be set (owner, ACL,
    /// label)
    #[arg(long)]
    ignore_attributes: bool,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    hypervisor: HypervisorArgs,
}

/// Runs the verb.
pub(crate) fn run(args: &Args) -> Outcome {
    let set = args.hypervisor.load(&args.catalogue)?;
    let options = SnapshotOptions::default()
        .with_description(&args.description)
        .with_quiesce(args.quiesce)
        .with_ignore_attributes(args.ignore_attributes);
    let report = set.create(&args.name, &options).map_err(explain)?;
    args.output.report(&format!("Snapshot {} created.", args.name), &report)
}
