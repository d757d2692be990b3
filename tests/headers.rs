//! The first cluster: what we accept, and what we make of it, against `qemu-img info`.

use std::path::Path;

use qcow2_chain::format::{
    AutoclearFeatures, CompatibleFeatures, CompressionType, CryptMethod, FeatureNameTable, FormatError, HeaderCluster,
    IncompatibleFeatures, Limits, Version,
};
use serde_json::{Value, json};

use crate::support::qemu::{Qemu, Run};
use crate::support::{foreign, say};

/// The first cluster of a file, whatever its size, and the file's length.
fn first_bytes(path: &Path) -> (Vec<u8>, u64) {
    use std::io::Read;
    let file = std::fs::File::open(path).expect("it opens");
    let len = file.metadata().expect("it has a length").len();
    let mut bytes = Vec::new();
    file.take(2 << 20).read_to_end(&mut bytes).expect("it reads");
    (bytes, len)
}

fn decode(path: &Path) -> Result<HeaderCluster, FormatError> {
    let (bytes, len) = first_bytes(path);
    HeaderCluster::decode(&bytes, len, &Limits::default())
}

fn info(qemu: Qemu, path: &Path) -> Run {
    qemu.try_img(&["info".as_ref(), "--output=json".as_ref(), "-f".as_ref(), "qcow2".as_ref(), path.as_os_str()])
}

/// What `qemu-img info` would say of the header.
fn described(cluster: &HeaderCluster) -> Value {
    // QEMU takes names for C strings, and an empty one for none.
    let until_zero = |bytes: &[u8]| bytes.split(|&byte| byte == 0).next().unwrap_or_default().to_vec();
    let text = |bytes: Option<&[u8]>| bytes.map(|bytes| String::from_utf8_lossy(&until_zero(bytes)).into_owned());
    let backing = cluster.backing_file.as_deref().filter(|name| name.first() != Some(&0));
    let header = &cluster.header;
    let incompatible = header.incompatible_features;
    let v3 = header.version == Version::V3;
    let zstd = header.compression_type == CompressionType::Zstd;
    json!({
        "virtual-size": header.virtual_size(),
        "cluster-size": header.cluster_size(),
        "dirty-flag": incompatible.has(IncompatibleFeatures::DIRTY),
        "backing-filename": text(backing),
        "backing-filename-format": text(backing.and(cluster.backing_format())),
        "encrypted": (header.crypt_method != CryptMethod::None).then_some(true),
        "compat": if v3 { "1.1" } else { "0.10" },
        "compression-type": if zstd { "zstd" } else { "zlib" },
        "refcount-bits": v3.then(|| header.refcount_order.bits()).or(Some(16)),
        "lazy-refcounts": v3.then(|| header.compatible_features.has(CompatibleFeatures::LAZY_REFCOUNTS)),
        "corrupt": v3.then(|| incompatible.has(IncompatibleFeatures::CORRUPT)),
        "extended-l2": v3.then(|| header.geometry().extended_l2()),
        "data-file": incompatible.has(IncompatibleFeatures::DATA_FILE).then(|| text(cluster.data_file())).flatten(),
        "data-file-raw": incompatible.has(IncompatibleFeatures::DATA_FILE)
            .then(|| header.autoclear_features.has(AutoclearFeatures::RAW_EXTERNAL_DATA)),
    })
}

/// The same members from what `qemu-img info` said.
fn told(info: &str) -> Value {
    let info: Value = serde_json::from_str(info).expect("info prints JSON");
    let data = &info["format-specific"]["data"];
    let mut told = serde_json::Map::new();
    for name in
        ["virtual-size", "cluster-size", "dirty-flag", "backing-filename", "backing-filename-format", "encrypted"]
    {
        told.insert(name.to_owned(), info[name].clone());
    }
    for name in [
        "compat",
        "compression-type",
        "refcount-bits",
        "lazy-refcounts",
        "corrupt",
        "extended-l2",
        "data-file",
        "data-file-raw",
    ] {
        told.insert(name.to_owned(), data[name].clone());
    }
    Value::Object(told)
}

