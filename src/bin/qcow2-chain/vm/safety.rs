//! Options about images outside the set, and about what an operation may destroy.

use std::path::PathBuf;

use qcow2_chain::chain::DependentSearch;
use qcow2_chain::vm::MergeOptions;

/// The search for images that depend on the files of the set.
#[derive(clap::Args, Debug)]
pub(super) struct DependentArgs {
    /// Search DIR too for images that are backed by the files of the VM (repeatable). The
    /// directories of the files are always searched
    #[arg(long, value_name = "DIR", conflicts_with = "no_dependents")]
    dependents_in: Vec<PathBuf>,
    /// Do not search for images that are backed by the files of the VM: such images may be
    /// destroyed
    #[arg(long)]
    no_dependents: bool,
}

impl DependentArgs {
    pub(super) fn search(&self) -> DependentSearch {
        if self.no_dependents {
            return DependentSearch::disabled();
        }
        self.dependents_in.iter().fold(DependentSearch::default(), DependentSearch::with_directory)
    }
}

/// Permissions for an operation that removes files.
#[derive(clap::Args, Debug)]
pub(super) struct LossArgs {
    /// Allow the internal snapshot or bitmap NAME to be destroyed (repeatable)
    #[arg(long, value_name = "NAME")]
    drop: Vec<String>,
    /// Proceed although a file that is to be discarded is missing or damaged
    #[arg(long)]
    discard_lost: bool,
    #[command(flatten)]
    dependents: DependentArgs,
}

impl LossArgs {
    /// Adds the permissions to options.
    pub(super) fn apply(&self, options: MergeOptions) -> MergeOptions {
        let options = self.drop.iter().fold(options, MergeOptions::with_drop);
        options.with_discard_lost(self.discard_lost).with_dependents(self.dependents.search())
    }
}
