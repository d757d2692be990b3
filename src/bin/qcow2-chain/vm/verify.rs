//! `vm verify`: compares the catalogue with headers, directories and hypervisor.

use std::fmt::Write as _;
use std::path::PathBuf;

use qcow2_chain::vm::{ProblemKind, VerifyOptions};

use super::bars::with_bars;
use super::hypervisor::HypervisorArgs;
use super::outcome::{explain, json};
use super::table::counted;
use crate::failure::Outcome;
use crate::output::emit;

/// Compare the catalogue with the headers of the files, the directories and the hypervisor
///
/// Exit codes: 0 no problem, 1 the catalogue cannot be read, 2 problems were found, 3 leaked
/// clusters and no other problem.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The VM's catalogue
    catalogue: PathBuf,
    /// Check every cluster of every image as well
    #[arg(long)]
    deep: bool,
    /// Read the content of the VM and of each snapshot, and print its CRC-32
    #[arg(long)]
    digests: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    hypervisor: HypervisorArgs,
}

/// Runs the verb.
pub(crate) fn run(args: &Args) -> Outcome {
    let set = args.hypervisor.load(&args.catalogue)?;
    let options = VerifyOptions::default().with_deep(args.deep).with_digests(args.digests);
    let found = with_bars(false, |face| set.verify(&options, face)).map_err(explain)?;
    if args.json {
        json(&found)?;
    } else {
        let mut text = String::new();
        for problem in &found.problems {
            let _ = writeln!(text, "{problem}");
        }
        for digest in &found.digests {
            let of = digest.snapshot.as_deref().unwrap_or("(now)");
            let _ = writeln!(text, "{:08x}  {of}  {}  {} bytes", digest.crc32, digest.volume, digest.size);
        }
        let images = counted(found.images, "image");
        let _ = match found.problems.len() {
            0 => writeln!(text, "{images}, all as recorded."),
            problems => writeln!(text, "{images}, {}.", counted(problems, "problem")),
        };
        emit(&text)?;
    }
    let leaks = found.problems.iter().all(|problem| problem.kind == ProblemKind::Leaks);
    Ok(match found.is_sound() {
        true => 0,
        false if leaks => 3,
        false => 2,
    })
}
