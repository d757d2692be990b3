//! Bitmap directory and tables. Specification: "Bitmaps extension", "Bitmap directory", "Bitmap table".
//!
//! A directory entry is, by offset: 0 `bitmap_table_offset`, 8 `bitmap_table_size`, 12 `flags`, 16 `type`,
//! 17 `granularity_bits`, 18 length of the name, 20 length of the extra data, 24 extra data, name, and zeroes up to a
//! multiple of 8.

use std::collections::HashSet;
use std::fmt::Display;

use byteorder::{BigEndian, ByteOrder};

use super::limits::{
    BITMAP_DIRECTORY_ENTRY_SIZE, MAX_BITMAP_DIRECTORY_SIZE, MAX_BITMAP_GRANULARITY_BITS, MAX_BITMAP_NAME_SIZE,
    MAX_BITMAP_PHYSICAL_SIZE, MAX_BITMAP_TABLE_ENTRIES, MAX_BITMAPS, MAX_OFFSET, MIN_BITMAP_GRANULARITY_BITS,
};
use super::{BitmapsExtension, ClusterBits, FormatError, Geometry, HostOffset};

/// The reserved bits of a bitmap table entry: 1 to 8 and 56 to 63.
pub const BITMAP_TABLE_RESERVED_MASK: u64 = 0xff00_0000_0000_01fe;

/// One entry of the bitmap directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapDirectoryEntry {
    /// Where the bitmap table starts.
    pub bitmap_table_offset: HostOffset,
    /// The number of entries in it.
    pub bitmap_table_size: u32,
    /// Bit 0 `in_use`, bit 1 `auto`, bit 2 `extra_data_compatible`.
    pub flags: u32,
    /// 1: a dirty tracking bitmap.
    pub kind: u8,
    /// log2 of the guest bytes that one bit stands for.
    pub granularity_bits: u8,
    /// The name, as bytes.
    pub name: Vec<u8>,
    /// Extra data, kept as it is.
    pub extra_data: Vec<u8>,
}

/// Why a bitmap is kept but must not be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum UnusableBitmap {
    /// Flag `in_use`: it was not saved correctly, or somebody wrote without it.
    #[error("it was not saved correctly (in_use)")]
    InUse,
    /// Flags that this library does not know.
    #[error("it has unknown flags {0:#x}")]
    UnknownFlags(u32),
    /// Extra data that a program must know to use the bitmap.
    #[error("it has extra data that is not marked as compatible")]
    ExtraData,
    /// Not a dirty tracking bitmap.
    #[error("it is of unknown type {0}")]
    UnknownType(u8),
}

impl BitmapDirectoryEntry {
    /// Flag bit 0: the bitmap was not saved correctly and must not be used.
    pub const IN_USE: u32 = 1;
    /// Flag bit 1: every write must be recorded.
    pub const AUTO: u32 = 2;
    /// Flag bit 2: the bitmap may be used in spite of unknown extra data.
    pub const EXTRA_DATA_COMPATIBLE: u32 = 4;
    /// All flags that are known.
    pub const KNOWN_FLAGS: u32 = Self::IN_USE | Self::AUTO | Self::EXTRA_DATA_COMPATIBLE;
    /// The type of a dirty tracking bitmap.
    pub const DIRTY_TRACKING: u8 = 1;

    /// Whether this library may use the bitmap; one that it may not is kept, and its clusters stay counted.
    ///
    /// # Errors
    /// The reason.
    pub fn usable(&self) -> Result<(), UnusableBitmap> {
        if self.kind != Self::DIRTY_TRACKING {
            return Err(UnusableBitmap::UnknownType(self.kind));
        }
        if self.flags & !Self::KNOWN_FLAGS != 0 {
            return Err(UnusableBitmap::UnknownFlags(self.flags & !Self::KNOWN_FLAGS));
        }
        if !self.extra_data.is_empty() && self.flags & Self::EXTRA_DATA_COMPATIBLE == 0 {
            return Err(UnusableBitmap::ExtraData);
        }
        if self.flags & Self::IN_USE != 0 {
            return Err(UnusableBitmap::InUse);
        }
        Ok(())
    }

