//! `vm recover`: completes or undoes an interrupted operation.

use std::path::PathBuf;

use qcow2_chain::vm::{Domain, Pending, Recovery, Report, SnapshotSet};
use serde::Serialize;

use super::bars::with_bars;
use super::hypervisor::HypervisorArgs;
use super::outcome::{OutputArgs, explain, released};
use crate::failure::Outcome;

/// Complete or undo an interrupted operation
///
/// If no operation was interrupted, nothing is written. A recovery may itself be interrupted, and
/// run again.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The VM's catalogue
    catalogue: PathBuf,
    /// Print what would be done, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Show the progress, on a terminal for each volume
    #[arg(short, long)]
    progress: bool,
    #[command(flatten)]
    statement: StatementArgs,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    hypervisor: HypervisorArgs,
}

/// The caller's statement about the VM.
#[derive(clap::Args, Debug)]
pub(super) struct StatementArgs {
    /// State that the VM runs, or ran last, on FILE (repeatable, once for each volume in question).
    /// It decides where recovery is uncertain
    #[arg(long, value_name = "FILE")]
    vm_runs_on: Vec<PathBuf>,
}

impl StatementArgs {
    /// Returns the statement, if there is one.
    pub(super) fn domain(&self) -> Option<Domain> {
        let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
        (!self.vm_runs_on.is_empty()).then(|| Domain::stated(self.vm_runs_on.iter().map(absolute)))
    }
}

/// The JSON form of the output.
#[derive(Serialize)]
struct Output<'a> {
    /// `clean`, `undone` or `completed`; with `--dry-run` what recovery would do, or `uncertain`.
    state: &'static str,
    operation: Option<String>,
    report: Option<&'a Report>,
}

/// Runs the verb.
pub(crate) fn run(args: &Args) -> Outcome {
    let set = args.hypervisor.load(&args.catalogue)?;
    if args.dry_run {
        return predict(args, &set);
    }
    let domain = args.statement.domain();
    let done = with_bars(args.progress && !args.output.quiet, |face| match &domain {
        Some(domain) => set.recover_with(domain, face),
        None => set.recover(face),
    });
    print(&args.output, &done.map_err(explain)?)
}

/// Prints the result of a recovery.
pub(super) fn print(output: &OutputArgs, recovery: &Recovery) -> Outcome {
    match recovery {
        Recovery::Clean => output.value("No operation was interrupted.", &Output::new("clean", None, None)),
        Recovery::Undone { operation, released: files, .. } => {
            let text = format!("Undone: {operation}.{}", released(files));
            output.value(&text, &Output::new("undone", Some(operation.clone()), None))
        }
        Recovery::Completed(report) => {
            let line = format!("Completed: {}.", report.purpose);
            if output.json {
                return output.value("", &Output::new("completed", Some(report.purpose.to_string()), Some(report)));
            }
            output.report(&line, report)
        }
        other => output.value(&format!("{other:?}"), &Output::new("completed", None, None)),
    }
}

fn predict(args: &Args, set: &SnapshotSet) -> Outcome {
    let Some(pending) = set.pending().map_err(explain)? else {
        return args.output.value("No operation was interrupted.", &Output::new("clean", None, None));
    };
    let (state, text) = prediction(&pending);
    let operation = pending.operation.map(|purpose| purpose.to_string());
    args.output.value(&text, &Output::new(state, operation, None))
}

/// Returns the state that a recovery would lead to, and its description.
pub(super) fn prediction(pending: &Pending) -> (&'static str, String) {
    let operation = pending.operation.as_ref().map(ToString::to_string);
    let named = operation.as_deref().unwrap_or("an operation that had not changed anything");
    if let Some(reason) = &pending.uncertain {
        return ("uncertain", format!("Uncertain: {named}: {reason}."));
    }
    let state = if pending.completes { "completed" } else { "undone" };
    (state, format!("Would be {state}: {named}."))
}

impl<'a> Output<'a> {
    fn new(state: &'static str, operation: Option<String>, report: Option<&'a Report>) -> Self {
        Self { state, operation, report }
    }
}
