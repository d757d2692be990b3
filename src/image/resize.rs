//! Growing and shrinking the virtual disk.

use std::cmp::Ordering;

use crate::format::{FormatError, GuestOffset, HostCluster, L1Entry, L2Entry, Version, encode_l1};
use crate::storage;

use super::flush::After;
use super::overlap::Structure;
use super::refcounts::ClusterRun;
use super::state::State;
use super::table_count::TableCount;
use super::zero::Space;
use super::{Backing, Error, Image, NoBacking, Preallocation, Result, as_len};

/// How [`Image::resize`] goes about it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ResizeOptions {
    /// Allows the image to become smaller: what lies behind the new end is lost.
    pub shrink: bool,
    /// What to allocate for the new part when growing.
    pub preallocation: Preallocation,
}

impl ResizeOptions {
    /// The same, allowing the image to become smaller or not.
    #[must_use]
    pub fn with_shrink(mut self, shrink: bool) -> Self {
        self.shrink = shrink;
        self
    }

    /// The same with another preallocation.
    #[must_use]
    pub fn with_preallocation(mut self, preallocation: Preallocation) -> Self {
        self.preallocation = preallocation;
        self
    }
}

impl Image {
    /// Changes the virtual size, in bytes, which must be a multiple of 512. The new part reads as zeroes. Durable on
    /// return; at every crash point the old or the new size holds, with the content that belongs to it. Bitmaps are marked
    /// inconsistent.
    ///
    /// # Errors
    /// [`Error::Refused`] for shrinking without leave, for version 2 images with internal snapshots, and for growing an
    /// overlay, of which [`Image::resize_over`] must know the backing file; [`Error::Limit`] where the L1 table would be
    /// too large.
    pub fn resize(&self, size: u64, options: &ResizeOptions) -> Result<()> {
        if size > self.virtual_size() && self.header().backing_file.is_some() {
            return Err(Error::refused(self.name(), "growing an overlay needs its backing file; use the chain"));
        }
        self.resize_over(size, options, &NoBacking(self.name()), 0)
    }

    /// As [`Image::resize`] for an overlay, whose backing file has `backing_size` bytes: where it is longer than the
    /// overlay was, what it has there does not show through.
    ///
    /// # Errors
    /// As [`Image::resize`].
    pub fn resize_over(
        &self,
        size: u64,
        options: &ResizeOptions,
        backing: &dyn Backing,
        backing_size: u64,
    ) -> Result<()> {
        self.check_write(GuestOffset::ZERO, 0)?;
        let old = self.virtual_size();
        if !size.is_multiple_of(512) {
            return Err(Error::refused(self.name(), format!("the new size {size} is no multiple of 512")));
        }
        if size < old && !options.shrink {
            return Err(Error::refused(
                self.name(),
                format!("shrinking from {old} to {size} bytes loses data and was not asked for"),
            ));
        }
        if size < old && options.preallocation != Preallocation::Off {
            return Err(Error::refused(self.name(), "preallocation is for growing only"));
        }
        self.changing(|state| {
            if state.version == Version::V2 && state.header.header.nb_snapshots > 0 {
                let file = state.storage.name();
                return Err(Error::refused(file, "a version 2 image with internal snapshots cannot be resized"));
            }
            // Another thread may have changed it meanwhile.
            let old = state.header.header.virtual_size();
            if size < old && !options.shrink {
                return Err(Error::refused(state.storage.name(), format!("the disk has grown to {old} bytes")));
            }
            state.invalidate_bitmaps(true)?;
            match size.cmp(&old) {
                Ordering::Less => state.shrink(size),
                Ordering::Equal => Ok(()),
                Ordering::Greater => state.grow(size, options.preallocation, backing, backing_size),
            }
        })
    }
}

impl State {
    /// Writes the new virtual size; it lies in the header's first sector.
    fn write_size(&mut self, size: u64) -> Result<()> {
        let mut header = self.header.clone();
        header.header.size = size;
        self.write_header(header)
    }

    fn shrink(&mut self, size: u64) -> Result<()> {
        self.refuse_shared_tables(self.first_cut(size))?;
        self.write_size(size)?;
        self.drop_mappings(size)?;
        // The first barrier of every flush lies before the mappings: the new size is durable before anything behind it is
        // given up.
        self.flush_and(After::Cut)
    }

