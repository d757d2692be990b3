//! Small files that ask for endless work.

use std::sync::Arc;

use qcow2_chain::format::{
    BitmapDirectoryEntry, ClusterBits, GuestOffset, Limits, SnapshotEntry, encode_bitmap_directory, encode_snapshots,
};
use qcow2_chain::image::{Fix, Image, OpenOptions};
use qcow2_chain::storage::MemoryStorage;

use super::treat::{Outcome, TIME, checked, file, open, said, text, treat};
use crate::support::memory::{peak, worked};

/// A file built cluster by cluster.
struct Builder {
    bytes: Vec<u8>,
    cluster: usize,
}

impl Builder {
    /// A header of version 3 and one refcount block, all of whose entries are 1.
    fn new(bits: u32, size: u64) -> Self {
        let cluster = 1 << bits;
        let mut this = Self { bytes: vec![0; 3 * cluster], cluster };
        this.put(0, b"QFI\xfb");
        this.put32(4, 3);
        this.put32(20, bits);
        this.put64(24, size);
        this.put64(48, cluster as u64);
        this.put32(56, 1);
        this.put32(96, 4);
        this.put32(100, 104);
        this.put64(cluster, 2 * cluster as u64);
        this.bytes[2 * cluster..].chunks_exact_mut(2).for_each(|count| count.copy_from_slice(&[0, 1]));
        this
    }

    fn put(&mut self, at: usize, value: &[u8]) {
        self.bytes[at..at + value.len()].copy_from_slice(value);
    }

    fn put32(&mut self, at: usize, value: u32) {
        self.put(at, &value.to_be_bytes());
    }

    fn put64(&mut self, at: usize, value: u64) {
        self.put(at, &value.to_be_bytes());
    }

    /// Appends whole clusters and tells where they start.
    fn append(&mut self, structure: &[u8]) -> u64 {
        let at = self.bytes.len();
        self.bytes.extend_from_slice(structure);
        self.bytes.resize(self.bytes.len().next_multiple_of(self.cluster), 0);
        at as u64
    }

    /// Appends a table that the function fills.
    fn table(&mut self, entries: usize, entry: impl Fn(u64) -> u64) -> u64 {
        let mut bytes = vec![0; 8 * entries];
        for (index, raw) in (0_u64..).zip(bytes.chunks_exact_mut(8)) {
            raw.copy_from_slice(&entry(index).to_be_bytes());
        }
        self.append(&bytes)
    }

    fn l1(&mut self, entries: usize, entry: impl Fn(u64) -> u64) {
        let at = self.table(entries, entry);
        self.put64(40, at);
        self.put32(36, u32::try_from(entries).unwrap());
    }
}

/// Fails where some work takes too long or holds more than `memory` bytes.
#[track_caller]
fn bounded<T>(what: &str, memory: usize, work: impl FnOnce() -> T) -> T {
    let start = worked();
    let (done, most) = peak(work);
    let took = worked() - start;
    assert!(took < TIME, "{what} takes {took:?}");
    assert!(most < memory, "{what} holds {most} bytes");
    done
}

#[track_caller]
fn refused(outcome: &Outcome, why: &str) {
    assert!(outcome.as_ref().is_err_and(|error| error.contains(why)), "{outcome:?}");
}

