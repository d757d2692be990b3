//! Rebase: the top gets another backing file and reads as before.

mod plan;

use std::ops::Range;
use std::sync::Arc;

use crate::chain::{Below, Chain, ChainExtent, ChainExtents, Format, Layer, Node};
use crate::format::{GuestOffset, Version};
use crate::image::{Backing, ExtentKind, Image};

use super::copy::{Copier, Report};
use super::progress::{Phase, Progress, Step};
use super::pull::name_of;
use super::target::Target;
use super::{Error, Result};

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
    let base = sides.base().map(|layer| {
        let name = options.backing_file.clone().unwrap_or_else(|| name_of(layer, &chain.top().path));
        (name, layer.format().name().as_bytes())
    });
    let (name, format) = base.as_ref().map(|(name, format)| (name.as_slice(), *format)).unzip();
    sides.image.check_backing_file(name, format)?;
    let work = sides.survey()?;
    target.check_room(work.moved)?;

    let copier = Copier::new(chain, &target, work.total, progress).with_rate(options.rate_limit);
    let mut rebaser = Rebaser::new(&sides, &target, copier);
    for piece in sides.pieces() {
        rebaser.take(&piece?)?;
    }
    let mut report = rebaser.finish()?;
    progress.step(&Step { phase: Phase::Publishing, done: work.total, total: work.total, file: target.file() });
    target.flush()?; // barrier: all in which old and new differ, before the header names the new one

    sides.image.set_backing_file(name, format)?;
    if options.drop_equal {
        progress.step(&Step { phase: Phase::Emptying, done: work.total, total: work.total, file: target.file() });
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

/// The old layers beneath the top, and the new ones.
struct Sides<'a> {
    chain: &'a Chain,
    onto: Onto<'a>,
    image: &'a Image,
    version: Version,
}

/// What a rebase has to do, in guest bytes.
#[derive(Clone, Copy, Debug, Default)]
struct Work {
    total: u64,
    /// Data that certainly goes to the top.
    moved: u64,
}

/// What to do with a piece of what the top does not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    /// Nothing: both sides are known to read the same.
    Skip,
    /// The new side reads as zeroes: what the old one holds is moved.
    Move,
    /// The old side reads as zeroes, and the top can say so.
    Zero,
    /// Read both and compare.
    Compare,
}

/// A range in which neither side changes, as the old side holds it.
struct Piece {
    old: ChainExtent,
    action: Action,
}

impl<'a> Sides<'a> {
    /// Refuses what cannot be done before anything is written.
    fn new(chain: &'a Chain, onto: Onto<'a>, options: &RebaseOptions) -> Result<Self> {
        let top = chain.top();
        let refused = |why: &str| Err(Error::Refused { file: top.path.display().to_string(), why: why.to_owned() });
        let Node::Qcow2(image) = &top.node else { return refused("a raw image has no backing file") };
        let new: &[Layer] = match onto {
            Onto::Nothing => &[],
            Onto::Chain(other) => other.layers(),
            Onto::Layer(index) => match chain.layers().get(index..) {
                Some(layers @ [_, ..]) if index > 0 => layers,
                _ => return refused("there is no such layer to sit on"),
            },
        };
        for layer in chain.layers().iter().chain(new) {
            layer.node.data_access()?;
        }
        if new.iter().any(|layer| same_file(layer, top)) {
            return refused("the image would be its own backing file");
        }
        if !options.ignore_snapshots && !image.snapshots()?.is_empty() {
            return refused(
                "its internal snapshots would show the new backing file where they hold nothing themselves",
            );
        }
        Ok(Self { chain, onto, image, version: image.header().header.version })
    }

