//! Giving up what the new backing file shows as well.

use std::ops::Range;

use crate::format::GuestOffset;
use crate::image::{Backing, ExtentKind};

use super::super::{Error, Result};
use super::compare::Buffers;
use super::sides::Sides;
use crate::progress::Progress;

impl Sides<'_> {
    /// Gives up the clusters of the top that equal what lies beneath it now. Returns how many bytes they held.
    pub(super) fn drop_equal(&self, progress: &dyn Progress) -> Result<u64> {
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
