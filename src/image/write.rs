//! Writing guest data: in place where the cluster is ours alone, else into new clusters.

use std::sync::PoisonError;

use crate::format::{GuestOffset, HostCluster, HostOffset, L1Entry, L2Entry, L2Table, NormalCluster, Subclusters};

use crate::storage;

use super::overlap::Structure;
use super::refcounts::ClusterRun;
use super::state::State;
use super::{Backing, Error, Result, as_len};

impl State {
    /// The run of bytes from `offset` on that may be overwritten where they lie: allocated, in clusters with refcount one,
    /// adjacent in the file. `None` where the first byte may not.
    pub(super) fn in_place_at(&self, offset: GuestOffset, end: u64) -> Result<Option<(HostOffset, u64)>> {
        let Some((at, table)) = self.l2_table(offset)? else { return Ok(None) };
        let geometry = self.geometry;
        let end = end.min((geometry.l1_index(offset) + 1) << geometry.l1_entry_bits());
        let mut run: Option<(HostOffset, u64)> = None;
        let mut position = offset;
        while position.get() < end {
            let entry = table.get(geometry.l2_index(position), at).map_err(|e| self.corrupt(e))?;
            let L2Entry::Normal(NormalCluster { host: Some(host), copied: true, subclusters }) = entry else { break };
            let index = geometry.subcluster_index(position);
            let ones = (subclusters.allocated >> index).trailing_ones();
            let in_cluster = geometry.offset_in_cluster(position);
            let until = u64::from(index + ones) << geometry.subcluster_bits();
            let len = until.saturating_sub(in_cluster).min(end - position.get());
            let here = host.saturating_add(in_cluster);
            match run.as_mut() {
                _ if len == 0 => break,
                None => run = Some((here, len)),
                Some((start, length)) if start.saturating_add(*length) == here => *length += len,
                Some(_) => break,
            }
            position = position.saturating_add(len);
        }
        Ok(run)
    }

    /// Overwrites data that lies in clusters of our own, as far as that goes. Returns how many bytes were written.
    /// Shared access is enough: no mapping changes.
    pub(super) fn write_in_place(&self, buf: &[u8], offset: GuestOffset) -> Result<usize> {
        let Some(writer) = self.writer.as_ref() else { return Ok(0) };
        let mut at = 0;
        while at < buf.len() {
            let position = offset.saturating_add(at as u64);
            let Some((host, len)) = self.in_place_at(position, offset.saturating_add(buf.len() as u64).get())? else {
                break;
            };
            let first = self.geometry.host_cluster(host);
            let last = self.geometry.host_cluster(host.saturating_add(len - 1));
            let run = ClusterRun { start: first, count: last.get() - first.get() + 1 };
            writer.metadata.check(run, self.storage.name(), self.geometry)?;
            let len = as_len(len);
            self.storage.write_at(&buf[at..at + len], host.get())?;
            at += len;
        }
        Ok(at)
    }

    /// Writes guest data wherever it must go. `prepare_write` has been called.
    pub(super) fn write(&mut self, buf: &[u8], offset: GuestOffset, backing: &dyn Backing) -> Result<()> {
        let mut at = 0;
        while at < buf.len() {
            at += self.write_in_place(&buf[at..], offset.saturating_add(at as u64))?;
            if at == buf.len() {
                break;
            }
            let position = offset.saturating_add(at as u64);
            let in_cluster = as_len(self.geometry.offset_in_cluster(position));
            let rest = &buf[at..];
            let whole = if in_cluster == 0 { self.replaceable(position, rest.len())? } else { 0 };
            at += if whole > 0 {
                self.write_clusters(rest, position, whole)?
            } else {
                let len = rest.len().min(self.geometry.cluster_len() - in_cluster);
                self.write_part(&rest[..len], position, backing)?;
                len
            };
            self.flush_if_crowded()?;
        }
        Ok(())
    }

