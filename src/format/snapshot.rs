//! The table of internal snapshots. Specification: "Snapshots".
//!
//! An entry is, by offset: 0 `l1_table_offset`, 8 `l1_size`, 12 length of the ID, 14 length of the name, 16 `date_sec`,
//! 20 `date_nsec`, 24 `vm_clock_nsec`, 32 `vm_state_size`, 36 length of the extra data, 40 extra data, ID, name, and
//! zeroes up to a multiple of 8.

use byteorder::{BigEndian, ByteOrder};

use super::limits::{MAX_OFFSET, MAX_SNAPSHOT_EXTRA_DATA, MIN_V3_SNAPSHOT_EXTRA_DATA, SNAPSHOT_HEADER_SIZE};
use super::{FormatError, Geometry, HostOffset, Limits};

/// One entry of the snapshot table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotEntry {
    /// Where the snapshot's L1 table starts. Not checked by decoding, see [`SnapshotEntry::validate_l1`].
    pub l1_table_offset: HostOffset,
    /// The number of entries in it.
    pub l1_size: u32,
    /// The unique ID, as bytes.
    pub id: Vec<u8>,
    /// The name, as bytes.
    pub name: Vec<u8>,
    /// Seconds since the epoch.
    pub date_sec: u32,
    /// Nanoseconds of the second.
    pub date_nsec: u32,
    /// Guest clock in nanoseconds.
    pub vm_clock_nsec: u64,
    /// The 32-bit VM state size in bytes.
    pub vm_state_size: u32,
    /// The extra data: 64-bit VM state size, virtual disk size, icount, and what follows, kept as it is.
    pub extra_data: Vec<u8>,
}

impl SnapshotEntry {
    /// The size of the VM state in bytes: the 64-bit one where there is one.
    #[must_use]
    pub fn vm_state(&self) -> u64 {
        self.extra_field(0).unwrap_or(u64::from(self.vm_state_size))
    }

    /// The virtual disk size in bytes at the time of the snapshot, where it is told; else it is the present one.
    #[must_use]
    pub fn disk_size(&self) -> Option<u64> {
        self.extra_field(8)
    }

    /// The instruction count, where it is told: all ones mean that there is none.
    #[must_use]
    pub fn icount(&self) -> Option<u64> {
        self.extra_field(16).filter(|&count| count != u64::MAX)
    }

