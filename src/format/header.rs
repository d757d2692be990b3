//! The header, versions 2 and 3. Specification: "Header", "Additional fields".

use super::cursor::Cursor;
use super::extension::placed;
use super::limits::{
    DEFAULT_V3_HEADER_LENGTH, MAGIC, MAX_CLUSTER_BITS, MAX_OFFSET, MAX_REFCOUNT_ORDER, MAX_VM_STATE_INDEX,
    MIN_CLUSTER_BITS, MIN_EXTENDED_L2_CLUSTER_BITS, MIN_V3_HEADER_LENGTH, SECTOR_SIZE, SNAPSHOT_HEADER_SIZE,
    V2_HEADER_LENGTH,
};
use super::{
    AutoclearFeatures, ClusterBits, CompatibleFeatures, Extension, FeatureKind, FeatureNameTable, FormatError,
    Geometry, HostOffset, IncompatibleFeatures, Limits, RefcountOrder,
};

/// What errors call it.
const HEADER: &str = "header";
/// Where the compression type lies, and the header's length with it.
const COMPRESSION_AT: usize = 104;

/// The version of the format.
///
/// Version 1 is another format, which this library does not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Version {
    /// Version 2 (`compat=0.10`): no feature bits, no zero flag, 16-bit refcounts.
    V2,
    /// Version 3 (`compat=1.1`).
    #[default]
    V3,
}

/// How guest data is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum CryptMethod {
    /// Not at all.
    #[default]
    None,
    /// The legacy AES method (1).
    Aes,
    /// LUKS (2).
    Luks,
}

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum CompressionType {
    /// Raw deflate (0), which QEMU calls `zlib`.
    #[default]
    Deflate,
    /// Zstandard (1).
    Zstd,
}

/// The decoded header. What [`Header::decode`] gives was validated; what a caller builds is validated when it is encoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes 4-7.
    pub version: Version,
    /// Bytes 8-15: where the backing file's name starts; 0 for none.
    pub backing_file_offset: u64,
    /// Bytes 16-19: the length of the backing file's name.
    pub backing_file_size: u32,
    /// Bytes 20-23.
    pub cluster_bits: ClusterBits,
    /// Bytes 24-31: the virtual size in bytes, as it stands in the file: see [`Header::virtual_size`].
    pub size: u64,
    /// Bytes 32-35.
    pub crypt_method: CryptMethod,
    /// Bytes 36-39: the number of entries in the active L1 table.
    pub l1_size: u32,
    /// Bytes 40-47.
    pub l1_table_offset: HostOffset,
    /// Bytes 48-55.
    pub refcount_table_offset: HostOffset,
    /// Bytes 56-59.
    pub refcount_table_clusters: u32,
    /// Bytes 60-63.
    pub nb_snapshots: u32,
    /// Bytes 64-71.
    pub snapshots_offset: HostOffset,
    /// Bytes 72-79; none in version 2.
    pub incompatible_features: IncompatibleFeatures,
    /// Bytes 80-87; none in version 2.
    pub compatible_features: CompatibleFeatures,
    /// Bytes 88-95; none in version 2.
    pub autoclear_features: AutoclearFeatures,
    /// Bytes 96-99; 4 in version 2.
    pub refcount_order: RefcountOrder,
    /// Bytes 100-103; 72 in version 2. Encoding takes a larger one where the fields need it.
    pub header_length: u32,
    /// Byte 104, where the header is longer than that.
    pub compression_type: CompressionType,
    /// The bytes between 105 (or 104) and `header_length` that this library does not know, kept as they are.
    pub additional: Vec<u8>,
}

impl Header {
    /// A header without guest data, tables, snapshots and features, of the length that QEMU writes.
    #[must_use]
    pub fn new(version: Version, cluster_bits: ClusterBits, size: u64) -> Self {
        let v3 = version == Version::V3;
        Self {
            version,
            backing_file_offset: 0,
            backing_file_size: 0,
            cluster_bits,
            size,
            crypt_method: CryptMethod::None,
            l1_size: 0,
            l1_table_offset: HostOffset::ZERO,
            refcount_table_offset: HostOffset::ZERO,
            refcount_table_clusters: 0,
            nb_snapshots: 0,
            snapshots_offset: HostOffset::ZERO,
            incompatible_features: IncompatibleFeatures::default(),
            compatible_features: CompatibleFeatures::default(),
            autoclear_features: AutoclearFeatures::default(),
            refcount_order: RefcountOrder::default(),
            header_length: if v3 { DEFAULT_V3_HEADER_LENGTH } else { V2_HEADER_LENGTH },
            compression_type: CompressionType::Deflate,
            additional: if v3 { vec![0; 7] } else { Vec::new() },
        }
    }

