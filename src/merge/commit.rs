//! Commit: what the upper layers of a chain hold goes into a layer beneath them.

use crate::chain::{Chain, Node};

use super::copy::{Copier, Report};
use super::progress::{Phase, Progress, Step};
use super::target::Target;
use super::{Error, Result, survey};

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
}

impl Default for CommitOptions {
    fn default() -> Self {
        Self { base: 1, after: AfterCommit::Keep }
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
}

/// Merges all that the layers above the base hold into the base, which grows where the top is larger. The chain must have
/// been opened with the base, and all above it, writable ([`crate::chain::ChainOptions::writable`]).
///
/// The top reads the same at every instant. From the first byte written on, the base alone is no longer what it was, nor is
/// any layer between base and top. `Ok` means durable. A merge that was interrupted in any way is completed by running it
/// again.
///
/// # Errors
/// [`Error::Refused`] where the chain has no such layer or it is not writable, [`Error::NoSpace`] before the first write,
/// [`Error::Cancelled`], and what reading and writing the images give.
pub fn commit(chain: &Chain, options: &CommitOptions, progress: &dyn Progress) -> Result<Report> {
    refuse_unfit(chain, options)?;
    let target = Target::of(chain, options.base)?;
    let work = survey(chain, options.base, |_| true)?;
    target.check_space(&work)?;
    target.grow_to(chain.virtual_size())?;

    let mut copier = Copier::new(chain, &target, work.total, progress);
    for extent in chain.extents_of(0..options.base, 0..chain.virtual_size()) {
        copier.take(extent?)?;
    }
    let report = copier.finish()?;
    progress.step(&Step { phase: Phase::Publishing, done: work.total, total: work.total });
    target.flush()?; // barriers: refcounts and data, then mappings, then what they replaced is freed

    if options.after == AfterCommit::Empty
        && let Node::Qcow2(top) = &chain.layers()[0].node
    {
        progress.step(&Step { phase: Phase::Emptying, done: work.total, total: work.total });
        top.make_empty()?; // after the base is durable: until here the top still covered it
    }
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
