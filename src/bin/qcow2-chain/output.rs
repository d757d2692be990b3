//! Standard output. A reader that went away (`| head`) ends the program quietly instead of with a panic.

use std::io::{ErrorKind, Write as _, stdout};

use crate::failure::Failure;

/// The two forms of `--output`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Form {
    /// For people.
    Human,
    /// For programs.
    Json,
}

/// Writes text as it is.
pub(crate) fn emit(text: &str) -> Result<(), Failure> {
    emit_bytes(text.as_bytes())
}

/// Writes bytes as they are, for paths that are not valid UTF-8.
pub(crate) fn emit_bytes(bytes: &[u8]) -> Result<(), Failure> {
    let mut out = stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::new(format!("cannot write to standard output: {error}")))
        }
        Err(_) => std::process::exit(1),
        Ok(()) => Ok(()),
    }
}

/// Writes text about an operation that is complete. A reader that has gone away does not turn it into a failure.
pub(crate) fn emit_after(text: &str) -> Result<(), Failure> {
    let mut out = stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            let text = text.trim_end();
            let what = "the operation is complete, but standard output cannot be written";
            Err(Failure::new(format!("{what}: {error}\n{text}")))
        }
        _ => Ok(()),
    }
}

/// Writes a line, unless the user wants quiet.
pub(crate) fn say(quiet: bool, line: &str) -> Result<(), Failure> {
    if quiet { Ok(()) } else { emit(&format!("{line}\n")) }
}
