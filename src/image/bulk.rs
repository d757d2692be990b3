//! What a merge needs: space for many clusters at once, reserved before and mapped after their data is there.

use std::ops::Range;
use std::sync::Arc;

use crate::format::{GuestOffset, HostCluster, HostOffset, L2Entry};

use super::refcounts::{ClusterRun, Refcounts};
use super::state::State;
use super::{Image, Result};

/// A run of whole guest clusters, and where their data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Placement {
    /// The first guest cluster.
    pub(crate) guest: GuestOffset,
    /// Where its data goes; the rest follows.
    pub(crate) host: HostOffset,
    /// The length in bytes, whole clusters.
    pub(crate) len: u64,
    /// The clusters are mapped there already and are overwritten in place.
    pub(crate) mapped: bool,
}

/// What writing a guest range would take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Needs {
    /// Bytes that are overwritten where they lie.
    pub(crate) in_place: u64,
    /// Clusters that must be allocated.
    pub(crate) clusters: u64,
}

impl Image {
    /// Finds room for the whole guest clusters of `guest..guest + len`: where they lie, if they are ours alone, else new
    /// clusters, adjacent to those of the call before where the file has room. Nothing maps to the new clusters until
    /// [`Image::publish`].
    ///
    /// # Errors
    /// As [`Image::write_at`].
    pub(crate) fn place(&self, guest: GuestOffset, len: u64, out: &mut Vec<Placement>) -> Result<()> {
        self.check_write(guest, 0)?;
        self.changing(|state| state.place(guest, len, out))
    }

    /// Maps what was placed, now that its data is written. Durable with the next [`Image::flush`].
    ///
    /// # Errors
    /// As [`Image::write_at`].
    pub(crate) fn publish(&self, placements: &[Placement]) -> Result<()> {
        self.changing(|state| {
            for placement in placements.iter().filter(|placement| !placement.mapped) {
                state.publish(placement)?;
            }
            Ok(())
        })
    }

    /// Gives up all that the image holds: it reads through to its backing file. Header, internal snapshots and bitmaps stay.
    /// Durable on return; at every crash point the image holds a cluster or it does not, and its refcounts are at worst
    /// too high.
    ///
    /// # Errors
    /// As [`Image::write_at`].
    pub(crate) fn make_empty(&self) -> Result<()> {
        self.check_write(GuestOffset::ZERO, 0)?;
        self.changing(State::make_empty)
    }

    /// Gives up the whole guest clusters from `guest` on, the last of which may be cut by the disk's end: the image reads
    /// through to its backing file there. Durable with the next [`Image::flush`].
    ///
    /// # Errors
    /// As [`Image::write_at`].
    pub(crate) fn unmap(&self, guest: GuestOffset, len: u64) -> Result<()> {
        self.check_write(guest, len)?;
        self.changing(|state| {
            let mut position = guest;
            while position < guest.saturating_add(len) {
                let old = state.entry(position)?;
                if old != L2Entry::UNALLOCATED {
                    state.set_entry(position, &L2Entry::UNALLOCATED)?;
                    state.free_entry(&old, true)?;
                    state.flush_if_crowded()?;
                }
                position = position.saturating_add(state.geometry.cluster_size());
            }
            Ok(())
        })
    }

    /// How much of a guest range would be overwritten where it lies, and how many clusters it would newly need. Counts
    /// from the start of the cluster that it starts in.
    ///
    /// # Errors
    /// As [`Image::read_present`].
    pub(crate) fn needs(&self, range: Range<u64>) -> Result<Needs> {
        self.shared(|state| state.needs(range))
    }

    /// The bytes that can still be allocated in a container that cannot grow; none where it can.
    ///
    /// # Errors
    /// [`super::Error::Storage`] where the refcounts cannot be read.
    pub(crate) fn room_inside(&self) -> Result<Option<u64>> {
        if !self.storage.is_fixed_size() {
            return Ok(None);
        }
        self.exclusive(|state| {
            if let Some(writer) = &mut state.writer {
                return writer.refcounts.room_inside();
            }
            let storage = Arc::clone(&state.storage);
            Refcounts::load(storage, &state.header.header, &state.limits)?.room_inside()
        })
    }

