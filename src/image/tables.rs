//! Reading the tables that nothing but inspection needs: internal snapshots and bitmaps.

use crate::format::limits::{MAX_BITMAP_DIRECTORY_SIZE, SNAPSHOT_HEADER_SIZE};
use crate::format::{
    BitmapDirectoryEntry, BitmapsExtension, Extension, FormatError, Header, HeaderCluster, HostOffset, Limits,
    SnapshotEntry, decode_bitmap_directory, decode_snapshots,
};
use crate::storage::Storage;

use super::{Error, Result};

/// How much of the snapshot table is read at first; its length is not known before its entries are.
const FIRST_READ: u64 = 64 << 10;

/// Reads the snapshot table.
pub(crate) fn read_snapshots(storage: &dyn Storage, header: &Header, limits: &Limits) -> Result<Vec<SnapshotEntry>> {
    let (count, table) = (header.nb_snapshots, header.snapshots_offset);
    if count == 0 {
        return Ok(Vec::new());
    }
    let wrong = |error| Error::format(storage.name(), error);
    if count > limits.max_snapshots {
        let (found, limit) = (u64::from(count), u64::from(limits.max_snapshots));
        return Err(wrong(FormatError::Limit { structure: "header", field: "nb_snapshots", found, limit }));
    }
    let behind = storage.len()?.saturating_sub(table.get());
    if behind / SNAPSHOT_HEADER_SIZE < u64::from(count) {
        let expected = format!("{count} entries before the end of the file");
        return Err(wrong(FormatError::corrupt("snapshot table", table.get(), "snapshots_offset", table, expected)));
    }
    let most = behind.min(limits.max_snapshot_table_bytes);
    let mut len = most.min(FIRST_READ);
    loop {
        let bytes = read(storage, table, len)?;
        match decode_snapshots(&bytes, count, table, limits) {
            Ok((entries, _)) => return Ok(entries),
            Err(error) if len == most => return Err(wrong(error)),
            // The table may be longer than what was read. An error that is none of that comes again, and is told then.
            Err(_) => len = len.saturating_mul(8).min(most),
        }
    }
}

/// Reads the bitmap directory; empty where there is none.
pub(crate) fn read_bitmap_directory(
    storage: &dyn Storage,
    header: &HeaderCluster,
) -> Result<Vec<BitmapDirectoryEntry>> {
    let extension = header.extensions.iter().find_map(|extension| match extension {
        Extension::Bitmaps(bitmaps) => Some(bitmaps),
        _ => None,
    });
    let Some(extension) = extension else { return Ok(Vec::new()) };
    let wrong = |error| Error::format(storage.name(), error);
    check_directory(extension, storage.len()?).map_err(wrong)?;
    let bytes = read(storage, extension.bitmap_directory_offset, extension.bitmap_directory_size)?;
    decode_bitmap_directory(&bytes, extension).map_err(wrong)
}

/// Compares what the extension says of the directory's length with the limit and the file.
fn check_directory(extension: &BitmapsExtension, file_len: u64) -> std::result::Result<(), FormatError> {
    let (offset, size) = (extension.bitmap_directory_offset, extension.bitmap_directory_size);
    if size > MAX_BITMAP_DIRECTORY_SIZE {
        let (structure, field) = ("bitmaps extension", "bitmap_directory_size");
        return Err(FormatError::Limit { structure, field, found: size, limit: MAX_BITMAP_DIRECTORY_SIZE });
    }
    if offset.checked_add(size).is_none_or(|end| end.get() > file_len) {
        let expected = format!("an end within the file's {file_len} bytes");
        return Err(FormatError::corrupt("bitmap directory", offset.get(), "bitmap_directory_size", size, expected));
    }
    Ok(())
}

