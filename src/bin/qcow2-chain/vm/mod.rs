//! `vm`: snapshots of a VM over all of its volumes. One file per verb.

mod accept_base;
mod attach;
mod bars;
mod cancel;
mod changed;
mod delete;
mod detach;
mod drawing;
mod hypervisor;
mod init;
mod list;
mod outcome;
mod path;
mod reconcile;
mod recover;
mod resize;
mod revert;
mod safety;
mod snapshot;
mod table;
mod tree;
mod verify;

use clap::Subcommand;

use crate::failure::Outcome;

/// Snapshots of a virtual machine over all of its volumes
///
/// CATALOGUE is a file that records the volumes, the snapshots and the files of each. Its journal
/// and its lock are beside it. New overlays are created beside the active files, or in the
/// directory that the volume names. The machine must be stopped, or run under a libvirt that
/// --connect and --domain name.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand, Debug)]
enum Verb {
    Init(init::Args),
    Attach(attach::Args),
    Detach(detach::Args),
    AcceptBase(accept_base::Args),
    Snapshot(snapshot::Args),
    Revert(revert::Args),
    Delete(delete::Args),
    Resize(resize::Args),
    List(list::Args),
    Tree(tree::Args),
    Path(path::Args),
    Verify(verify::Args),
    Recover(recover::Args),
    Reconcile(reconcile::Args),
    Cancel(cancel::Args),
    Changed(changed::Args),
}

/// Runs the verb of the command line.
pub(crate) fn run(args: &Args) -> Outcome {
    match &args.verb {
        Verb::Init(args) => init::run(args),
        Verb::Attach(args) => attach::run(args),
        Verb::Detach(args) => detach::run(args),
        Verb::AcceptBase(args) => accept_base::run(args),
        Verb::Snapshot(args) => snapshot::run(args),
        Verb::Revert(args) => revert::run(args),
        Verb::Delete(args) => delete::run(args),
        Verb::Resize(args) => resize::run(args),
        Verb::List(args) => list::run(args),
        Verb::Tree(args) => tree::run(args),
        Verb::Path(args) => path::run(args),
        Verb::Verify(args) => verify::run(args),
        Verb::Recover(args) => recover::run(args),
        Verb::Reconcile(args) => reconcile::run(args),
        Verb::Cancel(args) => cancel::run(args),
        Verb::Changed(args) => changed::run(args),
    }
}
