//! `vm reconcile`: recovers, then compares the catalogue with files and hypervisor.

use std::fmt::Write as _;
use std::path::PathBuf;

use super::bars::with_bars;
use super::hypervisor::HypervisorArgs;
use super::outcome::{OutputArgs, explain};
use super::recover::{StatementArgs, prediction, print};
use crate::failure::Outcome;
use crate::output::emit;

/// Recover, then report every difference between catalogue, files and hypervisor
///
/// Exit codes: 0 no difference, 1 recovery failed, 2 a difference is left.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The VM's catalogue
    catalogue: PathBuf,
    /// Print what would be done, and change nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    statement: StatementArgs,
    /// Print nothing but differences
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    hypervisor: HypervisorArgs,
}

/// Runs the verb.
pub(crate) fn run(args: &Args) -> Outcome {
    let set = args.hypervisor.load(&args.catalogue)?;
    let domain = args.statement.domain();
    let done = with_bars(false, |face| set.reconcile(domain.as_ref(), args.dry_run, face)).map_err(explain)?;
    match (&done.recovery, &done.pending) {
        (Some(recovery), _) => drop(print(&OutputArgs::new(args.quiet, false), recovery)?),
        (None, Some(pending)) if !args.quiet => emit(&(prediction(pending).1 + "\n"))?,
        _ => {}
    }
    if done.recovery.is_none() && done.pending.is_some() {
        // Before the recovery, differences are expected.
        return Ok(0);
    }
    let mut text = String::new();
    for problem in &done.problems {
        let _ = writeln!(text, "{problem}");
    }
    emit(&text)?;
    Ok(if done.problems.is_empty() { 0 } else { 2 })
}
