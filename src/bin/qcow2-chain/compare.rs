//! `compare`: whether two images read the same.

use std::ops::Range;
use std::path::{Path, PathBuf};

use qcow2_chain::chain::Chain;
use qcow2_chain::format::GuestOffset;

use crate::failure::{Failure, Outcome};
use crate::layout::{Entry, Layout};
use crate::open;
use crate::options::{PolicyArgs, Unserved, cache_mode, looking};
use crate::output::say;
use crate::progress::Progress;

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

/// The most bytes of each image that are read at once, as in QEMU.
const CHUNK: u64 = 2 << 20;

/// Does it.
pub(crate) fn run(args: &Args) -> Outcome {
    args.unserved.refuse()?;
    cache_mode(args.cache.as_deref())?;
    let lock = looking(args.force_share);
    let open = |path: &Path, format: &Option<String>| {
        open::chain(path, format.as_deref(), lock, &args.policy).map_err(|failure| failure.with_code(2))
    };
    let chains = [open(&args.file1, &args.a_format)?, open(&args.file2, &args.b_format)?];
    let progress = Progress::new(args.progress && !args.quiet);
    let outcome = compare(&chains, args, &progress);
    progress.end();
    outcome
}

fn compare(chains: &[Chain; 2], args: &Args, progress: &Progress) -> Outcome {
    let differs = |line: &str| say(args.quiet, line).map(|()| 1);
    let sizes = [chains[0].virtual_size(), chains[1].virtual_size()];
    let (shorter, longer) = (sizes[0].min(sizes[1]), sizes[0].max(sizes[1]));
    if args.strict && shorter != longer {
        return differs("Strict mode: Image size mismatch!");
    }
    let layout = |chain| Layout::of(chain).map_err(|failure| failure.with_code(3));
    let layouts = [layout(&chains[0])?, layout(&chains[1])?];
    let mut one = Walk::new(&chains[0], &layouts[0], 0..shorter);
    let mut other = Walk::new(&chains[1], &layouts[1], 0..shorter);
    let mut at = 0;
    while at < shorter {
        let (a, b) = (one.status(at)?, other.status(at)?);
        if args.strict && a.kind != b.kind {
            return differs(&format!("Strict mode: Offset {at} block status mismatch!"));
        }
        let end = a.end.min(b.end);
        if let Some(offset) = first_difference(chains, at..end, &a, &b)? {
            return differs(&format!("Content mismatch at offset {offset}!"));
        }
        at = end;
        progress.set(at, longer);
    }
    if shorter != longer {
        say(args.quiet, "Warning: Image size mismatch!")?;
        let index = usize::from(sizes[1] > sizes[0]);
        let chain = &chains[index];
        let mut walk = Walk::new(chain, &layouts[index], shorter..longer);
        while at < longer {
            let status = walk.status(at)?;
            if status.kind.allocated
                && !status.kind.zero
                && let Some(offset) = first_nonzero(chain, at..status.end)?
            {
                return differs(&format!("Content mismatch at offset {offset}!"));
            }
            at = status.end;
            progress.set(at, longer);
        }
    }
    progress.set(1, 1);
    say(args.quiet, "Images are identical.")?;
    Ok(0)
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

/// The first sector of a range in which two images differ.
fn first_difference(chains: &[Chain; 2], range: Range<u64>, a: &Status, b: &Status) -> Result<Option<u64>, Failure> {
    match (a.kind, b.kind) {
        (Kind { zero: true, .. }, Kind { zero: true, .. })
        | (Kind { allocated: false, .. }, Kind { allocated: false, .. }) => Ok(None),
        (Kind { allocated: true, .. }, Kind { allocated: false, .. }) => first_nonzero(&chains[0], range),
        (Kind { allocated: false, .. }, Kind { allocated: true, .. }) => first_nonzero(&chains[1], range),
        _ => first_sector(chains, range),
    }
}

fn first_sector(chains: &[Chain; 2], range: Range<u64>) -> Result<Option<u64>, Failure> {
    let (mut one, mut other) = (Vec::new(), Vec::new());
    for part in parts(range) {
        read(&chains[0], &part, &mut one)?;
        read(&chains[1], &part, &mut other)?;
        if one != other {
            let sector = one.chunks(512).zip(other.chunks(512)).position(|(a, b)| a != b);
            return Ok(sector.map(|sector| part.start + sector as u64 * 512));
        }
    }
    Ok(None)
}

/// The first sector that is not all zeroes.
fn first_nonzero(chain: &Chain, range: Range<u64>) -> Result<Option<u64>, Failure> {
    let mut bytes = Vec::new();
    for part in parts(range) {
        read(chain, &part, &mut bytes)?;
        if let Some(sector) = bytes.chunks(512).position(|sector| sector.iter().any(|byte| *byte != 0)) {
            return Ok(Some(part.start + sector as u64 * 512));
        }
    }
    Ok(None)
}

fn parts(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        let part = at..range.end.min(at.saturating_add(CHUNK));
        at = part.end;
        (!part.is_empty()).then_some(part)
    })
}

fn read(chain: &Chain, range: &Range<u64>, bytes: &mut Vec<u8>) -> Result<(), Failure> {
    bytes.resize(usize::try_from(range.end - range.start).unwrap_or(usize::MAX), 0);
    chain.read_at(bytes, GuestOffset::new(range.start)).map_err(|error| Failure::from(error).with_code(4))
}
