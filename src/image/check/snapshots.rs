//! The table of internal snapshots: read record by record, since a check must bear with what a decoder refuses.

use byteorder::{BigEndian, ByteOrder};

use crate::format::Version;
use crate::image::Result;

use super::counts::index;
use super::subject::Subject;
use super::{CheckReport, Fix};

/// The fixed part of a record.
const RECORD: u64 = 40;
/// 64-bit VM state size and virtual disk size: what version 3 demands of the extra data.
const EXTRA_REQUIRED: u32 = 16;
/// What a rewritten record has at least: these two and the instruction count.
const EXTRA_WRITTEN: usize = 24;
/// The most extra data that QEMU reads.
const MAX_EXTRA: u32 = 1024;
/// The largest table that QEMU reads.
const MAX_TABLE: u64 = 64 << 20;

/// What a check needs of one snapshot.
#[derive(Clone, Copy, Debug)]
pub(super) struct Record {
    /// Where the record lies in the file.
    pub(super) at: u64,
    pub(super) l1_offset: u64,
    pub(super) l1_size: u32,
    id_len: u16,
    name_len: u16,
    extra_len: u32,
}

/// The snapshot table.
#[derive(Debug, Default)]
pub(super) struct SnapshotTable {
    pub(super) records: Vec<Record>,
    /// Its length in bytes.
    pub(super) len: u64,
    /// What a rewrite of the table would repair.
    pub(super) defects: u64,
}

/// Reads the table, `None` where it is too broken to go on without it.
pub(super) fn read(subject: &Subject<'_>, fix: Fix, report: &mut CheckReport) -> Result<Option<SnapshotTable>> {
    let header = &subject.head.header;
    let (start, count) = (header.snapshots_offset.get(), header.nb_snapshots);
    let mut table = SnapshotTable::default();
    let fits = start.checked_add(u64::from(count) * RECORD).is_some_and(|end| i64::try_from(end).is_ok());
    if subject.unaligned(start) || !fits || count > subject.limits.max_snapshots {
        report.unchecked(1, "snapshot table", start, || {
            format!("snapshot table of {count} entries at {start:#x}: unaligned, or larger than the limits")
        });
        return Ok(None);
    }
    let mut window = Window::default();
    let mut at = start;
    for number in 0..count {
        at = at.next_multiple_of(8);
        let record = window.record(subject, at)?;
        if record.extra_len > MAX_EXTRA {
            let text = || {
                format!(
                    "snapshot table entry {number} has {} bytes of extra data, at most {MAX_EXTRA}",
                    record.extra_len
                )
            };
            if fix != Fix::All {
                report.unchecked(1, "snapshot table", at, text);
                return Ok(None);
            }
            table.defects += 1;
            report.corrupt(1, "snapshot table", at, text);
        }
        at += RECORD + u64::from(record.extra_len) + u64::from(record.id_len) + u64::from(record.name_len);
        if at - start > MAX_TABLE {
            report.unchecked(1, "snapshot table", start, || format!("snapshot table is larger than {MAX_TABLE} bytes"));
            return Ok(None);
        }
        if header.version == Version::V3 && record.extra_len < EXTRA_REQUIRED {
            table.defects += 1;
            report.corrupt(1, "snapshot table", record.at, || format!("snapshot table entry {number} is incomplete"));
        }
        table.records.push(record);
    }
    table.len = at - start;
    Ok(Some(table))
}

/// The table as it should be written: with full extra data, no more of it than is allowed, all else as it was.
pub(super) fn rewritten(subject: &Subject<'_>, table: &SnapshotTable) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    for record in &table.records {
        out.resize(out.len().next_multiple_of(8), 0);
        let kept = record.extra_len.min(MAX_EXTRA);
        let mut fixed = [0; 40];
        subject.storage.read_at(&mut fixed, record.at)?;
        let mut extra = vec![0; index(u64::from(kept))];
        subject.storage.read_at(&mut extra, record.at + RECORD)?;
        let mut names = vec![0; usize::from(record.id_len) + usize::from(record.name_len)];
        subject.storage.read_at(&mut names, record.at + RECORD + u64::from(record.extra_len))?;

        // What is missing has a meaning: the 32-bit VM state size, the present disk size, no instruction count.
        let vm_state = u64::from(BigEndian::read_u32(&fixed[32..]));
        for (field, value) in [vm_state, subject.head.header.size, u64::MAX].into_iter().enumerate() {
            if extra.len() < (field + 1) * 8 {
                extra.truncate(field * 8);
                extra.extend_from_slice(&value.to_be_bytes());
            }
        }
        assert!(extra.len() >= EXTRA_WRITTEN, "a rewritten record is complete");
        BigEndian::write_u32(&mut fixed[36..], u32::try_from(extra.len()).unwrap_or(MAX_EXTRA));
        out.extend_from_slice(&fixed);
        out.extend_from_slice(&extra);
        out.extend_from_slice(&names);
    }
    Ok(out)
}

/// A stretch of the file, so that small records do not cost a read each.
#[derive(Default)]
struct Window {
    start: u64,
    bytes: Vec<u8>,
}

impl Window {
    /// The fixed part of the record at an offset.
    fn record(&mut self, subject: &Subject<'_>, at: u64) -> Result<Record> {
        let inside = at >= self.start && at + RECORD <= self.start + self.bytes.len() as u64;
        if !inside {
            self.bytes.resize(64 << 10, 0);
            subject.storage.read_at(&mut self.bytes, at)?;
            self.start = at;
        }
        let fixed = &self.bytes[index(at - self.start)..];
        Ok(Record {
            at,
            l1_offset: BigEndian::read_u64(fixed),
            l1_size: BigEndian::read_u32(&fixed[8..]),
            id_len: BigEndian::read_u16(&fixed[12..]),
            name_len: BigEndian::read_u16(&fixed[14..]),
            extra_len: BigEndian::read_u32(&fixed[36..]),
        })
    }
}
