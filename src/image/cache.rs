//! A bounded cache of metadata tables, written back by range.
//!
//! Clean tables are given up by the clock algorithm. Dirty ones stay until the flush protocol has written them; the
//! writer flushes before they fill the cache.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use crate::format::{HostOffset, L2Table, RefcountBlock};

/// A table that lies in one cluster.
pub(super) trait Table: Clone {
    /// Its bytes as they go to the file.
    fn bytes(&self) -> &[u8];
}

impl Table for L2Table {
    fn bytes(&self) -> &[u8] {
        self.as_bytes()
    }
}

impl Table for RefcountBlock {
    fn bytes(&self) -> &[u8] {
        self.as_bytes()
    }
}

/// One cached table.
#[derive(Debug)]
struct Slot<T> {
    at: HostOffset,
    table: Arc<T>,
    /// The bytes that the file does not have yet; empty when clean.
    dirty: Range<usize>,
    /// Nothing in the file points at the table yet: it may be written before any barrier.
    fresh: bool,
    /// Asked for since the clock's hand last passed.
    used: bool,
}

/// A table to be written: where, what, and which bytes of it.
#[derive(Debug)]
pub(super) struct Dirty<T> {
    pub(super) at: HostOffset,
    pub(super) table: Arc<T>,
    pub(super) range: Range<usize>,
}

/// Tables by the host offset of their cluster.
#[derive(Debug)]
pub(super) struct Cache<T> {
    slots: Vec<Slot<T>>,
    index: HashMap<HostOffset, usize>,
    hand: usize,
    capacity: usize,
    dirty: usize,
    /// The last table that was taken in by [`Cache::insert_passing`].
    passing: Option<HostOffset>,
}

impl<T: Table> Cache<T> {
    /// A cache for `capacity` tables, at least four.
    pub(super) fn new(capacity: usize) -> Self {
        Self { slots: Vec::new(), index: HashMap::new(), hand: 0, capacity: capacity.max(4), dirty: 0, passing: None }
    }

    /// The table at `at`, if it is here.
    pub(super) fn get(&mut self, at: HostOffset) -> Option<Arc<T>> {
        let slot = &mut self.slots[*self.index.get(&at)?];
        slot.used = true;
        Some(Arc::clone(&slot.table))
    }

    /// The same, without being a reason to keep it.
    pub(super) fn peek(&self, at: HostOffset) -> Option<Arc<T>> {
        self.index.get(&at).map(|&index| Arc::clone(&self.slots[index].table))
    }

    /// Takes in a table as the file has it, in place of the last one that came this way, unless that has been asked for
    /// since: reading all tables in a row neither fills the cache nor drives anything out.
    pub(super) fn insert_passing(&mut self, at: HostOffset, table: Arc<T>) {
        let last = self.passing.replace(at).and_then(|last| self.index.get(&last).copied());
        if let Some(index) = last.filter(|&index| self.slots[index].dirty.is_empty() && !self.slots[index].used) {
            self.remove(self.slots[index].at);
        }
        self.insert(Slot { at, table, dirty: 0..0, fresh: false, used: false });
    }

    /// Takes in a table as the file has it.
    pub(super) fn insert_clean(&mut self, at: HostOffset, table: Arc<T>) {
        self.insert(Slot { at, table, dirty: 0..0, fresh: false, used: true });
    }

    /// Takes in a table that the file does not have and that nothing in the file points at.
    pub(super) fn insert_fresh(&mut self, at: HostOffset, table: T) {
        let dirty = 0..table.bytes().len();
        self.insert(Slot { at, table: Arc::new(table), dirty, fresh: true, used: true });
    }

    fn insert(&mut self, slot: Slot<T>) {
        self.remove(slot.at);
        let index = if self.slots.len() < self.capacity { None } else { self.evictable() };
        self.dirty += usize::from(!slot.dirty.is_empty());
        if let Some(index) = index {
            self.index.remove(&self.slots[index].at);
            self.index.insert(slot.at, index);
            self.slots[index] = slot;
        } else {
            self.index.insert(slot.at, self.slots.len());
            self.slots.push(slot);
        }
    }

    /// The slot to give up: clean, and not used since the hand last passed. `None` where all are dirty.
    fn evictable(&mut self) -> Option<usize> {
        for _ in 0..2 * self.slots.len() {
            self.hand = (self.hand + 1) % self.slots.len();
            let slot = &mut self.slots[self.hand];
            if slot.dirty.is_empty() && !std::mem::take(&mut slot.used) {
                return Some(self.hand);
            }
        }
        None
    }

