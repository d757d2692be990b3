//! The tables that `dump` prints: refcounts, L1 and L2, equal neighbours as one row.

use qcow2_chain::format::{
    CompressedDescriptor, Geometry, Header, HostOffset, L1Entry, L2Entry, L2Table, RefcountBlock, RefcountTableEntry,
};
use qcow2_chain::storage::Storage;

use crate::dump::Section;
use crate::failure::Failure;

/// Adds the refcount table with its blocks and the active L1 table with its L2 tables.
pub(crate) fn push(
    sections: &mut Vec<Section>,
    storage: &dyn Storage,
    file_len: u64,
    header: &Header,
) -> Result<(), Failure> {
    let file = File { storage, len: file_len, geometry: header.geometry() };
    let table = header.refcount_table_offset.get();
    let entries = u64::from(header.refcount_table_clusters) * file.geometry.cluster_size() / 8;
    let mut list = Section::new("refcount table", Some(table));
    let mut blocks = Vec::new();
    for (index, at, entry) in file.words(table, entries)? {
        let Some(block) = RefcountTableEntry(entry).block() else { continue };
        list.row(at, format!("[{index}]"), format!("{entry:#x}"));
        blocks.push(file.refcount_block(index, block)?);
    }
    sections.push(list);
    sections.append(&mut blocks);

    let table = header.l1_table_offset.get();
    let mut list = Section::new("L1 table", Some(table));
    let mut tables = Vec::new();
    for (index, at, entry) in file.words(table, header.l1_size.into())? {
        let Some(l2) = L1Entry(entry).l2_table() else { continue };
        list.row(at, format!("[{index}]"), format!("{entry:#x} (L2 at {l2}{})", copied(L1Entry(entry).copied())));
        tables.push(file.l2_table(index, l2, header)?);
    }
    sections.push(list);
    sections.append(&mut tables);
    Ok(())
}

fn copied(flag: bool) -> &'static str {
    if flag { ", copied" } else { "" }
}

/// The image file.
struct File<'a> {
    storage: &'a dyn Storage,
    len: u64,
    geometry: Geometry,
}

impl File<'_> {
    /// The non-zero words of a table with their indices and places, never further than the file goes.
    fn words(&self, table: u64, count: u64) -> Result<Vec<(u64, u64, u64)>, Failure> {
        let count = count.min(self.len.saturating_sub(table) / 8);
        let mut bytes = vec![0; usize::try_from(count * 8).unwrap_or(usize::MAX)];
        self.storage.read_at(&mut bytes, table)?;
        let words = bytes.chunks_exact(8).zip(0_u64..);
        let word = |word: &[u8]| word.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        Ok(words.map(|(bytes, index)| (index, table + index * 8, word(bytes))).filter(|entry| entry.2 != 0).collect())
    }

    fn cluster(&self, offset: HostOffset) -> Result<Box<[u8]>, Failure> {
        let mut bytes = vec![0; self.geometry.cluster_len()].into_boxed_slice();
        self.storage.read_at(&mut bytes, offset.get())?;
        Ok(bytes)
    }

    /// Runs of equal refcounts other than 0.
    fn refcount_block(&self, index: u64, offset: HostOffset) -> Result<Section, Failure> {
        let mut section = Section::new(format!("refcount block {index}"), Some(offset.get()));
        if offset.get() >= self.len {
            section.row(None, "error", "past the end of the file");
            return Ok(section);
        }
        let block = RefcountBlock::decode(self.cluster(offset)?, self.geometry)?;
        let first = index.saturating_mul(self.geometry.refcount_block_entries());
        let mut at = 0;
        while let Some(start) = block.next_used(at) {
            let count = block.get(start);
            let run = (start..block.len()).take_while(|next| block.get(*next) == count).count();
            let clusters = range(first.saturating_add(start as u64), run as u64);
            section.row(None, format!("cluster {clusters}"), format!("refcount {count}"));
            at = start + run;
        }
        Ok(section)
    }

    /// Runs of entries that are of one kind and lie one behind the other.
    fn l2_table(&self, index: u64, offset: HostOffset, header: &Header) -> Result<Section, Failure> {
        let mut section = Section::new(format!("L2 table {index}"), Some(offset.get()));
        if offset.get() >= self.len {
            section.row(None, "error", "past the end of the file");
            return Ok(section);
        }
        let table = L2Table::decode(self.cluster(offset)?, self.geometry, header.version)?;
        let guest = index.saturating_mul(self.geometry.l1_entry_span());
        let mut at = 0;
        while at < table.len() {
            let entry = table.raw(at);
            let text = self.entry(&table, at, offset);
            let step = if moves(&table, at) { self.geometry.cluster_size() } else { 0 };
            let more = (at + 1..table.len())
                .zip(1_u64..)
                .take_while(|(next, count)| {
                    table.raw(*next) == (entry.0.wrapping_add(step.wrapping_mul(*count)), entry.1)
                })
                .count();
            if entry != (0, 0) {
                let start = guest.saturating_add((at as u64).saturating_mul(self.geometry.cluster_size()));
                let place = offset.get() + (at * self.geometry.l2_entry_len()) as u64;
                let name = format!("[{}] guest {start:#x}", range(at as u64, more as u64 + 1));
                section.row(place, name, text);
            }
            at += more + 1;
        }
        Ok(section)
    }

    fn entry(&self, table: &L2Table, index: usize, at: HostOffset) -> String {
        let (descriptor, _) = table.raw(index);
        match table.get(index, at) {
            Err(error) => format!("{descriptor:#x}: {error}"),
            Ok(L2Entry::Compressed(CompressedDescriptor { offset, sectors })) => {
                format!("compressed at {offset}, {sectors} more sectors")
            }
            Ok(L2Entry::Normal(cluster)) => {
                let place = cluster.host.map(|host| format!(" at {host}")).unwrap_or_default();
                let flag = copied(cluster.copied);
                if self.geometry.extended_l2() {
                    let (allocated, zero) = (cluster.subclusters.allocated, cluster.subclusters.zero);
                    return format!("subclusters{place}{flag}, allocated {allocated:#010x}, zero {zero:#010x}");
                }
                let kind = if cluster.subclusters.zero == 0 { "data" } else { "zero" };
                format!("{kind}{place}{flag}")
            }
        }
    }
}

/// Whether an entry points at a cluster of its own, so that the next of its kind points one further.
fn moves(table: &L2Table, index: usize) -> bool {
    matches!(table.get(index, HostOffset::ZERO), Ok(L2Entry::Normal(cluster)) if cluster.host.is_some())
}

/// `7` or `7-12`.
fn range(first: u64, count: u64) -> String {
    if count == 1 { first.to_string() } else { format!("{first}-{}", first.saturating_add(count - 1)) }
}
