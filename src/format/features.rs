//! The three words of feature bits, and the table that names them. Specification: "Header", "Feature name table".

/// Bits that a reader must know to open the image at all (bytes 72-79).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct IncompatibleFeatures(pub u64);

impl IncompatibleFeatures {
    /// Bit 0: refcounts may be wrong.
    pub const DIRTY: u64 = 1;
    /// Bit 1: do not write, but to repair.
    pub const CORRUPT: u64 = 1 << 1;
    /// Bit 2: guest data lies in another file.
    pub const DATA_FILE: u64 = 1 << 2;
    /// Bit 3: the compression type is not deflate.
    pub const COMPRESSION: u64 = 1 << 3;
    /// Bit 4: L2 entries have 16 bytes.
    pub const EXTENDED_L2: u64 = 1 << 4;
    /// All bits that have a meaning.
    pub const KNOWN: u64 = 0x1f;

    /// The bits that this library does not know; an image with one of them must not be opened.
    #[must_use]
    pub const fn unknown(self) -> u64 {
        self.0 & !Self::KNOWN
    }

    /// Whether all of `bits` are set.
    #[must_use]
    pub const fn has(self, bits: u64) -> bool {
        self.0 & bits == bits
    }
}

/// Bits that a reader may ignore (bytes 80-87).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct CompatibleFeatures(pub u64);

impl CompatibleFeatures {
    /// Bit 0: refcount updates may be postponed while the dirty bit is set.
    pub const LAZY_REFCOUNTS: u64 = 1;
    /// All bits that have a meaning.
    pub const KNOWN: u64 = 1;

    /// Whether all of `bits` are set.
    #[must_use]
    pub const fn has(self, bits: u64) -> bool {
        self.0 & bits == bits
    }
}

/// Bits that a writer who does not know them must clear (bytes 88-95).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct AutoclearFeatures(pub u64);

impl AutoclearFeatures {
    /// Bit 0: the bitmaps extension is consistent.
    pub const BITMAPS: u64 = 1;
    /// Bit 1: the external data file can be read as a raw image by itself.
    pub const RAW_EXTERNAL_DATA: u64 = 1 << 1;
    /// All bits that have a meaning.
    pub const KNOWN: u64 = 3;

    /// The bits that this library does not know; they must be cleared before the first write.
    #[must_use]
    pub const fn unknown(self) -> u64 {
        self.0 & !Self::KNOWN
    }

    /// Whether all of `bits` are set.
    #[must_use]
    pub const fn has(self, bits: u64) -> bool {
        self.0 & bits == bits
    }
}

/// One of the three words of feature bits, by its number in the feature name table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FeatureKind {
    /// [`IncompatibleFeatures`] (0).
    Incompatible,
    /// [`CompatibleFeatures`] (1).
    Compatible,
    /// [`AutoclearFeatures`] (2).
    Autoclear,
}

impl FeatureKind {
    /// Its number in the feature name table.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Incompatible => 0,
            Self::Compatible => 1,
            Self::Autoclear => 2,
        }
    }
}

/// One entry of the feature name table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeatureName {
    /// Byte 0: which word, as [`FeatureKind::code`]; other numbers mean nothing yet.
    pub kind: u8,
    /// Byte 1: the bit's number in that word.
    pub bit: u8,
    /// Bytes 2-47: the name without its zero padding, as bytes; at most [`FeatureNameTable::MAX_NAME_SIZE`].
    pub name: Vec<u8>,
}

/// What the image calls its feature bits, so that a program can name one that it does not know.
///
/// ```
/// use qcow2_chain::format::{FeatureKind, FeatureNameTable};
///
/// let table = FeatureNameTable::known();
/// assert_eq!(table.lookup(FeatureKind::Incompatible, 3), Some("compression type"));
/// assert_eq!(FeatureNameTable::decode(&table.encode()), table);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct FeatureNameTable {
    /// The entries in the order of the file.
    pub entries: Vec<FeatureName>,
}

impl FeatureNameTable {
    /// The length of an entry in bytes.
    pub const ENTRY_SIZE: usize = 48;
    /// The longest name in bytes.
    pub const MAX_NAME_SIZE: usize = 46;

    /// The table in an extension's data. Any bytes are one: what is no whole entry at the end is left out.
    #[must_use]
    pub fn decode(data: &[u8]) -> Self {
        let entry = |entry: &[u8]| {
            let (&[kind, bit], name) = entry.split_first_chunk()?;
            let name = name.split(|&byte| byte == 0).next()?.to_vec();
            Some(FeatureName { kind, bit, name })
        };
        Self { entries: data.chunks_exact(Self::ENTRY_SIZE).filter_map(entry).collect() }
    }

    /// The extension's data. A name longer than [`FeatureNameTable::MAX_NAME_SIZE`] is cut.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut data = Vec::new();
        for FeatureName { kind, bit, name } in &self.entries {
            let end = data.len().saturating_add(Self::ENTRY_SIZE);
            data.extend_from_slice(&[*kind, *bit]);
            data.extend(name.iter().take(Self::MAX_NAME_SIZE));
            data.resize(end, 0);
        }
        data
    }

    /// The name of a bit; `None` where the table has none, or one that is not UTF-8 or empty.
    ///
    /// An image may call its features anything: escape the name before it reaches a terminal.
    #[must_use]
    pub fn lookup(&self, kind: FeatureKind, bit: u32) -> Option<&str> {
        let entry = self.entries.iter().find(|entry| entry.kind == kind.code() && u32::from(entry.bit) == bit)?;
        std::str::from_utf8(&entry.name).ok().filter(|name| !name.is_empty())
    }

    /// The table of all features that have a meaning, as QEMU writes it to new images.
    #[must_use]
    pub fn known() -> Self {
        use FeatureKind::{Autoclear, Compatible, Incompatible};
        let entries = [
            (Incompatible, 0, "dirty bit"),
            (Incompatible, 1, "corrupt bit"),
            (Incompatible, 2, "external data file"),
            (Incompatible, 3, "compression type"),
            (Incompatible, 4, "extended L2 entries"),
            (Compatible, 0, "lazy refcounts"),
            (Autoclear, 0, "bitmaps"),
            (Autoclear, 1, "raw external data"),
        ];
        let entry = |(kind, bit, name): (FeatureKind, u8, &str)| FeatureName {
            kind: kind.code(),
            bit,
            name: name.as_bytes().to_vec(),
        };
        Self { entries: entries.into_iter().map(entry).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_fill_its_entry_and_leftovers_are_no_entry() {
        let mut data = vec![2, 9];
        data.extend([b'x'; 46]);
        data.extend([0; 47]);
        let table = FeatureNameTable::decode(&data);
        assert_eq!(table.entries.len(), 1);
        assert_eq!(table.lookup(FeatureKind::Autoclear, 9), Some("x".repeat(46).as_str()));
        assert_eq!(table.lookup(FeatureKind::Compatible, 9), None);
        assert_eq!(table.encode(), data[..48]);
    }

    #[test]
    fn a_name_that_is_no_text_is_no_name() {
        let entry = |name: &[u8]| FeatureName { kind: 0, bit: 7, name: name.to_vec() };
        for name in [&b""[..], b"\xff\xfe"] {
            assert_eq!(FeatureNameTable { entries: vec![entry(name)] }.lookup(FeatureKind::Incompatible, 7), None);
        }
    }
}
