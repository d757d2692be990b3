//! The layer that receives, qcow2 or raw.

use std::sync::Arc;

use crate::chain::{Below, Chain, Node};
use crate::format::{GuestOffset, HostOffset};
use crate::image::{ExtentKind, Image, Placement, ResizeOptions, Space};
use crate::storage::Storage;

use super::{Error, Result, Work};

/// The receiving layer, and what lies beneath it.
#[derive(Debug)]
pub(super) struct Target<'a> {
    node: &'a Node,
    below: Below<'a>,
    file: String,
    space: Space,
}

impl<'a> Target<'a> {
    /// Layer `index` of a chain.
    pub(super) fn of(chain: &'a Chain, index: usize) -> Result<Self> {
        let refused = |file: String, why: &str| Err(Error::Refused { file, why: why.to_owned() });
        let Some(layer) = chain.layers().get(index) else {
            let file = chain.layers().first().map_or_else(String::new, |layer| layer.path.display().to_string());
            return refused(file, "there is no such layer to merge into");
        };
        let file = layer.path.display().to_string();
        let target = Self { node: &layer.node, below: chain.below(index), file, space: Space::Free };
        if target.node.is_read_only() {
            refused(target.file, "the layer to merge into is not open for writing")
        } else {
            Ok(target)
        }
    }

    /// The same, saying of zeroes that they are zeroes even where nothing lies beneath yet.
    pub(super) fn hiding(mut self) -> Self {
        self.space = Space::Hide;
        self
    }

    /// The qcow2 image, if it is one.
    pub(super) fn image(&self) -> Option<&'a Image> {
        self.node.as_qcow2()
    }

    /// Where its bytes lie.
    pub(super) fn storage(&self) -> &'a Arc<dyn Storage> {
        self.node.storage()
    }

    /// Runs that are a multiple of this, and start at one, can be copied from file to file.
    pub(super) fn granularity(&self) -> u64 {
        self.image().map_or(512, |image| image.geometry().cluster_size())
    }

    /// Refuses a merge that cannot fit, as far as that can be told: all data may need new clusters.
    pub(super) fn check_space(&self, work: &Work) -> Result<()> {
        let Some(have) = self.storage().free_space()? else { return Ok(()) };
        let held = match self.node {
            // What the target holds already is overwritten in place.
            Node::Qcow2(image) => held_bytes(image)?,
            Node::Raw(raw) => raw.storage().allocated_len()?.unwrap_or(0),
        };
        let need = work.data.saturating_sub(held);
        if need > have { Err(Error::NoSpace { file: self.file.clone(), need, have }) } else { Ok(()) }
    }

    /// Refuses a merge for which new clusters of `need` bytes do not fit.
    pub(super) fn check_room(&self, need: u64) -> Result<()> {
        match self.storage().free_space()? {
            Some(have) if need > have => Err(Error::NoSpace { file: self.file.clone(), need, have }),
            _ => Ok(()),
        }
    }

    /// Grows the target where it is smaller; the new part reads as zeroes.
    pub(super) fn grow_to(&self, size: u64) -> Result<()> {
        if size <= self.node.virtual_size() {
            return Ok(());
        }
        match self.node {
            Node::Qcow2(image) => {
                image.resize_over(size, &ResizeOptions::default(), &self.below, self.below.virtual_size())?;
            }
            Node::Raw(raw) => raw.resize(size)?,
        }
        Ok(())
    }

    /// Writes data of any alignment.
    pub(super) fn write(&self, buf: &[u8], offset: GuestOffset) -> Result<()> {
        match self.node {
            Node::Qcow2(image) => image.write_at_over(buf, offset, &self.below)?,
            Node::Raw(raw) => raw.write_at(buf, offset)?,
        }
        Ok(())
    }

    /// Makes a range read as zeroes and frees its space.
    pub(super) fn zero(&self, offset: GuestOffset, len: u64) -> Result<()> {
        match self.node {
            Node::Qcow2(image) => image.zero_range(offset, len, self.space, &self.below)?,
            Node::Raw(raw) => raw.write_zeroes_at(offset, len)?,
        }
        Ok(())
    }

    /// Finds room for whole clusters.
    pub(super) fn place(&self, guest: GuestOffset, len: u64, out: &mut Vec<Placement>) -> Result<()> {
        match self.node {
            Node::Qcow2(image) => image.place(guest, len, out)?,
            Node::Raw(_) => out.push(Placement { guest, host: HostOffset::new(guest.get()), len, mapped: true }),
        }
        Ok(())
    }

    /// Maps what was placed and written.
    pub(super) fn publish(&self, placements: &[Placement]) -> Result<()> {
        Ok(self.image().map_or(Ok(()), |image| image.publish(placements))?)
    }

    /// Gives back what was placed and will not be written.
    pub(super) fn abandon(&self, placements: &[Placement]) -> Result<()> {
        Ok(self.image().map_or(Ok(()), |image| image.abandon(placements))?)
    }

    /// Returns when all of it is durable.
    pub(super) fn flush(&self) -> Result<()> {
        Ok(self.node.flush()?)
    }
}

/// The guest bytes for which an image has clusters.
fn held_bytes(image: &Image) -> Result<u64> {
    let mut held = 0;
    for extent in image.extents(0..image.virtual_size()) {
        let extent = extent?;
        if matches!(extent.kind, ExtentKind::Data { .. }) {
            held += extent.len;
        }
    }
    Ok(held)
}
