//! Refcounts of an image that is written: allocation, growth of the refcount structures, and frees that wait for a
//! barrier. Specification: "Host cluster management".
//!
//! A cluster that loses its last reference is not free at once: until the mapping that named it is gone from the file, a
//! crash would bring that mapping back. Frees therefore wait in `pending` until the flush protocol has made mappings
//! durable.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::format::{
    FormatError, Geometry, Header, HostCluster, HostOffset, Limits, RefcountBlock, RefcountTableEntry,
};
use crate::storage::{self, Storage};

use super::cache::Cache;
use super::overlap::{Metadata, Structure};
use super::{Error, Result};

/// The highest host offset that an L2 entry can name, exclusive.
const MAX_HOST_OFFSET: u64 = 1 << 56;

/// A run of clusters that each lose one reference once mappings are durable.
#[derive(Clone, Copy, Debug)]
struct PendingFree {
    start: HostCluster,
    count: u64,
    /// Whether the file system should get the space back.
    punch: bool,
}

/// A run of adjacent host clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ClusterRun {
    pub(super) start: HostCluster,
    pub(super) count: u64,
}

/// The refcount structures of an open image.
#[derive(Debug)]
pub(super) struct Refcounts {
    storage: Arc<dyn Storage>,
    pub(super) geometry: Geometry,
    max_table_bytes: u64,
    /// Where the table lies, and how many clusters it fills; the header's words once it is written.
    pub(super) table_offset: HostOffset,
    pub(super) table_clusters: u32,
    pub(super) table: Vec<RefcountTableEntry>,
    /// Entries that name blocks which the file's table does not name yet.
    pub(super) unhooked: BTreeSet<usize>,
    /// The table as a whole is new: nothing in the file points at it yet.
    pub(super) table_is_fresh: bool,
    pub(super) blocks: Cache<RefcountBlock>,
    /// No cluster before this one is free.
    hint: HostCluster,
    pending: Vec<PendingFree>,
    /// Where the next compressed stream goes: into a cluster that others have begun to fill.
    pub(super) partial: Option<HostOffset>,
    /// Where the container ends, if it cannot grow.
    fixed_end: Option<u64>,
}

impl Refcounts {
    /// Reads the refcount table of an image.
    pub(super) fn load(storage: Arc<dyn Storage>, header: &Header, limits: &Limits) -> Result<Self> {
        let geometry = header.geometry();
        let table_bytes = u64::from(header.refcount_table_clusters) << geometry.cluster_bits().get();
        if table_bytes > limits.max_reftable_bytes {
            return Err(Error::Limit {
                file: storage.name().to_owned(),
                what: format!("refcount table of {table_bytes} bytes, at most {}", limits.max_reftable_bytes),
            });
        }
        let mut bytes = vec![0; super::as_len(table_bytes)];
        storage.read_at(&mut bytes, header.refcount_table_offset.get())?;
        let table = bytes.chunks_exact(8).map(|entry| RefcountTableEntry(super::be_u64(entry))).collect();
        let fixed_end = if storage.is_fixed_size() { Some(storage.len()?) } else { None };
        let capacity = super::as_len((limits.cache_bytes / 2) >> geometry.cluster_bits().get());
        Ok(Self {
            storage,
            geometry,
            max_table_bytes: limits.max_reftable_bytes,
            table_offset: header.refcount_table_offset,
            table_clusters: header.refcount_table_clusters,
            table,
            unhooked: BTreeSet::new(),
            table_is_fresh: false,
            blocks: Cache::new(capacity),
            hint: HostCluster::ZERO,
            pending: Vec::new(),
            partial: None,
            fixed_end,
        })
    }

    /// The block for a table index, or `None` where there is none.
    fn block(&mut self, index: usize) -> Result<Option<(HostOffset, Arc<RefcountBlock>)>> {
        let Some(at) = self.table.get(index).and_then(|entry| entry.block()) else { return Ok(None) };
        if let Some(block) = self.blocks.get(at) {
            return Ok(Some((at, block)));
        }
        if !self.geometry.is_aligned(at) {
            let entry_at = self.table_offset.get() + 8 * index as u64;
            let found =
                FormatError::corrupt("refcount table entry", entry_at, "offset", at, "a multiple of the cluster size");
            return Err(Error::format(self.storage.name(), found));
        }
        let mut bytes = vec![0; self.geometry.cluster_len()].into_boxed_slice();
        self.storage.read_at(&mut bytes, at.get())?;
        let block = RefcountBlock::decode(bytes, self.geometry).map_err(|e| Error::format(self.storage.name(), e))?;
        let block = Arc::new(block);
        self.blocks.insert_clean(at, Arc::clone(&block));
        Ok(Some((at, block)))
    }