    /// The new backing file.
    fn base(&self) -> Option<&'a Layer> {
        match self.onto {
            Onto::Nothing => None,
            Onto::Chain(other) => Some(other.top()),
            Onto::Layer(index) => self.chain.layers().get(index),
        }
    }

    /// What lies beneath the top afterwards.
    fn new_below(&self) -> Below<'a> {
        match self.onto {
            Onto::Nothing => self.chain.below(usize::MAX),
            Onto::Chain(other) => other.beneath_another(),
            Onto::Layer(index) => self.chain.below(index - 1),
        }
    }

    fn new_extents(&self) -> Walk<'a> {
        let all = 0..self.chain.virtual_size();
        Walk::new(match self.onto {
            Onto::Nothing => None,
            Onto::Chain(other) => Some(other.extents(all)),
            Onto::Layer(index) => Some(self.chain.extents_of(index..self.chain.layers().len(), all)),
        })
    }

    /// Top and old layers, as far as they are none of the new ones.
    fn old_extents(&self) -> ChainExtents<'a> {
        let layers = match self.onto {
            Onto::Layer(index) => index,
            Onto::Chain(_) | Onto::Nothing => self.chain.layers().len(),
        };
        self.chain.extents_of(0..layers, 0..self.chain.virtual_size())
    }

    fn survey(&self) -> Result<Work> {
        let mut work = Work::default();
        for piece in self.pieces() {
            let Piece { old, action } = piece?;
            match action {
                Action::Skip => {}
                Action::Move => {
                    work.total += old.len;
                    work.moved += old.len;
                }
                Action::Zero | Action::Compare => work.total += old.len,
            }
        }
        Ok(work)
    }

    /// Both sides walked in lockstep. What the top holds is passed over at once.
    fn pieces(&self) -> impl Iterator<Item = Result<Piece>> + '_ {
        let mut new = self.new_extents();
        let mut old = Walk::new(Some(self.old_extents()));
        let (mut at, end) = (0, self.chain.virtual_size());
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let piece = old.at(at).and_then(|mut old| {
                old.len = old.len.min(end - at);
                if old.layer == Some(0) || old.kind == ExtentKind::Unallocated {
                    return Ok(Piece { old, action: Action::Skip });
                }
                let new = new.at(at)?;
                old.len = old.len.min(new.len);
                Ok(Piece { action: self.action(&old, &new), old })
            });
            at = piece.as_ref().map_or(end, |piece| piece.old.end());
            Some(piece)
        })
    }

    fn action(&self, old: &ChainExtent, new: &ChainExtent) -> Action {
        match (old.is_zero(), new.is_zero()) {
            (true, true) => Action::Skip,
            (false, true) => Action::Move,
            _ if self.shared(old, new) => Action::Skip,
            (true, false) if self.version == Version::V3 => Action::Zero,
            _ => Action::Compare,
        }
    }

    /// Whether both sides have the same bytes of the same file.
    fn shared(&self, old: &ChainExtent, new: &ChainExtent) -> bool {
        let new_layers = match self.onto {
            Onto::Chain(other) => other.layers(),
            Onto::Layer(_) | Onto::Nothing => self.chain.layers(),
        };
        let (Some(a), Some(b)) = (old.layer, new.layer) else { return false };
        let (Some(a), Some(b)) = (self.chain.layers().get(a), new_layers.get(b)) else { return false };
        let alike = match (old.kind, new.kind) {
            (ExtentKind::Data { host: a }, ExtentKind::Data { host: b }) => a == b,
            (ExtentKind::Compressed, ExtentKind::Compressed) => [a, b].iter().all(|x| x.format() == Format::Qcow2),
            _ => false,
        };
        alike && same_file(a, b)
    }

    /// Gives up the clusters of the top that equal what lies beneath it now. Returns how many bytes they held.
    fn drop_equal(&self, progress: &dyn Progress) -> Result<u64> {
        let (size, cluster) = (self.chain.virtual_size(), self.image.geometry().cluster_size());
        let mut new = self.new_extents();
        let mut buffers = Buffers::new(self.image);
        let mut dropped = 0;
        let mut at = 0;
        for extent in self.image.extents(0..size) {
            let extent = extent?;
            at = at.max(extent.guest.get() - extent.guest.get() % cluster);
            while extent.kind != ExtentKind::Unallocated && at < extent.end() {
                let beneath = new.at(at)?;
                let same = extent.end().min(beneath.end());
                let zeroes = matches!(extent.kind, ExtentKind::Zero { .. }) && beneath.is_zero();
                let whole = if same == size { size } else { same - same % cluster };
                if zeroes && at >= extent.guest.get() && at < whole {
                    self.image.unmap(GuestOffset::new(at), whole - at)?;
                    dropped += whole - at;
                    at = whole;
                    continue;
                }
                let end = extent.end().next_multiple_of(cluster).min(at + buffers.len()).min(size);
                dropped += self.drop_equal_in(at..end, &mut buffers)?;
                at = end;
                if progress.is_cancelled() {
                    return Err(Error::Cancelled);
                }
            }
        }
        Ok(dropped)
    }

    /// The same for one buffer full: from the start of a cluster to the end of one.
    fn drop_equal_in(&self, range: Range<u64>, buffers: &mut Buffers) -> Result<u64> {
        let cluster = self.image.geometry().cluster_len();
        let start = GuestOffset::new(range.start);
        let (held, beneath) = buffers.parts(&range);
        self.new_below().read_at(beneath, start)?;
        held.copy_from_slice(beneath);
        self.image.read_present(held, start, &mut Vec::new())?;
        let mut dropped = 0;
        for (number, (held, beneath)) in held.chunks(cluster).zip(beneath.chunks(cluster)).enumerate() {
            if held == beneath {
                self.image.unmap(start.saturating_add((number * cluster) as u64), held.len() as u64)?;
                dropped += held.len() as u64;
            }
        }
        Ok(dropped)
    }
}

