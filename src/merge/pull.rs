//! Pull, which QEMU calls stream: the top takes in what it lacks from the layers beneath, then sits on a lower one, or on
//! none.

use std::path::{Component, Path, PathBuf};

use crate::chain::{Chain, ChainExtent, Layer, Node, has_protocol};

use super::absorb::Absorb;
use super::copy::Report;
use super::refuse::{Bitmaps, refuse_stale_snapshots};
use super::target::Target;
use super::{Error, Result, Way, reserve};
use crate::progress::Progress;

/// How to pull.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct PullOptions {
    /// Which layer the top sits on afterwards: 2 is the backing file of its backing file, ...; none makes the top a disk of
    /// its own.
    pub base: Option<usize>,
    /// What the top's header calls that layer. By default its name where both lie in one directory, else its path.
    pub backing_file: Option<Vec<u8>>,
    /// Whether internal snapshots of the top may change (off: a top with some is refused). Where they hold nothing
    /// themselves they show what the top sits on.
    pub allow_stale_snapshots: bool,
    /// The most bytes of data to copy in a second; none does not limit.
    pub rate_limit: Option<u64>,
    /// The estimate that [`plan`](super::plan()) returned for the same layers, which must be
    /// unchanged since. If given, the tables are not walked again.
    pub estimate: Option<Way>,
}

impl PullOptions {
    /// The same with another layer to sit on.
    #[must_use]
    pub fn with_base(mut self, base: Option<usize>) -> Self {
        self.base = base;
        self
    }

    /// The same with another name for that layer.
    #[must_use]
    pub fn with_backing_file(mut self, name: impl Into<Vec<u8>>) -> Self {
        self.backing_file = Some(name.into());
        self
    }

    /// The same, letting internal snapshots of the top change, or not.
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

/// Moves what the layers between the top and `options.base` hold into the top, as far as it lacks it, and points the top's
/// header at the base. The chain must have been opened with its top writable.
///
/// Nothing but the top is written. It reads the same at every instant; until the one header write at the end a pull can be
/// dropped, and running it again completes it. `Ok` means durable. The chain must be opened again afterwards: this one still
/// holds the layers that were pulled.
///
/// # Errors
/// Before the first write: [`Error::Refused`] where the chain has no such layer or the top is raw or not writable,
/// [`Error::StaleSnapshots`], [`Error::NoSpace`]. Later: [`Error::Cancelled`], and what reading and writing the images give.
pub fn pull(chain: &Chain, options: &PullOptions, progress: &dyn Progress) -> Result<Report> {
    let target = Target::of(chain, 0)?;
    let depth = chain.layers().len();
    let base = options.base.unwrap_or(depth);
    let top = &chain.layers()[0];
    let refused = |why: &str| Err(Error::Refused { file: top.path.display().to_string(), why: why.to_owned() });
    let Node::Qcow2(image) = &top.node else { return refused("a raw image has no backing file") };
    if base == 0 || base > depth || options.base == Some(depth) {
        return refused("there is no such layer to sit on");
    }
    for layer in &chain.layers()[..base] {
        layer.node.data_access()?;
    }
    if !options.allow_stale_snapshots {
        refuse_stale_snapshots(&chain.layers()[..1])?;
    }
    let _reserved = reserve(&chain.layers()[..base])?;
    let merge = Absorb::survey(
        chain,
        &target,
        base,
        |extent| wanted(extent, base < depth),
        options.estimate.as_ref(),
        progress,
    )?;
    let bitmaps = Bitmaps::of(&chain.layers()[..1])?;
    let mut report = merge.run(options.rate_limit, 0, progress, &|| Ok(()))?; // barrier: all that the top takes in, before it stops looking beneath

    match chain.layers().get(base) {
        None => image.set_backing_file(None, None)?,
        Some(layer) => {
            let name = options.backing_file.clone().unwrap_or_else(|| name_of(layer, &top.path));
            image.set_backing_file(Some(&name), Some(layer.format().name().as_bytes()))?;
        }
    }
    report.bitmaps_invalidated = bitmaps.invalidated()?;
    Ok(report)
}

/// Whether the top must take an extent in: it lacks it, and would read something else without it. Where it will sit on
/// nothing, what no layer holds reads as zeroes by itself.
pub(super) fn wanted(extent: &ChainExtent, on_something: bool) -> bool {
    extent.layer.map_or(on_something, |layer| layer != 0)
}

/// The name of a layer as seen from an image beside it or elsewhere. A relative one would be taken as relative to that
/// image, so that only a layer beside it has one.
pub(super) fn name_of(layer: &Layer, from: &Path) -> Vec<u8> {
    let directory = |path: &Path| -> PathBuf {
        let parts = path.parent().into_iter().flat_map(Path::components);
        parts.filter(|part| *part != Component::CurDir).collect()
    };
    let beside = directory(&layer.path) == directory(from);
    let name = layer.path.file_name().filter(|_| beside).map(PathBuf::from);
    let name = name.or_else(|| std::path::absolute(&layer.path).ok()).unwrap_or_else(|| layer.path.clone());
    let name = name.into_os_string().into_encoded_bytes();
    if has_protocol(&name) { [b"./", &name[..]].concat() } else { name }
}
