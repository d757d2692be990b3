//! The codecs of tables, read on images that QEMU made: what they say is compared with what QEMU says, and every table
//! encodes back to the bytes in the file. Nothing but the codecs is used; the few header fields are taken by offset.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use qcow2_chain::format::{
    BitmapDirectoryEntry, BitmapTableEntry, BitmapsExtension, ClusterBits, Geometry, HostCluster, HostOffset, L2Entry,
    L2Table, Limits, RefcountBlock, RefcountOrder, Version, bitmap_name_faults, decode_bitmap_directory, decode_l1,
    decode_reftable, decode_snapshots, encode_bitmap_directory, encode_l1, encode_reftable, encode_snapshots,
};

use crate::support::qemu::Qemu;

/// A whole image file in memory.
struct File {
    path: PathBuf,
    bytes: Vec<u8>,
    geometry: Geometry,
    version: Version,
}

impl File {
    fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).expect("the image is read");
        let version = if be32(&bytes, 4) == 2 { Version::V2 } else { Version::V3 };
        let order = if version == Version::V2 { 4 } else { be32(&bytes, 96) };
        let extended_l2 = version == Version::V3 && be64(&bytes, 72) & 16 != 0;
        let bits = ClusterBits::new(be32(&bytes, 20)).expect("valid cluster bits");
        let order = RefcountOrder::new(order).expect("valid order");
        let geometry = Geometry::new(bits, order, extended_l2).expect("valid geometry");
        Self { path: path.to_owned(), bytes, geometry, version }
    }

    /// Bytes of the file; what lies past its end is zero.
    fn slice(&self, at: HostOffset, len: u64) -> Vec<u8> {
        let at = usize::try_from(at.get()).expect("fits");
        let end = at.saturating_add(usize::try_from(len).expect("fits"));
        let mut bytes = self.bytes.get(at..end.min(self.bytes.len())).unwrap_or_default().to_vec();
        bytes.resize(end - at, 0);
        bytes
    }

    fn cluster(&self, at: HostOffset) -> Box<[u8]> {
        self.slice(at, self.geometry.cluster_size()).into_boxed_slice()
    }

    /// Every refcount that is not 0, by cluster.
    fn refcounts(&self) -> BTreeMap<u64, u64> {
        let reftable = HostOffset::new(be64(&self.bytes, 48));
        let bytes = self.slice(reftable, u64::from(be32(&self.bytes, 56)) * self.geometry.cluster_size());
        let table = decode_reftable(&bytes);
        assert_eq!(encode_reftable(&table), bytes);
        let mut counts = BTreeMap::new();
        for (index, entry) in (0_u64..).zip(table) {
            assert_eq!(entry.reserved(), 0);
            let Some(at) = entry.checked_block(self.geometry, reftable).expect("aligned") else { continue };
            let block = RefcountBlock::decode(self.cluster(at), self.geometry).expect("one cluster");
            let first = index * self.geometry.refcount_block_entries();
            for (index, count) in block.iter_used() {
                let cluster = first + index as u64;
                assert_eq!(self.geometry.refcount_block_index(HostCluster::new(cluster)), index);
                counts.insert(cluster, count);
            }
        }
        counts
    }

    /// All entries of the active mapping that are not empty, by guest cluster. Every table must encode to its bytes.
    fn mappings(&self) -> BTreeMap<u64, L2Entry> {
        let l1_offset = HostOffset::new(be64(&self.bytes, 40));
        let bytes = self.slice(l1_offset, u64::from(be32(&self.bytes, 36)) * 8);
        let l1 = decode_l1(&bytes);
        assert_eq!(encode_l1(&l1), bytes);
        let mut mappings = BTreeMap::new();
        for (number, entry) in (0_u64..).zip(l1) {
            assert_eq!(entry.reserved(), 0);
            let Some(at) = entry.checked_l2_table(self.geometry, l1_offset).expect("aligned") else { continue };
            let table = L2Table::decode(self.cluster(at), self.geometry, self.version).expect("one cluster");
            let mut copy = L2Table::empty(self.geometry, self.version);
            for index in 0..table.len() {
                let entry = table.get(index, at).expect("a valid entry");
                copy.set(index, &entry);
                if entry != L2Entry::UNALLOCATED {
                    mappings.insert(number * self.geometry.l2_entries() + index as u64, entry);
                }
            }
            assert!(copy.as_bytes() == table.as_bytes(), "{}: the L2 table at {at} changed", self.path.display());
        }
        mappings
    }

    /// The data of the header extension of this type.
    fn extension(&self, kind: u32) -> Vec<u8> {
        let mut at = be32(&self.bytes, 100) as usize;
        loop {
            let (found, len) = (be32(&self.bytes, at), be32(&self.bytes, at + 4) as usize);
            assert_ne!(found, 0, "no extension {kind:#x}");
            if found == kind {
                return self.bytes[at + 8..at + 8 + len].to_vec();
            }
            at += 8 + len.next_multiple_of(8);
        }
    }
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn create(qemu: Qemu, path: &Path, options: &str, size: &str) {
    let path = path.to_str().expect("a plain path");
    qemu.img(&["create", "-q", "-f", "qcow2", "-o", options, path, size]);
}