    /// Whether the extra data has what version 3 demands: VM state size and disk size. `check` reports where it has not.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        u32::try_from(self.extra_data.len()).is_ok_and(|len| len >= MIN_V3_SNAPSHOT_EXTRA_DATA)
    }

    /// The length of the snapshot's L1 table in bytes.
    #[must_use]
    pub fn l1_bytes(&self) -> u64 {
        u64::from(self.l1_size).saturating_mul(8)
    }

    /// Refuses an L1 table that nobody may follow: to be asked before it is used, since an image with a broken snapshot
    /// can still be read.
    ///
    /// # Errors
    /// [`FormatError::Limit`] where the table is too large, [`FormatError::Corrupt`] where it is not aligned to a
    /// cluster or ends past what a file can hold.
    pub fn validate_l1(&self, geometry: Geometry, limits: &Limits) -> Result<(), FormatError> {
        let (structure, at) = ("snapshot L1 table", self.l1_table_offset);
        if self.l1_bytes() > limits.max_l1_bytes {
            let (found, limit) = (self.l1_bytes(), limits.max_l1_bytes);
            return Err(FormatError::Limit { structure, field: "l1_size in bytes", found, limit });
        }
        if !geometry.is_aligned(at) {
            let expected = "a multiple of the cluster size";
            return Err(FormatError::corrupt(structure, at.get(), "l1_table_offset", at, expected));
        }
        if at.checked_add(self.l1_bytes()).is_none_or(|end| end.get() > MAX_OFFSET) {
            return Err(FormatError::corrupt(structure, at.get(), "l1_table_offset", at, "an end below 2^63"));
        }
        Ok(())
    }

    /// The length of the entry in the table, padding included.
    #[must_use]
    pub fn encoded_len(&self) -> usize {
        let parts = [self.extra_data.len(), self.id.len(), self.name.len()];
        parts.iter().fold(HEADER_LEN, |sum, &part| sum.saturating_add(part)).next_multiple_of(8)
    }

    /// The 64-bit number at `at` of the extra data, where that reaches so far.
    fn extra_field(&self, at: usize) -> Option<u64> {
        Some(u64::from_be_bytes(*self.extra_data.get(at..)?.first_chunk()?))
    }

    /// Decodes the entry that `bytes` starts with; tells its length without padding, or `None` where `bytes` ends first.
    fn decode(bytes: &[u8], at: u64) -> Result<Option<(Self, usize)>, FormatError> {
        let Some((header, rest)) = bytes.split_first_chunk::<HEADER_LEN>() else { return Ok(None) };
        let (extra_len, id_len, name_len) = (
            BigEndian::read_u32(&header[36..]),
            BigEndian::read_u16(&header[12..]),
            BigEndian::read_u16(&header[14..]),
        );
        if extra_len > MAX_SNAPSHOT_EXTRA_DATA {
            let (found, limit) = (u64::from(extra_len), u64::from(MAX_SNAPSHOT_EXTRA_DATA));
            let field = "extra data size";
            return Err(FormatError::Limit { structure: "snapshot table entry", field, found, limit });
        }
        let extra_len = usize::try_from(extra_len)
            .map_err(|_| FormatError::corrupt("snapshot table entry", at, "extra data size", extra_len, "less"))?;
        let parts = rest.split_at_checked(extra_len).and_then(|(extra, rest)| {
            let (id, rest) = rest.split_at_checked(id_len.into())?;
            let (name, rest) = rest.split_at_checked(name_len.into())?;
            Some((extra, id, name, rest))
        });
        let Some((extra_data, id, name, rest)) = parts else { return Ok(None) };
        let entry = Self {
            l1_table_offset: HostOffset::new(BigEndian::read_u64(&header[0..])),
            l1_size: BigEndian::read_u32(&header[8..]),
            id: id.to_vec(),
            name: name.to_vec(),
            date_sec: BigEndian::read_u32(&header[16..]),
            date_nsec: BigEndian::read_u32(&header[20..]),
            vm_clock_nsec: BigEndian::read_u64(&header[24..]),
            vm_state_size: BigEndian::read_u32(&header[32..]),
            extra_data: extra_data.to_vec(),
        };
        Ok(Some((entry, bytes.len().saturating_sub(rest.len()))))
    }

    /// Appends the encoded entry, padding included.
    fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        let (id_len, name_len) = (u16::try_from(self.id.len()), u16::try_from(self.name.len()));
        let (Ok(id_len), Ok(name_len)) = (id_len, name_len) else {
            panic!("a snapshot's ID and name have at most 65,535 bytes each");
        };
        let extra_len = u32::try_from(self.extra_data.len()).unwrap_or(u32::MAX);
        assert!(extra_len <= MAX_SNAPSHOT_EXTRA_DATA, "a snapshot's extra data has at most 1,024 bytes");
        out.extend_from_slice(&self.l1_table_offset.get().to_be_bytes());
        out.extend_from_slice(&self.l1_size.to_be_bytes());
        out.extend_from_slice(&id_len.to_be_bytes());
        out.extend_from_slice(&name_len.to_be_bytes());
        out.extend_from_slice(&self.date_sec.to_be_bytes());
        out.extend_from_slice(&self.date_nsec.to_be_bytes());
        out.extend_from_slice(&self.vm_clock_nsec.to_be_bytes());
        out.extend_from_slice(&self.vm_state_size.to_be_bytes());
        out.extend_from_slice(&extra_len.to_be_bytes());
        for part in [&self.extra_data, &self.id, &self.name] {
            out.extend_from_slice(part);
        }
        out.resize(start.saturating_add(self.encoded_len()), 0);
    }
}

/// The part that every entry has: [`SNAPSHOT_HEADER_SIZE`] as a length.
const HEADER_LEN: usize = 40;
const _: () = assert!(SNAPSHOT_HEADER_SIZE == 40);

