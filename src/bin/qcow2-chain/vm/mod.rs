//! `vm`: snapshots of a VM over all its volumes. One file a verb.

mod bars;
mod changed;
mod delete;
mod drawing;
mod hypervisor;
mod init;
mod list;
mod path;
mod recover;
mod resize;
mod revert;
mod snapshot;
mod table;
mod telling;
mod tree;
mod verify;

use clap::Subcommand;

use crate::failure::Outcome;

/// Snapshots of a virtual machine over all its volumes
///
/// CATALOGUE is a file that remembers the volumes, the snapshots and the file of each. Only its journal and lock lie beside
/// it; new overlays lie beside the files that they stand on. The machine must be off, or
/// run under a libvirt that --connect and --domain name.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand, Debug)]
enum Verb {
    Init(init::Args),
    Snapshot(snapshot::Args),
    Revert(revert::Args),
    Delete(delete::Args),
    Resize(resize::Args),
    List(list::Args),
    Tree(tree::Args),
    Path(path::Args),
    Verify(verify::Args),
    Recover(recover::Args),
    Changed(changed::Args),
}

/// Does what the command line says.
pub(crate) fn run(args: &Args) -> Outcome {
    match &args.verb {
        Verb::Init(args) => init::run(args),
        Verb::Snapshot(args) => snapshot::run(args),
        Verb::Revert(args) => revert::run(args),
        Verb::Delete(args) => delete::run(args),
        Verb::Resize(args) => resize::run(args),
        Verb::List(args) => list::run(args),
        Verb::Tree(args) => tree::run(args),
        Verb::Path(args) => path::run(args),
        Verb::Verify(args) => verify::run(args),
        Verb::Recover(args) => recover::run(args),
        Verb::Changed(args) => changed::run(args),
    }
}
