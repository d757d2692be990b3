//! The command line program: qemu-img's verbs, option letters, exit codes and output, over the
//! library's public API.
#![deny(unsafe_code)]
#![warn(missing_docs, clippy::all, clippy::pedantic, clippy::unwrap_used, clippy::dbg_macro)]

mod chain;
mod check;
mod cli;
mod commit;
mod compare;
mod convert;
mod create;
mod dump;
mod dump_tables;
mod failure;
mod info;
mod info_text;
mod interrupt;
mod json;
mod layout;
mod luks;
mod map;
mod measure;
mod open;
mod options;
mod output;
mod planning;
mod preallocated;
mod progress;
mod pull;
mod rebase;
mod resize;
mod settings;
mod size;
mod snapshot;
mod thin;
mod vm;
mod zone;

use std::process::ExitCode;

fn main() -> ExitCode {
    interrupt::block();
    match cli::run(std::env::args_os().collect()) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            interrupt::report(&format!("qcow2-chain: {failure}"));
            ExitCode::from(failure.code)
        }
    }
}
