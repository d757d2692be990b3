//! The layer that receives, qcow2 or raw.

use std::ops::Range;
use std::sync::Arc;

use crate::chain::{Below, Chain, Node};
use crate::format::{GuestOffset, HostOffset, Version};
use crate::image::{ExtentKind, Image, Needs, Placement, ResizeOptions, Space};
use crate::storage::Storage;

use super::{Error, Result};

/// The receiving layer, and what lies beneath it.
#[derive(Debug)]
pub(super) struct Target<'a> {
    node: &'a Node,
    below: Below<'a>,
    file: String,
    space: Space,
}

impl<'a> Target<'a> {
    /// Layer `index` of a chain, which must be open for writing.
    pub(super) fn of(chain: &'a Chain, index: usize) -> Result<Self> {
        let target = Self::look(chain, index)?;
        if target.node.is_read_only() {
            let why = "the layer to merge into is not open for writing".to_owned();
            return Err(Error::Refused { file: target.file, why });
        }
        Ok(target)
    }

    /// Layer `index` of a chain, to look at only.
    pub(super) fn look(chain: &'a Chain, index: usize) -> Result<Self> {
        let Some(layer) = chain.layers().get(index) else {
            let why = "there is no such layer to merge into".to_owned();
            return Err(Error::Refused { file: chain.top().path.display().to_string(), why });
        };
        Ok(Self {
            node: &layer.node,
            below: chain.below(index),
            file: layer.path.display().to_string(),
            space: Space::Free,
        })
    }

    /// What messages call it.
    pub(super) fn file(&self) -> &str {
        &self.file
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

    /// The bytes that the target can still take: inside a container that cannot grow, else on the file system.
    pub(super) fn room(&self) -> Result<Option<u64>> {
        match self.image().map(Image::room_inside).transpose()?.flatten() {
            Some(inside) => Ok(Some(inside)),
            None => Ok(self.storage().free_space()?),
        }
    }

    /// What writing a guest range would take, and how large the clusters are that it is counted in.
    pub(super) fn needs(&self, range: Range<u64>) -> Result<Needs> {
        if let Node::Qcow2(image) = self.node {
            return Ok(image.needs(range)?);
        }
        let end = range.end;
        let mut needs = Needs { clusters: (range.end - range.start).div_ceil(self.granularity()), ..Needs::default() };
        for extent in self.node.extents(range) {
            let extent = extent?;
            if matches!(extent.kind, ExtentKind::Data { .. }) {
                needs.in_place += extent.len;
            }
        }
        // Space that is allocated and was never written looks like a hole: no more is needed than what is not allocated.
        let missing = self.node.virtual_size().saturating_sub(self.storage().allocated_len()?.unwrap_or(0));
        let missing = missing.max(end.saturating_sub(self.node.virtual_size()));
        needs.clusters -= needs.clusters.min(needs.in_place / self.granularity());
        needs.clusters = needs.clusters.min(missing.div_ceil(self.granularity()));
        Ok(needs)
    }

    /// Whether a range of zeroes can only be said by data.
    pub(super) fn zeroes_are_data(&self) -> bool {
        self.image().is_some_and(|image| {
            let header = image.header();
            header.header.version == Version::V2 && header.backing_file.is_some()
        })
    }

    /// Refuses a merge for which new clusters of `need` bytes do not fit.
    pub(super) fn check_room(&self, need: u64) -> Result<()> {
        match self.room()? {
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

    /// Returns true if the virtual size is below `size` bytes.
    pub(super) fn is_smaller_than(&self, size: u64) -> bool {
        self.node.virtual_size() < size
    }

    /// Returns true if the virtual size is above `size` bytes.
    pub(super) fn is_larger_than(&self, size: u64) -> bool {
        self.node.virtual_size() > size
    }

    /// Cuts the target where it is larger. Durable on return. A raw device keeps its length; the part past `size` is
    /// zeroed, so that the guest does not see old data there.
    pub(super) fn shrink_to(&self, size: u64) -> Result<()> {
        if size >= self.node.virtual_size() {
            return Ok(());
        }
        match self.node {
            Node::Qcow2(image) => image.resize(size, &ResizeOptions::default().with_shrink(true))?,
            Node::Raw(raw) => {
                if self.storage().is_fixed_size() {
                    raw.write_zeroes_at(GuestOffset::new(size), self.node.virtual_size() - size)?;
                } else {
                    raw.resize(size)?;
                }
                raw.flush()?;
            }
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
