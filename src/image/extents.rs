//! What an image holds, as coalesced runs of the guest's address space.

use std::collections::VecDeque;
use std::ops::Range;

use crate::format::{Geometry, GuestOffset, HostOffset, L2Entry, L2Table, NormalCluster};

use super::state::State;
use super::table_count::TableCount;
use super::{Image, Result};

/// A run of guest addresses that are all of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it starts.
    pub guest: GuestOffset,
    /// Its length in bytes; never 0.
    pub len: u64,
    /// What it holds.
    pub kind: ExtentKind,
}

/// What an extent holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Data, contiguous in the file from `host` on.
    Data {
        /// Where the first byte lies.
        host: HostOffset,
    },
    /// Zeroes; `host` tells where space is reserved for it, if it is (contiguous over the extent).
    Zero {
        /// Where the reserved space starts.
        host: Option<HostOffset>,
    },
    /// Compressed data, one or more whole clusters.
    Compressed,
    /// Nothing: the backing file decides.
    Unallocated,
}

impl ExtentKind {
    /// The kind of what follows `count` bytes on in the same extent.
    #[must_use]
    pub const fn advanced(self, count: u64) -> Self {
        match self {
            Self::Data { host } => Self::Data { host: host.saturating_add(count) },
            Self::Zero { host: Some(host) } => Self::Zero { host: Some(host.saturating_add(count)) },
            same => same,
        }
    }
}

impl Extent {
    /// The first guest address behind the extent.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.guest.get().saturating_add(self.len)
    }

    /// Takes in what follows, if it is more of the same. Tells whether it did.
    pub(crate) fn absorb(&mut self, next: &Self) -> bool {
        let same = self.end() == next.guest.get() && self.kind.advanced(self.len) == next.kind;
        if same {
            self.len += next.len;
        }
        same
    }
}

impl State {
    /// The extent that starts at `from`, cut at `end`; it ends with its L2 table at the latest, unless nothing follows.
    pub(super) fn extent_at(&self, from: GuestOffset, end: u64) -> Result<Extent> {
        match self.l2_table(from)? {
            Some((at, table)) => self.extent_in_table(&table, at, from, end),
            None => Ok(self.gap_at(from, end)),
        }
    }

    /// The unallocated extent from `from` to the next L2 table.
    fn gap_at(&self, from: GuestOffset, end: u64) -> Extent {
        let first = super::as_len(self.geometry.l1_index(from));
        // No further than asked: a table of millions of entries would else be walked for every small read.
        let last = super::as_len(self.geometry.l1_index(GuestOffset::new(end.saturating_sub(1))));
        let asked = self.l1.get(first..=last.min(self.l1.len().saturating_sub(1))).unwrap_or_default();
        let next = asked.iter().position(|entry| entry.l2_table().is_some());
        let next = next.map_or(end, |skipped| ((first + skipped) as u64) << self.geometry.l1_entry_bits());
        Extent { guest: from, len: next.min(end) - from.get(), kind: ExtentKind::Unallocated }
    }

    fn extent_in_table(&self, table: &L2Table, at: HostOffset, from: GuestOffset, end: u64) -> Result<Extent> {
        let geometry = self.geometry;
        let span_end = (geometry.l1_index(from) + 1) << geometry.l1_entry_bits();
        let end = end.min(span_end);
        let mut extent: Option<Extent> = None;
        let mut position = from;
        while position.get() < end {
            let entry = table.get(geometry.l2_index(position), at).map_err(|e| self.corrupt(e))?;
            let clusters = geometry.clusters_for(geometry.offset_in_cluster(position) + (end - position.get()));
            let same = table.run(geometry.l2_index(position), super::as_len(clusters));
            let next = piece(geometry, &entry, same, position, end);
            match extent.as_mut() {
                None => extent = Some(next),
                Some(extent) => {
                    if !extent.absorb(&next) {
                        break;
                    }
                }
            }
            position = position.saturating_add(next.len);
        }
        Ok(extent.unwrap_or(Extent { guest: from, len: 0, kind: ExtentKind::Unallocated }))
    }