    /// The number of table entries that a disk of `virtual_size` bytes needs at this granularity.
    #[must_use]
    pub fn table_entries_for(&self, virtual_size: u64, geometry: Geometry) -> u64 {
        let granularity = 1_u64.checked_shl(self.granularity_bits.into()).unwrap_or(u64::MAX);
        geometry.clusters_for(virtual_size.div_ceil(granularity).div_ceil(8))
    }

    /// The length of the bitmap table in bytes.
    #[must_use]
    pub fn table_bytes(&self) -> u64 {
        u64::from(self.bitmap_table_size).saturating_mul(8)
    }

    /// Refuses a table that lies wrong or does not fit the image. What decoding alone can see was checked there.
    ///
    /// # Errors
    /// [`FormatError::Corrupt`] where the table is not aligned to a cluster, ends past what a file can hold, or is too
    /// short for the disk although the bitmap claims to be valid; [`FormatError::Limit`] where it holds too many bits.
    pub fn validate(&self, geometry: Geometry, virtual_size: u64) -> Result<(), FormatError> {
        let (structure, at) = ("bitmap table", self.bitmap_table_offset);
        if !geometry.is_aligned(at) {
            let expected = "a multiple of the cluster size";
            return Err(FormatError::corrupt(structure, at.get(), "bitmap_table_offset", at, expected));
        }
        if at.checked_add(self.table_bytes()).is_none_or(|end| end.get() > MAX_OFFSET) {
            return Err(FormatError::corrupt(structure, at.get(), "bitmap_table_offset", at, "an end below 2^63"));
        }
        let found = u64::from(self.bitmap_table_size).saturating_mul(geometry.cluster_size());
        if found > MAX_BITMAP_PHYSICAL_SIZE {
            return Err(FormatError::Limit {
                structure,
                field: "size of the bits",
                found,
                limit: MAX_BITMAP_PHYSICAL_SIZE,
            });
        }
        let needed = self.table_entries_for(virtual_size, geometry);
        // An inconsistent bitmap may be left over from before the disk grew.
        if self.flags & Self::IN_USE == 0 && u64::from(self.bitmap_table_size) < needed {
            let (found, expected) = (self.bitmap_table_size, format!("at least {needed}"));
            return Err(FormatError::corrupt(structure, at.get(), "bitmap_table_size", found, expected));
        }
        Ok(())
    }

    /// The length of the entry in the directory, padding included.
    #[must_use]
    pub fn encoded_len(&self) -> usize {
        HEADER_LEN.saturating_add(self.extra_data.len()).saturating_add(self.name.len()).next_multiple_of(8)
    }

    /// Decodes the entry that `bytes` starts with; tells what is behind it.
    fn decode(bytes: &[u8], at: u64) -> Result<(Self, &[u8]), FormatError> {
        let cut_off = || corrupt(at, "entry", "cut off", "an end within the directory");
        let (header, rest) = bytes.split_first_chunk::<HEADER_LEN>().ok_or_else(cut_off)?;
        let name_len = BigEndian::read_u16(&header[18..]);
        let extra_len = usize::try_from(BigEndian::read_u32(&header[20..])).map_err(|_| cut_off())?;
        let (extra_data, rest) = rest.split_at_checked(extra_len).ok_or_else(cut_off)?;
        let (name, rest) = rest.split_at_checked(name_len.into()).ok_or_else(cut_off)?;
        let entry = Self {
            bitmap_table_offset: HostOffset::new(BigEndian::read_u64(&header[0..])),
            bitmap_table_size: BigEndian::read_u32(&header[8..]),
            flags: BigEndian::read_u32(&header[12..]),
            kind: header[16],
            granularity_bits: header[17],
            name: name.to_vec(),
            extra_data: extra_data.to_vec(),
        };
        entry.check_fields(at)?;
        let padding = entry.encoded_len().saturating_sub(bytes.len().saturating_sub(rest.len()));
        let (_, rest) = rest.split_at_checked(padding).ok_or_else(cut_off)?;
        Ok((entry, rest))
    }