#[test]
fn foreign_headers_are_what_qemu_says_and_come_back_as_they_were() {
    let (images, qemu) = (foreign::images(), Qemu::find());
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (mut accepted, mut compared) = (0, 0);
    for image in images.iter().filter(|image| image.name != "data-file.bin") {
        let path = image.unpack(dir.path());
        let name = &image.name;
        let (bytes, len) = first_bytes(&path);
        let cluster = match HeaderCluster::decode(&bytes, len, &Limits::default()) {
            Ok(cluster) => cluster,
            Err(error) => {
                // Other formats; a fork's own compression type; 65,536 snapshots said to lie over the header.
                let no_qcow2 = !bytes.starts_with(b"QFI\xfb") || bytes[7] == 1;
                let refused = no_qcow2 || image.origin == "qcow2-rs-fork" || name == "invalid-qcow-large-json.img";
                assert!(refused, "{name} of {}: {error}", image.origin);
                std::fs::remove_file(&path).expect("it goes away");
                continue;
            }
        };
        accepted += 1;
        let over = cluster.encode_over(&bytes).expect("what decodes encodes");
        assert!(over.starts_with(&bytes[..bytes.len().min(1 << cluster.header.cluster_bits.get())]), "{name}");
        assert!(HeaderCluster::changed_sectors(&bytes, &over).is_empty(), "{name}");
        if let Some(qemu) = qemu {
            let info = info(qemu, &path);
            assert_eq!(info.code, 0, "{name} of {}: {}", image.origin, info.stderr);
            assert_eq!(described(&cluster), told(&info.stdout), "{name} of {}", image.origin);
            compared += 1;
        }
        std::fs::remove_file(&path).expect("it goes away");
    }
    say(&format!("foreign headers: {accepted} of {} accepted, {compared} compared with qemu-img", images.len()));
    assert!(images.is_empty() || accepted >= 60, "only {accepted}");
}

/// Who refuses a header with one number changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refuses {
    Nobody,
    Both,
    /// The specification forbids it, and QEMU does not look.
    OnlyWe,
    /// Must not be.
    OnlyQemu,
}
use Refuses::{Both, Nobody, OnlyQemu, OnlyWe};

/// Offset, value, length in bytes, and who refuses it, in an image of 1 MiB with a backing file called `base` at 528.
const CHANGES: &[(usize, u64, usize, Refuses)] = &[
    (0, 0x5146_49fa, 4, Both),
    (4, 1, 4, Both),
    (4, 2, 4, Nobody), // its extensions start at 72, and the zeroes there end them
    (4, 4, 4, Both),
    (8, 0, 8, Nobody),
    (8, 104, 8, OnlyWe),
    (8, 112, 8, Nobody),
    (8, 65_536, 8, Both),
    (8, 65_532, 8, Nobody),
    (8, 65_533, 8, Both),
    (16, 0, 4, Nobody),
    (16, 1023, 4, Nobody),
    (16, 1024, 4, Both),
    (20, 8, 4, Both),
    (20, 22, 4, Both),
    (24, 0, 8, Nobody),
    (24, 1_000_001, 8, Nobody),
    (24, (1 << 29) + 1, 8, Both),
    (24, 1 << 63, 8, Both),
    (32, 2, 4, Both),
    (32, 3, 4, Both),
    (36, 0, 4, Both),
    (36, 4_194_304, 4, Nobody),
    (36, 4_194_305, 4, Both),
    (40, 0x3_0200, 8, Both),
    (40, 0, 8, OnlyWe),
    (40, 1 << 63, 8, Both),
    (48, 0x1_0200, 8, Both),
    (48, 0, 8, OnlyWe),
    (48, i64::MAX as u64 - 0xffff, 8, Both),
    (56, 0, 4, Both),
    (56, 128, 4, Nobody),
    (56, 129, 4, Both),
    (60, 1, 4, OnlyWe),
    (60, 65_537, 4, Both),
    (64, 0x200, 8, Both),
    (64, 0x5_0000, 8, Nobody),
    (72, 1, 8, Nobody),
    (72, 2, 8, Nobody),
    (72, 8, 8, Both),
    (72, 16, 8, Nobody),
    (72, 32, 8, Both),
    (80, u64::MAX, 8, Nobody),
    (88, 1, 8, OnlyWe),
    (88, 2, 8, OnlyWe),
    (88, 1 << 63, 8, Nobody),
    (96, 6, 4, Nobody),
    (96, 7, 4, Both),
    (100, 96, 4, Both),
    (100, 104, 4, Nobody),
    (100, 0x1_0008, 4, Both),
    (104, 1, 1, Both),
    (104, 2, 1, Both),
    (105, 1, 1, Nobody),
    (112, 0x1234_5678, 4, Nobody),
    (112, 0, 4, Nobody),
    (116, 16, 4, Both),          // the backing format's length
    (128, 0xe279_2aca, 4, Both), // the feature name table becomes a second backing format, too long a one
    (132, 1_000, 4, Both),
    (520, 0x44, 4, Nobody), // the end marker becomes an empty extension: nothing is left before the name
    (524, 8, 4, Both),
];

