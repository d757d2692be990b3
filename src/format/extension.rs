//! Header extensions. Specification: "Header extensions".

use super::HostOffset;

/// One header extension.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Extension {
    /// 0xe2792aca: the backing file's format, as bytes.
    BackingFormat(Vec<u8>),
    /// 0x44415441: the external data file's name, as bytes.
    DataFile(Vec<u8>),
    /// 0x6803f857: the feature name table, undecoded.
    FeatureNames(Vec<u8>),
    /// 0x23852875: where the bitmaps are.
    Bitmaps(BitmapsExtension),
    /// 0x0537be77: where the encryption header is.
    Crypto(CryptoHeader),
    /// Any other, kept as it is.
    Unknown {
        /// Its type.
        kind: u32,
        /// Its data, without padding.
        data: Vec<u8>,
    },
}

/// Specification: "Bitmaps extension".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// The number of bitmaps.
    pub nb_bitmaps: u32,
    /// The directory's size in bytes.
    pub bitmap_directory_size: u64,
    /// Where the directory starts.
    pub bitmap_directory_offset: HostOffset,
}

/// Specification: "Full disk encryption header pointer".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CryptoHeader {
    /// Where the encryption header starts.
    pub offset: HostOffset,
    /// Its length in bytes.
    pub length: u64,
}
