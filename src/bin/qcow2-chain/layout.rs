//! Who holds what of a chain, as QEMU tells it: the library's extents, cut where QEMU cuts them.

use std::ops::Range;

use qcow2_chain::chain::{Chain, ChainExtent, Node};
use qcow2_chain::format::{GuestOffset, HostOffset, L1Entry, L2Entry, L2Table};
use qcow2_chain::image::{ExtentKind, Image};
use qcow2_chain::storage::Storage;

use crate::failure::Failure;
use crate::preallocated;

/// A run of guest addresses.
#[expect(clippy::struct_excessive_bools, reason = "the flags that QEMU has, independent of each other")]
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Entry {
    pub start: u64,
    pub length: u64,
    /// The layer that decides; where none does, the one at which QEMU stops looking.
    pub depth: usize,
    pub present: bool,
    pub zero: bool,
    pub data: bool,
    pub compressed: bool,
    pub offset: Option<u64>,
}

impl Entry {
    /// The first address behind the run.
    pub(crate) fn end(&self) -> u64 {
        self.start.saturating_add(self.length)
    }

    /// Takes in what follows, if it is more of the same.
    pub(crate) fn merge(&mut self, next: &Self) -> bool {
        let offset = self.offset.map(|offset| offset.saturating_add(self.length));
        let more = Self { start: next.start, length: next.length, offset, ..self.clone() };
        if more != *next {
            return false;
        }
        self.length += next.length;
        true
    }

    /// A part of the run.
    fn part(&self, range: &Range<u64>) -> Self {
        let skipped = range.start - self.start;
        let offset = self.offset.map(|offset| offset + skipped);
        Self { start: range.start, length: range.end - range.start, offset, ..self.clone() }
    }
}

/// A chain, and what must be known of its layers.
pub(crate) struct Layout<'a> {
    chain: &'a Chain,
    /// For each layer, the storage to ask for holes beneath allocated clusters, where QEMU would ask.
    holes: Vec<Option<&'a dyn Storage>>,
}

impl<'a> Layout<'a> {
    /// The layout of this chain.
    pub(crate) fn of(chain: &'a Chain) -> Result<Self, Failure> {
        let holes = chain.layers().iter().map(|layer| match &layer.node {
            Node::Qcow2(image) if preallocated::seems(image)? => Ok(Some(&**image.storage())),
            _ => Ok(None),
        });
        Ok(Self { chain, holes: holes.collect::<Result<_, Failure>>()? })
    }

    /// The runs of a range in order; neighbours may be of one kind.
    pub(crate) fn entries(&self, range: Range<u64>) -> impl Iterator<Item = Result<Entry, Failure>> + '_ {
        let extents = if range.is_empty() { None } else { Some(self.chain.extents(range)) };
        extents.into_iter().flatten().flat_map(|extent| {
            let entries = extent.map_err(Failure::from).and_then(|extent| self.cut(&extent));
            let (entries, failure) = match entries {
                Ok(entries) => (entries, None),
                Err(failure) => (Vec::new(), Some(Err(failure))),
            };
            entries.into_iter().map(Ok).chain(failure)
        })
    }

    fn cut(&self, extent: &ChainExtent) -> Result<Vec<Entry>, Failure> {
        let (start, length, depth) = (extent.guest.get(), extent.len, extent.depth);
        let entry = Entry { start, length, depth, present: extent.layer.is_some(), ..Entry::default() };
        let image = match self.chain.layers().get(depth).map(|layer| &layer.node) {
            Some(Node::Qcow2(image)) => Some(image),
            _ => None,
        };
        match extent.kind {
            _ if extent.layer.is_none() => match image.filter(|image| image.geometry().extended_l2()) {
                Some(image) => reserved(image, &Entry { zero: true, ..entry }),
                None => Ok(vec![Entry { zero: true, ..entry }]),
            },
            // Where encrypted clusters lie, or clusters of a data file that was not opened, helps nobody to read them.
            ExtentKind::Data { .. } if image.is_some_and(|image| image.data_access().is_err()) => {
                Ok(vec![Entry { data: true, ..entry }])
            }
            ExtentKind::Data { host } => {
                let data = Entry { data: true, offset: Some(host.get()), ..entry };
                match self.holes.get(depth).copied().flatten() {
                    Some(storage) => with_holes(storage, &data),
                    None => Ok(vec![data]),
                }
            }
            ExtentKind::Zero { host } => Ok(vec![Entry { zero: true, offset: host.map(HostOffset::get), ..entry }]),
            ExtentKind::Compressed => Ok(vec![Entry { data: true, compressed: true, ..entry }]),
            ExtentKind::Unallocated => Ok(vec![entry]),
        }
    }
}

/// Cuts allocated data where the file has holes: there it reads as zeroes.
fn with_holes(storage: &dyn Storage, data: &Entry) -> Result<Vec<Entry>, Failure> {
    let base = data.offset.unwrap_or(0);
    let (mut at, end) = (base, base.saturating_add(data.length));
    let mut parts = Vec::new();
    let mut part = |from: u64, to: u64, zero: bool| {
        if from < to {
            let guest = |host: u64| data.start + (host - base);
            parts.push(Entry { zero, ..data.part(&(guest(from)..guest(to))) });
        }
    };
    while at < end {
        let run = storage.next_data(at)?.unwrap_or(end..end);
        let (from, to) = (run.start.clamp(at, end), run.end.clamp(at, end));
        part(at, from, true);
        part(from, to, false);
        at = if to > at { to } else { end };
    }
    Ok(parts)
}

/// Cuts what an image does not hold by clusters that have a place in the file all the same: other subclusters of theirs
/// are held. QEMU tells that place.
fn reserved(image: &Image, entry: &Entry) -> Result<Vec<Entry>, Failure> {
    let (geometry, header) = (image.geometry(), image.header().header);
    let mut parts: Vec<Entry> = Vec::new();
    let mut push = |part: Entry| {
        if !parts.last_mut().is_some_and(|last| last.merge(&part)) {
            parts.push(part);
        }
    };
    let mut at = entry.start;
    while at < entry.end() {
        let index = geometry.l1_index(GuestOffset::new(at));
        let table_end = index.saturating_add(1).saturating_mul(geometry.l1_entry_span()).min(entry.end());
        let mut word = [0; 8];
        if index < u64::from(header.l1_size) {
            image.storage().read_at(&mut word, header.l1_table_offset.get().saturating_add(index * 8))?;
        }
        let Some(offset) = L1Entry(u64::from_be_bytes(word)).l2_table() else {
            push(entry.part(&(at..table_end)));
            at = table_end;
            continue;
        };
        let mut bytes = vec![0; geometry.cluster_len()].into_boxed_slice();
        image.storage().read_at(&mut bytes, offset.get())?;
        let table = L2Table::decode(bytes, geometry, header.version)?;
        while at < table_end {
            let inside = at % geometry.cluster_size();
            let end = (at - inside).saturating_add(geometry.cluster_size()).min(table_end);
            let host = match table.get(geometry.l2_index(GuestOffset::new(at)), offset)? {
                L2Entry::Normal(cluster) => cluster.host.map(|host| host.get() + inside),
                L2Entry::Compressed(_) => None,
            };
            push(Entry { offset: host, ..entry.part(&(at..end)) });
            at = end;
        }
    }
    Ok(parts)
}