    /// The file, for messages.
    pub(super) fn name(&self) -> &str {
        self.storage.name()
    }

    /// The table index of a cluster.
    fn table_index(&self, cluster: HostCluster) -> usize {
        super::as_len(self.geometry.refcount_table_index(cluster))
    }

    /// The refcount of a cluster.
    pub(super) fn get(&mut self, cluster: HostCluster) -> Result<u64> {
        let index = self.geometry.refcount_block_index(cluster);
        Ok(self.block(self.table_index(cluster))?.map_or(0, |(_, block)| block.get(index)))
    }

    /// Replaces the refcount of a cluster whose block exists.
    pub(super) fn set(&mut self, cluster: HostCluster, value: u64) -> Result<()> {
        self.set_run(ClusterRun { start: cluster, count: 1 }, value)
    }

    /// Replaces the refcounts of a run of clusters whose blocks exist.
    fn set_run(&mut self, run: ClusterRun, value: u64) -> Result<()> {
        let end = run.start.get() + run.count;
        let partial = self.partial.map(|at| self.geometry.host_cluster(at).get());
        if value == 0 && partial.is_some_and(|cluster| (run.start.get()..end).contains(&cluster)) {
            // All that began to fill it is gone, and it may become anything.
            self.partial = None;
        }
        let bits = self.geometry.refcount_order().bits() as usize;
        let mut at = run.start.get();
        while at < end {
            let cluster = HostCluster::new(at);
            // Whoever holds on to the block here has it copied by the change.
            let Some(block) = self.block(self.table_index(cluster))?.map(|(block, _)| block) else {
                let offset = self.table_offset.get();
                let found = FormatError::corrupt(
                    "refcount table",
                    offset,
                    "block",
                    "none",
                    format!("one for cluster {cluster}"),
                );
                return Err(Error::format(self.storage.name(), found));
            };
            let first = self.geometry.refcount_block_index(cluster);
            let len = (self.geometry.refcount_block_entries() - first as u64).min(end - at);
            let last = first + super::as_len(len);
            self.blocks.modify(block, first * bits / 8..(last * bits).div_ceil(8), |block| {
                (first..last).for_each(|index| block.set(index, value));
            });
            at += len;
        }
        Ok(())
    }

    /// Allocates a run of at least one and at most `want` clusters, each with refcount one.
    pub(super) fn allocate(&mut self, want: u64, metadata: &mut Metadata) -> Result<ClusterRun> {
        assert!(want > 0, "an allocation of nothing");
        let run = self.find_free(1, want, metadata)?;
        self.hint = HostCluster::new(run.start.get() + run.count);
        Ok(run)
    }

    /// Allocates exactly `count` adjacent clusters, each with refcount one.
    pub(super) fn allocate_adjacent(&mut self, count: u64, metadata: &mut Metadata) -> Result<ClusterRun> {
        if count >= self.geometry.refcount_block_entries() {
            return self.append_area(count, metadata);
        }
        self.find_free(count, count, metadata)
    }

    /// Takes the first free run of at least `least` clusters within one block, and at most `most` of it.
    fn find_free(&mut self, least: u64, most: u64, metadata: &mut Metadata) -> Result<ClusterRun> {
        let entries = super::as_len(self.geometry.refcount_block_entries());
        let mut at = self.hint;
        loop {
            let Some((_, block)) = self.block(self.table_index(at))? else {
                self.add_block(self.table_index(at), metadata)?;
                continue;
            };
            let from = self.geometry.refcount_block_index(at);
            let base = at.get() - from as u64;
            let Some(first) = block.next_free(from) else {
                at = HostCluster::new(base + entries as u64);
                continue;
            };
            let count = block.free_entries(first, super::as_len(most)) as u64;
            drop(block);
            let start = HostCluster::new(base + first as u64);
            if count < least {
                at = HostCluster::new(start.get() + count);
                continue;
            }
            let run = ClusterRun { start, count };
            self.check_room(run)?;
            metadata.check(run, self.storage.name(), self.geometry)?;
            self.set_run(run, 1)?;
            return Ok(run);
        }
    }

