//! The file names in a qcow2 header, read without validation of anything else.

use crate::format::limits::{MAGIC, MAX_BACKING_FILE_SIZE, MAX_CLUSTER_BITS, MIN_CLUSTER_BITS};
use crate::format::{Extension, IncompatibleFeatures};
use crate::storage::{Result, Storage};

/// The length of the first read: a header, its usual extensions and a backing name.
const FIRST_READ: usize = 1024;
/// The unit of further reads.
const NEXT_READ: usize = 64 << 10;
/// The end of the largest first cluster. All names in a header end before it.
const MAX_END: u64 = 1 << MAX_CLUSTER_BITS;

/// The names of other files in an image's header.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct HeaderNames {
    /// The name of the backing file.
    backing_file: Option<Vec<u8>>,
    /// The name of the external data file.
    data_file: Option<Vec<u8>>,
}

impl HeaderNames {
    /// Reads the names from the start of a file. A file that is no qcow2 image has none. A header
    /// with other faults has the names that QEMU would find in it.
    pub(super) fn read(storage: &dyn Storage) -> Result<Self> {
        let mut head = Head { storage, bytes: vec![0; FIRST_READ] };
        storage.read_at(&mut head.bytes, 0)?;
        if head.u32(0)? != MAGIC {
            return Ok(Self::default());
        }
        Ok(Self { backing_file: head.backing_file()?, data_file: head.data_file()? })
    }

    /// Iterates the names; the flag is `true` for the name of a data file.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&[u8], bool)> {
        let backing_file = self.backing_file.as_deref().map(|name| (name, false));
        backing_file.into_iter().chain(self.data_file.as_deref().map(|name| (name, true)))
    }
}

/// The start of a file, read as far as needed. Bytes past the end of the file are zero.
struct Head<'a> {
    storage: &'a dyn Storage,
    bytes: Vec<u8>,
}

