//! The metadata of an open image, in memory: what its methods share.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use crate::format::{
    AutoclearFeatures, FormatError, Geometry, GuestOffset, HeaderCluster, HostOffset, L1Entry, L2Entry, L2Table,
    Limits, Version, decode_l1,
};
use crate::storage::{self, Storage};

use super::cache::Cache;
use super::overlap::{Metadata, Structure};
use super::read::Decompressed;
use super::refcounts::{ClusterRun, Refcounts};
use super::{Error, Result, as_len, tables};

/// Everything that a lock protects. Readers hold it shared while they read data, so that nothing they were told can be
/// freed under them; whoever changes a mapping holds it alone.
#[derive(Debug)]
pub(super) struct State {
    pub(super) storage: Arc<dyn Storage>,
    pub(super) geometry: Geometry,
    pub(super) version: Version,
    pub(super) limits: Limits,
    pub(super) header: HeaderCluster,
    /// The first cluster's bytes as the file has them, as long as they are used.
    pub(super) header_bytes: Vec<u8>,
    /// A write of the header failed: the file may have the old one or the new one. Nothing more is written.
    pub(super) header_in_doubt: bool,
    pub(super) l1: Vec<L1Entry>,
    pub(super) l1_dirty: BTreeSet<usize>,
    /// Shared readers fill it too.
    pub(super) l2: Mutex<Cache<L2Table>>,
    /// The last decompressed clusters.
    pub(super) memory: Decompressed,
    /// What only a writer needs; loaded by the first write.
    pub(super) writer: Option<Box<Writer>>,
}

/// What only a writer needs.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) refcounts: Refcounts,
    pub(super) metadata: Metadata,
    /// The file ends here: clusters behind were never written and read as zeroes.
    pub(super) file_end: u64,
}

impl State {
    /// Reads the L1 table and makes the state of an image whose header is decoded.
    pub(super) fn load(
        storage: Arc<dyn Storage>,
        header: HeaderCluster,
        header_bytes: Vec<u8>,
        limits: Limits,
    ) -> Result<Self> {
        let geometry = header.header.geometry();
        let version = header.header.version;
        let l1 = read_l1(&*storage, header.header.l1_table_offset, header.header.l1_size, &limits)?;
        let capacity = as_len(limits.cache_bytes >> geometry.cluster_bits().get());
        let l2 = Mutex::new(Cache::new(capacity));
        let l1_dirty = BTreeSet::new();
        let memory = Decompressed::default();
        Ok(Self {
            storage,
            geometry,
            version,
            limits,
            header,
            header_in_doubt: false,
            header_bytes,
            l1,
            l1_dirty,
            l2,
            memory,
            writer: None,
        })
    }

    /// A format error of this image.
    pub(super) fn corrupt(&self, error: FormatError) -> Error {
        Error::format(self.storage.name(), error)
    }

    /// Where L1 entry `index` stands in the file.
    fn l1_entry_at(&self, index: usize) -> HostOffset {
        self.header.header.l1_table_offset.saturating_add(8 * index as u64)
    }

    /// The L2 table that decides a guest address, and where it lies; `None` where there is none.
    pub(super) fn l2_table(&self, offset: GuestOffset) -> Result<Option<(HostOffset, Arc<L2Table>)>> {
        self.fetch_l2_table(offset, Cache::get, Cache::insert_clean)
    }

    /// The same for somebody who passes by all tables, once each: they do not drive out what the cache holds.
    pub(super) fn passing_l2_table(&self, offset: GuestOffset) -> Result<Option<(HostOffset, Arc<L2Table>)>> {
        self.fetch_l2_table(offset, |cache, at| cache.peek(at), Cache::insert_passing)
    }

