//! Commit: what the upper layers of a chain hold goes into a layer beneath them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::chain::{Chain, Layer, Node};
use crate::format::Version;
use crate::image::Image;
use crate::storage::FileSystem;

use super::absorb::Absorb;
use super::copy::Report;
use super::refuse::{Bitmaps, refuse_dependents, refuse_stale_snapshots};
use super::target::Target;
use super::{Error, Result, Way, reserve};
use crate::progress::{Phase, Progress};

/// What becomes of the top after its content has reached the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum AfterCommit {
    /// It stays as it is (`qemu-img commit -d`): whoever asked will remove it.
    #[default]
    Keep,
    /// It is emptied: it holds nothing, and reads through to the base.
    Empty,
    /// Its file is removed, and so are those of the layers between it and the base. The chain must have been opened by
    /// name ([`Chain::open`], [`Chain::open_in`]).
    Remove,
}

/// How to commit.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CommitOptions {
    /// Which layer receives: 1 is the top's backing file, 2 the one beneath, ...
    pub base: usize,
    /// What becomes of the top. Only a top that sits directly on the base can be emptied.
    pub after: AfterCommit,
    /// Whether a base that is larger than the top is cut to the top's size (off, as in `qemu-img commit`): the base then
    /// is the disk that the top was.
    pub shrink_base: bool,
    /// Directories in which no image may be over a layer that the commit changes: over the base, or over one between base
    /// and top. Of the images there, those that belong to the chain do not count. None by default: nobody looks.
    pub dependents_in: Vec<PathBuf>,
    /// Whether internal snapshots of the top, or of a layer between, may change (off: a chain with some is refused). Where
    /// they hold nothing themselves they show the base. Internal snapshots of the base never change.
    pub allow_stale_snapshots: bool,
    /// The most bytes of data to copy in a second; none does not limit.
    pub rate_limit: Option<u64>,
    /// The estimate that [`plan`](super::plan()) returned for the same layers, which must be
    /// unchanged since. If given, the tables are not walked again.
    pub estimate: Option<Way>,
}

impl Default for CommitOptions {
    fn default() -> Self {
        Self {
            base: 1,
            after: AfterCommit::Keep,
            shrink_base: false,
            dependents_in: Vec::new(),
            allow_stale_snapshots: false,
            rate_limit: None,
            estimate: None,
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

    /// The same, cutting a larger base to the top's size, or not.
    #[must_use]
    pub fn with_shrink_base(mut self, shrink: bool) -> Self {
        self.shrink_base = shrink;
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

    /// Sets the estimate of the same layers, so that it is not made again. Default: none.
    #[must_use]
    pub fn with_estimate(mut self, estimate: Option<Way>) -> Self {
        self.estimate = estimate;
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
    commit_watched(chain, options, progress, &|| Ok(()))
}

/// Commits, and calls `before_change` once before the first change of the base's guest-visible content. If that fails, the
/// base is unchanged.
pub(crate) fn commit_watched(
    chain: &Chain,
    options: &CommitOptions,
    progress: &dyn Progress,
    before_change: &dyn Fn() -> Result<()>,
) -> Result<Report> {
    let names = refuse_unfit(chain, options)?;
    let target = Target::of(chain, options.base)?;
    let _reserved = reserve(&chain.layers()[..=options.base])?;
    let merge = Absorb::survey(chain, &target, options.base, |_| true, options.estimate.as_ref(), progress)?;
    let bitmaps = Bitmaps::of(&chain.layers()[..=options.base])?;
    if target.is_smaller_than(chain.virtual_size()) {
        before_change()?;
    }
    target.grow_to(chain.virtual_size())?;
    let spent = if options.after == AfterCommit::Keep { 0 } else { options.base };
    let mut report = merge.run(options.rate_limit, spent, progress, before_change)?; // barriers: see there
    if options.shrink_base {
        if target.is_larger_than(chain.virtual_size()) {
            before_change()?;
        }
        target.shrink_to(chain.virtual_size())?; // after all is durable: the top does not show what is cut off
    }
    // After the base is durable: until here the top still covered it.
    match (options.after, &chain.layers()[0].node) {
        (AfterCommit::Empty, Node::Qcow2(top)) => {
            merge.tell(Phase::Emptying, progress);
            top.make_empty()?;
        }
        (AfterCommit::Remove, _) => {
            merge.tell(Phase::Removing, progress);
            remove(names, &chain.layers()[..options.base])?;
        }
        _ => {}
    }
    report.bitmaps_invalidated = bitmaps.invalidated()?;
    Ok(report)
}

/// Takes the names of layers away, the top first: each is durably gone before what it stands on goes.
fn remove(names: Option<&Arc<dyn FileSystem>>, layers: &[Layer]) -> Result<()> {
    let Some(names) = names else { return Ok(()) };
    for layer in layers {
        names.unlink(&layer.path)?;
        names.sync_dir(layer.path.parent().unwrap_or(Path::new("")))?;
    }
    Ok(())
}

/// Refuses what cannot be done to this chain before anything is written. Returns what the layers' paths are names in.
fn refuse_unfit<'a>(chain: &'a Chain, options: &CommitOptions) -> Result<Option<&'a Arc<dyn FileSystem>>> {
    let top = &chain.layers()[0];
    let refused =
        |layer: &Layer, why: &str| Err(Error::Refused { file: layer.path.display().to_string(), why: why.to_owned() });
    if options.base == 0 {
        return refused(top, "the top cannot be merged into itself");
    }
    for layer in chain.layers().iter().take(options.base + 1) {
        layer.node.data_access()?;
    }
    if !options.allow_stale_snapshots {
        refuse_stale_snapshots(&chain.layers()[..options.base.min(chain.layers().len())])?;
    }
    refuse_dependents(chain, options.base, &options.dependents_in)?;
    if let Some(base) = chain.layers().get(options.base)
        && base.node.virtual_size() != chain.virtual_size()
        && base.node.as_qcow2().is_some_and(is_fixed_by_snapshots)
        && (options.shrink_base || base.node.virtual_size() < chain.virtual_size())
    {
        return refused(base, "a version 2 image with internal snapshots cannot be resized");
    }
    match (options.after, &top.node) {
        (AfterCommit::Empty, _) if options.base != 1 => {
            refused(top, "only a top that sits directly on the base can be emptied")
        }
        (AfterCommit::Empty, Node::Raw(_)) => refused(top, "a raw image cannot be emptied"),
        (AfterCommit::Empty, Node::Qcow2(image)) if image.is_read_only() => {
            refused(top, "the top was not opened for writing and cannot be emptied")
        }
        (AfterCommit::Remove, _) if chain.names().is_none() => {
            refused(top, "its layers were not opened by name, and cannot be removed by name")
        }
        _ => Ok(chain.names()),
    }
}

/// Whether the format does not allow another size.
fn is_fixed_by_snapshots(image: &Image) -> bool {
    let header = image.header().header;
    header.version == Version::V2 && header.nb_snapshots > 0
}
