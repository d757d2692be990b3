//! The image under check: its header and refcount table, and what lies where.

use byteorder::{BigEndian, ByteOrder};

use crate::format::{
    AutoclearFeatures, ClusterBits, Extension, Geometry, HeaderCluster, HostCluster, HostOffset, IncompatibleFeatures,
    Limits, RefcountBlock, RefcountTableEntry, Version, decode_reftable,
};
use crate::image::{Error, Result};
use crate::storage::Storage;

use super::counts::index;

/// How many bytes of tables are read at once where they follow one another.
pub(super) const READ_AHEAD: u64 = 1 << 20;

/// How long a file can be at most, as QEMU sees it.
const LONGEST_FILE: u64 = i64::MAX.unsigned_abs() >> 30 << 30;

/// The image under check.
#[derive(Debug)]
pub(super) struct Subject<'a> {
    pub(super) storage: &'a dyn Storage,
    pub(super) head: HeaderCluster,
    pub(super) geometry: Geometry,
    pub(super) file_len: u64,
    pub(super) limits: &'a Limits,
    pub(super) reftable: Vec<RefcountTableEntry>,
}

impl<'a> Subject<'a> {
    /// Reads what must be readable for a check to make sense: the header and the refcount table.
    pub(super) fn read(storage: &'a dyn Storage, limits: &'a Limits) -> Result<Self> {
        let file_len = storage.len()?;
        let mut start = [0; 24];
        storage.read_at(&mut start, 0)?;
        // A wrong cluster size is the decoder's to refuse; until then any will do.
        let bits = ClusterBits::new(BigEndian::read_u32(&start[20..])).unwrap_or_default();
        let mut cluster = vec![0; index(file_len.min(1 << bits.get()))];
        storage.read_at(&mut cluster, 0)?;
        let head =
            HeaderCluster::decode(&cluster, file_len, limits).map_err(|error| Error::format(storage.name(), error))?;
        let geometry = head.header.geometry();
        let mut subject = Self { storage, head, geometry, file_len, limits, reftable: Vec::new() };
        let bytes = u64::from(subject.head.header.refcount_table_clusters).saturating_mul(geometry.cluster_size());
        if bytes > limits.max_reftable_bytes {
            let what = format!("refcount table of {bytes} bytes, allowed are {}", limits.max_reftable_bytes);
            return Err(Error::Limit { file: storage.name().to_owned(), what });
        }
        // Entries past the end of the file read as zeroes and change nothing.
        let offset = subject.head.header.refcount_table_offset.get();
        subject.reftable = decode_reftable(&subject.read_table(offset, bytes)?);
        Ok(subject)
    }

    /// The bytes of a table, as far as the file holds them.
    pub(super) fn read_table(&self, offset: u64, len: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; index(len.min(self.file_len.saturating_sub(offset)))];
        self.storage.read_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    /// The cluster size in bytes.
    pub(super) fn cluster_size(&self) -> u64 {
        self.geometry.cluster_size()
    }

    /// Whether an offset is not the start of a cluster.
    pub(super) fn unaligned(&self, offset: u64) -> bool {
        !self.geometry.is_aligned(HostOffset::new(offset))
    }

    /// Whether a refcount block cannot be read from where it is said to lie: inside a cluster, or beyond any file. Blocks
    /// past the end of this file can: they are all zero.
    pub(super) fn unreadable(&self, block: HostOffset) -> bool {
        let end = block.get().saturating_add(self.cluster_size());
        !self.geometry.is_aligned(block) || end > LONGEST_FILE
    }

    /// Whether guest data lies in another file, so that it is not counted in this one.
    pub(super) fn data_file(&self) -> bool {
        self.head.header.incompatible_features.has(IncompatibleFeatures::DATA_FILE)
    }

    /// Whether a range ends a whole cluster or more behind the file: no file of a working image does that.
    pub(super) fn past_end(&self, offset: u64, len: u64) -> bool {
        match offset.checked_add(len) {
            Some(end) if i64::try_from(end).is_ok() => end >= self.file_len.saturating_add(self.cluster_size()),
            _ => true,
        }
    }

    /// How many bytes of L1 the active table has.
    pub(super) fn l1_bytes(&self) -> u64 {
        u64::from(self.head.header.l1_size) * 8
    }

    /// The refcount block with this index into the table: `Ok(None)` where all its refcounts are 0.
    ///
    /// Blocks that are not aligned are the caller's to refuse before.
    pub(super) fn read_refblock(&self, block: HostOffset) -> Result<Option<RefcountBlock>> {
        if block.get() >= self.file_len {
            return Ok(None);
        }
        let mut bytes = vec![0; self.geometry.cluster_len()];
        self.storage.read_at(&mut bytes, block.get())?;
        let block = RefcountBlock::decode(bytes.into_boxed_slice(), self.geometry)
            .map_err(|error| Error::format(self.storage.name(), error))?;
        Ok(Some(block))
    }

    /// The refcount table's entry for a cluster.
    pub(super) fn reftable_entry(&self, cluster: u64) -> RefcountTableEntry {
        let at = self.geometry.refcount_table_index(HostCluster::new(cluster));
        self.reftable.get(index(at)).copied().unwrap_or_default()
    }

    /// Where the crypto header lies and how long it is.
    pub(super) fn crypto_header(&self) -> Option<(u64, u64)> {
        self.head.extensions.iter().find_map(|extension| match extension {
            Extension::Crypto(crypto) => Some((crypto.offset.get(), crypto.length)),
            _ => None,
        })
    }

    /// Clears autoclear bits that this library does not know: from here on the image is written by one who does not
    /// keep their promise.
    pub(super) fn clear_unknown_autoclear(&mut self) -> Result<()> {
        let header = &mut self.head.header;
        let known = header.autoclear_features.0 & AutoclearFeatures::KNOWN;
        if header.version == Version::V2 || known == header.autoclear_features.0 {
            return Ok(());
        }
        header.autoclear_features = AutoclearFeatures(known);
        self.storage.write_at(&known.to_be_bytes(), 88)?;
        self.storage.sync()?; // barrier: the promise is gone before anything changes
        Ok(())
    }

    /// Clears the dirty and the corrupt bit: nothing is left that they warn of.
    pub(super) fn clear_dirty_and_corrupt(&mut self) -> Result<bool> {
        let header = &mut self.head.header;
        let warnings = IncompatibleFeatures::DIRTY | IncompatibleFeatures::CORRUPT;
        let others = header.incompatible_features.0 & !warnings;
        if header.version == Version::V2 || others == header.incompatible_features.0 {
            return Ok(false);
        }
        self.storage.sync()?; // barrier: every repair before the word that it was done
        header.incompatible_features = IncompatibleFeatures(others);
        self.storage.write_at(&others.to_be_bytes(), 72)?;
        self.storage.sync()?; // barrier: the caller may start to rely on the refcounts
        Ok(true)
    }
}