    /// The last cluster whose refcount is not 0.
    pub(super) fn last_used(&mut self) -> Result<Option<HostCluster>> {
        for index in (0..self.table.len()).rev() {
            let Some((_, block)) = self.block(index)? else { continue };
            let last = (0..block.len()).rev().find(|&entry| block.get(entry) > 0);
            if let Some(entry) = last {
                let base = (index as u64) << self.geometry.refcount_block_bits();
                return Ok(Some(HostCluster::new(base + entry as u64)));
            }
        }
        Ok(None)
    }

    /// The bytes that are free in a container that cannot grow.
    pub(super) fn room_inside(&mut self) -> Result<Option<u64>> {
        let Some(end) = self.fixed_end else { return Ok(None) };
        let clusters = end >> self.geometry.cluster_bits().get();
        let mut used = 0;
        for index in 0..self.table.len() {
            let base = (index as u64) << self.geometry.refcount_block_bits();
            if base >= clusters {
                break;
            }
            let Some((_, block)) = self.block(index)? else { continue };
            let inside = block.len().min(super::as_len(clusters - base));
            used += (0..inside).filter(|&entry| block.get(entry) > 0).count() as u64;
        }
        Ok(Some((clusters - used) << self.geometry.cluster_bits().get()))
    }

    /// Refuses clusters that no entry can name or that lie past the end of a container that cannot grow.
    fn check_room(&self, run: ClusterRun) -> Result<()> {
        let end = (run.start.get() + run.count).saturating_mul(self.geometry.cluster_size());
        if end > MAX_HOST_OFFSET {
            return Err(Error::Limit {
                file: self.storage.name().to_owned(),
                what: format!("host offset {end:#x}, at most {MAX_HOST_OFFSET:#x}"),
            });
        }
        match self.fixed_end {
            Some(have) if end > have => {
                Err(storage::Error::NoSpace { name: self.storage.name().to_owned(), need: end - have }.into())
            }
            _ => Ok(()),
        }
    }

    /// Takes back clusters that were allocated but never mapped.
    pub(super) fn release(&mut self, run: ClusterRun) -> Result<()> {
        self.set_run(run, 0)?;
        self.hint = self.hint.min(run.start);
        Ok(())
    }

    /// Gives an empty index of the table a block, which lies at the start of the clusters that it counts.
    fn add_block(&mut self, index: usize, metadata: &mut Metadata) -> Result<()> {
        if index >= self.table.len() {
            self.append_area(0, metadata)?;
            return Ok(());
        }
        let start = HostCluster::new((index as u64) << self.geometry.refcount_block_bits());
        let run = ClusterRun { start, count: 1 };
        self.check_room(run)?;
        metadata.check(run, self.storage.name(), self.geometry)?;
        let mut block = RefcountBlock::empty(self.geometry);
        block.set(0, 1);
        self.insert_block(index, start, block, metadata);
        Ok(())
    }

    fn insert_block(&mut self, index: usize, at: HostCluster, block: RefcountBlock, metadata: &mut Metadata) {
        let offset = HostOffset::new(at.get() << self.geometry.cluster_bits().get());
        self.table[index] = RefcountTableEntry(offset.get());
        self.unhooked.insert(index);
        self.blocks.insert_fresh(offset, block);
        metadata.add(at, 1, Structure::Table);
    }

