//! The command line: parses it and runs the verb.

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Parser, Subcommand};

use crate::failure::{Failure, Outcome};
use crate::output::emit;
use crate::{
    chain, check, commit, compare, convert, create, dump, info, interrupt, map, measure, pull, rebase, resize, vm,
};

/// qcow2 images and chains of overlays, without QEMU
///
/// The verbs, options, exit codes and output of qemu-img, so that a script can swap the program's
/// name. Two things are stricter: the format of a file is never guessed (without -f it must be
/// qcow2; say -f raw for a raw image), and the backing file that an image names is followed only
/// below that image's directory, unless --allow DIR or --allow-any says otherwise.
#[derive(Parser, Debug)]
#[command(name = "qcow2-chain", version, infer_long_args = true, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

/// The verbs; each has a file of its own.
#[derive(Subcommand, Debug)]
enum Verb {
    Info(info::Args),
    Create(create::Args),
    Map(map::Args),
    Check(check::Args),
    Compare(compare::Args),
    Commit(commit::Args),
    Rebase(rebase::Args),
    Pull(pull::Args),
    Convert(convert::Args),
    Measure(measure::Args),
    Resize(resize::Args),
    Chain(chain::Args),
    Dump(dump::Args),
    Vm(vm::Args),
}

impl Verb {
    /// Returns true for verbs that stop where the chain is whole when a signal asks them.
    fn can_be_stopped(&self) -> bool {
        match self {
            Self::Compare(_) | Self::Commit(_) | Self::Rebase(_) | Self::Pull(_) | Self::Convert(_) | Self::Vm(_) => {
                true
            }
            Self::Info(_)
            | Self::Create(_)
            | Self::Map(_)
            | Self::Check(_)
            | Self::Measure(_)
            | Self::Resize(_)
            | Self::Chain(_)
            | Self::Dump(_) => false,
        }
    }
}

/// Parses the command line and runs its verb.
pub(crate) fn run(mut args: Vec<OsString>) -> Outcome {
    // A size such as -512M is the last argument of `resize`, not an option.
    if args.get(1).is_some_and(|verb| verb == "resize") && args.len() > 3 {
        let size = args.last().is_some_and(|last| last.to_str().is_some_and(resize::is_shrinking_size));
        if size && !args.iter().any(|arg| arg == "--") {
            args.insert(args.len() - 1, "--".into());
        }
    }
    if args.get(1).is_some_and(|verb| verb == "vm") && args.get(2).is_some_and(|verb| verb == "resize") {
        let size = args.iter().position(|arg| arg.to_str().is_some_and(resize::is_shrinking_size));
        if let Some(at) = size.filter(|_| !args.iter().any(|arg| arg == "--")) {
            let size = args.remove(at);
            args.extend(["--".into(), size]);
        }
    }
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => return refuse(&error),
    };
    if cli.verb.can_be_stopped() {
        interrupt::receive();
    } else {
        interrupt::unblock();
    }
    match cli.verb {
        Verb::Info(args) => info::run(&args),
        Verb::Create(args) => create::run(&args),
        Verb::Map(args) => map::run(&args),
        Verb::Check(args) => check::run(&args),
        Verb::Compare(args) => compare::run(&args),
        Verb::Commit(args) => commit::run(&args),
        Verb::Rebase(args) => rebase::run(&args),
        Verb::Pull(args) => pull::run(&args),
        Verb::Convert(args) => convert::run(&args),
        Verb::Measure(args) => measure::run(&args),
        Verb::Resize(args) => resize::run(&args),
        Verb::Chain(args) => chain::run(&args),
        Verb::Dump(args) => dump::run(&args),
        Verb::Vm(args) => vm::run(&args),
    }
}

/// Verbs of qemu-img that this program does not have.
const UNSERVED: &[&str] = &["amend", "bench", "bitmap", "dd", "snapshot"];

/// Prints help and version, and converts all other errors to a failure with qemu-img's exit code.
fn refuse(error: &clap::Error) -> Outcome {
    if let (ErrorKind::InvalidSubcommand, Some(ContextValue::String(verb))) =
        (error.kind(), error.get(ContextKind::InvalidSubcommand))
        && UNSERVED.contains(&verb.as_str())
    {
        return Err(Failure::unserved(verb, &format!("qemu-img {verb}")));
    }
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        emit(&error.render().to_string())?;
        return Ok(0);
    }
    let text = error.render().to_string();
    Err(Failure::new(text.trim_start_matches("error: ").trim_end()))
}
