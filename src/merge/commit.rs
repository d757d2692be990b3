//! Commit: what the upper layers of a chain hold goes into a layer beneath them.

use std::path::PathBuf;

use crate::chain::{Chain, Node};

use super::copy::{Copier, Report};
use super::progress::{Phase, Progress, Step};
use super::refuse::{Bitmaps, refuse_dependents, refuse_stale_snapshots};
use super::target::Target;
use super::{Error, Result, weigh};

/// What becomes of the top after its content has reached the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum AfterCommit {
    /// It stays as it is (`qemu-img commit -d`): whoever asked will remove it.
    #[default]
    Keep,
    /// It is emptied: it holds nothing, and reads through to the base.
    Empty,
}

/// How to commit.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CommitOptions {
    /// Which layer receives: 1 is the top's backing file, 2 the one beneath, ...
    pub base: usize,
    /// What becomes of the top. Only a top that sits directly on the base can be emptied.
    pub after: AfterCommit,
    /// Directories in which no image may be over a layer that the commit changes: over the base, or over one between base
    /// and top. Of the images there, those that belong to the chain do not count. None by default: nobody looks.
    pub dependents_in: Vec<PathBuf>,
    /// Whether internal snapshots of the top, or of a layer between, may change (off: a chain with some is refused). Where
    /// they hold nothing themselves they show the base. Internal snapshots of the base never change.
    pub allow_stale_snapshots: bool,
    /// The most bytes of data to copy in a second; none does not limit.
    pub rate_limit: Option<u64>,
}

impl Default for CommitOptions {
    fn default() -> Self {
        Self {
            base: 1,
            after: AfterCommit::Keep,
            dependents_in: Vec::new(),
            allow_stale_snapshots: false,
            rate_limit: None,
        }
    }
}

impl CommitOptions {
    /// The same with another receiving layer.
    #[must_use]
    pub fn with_base(mut self, base: usize) -> Self {
        self.base = base;
        self
    }

    /// The same with another end for the top.
    #[must_use]
    pub fn with_after(mut self, after: AfterCommit) -> Self {
        self.after = after;
        self
    }

    /// The same, looking for dependents of the changed layers in one more directory.
    #[must_use]
    pub fn with_dependents_in(mut self, directory: impl Into<PathBuf>) -> Self {
        self.dependents_in.push(directory.into());
        self
    }

    /// The same, letting internal snapshots change, or not.
    #[must_use]
    pub fn with_allow_stale_snapshots(mut self, allow: bool) -> Self {
        self.allow_stale_snapshots = allow;
        self
    }

    /// The same with another limit of bytes in a second.
    #[must_use]
    pub fn with_rate_limit(mut self, limit: Option<u64>) -> Self {
        self.rate_limit = limit;
        self
    }
}

/// Merges all that the layers above the base hold into the base, which grows where the top is larger. The chain must have
/// been opened with the base, and all above it, writable ([`crate::chain::ChainOptions::writable`]).
///
/// The top reads the same at every instant. From the first byte written on, the base alone is no longer what it was, nor is
/// any layer between base and top. `Ok` means durable. A merge that was interrupted in any way is completed by running it
/// again.
///
/// # Errors
/// Before the first write: [`Error::Refused`] where the chain has no such layer or it is not writable,
/// [`Error::StaleSnapshots`], [`Error::Dependents`], [`Error::NoSpace`]. Later: [`Error::Cancelled`], and what reading and
/// writing the images give.
pub fn commit(chain: &Chain, options: &CommitOptions, progress: &dyn Progress) -> Result<Report> {
    refuse_unfit(chain, options)?;
    let target = Target::of(chain, options.base)?;
    progress.step(&Step { phase: Phase::Planning, done: 0, total: 0, file: target.file() });
    let work = weigh(chain, &target, options.base, |_| true)?;
    target.check_space(&work)?;
    let bitmaps = Bitmaps::of(&chain.layers()[..=options.base])?;
    target.grow_to(chain.virtual_size())?;

    let mut copier = Copier::new(chain, &target, work.total, progress).with_rate(options.rate_limit);
    for extent in chain.extents_of(0..options.base, 0..chain.virtual_size()) {
        copier.take(extent?)?;
    }
    let mut report = copier.finish()?;
    progress.step(&Step { phase: Phase::Publishing, done: work.total, total: work.total, file: target.file() });
    target.flush()?; // barriers: refcounts and data, then mappings, then what they replaced is freed

    if options.after == AfterCommit::Empty
        && let Node::Qcow2(top) = &chain.layers()[0].node
    {
        let file = &chain.top().path.display().to_string();
        progress.step(&Step { phase: Phase::Emptying, done: work.total, total: work.total, file });
        top.make_empty()?; // after the base is durable: until here the top still covered it
    }
    report.bitmaps_invalidated = bitmaps.invalidated()?;
    Ok(report)
}

/// Refuses what cannot be done to this chain before anything is written.
fn refuse_unfit(chain: &Chain, options: &CommitOptions) -> Result<()> {
    let top = &chain.layers()[0];
    if options.base == 0 {
        let why = "the top cannot be merged into itself".to_owned();
        return Err(Error::Refused { file: top.path.display().to_string(), why });
    }
    for layer in chain.layers().iter().take(options.base + 1) {
        layer.node.data_access()?;
    }
    if !options.allow_stale_snapshots {
        refuse_stale_snapshots(&chain.layers()[..options.base.min(chain.layers().len())])?;
    }
    refuse_dependents(chain, options.base, &options.dependents_in)?;
    if options.after == AfterCommit::Empty {
        let why = match &top.node {
            _ if options.base != 1 => "only a top that sits directly on the base can be emptied",
            Node::Raw(_) => "a raw image cannot be emptied",
            Node::Qcow2(image) if image.is_read_only() => "the top was not opened for writing and cannot be emptied",
            Node::Qcow2(_) => return Ok(()),
        };
        return Err(Error::Refused { file: top.path.display().to_string(), why: why.to_owned() });
    }
    Ok(())
}
