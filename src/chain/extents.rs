//! Which layer decides what: the extents of all layers walked in lockstep.

use std::ops::Range;

use crate::format::GuestOffset;
use crate::image::{self, Extent, ExtentKind};

use super::{Chain, Error, Node, Result};

/// A run of guest addresses that one layer decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChainExtent {
    /// Where it starts.
    pub guest: GuestOffset,
    /// Its length in bytes; never 0.
    pub len: u64,
    /// The deciding layer, 0 for the top; `None` where no layer holds anything.
    pub layer: Option<usize>,
    /// How deep one had to look: the deciding layer, or the last one that reaches as far as this. In a chain where
    /// `layer` is `None` and `depth` is not the deepest layer, the layer below `depth` is too short.
    pub depth: usize,
    /// What that layer holds; never [`ExtentKind::Unallocated`] with a layer. Without a layer, `Zero` says that zeroes
    /// are read, whatever lies deeper, and `Unallocated` that layers which were not asked for may decide.
    pub kind: ExtentKind,
}

impl ChainExtent {
    /// The first guest address behind the extent.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.guest.get().saturating_add(self.len)
    }

    /// Whether the extent reads as zeroes without any data being looked at.
    #[must_use]
    pub const fn is_zero(&self) -> bool {
        matches!(self.kind, ExtentKind::Zero { .. })
    }

    /// Takes in what follows, if it is more of the same. Tells whether it did.
    fn absorb(&mut self, next: &Self) -> bool {
        let same = self.end() == next.guest.get()
            && self.layer == next.layer
            && self.depth == next.depth
            && self.kind.advanced(self.len) == next.kind;
        if same {
            self.len += next.len;
        }
        same
    }
}

/// The extents of one layer, followed from front to back.
struct Cursor<'a> {
    node: &'a Node,
    /// The layer's virtual size.
    size: u64,
    /// Up to where extents are asked for.
    end: u64,
    /// How far to read on, rather than start anew, over addresses that layers above decide: an L2 table that has been
    /// fetched is not fetched again, one that need not be fetched is skipped.
    patience: u64,
    extents: Option<Box<dyn Iterator<Item = image::Result<Extent>> + Send + 'a>>,
    current: Option<Extent>,
}

impl<'a> Cursor<'a> {
    fn new(node: &'a Node, end: u64) -> Self {
        let size = node.virtual_size();
        let patience = node.as_qcow2().map_or(0, |image| image.geometry().l1_entry_span());
        Self { node, size, end: end.min(size), patience, extents: None, current: None }
    }

    /// The extent at a position within the layer's size, from there on. Positions never go back.
    fn at(&mut self, position: u64) -> image::Result<Extent> {
        while let (Some(current), Some(extents)) = (self.current, &mut self.extents) {
            let end = current.end();
            if position < end {
                return Ok(tail(current, position));
            }
            if position - end > self.patience {
                break;
            }
            self.current = extents.next().transpose()?;
        }
        let extents = self.extents.insert(Box::new(self.node.extents(position..self.end)));
        self.current = extents.next().transpose()?;
        // An image that somebody is just shrinking may end early.
        let rest =
            Extent { guest: GuestOffset::new(position), len: self.end - position, kind: ExtentKind::Unallocated };
        Ok(self.current.map_or(rest, |current| tail(current, position)))
    }
}

/// What an extent holds from a position within it on.
fn tail(extent: Extent, position: u64) -> Extent {
    let skipped = position - extent.guest.get();
    Extent { guest: GuestOffset::new(position), len: extent.len - skipped, kind: extent.kind.advanced(skipped) }
}

/// The extents of a guest range over several layers, in order, disjoint, without gaps, and coalesced.
///
/// Fetched lazily; deeper layers are asked only where all above them hold nothing, so that the cost follows the metadata
/// that is allocated, not the virtual size. After an error nothing follows.
#[must_use = "an iterator does nothing until it is asked"]
pub struct ChainExtents<'a> {
    cursors: Vec<Cursor<'a>>,
    /// The index of the first of them in the chain.
    first: usize,
    /// Whether the last of them is the chain's deepest layer.
    whole: bool,
    position: u64,
    end: u64,
    /// The next extent, which may still grow.
    pending: Option<ChainExtent>,
    failed: Option<image::Error>,
}