/// 262,144 L1 entries that all name one L2 table: 2 * 10^9 entries to a guest, in a file of 2 MiB. With larger clusters
/// it could be 10^12 in 38 MiB.
#[test]
fn one_l2_table_for_the_whole_disk() {
    let entries = 1 << 18;
    let mut bomb = Builder::new(16, (entries as u64) << 29);
    let data = bomb.append(&[7; 512]);
    let l2 = bomb.table(1 << 13, |index| if index == 0 { data } else { 0 });
    bomb.l1(entries, |_| l2);
    let outcomes = treat("one L2 table", &bomb.bytes, 64 << 20);
    refused(said(&outcomes, "look"), "as many as the file has clusters");
    assert_eq!(said(&outcomes, "read"), &Ok(()));
    assert_eq!(said(&outcomes, "check"), &Ok(()));
    refused(said(&outcomes, "resize"), "a table of its own each");
    refused(said(&outcomes, "commit from"), "as many as the file has clusters");
    // These meet no second entry: one cluster is written, 8 MiB of the disk are read.
    for name in ["commit into", "pull and rebase"] {
        assert_eq!(said(&outcomes, name), &Ok(()), "{name}");
    }
    let report = checked(&file(&bomb.bytes), Fix::Nothing).expect("checked");
    assert!(report.corruptions > 0);
}

/// The same with tables past the end of the file, all of them different.
#[test]
fn l2_tables_that_are_not_there() {
    let entries = 1 << 18;
    let mut bomb = Builder::new(16, (entries as u64) << 29);
    bomb.l1(entries, |index| (index + 1000) << 16);
    let outcomes = treat("no L2 tables", &bomb.bytes, 32 << 20);
    refused(said(&outcomes, "look"), "as many as the file has clusters");
    assert_eq!(said(&outcomes, "check"), &Ok(()));
}

/// A disk that really has many tables is walked to its end, also where they are not in the file yet.
#[test]
fn many_tables_are_no_bomb() {
    let storage = Arc::new(MemoryStorage::new("honest"));
    let bits = ClusterBits::new(9).expect("512 bytes");
    let options = qcow2_chain::image::CreateOptions::new(64 << 20).with_cluster_bits(bits);
    let image = Image::create(storage, &options).expect("created");
    image.write_zeroes_at(GuestOffset::ZERO, 64 << 20).expect("zeroed");
    let extents: Vec<_> = image.extents(0..u64::MAX).collect::<Result<_, _>>().expect("walked before the flush");
    assert_eq!(extents.len(), 1);
    image.flush().expect("flushed");
    assert_eq!(image.extents(0..u64::MAX).map_while(Result::ok).collect::<Vec<_>>(), extents);
}

/// One compressed cluster that a million entries share, in a file of 8 MiB.
#[test]
fn one_compressed_cluster_for_a_million() {
    let bomb = shared_stream(128, 1 << 36);
    let report = bounded("check", 64 << 20, || checked(&file(&bomb), Fix::Nothing)).expect("checked");
    assert_eq!(report.compressed_clusters, 1 << 20);
    // A refcount of 16 bits cannot count them.
    assert!(report.corruptions > 0);
    let outcomes = treat("one compressed cluster", &shared_stream(1, 4 << 20), 32 << 20);
    assert_eq!(said(&outcomes, "look"), &Ok(()));
    assert_eq!(said(&outcomes, "read"), &Ok(()));
}

/// An image of this size with so many L2 tables, all entries of which name the same compressed zeroes.
fn shared_stream(tables: u64, size: u64) -> Vec<u8> {
    let bits = 16;
    let mut bomb = Builder::new(bits, size);
    // Stored deflate blocks would be longer; zeroes pack to next to nothing.
    let stream = deflated_zeroes(1 << bits);
    let data = bomb.append(&stream);
    let descriptor = 1 << 62 | data | ((stream.len() as u64 - 1) / 512) << 54;
    let l2: Vec<u64> = (0..tables).map(|_| bomb.table(1 << 13, |_| descriptor)).collect();
    bomb.l1(usize::try_from(tables).unwrap(), |index| l2[usize::try_from(index).unwrap()]);
    bomb.bytes
}