    fn fetch_l2_table(
        &self,
        offset: GuestOffset,
        get: impl Fn(&mut Cache<L2Table>, HostOffset) -> Option<Arc<L2Table>>,
        insert: impl FnOnce(&mut Cache<L2Table>, HostOffset, Arc<L2Table>),
    ) -> Result<Option<(HostOffset, Arc<L2Table>)>> {
        let index = as_len(self.geometry.l1_index(offset));
        let Some(entry) = self.l1.get(index) else { return Ok(None) };
        let at = entry.checked_l2_table(self.geometry, self.l1_entry_at(index)).map_err(|e| self.corrupt(e))?;
        let Some(at) = at else { return Ok(None) };
        if let Some(table) = get(&mut self.l2.lock().unwrap_or_else(PoisonError::into_inner), at) {
            return Ok(Some((at, table)));
        }
        let mut bytes = vec![0; self.geometry.cluster_len()].into_boxed_slice();
        self.storage.read_at(&mut bytes, at.get())?;
        let table = Arc::new(L2Table::decode(bytes, self.geometry, self.version).map_err(|e| self.corrupt(e))?);
        let mut cache = self.l2.lock().unwrap_or_else(PoisonError::into_inner);
        // Another reader may have been quicker; nobody can have changed the table meanwhile.
        let table = get(&mut cache, at).unwrap_or_else(|| {
            insert(&mut cache, at, Arc::clone(&table));
            table
        });
        Ok(Some((at, table)))
    }

    /// The entry that decides a guest address.
    pub(super) fn entry(&self, offset: GuestOffset) -> Result<L2Entry> {
        match self.l2_table(offset)? {
            None => Ok(L2Entry::UNALLOCATED),
            Some((at, table)) => table.get(self.geometry.l2_index(offset), at).map_err(|e| self.corrupt(e)),
        }
    }

    /// Returns the number of L2 tables that the cache has room for.
    pub(super) fn l2_capacity(&self) -> usize {
        as_len(self.limits.cache_bytes >> self.geometry.cluster_bits().get())
    }

    /// The first L1 index at or behind `index` that names an L2 table.
    pub(super) fn next_l1(&self, index: usize) -> Option<usize> {
        let rest = self.l1.get(index..)?;
        rest.iter().position(|entry| entry.l2_table().is_some()).map(|skipped| index + skipped)
    }

    /// Loads what a writer needs, and does what must precede the first write: unknown autoclear bits are cleared, bitmaps
    /// that every write would have to keep true are marked as not kept. Both are durable on return.
    pub(super) fn prepare_write(&mut self) -> Result<()> {
        if self.writer.is_some() {
            return Ok(());
        }
        let mut metadata = self.survey_metadata()?;
        let refcounts = Refcounts::load(Arc::clone(&self.storage), &self.header.header, &self.limits)?;
        self.survey_tables(&mut metadata, &refcounts)?;
        let file_end = if self.storage.is_fixed_size() { u64::MAX } else { self.storage.len()? };
        self.invalidate_bitmaps(false)?;
        let known = AutoclearFeatures(self.header.header.autoclear_features.0 & AutoclearFeatures::KNOWN);
        if known != self.header.header.autoclear_features {
            let mut header = self.header.clone();
            header.header.autoclear_features = known;
            self.write_header(header)?;
            self.storage.sync()?; // barrier: the bits are gone before what they vouch for is written
        }
        self.writer = Some(Box::new(Writer { refcounts, metadata, file_end }));
        Ok(())
    }

    /// The runs of clusters that metadata fills: all but L2 tables and refcount blocks.
    ///
    /// # Errors
    /// [`Error::Overlap`] where two of them share a cluster: such an image must be repaired before it is written.
    fn survey_metadata(&self) -> Result<Metadata> {
        let mut metadata = Metadata::default();
        let header = &self.header.header;
        let snapshots = tables::read_snapshots(&*self.storage, header, &self.limits)?;
        let table_len = crate::format::encode_snapshots(&snapshots).len() as u64;
        let bitmaps =
            self.header.bitmaps().map(|bitmaps| (bitmaps.bitmap_directory_offset, bitmaps.bitmap_directory_size));
        let runs = [
            (HostOffset::ZERO, 1, Structure::Header),
            (header.l1_table_offset, 8 * u64::from(header.l1_size), Structure::L1Table),
            (
                header.refcount_table_offset,
                u64::from(header.refcount_table_clusters) << self.geometry.cluster_bits().get(),
                Structure::RefcountTable,
            ),
            (header.snapshots_offset, table_len, Structure::SnapshotTable),
        ];
        let snapshot_l1 =
            snapshots.iter().map(|s| (s.l1_table_offset, 8 * u64::from(s.l1_size), Structure::SnapshotL1));
        let directory = bitmaps.into_iter().map(|(at, len)| (at, len, Structure::BitmapDirectory));
        for (at, len, structure) in runs.into_iter().chain(snapshot_l1).chain(directory) {
            let run = ClusterRun { start: self.geometry.host_cluster(at), count: self.geometry.clusters_for(len) };
            if run.count > 0 {
                metadata.check(run, self.storage.name(), self.geometry)?;
                metadata.add(run.start, run.count, structure);
            }
        }
        Ok(metadata)
    }