impl std::fmt::Debug for ChainExtents<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let layers = self.first..self.first + self.cursors.len();
        let range = self.position..self.end;
        f.debug_struct("ChainExtents").field("layers", &layers).field("left", &range).finish_non_exhaustive()
    }
}

impl ChainExtents<'_> {
    /// What is decided at the position, not coalesced.
    fn decide(&mut self) -> image::Result<ChainExtent> {
        let guest = GuestOffset::new(self.position);
        let mut len = self.end - self.position;
        let mut depth = self.first;
        for (index, cursor) in (self.first..).zip(&mut self.cursors) {
            if self.position >= cursor.size {
                // The layer above is longer: past the end of this one zeroes are read, whatever lies deeper.
                return Ok(ChainExtent { guest, len, layer: None, depth, kind: ExtentKind::Zero { host: None } });
            }
            depth = index;
            len = len.min(cursor.size - self.position);
            let extent = cursor.at(self.position)?;
            len = len.min(extent.len);
            if extent.kind != ExtentKind::Unallocated {
                return Ok(ChainExtent { guest, len, layer: Some(index), depth, kind: extent.kind });
            }
        }
        let kind = if self.whole { ExtentKind::Zero { host: None } } else { ExtentKind::Unallocated };
        Ok(ChainExtent { guest, len, layer: None, depth, kind })
    }
}

impl Iterator for ChainExtents<'_> {
    type Item = Result<ChainExtent>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.position < self.end {
            let next = match self.decide() {
                Ok(next) => next,
                Err(error) => {
                    self.failed = Some(error);
                    self.position = self.end;
                    break;
                }
            };
            self.position = next.end();
            if self.pending.as_mut().is_some_and(|pending| pending.absorb(&next)) {
                continue;
            }
            if let Some(whole) = self.pending.replace(next) {
                return Some(Ok(whole));
            }
        }
        match self.pending.take() {
            Some(last) => Some(Ok(last)),
            None => self.failed.take().map(|error| Err(Error::Image(error))),
        }
    }
}

impl std::iter::FusedIterator for ChainExtents<'_> {}

impl Chain {
    /// Which layer decides what of a guest range, as far as it lies within the virtual size.
    pub fn extents(&self, range: Range<u64>) -> ChainExtents<'_> {
        self.extents_of(0..self.layers.len(), range)
    }

    /// As [`Chain::extents`], asking only some of the layers: `0..n` gives what the `n` layers from the top hold, which
    /// is what a commit of them moves. The range is cut at the size of the first of them.
    ///
    /// # Panics
    /// Where there are no such layers.
    pub fn extents_of(&self, layers: Range<usize>, range: Range<u64>) -> ChainExtents<'_> {
        let asked = &self.layers[layers.clone()];
        let end = asked.first().map_or(0, |layer| layer.node.virtual_size()).min(range.end);
        ChainExtents {
            cursors: asked.iter().map(|layer| Cursor::new(&layer.node, end)).collect(),
            first: layers.start,
            whole: layers.end == self.layers.len(),
            position: range.start,
            end,
            pending: None,
            failed: None,
        }
    }
}

/// Extents by position; behind the last one, zeroes.
#[derive(Debug)]
pub(crate) struct Walk<'a> {
    extents: Option<ChainExtents<'a>>,
    current: Option<ChainExtent>,
}

impl<'a> Walk<'a> {
    pub(crate) fn new(extents: Option<ChainExtents<'a>>) -> Self {
        Self { extents, current: None }
    }

    /// The extent at a position, from there on. Positions never go back.
    pub(crate) fn at(&mut self, position: u64) -> Result<ChainExtent> {
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