/// Deflate that unpacks to so many zeroes: one literal, and then matches of 258 at distance 1, in the fixed code.
fn deflated_zeroes(len: usize) -> Vec<u8> {
    let mut bits: Vec<bool> = vec![true, true, false];
    let literal = |bits: &mut Vec<bool>| bits.extend([false, false, true, true, false, false, false, false]);
    literal(&mut bits);
    let mut left = len - 1;
    while left >= 258 {
        // Length code 285 is 1100 0101; distance code 0 is five zeroes.
        bits.extend([true, true, false, false, false, true, false, true]);
        bits.extend([false; 5]);
        left -= 258;
    }
    (0..left).for_each(|_| literal(&mut bits));
    bits.extend([false; 7]);
    bits.chunks(8).map(|byte| byte.iter().rev().fold(0, |value, bit| value << 1 | u8::from(*bit))).collect()
}

/// A stream that goes on for ever gives one cluster, and no more memory than that.
#[test]
fn a_stream_that_never_ends() {
    let bits = 16;
    let mut bomb = Builder::new(bits, 1 << 20);
    let stream = deflated_zeroes(1 << 26);
    assert!(stream.len() > 100_000);
    let data = bomb.append(&stream);
    // As many sectors as a descriptor can name.
    let descriptor = 1 << 62 | data | 0xff << 54;
    let l2 = bomb.table(1 << 13, |index| if index == 0 { descriptor } else { 0 });
    bomb.l1(1, |_| l2);
    let image = open(&file(&bomb.bytes), false).expect("opened");
    let mut buf = vec![1; 1 << bits];
    let read = bounded("read", 1 << 20, || image.read_at(&mut buf, GuestOffset::ZERO).map_err(text));
    assert!(read.is_err() || buf.iter().all(|byte| *byte == 0));
}

fn snapshots_at(bomb: &mut Builder, count: u32, offset: u64) {
    bomb.put32(60, count);
    bomb.put64(64, offset);
}

/// What `qemu-img info` took 359 MB for: 65,536 snapshots, the table of which is said to lie in the header.
#[test]
fn snapshots_at_offset_0() {
    let mut bomb = Builder::new(16, 1 << 30);
    bomb.l1(2, |_| 0);
    for count in [1, 65_536, u32::MAX] {
        snapshots_at(&mut bomb, count, 0);
        let outcomes = treat("snapshots at offset 0", &bomb.bytes, 16 << 20);
        assert!(said(&outcomes, "look").is_err() && said(&outcomes, "write").is_err(), "{outcomes:?}");
    }
}

/// 65,536 snapshots that share one L1 table of 131,072 entries, all of which name one L2 table.
#[test]
fn snapshots_that_share_everything() {
    let mut bomb = Builder::new(16, 1 << 30);
    let l2 = bomb.table(1 << 13, |_| 0);
    let l1 = bomb.table(1 << 17, |_| l2);
    bomb.l1(2, |_| 0);
    let entry = SnapshotEntry {
        l1_table_offset: qcow2_chain::format::HostOffset::new(l1),
        l1_size: 1 << 17,
        id: Vec::new(),
        name: Vec::new(),
        date_sec: 0,
        date_nsec: 0,
        vm_clock_nsec: 0,
        vm_state_size: 0,
        extra_data: vec![0; 16],
    };
    let table = bomb.append(&encode_snapshots(&vec![entry; 65_536]));
    snapshots_at(&mut bomb, 65_536, table);
    let outcomes = treat("shared snapshots", &bomb.bytes, 64 << 20);
    assert_eq!(said(&outcomes, "look"), &Ok(()));
    let report = checked(&file(&bomb.bytes), Fix::Nothing).expect("checked");
    assert!(report.corruptions > 1 << 20, "each entry of each table names it: {}", report.corruptions);
    let listed = open(&file(&bomb.bytes), false).expect("opened").snapshots().expect("listed");
    assert_eq!(listed.len(), 65_536);
}