/// Reads `len` bytes, which the caller has compared with the file's length.
fn read(storage: &dyn Storage, at: HostOffset, len: u64) -> Result<Vec<u8>> {
    let len = usize::try_from(len)
        .map_err(|_| Error::Limit { file: storage.name().to_owned(), what: format!("a table of {len} bytes") })?;
    let mut bytes = vec![0; len];
    storage.read_at(&mut bytes, at.get())?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{ClusterBits, Version, encode_bitmap_directory, encode_snapshots};
    use crate::storage::MemoryStorage;

    const TABLE: u64 = 0x1_0000;

    fn snapshot(number: usize) -> SnapshotEntry {
        SnapshotEntry {
            l1_table_offset: HostOffset::new(0x2_0000),
            l1_size: 1,
            id: number.to_string().into_bytes(),
            name: vec![b'n'; number % 300],
            date_sec: 1,
            date_nsec: 2,
            vm_clock_nsec: 3,
            vm_state_size: 0,
            extra_data: vec![0; 24],
        }
    }

    /// A header that names `count` snapshots, and a file that holds `table` where it says.
    fn with_table(count: u32, table: &[u8]) -> (MemoryStorage, Header) {
        let mut header = Header::new(Version::V3, ClusterBits::default(), 1 << 20);
        (header.nb_snapshots, header.snapshots_offset) = (count, HostOffset::new(TABLE));
        let storage = MemoryStorage::new("image");
        storage.write_at(table, TABLE).expect("memory");
        (storage, header)
    }

    #[test]
    fn a_snapshot_table_of_any_length_is_read() {
        for count in [0_u32, 1, 3, 400, 5000] {
            let entries: Vec<_> = (0..usize::try_from(count).expect("small")).map(snapshot).collect();
            let (storage, header) = with_table(count, &encode_snapshots(&entries));
            let read = read_snapshots(&storage, &header, &Limits::default()).expect("a good table");
            assert_eq!(read, entries);
        }
    }

    #[test]
    fn more_snapshots_than_the_file_holds_are_an_error() {
        let entries: Vec<_> = (0..40).map(snapshot).collect();
        let table = encode_snapshots(&entries);
        let limits = Limits::default();
        for count in [41, 65_536] {
            let (storage, header) = with_table(count, &table);
            assert!(matches!(read_snapshots(&storage, &header, &limits), Err(Error::Corrupt { .. })), "{count}");
        }
        let (storage, header) = with_table(65_537, &table);
        assert!(matches!(read_snapshots(&storage, &header, &limits), Err(Error::Limit { .. })));
        let (storage, mut header) = with_table(1, &table);
        header.snapshots_offset = HostOffset::new(u64::MAX - 0xffff);
        assert!(matches!(read_snapshots(&storage, &header, &limits), Err(Error::Corrupt { .. })));
    }

    #[test]
    fn the_bitmap_directory_is_read_within_the_file_and_the_limit() {
        let entries: Vec<_> = ["a", "second"]
            .map(|name| BitmapDirectoryEntry {
                bitmap_table_offset: HostOffset::new(0x2_0000),
                bitmap_table_size: 1,
                flags: 0,
                kind: 1,
                granularity_bits: 16,
                name: name.into(),
                extra_data: Vec::new(),
            })
            .to_vec();
        let directory = encode_bitmap_directory(&entries);
        let (storage, header) = with_table(0, &directory);
        let read = |size, offset| {
            let extension = BitmapsExtension {
                nb_bitmaps: 2,
                bitmap_directory_size: size,
                bitmap_directory_offset: HostOffset::new(offset),
            };
            let header = HeaderCluster::new(header.clone(), vec![Extension::Bitmaps(extension)], None);
            read_bitmap_directory(&storage, &header)
        };
        let len = directory.len() as u64;
        assert_eq!(read(len, TABLE).expect("a good directory"), entries);
        assert!(matches!(read(len + 8, TABLE), Err(Error::Corrupt { .. })));
        assert!(matches!(read(len, u64::MAX - 7), Err(Error::Corrupt { .. })));
        assert!(matches!(read(MAX_BITMAP_DIRECTORY_SIZE + 8, TABLE), Err(Error::Limit { .. })));
        let none = HeaderCluster::new(header.clone(), Vec::new(), None);
        assert_eq!(read_bitmap_directory(&storage, &none).expect("none"), []);
    }
}
