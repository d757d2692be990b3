//! The write-back protocol: in which order metadata reaches the file.

use std::sync::PoisonError;

use crate::format::HostOffset;
use crate::storage::{self, Storage};

use super::cache::{Dirty, Table};
use super::refcounts::ClusterRun;
use super::state::{State, Writer};
use super::{Error, Result};

/// What becomes of the end of the file when clusters are freed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum After {
    /// It stays where it is.
    Keep,
    /// The file is cut behind its last used cluster.
    Cut,
}

impl State {
    /// Whether the file lacks some metadata.
    pub(super) fn is_dirty(&self) -> bool {
        let l2_dirty = self.l2.lock().unwrap_or_else(PoisonError::into_inner).is_dirty();
        let counts_dirty = self.writer.as_ref().is_some_and(|writer| {
            let refcounts = &writer.refcounts;
            refcounts.blocks.is_dirty() || refcounts.has_pending() || !refcounts.unhooked.is_empty()
        });
        l2_dirty || counts_dirty || !self.l1_dirty.is_empty()
    }

    /// Writes all metadata and makes everything durable. At every crash point in between, the file holds for each cluster
    /// the old or the new mapping, its data, and refcounts that are at worst too high.
    pub(super) fn flush(&mut self) -> Result<()> {
        self.flush_and(After::Keep)
    }

    /// As [`State::flush`], with the end of the file as the caller wants it.
    pub(super) fn flush_and(&mut self, after: After) -> Result<()> {
        if self.writer.is_none() {
            return Ok(self.storage.sync()?);
        }
        self.write_fresh_refcounts()?;
        self.write_refcounts()?;
        self.write_fresh_l2()?;
        self.storage.sync()?; // barrier: data, refcounts and new L2 tables before any mapping to them
        if self.write_mappings()? {
            self.storage.sync()?; // barrier: mappings before anything they named before is freed
        }
        if self.free_pending(after)? {
            self.write_refcounts()?;
            self.storage.sync()?; // not an order, a promise: what was freed stays free
        }
        Ok(())
    }

    /// The refcount structures that nothing names yet, then what names them.
    fn write_fresh_refcounts(&mut self) -> Result<()> {
        let Some(writer) = self.writer.as_mut() else { return Ok(()) };
        let refcounts = &mut writer.refcounts;
        if refcounts.unhooked.is_empty() && !refcounts.table_is_fresh {
            return Ok(());
        }
        let fresh = refcounts.blocks.dirty(true);
        write_tables(&*self.storage, &fresh)?;
        if refcounts.table_is_fresh {
            let bytes: Vec<u8> = refcounts.table.iter().flat_map(|entry| entry.0.to_be_bytes()).collect();
            self.storage.write_at(&bytes, refcounts.table_offset.get())?;
        }
        self.storage.sync()?; // barrier: new refcount blocks, and a new table, before anything points at them
        if refcounts.table_is_fresh {
            let mut header = self.header.clone();
            header.header.refcount_table_offset = refcounts.table_offset;
            header.header.refcount_table_clusters = refcounts.table_clusters;
            self.write_header(header)?;
        } else {
            write_words(&*self.storage, refcounts.table_offset, &refcounts.unhooked, |index| {
                refcounts.table.get(index).map_or(0, |entry| entry.0)
            })?;
        }
        let Some(writer) = self.writer.as_mut() else { return Ok(()) };
        for block in fresh {
            writer.refcounts.blocks.written(block.at);
        }
        writer.refcounts.blocks.hooked_up();
        writer.refcounts.unhooked.clear();
        writer.refcounts.table_is_fresh = false;
        Ok(())
    }

    /// The refcount blocks that changed.
    fn write_refcounts(&mut self) -> Result<()> {
        let Some(writer) = self.writer.as_mut() else { return Ok(()) };
        let blocks = writer.refcounts.blocks.dirty(false);
        write_tables(&*self.storage, &blocks)?;
        for block in blocks {
            writer.refcounts.blocks.written(block.at);
        }
        Ok(())
    }