    /// How many whole clusters from `offset` on, within one L2 table and `len` bytes, need a new host cluster.
    fn replaceable(&self, offset: GuestOffset, len: usize) -> Result<u64> {
        let clusters = len as u64 >> self.geometry.cluster_bits().get();
        let in_table = self.geometry.l2_entries() - self.geometry.l2_index(offset) as u64;
        let clusters = clusters.min(in_table);
        let Some((at, table)) = self.l2_table(offset)? else { return Ok(clusters) };
        let first = self.geometry.l2_index(offset);
        for number in 0..clusters {
            let entry = table.get(first + as_len(number), at).map_err(|e| self.corrupt(e))?;
            if matches!(entry, L2Entry::Normal(NormalCluster { host: Some(_), copied: true, .. })) {
                return Ok(number);
            }
        }
        Ok(clusters)
    }

    /// Writes up to `count` whole clusters from the start of `buf` to new host clusters. Returns the bytes written.
    fn write_clusters(&mut self, buf: &[u8], offset: GuestOffset, count: u64) -> Result<usize> {
        self.writable_l2(offset)?;
        let (run, _) = self.allocate(count)?;
        let len = as_len(run.count << self.geometry.cluster_bits().get());
        let host = self.host_offset(run.start);
        if let Err(error) = self.storage.write_at(&buf[..len], host.get()) {
            self.writer()?.refcounts.release(run)?;
            return Err(error.into());
        }
        self.map_run(offset, run)?;
        Ok(len)
    }

    /// Maps whole clusters from `offset` on, of one L2 table, to a run of host clusters that was allocated for them.
    pub(super) fn map_run(&mut self, offset: GuestOffset, run: ClusterRun) -> Result<()> {
        for number in 0..run.count {
            let skip = number << self.geometry.cluster_bits().get();
            let position = offset.saturating_add(skip);
            let host = self.host_offset(run.start).saturating_add(skip);
            let old = self.entry(position)?;
            self.set_entry(position, &L2Entry::data(self.geometry, host))?;
            self.free_entry(&old, false)?;
        }
        Ok(())
    }

    /// Writes a part of one cluster; what its subclusters lack comes from the old cluster, or from `backing`.
    fn write_part(&mut self, data: &[u8], offset: GuestOffset, backing: &dyn Backing) -> Result<()> {
        let geometry = self.geometry;
        let entry = self.entry(offset)?;
        let in_cluster = geometry.offset_in_cluster(offset);
        let start = GuestOffset::new(offset.get() - in_cluster);
        let (from, to) = (as_len(in_cluster), as_len(in_cluster) + data.len());
        let old = match entry {
            L2Entry::Normal(cluster) => cluster,
            L2Entry::Compressed(descriptor) => {
                let mut whole = vec![0; geometry.cluster_len()];
                self.decompress(descriptor, &mut whole)?;
                whole[from..to].copy_from_slice(data);
                return self.write_clusters(&whole, start, 1).map(|_| ());
            }
        };
        let own = old.host.filter(|_| old.copied);
        let touched = touched_subclusters(geometry.subcluster_bits(), from, to);
        let keep = if own.is_some() { 0 } else { old.subclusters.allocated };
        self.writable_l2(offset)?;
        let (host, run, fresh) = if let Some(host) = own {
            let own = ClusterRun { start: geometry.host_cluster(host), count: 1 };
            let file = self.storage.clone();
            self.writer()?.metadata.check(own, file.name(), geometry)?;
            (host, None, false)
        } else {
            let (run, fresh) = self.allocate(1)?;
            (self.host_offset(run.start), Some(run), fresh)
        };
        let zero_fill = self.header.backing_file.is_none() || touched & !old.subclusters.zero == 0;
        let hull = if fresh && keep == 0 && zero_fill {
            // Nothing was ever written there: what is not written reads as zeroes.
            (from, to)
        } else {
            hull(geometry.subcluster_bits(), from, to, if own.is_some() { old.subclusters.allocated } else { 0 }, keep)
        };
        let written = self.write_hull(data, start, (from, to), hull, &old, touched, host, backing);
        if let (Err(_), Some(run)) = (&written, run) {
            self.writer()?.refcounts.release(run)?;
        }
        written?;
        let subclusters =
            Subclusters { allocated: old.subclusters.allocated | touched, zero: old.subclusters.zero & !touched };
        self.set_entry(offset, &L2Entry::Normal(NormalCluster { host: Some(host), copied: true, subclusters }))?;
        if run.is_some() {
            self.free_entry(&entry, false)?;
        }
        Ok(())
    }

