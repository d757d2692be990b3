//! `chain`: an image and all that it is over, drawn.

use std::path::PathBuf;

use crate::failure::{Failure, Outcome};
use crate::open;
use crate::options::{PolicyArgs, looking};
use crate::output::{Form, emit};

/// Draw a chain: each layer with its size, its format, what it holds and how much of that is seen from the top
#[derive(clap::Args, Debug)]
#[command(args_override_self = true)]
pub(crate) struct Args {
    /// The image's format (qcow2 or raw)
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Take no locks: look at images that another program holds
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The form of the output
    #[arg(long, value_enum, default_value = "human")]
    output: Form,
    #[command(flatten)]
    policy: PolicyArgs,
    /// The image at the top
    file: PathBuf,
}

/// Does it.
pub(crate) fn run(args: &Args) -> Outcome {
    let chain = open::chain(&args.file, args.format.as_deref(), looking(args.force_share), &args.policy)?;
    let description = chain.describe()?;
    match args.output {
        Form::Human => emit(&description.to_string())?,
        Form::Json => {
            let text = serde_json::to_string_pretty(&description).map_err(Failure::from)?;
            emit(&(text + "\n"))?;
        }
    }
    Ok(0)
}
