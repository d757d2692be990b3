//! The output of the verbs: reports, errors, and their remedies.

use std::fmt::Write as _;

use qcow2_chain::storage;
use qcow2_chain::vm::{Error, Refusal, Released, Report};
use serde::Serialize;

use crate::failure::{Failure, Outcome};
use crate::open;
use crate::output::{emit, emit_after};

/// The form of a verb's output.
#[derive(clap::Args, Debug)]
pub(super) struct OutputArgs {
    /// Print nothing
    #[arg(short, long)]
    pub quiet: bool,
    /// Print the report as JSON
    #[arg(long)]
    pub json: bool,
}

impl OutputArgs {
    pub(super) fn new(quiet: bool, json: bool) -> Self {
        Self { quiet, json }
    }

    /// Prints a line and the changes of files and sizes, or the whole report as JSON.
    pub(super) fn report(&self, line: &str, report: &Report) -> Outcome {
        let mut text = line.to_owned();
        for change in &report.resized {
            let _ = write!(text, "\n  {}: {} bytes, was {}", change.volume, change.new, change.old);
        }
        for (volume, path) in &report.paths {
            let _ = write!(text, "\n  {volume}: the active file is {}", path.display());
        }
        for path in &report.removed {
            let _ = write!(text, "\n  removed {}", path.display());
        }
        text.push_str(&released(&report.released));
        for (volume, merged) in &report.merged {
            for bitmap in &merged.bitmaps_invalidated {
                let _ = write!(text, "\n  {volume}: bitmap {bitmap} is inconsistent now");
            }
        }
        self.value(&text, report)
    }

    /// Prints a text, or a value as JSON.
    pub(super) fn value(&self, text: &str, value: &impl Serialize) -> Outcome {
        let text = if self.json {
            serde_json::to_string_pretty(value).map_err(Failure::from)?
        } else if self.quiet {
            return Ok(0);
        } else {
            text.to_owned()
        };
        emit_after(&(text + "\n"))?;
        Ok(0)
    }
}

/// Returns the lines about files that left the set and were not removed.
pub(super) fn released(files: &[Released]) -> String {
    let mut text = String::new();
    for file in files {
        let _ = write!(text, "\n  released {}: {}", file.path.display(), file.reason);
    }
    text
}

/// Prints a value as JSON.
pub(super) fn json(value: &impl Serialize) -> Outcome {
    let text = serde_json::to_string_pretty(value).map_err(Failure::from)?;
    emit(&(text + "\n"))?;
    Ok(0)
}

/// Returns the failure for an error, with the remedy.
pub(super) fn explain(error: Error) -> Failure {
    if error.is_cancelled() {
        let state = "cancelled: the VM can be started; volumes that are done are recorded";
        let hint =
            "Run the same command again, or vm recover, to complete it; vm cancel calls it off while nothing is merged";
        return Failure::new(state).with_hint(hint).with_code(130);
    }
    if error.is_uncertain() {
        let hint = "Do not start the VM before this is settled. Use vm recover with --connect and --domain, or state the \
                    file that the VM ran on last: vm recover CATALOGUE --vm-runs-on FILE";
        return Failure::from(error).with_hint(hint);
    }
    let hint = match &error {
        Error::Chain(_) => match error {
            Error::Chain(error) => return open::explain(error),
            other => return Failure::from(other),
        },
        Error::Incomplete { .. } => "The VM can be started. Run the same command again, or vm recover, to complete it",
        Error::Refused(refusal) => match hint(refusal) {
            Some(hint) => hint,
            None => return Failure::from(error),
        },
        Error::Storage(storage::Error::Attribute { .. }) => {
            "Run the command as a user who may set it, or accept its loss with --ignore-attributes"
        }
        _ => return Failure::from(error),
    };
    Failure::from(error).with_hint(hint)
}

/// Returns the remedy for a refusal, as a command or an option.
fn hint(refusal: &Refusal) -> Option<&'static str> {
    Some(match refusal {
        Refusal::Unfinished { .. } => "Use vm recover to complete or undo it; the VM can be started meanwhile",
        Refusal::NotReady { .. } => "Use vm list --all to list all snapshots, vm recover to complete a deletion",
        Refusal::UnknownSnapshot { .. } | Refusal::UnknownVolume { .. } => "Use vm list to list snapshots and volumes",
        Refusal::Shrinks { .. } => "Use --shrink to allow that: data past the new end is lost",
        Refusal::Locked { .. } => "Try again when it has ended",
        Refusal::InUse { .. } => {
            "Stop the VM, or the program that has the file open, first; if the VM runs under libvirt, use --connect URI \
             --domain NAME"
        }
        Refusal::WrongFile { .. } => "Use vm path CATALOGUE VOLUME to print the active file",
        Refusal::Depth { .. } => "Delete a snapshot first",
        Refusal::WouldLose { .. } => "Use --drop NAME, once for each of them",
        Refusal::Lost { .. } => "Use --discard-lost to confirm that",
        Refusal::LacksVolumes { .. } => "Use --detach-missing to confirm that",
        Refusal::Dependents { .. } => "Use --no-dependents to pass over images that are of no interest",
        Refusal::BlockDevice { .. } => "Use --volume NAME=FILE,overlay_dir=DIR",
        Refusal::BaseChanged { .. } => "Use vm accept-base CATALOGUE FILE if its content is right",
        Refusal::NotCancellable { .. } => "Use vm recover to complete or undo what was interrupted",
        _ => return None,
    })
}
