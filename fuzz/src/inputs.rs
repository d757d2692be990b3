//! What each target takes, as `arbitrary` makes it of the fuzzer's bytes. The seeds are checked against the same types.

use arbitrary::Arbitrary;

use crate::records::Change;
use crate::{Hostile, Step};

/// Of `header_decode`: the length that the file claims, and its first bytes.
pub type Header<'a> = (u64, &'a [u8]);

/// Of `tables_decode`.
#[derive(Debug, Arbitrary)]
pub struct Tables<'a> {
    /// Above 9, modulo what there is.
    pub cluster_bits: u8,
    /// Modulo what there is.
    pub refcount_order: u8,
    /// Entries of 16 bytes.
    pub extended_l2: bool,
    /// Version 2.
    pub version_2: bool,
    /// The number of entries that a header claims.
    pub count: u32,
    /// A descriptor, and the place of a table.
    pub words: [u64; 2],
    /// The table.
    pub bytes: &'a [u8],
}

/// Of `open_and_walk`.
#[derive(Debug, Arbitrary)]
pub enum Walk<'a> {
    /// An image and what happens to it.
    Made(Hostile),
    /// Bytes as they are.
    Raw(&'a [u8]),
}

/// Of `open_and_write`: the image, what is done to it, and whether it is repaired first.
pub type Write = (Hostile, Vec<Step>, bool);

/// Of `repair`: the image, and whether all is repaired or leaks alone.
pub type Repair = (Hostile, bool);

/// How an image of `chain_open` names the one beneath.
#[derive(Debug, Arbitrary)]
pub enum Name<'a> {
    /// One of the names that mean something.
    Called(u8),
    /// Any.
    Any(&'a [u8]),
}

/// What an image of `chain_open` stands on.
#[derive(Debug, Arbitrary)]
pub struct Link<'a> {
    /// The name.
    pub name: Name<'a>,
    /// Whether it is called raw.
    pub raw: bool,
}

/// Of `chain_open`.
#[derive(Debug, Arbitrary)]
pub struct Files<'a> {
    /// The images; the first is the top.
    pub files: [(Hostile, Option<Link<'a>>); 3],
    /// Where the others lie.
    pub places: [u8; 2],
    /// What may be opened.
    pub policy: u8,
    /// Whether the top is opened for writing.
    pub writable: bool,
    /// Whether formats are guessed.
    pub probe: bool,
}

/// Of `read_compressed`.
#[derive(Debug, Arbitrary)]
pub struct Compressed<'a> {
    /// Above 9, modulo what there is.
    pub cluster_bits: u8,
    /// Zstd in place of deflate.
    pub zstd: bool,
    /// Entries of 16 bytes.
    pub extended_l2: bool,
    /// One less than how many clusters, modulo 8.
    pub clusters: u8,
    /// What is compressed, over and over.
    pub content: &'a [u8],
    /// Changes of L2 entries: which, whether its second word, and the bits that flip.
    pub entries: Vec<(u8, bool, u64)>,
    /// Changes of bytes from the first stream on: where, and what they become.
    pub streams: Vec<(u16, u8)>,
    /// The file is cut so many bytes before its end.
    pub cut: u16,
}

/// What `merge` does to a chain.
#[derive(Clone, Copy, Debug, Arbitrary)]
#[expect(missing_docs, reason = "they are the options of the merges")]
pub enum Merge {
    Commit { base: bool, empty: bool },
    Pull { base: u8 },
    Rebase { layer: bool, drop_equal: bool },
    Convert { compress: bool },
}

/// Of `merge`.
#[derive(Debug, Arbitrary)]
pub struct Merges {
    /// The layers from the top down.
    pub layers: [Hostile; 3],
    /// Whether the third is there.
    pub three: bool,
    /// Whether they are repaired first.
    pub repair: bool,
    /// What is done to the top.
    pub steps: [Vec<Step>; 2],
    /// What is done to the chain.
    pub merges: [Merge; 2],
}

/// A record of `journal_and_catalogue`.
#[derive(Debug, Arbitrary)]
pub enum Bytes<'a> {
    /// A sound one with these changes.
    Changed(Vec<Change>),
    /// Any.
    Raw(&'a [u8]),
}

/// Of `journal_and_catalogue`.
#[derive(Debug, Arbitrary)]
pub struct Records<'a> {
    /// Which world, modulo what there is.
    pub world: u8,
    /// How many records the journal has.
    pub records: u8,
    /// The catalogue.
    pub catalogue: Bytes<'a>,
    /// The journal.
    pub journal: Bytes<'a>,
    /// The journal ends an eighth of so many bytes early.
    pub torn: u8,
    /// The operation is cancelled before it is recovered.
    pub cancel: bool,
}
