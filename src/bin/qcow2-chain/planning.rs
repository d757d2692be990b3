//! What the verbs that merge have in common beyond qemu-img: a look beforehand, a limit, and what a cancelled merge leaves.

use qcow2_chain::chain::{Chain, Layer, Node};
use qcow2_chain::merge::{self, MergePlan};

use crate::failure::Failure;
use crate::output::{Form, emit};
use crate::size;

/// Options of verbs that merge.
#[derive(clap::Args, Debug)]
pub(crate) struct MergeArgs {
    /// Tell what would be done, and do nothing
    #[arg(long)]
    pub dry_run: bool,
    /// The form of what --dry-run tells
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
    pub(crate) fn show(&self, plan: &MergePlan) -> Result<(), Failure> {
        if self.json || self.output == Form::Json {
            let text = serde_json::to_string_pretty(plan).map_err(Failure::from)?;
            return emit(&(text + "\n"));
        }
        emit(&plan.to_string())
    }
}

/// Warns of internal snapshots that a merge will falsify; as qemu-img, it is done nevertheless.
pub(crate) fn warn_of_snapshots(layers: &[Layer]) -> Result<(), Failure> {
    for layer in layers {
        if let Node::Qcow2(image) = &layer.node
            && !image.snapshots()?.is_empty()
        {
            let file = layer.path.display();
            eprintln!(
                "qcow2-chain: warning: {file} has internal snapshots; where they hold nothing themselves they show what \
                 lies beneath, which changes"
            );
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
    let hint = "The same command again completes the merge";
    Failure::new(format!("cancelled: {state}")).with_hint(hint).with_code(130)
}
