//! First clusters built byte by byte, without the encoder.

use proptest::collection::vec;
use proptest::prelude::*;

use super::super::super::IncompatibleFeatures;
use super::*;

/// Type, data, what the padding is filled with.
pub(super) type Raw = (u32, Vec<u8>, u8);

/// What a first cluster is built from, byte by byte and without the encoder.
#[derive(Clone, Debug)]
pub(super) struct Sketch {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    /// Bytes behind byte 104, a multiple of 8, the first of which is the compression type.
    pub(super) additional: Vec<u8>,
    pub(super) crypt_method: u32,
    pub(super) extensions: Vec<Raw>,
    /// The length field of the end marker; no marker for `None`.
    pub(super) marker: Option<u32>,
    pub(super) gap: Vec<u8>,
    pub(super) name: Vec<u8>,
    pub(super) autoclear: u64,
    pub(super) compatible: u64,
    pub(super) incompatible: u64,
}

impl Default for Sketch {
    fn default() -> Self {
        Self {
            version: 3,
            cluster_bits: 16,
            additional: vec![0; 8],
            crypt_method: 0,
            extensions: Vec::new(),
            marker: Some(0),
            gap: Vec::new(),
            name: Vec::new(),
            autoclear: 0,
            compatible: 0,
            incompatible: 0,
        }
    }
}

impl Sketch {
    /// The bytes, and how many of them are header and extensions, end marker included.
    pub(super) fn build(&self) -> (Vec<u8>, usize) {
        let cluster = 1_u64 << self.cluster_bits;
        let mut bytes = b"QFI\xfb".to_vec();
        bytes.extend(self.version.to_be_bytes());
        bytes.extend([0; 12]);
        bytes.extend(self.cluster_bits.to_be_bytes());
        bytes.extend(1_000_u64.to_be_bytes());
        bytes.extend(self.crypt_method.to_be_bytes());
        bytes.extend(1_u32.to_be_bytes());
        bytes.extend((3 * cluster).to_be_bytes());
        bytes.extend(cluster.to_be_bytes());
        bytes.extend(1_u32.to_be_bytes());
        bytes.extend([0; 12]);
        if self.version == 3 {
            for features in [self.incompatible, self.compatible, self.autoclear] {
                bytes.extend(features.to_be_bytes());
            }
            bytes.extend(4_u32.to_be_bytes());
            bytes.extend(u32::try_from(104 + self.additional.len()).unwrap().to_be_bytes());
            bytes.extend(&self.additional);
        }
        for (kind, data, fill) in &self.extensions {
            bytes.extend(kind.to_be_bytes());
            bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
            bytes.extend(data);
            bytes.resize(bytes.len().next_multiple_of(8), *fill);
        }
        if let Some(length) = self.marker {
            bytes.extend([0; 4]);
            bytes.extend(length.to_be_bytes());
        }
        let end = bytes.len();
        bytes.extend(&self.gap);
        if !self.name.is_empty() {
            let at = bytes.len() as u64;
            bytes[8..16].copy_from_slice(&at.to_be_bytes());
            bytes[16..20].copy_from_slice(&u32::try_from(self.name.len()).unwrap().to_be_bytes());
            bytes.extend(&self.name);
        }
        (bytes, end)
    }

    pub(super) fn decode(&self) -> Result<HeaderCluster, FormatError> {
        let (bytes, _) = self.build();
        decode(&bytes)
    }
}

pub(super) fn decode(bytes: &[u8]) -> Result<HeaderCluster, FormatError> {
    HeaderCluster::decode(bytes, bytes.len() as u64, &Limits::default())
}

pub(super) fn bitmaps(nb: u32, size: u64, offset: u64) -> Raw {
    let data = [&nb.to_be_bytes()[..], &[0; 4], &size.to_be_bytes(), &offset.to_be_bytes()].concat();
    (Extension::BITMAPS, data, 0)
}

pub(super) fn crypto(offset: u64, length: u64) -> Raw {
    (Extension::CRYPTO, [offset.to_be_bytes(), length.to_be_bytes()].concat(), 0)
}

/// Extensions of every type in any order, each at most once, with any padding.
pub(super) fn extensions(cluster_bits: u32) -> impl Strategy<Value = (Vec<Raw>, bool, bool)> {
    let known = (
        proptest::option::of(vec(any::<u8>(), 0..16)),
        proptest::option::of(vec(any::<u8>(), 0..40)),
        proptest::option::of(vec(any::<u8>(), 0..100)),
        proptest::option::of((1..5_u32, 1..500_u64, 1..9_u64)),
        proptest::option::of((1..9_u64, 1..5_000_u64)),
    );
    let unknown = proptest::collection::hash_map(1..1_000_u32, vec(any::<u8>(), 0..30), 0..4);
    (known, unknown, any::<u8>())
        .prop_map(move |((format, file, names, maps, luks), unknown, fill)| {
            let (has_maps, has_luks) = (maps.is_some(), luks.is_some());
            let mut list: Vec<Raw> = Vec::new();
            list.extend(format.map(|data| (Extension::BACKING_FORMAT, data, fill)));
            list.extend(file.map(|data| (Extension::DATA_FILE, data, fill)));
            list.extend(names.map(|data| (Extension::FEATURE_NAMES, data, fill)));
            list.extend(maps.map(|(nb, size, at)| bitmaps(nb, size, at << cluster_bits)));
            list.extend(luks.map(|(at, length)| crypto(at << cluster_bits, length)));
            list.extend(unknown.into_iter().map(|(kind, data)| (kind, data, fill)));
            (list, has_maps, has_luks)
        })
        .prop_flat_map(|(list, maps, luks)| (Just(list).prop_shuffle(), Just(maps), Just(luks)))
}

pub(super) fn sketch() -> impl Strategy<Value = Sketch> {
    let shape = (2..=3_u32, 10..=21_u32, 0..4_usize, any::<u8>(), any::<[bool; 2]>(), any::<u64>());
    let tail = (
        prop_oneof![8 => Just(Some(0)), 1 => Just(Some(8_u32)), 1 => Just(None)],
        vec(any::<u8>(), 0..60),
        prop_oneof![Just(Vec::new()), vec(any::<u8>(), 1..60)],
    );
    (shape, tail).prop_flat_map(
        |((version, cluster_bits, more, fill, [lazy, zstd], compatible), (marker, gap, name))| {
            extensions(cluster_bits).prop_map(move |(extensions, has_maps, has_luks)| {
                let zstd = zstd && more > 0 && version == 3;
                let mut additional = vec![fill; 8 * more];
                if let Some(first) = additional.first_mut() {
                    *first = u8::from(zstd);
                }
                // Without a marker the walk must end where the name starts.
                let marker = if name.is_empty() { marker.or(Some(0)) } else { marker };
                let gap = if marker.is_none() { Vec::new() } else { gap.clone() };
                let v3 = version == 3;
                Sketch {
                    version,
                    cluster_bits,
                    additional,
                    crypt_method: if has_luks { 2 } else { u32::from(lazy) },
                    extensions,
                    marker: marker.map(|length| length.min(u32::try_from(gap.len()).unwrap())),
                    gap,
                    name: name.clone(),
                    autoclear: if v3 { u64::from(has_maps && lazy) | (compatible & !3) } else { 0 },
                    compatible,
                    incompatible: if v3 && zstd { IncompatibleFeatures::COMPRESSION } else { 0 },
                }
            })
        },
    )
}
