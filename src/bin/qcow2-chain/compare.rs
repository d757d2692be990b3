//! `compare`: whether two images read the same.

use std::ops::Range;
use std::path::{Path, PathBuf};

use qcow2_chain::chain::{self, Chain, CompareOptions, Comparison};

use crate::commit::Face;
use crate::failure::{Failure, Outcome};
use crate::layout::{Entry, Layout};
use crate::open;
use crate::options::{PolicyArgs, Unserved, cache_mode, looking};
use crate::output::say;

/// Check whether two images have the same content
///
/// Exit codes: 0 the same, 1 different (or wrong usage), 2 an image cannot be opened, 3 an image's tables cannot be read,
/// 4 its data cannot be read.
#[expect(clippy::struct_excessive_bools, reason = "the command line has as many switches")]
#[derive(clap::Args, Debug)]
#[command(args_override_self = true)]
pub(crate) struct Args {
    /// The first image's format (qcow2 or raw)
    #[arg(short = 'f', long, value_name = "FMT")]
    a_format: Option<String>,
    /// The second image's format (qcow2 or raw)
    #[arg(short = 'F', long, value_name = "FMT")]
    b_format: Option<String>,
    /// Want the same size and the same clusters allocated too
    #[arg(short, long)]
    strict: bool,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    /// Show how far it is
    #[arg(short, long)]
    progress: bool,
    /// Take no locks: look at images that another program holds
    #[arg(short = 'U', long)]
    force_share: bool,
    /// Accepted and without effect
    #[arg(short = 'T', long, value_name = "CACHE")]
    cache: Option<String>,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    unserved: Unserved,
    /// The first image
    file1: PathBuf,
    /// The second image
    file2: PathBuf,
}

/// Does it.
pub(crate) fn run(args: &Args) -> Outcome {
    args.unserved.refuse()?;
    cache_mode(args.cache.as_deref())?;
    let lock = looking(args.force_share);
    let open = |path: &Path, format: &Option<String>| {
        open::chain(path, format.as_deref(), lock, &args.policy).map_err(|failure| failure.with_code(2))
    };
    let chains = [open(&args.file1, &args.a_format)?, open(&args.file2, &args.b_format)?];
    let face = Face::new(args.progress && !args.quiet);
    let outcome = compare(&chains, args, &face);
    face.end(false);
    outcome
}

fn compare(chains: &[Chain; 2], args: &Args, face: &Face) -> Outcome {
    let differs = |line: &str| say(args.quiet, line).map(|()| 1);
    let sizes = [chains[0].virtual_size(), chains[1].virtual_size()];
    let (shorter, longer) = (sizes[0].min(sizes[1]), sizes[0].max(sizes[1]));
    if args.strict && shorter != longer {
        return differs("Strict mode: Image size mismatch!");
    }
    // What QEMU is strict about is more than what a chain tells of itself; content before that still counts first.
    let status = if args.strict { first_status_difference(chains)? } else { None };
    let options = CompareOptions::default().with_end(status);
    let found = chain::compare(&chains[0], &chains[1], &options, face);
    let content = match found {
        Ok(Comparison::DiffersAt(offset)) => Some(offset - offset % SECTOR),
        Ok(_) => None,
        Err(chain::Error::Cancelled) => return Err(Failure::new("cancelled").with_code(130)),
        Err(error) => return Err(Failure::from(error).with_code(unreadable(chains))),
    };
    if shorter != longer && content.is_none_or(|offset| offset >= shorter) {
        say(args.quiet, "Warning: Image size mismatch!")?;
    }
    match (content, status) {
        (Some(offset), _) => differs(&format!("Content mismatch at offset {offset}!")),
        (None, Some(offset)) => differs(&format!("Strict mode: Offset {offset} block status mismatch!")),
        (None, None) => {
            face.set(1, 1);
            say(args.quiet, "Images are identical.")?;
            Ok(0)
        }
    }
}

/// QEMU tells where a difference is in sectors.
const SECTOR: u64 = 512;

/// The exit code for images that could not be compared: 3 where their tables cannot be read, 4 where it is their data.
fn unreadable(chains: &[Chain; 2]) -> u8 {
    let readable = chains.iter().all(|chain| chain.extents(0..chain.virtual_size()).all(|extent| extent.is_ok()));
    if readable { 4 } else { 3 }
}

/// Where the two, which are of one size, first hold a range in different ways.
fn first_status_difference(chains: &[Chain; 2]) -> Result<Option<u64>, Failure> {
    let size = chains[0].virtual_size();
    let layout = |chain| Layout::of(chain).map_err(|failure| failure.with_code(3));
    let layouts = [layout(&chains[0])?, layout(&chains[1])?];
    let mut walks = [0, 1].map(|index| Walk::new(&chains[index], &layouts[index], 0..size));
    let mut at = 0;
    while at < size {
        let (a, b) = (walks[0].status(at)?, walks[1].status(at)?);
        if a.kind != b.kind {
            return Ok(Some(at));
        }
        at = a.end.min(b.end);
    }
    Ok(None)
}

/// A run from where it was asked for to its end.
struct Status {
    end: u64,
    kind: Kind,
}

/// What is told of a run: what strict mode compares.
#[expect(clippy::struct_excessive_bools, reason = "the flags that QEMU has, independent of each other")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kind {
    allocated: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    mapped: bool,
    /// Whether the run ends with the image: QEMU counts that as a difference too.
    last: bool,
}

/// The runs of one chain in order.
struct Walk<'a> {
    entries: Box<dyn Iterator<Item = Result<Entry, Failure>> + 'a>,
    current: Option<Entry>,
    end: u64,
    layers: usize,
}

impl<'a> Walk<'a> {
    fn new(chain: &Chain, layout: &'a Layout<'_>, range: Range<u64>) -> Self {
        let end = range.end;
        Self { end, entries: Box::new(layout.entries(range)), current: None, layers: chain.layers().len() }
    }

    fn status(&mut self, at: u64) -> Result<Status, Failure> {
        loop {
            if let Some(entry) = self.current.as_ref().filter(|entry| at < entry.end()) {
                // Past the end of a layer that is too short, that layer counts as holding the zeroes.
                let allocated = entry.present || entry.depth + 1 < self.layers;
                let Entry { zero, data, compressed, offset, .. } = *entry;
                let (mapped, last) = (offset.is_some(), entry.end() == self.end);
                return Ok(Status { end: entry.end(), kind: Kind { allocated, zero, data, compressed, mapped, last } });
            }
            match self.entries.next() {
                Some(entry) => self.current = Some(entry.map_err(|failure| failure.with_code(3))?),
                None => return Err(Failure::new(format!("no extent covers offset {at}")).with_code(3)),
            }
        }
    }
}