    /// The geometry that the header describes.
    ///
    /// # Panics
    /// Where a caller built a header with extended L2 entries and clusters under 16 KiB; decoding refuses it.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        let geometry = self.checked_geometry();
        assert!(geometry.is_some(), "extended L2 entries need clusters of 16 KiB or more");
        geometry.unwrap_or_else(|| unreachable!("asserted above"))
    }

    fn checked_geometry(&self) -> Option<Geometry> {
        let extended_l2 = self.incompatible_features.has(IncompatibleFeatures::EXTENDED_L2);
        Geometry::new(self.cluster_bits, self.refcount_order, extended_l2)
    }

    /// The cluster size in bytes.
    #[must_use]
    pub const fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits.get()
    }

    /// The virtual size in bytes that a guest sees: whole sectors of 512 bytes, as QEMU counts. The rest of `size`, which
    /// only other programs write, is cut off.
    #[must_use]
    pub const fn virtual_size(&self) -> u64 {
        self.size & !SECTOR_SIZE.wrapping_sub(1)
    }

    /// Decodes and validates the header alone (without extensions) from the first bytes of a file. Tables are not
    /// compared with `file_len`: whoever reads them does that.
    ///
    /// # Errors
    /// [`FormatError::Corrupt`] for what the specification forbids, [`FormatError::Limit`] for more than `limits` allow,
    /// [`FormatError::Unsupported`] for other versions, unknown incompatible features (by their names in the image's own
    /// table, where `bytes` hold it), and unknown methods of encryption and compression.
    pub fn decode(bytes: &[u8], file_len: u64, limits: &Limits) -> Result<Self, FormatError> {
        let header = Self::parse(there(bytes, file_len))?;
        header.validate()?;
        header.within(limits)?;
        Ok(header)
    }

    /// Decodes the fields, each by itself.
    fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let cursor = Cursor::new(bytes, HEADER, 0);
        let magic = cursor.u32(0, "magic")?;
        if magic != MAGIC {
            return Err(cursor.corrupt(
                0,
                "magic",
                format_args!("{magic:#010x}"),
                format_args!("{MAGIC:#010x}, qcow2"),
            ));
        }
        let version = match cursor.u32(4, "version")? {
            2 => Version::V2,
            3 => Version::V3,
            other => {
                return Err(FormatError::unsupported(format!(
                    "version {other} in the header at 0x4 (2 and 3 are known)"
                )));
            }
        };
        let bits = cursor.u32(20, "cluster_bits")?;
        let cluster_bits = ClusterBits::new(bits).ok_or_else(|| {
            cursor.corrupt(20, "cluster_bits", bits, format_args!("{MIN_CLUSTER_BITS} to {MAX_CLUSTER_BITS}"))
        })?;
        let mut header = Self {
            backing_file_offset: cursor.u64(8, "backing_file_offset")?,
            backing_file_size: cursor.u32(16, "backing_file_size")?,
            l1_size: cursor.u32(36, "l1_size")?,
            l1_table_offset: HostOffset::new(cursor.u64(40, "l1_table_offset")?),
            refcount_table_offset: HostOffset::new(cursor.u64(48, "refcount_table_offset")?),
            refcount_table_clusters: cursor.u32(56, "refcount_table_clusters")?,
            nb_snapshots: cursor.u32(60, "nb_snapshots")?,
            snapshots_offset: HostOffset::new(cursor.u64(64, "snapshots_offset")?),
            header_length: V2_HEADER_LENGTH,
            additional: Vec::new(),
            ..Self::new(version, cluster_bits, cursor.u64(24, "size")?)
        };
        if version == Version::V3 {
            header.parse_v3(bytes)?;
        }
        header.crypt_method = match cursor.u32(32, "crypt_method")? {
            0 => CryptMethod::None,
            1 => CryptMethod::Aes,
            2 => CryptMethod::Luks,
            other => {
                let what = format!("crypt_method {other} in the header at 0x20 (0 none, 1 AES and 2 LUKS are known)");
                return Err(FormatError::unsupported(what));
            }
        };
        Ok(header)
    }

    /// Decodes the fields from byte 72 on. Unknown incompatible features come first: nothing else can be believed.
    fn parse_v3(&mut self, bytes: &[u8]) -> Result<(), FormatError> {
        let cursor = Cursor::new(bytes, HEADER, 0);
        self.incompatible_features = IncompatibleFeatures(cursor.u64(72, "incompatible_features")?);
        self.compatible_features = CompatibleFeatures(cursor.u64(80, "compatible_features")?);
        self.autoclear_features = AutoclearFeatures(cursor.u64(88, "autoclear_features")?);
        let order = cursor.u32(96, "refcount_order")?;
        self.header_length = cursor.u32(100, "header_length")?;
        if self.incompatible_features.unknown() != 0 {
            return Err(unknown_features(self, bytes));
        }
        self.refcount_order = RefcountOrder::new(order)
            .ok_or_else(|| cursor.corrupt(96, "refcount_order", order, format_args!("at most {MAX_REFCOUNT_ORDER}")))?;
        let length = self.validate_length()?;
        let fields = cursor.bytes(0, length, "additional fields")?;
        if let Some((kind, rest)) = fields.get(COMPRESSION_AT..).and_then(<[u8]>::split_first) {
            self.compression_type = match kind {
                0 => CompressionType::Deflate,
                1 => CompressionType::Zstd,
                other if self.incompatible_features.has(IncompatibleFeatures::COMPRESSION) => {
                    let what =
                        format!("compression_type {other} in the header at 0x68 (0 deflate and 1 zstd are known)");
                    return Err(FormatError::unsupported(what));
                }
                other => return Err(cursor.corrupt(COMPRESSION_AT, "compression_type", other, NO_COMPRESSION_BIT)),
            };
            self.additional = rest.to_vec();
        }
        Ok(())
    }

    /// Whether `header_length` is one that version 3 may have; returns it as the length of a buffer.
    pub(super) fn validate_length(&self) -> Result<usize, FormatError> {
        let length = self.header_length;
        let whole =
            length.is_multiple_of(8) && length >= MIN_V3_HEADER_LENGTH && u64::from(length) <= self.cluster_size();
        usize::try_from(length).ok().filter(|_| whole).ok_or_else(|| {
            let most = self.cluster_size();
            let expected = format!("a multiple of 8 from {MIN_V3_HEADER_LENGTH} to the cluster size {most}");
            FormatError::corrupt(HEADER, 100, "header_length", length, expected)
        })
    }

    /// Whether the fields agree with each other and with the specification.
    ///
    /// # Errors
    /// [`FormatError::Corrupt`] with the first field that does not; [`FormatError::Unsupported`] for unknown incompatible
    /// features.
    pub fn validate(&self) -> Result<(), FormatError> {
        self.validate_features()?;
        self.validate_tables()
    }

    fn validate_features(&self) -> Result<(), FormatError> {
        let incompatible = self.incompatible_features;
        let corrupt =
            |at, field, found: String, expected: &str| Err(FormatError::corrupt(HEADER, at, field, found, expected));
        if incompatible.unknown() != 0 {
            return Err(unknown_features(self, &[]));
        }
        if self.version == Version::V2 {
            let features = incompatible.0 | self.compatible_features.0 | self.autoclear_features.0;
            let fields = (features, self.refcount_order, self.compression_type, self.additional.len());
            if fields != (0, RefcountOrder::default(), CompressionType::Deflate, 0) {
                return corrupt(4, "version", "2".to_owned(), "3, with features, refcount widths or additional fields");
            }
            return Ok(());
        }
        if self.checked_geometry().is_none() {
            let expected = format!("at least {MIN_EXTENDED_L2_CLUSTER_BITS} with extended L2 entries");
            return corrupt(20, "cluster_bits", self.cluster_bits.get().to_string(), &expected);
        }
        let compressed = incompatible.has(IncompatibleFeatures::COMPRESSION);
        match self.compression_type {
            CompressionType::Deflate if compressed => {
                return corrupt(
                    104,
                    "compression_type",
                    "0 or absent".to_owned(),
                    "not 0 with the compression type bit",
                );
            }
            CompressionType::Zstd if !compressed => {
                return corrupt(104, "compression_type", "1".to_owned(), NO_COMPRESSION_BIT);
            }
            _ => {}
        }
        if self.autoclear_features.has(AutoclearFeatures::RAW_EXTERNAL_DATA) {
            let found = || format!("{:#x}", self.autoclear_features.0);
            if !incompatible.has(IncompatibleFeatures::DATA_FILE) {
                return corrupt(
                    88,
                    "autoclear_features",
                    found(),
                    "no raw external data without an external data file",
                );
            }
            if self.names_backing_file() {
                return corrupt(88, "autoclear_features", found(), "no raw external data with a backing file");
            }
        }
        Ok(())
    }

    fn validate_tables(&self) -> Result<(), FormatError> {
        let cursor = Cursor::new(&[], HEADER, 0);
        if self.size > MAX_OFFSET {
            return Err(cursor.corrupt(24, "size", self.size, format_args!("at most {MAX_OFFSET}")));
        }
        let needed = self.geometry().l1_entries_for(self.size);
        if needed > MAX_VM_STATE_INDEX {
            return Err(FormatError::limit(HEADER, "L1 entries for size", needed, MAX_VM_STATE_INDEX));
        }
        if u64::from(self.l1_size) < needed {
            let expected = format!("at least {needed} for a size of {}", self.size);
            return Err(cursor.corrupt(36, "l1_size", self.l1_size, expected));
        }
        placed(&cursor, 40, "l1_table_offset", self.l1_table_offset, self.l1_table_bytes(), self)?;
        if self.refcount_table_clusters == 0 {
            return Err(cursor.corrupt(56, "refcount_table_clusters", 0, "at least 1"));
        }
        let reftable = self.refcount_table_bytes();
        placed(&cursor, 48, "refcount_table_offset", self.refcount_table_offset, reftable, self)?;
        let least = u64::from(self.nb_snapshots).saturating_mul(SNAPSHOT_HEADER_SIZE);
        placed(&cursor, 64, "snapshots_offset", self.snapshots_offset, least, self)
    }

    /// Whether the tables are as small as the caller asks.
    fn within(&self, limits: &Limits) -> Result<(), FormatError> {
        let numbers = [
            ("size", self.virtual_size(), limits.max_virtual_size),
            ("L1 table bytes", self.l1_table_bytes(), limits.max_l1_bytes),
            ("refcount table bytes", self.refcount_table_bytes(), limits.max_reftable_bytes),
            ("nb_snapshots", u64::from(self.nb_snapshots), u64::from(limits.max_snapshots)),
        ];
        match numbers.into_iter().find(|(_, found, limit)| found > limit) {
            Some((field, found, limit)) => Err(FormatError::limit(HEADER, field, found, limit)),
            None => Ok(()),
        }
    }

    /// The length of the active L1 table in bytes.
    #[must_use]
    pub fn l1_table_bytes(&self) -> u64 {
        u64::from(self.l1_size).saturating_mul(8)
    }

    /// The length of the refcount table in bytes.
    #[must_use]
    pub fn refcount_table_bytes(&self) -> u64 {
        u64::from(self.refcount_table_clusters).saturating_mul(self.cluster_size())
    }

    /// Whether the header points at a backing file's name that is not empty.
    #[must_use]
    pub const fn names_backing_file(&self) -> bool {
        self.backing_file_offset != 0 && self.backing_file_size != 0
    }

    /// The length that [`Header::encode`] gives: `header_length`, or more where additional fields need more.
    pub(crate) fn encoded_len(&self) -> usize {
        if self.version == Version::V2 {
            return 72;
        }
        let fields = if self.additional.is_empty() && self.compression_type == CompressionType::Deflate {
            COMPRESSION_AT
        } else {
            COMPRESSION_AT.saturating_add(1).saturating_add(self.additional.len())
        };
        fields
            .max(usize::try_from(self.header_length).unwrap_or(usize::MAX))
            .checked_next_multiple_of(8)
            .unwrap_or(usize::MAX)
    }

    /// Encodes `header_length` bytes: 72 in version 2; in version 3 more than the field says where the fields need
    /// more, and then the encoded field says so. The header is not validated.
    ///
    /// # Panics
    /// Where `header_length` is larger than a cluster can be: decoding and [`Header::validate`] refuse it.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let length = self.encoded_len();
        assert!(length <= 1 << MAX_CLUSTER_BITS, "a header of {length} bytes");
        let mut bytes = Vec::with_capacity(length);
        bytes.extend(MAGIC.to_be_bytes());
        bytes.extend(if self.version == Version::V2 { 2_u32 } else { 3 }.to_be_bytes());
        bytes.extend(self.backing_file_offset.to_be_bytes());
        bytes.extend(self.backing_file_size.to_be_bytes());
        bytes.extend(self.cluster_bits.get().to_be_bytes());
        bytes.extend(self.size.to_be_bytes());
        let crypt_method: u32 = match self.crypt_method {
            CryptMethod::None => 0,
            CryptMethod::Aes => 1,
            CryptMethod::Luks => 2,
        };
        bytes.extend(crypt_method.to_be_bytes());
        bytes.extend(self.l1_size.to_be_bytes());
        bytes.extend(self.l1_table_offset.get().to_be_bytes());
        bytes.extend(self.refcount_table_offset.get().to_be_bytes());
        bytes.extend(self.refcount_table_clusters.to_be_bytes());
        bytes.extend(self.nb_snapshots.to_be_bytes());
        bytes.extend(self.snapshots_offset.get().to_be_bytes());
        if self.version == Version::V3 {
            bytes.extend(self.incompatible_features.0.to_be_bytes());
            bytes.extend(self.compatible_features.0.to_be_bytes());
            bytes.extend(self.autoclear_features.0.to_be_bytes());
            bytes.extend(self.refcount_order.get().to_be_bytes());
            bytes.extend(u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
            if length > COMPRESSION_AT {
                bytes.push(u8::from(self.compression_type == CompressionType::Zstd));
                bytes.extend(&self.additional);
            }
            bytes.resize(length, 0);
        }
        bytes
    }
}