    /// What decoding checks of an entry: all that does not need the geometry. `at` is where the entry stands.
    fn check_fields(&self, at: u64) -> Result<(), FormatError> {
        let limit = |field, found, limit| Err(FormatError::Limit { structure: STRUCTURE, field, found, limit });
        let (offset, size, bits) = (self.bitmap_table_offset, self.bitmap_table_size, self.granularity_bits);
        if offset == HostOffset::ZERO {
            return Err(corrupt(at, "bitmap_table_offset", offset, "not 0"));
        }
        if size == 0 {
            return Err(corrupt(at, "bitmap_table_size", size, "at least 1"));
        }
        if size > MAX_BITMAP_TABLE_ENTRIES {
            return limit("bitmap_table_size", size.into(), MAX_BITMAP_TABLE_ENTRIES.into());
        }
        if !(MIN_BITMAP_GRANULARITY_BITS..=MAX_BITMAP_GRANULARITY_BITS).contains(&bits) {
            return Err(corrupt(at, "granularity_bits", bits, "9 to 31"));
        }
        let name_len = u64::try_from(self.name.len()).unwrap_or(u64::MAX);
        if name_len > MAX_BITMAP_NAME_SIZE.into() {
            return limit("name_size", name_len, MAX_BITMAP_NAME_SIZE.into());
        }
        Ok(())
    }

    /// Appends the encoded entry, padding included.
    fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        let (Ok(name_len), Ok(extra_len)) = (u16::try_from(self.name.len()), u32::try_from(self.extra_data.len()))
        else {
            panic!("a bitmap's name or extra data does not fit the directory");
        };
        out.extend_from_slice(&self.bitmap_table_offset.get().to_be_bytes());
        out.extend_from_slice(&self.bitmap_table_size.to_be_bytes());
        out.extend_from_slice(&self.flags.to_be_bytes());
        out.extend_from_slice(&[self.kind, self.granularity_bits]);
        out.extend_from_slice(&name_len.to_be_bytes());
        out.extend_from_slice(&extra_len.to_be_bytes());
        out.extend_from_slice(&self.extra_data);
        out.extend_from_slice(&self.name);
        out.resize(start.saturating_add(self.encoded_len()), 0);
    }
}

/// What errors call the directory.
const STRUCTURE: &str = "bitmap directory";

/// The part that every entry has: [`BITMAP_DIRECTORY_ENTRY_SIZE`] as a length.
const HEADER_LEN: usize = 24;
const _: () = assert!(BITMAP_DIRECTORY_ENTRY_SIZE == 24);

/// An error about the directory entry at `at`.
fn corrupt(at: u64, field: &'static str, found: impl Display, expected: impl Display) -> FormatError {
    FormatError::corrupt(STRUCTURE, at, field, found, expected)
}

/// Decodes the directory; `bytes` is exactly `bitmap_directory_size` long.
///
/// Refused is what cannot be followed. A bitmap that merely must not be used is decoded and kept: see
/// [`BitmapDirectoryEntry::usable`]. Alignment needs the geometry: see [`BitmapDirectoryEntry::validate`]. Names are not
/// compared: see [`bitmap_name_faults`]. Padding is not looked at, as in QEMU; a directory with bytes other than zero in
/// it is one that does not encode to the same bytes.
///
/// # Errors
/// [`FormatError::Corrupt`] where the entries do not exactly fill the directory, or a table has no offset, no entries
/// or a granularity outside of 512 bytes to 2 GiB; [`FormatError::Limit`] for too many bitmaps, too large a directory
/// or table, or too long a name.
pub fn decode_bitmap_directory(
    bytes: &[u8],
    extension: &BitmapsExtension,
) -> Result<Vec<BitmapDirectoryEntry>, FormatError> {
    let BitmapsExtension { nb_bitmaps, bitmap_directory_size, bitmap_directory_offset } = *extension;
    let at = bitmap_directory_offset.get();
    let limit = |field, found, limit| Err(FormatError::Limit { structure: STRUCTURE, field, found, limit });
    if nb_bitmaps > MAX_BITMAPS {
        return limit("nb_bitmaps", nb_bitmaps.into(), MAX_BITMAPS.into());
    }
    if bitmap_directory_size > MAX_BITMAP_DIRECTORY_SIZE {
        return limit("bitmap_directory_size", bitmap_directory_size, MAX_BITMAP_DIRECTORY_SIZE);
    }
    let len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    if len != bitmap_directory_size {
        return Err(corrupt(at, "length", len, bitmap_directory_size));
    }
    if u64::from(nb_bitmaps).saturating_mul(BITMAP_DIRECTORY_ENTRY_SIZE) > len {
        return Err(corrupt(at, "bitmap_directory_size", len, format!("room for {nb_bitmaps} entries")));
    }
    let mut entries = Vec::new();
    let mut rest = bytes;
    for _ in 0..nb_bitmaps {
        let done = u64::try_from(bytes.len().saturating_sub(rest.len())).unwrap_or(u64::MAX);
        let (entry, behind) = BitmapDirectoryEntry::decode(rest, at.saturating_add(done))?;
        entries.push(entry);
        rest = behind;
    }
    if !rest.is_empty() {
        let found = format!("{len}, {} of them behind the last entry", rest.len());
        return Err(corrupt(at, "bitmap_directory_size", found, "exactly what the entries fill"));
    }
    Ok(entries)
}

