//! `vm verify`: whether catalogue, headers and files agree.

use std::fmt::Write as _;
use std::path::PathBuf;

use qcow2_chain::vm::{ProblemKind, VerifyOptions};

use super::bars::with_bars;
use super::hypervisor::HypervisorArgs;
use super::table::counted;
use super::telling::{explain, json};
use crate::failure::Outcome;
use crate::output::emit;

/// Compare the catalogue with the files' headers and the directory
///
/// Exit codes: 0 all agrees, 1 it could not be told, 2 something is wrong, 3 clusters are leaked and nothing else is wrong.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The VM's catalogue
    catalogue: PathBuf,
    /// Check every cluster of every image as well
    #[arg(long)]
    deep: bool,
    /// Read all that the VM and each snapshot hold, and tell its CRC-32
    #[arg(long)]
    digests: bool,
    /// Tell what was found as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    hypervisor: HypervisorArgs,
}

/// Does it.
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
