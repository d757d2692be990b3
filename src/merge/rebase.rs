//! Rebase: the top gets another backing file and reads as before.

mod compare;
mod drop_equal;
mod plan;
mod sides;

use crate::chain::Chain;
use crate::image::Image;

use super::copy::{Copier, Report};
use super::pull::name_of;
use super::target::Target;
use super::{Error, Result, reserve};
use crate::progress::{Phase, Progress, Step};
use compare::Rebaser;
use sides::Sides;

pub use plan::{RebasePlan, plan_rebase};

/// What the top sits on afterwards.
#[derive(Clone, Copy, Debug)]
pub enum Onto<'a> {
    /// Another chain, opened by itself, whose top becomes the backing file. It may share layers with the old one.
    Chain(&'a Chain),
    /// A layer of the same chain: 1 is the present backing file, 2 the one beneath, ... Only what the layers between hold
    /// is looked at.
    Layer(usize),
    /// Nothing: the top becomes a disk of its own.
    Nothing,
}

/// How to rebase.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct RebaseOptions {
    /// What the top's header calls its new backing file. By default its name where both lie in one directory, else its
    /// path.
    pub backing_file: Option<Vec<u8>>,
    /// Whether clusters of the top that equal what the new backing file shows are given up (off). That is done after the
    /// header names the new backing file, when it makes no difference to the guest any more.
    pub drop_equal: bool,
    /// Whether internal snapshots of the top may change (off: a top that has some is refused). Where they hold nothing
    /// themselves they show the backing file, whichever it is.
    pub ignore_snapshots: bool,
    /// The most bytes of data to copy in a second; none does not limit.
    pub rate_limit: Option<u64>,
}

impl RebaseOptions {
    /// The same with another name for the backing file.
    #[must_use]
    pub fn with_backing_file(mut self, name: impl Into<Vec<u8>>) -> Self {
        self.backing_file = Some(name.into());
        self
    }

    /// The same, giving up what equals the new backing file, or not.
    #[must_use]
    pub fn with_drop_equal(mut self, drop_equal: bool) -> Self {
        self.drop_equal = drop_equal;
        self
    }

    /// The same, letting internal snapshots of the top change, or not.
    #[must_use]
    pub fn with_ignore_snapshots(mut self, ignore_snapshots: bool) -> Self {
        self.ignore_snapshots = ignore_snapshots;
        self
    }

    /// The same with another limit of bytes in a second.
    #[must_use]
    pub fn with_rate_limit(mut self, limit: Option<u64>) -> Self {
        self.rate_limit = limit;
        self
    }
}

/// Gives the chain's top another backing file. Where the top holds nothing and the layers beneath the old and the new one
/// read differently, the old content is written to the top first. The chain must have been opened with its top writable.
///
/// Nothing but the top is written. It reads the same at every instant, by whichever backing file its header names then;
/// until the header changes a rebase can be dropped, and running it again completes it. `Ok` means durable. The chain must
/// be opened again afterwards: this one still holds the old layers. What both sides are known to share, or to read as
/// zeroes, is not read.
///
/// # Errors
/// [`Error::Refused`] where the top is raw, not writable, has internal snapshots or would be its own backing file, and where
/// there is no such layer; [`Error::NoSpace`] before the first write; [`Error::Cancelled`]; what reading either side and
/// writing the top give. Where `drop_equal` fails, the top has its new backing file already.
///
/// ```no_run
/// use qcow2_chain::chain::{Chain, ChainOptions};
/// use qcow2_chain::merge::{Onto, RebaseOptions, rebase};
///
/// let options = ChainOptions::default().beneath("/images");
/// let chain = Chain::open("/images/vm.qcow2", &options.clone().with_writable(1))?;
/// let other = Chain::open("/images/golden.qcow2", &options)?;
/// let report = rebase(&chain, Onto::Chain(&other), &RebaseOptions::default(), &())?;
/// println!("{} bytes differed", report.copied + report.copied_in_kernel + report.zeroed);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn rebase(chain: &Chain, onto: Onto<'_>, options: &RebaseOptions, progress: &dyn Progress) -> Result<Report> {
    let target = Target::of(chain, 0)?.hiding();
    let sides = Sides::new(chain, onto, options)?;
    let _reserved = reserve(chain.layers())?;
    let base = sides.base().map(|layer| {
        let name = options.backing_file.clone().unwrap_or_else(|| name_of(layer, &chain.top().path));
        (name, layer.format().name().as_bytes())
    });
    let (name, format) = base.as_ref().map(|(name, format)| (name.as_slice(), *format)).unzip();
    sides.image.check_backing_file(name, format)?;
    let work = sides.survey()?;
    target.check_room(work.moved)?;

    let copier = Copier::new(chain, &target, work.total, progress).with_rate(options.rate_limit);
    let mut rebaser = Rebaser::new(&sides, copier);
    for piece in sides.pieces() {
        rebaser.take(&piece?)?;
    }
    let mut report = rebaser.finish()?;
    progress.step(&Step::new(Phase::Publishing, work.total, work.total, target.file()));
    target.flush()?; // barrier: all in which old and new differ, before the header names the new one

    sides.image.set_backing_file(name, format)?;
    if options.drop_equal {
        progress.step(&Step::new(Phase::Emptying, work.total, work.total, target.file()));
        report.dropped = sides.drop_equal(progress)?; // after the header is durable: until here they covered the old one
        target.flush()?;
    }
    Ok(report)
}

/// Names another backing file and its format in the header, or none. Neither is opened or looked at: where they do not read
/// the same, the image reads differently afterwards. Durable on return.
///
/// # Errors
/// [`Error::Refused`] for a name without a format; as [`Image::set_backing_file`].
///
/// ```no_run
/// use qcow2_chain::image::{Image, OpenOptions};
///
/// let image = Image::open_path("/images/vm.qcow2", &OpenOptions::default().with_write(true))?;
/// qcow2_chain::merge::rebase_unsafe(&image, Some(b"moved/golden.qcow2"), Some(b"qcow2"))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn rebase_unsafe(image: &Image, name: Option<&[u8]>, format: Option<&[u8]>) -> Result<()> {
    if name.is_some_and(|name| !name.is_empty()) && format.is_none() {
        let why = "backing format must be specified".to_owned();
        return Err(Error::Refused { file: image.name().to_owned(), why });
    }
    image.flush()?; // barrier: what was written over the old backing file, before the header names the new one
    Ok(image.set_backing_file(name, format)?)
}
