//! Writing compressed clusters: packed one behind the other, byte by byte, as QEMU packs them.

use crate::format::{CompressedDescriptor, GuestOffset, HostOffset, L2Entry};

use super::overlap::Metadata;
use super::refcounts::Refcounts;
use super::state::State;
use super::{Error, Image, Result};

/// A guest cluster and its compressed stream.
pub(crate) type Stream = (GuestOffset, Vec<u8>);

impl Image {
    /// Maps whole guest clusters to compressed streams of the image's compression type, each shorter than a cluster. What
    /// the clusters held before is freed. Durable with the next [`Image::flush`].
    ///
    /// # Errors
    /// As [`Image::write_at`]; [`Error::Limit`] past the highest offset that a descriptor can name.
    pub(crate) fn write_compressed(&self, streams: &[Stream]) -> Result<()> {
        self.check_write(GuestOffset::ZERO, 0)?;
        self.changing(|state| state.write_compressed(streams))
    }
}

impl State {
    fn write_compressed(&mut self, streams: &[Stream]) -> Result<()> {
        let mut placed = Vec::with_capacity(streams.len());
        let written = self.place_streams(streams, &mut placed).and_then(|()| self.write_streams(streams, &placed));
        if let Err(error) = written {
            for descriptor in placed {
                self.free_entry(&L2Entry::Compressed(descriptor), false)?;
            }
            return Err(error);
        }
        for ((guest, _), descriptor) in streams.iter().zip(placed) {
            let old = self.entry(*guest)?;
            self.set_entry(*guest, &L2Entry::Compressed(descriptor))?;
            self.free_entry(&old, false)?;
            self.flush_if_crowded()?;
        }
        Ok(())
    }

    /// Finds room for each stream.
    fn place_streams(&mut self, streams: &[Stream], placed: &mut Vec<CompressedDescriptor>) -> Result<()> {
        let bits = self.geometry.cluster_bits();
        for (_, stream) in streams {
            let len = stream.len() as u64;
            let writer = self.writer()?;
            let at = writer.refcounts.allocate_bytes(len, &mut writer.metadata)?;
            let end = at.saturating_add(len).get();
            writer.file_end = writer.file_end.max(end.next_multiple_of(1 << bits.get()));
            let descriptor = CompressedDescriptor::new(at, len, bits);
            placed.push(descriptor.ok_or_else(|| Error::Limit {
                file: self.storage.name().to_owned(),
                what: format!("a compressed cluster at {at}, past what its descriptor can name"),
            })?);
        }
        Ok(())
    }

    /// Writes the streams, adjacent ones at once.
    fn write_streams(&self, streams: &[Stream], placed: &[CompressedDescriptor]) -> Result<()> {
        let mut bytes: Vec<u8> = Vec::with_capacity(streams.iter().map(|(_, stream)| stream.len()).sum());
        let mut start = HostOffset::ZERO;
        for ((_, stream), descriptor) in streams.iter().zip(placed) {
            if start.saturating_add(bytes.len() as u64) != descriptor.offset {
                self.write_bytes(&bytes, start)?;
                bytes.clear();
                start = descriptor.offset;
            }
            bytes.extend_from_slice(stream);
        }
        self.write_bytes(&bytes, start)
    }

    fn write_bytes(&self, bytes: &[u8], at: HostOffset) -> Result<()> {
        if bytes.is_empty() { Ok(()) } else { Ok(self.storage.write_at(bytes, at.get())?) }
    }
}

impl Refcounts {
    /// Finds room for `len` bytes, at most a cluster: behind the bytes of the call before, going on into the next cluster
    /// where that is free, else at the start of a new one. Each cluster that is touched has one reference more.
    fn allocate_bytes(&mut self, len: u64, metadata: &mut Metadata) -> Result<HostOffset> {
        let geometry = self.geometry;
        let size = geometry.cluster_size();
        let mut at = self.partial;
        if let Some(partial) = at
            && self.get(geometry.host_cluster(partial))? >= geometry.refcount_order().max()
        {
            // Refcounts are too narrow for one more stream in this cluster.
            at = None;
        }
        let room = at.map_or(0, |at| size - at.get() % size);
        if room < len {
            let run = self.allocate(1, metadata)?;
            let next = HostOffset::new(run.start.get() << geometry.cluster_bits().get());
            at = at.filter(|at| at.saturating_add(room) == next);
            if at.is_none() {
                return Ok(self.leave_partial(next, len));
            }
        }
        let Some(at) = at else { return Err(Error::Poisoned { file: self.name().to_owned() }) };
        let shared = geometry.host_cluster(at);
        let count = self.get(shared)?;
        self.set(shared, count + 1)?;
        Ok(self.leave_partial(at, len))
    }

    /// Notes where the next stream may go.
    fn leave_partial(&mut self, at: HostOffset, len: u64) -> HostOffset {
        let end = at.saturating_add(len);
        self.partial = (!self.geometry.is_aligned(end)).then_some(end);
        at
    }
}