    /// Writes `hull` of the cluster at `start` to `host`: `data` at `span`, around it what the guest saw there before.
    #[expect(clippy::too_many_arguments, reason = "one step of write_part, cut out for its length")]
    fn write_hull(
        &self,
        data: &[u8],
        start: GuestOffset,
        span: (usize, usize),
        hull: (usize, usize),
        old: &NormalCluster,
        touched: u32,
        host: HostOffset,
        backing: &dyn Backing,
    ) -> Result<()> {
        if hull == span {
            return Ok(self.storage.write_at(data, host.get() + span.0 as u64)?);
        }
        let mut buf = vec![0; hull.1 - hull.0];
        let bits = self.geometry.subcluster_bits();
        let inside = |edge: usize| edge & ((1 << bits) - 1) != 0;
        if touched.is_power_of_two() && inside(span.0) && inside(span.1) {
            // Before it and behind it lies the same subcluster: one read across costs less than two.
            self.fill(&mut buf, start, hull.0, old, touched, backing)?;
        } else {
            self.fill(&mut buf[..span.0 - hull.0], start, hull.0, old, touched, backing)?;
            self.fill(&mut buf[span.1 - hull.0..], start, span.1, old, touched, backing)?;
        }
        buf[span.0 - hull.0..span.1 - hull.0].copy_from_slice(data);
        Ok(self.storage.write_at(&buf, host.get() + hull.0 as u64)?)
    }

    /// Fills `buf`, which is zeroed, with what the cluster at `start` holds from `at` on: allocated subclusters from their
    /// place, and, where a subcluster is among the `touched` ones and unallocated, what lies beneath.
    fn fill(
        &self,
        buf: &mut [u8],
        start: GuestOffset,
        at: usize,
        old: &NormalCluster,
        touched: u32,
        backing: &dyn Backing,
    ) -> Result<()> {
        let bits = self.geometry.subcluster_bits();
        let end = at + buf.len();
        let mut position = at;
        while position < end {
            let index = position >> bits;
            let until = ((index + 1) << bits).min(end);
            let part = &mut buf[position - at..until - at];
            let bit = 1_u32 << index;
            let guest = start.saturating_add(position as u64);
            match old.host {
                Some(host) if old.subclusters.allocated & bit != 0 => {
                    self.storage.read_at(part, host.get() + position as u64)?;
                }
                _ if old.subclusters.zero & bit != 0 || touched & bit == 0 => {}
                _ if self.header.backing_file.is_none() => {}
                _ => {
                    // Behind the virtual size nothing of the backing file may show, should the disk grow.
                    let visible = as_len(self.header.header.virtual_size().saturating_sub(guest.get())).min(part.len());
                    if visible > 0 {
                        backing.read_at(&mut part[..visible], guest)?;
                    }
                }
            }
            position = until;
        }
        Ok(())
    }

    /// Allocates at most `want` adjacent host clusters. Tells whether they were never written, so that they read as
    /// zeroes.
    pub(super) fn allocate(&mut self, want: u64) -> Result<(ClusterRun, bool)> {
        let cluster_bits = self.geometry.cluster_bits().get();
        let writer = self.writer()?;
        let found = match writer.refcounts.allocate(want, &mut writer.metadata) {
            // What was given up since the last flush is free after the next one.
            Err(Error::Storage(storage::Error::NoSpace { .. })) if writer.refcounts.has_pending() => {
                self.flush()?;
                let writer = self.writer()?;
                writer.refcounts.allocate(want, &mut writer.metadata)
            }
            found => found,
        };
        let run = found?;
        let writer = self.writer()?;
        let fresh = run.start.get() << cluster_bits >= writer.file_end;
        writer.file_end = writer.file_end.max((run.start.get() + run.count) << cluster_bits);
        Ok((run, fresh))
    }

