//! `resize`: a larger or smaller virtual disk.

use std::ops::Range;
use std::path::PathBuf;

use qcow2_chain::chain::{Chain, Node};
use qcow2_chain::image::{Preallocation, ResizeOptions};
use qcow2_chain::storage::{LockMode, Storage};

use crate::failure::{Failure, Outcome};
use crate::options::{PolicyArgs, Unserved};
use crate::output::say;
use crate::{open, size};

/// Change the size of an image
#[derive(clap::Args, Debug)]
#[command(args_override_self = true)]
pub(crate) struct Args {
    /// The image's format (qcow2 or raw)
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Allow the image to become smaller: what lies behind the new end is lost
    #[arg(long)]
    shrink: bool,
    /// What to allocate for the new part: off, metadata, falloc or full
    #[arg(long, value_name = "PREALLOC")]
    preallocation: Option<String>,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    unserved: Unserved,
    /// The image
    file: PathBuf,
    /// The new size, or +SIZE or -SIZE to grow or shrink by (suffixes k M G T P E, powers of 1024)
    #[arg(value_name = "[+-]SIZE")]
    size: String,
}

/// Whether a word reads as a size to shrink by.
pub(crate) fn is_shrinking_size(word: &str) -> bool {
    word.strip_prefix('-').is_some_and(|size| size.starts_with(|c: char| c.is_ascii_digit() || c == '.'))
}

/// The size asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target {
    To(u64),
    Up(u64),
    Down(u64),
}

impl Target {
    /// Reads `SIZE`, `+SIZE` or `-SIZE`.
    pub(crate) fn parse(text: &str) -> Result<Self, Failure> {
        let (digits, make): (_, fn(u64) -> Self) = match text.split_at_checked(1) {
            Some(("+", digits)) => (digits, Self::Up),
            Some(("-", digits)) => (digits, Self::Down),
            _ => (text, Self::To),
        };
        size::parse(digits).map(make).ok_or_else(|| {
            Failure::new("Parameter 'size' expects a non-negative number below 2^64").with_hint(
                "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively.",
            )
        })
    }

    /// The new size of what has this size now.
    pub(crate) fn from(self, current: u64) -> Result<u64, Failure> {
        let size = match self {
            Self::To(size) => Some(size),
            Self::Up(more) => current.checked_add(more),
            Self::Down(less) => current.checked_sub(less),
        };
        size.filter(|size| *size > 0 && i64::try_from(*size).is_ok())
            .ok_or_else(|| Failure::new("New image size must be positive"))
    }
}

/// The mode of this name.
pub(crate) fn preallocation(name: Option<&str>) -> Result<Preallocation, Failure> {
    match name {
        None | Some("off") => Ok(Preallocation::Off),
        Some("metadata") => Ok(Preallocation::Metadata),
        Some("falloc") => Ok(Preallocation::Falloc),
        Some("full") => Ok(Preallocation::Full),
        Some(other) => Err(Failure::new(format!("Invalid preallocation mode '{other}'"))),
    }
}

/// Does it.
pub(crate) fn run(args: &Args) -> Outcome {
    args.unserved.refuse()?;
    let target = Target::parse(&args.size)?;
    let preallocation = preallocation(args.preallocation.as_deref())?;
    let format = open::format(&args.file, args.format.as_deref())?;
    let mut options = args.policy.chain_options(&args.file, format, LockMode::Read);
    options.writable = 1;
    let chain = Chain::open(&args.file, &options).map_err(open::explain)?;
    let current = chain.virtual_size();
    let size = target.from(current)?;
    if size <= current && preallocation != Preallocation::Off {
        return Err(Failure::new("Preallocation can only be used for growing images"));
    }
    if size < current && !args.shrink {
        return Err(Failure::new("Use the --shrink option to perform a shrink operation.").with_hint(
            "Shrinking an image deletes all data beyond its new end: make sure that there is nothing important there.",
        ));
    }
    let mut options = ResizeOptions::default();
    options.shrink = args.shrink;
    options.preallocation = preallocation;
    resize(&chain, size, &options)?;
    say(args.quiet, "Image resized.")?;
    Ok(0)
}

fn resize(chain: &Chain, size: u64, options: &ResizeOptions) -> Result<(), Failure> {
    match &chain.top().node {
        Node::Qcow2(image) => {
            // A longer backing file must not show through where the image grows.
            let below = chain.layers().get(1).map_or(0, |layer| layer.node.virtual_size());
            image.resize_over(size, options, &chain.below(0), below)?;
            image.flush()?;
        }
        Node::Raw(raw) => {
            // The length of the file is what was asked for, whole sectors or not, as qemu-img leaves it.
            raw.storage().set_len(size)?;
            preallocate(&**raw.storage(), chain.virtual_size()..size, options.preallocation)?;
            raw.flush()?;
        }
    }
    Ok(())
}

/// Allocates the new part of a raw image.
fn preallocate(storage: &dyn Storage, range: Range<u64>, preallocation: Preallocation) -> Result<(), Failure> {
    match preallocation {
        Preallocation::Off => Ok(()),
        Preallocation::Metadata => Err(Failure::new("Unsupported preallocation mode 'metadata'")),
        Preallocation::Falloc => Ok(storage.allocate_range(range)?),
        Preallocation::Full => write_zeroes(storage, range),
    }
}

/// Writes zeroes rather than asking for a hole: the blocks are wanted.
pub(crate) fn write_zeroes(storage: &dyn Storage, range: Range<u64>) -> Result<(), Failure> {
    let zeroes = vec![0; 1 << 20];
    let mut at = range.start;
    while at < range.end {
        let len = usize::try_from(range.end - at).unwrap_or(usize::MAX).min(zeroes.len());
        storage.write_at(&zeroes[..len], at)?;
        at += len as u64;
    }
    Ok(())
}
