//! Reading and writing through all layers.

use crate::format::GuestOffset;
use crate::image::{self, Backing};

use super::{Chain, Error, Layer, Result};

/// What lies beneath a layer of a chain: the backing that a write to that layer needs. May be nothing, which reads as
/// zeroes.
#[derive(Clone, Copy, Debug)]
pub struct Below<'a>(&'a [Layer]);

impl Below<'_> {
    /// The virtual size in bytes: that of the first layer of it; 0 where there is nothing.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.0.first().map_or(0, |layer| layer.node.virtual_size())
    }
}

impl Backing for Below<'_> {
    fn read_at(&self, buf: &mut [u8], offset: GuestOffset) -> image::Result<()> {
        let mut missing = Vec::new();
        let Some((first, deeper)) = self.0.split_first() else {
            buf.fill(0);
            return Ok(());
        };
        read_layer(first, buf, offset, &mut missing)?;
        // Two lists in turns: nothing is allocated layer by layer.
        let (mut holes, mut still_missing) = (Vec::new(), Vec::new());
        for layer in deeper {
            if missing.is_empty() {
                return Ok(());
            }
            for (start, len) in missing.drain(..) {
                read_layer(layer, &mut buf[start..start + len], offset.saturating_add(start as u64), &mut holes)?;
                still_missing.extend(holes.drain(..).map(|(hole, len)| (start + hole, len)));
            }
            std::mem::swap(&mut missing, &mut still_missing);
        }
        for (start, len) in missing {
            buf[start..start + len].fill(0);
        }
        Ok(())
    }
}

/// Fills what one layer decides of `buf`; the rest is pushed to `holes` as (start in `buf`, length).
fn read_layer(
    layer: &Layer,
    buf: &mut [u8],
    offset: GuestOffset,
    holes: &mut Vec<(usize, usize)>,
) -> image::Result<()> {
    // What deeper layers hold past the end of this one stays hidden.
    let inside = layer.node.virtual_size().saturating_sub(offset.get());
    let (inside, outside) = buf.split_at_mut(usize::try_from(inside).unwrap_or(usize::MAX).min(buf.len()));
    outside.fill(0);
    if inside.is_empty() { Ok(()) } else { layer.node.read_present(inside, offset, holes) }
}

impl Chain {
    /// Reads guest data: each byte from the first layer that holds it, zeroes where none does.
    ///
    /// # Errors
    /// [`Error::PastEnd`]; [`Error::Image`] where a layer cannot be read, is corrupt, or is encrypted: then nothing at
    /// all is read.
    pub fn read_at(&self, buf: &mut [u8], offset: GuestOffset) -> Result<()> {
        self.check_access(offset, buf.len() as u64)?;
        Ok(Below(&self.layers).read_at(buf, offset)?)
    }

    /// Writes guest data to the top. What a touched cluster of it lacks is taken from the layers below.
    ///
    /// # Errors
    /// [`Error::PastEnd`]; [`Error::Image`] where the top is read-only or cannot be written.
    pub fn write_at(&self, buf: &[u8], offset: GuestOffset) -> Result<()> {
        self.check_access(offset, buf.len() as u64)?;
        Ok(self.top().node.write_over(buf, offset, &self.below(0))?)
    }

    /// Makes a range read as zeroes.
    ///
    /// # Errors
    /// As [`Chain::write_at`].
    pub fn write_zeroes_at(&self, offset: GuestOffset, len: u64) -> Result<()> {
        self.check_access(offset, len)?;
        Ok(self.top().node.write_zeroes_over(offset, len, &self.below(0))?)
    }

    /// Says that a range is no longer needed: what the top can give back of it reads as zeroes afterwards, as
    /// [`image::Image::discard_at`] says; the rest stays as it is.
    ///
    /// # Errors
    /// As [`Chain::write_at`].
    pub fn discard_at(&self, offset: GuestOffset, len: u64) -> Result<()> {
        self.check_access(offset, len)?;
        Ok(self.top().node.discard(offset, len)?)
    }

    /// All layers as what lies beneath another image.
    pub(crate) fn beneath_another(&self) -> Below<'_> {
        Below(&self.layers)
    }

    /// What lies beneath the layer of this index; nothing beneath the last one and for an index that is none.
    #[must_use]
    pub fn below(&self, index: usize) -> Below<'_> {
        Below(index.checked_add(1).and_then(|next| self.layers.get(next..)).unwrap_or_default())
    }

    /// Refuses a range past the end, and any access to a chain of which one layer's data cannot be understood.
    fn check_access(&self, offset: GuestOffset, len: u64) -> Result<()> {
        if self.data_denied {
            self.layers.iter().try_for_each(|layer| layer.node.data_access())?;
        }
        let size = self.virtual_size();
        if offset.checked_add(len).is_some_and(|end| end.get() <= size) {
            return Ok(());
        }
        Err(Error::PastEnd { file: self.top().node.name().to_owned(), offset: offset.get(), len, size })
    }
}