    fn grow(
        &mut self,
        size: u64,
        preallocation: Preallocation,
        backing: &dyn Backing,
        backing_size: u64,
    ) -> Result<()> {
        let old = self.header.header.virtual_size();
        // An earlier shrink that did not finish, or another program, may have left mappings behind the end.
        self.drop_mappings(old)?;
        self.grow_l1(size)?;
        let shown = if self.header.backing_file.is_some() { backing_size.min(size) } else { old };
        let cluster_end = old.next_multiple_of(self.geometry.cluster_size()).min(size);
        self.zero(GuestOffset::new(old), cluster_end.max(shown), Space::Keep, backing)?;
        if preallocation != Preallocation::Off {
            self.preallocate(old.next_multiple_of(self.geometry.cluster_size()), size, preallocation)?;
        }
        self.flush()?; // barrier: all that the new part shows, before it shows
        self.write_size(size)?;
        Ok(self.storage.sync()?) // not an order, a promise: the disk has its new size
    }

    /// Gives the L1 table room for a larger disk. The header names the new table at once.
    fn grow_l1(&mut self, size: u64) -> Result<()> {
        let needed = self.geometry.l1_entries_for(size);
        if needed <= self.l1.len() as u64 {
            return Ok(());
        }
        let old_run = ClusterRun {
            start: self.geometry.host_cluster(self.header.header.l1_table_offset),
            count: self.geometry.clusters_for(8 * u64::from(self.header.header.l1_size)),
        };
        let entries = u32::try_from(needed).ok().filter(|_| 8 * needed <= self.limits.max_l1_bytes);
        let entries = entries.ok_or_else(|| Error::Limit {
            file: self.storage.name().to_owned(),
            what: format!("L1 table of {} bytes, at most {}", 8 * needed, self.limits.max_l1_bytes),
        })?;
        self.flush()?;
        let run = self.allocate_adjacent(self.geometry.clusters_for(8 * needed))?;
        let at = self.host_offset(run.start);
        self.flush()?; // barrier: refcounts of the new table before anything points at it
        let mut table = self.l1.clone();
        table.resize(as_len(needed), L1Entry::default());
        self.storage.write_at(&encode_l1(&table), at.get())?;
        self.storage.sync()?; // barrier: the new table before the header names it
        let mut header = self.header.clone();
        header.header.l1_table_offset = at;
        header.header.l1_size = entries;
        self.write_header(header)?;
        self.l1 = table;
        let writer = self.writer()?;
        writer.metadata.add(run.start, run.count, Structure::L1Table);
        if old_run.count > 0 {
            // An empty table may be said to lie anywhere, such as in the header's cluster.
            writer.metadata.remove(old_run.start, old_run.count);
            // The next flush does that, behind a barrier that makes the header durable.
            writer.refcounts.free(old_run.start, old_run.count, false);
        }
        Ok(())
    }

    /// Allocates exactly `count` adjacent clusters.
    fn allocate_adjacent(&mut self, count: u64) -> Result<ClusterRun> {
        let cluster_bits = self.geometry.cluster_bits().get();
        let writer = self.writer()?;
        let run = writer.refcounts.allocate_adjacent(count, &mut writer.metadata)?;
        writer.file_end = writer.file_end.max((run.start.get() + run.count) << cluster_bits);
        Ok(run)
    }

    /// Unmaps everything.
    pub(super) fn make_empty(&mut self) -> Result<()> {
        self.drop_mappings(0)?;
        self.flush_and(After::Cut) // barriers: no mapping is left before what it named is freed
    }

    /// Unmaps every whole cluster at or behind `size`.
    fn drop_mappings(&mut self, size: u64) -> Result<()> {
        let start = size.next_multiple_of(self.geometry.cluster_size());
        let mut index = self.first_cut(size);
        self.refuse_shared_tables(index)?;
        let mut tables = TableCount::default();
        while let Some(next) = self.next_l1(index) {
            let base = (next as u64) << self.geometry.l1_entry_bits();
            tables.enter(self, GuestOffset::new(base))?;
            if start <= base {
                self.drop_table(next)?;
            } else {
                self.drop_entries(GuestOffset::new(start))?;
            }
            self.flush_if_crowded()?;
            index = next + 1;
        }
        Ok(())
    }

    /// The L1 index of the first cluster that a disk of this size does not have.
    fn first_cut(&self, size: u64) -> usize {
        as_len(self.geometry.l1_index(GuestOffset::new(size.next_multiple_of(self.geometry.cluster_size()))))
    }