    /// Appends the extents from `from` on to `out`, of one L2 table or one gap; returns where they end.
    fn batch(&self, from: GuestOffset, end: u64, out: &mut VecDeque<Extent>) -> Result<GuestOffset> {
        let Some((at, table)) = self.passing_l2_table(from)? else {
            let gap = self.gap_at(from, end);
            push(out, gap);
            return Ok(GuestOffset::new(gap.end()));
        };
        let span_end = ((self.geometry.l1_index(from) + 1) << self.geometry.l1_entry_bits()).min(end);
        let mut position = from;
        while position.get() < span_end && out.len() < BATCH {
            let extent = self.extent_in_table(&table, at, position, span_end)?;
            position = GuestOffset::new(extent.end());
            push(out, extent);
        }
        Ok(position)
    }
}

/// Appends an extent, or lengthens the last one.
fn push(out: &mut VecDeque<Extent>, extent: Extent) {
    if !out.back_mut().is_some_and(|last| last.absorb(&extent)) {
        out.push_back(extent);
    }
}

/// The part from `position` on that is all of one kind, of an entry and those behind that say the `same`.
fn piece(geometry: Geometry, entry: &L2Entry, same: usize, position: GuestOffset, end: u64) -> Extent {
    let in_cluster = geometry.offset_in_cluster(position);
    let (len, kind) = match entry {
        L2Entry::Compressed(_) => (geometry.cluster_size() - in_cluster, ExtentKind::Compressed),
        L2Entry::Normal(cluster) => normal_piece(geometry, cluster, in_cluster),
    };
    let len = len + (same as u64 - 1) * geometry.cluster_size();
    Extent { guest: position, len: len.min(end - position.get()), kind }
}

fn normal_piece(geometry: Geometry, cluster: &NormalCluster, in_cluster: u64) -> (u64, ExtentKind) {
    let index = u32::try_from(in_cluster >> geometry.subcluster_bits()).unwrap_or(31);
    let (allocated, zero) = (cluster.subclusters.allocated >> index, cluster.subclusters.zero >> index);
    let host = cluster.host.map(|host| host.saturating_add(in_cluster));
    let (run, kind) = match (allocated & 1, zero & 1, host) {
        (1, _, Some(host)) => (allocated.trailing_ones(), ExtentKind::Data { host }),
        (_, 1, host) => (zero.trailing_ones(), ExtentKind::Zero { host }),
        _ => ((allocated | zero).trailing_zeros(), ExtentKind::Unallocated),
    };
    let end = u64::from((index + run).min(geometry.subclusters())) << geometry.subcluster_bits();
    (end - in_cluster, kind)
}

/// How many extents are fetched under one lock.
const BATCH: usize = 4096;

/// The extents of a guest range, in order, disjoint, and without gaps, cut at the virtual size.
///
/// Fetched lazily, one L2 table at a time: an image that is written meanwhile shows some of the changes.
#[derive(Debug)]
pub struct Extents<'a> {
    image: &'a Image,
    position: GuestOffset,
    end: u64,
    fetched: VecDeque<Extent>,
    tables: TableCount,
}

impl<'a> Extents<'a> {
    pub(super) fn new(image: &'a Image, range: Range<u64>) -> Self {
        let end = range.end.min(image.virtual_size());
        Self {
            image,
            position: GuestOffset::new(range.start),
            end,
            fetched: VecDeque::new(),
            tables: TableCount::default(),
        }
    }

    /// Fetches until the first extent is known to be whole.
    fn fetch(&mut self) -> Result<()> {
        while self.fetched.len() < 2 && self.position.get() < self.end {
            self.position = self.image.shared(|state| {
                self.tables.enter(state, self.position)?;
                state.batch(self.position, self.end, &mut self.fetched)
            })?;
        }
        Ok(())
    }
}

impl Iterator for Extents<'_> {
    type Item = Result<Extent>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Err(error) = self.fetch() {
            self.position = GuestOffset::new(self.end);
            return Some(Err(error));
        }
        self.fetched.pop_front().map(Ok)
    }
}
