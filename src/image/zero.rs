//! Zeroes and discards: mappings change, data is written only where no mapping can say it.

use crate::format::{GuestOffset, L2Entry, NormalCluster, Subclusters, Version};

use super::state::State;
use super::{Backing, Result};

/// What becomes of the host clusters of a zeroed range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    /// They stay reserved, where the format can say so.
    Keep,
    /// They are given back.
    Free,
    /// They are given back, and the range says that it is zero even where nothing lies beneath: something will.
    Hide,
}

impl State {
    /// Makes `offset..end` read as zeroes. `prepare_write` has been called; `end` is within the virtual size.
    pub(super) fn zero(&mut self, offset: GuestOffset, end: u64, space: Space, backing: &dyn Backing) -> Result<()> {
        let mut position = offset;
        while position.get() < end {
            if space != Space::Hide
                && let Some(next) = self.zero_gap(position, end)?
            {
                position = next;
                continue;
            }
            let in_cluster = self.geometry.offset_in_cluster(position);
            let until = (position.get() - in_cluster).saturating_add(self.geometry.cluster_size());
            // The last cluster is whole where the range reaches the end of the disk in it.
            let whole = in_cluster == 0 && (until <= end || end == self.header.header.virtual_size());
            let until = until.min(end);
            if whole {
                self.zero_cluster(position, until, space, backing)?;
            } else {
                self.zero_part(position, until, space, backing)?;
            }
            self.flush_if_crowded()?;
            position = GuestOffset::new(until);
        }
        Ok(())
    }

    /// Where nothing is allocated from `position` on, and nothing lies beneath: how far.
    fn zero_gap(&self, position: GuestOffset, end: u64) -> Result<Option<GuestOffset>> {
        if self.header.backing_file.is_some() || self.l2_table(position)?.is_some() {
            return Ok(None);
        }
        Ok(Some(GuestOffset::new(self.extent_at(position, end)?.end())))
    }

    /// Zeroes a whole cluster, or the last one as far as the disk goes.
    fn zero_cluster(&mut self, position: GuestOffset, end: u64, space: Space, backing: &dyn Backing) -> Result<()> {
        let has_backing = self.header.backing_file.is_some() || space == Space::Hide;
        let all = Subclusters::mask(self.geometry.subclusters());
        let old = self.entry(position)?;
        if let L2Entry::Normal(NormalCluster { host, subclusters, .. }) = old {
            let settled = host.is_none() || space == Space::Keep;
            if settled && subclusters.zero == all || !has_backing && host.is_none() && subclusters.zero == 0 {
                return Ok(());
            }
        }
        let new = match (self.version, old) {
            (Version::V2, _) if has_backing => return self.zero_by_data(position, end, backing),
            (Version::V2, _) => L2Entry::UNALLOCATED,
            (Version::V3, L2Entry::Normal(NormalCluster { host: Some(host), copied: true, .. }))
                if space == Space::Keep =>
            {
                let subclusters = Subclusters { allocated: 0, zero: all };
                L2Entry::Normal(NormalCluster { host: Some(host), copied: true, subclusters })
            }
            (Version::V3, _) => L2Entry::zero(self.geometry),
        };
        self.set_entry(position, &new)?;
        let kept = matches!(new, L2Entry::Normal(NormalCluster { host: Some(_), .. }));
        if kept { Ok(()) } else { self.free_entry(&old, space != Space::Keep) }
    }

    /// Zeroes a part of a cluster: whole subclusters by their bits, the rest by data.
    fn zero_part(&mut self, position: GuestOffset, end: u64, space: Space, backing: &dyn Backing) -> Result<()> {
        let size = self.geometry.subcluster_size();
        let mut at = position;
        while at.get() < end {
            let extent = self.extent_at(at, end)?;
            let boundary = (at.get() & !(size - 1)) + size;
            let until = boundary.min(end);
            let is_zero = match extent.kind {
                super::ExtentKind::Zero { .. } => true,
                super::ExtentKind::Unallocated => self.header.backing_file.is_none() && space != Space::Hide,
                _ => false,
            };
            if is_zero {
                at = GuestOffset::new(extent.end());
                continue;
            }
            let whole = at.get() & (size - 1) == 0 && until == boundary;
            let entry = self.entry(at)?;
            match entry {
                L2Entry::Normal(cluster) if whole && self.geometry.extended_l2() => {
                    self.zero_subcluster(at, cluster, space)?;
                }
                _ => self.zero_by_data(at, until, backing)?,
            }
            at = GuestOffset::new(until);
        }
        Ok(())
    }

    /// Sets the zero bit of one subcluster.
    fn zero_subcluster(&mut self, at: GuestOffset, old: NormalCluster, space: Space) -> Result<()> {
        let bit = 1_u32 << self.geometry.subcluster_index(at);
        let mut new = old;
        new.subclusters.allocated &= !bit;
        new.subclusters.zero |= bit;
        let give_up = space != Space::Keep && new.subclusters.allocated == 0;
        if give_up {
            new.host = None;
            new.copied = false;
        }
        self.set_entry(at, &L2Entry::Normal(new))?;
        if give_up { self.free_entry(&L2Entry::Normal(old), true) } else { Ok(()) }
    }

    /// Writes zeroes as data: at most one cluster.
    fn zero_by_data(&mut self, position: GuestOffset, end: u64, backing: &dyn Backing) -> Result<()> {
        let zeroes = vec![0; super::as_len(end - position.get())];
        self.write(&zeroes, position, backing)
    }

    /// Gives back the whole clusters in `offset..end`; they read as zeroes afterwards.
    pub(super) fn discard(&mut self, offset: GuestOffset, end: u64, backing: &dyn Backing) -> Result<()> {
        if self.version == Version::V2 && self.header.backing_file.is_some() {
            // Version 2 can say "not here", which would show the backing file, but not "zero".
            return Ok(());
        }
        let size = self.geometry.cluster_size();
        let start = offset.get().next_multiple_of(size);
        let end = if end == self.header.header.virtual_size() { end } else { end & !(size - 1) };
        if start >= end {
            return Ok(());
        }
        self.zero(GuestOffset::new(start), end, Space::Free, backing)
    }
}