    /// The first byte of an allocated host cluster.
    pub(super) fn host_offset(&self, cluster: HostCluster) -> HostOffset {
        HostOffset::new(cluster.get() << self.geometry.cluster_bits().get())
    }

    /// The L2 table that decides a guest address, made ours to change: new where there is none, copied where a snapshot
    /// shares it.
    pub(super) fn writable_l2(&mut self, offset: GuestOffset) -> Result<HostOffset> {
        let index = as_len(self.geometry.l1_index(offset));
        let old = self.l2_table(offset)?;
        if let Some((at, _)) = &old
            && self.l1.get(index).is_some_and(|entry| entry.copied())
        {
            return Ok(*at);
        }
        let (run, _) = self.allocate(1)?;
        let at = self.host_offset(run.start);
        let table = match &old {
            Some((_, table)) => L2Table::clone(table),
            None => L2Table::empty(self.geometry, self.version),
        };
        let cache = self.l2.get_mut().unwrap_or_else(PoisonError::into_inner);
        cache.insert_fresh(at, table);
        self.l1[index] = L1Entry::new(at, true);
        self.l1_dirty.insert(index);
        let old = old.map(|(at, _)| self.geometry.host_cluster(at));
        let writer = self.writer()?;
        writer.metadata.add(run.start, 1, Structure::Table);
        if let Some(old) = old {
            writer.metadata.remove(old, 1);
            writer.refcounts.free(old, 1, false);
        }
        Ok(at)
    }

    /// Replaces the entry of a guest cluster.
    pub(super) fn set_entry(&mut self, offset: GuestOffset, entry: &L2Entry) -> Result<()> {
        let at = self.writable_l2(offset)?;
        let index = self.geometry.l2_index(offset);
        let len = self.geometry.l2_entry_len();
        let cache = self.l2.get_mut().unwrap_or_else(PoisonError::into_inner);
        cache.modify(at, index * len..(index + 1) * len, |table| table.set(index, entry));
        Ok(())
    }

    /// Gives up the host clusters of an entry that was replaced.
    pub(super) fn free_entry(&mut self, old: &L2Entry, punch: bool) -> Result<()> {
        let geometry = self.geometry;
        let (first, last, punch) = match old {
            L2Entry::Normal(NormalCluster { host: None, .. }) => return Ok(()),
            L2Entry::Normal(NormalCluster { host: Some(host), .. }) => (*host, *host, punch),
            // Its first and last cluster may be shared with other compressed clusters: never punched by range.
            L2Entry::Compressed(descriptor) => {
                (descriptor.offset, descriptor.offset.saturating_add(descriptor.max_len() - 1), punch)
            }
        };
        let (first, last) = (geometry.host_cluster(first), geometry.host_cluster(last));
        self.writer()?.refcounts.free(first, last.get() - first.get() + 1, punch);
        Ok(())
    }
}

/// The subclusters that the bytes `from..to` of a cluster touch.
fn touched_subclusters(bits: u32, from: usize, to: usize) -> u32 {
    let (first, last) = (from >> bits, (to - 1) >> bits);
    (u32::MAX << first) & (u32::MAX >> (31 - last))
}

/// What must be written so that `from..to` of a cluster becomes valid: widened to whole subclusters, except where the
/// subcluster is `present` already, and to all subclusters in `keep`.
fn hull(bits: u32, from: usize, to: usize, present: u32, keep: u32) -> (usize, usize) {
    let (first, last) = (from >> bits, (to - 1) >> bits);
    let low = if present >> first & 1 == 1 { from } else { first << bits };
    let high = if present >> last & 1 == 1 { to } else { (last + 1) << bits };
    if keep == 0 {
        return (low, high);
    }
    let kept = (as_len(u64::from(keep.trailing_zeros())) << bits, as_len(u64::from(32 - keep.leading_zeros())) << bits);
    (low.min(kept.0), high.max(kept.1))
}