impl Head<'_> {
    /// Returns `len` bytes from `at` on, none past the end of the largest first cluster.
    fn bytes(&mut self, at: u64, len: u64) -> Result<&[u8]> {
        let end = at.saturating_add(len);
        let (Ok(at), Ok(len)) = (usize::try_from(at), usize::try_from(end)) else { return Ok(&[]) };
        if end > MAX_END {
            return Ok(&[]);
        }
        let have = self.bytes.len();
        if len > have {
            self.bytes.resize(len.next_multiple_of(NEXT_READ), 0);
            let more = self.bytes.get_mut(have..).unwrap_or_default();
            self.storage.read_at(more, u64::try_from(have).unwrap_or(u64::MAX))?;
        }
        Ok(self.bytes.get(at..len).unwrap_or_default())
    }

    fn u32(&mut self, at: u64) -> Result<u32> {
        let bytes = self.bytes(at, 4)?;
        Ok(bytes.iter().fold(0, |value, byte| value << 8 | u32::from(*byte)))
    }

    fn u64(&mut self, at: u64) -> Result<u64> {
        Ok(u64::from(self.u32(at)?) << 32 | u64::from(self.u32(at.saturating_add(4))?))
    }

    /// Returns a name as QEMU reads it: up to its first NUL.
    fn name(&mut self, at: u64, len: u64) -> Result<Option<Vec<u8>>> {
        let bytes = self.bytes(at, len)?;
        let name = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        Ok((!name.is_empty()).then(|| name.to_vec()))
    }

    fn backing_file(&mut self) -> Result<Option<Vec<u8>>> {
        let (at, len) = (self.u64(8)?, u64::from(self.u32(16)?));
        if at == 0 || len > MAX_BACKING_FILE_SIZE { Ok(None) } else { self.name(at, len) }
    }

    /// Finds the data file's name among the extensions. Version 2 has no feature bits.
    fn data_file(&mut self) -> Result<Option<Vec<u8>>> {
        if self.u32(4)? < 3 || self.u64(72)? & IncompatibleFeatures::DATA_FILE == 0 {
            return Ok(None);
        }
        let bits = self.u32(20)?;
        let cluster = if (MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&bits) { 1 << bits } else { MAX_END };
        let end = match self.u64(8)? {
            0 => cluster,
            backing_file_offset => backing_file_offset.min(cluster),
        };
        let mut at = u64::from(self.u32(100)?);
        while at.saturating_add(8) <= end {
            let (kind, len) = (self.u32(at)?, u64::from(self.u32(at.saturating_add(4))?));
            let data = at.saturating_add(8);
            match kind {
                Extension::END => break,
                Extension::DATA_FILE => return self.name(data, len),
                _ => at = data.saturating_add(len.next_multiple_of(8)),
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::image::{CreateOptions, Image};
    use crate::storage::MemoryStorage;

    /// An image that is backed by `base`, with some bytes of its header replaced.
    fn patched(patches: &[(u64, &[u8])]) -> HeaderNames {
        let storage = Arc::new(MemoryStorage::new("image"));
        let options = CreateOptions::new(1 << 20).with_backing("base", "qcow2");
        Image::create(Arc::clone(&storage) as _, &options).unwrap().close().unwrap();
        for (at, bytes) in patches {
            storage.write_at(bytes, *at).unwrap();
        }
        HeaderNames::read(&*storage).unwrap()
    }

    fn backed_by(name: &[u8]) -> HeaderNames {
        HeaderNames { backing_file: Some(name.to_vec()), data_file: None }
    }

    #[test]
    fn header_that_cannot_be_opened_still_names_files() {
        assert_eq!(patched(&[]), backed_by(b"base"));
        for (what, at, bytes) in [
            ("version 1", 4, &[0, 0, 0, 1][..]),
            ("a later version", 4, &[0, 0, 0, 9]),
            ("another encryption", 32, &[0, 0, 0, 9]),
            ("an unknown feature", 72, &[0x80, 0, 0, 0, 0, 0, 0, 0]),
            ("clusters of no size", 20, &[0, 0, 0, 99]),
            ("an L1 table past the end", 40, &[0xff; 8]),
        ] {
            assert_eq!(patched(&[(at, bytes)]), backed_by(b"base"), "{what}");
        }
    }

    #[test]
    fn name_that_qemu_would_not_read_is_none() {
        for (what, at, bytes) in [
            ("another magic", 0, &b"QED\0"[..]),
            ("no offset", 8, &[0; 8]),
            ("an offset past the first cluster", 8, &[0, 0, 0, 0, 0, 0x20, 0, 0]),
            ("the largest offset", 8, &[0xff; 8]),
            ("no length", 16, &[0; 4]),
            ("a length over 1023", 16, &[0, 0, 4, 0]),
        ] {
            assert_eq!(patched(&[(at, bytes)]), HeaderNames::default(), "{what}");
        }
    }

    #[test]
    fn name_ends_at_its_first_nul_and_may_be_anywhere_in_the_cluster() {
        let far: &[u8] = &0xfff0_u64.to_be_bytes();
        assert_eq!(patched(&[(8, far), (16, &[0, 0, 0, 16]), (0xfff0, b"far\0more")]), backed_by(b"far"));
        let past_the_file = (2_u64 << 20) - 100;
        assert_eq!(patched(&[(8, &past_the_file.to_be_bytes())]), HeaderNames::default());
    }

    #[test]
    fn data_file_is_found_behind_other_extensions() {
        let data_file = |kind: u32, len: u32| {
            let (mut bytes, name) = (vec![0; 0x9000], &b"disk.raw"[..]);
            bytes[..4].copy_from_slice(b"QFI\xfb");
            (bytes[7], bytes[23], bytes[79], bytes[103]) = (3, 16, 4, 104);
            bytes[104..108].copy_from_slice(&kind.to_be_bytes());
            bytes[108..112].copy_from_slice(&len.to_be_bytes());
            let at = 112 + usize::try_from(len).unwrap().next_multiple_of(8);
            if let Some(rest) = bytes.get_mut(at..at + 16) {
                rest[..4].copy_from_slice(b"DATA");
                rest[7] = 8;
                rest[8..].copy_from_slice(name);
            }
            let read = |bytes: &[u8]| {
                let storage = MemoryStorage::new("image");
                storage.write_at(bytes, 0).unwrap();
                HeaderNames::read(&storage).unwrap()
            };
            let named = read(&bytes);
            bytes[79] = 0;
            assert_eq!(read(&bytes), HeaderNames::default(), "without the feature bit the extension means nothing");
            named.data_file
        };
        let name = Some(b"disk.raw".to_vec());
        for len in [0, 1, 7, 8, 700, 0x8000] {
            assert_eq!(data_file(0x1234_5678, len), name, "{len}");
        }
        assert_eq!(data_file(Extension::END, 0), None);
        assert_eq!(data_file(0x1234_5678, u32::MAX), None);
    }
}