/// Encodes the directory.
///
/// # Panics
/// Where a name has more than 65,535 bytes or extra data more than 2^32-1: what was decoded has not.
#[must_use]
pub fn encode_bitmap_directory(entries: &[BitmapDirectoryEntry]) -> Vec<u8> {
    let mut out = Vec::new();
    for entry in entries {
        entry.encode(&mut out);
    }
    out
}

/// What is wrong with the names of a directory's bitmaps: by index, empty ones and those that an earlier entry has.
///
/// The specification demands names that are unique and not empty. QEMU looks at neither, so decoding keeps them.
#[must_use]
pub fn bitmap_name_faults(entries: &[BitmapDirectoryEntry]) -> Vec<(usize, &'static str)> {
    let mut seen = HashSet::new();
    let fault = |entry: &BitmapDirectoryEntry, new: bool| match (entry.name.is_empty(), new) {
        (true, _) => Some("the name is empty"),
        (_, false) => Some("the name is not unique"),
        _ => None,
    };
    let faults = entries.iter().enumerate().filter_map(|(index, entry)| {
        let new = seen.insert(entry.name.as_slice());
        fault(entry, new).map(|fault| (index, fault))
    });
    faults.collect()
}

/// One entry of a bitmap table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapTableEntry {
    /// The bits lie in this cluster.
    Cluster(HostOffset),
    /// All bits are 0.
    AllZeroes,
    /// All bits are 1.
    AllOnes,
}

impl BitmapTableEntry {
    /// Decodes one entry; `at` is where it stands.
    ///
    /// # Errors
    /// [`FormatError::Corrupt`] for reserved bits and unaligned clusters. Bit 0 is reserved where there is a cluster.
    pub fn decode(entry: u64, cluster_bits: ClusterBits, at: HostOffset) -> Result<Self, FormatError> {
        let refuse = |field, expected| {
            Err(FormatError::corrupt("bitmap table entry", at.get(), field, format!("{entry:#x}"), expected))
        };
        if entry & BITMAP_TABLE_RESERVED_MASK != 0 {
            return refuse("reserved bits", "0");
        }
        match entry {
            0 => Ok(Self::AllZeroes),
            1 => Ok(Self::AllOnes),
            _ if entry & 1 != 0 => refuse("bit 0", "0 where there is a cluster"),
            _ if entry.trailing_zeros() < cluster_bits.get() => refuse("offset", "a multiple of the cluster size"),
            _ => Ok(Self::Cluster(HostOffset::new(entry))),
        }
    }

    /// Encodes one entry.
    ///
    /// # Panics
    /// Where the cluster's offset is 0, not a multiple of 512, or past 2^56: the allocator gives none of these.
    #[must_use]
    pub fn encode(self) -> u64 {
        match self {
            Self::Cluster(offset) => {
                let word = offset.get();
                let fits = word > 1 && word & (BITMAP_TABLE_RESERVED_MASK | 1) == 0;
                assert!(fits, "host offset {word:#x} does not fit a bitmap table entry");
                word
            }
            Self::AllZeroes => 0,
            Self::AllOnes => 1,
        }
    }
}

#[cfg(test)]
mod tests;
