//! `vm recover`: what was interrupted is completed or undone.

use std::path::PathBuf;

use qcow2_chain::vm::{Recovery, Report, SnapshotSet};
use serde::Serialize;

use super::bars::with_bars;
use super::hypervisor::HypervisorArgs;
use super::telling::{TellArgs, explain};
use crate::failure::Outcome;

/// Complete or undo what was interrupted
///
/// Where nothing was, nothing is written. It may itself be interrupted, and run again.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The VM's catalogue
    catalogue: PathBuf,
    /// Tell what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// Show how far it is, each volume by itself on a terminal
    #[arg(short, long)]
    progress: bool,
    #[command(flatten)]
    tell: TellArgs,
    #[command(flatten)]
    hypervisor: HypervisorArgs,
}

/// What is told as JSON.
#[derive(Serialize)]
struct Told<'a> {
    /// `clean`, `undone` or `completed`; with `--dry-run` what would become of it.
    state: &'static str,
    operation: Option<String>,
    report: Option<&'a Report>,
}

/// Does it.
pub(crate) fn run(args: &Args) -> Outcome {
    let set = args.hypervisor.load(&args.catalogue)?;
    if args.dry_run {
        return foretell(args, &set);
    }
    let done = with_bars(args.progress && !args.tell.quiet, |face| set.recover(face)).map_err(explain)?;
    match &done {
        Recovery::Clean => args.tell.value("Nothing was interrupted.", &Told::new("clean", None, None)),
        Recovery::Undone(operation) => {
            args.tell.value(&format!("Undone: {operation}."), &Told::new("undone", Some(operation.clone()), None))
        }
        Recovery::Completed(report) => {
            let line = format!("Completed: {}.", report.purpose);
            if args.tell.json {
                return args.tell.value("", &Told::new("completed", Some(report.purpose.to_string()), Some(report)));
            }
            args.tell.tell(&line, report)
        }
        other => args.tell.value(&format!("{other:?}"), &Told::new("completed", None, None)),
    }
}

fn foretell(args: &Args, set: &SnapshotSet) -> Outcome {
    let Some(pending) = set.pending().map_err(explain)? else {
        return args.tell.value("Nothing was interrupted.", &Told::new("clean", None, None));
    };
    let state = if pending.completes { "completed" } else { "undone" };
    let operation = pending.operation.map(|purpose| purpose.to_string());
    let named = operation.as_deref().unwrap_or("an operation that had not changed anything");
    args.tell.value(&format!("Would be {state}: {named}."), &Told::new(state, operation.clone(), None))
}

impl<'a> Told<'a> {
    fn new(state: &'static str, operation: Option<String>, report: Option<&'a Report>) -> Self {
        Self { state, operation, report }
    }
}
