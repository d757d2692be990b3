//! Reading guest data.

use std::sync::{Arc, Mutex, PoisonError};

use crate::format::{CompressedDescriptor, FormatError, GuestOffset, HostOffset, L2Entry};

use super::extents::ExtentKind;
use super::state::State;
use super::{Result, as_len, compressed};

/// How many decompressed clusters an image remembers.
const REMEMBERED: usize = 8;

/// The last decompressed clusters, by where their compressed bytes start.
#[derive(Debug, Default)]
pub(super) struct Decompressed {
    slots: Mutex<Vec<(HostOffset, Arc<[u8]>)>>,
}

impl Decompressed {
    fn get(&self, at: HostOffset) -> Option<Arc<[u8]>> {
        let slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.iter().find(|slot| slot.0 == at).map(|slot| Arc::clone(&slot.1))
    }

    fn put(&self, at: HostOffset, cluster: Arc<[u8]>) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if slots.len() == REMEMBERED {
            slots.remove(0);
        }
        slots.push((at, cluster));
    }

    /// Forgets everything: host clusters may have changed hands.
    pub(super) fn clear(&self) {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl State {
    /// Fills the part of `buf` that this image holds; pushes what it does not hold to `holes`.
    pub(super) fn read_present(
        &self,
        buf: &mut [u8],
        offset: GuestOffset,
        holes: &mut Vec<(usize, usize)>,
    ) -> Result<()> {
        let end = offset.saturating_add(buf.len() as u64).get().min(self.header.header.virtual_size());
        let mut at = 0;
        while at < buf.len() {
            let position = offset.saturating_add(at as u64);
            if position.get() >= end {
                push_hole(holes, at, buf.len() - at);
                return Ok(());
            }
            let extent = self.extent_at(position, end)?;
            let len = as_len(extent.len);
            let part = &mut buf[at..at + len];
            match extent.kind {
                ExtentKind::Data { host } => self.storage.read_at(part, host.get())?,
                ExtentKind::Zero { .. } => part.fill(0),
                ExtentKind::Unallocated => push_hole(holes, at, len),
                ExtentKind::Compressed => self.read_compressed(part, position)?,
            }
            at += len;
        }
        Ok(())
    }

    /// Fills `buf` from compressed clusters only.
    fn read_compressed(&self, buf: &mut [u8], offset: GuestOffset) -> Result<()> {
        let mut at = 0;
        while at < buf.len() {
            let position = offset.saturating_add(at as u64);
            let in_cluster = as_len(self.geometry.offset_in_cluster(position));
            let len = (self.geometry.cluster_len() - in_cluster).min(buf.len() - at);
            let part = &mut buf[at..at + len];
            at += len;
            let L2Entry::Compressed(descriptor) = self.entry(position)? else { continue };
            if len == self.geometry.cluster_len() {
                self.decompress(descriptor, part)?;
                continue;
            }
            let cluster = if let Some(cluster) = self.memory.get(descriptor.offset) {
                cluster
            } else {
                let mut cluster = vec![0; self.geometry.cluster_len()];
                self.decompress(descriptor, &mut cluster)?;
                let cluster: Arc<[u8]> = cluster.into();
                self.memory.put(descriptor.offset, Arc::clone(&cluster));
                cluster
            };
            part.copy_from_slice(&cluster[in_cluster..in_cluster + len]);
        }
        Ok(())
    }

    /// Reads and decompresses one cluster.
    pub(super) fn decompress(&self, descriptor: CompressedDescriptor, cluster: &mut [u8]) -> Result<()> {
        // A descriptor can claim up to two clusters; more is never read.
        let mut input = vec![0; as_len(descriptor.max_len()).min(2 * self.geometry.cluster_len())];
        self.storage.read_at(&mut input, descriptor.offset.get())?;
        compressed::decompress(self.header.header.compression_type, &input, cluster).map_err(|why| {
            let at = descriptor.offset.get();
            self.corrupt(FormatError::corrupt("compressed cluster", at, "stream", why, "one whole cluster"))
        })
    }
}

/// Notes a hole, or lengthens the last one.
fn push_hole(holes: &mut Vec<(usize, usize)>, at: usize, len: usize) {
    match holes.last_mut() {
        Some((start, length)) if *start + *length == at => *length += len,
        _ => holes.push((at, len)),
    }
}
