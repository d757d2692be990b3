//! Rewriting the first cluster where more than one sector changes: a crash leaves the old header or the new one, never a
//! mixture, for whoever reads it. See docs/reliability.md, "The header".
//!
//! All that points at something else stands in the first sector, and that sector is written by itself. Before, what it
//! will point at is written where the old header does not look; afterwards, what only the old header looked at is cleared.
//! A header goes from one to the other by stops ([`route`]): each is durable before the next is begun, and between two of
//! them either one sector changes, or only bytes that the first of them gives no meaning.
//!
//! Extensions stand one behind the other: where those that reach beyond the first sector move, old and new lie over one
//! another. Then a third header comes between, in whose first sector a gap ([`Extension::GAP`], which readers pass over as
//! they do every extension that they do not know) leads to a copy of them behind all that the old header uses.

use std::ops::Range;

use crate::format::{Extension, HeaderCluster};

use super::state::State;
use super::{Error, Result};

/// What a disk writes at once.
const SECTOR: usize = 512;

impl State {
    /// Replaces header, extensions and the backing file's name. Durable on return.
    ///
    /// # Errors
    /// [`Error::Limit`] where they do not fit the first cluster, [`Error::Refused`] where there is no safe way.
    pub(super) fn change_header(&mut self, mut header: HeaderCluster) -> Result<()> {
        let stops = self.route_to(&mut header)?;
        self.header_in_doubt = true;
        for bytes in stops {
            let changes = HeaderCluster::changed_sectors(&self.header_bytes, &bytes);
            for sectors in &changes {
                self.storage.write_at(&bytes[sectors.clone()], sectors.start as u64)?;
            }
            if !changes.is_empty() {
                self.storage.sync()?; // barrier: what a sector will point at, then the sector, then what it left behind
            }
            self.header_bytes = bytes;
        }
        self.header_in_doubt = false;
        let len = self.storage.len()?;
        self.header = HeaderCluster::decode(&self.header_bytes, len, &self.limits).map_err(|e| self.corrupt(e))?;
        Ok(())
    }

    /// The stops on the way to a header, from which a gap that an earlier crash left is taken.
    ///
    /// # Errors
    /// As [`State::change_header`].
    pub(super) fn route_to(&self, header: &mut HeaderCluster) -> Result<Vec<Vec<u8>>> {
        header.remove_extension(Extension::GAP);
        let whole =
            header.encode_over(&self.header_bytes).map_err(|error| Error::format(self.storage.name(), error))?;
        route(&self.header, &self.header_bytes, header, whole).ok_or_else(|| {
            let why =
                "the backing file's new name does not fit beside the old one: the header cannot be changed safely";
            Error::refused(self.storage.name(), why)
        })
    }
}

/// The first cluster's bytes one after the other, the last of them `new` encoded, or `None` where there is no safe way.
/// `whole` is `new` encoded over the old bytes without regard to crashes.
fn route(old: &HeaderCluster, bytes: &[u8], new: &HeaderCluster, whole: Vec<u8>) -> Option<Vec<Vec<u8>>> {
    let sectors: usize =
        HeaderCluster::changed_sectors(bytes, &whole).iter().map(|range| range.len().div_ceil(SECTOR)).sum();
    if sectors <= 1 {
        return Some(vec![whole]);
    }
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().max(SECTOR), 0);
    let start = Place { bytes, meaningful: old.meaningful().ok()? };
    if let Some(step) = Step::between(&start, new, &[]) {
        return Some(step.stops(&start.meaningful));
    }
    // Clear of the name too where there is room for that, else of the extensions.
    let mut compact = new.clone();
    compact.header.backing_file_offset = 0;
    let ends = compact.meaningful().ok()?.into_iter().map(|range| range.end).rev();
    let (detour, last) = ends.into_iter().find_map(|end| {
        let detour = Step::between(&start, &with_gap(&start, new, end)?, &[])?;
        let last = Step::between(&detour.to, new, &start.meaningful)?;
        Some((detour, last))
    })?;
    let mut stops = vec![detour.prepared, detour.to.bytes];
    let stale = [start.meaningful, detour.to.meaningful].concat();
    stops.extend(last.stops(&stale));
    Some(stops)
}

