//! What the verbs say: of what they did, and of what they could not do.

use std::fmt::Write as _;

use qcow2_chain::vm::{Error, Refusal, Report};
use serde::Serialize;

use crate::failure::{Failure, Outcome};
use crate::open;
use crate::output::{emit, say};

/// How a verb tells what it did.
#[derive(clap::Args, Debug)]
pub(super) struct TellArgs {
    /// Say nothing
    #[arg(short, long)]
    pub quiet: bool,
    /// Tell what was done as JSON
    #[arg(long)]
    pub json: bool,
}

impl TellArgs {
    pub(super) fn new(quiet: bool, json: bool) -> Self {
        Self { quiet, json }
    }

    /// Says what was done: a line, and what became of files and sizes; or all of it as JSON.
    pub(super) fn tell(&self, line: &str, report: &Report) -> Outcome {
        let mut text = line.to_owned();
        for change in &report.resized {
            let _ = write!(text, "\n  {}: {} bytes, was {}", change.volume, change.new, change.old);
        }
        for change in &report.moved {
            let _ = write!(text, "\n  {}: the VM writes {}", change.volume, change.new.display());
        }
        for path in &report.removed {
            let _ = write!(text, "\n  removed {}", path.display());
        }
        for (volume, merged) in &report.merged {
            for bitmap in &merged.bitmaps_invalidated {
                let _ = write!(text, "\n  {volume}: bitmap {bitmap} is stale");
            }
        }
        self.value(&text, report)
    }

    /// Says a text, or a value as JSON.
    pub(super) fn value(&self, text: &str, value: &impl Serialize) -> Outcome {
        if self.json {
            return json(value);
        }
        say(self.quiet, text)?;
        Ok(0)
    }
}

/// Prints a value as JSON.
pub(super) fn json(value: &impl Serialize) -> Outcome {
    let text = serde_json::to_string_pretty(value).map_err(Failure::from)?;
    emit(&(text + "\n"))?;
    Ok(0)
}

/// The failure, and what to do about it.
pub(super) fn explain(error: Error) -> Failure {
    if error.is_cancelled() {
        let state = "cancelled: the VM can be started; the volumes that are done are recorded";
        return Failure::new(state).with_hint("The same command again, or vm recover, goes on").with_code(130);
    }
    let hint = match &error {
        Error::Chain(_) => match error {
            Error::Chain(error) => return open::explain(error),
            other => return Failure::from(other),
        },
        Error::Incomplete { .. } => "The VM can be started. The same command again, or vm recover, goes on",
        Error::Refused(refusal) => match refusal {
            Refusal::Unfinished { .. } => "Use vm recover to complete or undo it; the VM can be started meanwhile",
            Refusal::NotReady { .. } => "Use vm list --all to see all snapshots, vm recover to complete a deletion",
            Refusal::UnknownSnapshot { .. } | Refusal::UnknownVolume { .. } => "Use vm list to see what there is",
            Refusal::Shrinks { .. } => "Use --shrink to allow that: what lies behind the new end is lost",
            Refusal::Locked { .. } => "Try again when it is done",
            Refusal::InUse { .. } => {
                "Stop the VM, or whatever has it open, first; a VM that runs under libvirt is reached with --connect URI \
                 --domain NAME"
            }
            Refusal::Depth { .. } => "Delete a snapshot first",
            _ => return Failure::from(error),
        },
        Error::Uncertain { .. } => "Use vm recover with --connect and --domain when the hypervisor answers",
        _ => return Failure::from(error),
    };
    Failure::from(error).with_hint(hint)
}