    /// Forgets a table: its cluster is no longer one.
    pub(super) fn remove(&mut self, at: HostOffset) {
        let Some(index) = self.index.remove(&at) else { return };
        let slot = self.slots.swap_remove(index);
        self.dirty -= usize::from(!slot.dirty.is_empty());
        if let Some(moved) = self.slots.get(index) {
            self.index.insert(moved.at, index);
        }
        self.hand = 0;
    }

    /// Changes bytes of a table that is here, and remembers that they must be written.
    ///
    /// # Panics
    /// Where the table is not here: the caller has just fetched it under the same exclusive lock.
    pub(super) fn modify(&mut self, at: HostOffset, range: Range<usize>, change: impl FnOnce(&mut T)) {
        let index = self.index.get(&at);
        assert!(index.is_some(), "table {at} is changed but not cached");
        let slot = &mut self.slots[index.copied().unwrap_or_default()];
        if slot.dirty.is_empty() {
            self.dirty += 1;
            slot.dirty = range;
        } else {
            slot.dirty = slot.dirty.start.min(range.start)..slot.dirty.end.max(range.end);
        }
        slot.used = true;
        change(Arc::make_mut(&mut slot.table));
    }

    /// Whether so much is dirty that it should be written.
    pub(super) fn is_crowded(&self) -> bool {
        self.dirty * 2 > self.capacity
    }

    /// How many tables the file does not have as they are here.
    pub(super) fn dirty_count(&self) -> usize {
        self.dirty
    }

    /// Whether anything must be written.
    pub(super) fn is_dirty(&self) -> bool {
        self.dirty > 0
    }

    /// The tables to write, in file order: the fresh ones, or the others.
    pub(super) fn dirty(&self, fresh: bool) -> Vec<Dirty<T>> {
        let mut dirty: Vec<_> = self
            .slots
            .iter()
            .filter(|slot| !slot.dirty.is_empty() && slot.fresh == fresh)
            .map(|slot| Dirty { at: slot.at, table: Arc::clone(&slot.table), range: slot.dirty.clone() })
            .collect();
        dirty.sort_unstable_by_key(|table| table.at);
        dirty
    }

    /// The file now has this table as it is here.
    pub(super) fn written(&mut self, at: HostOffset) {
        if let Some(&index) = self.index.get(&at) {
            let slot = &mut self.slots[index];
            self.dirty -= usize::from(!slot.dirty.is_empty());
            slot.dirty = 0..0;
        }
    }

    /// Everything that was fresh is pointed at from now on.
    pub(super) fn hooked_up(&mut self) {
        for slot in &mut self.slots {
            slot.fresh = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{ClusterBits, Geometry, RefcountOrder, Version};

    fn table() -> Arc<L2Table> {
        let bits = ClusterBits::new(9).expect("valid bits");
        let geometry = Geometry::new(bits, RefcountOrder::default(), false).expect("valid geometry");
        Arc::new(L2Table::empty(geometry, Version::V3))
    }

    fn at(number: u64) -> HostOffset {
        HostOffset::new(number * 512)
    }

    #[test]
    fn passing_tables_take_one_place_and_drive_nothing_out() {
        let mut cache = Cache::new(4);
        for number in 1..4 {
            cache.insert_clean(at(number), table());
        }
        for number in 10..100 {
            cache.insert_passing(at(number), table());
            assert!(cache.peek(at(number)).is_some(), "a walker comes back for the rest of a table");
            assert_eq!(cache.slots.len(), 4);
        }
        assert!((1..4).all(|number| cache.peek(at(number)).is_some()));
    }

    #[test]
    fn a_passing_table_that_is_asked_for_or_changed_stays() {
        let mut cache = Cache::new(8);
        cache.insert_passing(at(1), table());
        assert!(cache.get(at(1)).is_some());
        cache.insert_passing(at(2), table());
        cache.modify(at(2), 0..8, |_| ());
        cache.insert_passing(at(3), table());
        cache.insert_passing(at(4), table());
        let here: Vec<_> = (1..5).map(|number| cache.peek(at(number)).is_some()).collect();
        assert_eq!(here, [true, true, false, true]);
    }
}