/// What the first cluster holds, and where its header looks.
struct Place {
    bytes: Vec<u8>,
    meaningful: Vec<Range<usize>>,
}

impl Place {
    /// Where the last byte that means something ends.
    fn end(&self) -> usize {
        self.meaningful.iter().map(|range| range.end).max().unwrap_or(0)
    }
}

/// A change of the first sector, and what must be there before.
struct Step {
    /// The old bytes, in the first sector and wherever the old header looks; around them those of the new header.
    prepared: Vec<u8>,
    /// The same with the first sector changed.
    to: Place,
}

impl Step {
    /// The way to a header whose bytes beyond the first sector can stand beside the old ones: the name goes wherever
    /// there is room for it. `stale` will be cleared afterwards.
    fn between(from: &Place, to: &HeaderCluster, stale: &[Range<usize>]) -> Option<Self> {
        let name = to.backing_file.as_ref().map_or(0, Vec::len);
        let last = to.header.geometry().cluster_len().saturating_sub(name);
        let used = stale.iter().map(|range| range.end).fold(from.end(), usize::max);
        // Right behind the extensions, else where the old name was, behind all that is used, or at the very end.
        let wanted = [0, to.header.backing_file_offset, from.end() as u64, used as u64, last as u64];
        wanted.into_iter().find_map(|offset| Self::to_name_at(from, to, offset))
    }

    fn to_name_at(from: &Place, to: &HeaderCluster, offset: u64) -> Option<Self> {
        let mut to = to.clone();
        if to.backing_file.is_some() {
            to.header.backing_file_offset = offset;
        }
        let encoded = to.encode().ok()?;
        let meaningful = to.meaningful().ok()?;
        let mut bytes = from.bytes.clone();
        bytes.resize(bytes.len().max(encoded.len()), 0);
        for range in &meaningful {
            bytes[range.clone()].copy_from_slice(&encoded[range.clone()]);
        }
        let mut prepared = bytes.clone();
        prepared[..SECTOR].copy_from_slice(&from.bytes[..SECTOR]);
        let untouched = |range: &Range<usize>| {
            range.end <= from.bytes.len() && prepared[range.clone()] == from.bytes[range.clone()]
        };
        from.meaningful.iter().all(untouched).then_some(Self { prepared, to: Place { bytes, meaningful } })
    }

    /// The stops: prepared, changed, and cleared of what nobody looks at any more. What is stale in the first sector goes
    /// with its change.
    fn stops(self, stale: &[Range<usize>]) -> Vec<Vec<u8>> {
        let mut cleared = self.to.bytes.clone();
        for range in stale {
            let end = range.end.min(cleared.len());
            cleared[range.start.min(end)..end].fill(0);
        }
        for range in &self.to.meaningful {
            cleared[range.clone()].copy_from_slice(&self.to.bytes[range.clone()]);
        }
        let mut changed = self.to.bytes;
        changed[..SECTOR].copy_from_slice(&cleared[..SECTOR]);
        vec![self.prepared, changed, cleared]
    }
}

/// The header with all extensions but the backing format behind `end` and everything that is in use; `None` where the first
/// sector has no room for what leads there.
fn with_gap(from: &Place, to: &HeaderCluster, end: usize) -> Option<HeaderCluster> {
    let mut gapped = to.clone();
    let (mut first, others): (Vec<_>, Vec<_>) =
        gapped.extensions.drain(..).partition(|extension| extension.kind() == Extension::BACKING_FORMAT);
    let front = first.iter().map(|extension| 8 + extension.data().len().next_multiple_of(8)).sum::<usize>();
    let data_at = to.header.encoded_len() + front + 8;
    let behind = from.end().max(end).max(SECTOR).next_multiple_of(8);
    if data_at > SECTOR {
        return None;
    }
    let mut data = vec![0; behind - data_at];
    let kept = SECTOR..behind.min(from.bytes.len());
    data[SECTOR - data_at..kept.end - data_at].copy_from_slice(&from.bytes[kept]);
    first.push(Extension::Unknown { kind: Extension::GAP, data });
    first.extend(others);
    gapped.extensions = first;
    Some(gapped)
}
