//! What lies beneath the top before and after, walked side by side.

use std::sync::Arc;

use crate::chain::{Below, Chain, ChainExtent, ChainExtents, Format, Layer, Node, Walk};
use crate::format::Version;
use crate::image::{ExtentKind, Image};

use super::super::{Error, Result};
use super::{Onto, RebaseOptions};

/// The old layers beneath the top, and the new ones.
pub(super) struct Sides<'a> {
    pub(super) chain: &'a Chain,
    pub(super) onto: Onto<'a>,
    pub(super) image: &'a Image,
    version: Version,
}

/// What a rebase has to do, in guest bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Work {
    pub(super) total: u64,
    /// Data that certainly goes to the top.
    pub(super) moved: u64,
}

/// What to do with a piece of what the top does not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
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
pub(super) struct Piece {
    pub(super) old: ChainExtent,
    pub(super) action: Action,
}

impl<'a> Sides<'a> {
    /// Refuses what cannot be done before anything is written.
    pub(super) fn new(chain: &'a Chain, onto: Onto<'a>, options: &RebaseOptions) -> Result<Self> {
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
    pub(super) fn base(&self) -> Option<&'a Layer> {
        match self.onto {
            Onto::Nothing => None,
            Onto::Chain(other) => Some(other.top()),
            Onto::Layer(index) => self.chain.layers().get(index),
        }
    }

    /// What lies beneath the top afterwards.
    pub(super) fn new_below(&self) -> Below<'a> {
        match self.onto {
            Onto::Nothing => self.chain.below(usize::MAX),
            Onto::Chain(other) => other.beneath_another(),
            Onto::Layer(index) => self.chain.below(index - 1),
        }
    }

    pub(super) fn new_extents(&self) -> Walk<'a> {
        let all = 0..self.chain.virtual_size();
        Walk::new(match self.onto {
            Onto::Nothing => None,
            Onto::Chain(other) => Some(other.extents(all)),
            Onto::Layer(index) => Some(self.chain.extents_of(index..self.chain.layers().len(), all)),
        })
    }

    /// Top and old layers, as far as they are none of the new ones.
    pub(super) fn old_extents(&self) -> ChainExtents<'a> {
        let layers = match self.onto {
            Onto::Layer(index) => index,
            Onto::Chain(_) | Onto::Nothing => self.chain.layers().len(),
        };
        self.chain.extents_of(0..layers, 0..self.chain.virtual_size())
    }

    pub(super) fn survey(&self) -> Result<Work> {
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
    pub(super) fn pieces(&self) -> impl Iterator<Item = Result<Piece>> + '_ {
        let mut new = self.new_extents();
        let mut old = Walk::new(Some(self.old_extents()));
        let (mut at, end) = (0, self.chain.virtual_size());
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let piece = old.at(at).map_err(Error::from).and_then(|mut old| {
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

    pub(super) fn action(&self, old: &ChainExtent, new: &ChainExtent) -> Action {
        match (old.is_zero(), new.is_zero()) {
            (true, true) => Action::Skip,
            (false, true) => Action::Move,
            _ if self.shared(old, new) => Action::Skip,
            (true, false) if self.version == Version::V3 => Action::Zero,
            _ => Action::Compare,
        }
    }

    /// Whether both sides have the same bytes of the same file.
    pub(super) fn shared(&self, old: &ChainExtent, new: &ChainExtent) -> bool {
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
}

/// Whether two layers are one file.
fn same_file(a: &Layer, b: &Layer) -> bool {
    let (a, b) = (a.node.storage(), b.node.storage());
    Arc::ptr_eq(a, b) || (a.file_id().is_some() && a.file_id() == b.file_id())
}