/// Decodes `count` entries from the bytes that start at the table's offset; tells how many bytes they fill.
///
/// `bytes` may hold more than the table, of which at most `limits.max_snapshot_table_bytes` are accepted. The padding
/// behind the last entry need not be there: QEMU does not write it. Padding is not looked at; encoding makes it zero.
///
/// # Errors
/// [`FormatError::Corrupt`] where an entry runs past `bytes`, [`FormatError::Limit`] for too many entries, too large a
/// table, or too much extra data.
pub fn decode_snapshots(
    bytes: &[u8],
    count: u32,
    table: HostOffset,
    limits: &Limits,
) -> Result<(Vec<SnapshotEntry>, usize), FormatError> {
    let structure = "snapshot table";
    if count > limits.max_snapshots {
        let (found, limit) = (u64::from(count), u64::from(limits.max_snapshots));
        return Err(FormatError::Limit { structure, field: "nb_snapshots", found, limit });
    }
    let cut_off = |at: u64| FormatError::corrupt(structure, at, "entry", "cut off", format!("{count} whole entries"));
    let whole = usize::try_from(count).ok().and_then(|count| count.checked_mul(HEADER_LEN));
    if whole.is_none_or(|least| least > bytes.len()) {
        return Err(cut_off(table.get()));
    }
    let mut entries = Vec::new();
    let mut filled = 0_usize;
    for _ in 0..count {
        let at = table.saturating_add(u64::try_from(filled).unwrap_or(u64::MAX)).get();
        let rest = bytes.get(filled..).unwrap_or_default();
        let (entry, len) = SnapshotEntry::decode(rest, at)?.ok_or_else(|| cut_off(at))?;
        filled = filled.saturating_add(len.next_multiple_of(8)).min(bytes.len());
        let size = u64::try_from(filled).unwrap_or(u64::MAX);
        if size > limits.max_snapshot_table_bytes {
            let limit = limits.max_snapshot_table_bytes;
            return Err(FormatError::Limit { structure, field: "size", found: size, limit });
        }
        entries.push(entry);
    }
    Ok((entries, filled))
}