    /// The clusters of L2 tables and refcount blocks.
    ///
    /// # Errors
    /// [`Error::Overlap`] where one lies in other metadata, which writing it would destroy.
    fn survey_tables(&self, metadata: &mut Metadata, refcounts: &Refcounts) -> Result<()> {
        let geometry = self.geometry;
        let cluster = |at| geometry.host_cluster(at);
        let blocks = refcounts.table.iter().filter_map(|entry| entry.block()).map(cluster);
        let tables = self.l1.iter().filter_map(|entry| entry.l2_table()).map(cluster);
        let mut singles = Vec::new();
        for start in blocks {
            metadata.check(ClusterRun { start, count: 1 }, self.storage.name(), geometry)?;
            singles.push(start.get());
        }
        self.refuse_shared_blocks(&mut singles)?;
        metadata.set_singles(singles.clone());
        for start in tables {
            metadata.check(ClusterRun { start, count: 1 }, self.storage.name(), geometry)?;
            singles.push(start.get());
        }
        metadata.set_singles(singles);
        Ok(())
    }

    /// A block that two entries name counts two stretches of the file at once: whatever is allocated in one of them looks
    /// used in the other. A million entries that name one full block would also keep the allocator busy for hours.
    fn refuse_shared_blocks(&self, blocks: &mut [u64]) -> Result<()> {
        blocks.sort_unstable();
        let Some(pair) = blocks.windows(2).find(|pair| pair[0] == pair[1]) else { return Ok(()) };
        let at = self.header.header.refcount_table_offset;
        let block = HostOffset::new(pair[0] << self.geometry.cluster_bits().get());
        Err(self.corrupt(FormatError::corrupt("refcount table", at.get(), "block", block, "a block of its own each")))
    }

    /// Writes the sectors of the first cluster in which `header` differs from the file.
    pub(super) fn write_header(&mut self, header: HeaderCluster) -> Result<()> {
        let bytes = header.encode_over(&self.header_bytes).map_err(|e| self.corrupt(e))?;
        for (number, sectors) in HeaderCluster::changed_sectors(&self.header_bytes, &bytes).into_iter().enumerate() {
            let written = self.storage.write_at(&bytes[sectors.clone()], sectors.start as u64);
            // Without space nothing is written, and the first sector still stands.
            let nothing = number == 0 && matches!(written, Err(storage::Error::NoSpace { .. }));
            self.header_in_doubt = written.is_err() && !nothing;
            written?;
        }
        self.header = header;
        self.header_bytes = bytes;
        Ok(())
    }
}

/// Reads an L1 table, after comparing its size with the limit.
pub(super) fn read_l1(storage: &dyn Storage, at: HostOffset, entries: u32, limits: &Limits) -> Result<Vec<L1Entry>> {
    let len = 8 * u64::from(entries);
    if len > limits.max_l1_bytes {
        return Err(Error::Limit {
            file: storage.name().to_owned(),
            what: format!("L1 table of {len} bytes, at most {}", limits.max_l1_bytes),
        });
    }
    let have = storage.len()?;
    if at.checked_add(len).is_none_or(|end| end.get() > have.next_multiple_of(512)) {
        let found = FormatError::corrupt(
            "L1 table",
            at.get(),
            "end",
            at.saturating_add(len),
            format!("at most {have:#x}, the end of the file"),
        );
        return Err(Error::format(storage.name(), found));
    }
    let mut bytes = vec![0; as_len(len)];
    storage.read_at(&mut bytes, at.get())?;
    Ok(decode_l1(&bytes))
}
