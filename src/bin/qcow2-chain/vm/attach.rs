//! `vm attach`: attaches a volume.

use std::path::PathBuf;

use qcow2_chain::vm::{AdoptOptions, SnapshotSet};

use super::init::{parse, policy};
use super::outcome::explain;
use super::safety::DependentArgs;
use crate::failure::Outcome;
use crate::options::PolicyArgs;
use crate::output::say;

/// Attach a volume to a VM; snapshots taken before lack it
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The VM's catalogue
    catalogue: PathBuf,
    /// The volume and its image, as in vm init
    #[arg(long, value_name = "NAME=FILE[,KEY=VALUE]")]
    volume: String,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    dependents: DependentArgs,
    #[command(flatten)]
    policy: PolicyArgs,
}

/// Runs the verb.
pub(crate) fn run(args: &Args) -> Outcome {
    args.policy.refuse_probe()?;
    let spec = parse(&args.volume)?;
    let mut options = AdoptOptions::default().with_dependents(args.dependents.search());
    options.policy = policy(&args.policy, std::slice::from_ref(&spec));
    let set = SnapshotSet::load(&args.catalogue).map_err(explain)?;
    set.attach(&spec, &options).map_err(explain)?;
    say(args.quiet, &format!("Volume {} attached.", spec.name))?;
    Ok(0)
}