/// 65,535 bitmaps that share one table of a million entries.
#[test]
fn bitmaps_that_share_everything() {
    let mut bomb = Builder::new(16, 1 << 40);
    let data = bomb.append(&[0xff; 512]);
    let table = bomb.table(1 << 20, |_| data);
    let l1_size = 1 << 11;
    bomb.l1(l1_size, |_| 0);
    let entries: Vec<_> = (0..65_535)
        .map(|number: u32| BitmapDirectoryEntry {
            bitmap_table_offset: qcow2_chain::format::HostOffset::new(table),
            bitmap_table_size: 1 << 20,
            flags: 0,
            kind: 1,
            granularity_bits: 9,
            name: number.to_string().into_bytes(),
            extra_data: Vec::new(),
        })
        .collect();
    let directory = encode_bitmap_directory(&entries);
    let at = bomb.append(&directory);
    bomb.put64(88, 1);
    bomb.put32(104, 0x2385_2875);
    bomb.put32(108, 24);
    bomb.put32(112, 65_535);
    bomb.put64(120, directory.len() as u64);
    bomb.put64(128, at);
    let outcomes = treat("shared bitmaps", &bomb.bytes, 64 << 20);
    assert_eq!(said(&outcomes, "look"), &Ok(()), "{outcomes:?}");
    assert_eq!(open(&file(&bomb.bytes), false).expect("opened").bitmaps().expect("listed").len(), 65_535);
}

/// A refcount table of a million entries that all name one full block: an allocator would look for room in it all day.
#[test]
fn one_refcount_block_for_everything() {
    let bits = 21;
    let mut bomb = Builder::new(bits, 1 << 30);
    let block = bomb.append(&vec![1; 1 << bits]);
    let table = bomb.table(1 << 20, |_| block);
    bomb.put64(48, table);
    bomb.put32(56, 4);
    bomb.l1(1, |_| 0);
    let outcomes = treat("one refcount block", &bomb.bytes, 64 << 20);
    for name in ["write", "resize", "commit into"] {
        refused(said(&outcomes, name), "a block of its own each");
    }
    assert_eq!(said(&outcomes, "read"), &Ok(()));
    let report = checked(&file(&bomb.bytes), Fix::Nothing).expect("checked");
    assert!(report.corruptions > 0);
}

/// The same with blocks past the end of the file.
#[test]
fn refcount_blocks_that_are_not_there() {
    let mut bomb = Builder::new(16, 1 << 30);
    let table = bomb.table(1 << 20, |index| (index + 1000) << 16);
    bomb.put64(48, table);
    bomb.put32(56, 128);
    bomb.l1(2, |_| 0);
    let outcomes = treat("no refcount blocks", &bomb.bytes, 96 << 20);
    assert_eq!(said(&outcomes, "read"), &Ok(()));
    let report = checked(&file(&bomb.bytes), Fix::Nothing).expect("checked");
    assert!(report.corruptions > 0);
}

/// Two entries of the refcount table that name one block: what is allocated by one looks used by the other.
#[test]
fn a_shared_refcount_block_is_not_written() {
    let mut bomb = Builder::new(9, 1 << 20);
    bomb.l1(32, |_| 0);
    bomb.put64(512 + 8, 1024);
    let outcomes = treat("a shared block", &bomb.bytes, 8 << 20);
    refused(said(&outcomes, "write"), "a block of its own each");
}

/// What the limits of a caller allow, and not more, is asked for.
#[test]
fn limits_are_kept() {
    let mut bomb = Builder::new(16, 1 << 40);
    bomb.l1(1 << 11, |_| 0);
    let open = |limits: Limits| {
        Image::open(file(&bomb.bytes), &OpenOptions::default().with_limits(limits)).map(drop).map_err(text)
    };
    assert_eq!(open(Limits::default().with_max_l1_bytes(1 << 14)), Ok(()));
    refused(&open(Limits::default().with_max_l1_bytes((1 << 14) - 1)), "limit");
    assert_eq!(open(Limits::default().with_max_virtual_size(1 << 40)), Ok(()));
    refused(&open(Limits::default().with_max_virtual_size((1 << 40) - 1)), "limit");
}