/// Encodes the table, entries padded to 8 bytes.
///
/// # Panics
/// Where an ID or name has more than 65,535 bytes, or extra data more than [`MAX_SNAPSHOT_EXTRA_DATA`]: what was decoded
/// has not, and what is new is checked by whoever takes it from a user.
#[must_use]
pub fn encode_snapshots(entries: &[SnapshotEntry]) -> Vec<u8> {
    let mut out = Vec::new();
    for entry in entries {
        entry.encode(&mut out);
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{ClusterBits, RefcountOrder};
    use super::*;

    const TABLE: HostOffset = HostOffset::new(0x5_0000);

    fn entry(id: &[u8], name: &[u8], extra_data: &[u8]) -> SnapshotEntry {
        SnapshotEntry {
            l1_table_offset: HostOffset::new(0x4_0000),
            l1_size: 3,
            id: id.to_vec(),
            name: name.to_vec(),
            date_sec: 1_700_000_000,
            date_nsec: 5,
            vm_clock_nsec: 7,
            vm_state_size: 11,
            extra_data: extra_data.to_vec(),
        }
    }

    fn decode(bytes: &[u8], count: u32) -> Result<(Vec<SnapshotEntry>, usize), FormatError> {
        decode_snapshots(bytes, count, TABLE, &Limits::default())
    }

    #[test]
    fn an_entry_lies_as_the_specification_says() {
        let mut expected = Vec::new();
        expected.extend_from_slice(&[0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 3, 0, 1, 0, 2]);
        expected.extend_from_slice(&1_700_000_000_u32.to_be_bytes());
        expected.extend_from_slice(&[0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 11, 0, 0, 0, 2]);
        expected.extend_from_slice(b"xy1ab\0\0\0");
        let entry = entry(b"1", b"ab", b"xy");
        assert_eq!(encode_snapshots(core::slice::from_ref(&entry)), expected);
        assert_eq!(entry.encoded_len(), expected.len());
        assert_eq!(decode(&expected, 1), Ok((vec![entry], 48)));
    }

    #[test]
    fn extra_data_tells_as_much_as_there_is() {
        let words = |words: &[u64]| words.iter().flat_map(|word| word.to_be_bytes()).collect::<Vec<_>>();
        let told = |extra: &[u8]| {
            let entry = entry(b"1", b"", extra);
            (entry.vm_state(), entry.disk_size(), entry.icount(), entry.is_complete())
        };
        assert_eq!(told(&[]), (11, None, None, false));
        assert_eq!(told(&[1; 7]), (11, None, None, false));
        assert_eq!(told(&words(&[1 << 40])), (1 << 40, None, None, false));
        assert_eq!(told(&words(&[0, 4096])), (0, Some(4096), None, true));
        assert_eq!(told(&words(&[0, 4096, 9, 99])), (0, Some(4096), Some(9), true));
        assert_eq!(told(&words(&[0, 4096, u64::MAX])), (0, Some(4096), None, true));
    }

    #[test]
    fn the_last_entry_needs_no_padding() {
        let entries = vec![entry(b"1", b"a", b""), entry(b"2", b"b", b"")];
        let bytes = encode_snapshots(&entries);
        assert_eq!(decode(&bytes, 2), Ok((entries.clone(), 96)));
        assert_eq!(decode(&bytes[..90], 2), Ok((entries, 90)));
        assert!(matches!(decode(&bytes[..89], 2), Err(FormatError::Corrupt { offset: 0x5_0030, .. })));
    }

    #[test]
    fn claims_are_compared_before_they_are_believed() {
        assert_eq!(decode(&[], 0), Ok((Vec::new(), 0)));
        assert!(matches!(decode(&[0; 40], 2), Err(FormatError::Corrupt { offset: 0x5_0000, .. })));
        assert!(matches!(decode(&[0; 40], 65_537), Err(FormatError::Limit { found: 65_537, .. })));
        let mut bytes = [0; 2048];
        bytes[36..40].copy_from_slice(&1025_u32.to_be_bytes());
        assert!(matches!(decode(&bytes, 1), Err(FormatError::Limit { found: 1025, limit: 1024, .. })));
        let limits = Limits::default().with_max_snapshot_table_bytes(79);
        let entries = encode_snapshots(&[entry(b"", b"", b""), entry(b"", b"", b"")]);
        let refused = decode_snapshots(&entries, 2, TABLE, &limits);
        assert!(matches!(refused, Err(FormatError::Limit { found: 80, limit: 79, .. })));
    }

    #[test]
    fn an_l1_table_is_validated_when_it_is_used() {
        let geometry = Geometry::new(ClusterBits::default(), RefcountOrder::default(), false).expect("valid geometry");
        let validate = |offset, l1_size| {
            let entry = SnapshotEntry { l1_table_offset: HostOffset::new(offset), l1_size, ..entry(b"1", b"a", b"") };
            entry.validate_l1(geometry, &Limits::default())
        };
        assert_eq!(validate(0x4_0000, 4 << 20), Ok(()));
        assert!(matches!(validate(0x4_0000, (4 << 20) + 1), Err(FormatError::Limit { .. })));
        assert!(matches!(validate(0x4_0200, 1), Err(FormatError::Corrupt { .. })));
        assert!(matches!(validate(i64::MAX.unsigned_abs() & !0xffff, 8192), Err(FormatError::Corrupt { .. })));
        assert!(matches!(validate(!0xffff, u32::MAX >> 10), Err(FormatError::Corrupt { .. })));
    }

    fn entries() -> impl Strategy<Value = Vec<SnapshotEntry>> {
        let bytes = |max| prop::collection::vec(any::<u8>(), 0..max);
        let numbers = any::<(u64, u32, u32, u32, u64, u32)>();
        let entry = (numbers, bytes(20), bytes(300), bytes(60)).prop_map(|(numbers, id, name, extra_data)| {
            let mut entry = entry(&id, &name, &extra_data);
            entry.l1_table_offset = HostOffset::new(numbers.0);
            (_, entry.l1_size, entry.date_sec, entry.date_nsec, entry.vm_clock_nsec, entry.vm_state_size) = numbers;
            entry
        });
        prop::collection::vec(entry, 0..8)
    }

    /// A table; a short one for Miri, which takes its time for each byte.
    const LONG: usize = if cfg!(miri) { 60 } else { 400 };

    proptest! {
        #[test]
        fn tables_go_there_and_back(entries in entries(), behind in prop::collection::vec(any::<u8>(), 0..100)) {
            let encoded = encode_snapshots(&entries);
            let count = u32::try_from(entries.len()).expect("few");
            let bytes = [encoded.clone(), behind].concat();
            let (decoded, filled) = decode(&bytes, count).expect("our own table");
            prop_assert_eq!(&decoded, &entries);
            prop_assert_eq!(filled, encoded.len());
            prop_assert_eq!(encode_snapshots(&decoded), encoded);
        }

        #[test]
        fn a_cut_table_is_an_error(entries in entries(), cut in any::<prop::sample::Index>()) {
            let encoded = encode_snapshots(&entries);
            let unpadded = entries.last().map_or(0, |last| {
                encoded.len() - last.encoded_len() + 40 + last.extra_data.len() + last.id.len() + last.name.len()
            });
            prop_assume!(unpadded > 0);
            let count = u32::try_from(entries.len()).expect("few");
            prop_assert!(decode(&encoded[..cut.index(unpadded)], count).is_err());
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(prop_oneof![Just(0), Just(1), any::<u8>()], 0..LONG), count: u32) {
            for count in [count, count % 12] {
                if let Ok((entries, filled)) = decode(&bytes, count) {
                    prop_assert!(filled <= bytes.len());
                    for entry in &entries {
                        let _ = (entry.vm_state(), entry.disk_size(), entry.icount());
                    }
                    prop_assert!(encode_snapshots(&entries).len() >= filled);
                }
            }
        }
    }
}