#[test]
fn refcounts_of_every_width_count_every_cluster() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = tempfile::tempdir().expect("a directory");
    for bits in [1, 2, 4, 8, 16, 32, 64] {
        for cluster_size in [512, 4096, 65536] {
            let path = dir.path().join(format!("{bits}-{cluster_size}.qcow2"));
            create(qemu, &path, &format!("refcount_bits={bits},cluster_size={cluster_size}"), "16M");
            qemu.io(&path, &["write -P 1 0 300k", "write -P 2 9M 70k", "write -z 1M 1M"]);
            let file = File::read(&path);
            let counts = file.refcounts();
            // Nothing was ever freed: all clusters up to the end are in use, each once.
            let end = qemu.check(&path, None).image_end_offset / cluster_size;
            let expected: BTreeMap<u64, u64> = (0..end).map(|cluster| (cluster, 1)).collect();
            assert_eq!(counts, expected, "refcount_bits={bits}, cluster_size={cluster_size}");
            let zero = file.geometry.guest_cluster(qcow2_chain::format::GuestOffset::new(1 << 20)).get();
            assert_eq!(file.mappings().get(&zero), Some(&L2Entry::zero(file.geometry)));
        }
    }
}

#[test]
fn shared_clusters_are_counted_twice_and_not_marked_copied() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = tempfile::tempdir().expect("a directory");
    for (options, version) in [("compat=0.10", 2), ("compat=1.1", 3), ("compat=1.1,refcount_bits=4", 3)] {
        let path = dir.path().join("snapshots.qcow2");
        create(qemu, &path, options, "64M");
        qemu.io(&path, &["write -P 1 0 128k"]);
        let names = ["s1", "a name with spaces", "\u{fc}ml\u{e4}ut"];
        for name in &names[..2] {
            qemu.img(&["snapshot", "-c", name, path.to_str().expect("a plain path")]);
        }
        qemu.io(&path, &["write -P 2 0 64k"]);
        qemu.img(&["snapshot", "-c", names[2], path.to_str().expect("a plain path")]);
        let file = File::read(&path);

        let (count, table) = (be32(&file.bytes, 60), HostOffset::new(be64(&file.bytes, 64)));
        let bytes = file.slice(table, file.geometry.cluster_size());
        let (entries, filled) = decode_snapshots(&bytes, count, table, &Limits::default()).expect("a valid table");
        assert_eq!(encode_snapshots(&entries), bytes[..filled], "version {version}");
        assert!(bytes[filled..].iter().all(|&byte| byte == 0));
        let told = qemu.info(&path);
        for (index, (entry, told)) in entries.iter().zip(told["snapshots"].as_array().expect("snapshots")).enumerate() {
            assert_eq!(entry.name, names[index].as_bytes());
            assert_eq!(told["name"].as_str().map(str::as_bytes), Some(&entry.name[..]));
            assert_eq!(told["id"].as_str().map(str::as_bytes), Some(&entry.id[..]));
            assert_eq!(told["date-sec"].as_u64(), Some(entry.date_sec.into()));
            assert_eq!(told["date-nsec"].as_u64(), Some(entry.date_nsec.into()));
            assert_eq!((entry.vm_state(), entry.disk_size()), (0, Some(64 << 20)));
            assert_eq!(told["icount"].as_u64(), entry.icount());
            assert!(entry.is_complete());
            assert_eq!(entry.validate_l1(file.geometry, &Limits::default()), Ok(()));
        }

        // COPIED says what the refcounts say.
        let counts = file.refcounts();
        for (guest, entry) in file.mappings() {
            let L2Entry::Normal(cluster) = entry else { panic!("{entry:?}") };
            let host = file.geometry.host_cluster(cluster.host.expect("data")).get();
            assert_eq!(cluster.copied, counts[&host] == 1, "guest cluster {guest}");
            assert!(counts[&host] > 1, "guest cluster {guest} is shared");
        }
    }
}