    /// The L2 tables that no L1 entry in the file names yet.
    fn write_fresh_l2(&mut self) -> Result<()> {
        let cache = self.l2.get_mut().unwrap_or_else(PoisonError::into_inner);
        let tables = cache.dirty(true);
        write_tables(&*self.storage, &tables)?;
        for table in tables {
            cache.written(table.at);
        }
        Ok(())
    }

    /// L1 and L2 entries. Tells whether there were any.
    fn write_mappings(&mut self) -> Result<bool> {
        let cache = self.l2.get_mut().unwrap_or_else(PoisonError::into_inner);
        let tables = cache.dirty(false);
        write_tables(&*self.storage, &tables)?;
        let any = !tables.is_empty() || !self.l1_dirty.is_empty();
        for table in tables {
            cache.written(table.at);
        }
        write_words(&*self.storage, self.header.header.l1_table_offset, &self.l1_dirty, |index| {
            self.l1.get(index).map_or(0, |entry| entry.0)
        })?;
        cache.hooked_up();
        self.l1_dirty.clear();
        Ok(any)
    }

    /// Lowers the refcounts that waited for the mappings, and gives space back. Tells whether there were any.
    fn free_pending(&mut self, after: After) -> Result<bool> {
        let cluster_bits = self.geometry.cluster_bits().get();
        let Some(writer) = self.writer.as_mut() else { return Ok(false) };
        if !writer.refcounts.has_pending() {
            return Ok(false);
        }
        self.memory.clear();
        let freed = writer.refcounts.apply_pending()?;
        let end = if after == After::Cut { self.cut_file()? } else { writer.file_end };
        for ClusterRun { start, count } in freed {
            let from = start.get() << cluster_bits;
            let to = (from + (count << cluster_bits)).min(end);
            if from < to {
                // A storage without holes keeps the space; a failure costs space, not content.
                let _ = self.storage.punch_range(from..to);
            }
        }
        Ok(true)
    }

    /// Writes metadata before it crowds the cache.
    pub(super) fn flush_if_crowded(&mut self) -> Result<()> {
        let l2 = self.l2.get_mut().unwrap_or_else(PoisonError::into_inner).is_crowded();
        let counts = self.writer.as_ref().is_some_and(|writer| writer.refcounts.blocks.is_crowded());
        if l2 || counts { self.flush() } else { Ok(()) }
    }

    /// The writer's part; `prepare_write` has loaded it.
    pub(super) fn writer(&mut self) -> Result<&mut Writer> {
        let file = self.storage.name();
        self.writer.as_deref_mut().ok_or_else(|| Error::Poisoned { file: file.to_owned() })
    }
}

/// Writes the dirty bytes of tables, widened to whole sectors: a sector is old or new, never mixed.
fn write_tables<T: Table>(storage: &dyn Storage, tables: &[Dirty<T>]) -> storage::Result<()> {
    for Dirty { at, table, range } in tables {
        let bytes = table.bytes();
        let (from, to) = (range.start & !511, range.end.next_multiple_of(512).min(bytes.len()));
        storage.write_at(&bytes[from..to], at.get() + from as u64)?;
    }
    Ok(())
}

/// Writes 64-bit words of a table by whole sectors: those in which a dirty word lies.
fn write_words(
    storage: &dyn Storage,
    table: HostOffset,
    dirty: &std::collections::BTreeSet<usize>,
    word: impl Fn(usize) -> u64,
) -> storage::Result<()> {
    let mut done = None;
    for index in dirty {
        let sector = index / 64;
        if done == Some(sector) {
            continue;
        }
        done = Some(sector);
        let bytes: Vec<u8> = (sector * 64..(sector + 1) * 64).flat_map(|index| word(index).to_be_bytes()).collect();
        storage.write_at(&bytes, table.get() + 512 * sector as u64)?;
    }
    Ok(())
}
