//! The header, versions 2 and 3, and the first cluster that it opens. Specification: "Header".

use super::{
    AutoclearFeatures, ClusterBits, CompatibleFeatures, Extension, FormatError, Geometry, HostOffset,
    IncompatibleFeatures, Limits, RefcountOrder,
};

/// The version of the format.
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

/// The decoded header.
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
    /// Bytes 24-31: the virtual size in bytes.
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
    /// Bytes 100-103; 72 in version 2.
    pub header_length: u32,
    /// Byte 104, where the header is longer than that.
    pub compression_type: CompressionType,
    /// The bytes between 105 (or 104) and `header_length` that this library does not know, kept as they are.
    pub additional: Vec<u8>,
}

impl Header {
    /// The geometry that the header describes; decoding has made sure that there is one.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        todo!()
    }

    /// Decodes and validates the header alone (without extensions) from the first bytes of a file.
    ///
    /// # Errors
    /// See format.md 1.1.
    pub fn decode(_bytes: &[u8], _file_len: u64, _limits: &Limits) -> Result<Self, FormatError> {
        todo!()
    }

    /// Encodes `header_length` bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        todo!()
    }
}

/// The first cluster: header, extensions, and the backing file's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderCluster {
    /// The header.
    pub header: Header,
    /// The extensions in the order of the file, without the end marker.
    pub extensions: Vec<Extension>,
    /// The backing file's name as it stands in the file.
    pub backing_file: Option<Vec<u8>>,
}

impl HeaderCluster {
    /// Decodes and validates the first cluster. `bytes` is the first cluster, or the whole file where that is shorter.
    ///
    /// # Errors
    /// See format.md 1.1 and 1.2.
    pub fn decode(_bytes: &[u8], _file_len: u64, _limits: &Limits) -> Result<Self, FormatError> {
        todo!()
    }

    /// Encodes header, extensions, end marker and backing name, as long as they are; sets `backing_file_offset` and
    /// `backing_file_size` in the encoded header.
    ///
    /// # Errors
    /// [`FormatError::Limit`] where they do not fit the first cluster.
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        todo!()
    }

    /// The backing format extension's value, if there is one.
    #[must_use]
    pub fn backing_format(&self) -> Option<&[u8]> {
        todo!()
    }
}