/// What is expected of the compression type without its bit.
const NO_COMPRESSION_BIT: &str = "0 or absent without the compression type bit";

/// The part of `bytes` that the file holds.
pub(super) fn there(bytes: &[u8], file_len: u64) -> &[u8] {
    let len = usize::try_from(file_len).unwrap_or(usize::MAX);
    bytes.get(..len).unwrap_or(bytes)
}

/// The refusal of incompatible features that nobody here knows, by the names that the image gives them.
fn unknown_features(header: &Header, bytes: &[u8]) -> FormatError {
    let table = find_feature_names(header, bytes).unwrap_or_default();
    let unknown = header.incompatible_features.unknown();
    let names: Vec<String> = (0..u64::BITS)
        .filter(|bit| unknown & (1 << bit) != 0)
        .map(|bit| match table.lookup(FeatureKind::Incompatible, bit) {
            Some(name) => format!("{name:?} (bit {bit})"),
            None => format!("bit {bit}"),
        })
        .collect();
    let known = IncompatibleFeatures::KNOWN;
    let found = header.incompatible_features.0;
    let what = format!(
        "{} of the incompatible_features {found:#x} in the header at 0x48 (of which {known:#x} are known)",
        names.join(", ")
    );
    FormatError::unsupported(what)
}

/// Looks for the feature name table in an image of which nothing was validated.
fn find_feature_names(header: &Header, bytes: &[u8]) -> Option<FeatureNameTable> {
    let cursor = Cursor::new(bytes, HEADER, 0);
    let mut at = usize::try_from(header.header_length).ok()?;
    loop {
        let kind = cursor.u32(at, "").ok()?;
        let len = usize::try_from(cursor.u32(at.checked_add(4)?, "").ok()?).ok()?;
        let data = cursor.bytes(at.checked_add(8)?, len, "").ok()?;
        match kind {
            Extension::END => return None,
            Extension::FEATURE_NAMES => return Some(FeatureNameTable::decode(data)),
            _ => at = at.checked_add(8)?.checked_add(len.checked_next_multiple_of(8)?)?,
        }
    }
}