    /// A table that two L1 entries name would be given up twice, and all that it names. Nor is the file's length a bound to
    /// that: refcounts that call 2 GiB used make a file so long as soon as it grows.
    fn refuse_shared_tables(&self, from: usize) -> Result<()> {
        let entries = self.l1.get(from..).unwrap_or_default();
        let mut tables: Vec<_> = entries.iter().filter_map(|entry| entry.l2_table()).collect();
        tables.sort_unstable();
        let Some(pair) = tables.windows(2).find(|pair| pair[0] == pair[1]) else { return Ok(()) };
        let at = self.header.header.l1_table_offset;
        Err(self.corrupt(FormatError::corrupt("L1 table", at.get(), "L2 table", pair[0], "a table of its own each")))
    }

    /// Unmaps the clusters from `start` to the end of its L2 table.
    fn drop_entries(&mut self, start: GuestOffset) -> Result<()> {
        for index in self.geometry.l2_index(start)..as_len(self.geometry.l2_entries()) {
            let skip = (index - self.geometry.l2_index(start)) as u64;
            let position = start.saturating_add(skip << self.geometry.cluster_bits().get());
            let old = self.entry(position)?;
            if old != L2Entry::UNALLOCATED {
                self.set_entry(position, &L2Entry::UNALLOCATED)?;
                self.free_entry(&old, true)?;
            }
        }
        Ok(())
    }

    /// Unmaps an L2 table with all its clusters.
    fn drop_table(&mut self, l1_index: usize) -> Result<()> {
        let base = GuestOffset::new((l1_index as u64) << self.geometry.l1_entry_bits());
        let Some((at, table)) = self.l2_table(base)? else { return Ok(()) };
        for index in 0..table.len() {
            let old = table.get(index, at).map_err(|e| self.corrupt(e))?;
            self.free_entry(&old, true)?;
        }
        self.l1[l1_index] = L1Entry::default();
        self.l1_dirty.insert(l1_index);
        self.l2.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner).remove(at);
        let cluster = self.geometry.host_cluster(at);
        let writer = self.writer()?;
        writer.metadata.remove(cluster, 1);
        writer.refcounts.free(cluster, 1, true);
        Ok(())
    }

    /// Maps all unallocated clusters of a range to new host clusters that read as zeroes.
    fn preallocate(&mut self, start: u64, end: u64, kind: Preallocation) -> Result<()> {
        let cluster_bits = self.geometry.cluster_bits().get();
        let mut position = GuestOffset::new(start);
        while position.get() < end {
            if self.entry(position)? != L2Entry::UNALLOCATED {
                position = position.saturating_add(self.geometry.cluster_size());
                continue;
            }
            self.writable_l2(position)?;
            let in_table = self.geometry.l2_entries() - self.geometry.l2_index(position) as u64;
            let want = self.geometry.clusters_for(end - position.get()).min(in_table);
            let (run, fresh) = self.allocate(want)?;
            let host = self.host_offset(run.start).get();
            let range = host..host + (run.count << cluster_bits);
            if kind == Preallocation::Falloc {
                match self.storage.allocate_range(range.clone()) {
                    Ok(()) | Err(storage::Error::Unsupported { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            if kind == Preallocation::Full {
                storage::write_zeroes(&*self.storage, range)?;
            } else if !fresh {
                storage::zero_range(&*self.storage, range)?;
            } else if self.storage.len()? < range.end {
                self.storage.set_len(range.end)?;
            }
            self.map_run(position, run)?;
            position = position.saturating_add(run.count << cluster_bits);
            self.flush_if_crowded()?;
        }
        Ok(())
    }

    /// Cuts the file behind its last used cluster, where the storage can be cut, and tells where it ends. What refcounts the
    /// file has for the part that goes are at worst too high, so that a crash leaks clusters past the end.
    pub(super) fn cut_file(&mut self) -> Result<u64> {
        let cluster_bits = self.geometry.cluster_bits().get();
        let fixed = self.storage.is_fixed_size();
        let len = self.storage.len()?;
        let writer = self.writer()?;
        let used = writer.refcounts.last_used()?.map_or(0, HostCluster::get);
        let end = used.saturating_add(1) << cluster_bits;
        if used == 0 || fixed || len <= end {
            return Ok(writer.file_end);
        }
        self.storage.set_len(end)?;
        // Only now: clusters behind are taken for zeroes from here on.
        self.writer()?.file_end = end;
        Ok(end)
    }
}