#[test]
fn one_changed_number_is_refused_where_qemu_refuses_it() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("changed.qcow2");
    let image = path.as_os_str();
    let args = ["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", "base"].map(std::ffi::OsStr::new);
    qemu.img(&[&args[..], &[image, "1M".as_ref()]].concat());
    let whole = std::fs::read(&path).expect("it reads");
    assert_eq!(&whole[520..532], b"\0\0\0\0\0\0\0\0base", "the places in CHANGES are those of this image");
    let mut wrong = Vec::new();
    for &(at, value, len, expected) in CHANGES {
        let mut bytes = whole.clone();
        bytes[at..at + len].copy_from_slice(&value.to_be_bytes()[8 - len..]);
        std::fs::write(&path, &bytes).expect("it writes");
        let (ours, theirs) = (decode(&path), info(qemu, &path));
        let verdict = match (&ours, theirs.code) {
            (Ok(_), 0) => Nobody,
            (Err(_), 0) => OnlyWe,
            (Err(_), _) => Both,
            (Ok(_), _) => OnlyQemu,
        };
        if verdict != expected {
            let ours = ours.as_ref().err();
            wrong.push(format!("{value:#x} at {at}: {verdict:?}, not {expected:?}: {ours:?}, {}", theirs.stderr));
        }
        if let (Ok(cluster), Nobody) = (&ours, verdict) {
            assert_eq!(described(cluster), told(&theirs.stdout), "{value:#x} at {at}");
            assert!(
                cluster.encode_over(&bytes).expect("it encodes").starts_with(&bytes[..1 << 16]),
                "{value:#x} at {at}"
            );
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn our_feature_name_table_is_the_one_that_qemu_writes() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("new.qcow2");
    for (options, table) in
        [("compat=1.1", true), ("compat=0.10", false), ("cluster_size=4096", false), ("cluster_size=8192", true)]
    {
        let args = ["create", "-q", "-f", "qcow2", "-o", options].map(std::ffi::OsStr::new);
        qemu.img(&[&args[..], &[path.as_os_str(), "1M".as_ref()]].concat());
        let cluster = decode(&path).expect("QEMU's own images decode");
        assert_eq!(cluster.feature_names(), table.then(FeatureNameTable::known), "{options}");
        let ours = qcow2_chain::format::Extension::for_new_image(&cluster.header, None, None, None);
        assert_eq!(ours, cluster.extensions, "{options}");
    }
}