    /// Gives back what was placed but will not be published.
    ///
    /// # Errors
    /// [`super::Error::Storage`] where a refcount block cannot be read.
    pub(crate) fn abandon(&self, placements: &[Placement]) -> Result<()> {
        self.changing(|state| {
            let bits = state.geometry.cluster_bits().get();
            for placement in placements.iter().filter(|placement| !placement.mapped) {
                let start = state.geometry.host_cluster(placement.host);
                state.writer()?.refcounts.release(ClusterRun { start, count: placement.len >> bits })?;
            }
            Ok(())
        })
    }
}

impl State {
    fn needs(&self, range: Range<u64>) -> Result<Needs> {
        let size = self.geometry.cluster_size();
        let mut needs = Needs::default();
        let mut position = range.start - range.start % size;
        while position < range.end {
            let at = GuestOffset::new(position);
            let whole = range.end.checked_next_multiple_of(size).unwrap_or(range.end);
            if self.l2_table(at)?.is_none() {
                let end = (self.geometry.l1_index(at) + 1) << self.geometry.l1_entry_bits();
                needs.clusters += (end.min(whole) - position).div_ceil(size);
                position = end;
                continue;
            }
            let run = self.in_place_at(at, whole)?.map_or(0, |(_, len)| len);
            let kept = run - run % size;
            if kept == 0 {
                needs.clusters += 1;
            }
            let end = (position + kept.max(size)).min(range.end);
            if kept > 0 {
                needs.in_place += end.saturating_sub(position.max(range.start));
            }
            position += kept.max(size);
        }
        Ok(needs)
    }

    fn place(&mut self, guest: GuestOffset, len: u64, out: &mut Vec<Placement>) -> Result<()> {
        let cluster_bits = self.geometry.cluster_bits().get();
        let end = guest.saturating_add(len).get();
        let mut position = guest;
        while position.get() < end {
            if let Some((host, run)) = self.in_place_at(position, end)?
                && run >> cluster_bits > 0
            {
                let len = run >> cluster_bits << cluster_bits;
                let count = len >> cluster_bits;
                let start = self.geometry.host_cluster(host);
                let name = self.storage.clone();
                let geometry = self.geometry;
                self.writer()?.metadata.check(ClusterRun { start, count }, name.name(), geometry)?;
                out.push(Placement { guest: position, host, len, mapped: true });
                position = position.saturating_add(len);
                continue;
            }
            let want = self.unplaced(position, end)?;
            let (run, _) = self.allocate(want)?;
            let len = run.count << cluster_bits;
            out.push(Placement { guest: position, host: self.host_offset(run.start), len, mapped: false });
            position = position.saturating_add(len);
        }
        Ok(())
    }

    /// How many whole clusters from `position` on cannot be overwritten where they lie; at least the first.
    fn unplaced(&self, position: GuestOffset, end: u64) -> Result<u64> {
        let size = self.geometry.cluster_size();
        let mut count = 1;
        loop {
            let next = position.saturating_add(count << self.geometry.cluster_bits().get());
            if next.get() >= end || self.in_place_at(next, next.get() + size)?.is_some_and(|(_, len)| len == size) {
                return Ok(count);
            }
            count += 1;
        }
    }

    /// Maps one placement, L2 table by L2 table.
    fn publish(&mut self, placement: &Placement) -> Result<()> {
        let cluster_bits = self.geometry.cluster_bits().get();
        let mut done = 0;
        while done < placement.len {
            let guest = placement.guest.saturating_add(done);
            let table_end = (self.geometry.l1_index(guest) + 1) << self.geometry.l1_entry_bits();
            let len = (placement.len - done).min(table_end - guest.get());
            let host = self.geometry.host_cluster(placement.host).get() + (done >> cluster_bits);
            self.map_run(guest, ClusterRun { start: HostCluster::new(host), count: len >> cluster_bits })?;
            self.flush_if_crowded()?;
            done += len;
        }
        Ok(())
    }
}