/// Whether two layers are one file.
fn same_file(a: &Layer, b: &Layer) -> bool {
    let (a, b) = (a.node.storage(), b.node.storage());
    Arc::ptr_eq(a, b) || (a.file_id().is_some() && a.file_id() == b.file_id())
}

/// Extents by position; behind the last one, zeroes.
struct Walk<'a> {
    extents: Option<ChainExtents<'a>>,
    current: Option<ChainExtent>,
}

impl<'a> Walk<'a> {
    fn new(extents: Option<ChainExtents<'a>>) -> Self {
        Self { extents, current: None }
    }

    /// The extent at a position, from there on. Positions never go back.
    fn at(&mut self, position: u64) -> Result<ChainExtent> {
        loop {
            if let Some(current) = self.current.filter(|current| position < current.end()) {
                let skipped = position.saturating_sub(current.guest.get());
                let (guest, kind) = (GuestOffset::new(position), current.kind.advanced(skipped));
                return Ok(ChainExtent { guest, len: current.len - skipped, kind, ..current });
            }
            let kind = ExtentKind::Zero { host: None };
            let (guest, len) = (GuestOffset::new(position), u64::MAX - position);
            let rest = ChainExtent { guest, len, layer: None, depth: 0, kind };
            let next = self.extents.as_mut().and_then(Iterator::next).transpose()?;
            self.current = Some(next.unwrap_or(rest));
        }
    }
}

/// Room for the same range of both sides.
struct Buffers {
    old: Vec<u8>,
    new: Vec<u8>,
}

impl Buffers {
    /// At least 1 MiB each, and whole clusters.
    fn new(image: &Image) -> Self {
        let len = image.geometry().cluster_len().max(1 << 20);
        Self { old: vec![0; len], new: vec![0; len] }
    }

    fn len(&self) -> u64 {
        self.old.len() as u64
    }

    fn parts(&mut self, range: &Range<u64>) -> (&mut [u8], &mut [u8]) {
        let len = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
        let (old, new) = (self.old.len(), self.new.len());
        (&mut self.old[..len.min(old)], &mut self.new[..len.min(new)])
    }
}

/// Carries out what the sides differ in.
struct Rebaser<'a> {
    target: &'a Target<'a>,
    copier: Copier<'a>,
    old: Below<'a>,
    new: Below<'a>,
    /// The unit in which the top holds data or does not.
    unit: u64,
    size: u64,
    buffers: Buffers,
    /// What is to be compared, gathered while it is adjacent.
    pending: Range<u64>,
}

