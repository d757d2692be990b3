//! Header extensions. Specification: "Header extensions".

use super::cursor::Cursor;
use super::limits::{FEATURE_TABLE_MIN_CLUSTER, MAX_BACKING_FORMAT_SIZE, MAX_OFFSET};
use super::{AutoclearFeatures, FeatureNameTable, FormatError, Header, HostOffset, Version};

/// One header extension.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Extension {
    /// 0xe2792aca: the backing file's format, as bytes.
    BackingFormat(Vec<u8>),
    /// 0x44415441: the external data file's name, as bytes.
    DataFile(Vec<u8>),
    /// 0x6803f857: the feature name table, undecoded: see [`FeatureNameTable::decode`].
    FeatureNames(Vec<u8>),
    /// 0x23852875: where the bitmaps are.
    Bitmaps(BitmapsExtension),
    /// 0x0537be77: where the encryption header is.
    Crypto(CryptoHeader),
    /// Any other, kept as it is. Also a bitmaps extension that makes no sense, where the bitmaps autoclear bit says
    /// that nobody may rely on it.
    Unknown {
        /// Its type.
        kind: u32,
        /// Its data, without padding.
        data: Vec<u8>,
    },
}

impl Extension {
    /// The type that ends the extensions.
    pub const END: u32 = 0;
    /// The type of [`Extension::BackingFormat`].
    pub const BACKING_FORMAT: u32 = 0xe279_2aca;
    /// The type of [`Extension::DataFile`].
    pub const DATA_FILE: u32 = 0x4441_5441;
    /// The type of [`Extension::FeatureNames`].
    pub const FEATURE_NAMES: u32 = 0x6803_f857;
    /// The type of [`Extension::Bitmaps`].
    pub const BITMAPS: u32 = 0x2385_2875;
    /// The type of [`Extension::Crypto`].
    pub const CRYPTO: u32 = 0x0537_be77;
    /// The type of a gap, "QCGP", of this library's own: its data means nothing. It stands in an image only while the
    /// extensions are rewritten, and after a crash in that moment; other programs pass it over.
    pub(crate) const GAP: u32 = 0x5143_4750;

    /// The type, bytes 0-3.
    #[must_use]
    pub const fn kind(&self) -> u32 {
        match self {
            Self::BackingFormat(_) => Self::BACKING_FORMAT,
            Self::DataFile(_) => Self::DATA_FILE,
            Self::FeatureNames(_) => Self::FEATURE_NAMES,
            Self::Bitmaps(_) => Self::BITMAPS,
            Self::Crypto(_) => Self::CRYPTO,
            Self::Unknown { kind, .. } => *kind,
        }
    }

    /// The place in the order in which QEMU writes extensions.
    pub(super) const fn rank(&self) -> u8 {
        match self.kind() {
            Self::BACKING_FORMAT => 0,
            Self::DATA_FILE => 1,
            Self::CRYPTO => 2,
            Self::FEATURE_NAMES => 3,
            Self::BITMAPS => 4,
            _ => 5,
        }
    }

    /// The data without padding.
    #[must_use]
    pub fn data(&self) -> Vec<u8> {
        match self {
            Self::BackingFormat(data)
            | Self::DataFile(data)
            | Self::FeatureNames(data)
            | Self::Unknown { data, .. } => data.clone(),
            Self::Bitmaps(bitmaps) => bitmaps.encode(),
            Self::Crypto(crypto) => crypto.encode(),
        }
    }

    /// Decodes the data of an extension that starts at `at` in the file (its data at `at + 8`).
    ///
    /// Where the bitmaps autoclear bit is clear, whatever the bitmaps extension holds is kept, but not believed.
    pub(super) fn decode(kind: u32, data: &[u8], at: u64, header: &Header) -> Result<Self, FormatError> {
        let data_at = at.saturating_add(8);
        let extension = match kind {
            Self::BACKING_FORMAT => Self::BackingFormat(data.to_vec()),
            Self::DATA_FILE => Self::DataFile(data.to_vec()),
            Self::FEATURE_NAMES => Self::FeatureNames(data.to_vec()),
            Self::CRYPTO => Self::Crypto(CryptoHeader::decode(data, data_at)?),
            Self::BITMAPS => match BitmapsExtension::decode(data, data_at, header) {
                Ok(bitmaps) => Self::Bitmaps(bitmaps),
                Err(_) if !header.autoclear_features.has(AutoclearFeatures::BITMAPS) => {
                    Self::Unknown { kind, data: data.to_vec() }
                }
                Err(error) => return Err(error),
            },
            _ => Self::Unknown { kind, data: data.to_vec() },
        };
        extension.validate(at, header)?;
        Ok(extension)
    }

    /// Whether the extension is one that a reader accepts in an image with this header.
    pub(super) fn validate(&self, at: u64, header: &Header) -> Result<(), FormatError> {
        let data_at = at.saturating_add(8);
        match self {
            Self::BackingFormat(name) => {
                let len = u64::try_from(name.len()).unwrap_or(u64::MAX);
                if len > MAX_BACKING_FORMAT_SIZE {
                    let expected = format!("at most {MAX_BACKING_FORMAT_SIZE}");
                    return Err(FormatError::corrupt("header extension", at, "backing format length", len, expected));
                }
                Ok(())
            }
            Self::Bitmaps(bitmaps) => bitmaps.validate(data_at, header),
            Self::Crypto(crypto) => crypto.validate(data_at, header),
            Self::Unknown {
                kind: kind @ (Self::END | Self::BACKING_FORMAT | Self::DATA_FILE | Self::FEATURE_NAMES | Self::CRYPTO),
                ..
            } => {
                let found = format!("{kind:#010x} as an unknown one");
                Err(FormatError::corrupt("header extension", at, "type", found, "a type without a meaning"))
            }
            Self::DataFile(_) | Self::FeatureNames(_) | Self::Unknown { .. } => Ok(()),
        }
    }

