//! `vm snapshot`: all volumes are frozen as they are.

use std::path::PathBuf;

use qcow2_chain::vm::SnapshotOptions;

use super::hypervisor::HypervisorArgs;
use super::telling::{TellArgs, explain};
use crate::failure::Outcome;

/// Take a snapshot of all volumes, or of none
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The VM's catalogue
    catalogue: PathBuf,
    /// The snapshot's name
    name: String,
    /// What is to be remembered with it
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    description: String,
    /// Let the guest agent of a running VM bring its file systems in order first
    #[arg(long)]
    quiesce: bool,
    #[command(flatten)]
    tell: TellArgs,
    #[command(flatten)]
    hypervisor: HypervisorArgs,
}

/// Does it.
pub(crate) fn run(args: &Args) -> Outcome {
    let set = args.hypervisor.load(&args.catalogue)?;
    let options = SnapshotOptions::default().with_description(&args.description).with_quiesce(args.quiesce);
    let report = set.create(&args.name, &options).map_err(explain)?;
    args.tell.tell(&format!("Snapshot {} taken.", args.name), &report)
}