impl<'a> Rebaser<'a> {
    fn new(sides: &Sides<'a>, target: &'a Target<'a>, copier: Copier<'a>) -> Self {
        let (old, new) = (sides.chain.below(0), sides.new_below());
        let unit = sides.image.geometry().subcluster_size();
        let (size, buffers) = (sides.chain.virtual_size(), Buffers::new(sides.image));
        Self { target, copier, old, new, unit, size, buffers, pending: 0..0 }
    }

    fn take(&mut self, piece: &Piece) -> Result<()> {
        let (start, end) = (piece.old.guest.get(), piece.old.end());
        match piece.action {
            Action::Skip => Ok(()),
            Action::Move => self.copier.take(piece.old),
            Action::Compare => self.compare_later(start..end),
            Action::Zero => {
                // Whole units need not be looked at; where only a part is zero, data would have to be written.
                let first = start.next_multiple_of(self.unit).min(end);
                let last = if end == self.size { end } else { (end - end % self.unit).max(first) };
                self.compare_later(start..first)?;
                if first < last {
                    let guest = GuestOffset::new(first);
                    self.copier.take(ChainExtent { guest, len: last - first, ..piece.old })?;
                }
                self.compare_later(last..end)
            }
        }
    }

    fn finish(mut self) -> Result<Report> {
        self.compare()?;
        self.copier.finish()
    }

    /// Small pieces that are adjacent are read together.
    fn compare_later(&mut self, range: Range<u64>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        if self.pending.end == range.start && !self.pending.is_empty() {
            self.pending.end = range.end;
        } else {
            self.compare()?;
            self.pending = range;
        }
        if self.pending.end - self.pending.start >= 16 * self.buffers.len() { self.compare() } else { Ok(()) }
    }

    /// Compares what is pending, and writes the old content where the new differs.
    fn compare(&mut self) -> Result<()> {
        let Range { mut start, end } = std::mem::take(&mut self.pending);
        while start < end {
            let step = self.buffers.len();
            let until = end.min(start - start % step + step);
            self.compare_part(start..until)?;
            self.copier.report.compared += until - start;
            self.copier.advance(until - start)?;
            start = until;
        }
        Ok(())
    }

    fn compare_part(&mut self, range: Range<u64>) -> Result<()> {
        let (old, new) = self.buffers.parts(&range);
        self.old.read_at(old, GuestOffset::new(range.start))?;
        self.new.read_at(new, GuestOffset::new(range.start))?;
        if old == new {
            return Ok(());
        }
        // Adjacent units with the same fate are written together.
        let mut run = (Fate::Equal, 0..0);
        let mut at = 0;
        while at < old.len() {
            let next = (range.start + at as u64 + 1).next_multiple_of(self.unit) - range.start;
            let next = usize::try_from(next).unwrap_or(usize::MAX).min(old.len());
            let fate = Fate::of(&old[at..next], &new[at..next]);
            if fate != run.0 {
                settle(self.target, &mut self.copier.report, range.start, old, &run)?;
                run = (fate, at..at);
            }
            run.1.end = next;
            at = next;
        }
        settle(self.target, &mut self.copier.report, range.start, old, &run)
    }
}

/// What becomes of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Equal,
    Zero,
    Data,
}

impl Fate {
    fn of(old: &[u8], new: &[u8]) -> Self {
        match () {
            () if old == new => Self::Equal,
            () if is_zero(old) => Self::Zero,
            () => Self::Data,
        }
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    static ZEROES: [u8; 4096] = [0; 4096];
    bytes.chunks(ZEROES.len()).all(|part| *part == ZEROES[..part.len()])
}

/// Writes one run of `old`, which starts at `start`.
fn settle(
    target: &Target<'_>,
    report: &mut Report,
    start: u64,
    old: &[u8],
    (fate, range): &(Fate, Range<usize>),
) -> Result<()> {
    let (at, len) = (GuestOffset::new(start + range.start as u64), range.len() as u64);
    match fate {
        Fate::Equal => {}
        Fate::Zero => {
            target.zero(at, len)?;
            report.zeroed += len;
        }
        Fate::Data => {
            target.write(&old[range.clone()], at)?;
            report.copied += len;
        }
    }
    Ok(())
}