#[test]
fn compressed_clusters_touch_the_host_clusters_that_qemu_counts() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = tempfile::tempdir().expect("a directory");
    let raw = dir.path().join("raw");
    // Half noise, half zeroes: it compresses to something like half, and streams straddle clusters.
    let mut noise = 0x9e37_79b9_7f4a_7c15_u64;
    let mut content = vec![0; 6 << 20];
    for chunk in content.chunks_mut(1000).step_by(2) {
        for byte in chunk {
            noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *byte = noise.to_le_bytes()[7];
        }
    }
    std::fs::write(&raw, content).expect("written");
    let cases = [
        "cluster_size=512",
        "cluster_size=4k",
        "cluster_size=64k",
        "cluster_size=2M",
        "extended_l2=on,cluster_size=16k",
        "compression_type=zstd",
    ];
    for options in cases {
        let path = dir.path().join("compressed.qcow2");
        let (from, to) = (raw.to_str().expect("a plain path"), path.to_str().expect("a plain path"));
        qemu.img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, from, to]);
        let file = File::read(&path);
        let mut touched: BTreeMap<u64, u64> = BTreeMap::new();
        let mut straddle = 0;
        for (guest, entry) in file.mappings() {
            match entry {
                L2Entry::Compressed(descriptor) => {
                    assert_eq!(descriptor.validate(HostOffset::ZERO), Ok(()));
                    let clusters: Vec<u64> = descriptor.host_clusters(file.geometry).map(HostCluster::get).collect();
                    straddle += usize::from(clusters.len() > 1);
                    for cluster in clusters {
                        *touched.entry(cluster).or_default() += 1;
                    }
                }
                L2Entry::Normal(cluster) => {
                    let host = cluster.host.unwrap_or_else(|| panic!("{options}: guest cluster {guest}: {cluster:?}"));
                    *touched.entry(file.geometry.host_cluster(host).get()).or_default() += 1;
                }
            }
        }
        let counts = file.refcounts();
        for (cluster, count) in &touched {
            assert_eq!(counts.get(cluster), Some(count), "{options}: host cluster {cluster}");
        }
        assert!(
            !touched.is_empty() && (straddle > 0 || options == "cluster_size=512"),
            "{options}: {straddle} straddle"
        );
    }
}

#[test]
fn subclusters_are_those_that_were_written() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("extended.qcow2");
    create(qemu, &path, "extended_l2=on,cluster_size=64k", "8M");
    // Subclusters of 2 KiB: 0 and 1 hold data, 4 is zero; the next cluster is zero; one is data; one has lost its data.
    let commands =
        ["write -P 1 0 4k", "write -z 8k 2k", "write -z 64k 64k", "write -P 2 128k 64k", "write -P 3 192k 2k"];
    qemu.io(&path, &commands);
    let file = File::read(&path);
    let mappings = file.mappings();
    let normal = |guest: u64| match mappings.get(&guest) {
        Some(L2Entry::Normal(cluster)) => *cluster,
        other => panic!("guest cluster {guest}: {other:?}"),
    };
    assert_eq!((normal(0).subclusters.allocated, normal(0).subclusters.zero), (0b11, 0b1_0000));
    assert_eq!(mappings[&1], L2Entry::zero(file.geometry));
    assert_eq!(mappings[&2], L2Entry::data(file.geometry, normal(2).host.expect("data")));
    assert_eq!((normal(3).subclusters.allocated, normal(3).subclusters.zero), (1, 0));
    assert_eq!(mappings.len(), 4);
}