    /// Allocates `payload` adjacent clusters in an area that no block counts yet, with the blocks that count them at its
    /// start, and a larger refcount table where the present one cannot name these blocks.
    pub(super) fn append_area(&mut self, payload: u64, metadata: &mut Metadata) -> Result<ClusterRun> {
        let entries = self.geometry.refcount_block_entries();
        let first = self.table.iter().rposition(|entry| entry.block().is_some()).map_or(0, |last| last + 1);
        let mut table_clusters = 0;
        let blocks = loop {
            let blocks = (payload + table_clusters).div_ceil(entries - 1).max(1);
            let named = first as u64 + blocks;
            if named <= self.table.len() as u64 && table_clusters == 0 {
                break blocks;
            }
            let roomy = (named + named / 2) * 8;
            let clusters = self.geometry.clusters_for(roomy.min(self.max_table_bytes).max(named * 8));
            if clusters <= table_clusters {
                break blocks;
            }
            table_clusters = clusters;
        };
        let start = HostCluster::new(first as u64 * entries);
        let run = ClusterRun { start, count: blocks + table_clusters + payload };
        self.check_room(run)?;
        metadata.check(run, self.storage.name(), self.geometry)?;
        if table_clusters > 0 {
            self.move_table(HostCluster::new(start.get() + blocks), table_clusters, metadata)?;
        }
        let mut left = run.count;
        for number in 0..blocks {
            let mut block = RefcountBlock::empty(self.geometry);
            for index in 0..left.min(entries) {
                block.set(super::as_len(index), 1);
            }
            left = left.saturating_sub(entries);
            let index = first + super::as_len(number);
            self.insert_block(index, HostCluster::new(start.get() + number), block, metadata);
        }
        Ok(ClusterRun { start: HostCluster::new(start.get() + blocks + table_clusters), count: payload })
    }

    /// Moves the table to new clusters. The header names them once the flush protocol has written them.
    fn move_table(&mut self, to: HostCluster, clusters: u64, metadata: &mut Metadata) -> Result<()> {
        let bytes = clusters << self.geometry.cluster_bits().get();
        let count =
            u32::try_from(clusters).ok().filter(|_| bytes <= self.max_table_bytes).ok_or_else(|| Error::Limit {
                file: self.storage.name().to_owned(),
                what: format!("refcount table of {bytes} bytes, at most {}", self.max_table_bytes),
            })?;
        let old = self.geometry.host_cluster(self.table_offset);
        metadata.remove(old, u64::from(self.table_clusters));
        metadata.add(to, clusters, Structure::RefcountTable);
        // A table that was itself new and never written is simply dropped with the others.
        self.free(old, u64::from(self.table_clusters), false);
        self.table.resize(super::as_len(bytes / 8), RefcountTableEntry::default());
        self.table_offset = HostOffset::new(to.get() << self.geometry.cluster_bits().get());
        self.table_clusters = count;
        self.table_is_fresh = true;
        Ok(())
    }

    /// Lowers the refcounts of a run once the mappings that named it are durably gone.
    pub(super) fn free(&mut self, start: HostCluster, count: u64, punch: bool) {
        match self.pending.last_mut() {
            Some(last) if last.punch == punch && last.start.get() + last.count == start.get() => last.count += count,
            _ => self.pending.push(PendingFree { start, count, punch }),
        }
    }

    /// Whether frees wait for a barrier.
    pub(super) fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Lowers the refcounts of all that waited. The caller has made the mappings durable. Returns the runs whose space
    /// the file system should get back.
    pub(super) fn apply_pending(&mut self) -> Result<Vec<ClusterRun>> {
        let mut punched: Vec<ClusterRun> = Vec::new();
        let mut missing = None;
        let mut pending = std::mem::take(&mut self.pending);
        // In file order, so that each refcount block is touched once and holes are punched in long strokes.
        pending.sort_unstable_by_key(|free| free.start);
        for free in pending {
            for cluster in free.start.get()..free.start.get() + free.count {
                let cluster = HostCluster::new(cluster);
                let Some(left) = self.get(cluster)?.checked_sub(1) else {
                    missing = Some(cluster);
                    continue;
                };
                self.set(cluster, left)?;
                if left > 0 {
                    continue;
                }
                self.hint = self.hint.min(cluster);
                if free.punch {
                    match punched.last_mut() {
                        Some(run) if run.start.get() + run.count == cluster.get() => run.count += 1,
                        _ => punched.push(ClusterRun { start: cluster, count: 1 }),
                    }
                }
            }
        }
        match missing {
            None => Ok(punched),
            Some(cluster) => {
                let at = cluster.get() << self.geometry.cluster_bits().get();
                let found = FormatError::corrupt("refcount", at, "count of a cluster in use", 0, "at least 1");
                Err(Error::format(self.storage.name(), found))
            }
        }
    }
}
