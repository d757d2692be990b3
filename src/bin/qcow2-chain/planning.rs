//! What the verbs that merge have in common beyond qemu-img: a look beforehand, a limit, and what a cancelled merge leaves.

use std::fmt::Display;

use qcow2_chain::chain::{Chain, Layer, Node};
use qcow2_chain::merge::{self, Report};

use crate::failure::{Failure, Outcome};
use crate::interrupt::report;
use crate::json::Json;
use crate::output::{Form, emit, say};
use crate::size;

/// Options of verbs that merge.
#[derive(clap::Args, Debug)]
pub(crate) struct MergeArgs {
    /// Tell what would be done, and do nothing
    #[arg(long)]
    pub dry_run: bool,
    /// The form of what is told: of a plan, and of what was done
    #[arg(long, value_enum, default_value = "human")]
    output: Form,
    /// The same as --output json
    #[arg(long)]
    json: bool,
    /// Copy at most RATE bytes a second (suffixes k, M, G, T)
    #[arg(long, value_name = "RATE")]
    rate_limit: Option<String>,
}

impl MergeArgs {
    /// The limit in bytes a second.
    pub(crate) fn rate(&self) -> Result<Option<u64>, Failure> {
        let parse =
            |text: &String| size::parse(text).ok_or_else(|| Failure::new(format!("Invalid rate limit: {text}")));
        self.rate_limit.as_ref().map(parse).transpose()
    }

    /// Prints a plan.
    pub(crate) fn show<P: serde::Serialize + Display>(&self, plan: &P) -> Result<(), Failure> {
        if self.wants_json() {
            let text = serde_json::to_string_pretty(plan).map_err(Failure::from)?;
            return emit(&(text + "\n"));
        }
        emit(&plan.to_string())
    }

    /// Whether JSON is wanted.
    pub(crate) fn wants_json(&self) -> bool {
        self.json || self.output == Form::Json
    }

    /// Says that a merge is done: in one line, if there is one and the user does not want quiet; in JSON all that it did.
    pub(crate) fn tell(&self, quiet: bool, line: &str, operation: &'static str, report: &Report) -> Outcome {
        if !self.wants_json() {
            say(quiet || line.is_empty(), line)?;
            return Ok(0);
        }
        let bitmaps = report.bitmaps_invalidated.iter().map(|name| Json::from(name.as_str())).collect();
        let report = Json::Object(vec![
            ("operation", operation.into()),
            ("copied", report.copied.into()),
            ("copied-in-kernel", report.copied_in_kernel.into()),
            ("zeroed", report.zeroed.into()),
            ("compared", report.compared.into()),
            ("dropped", report.dropped.into()),
            ("compressed", report.compressed.into()),
            ("bitmaps-invalidated", Json::List(bitmaps)),
        ]);
        emit(&(report.pretty() + "\n"))?;
        Ok(0)
    }
}

/// Warns of internal snapshots that a merge will falsify; as qemu-img, it is done nevertheless.
pub(crate) fn warn_of_snapshots(layers: &[Layer]) -> Result<(), Failure> {
    for layer in layers {
        if let Node::Qcow2(image) = &layer.node
            && !image.snapshots()?.is_empty()
        {
            let file = layer.path.display();
            report(&format!(
                "qcow2-chain: warning: {file} has internal snapshots; where they hold nothing themselves they show what \
                 lies beneath, which changes"
            ));
        }
    }
    Ok(())
}

/// The failure of a merge; of a cancelled one it says what it left.
pub(crate) fn explain(error: merge::Error, chain: &Chain, receiver: usize) -> Failure {
    if !matches!(error, merge::Error::Cancelled) {
        return Failure::from(error);
    }
    let layers = chain.layers();
    let name = |index: usize| layers.get(index).map_or_else(String::new, |layer| layer.path.display().to_string());
    let state = match receiver {
        0 => format!("{} reads as before and still stands on its old backing file", name(0)),
        base => format!(
            "{} reads as before; {} may hold a part of what is above it and must not be used by itself",
            name(0),
            name(base)
        ),
    };
    cancelled(&state)
}

/// The failure of a merge that was cancelled and can be completed.
pub(crate) fn cancelled(state: &str) -> Failure {
    let hint = "The same command again completes the merge";
    Failure::new(format!("cancelled: {state}")).with_hint(hint).with_code(130)
}