#[test]
fn offset_0_with_copied_is_unallocated_to_qemu_too() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("copied.qcow2");
    create(qemu, &path, "cluster_size=64k", "1M");
    qemu.io(&path, &["write -P 1 0 64k"]);
    let mut file = File::read(&path);
    let l1 = decode_l1(&file.slice(HostOffset::new(be64(&file.bytes, 40)), 8));
    let at = usize::try_from(l1[0].l2_table().expect("a table").get()).expect("fits") + 8;
    file.bytes[at] = 0x80;
    std::fs::write(&path, &file.bytes).expect("written");
    let map = qemu.map(&path);
    assert!(map.iter().all(|entry| entry.start < 0x1_0000 || !entry.data), "{map:?}");
    qemu.io(&path, &["read -P 0 64k 64k"]);
    match file.mappings().get(&1) {
        Some(L2Entry::Normal(cluster)) => assert_eq!((cluster.host, cluster.subclusters.allocated), (None, 0)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn bitmaps_are_kept_to_the_byte() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("bitmaps.qcow2");
    create(qemu, &path, "cluster_size=4k", "512M");
    let name = path.to_str().expect("a plain path");
    qemu.img(&["bitmap", "--add", name, "first"]);
    qemu.img(&["bitmap", "--add", "-g", "512", name, "second, with a longer name"]);
    qemu.img(&["bitmap", "--add", "--disable", "-g", "2M", name, "off"]);
    qemu.io(&path, &["write -P 1 0 64k", "write -P 1 100M 1M"]);
    let file = File::read(&path);

    let data = file.extension(0x2385_2875);
    let extension = BitmapsExtension {
        nb_bitmaps: be32(&data, 0),
        bitmap_directory_size: be64(&data, 8),
        bitmap_directory_offset: HostOffset::new(be64(&data, 16)),
    };
    let bytes = file.slice(extension.bitmap_directory_offset, extension.bitmap_directory_size);
    let entries = decode_bitmap_directory(&bytes, &extension).expect("a valid directory");
    assert_eq!(encode_bitmap_directory(&entries), bytes);
    assert_eq!(bitmap_name_faults(&entries), []);

    let told = qemu.info(&path);
    let told = told["format-specific"]["data"]["bitmaps"].as_array().expect("bitmaps").clone();
    assert_eq!((entries.len(), told.len()), (3, 3));
    let counts = file.refcounts();
    for entry in &entries {
        let told = told.iter().find(|told| told["name"].as_str().map(str::as_bytes) == Some(&entry.name[..]));
        let told = told.expect("QEMU tells the same names");
        assert_eq!(told["granularity"].as_u64(), Some(1 << entry.granularity_bits));
        let auto = told["flags"].as_array().expect("flags").iter().any(|flag| flag == "auto");
        assert_eq!(auto, entry.flags & BitmapDirectoryEntry::AUTO != 0);
        assert_eq!(entry.usable(), Ok(()));
        assert_eq!(entry.validate(file.geometry, 512 << 20), Ok(()));
        assert_eq!(u64::from(entry.bitmap_table_size), entry.table_entries_for(512 << 20, file.geometry));
        let table = file.slice(entry.bitmap_table_offset, entry.table_bytes());
        for (index, word) in (0_u64..).zip(table.chunks_exact(8).map(|word| be64(word, 0))) {
            let at = entry.bitmap_table_offset.saturating_add(8 * index);
            let decoded = BitmapTableEntry::decode(word, file.geometry.cluster_bits(), at).expect("a valid entry");
            assert_eq!(decoded.encode(), word);
            if let BitmapTableEntry::Cluster(data) = decoded {
                assert_eq!(counts.get(&file.geometry.host_cluster(data).get()), Some(&1));
            }
        }
    }
}
