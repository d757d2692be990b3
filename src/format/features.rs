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

    /// Whether all of `bits` are set.
    #[must_use]
    pub const fn has(self, bits: u64) -> bool {
        self.0 & bits == bits
    }
}

// OWNER TO ADD: FeatureNameTable (decode/encode of 48-byte entries, lookup(kind, bit) -> Option<&str>), the table QEMU
// writes.