    /// The extensions of a new image, in QEMU's order: backing format, data file, encryption header, feature name table.
    /// The table is left out where QEMU leaves it out: in version 2, and where clusters are not larger than 4 KiB.
    #[must_use]
    pub fn for_new_image(
        header: &Header,
        backing_format: Option<&[u8]>,
        data_file: Option<&[u8]>,
        crypto: Option<CryptoHeader>,
    ) -> Vec<Self> {
        let table = header.version == Version::V3 && header.cluster_size() > FEATURE_TABLE_MIN_CLUSTER;
        let mut extensions = Vec::new();
        extensions.extend(backing_format.map(|format| Self::BackingFormat(format.to_vec())));
        extensions.extend(data_file.map(|name| Self::DataFile(name.to_vec())));
        extensions.extend(crypto.map(Self::Crypto));
        extensions.extend(table.then(|| Self::FeatureNames(FeatureNameTable::known().encode())));
        extensions
    }
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

impl BitmapsExtension {
    /// The length of its data in bytes.
    pub const SIZE: usize = 24;

    fn decode(data: &[u8], at: u64, header: &Header) -> Result<Self, FormatError> {
        let cursor = Cursor::new(data, "bitmaps extension", at);
        if data.len() != Self::SIZE {
            return Err(cursor.corrupt(0, "length", data.len(), Self::SIZE));
        }
        let reserved = cursor.u32(4, "reserved")?;
        if reserved != 0 {
            return Err(cursor.corrupt(4, "reserved", format_args!("{reserved:#x}"), 0));
        }
        let bitmaps = Self {
            nb_bitmaps: cursor.u32(0, "nb_bitmaps")?,
            bitmap_directory_size: cursor.u64(8, "bitmap_directory_size")?,
            bitmap_directory_offset: HostOffset::new(cursor.u64(16, "bitmap_directory_offset")?),
        };
        bitmaps.validate(at, header)?;
        Ok(bitmaps)
    }

    fn encode(self) -> Vec<u8> {
        let mut data = Vec::with_capacity(Self::SIZE);
        data.extend_from_slice(&self.nb_bitmaps.to_be_bytes());
        data.extend_from_slice(&[0; 4]);
        data.extend_from_slice(&self.bitmap_directory_size.to_be_bytes());
        data.extend_from_slice(&self.bitmap_directory_offset.get().to_be_bytes());
        data
    }

    fn validate(&self, at: u64, header: &Header) -> Result<(), FormatError> {
        let cursor = Cursor::new(&[], "bitmaps extension", at);
        if self.nb_bitmaps == 0 {
            return Err(cursor.corrupt(0, "nb_bitmaps", 0, "at least 1"));
        }
        if self.bitmap_directory_size == 0 {
            return Err(cursor.corrupt(8, "bitmap_directory_size", 0, "at least 1"));
        }
        let (offset, size) = (self.bitmap_directory_offset, self.bitmap_directory_size);
        placed(&cursor, 16, "bitmap_directory_offset", offset, size, header)
    }
}

/// Specification: "Full disk encryption header pointer".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CryptoHeader {
    /// Where the encryption header starts.
    pub offset: HostOffset,
    /// Its length in bytes.
    pub length: u64,
}

impl CryptoHeader {
    /// The length of its data in bytes.
    pub const SIZE: usize = 16;

    fn decode(data: &[u8], at: u64) -> Result<Self, FormatError> {
        let cursor = Cursor::new(data, "encryption header pointer", at);
        if data.len() != Self::SIZE {
            return Err(cursor.corrupt(0, "extension length", data.len(), Self::SIZE));
        }
        Ok(Self { offset: HostOffset::new(cursor.u64(0, "offset")?), length: cursor.u64(8, "length")? })
    }

    fn encode(self) -> Vec<u8> {
        [self.offset.get().to_be_bytes(), self.length.to_be_bytes()].concat()
    }

    fn validate(&self, at: u64, header: &Header) -> Result<(), FormatError> {
        let cursor = Cursor::new(&[], "encryption header pointer", at);
        placed(&cursor, 0, "offset", self.offset, self.length, header)
    }
}

/// Whether a structure lies on a cluster boundary, behind the header, and within what a file can hold.
pub(super) fn placed(
    cursor: &Cursor<'_>,
    at: usize,
    field: &'static str,
    offset: HostOffset,
    size: u64,
    header: &Header,
) -> Result<(), FormatError> {
    let cluster = header.cluster_size();
    if !header.geometry().is_aligned(offset) {
        return Err(cursor.corrupt(at, field, offset, format_args!("a multiple of the cluster size {cluster:#x}")));
    }
    if size == 0 {
        return Ok(());
    }
    if offset.get() < cluster {
        return Err(cursor.corrupt(at, field, offset, format_args!("behind the header, {cluster:#x} or more")));
    }
    if offset.checked_add(size).is_none_or(|end| end.get() > MAX_OFFSET) {
        let most = MAX_OFFSET.saturating_sub(size);
        return Err(cursor.corrupt(at, field, offset, format_args!("at most {most:#x} with {size:#x} bytes there")));
    }
    Ok(())
}
