//! Hostile images for the fuzz targets: a valid image made by the library itself, then some fields changed. Random bytes
//! would hardly ever get past the header; these images reach every table.

use std::sync::Arc;

use arbitrary::{Arbitrary, Result, Unstructured};
use qcow2_chain::format::{ClusterBits, CompressionType, GuestOffset, Limits, RefcountOrder, Version};
use qcow2_chain::image::{CreateOptions, Image};
use qcow2_chain::storage::MemoryStorage;

pub mod inputs;
pub mod records;
mod watched;

pub use watched::WatchedFileSystem;

/// The memory that an image may ask for is far below what the fuzzer allows, so that an unchecked allocation is seen.
pub fn limits() -> Limits {
    let mut limits = Limits::default();
    limits.max_l1_bytes = 1 << 20;
    limits.max_reftable_bytes = 1 << 20;
    limits.cache_bytes = 1 << 20;
    limits
}

/// How an image comes to be.
#[derive(Debug)]
pub struct Hostile {
    origin: Origin,
    mutations: Vec<Mutation>,
    /// The file is cut here, in 1/256 of its length.
    cut: Option<u8>,
}

/// What it is before anything hostile happens to it.
#[derive(Debug)]
enum Origin {
    /// An image that the library makes.
    Made { options: CreateOptions, steps: Vec<Step> },
    /// Bytes. The seeds have images here with what takes more than steps: compressed clusters, snapshots, bitmaps.
    Given(Vec<u8>),
}

/// One thing done to an image. The offsets are taken modulo the virtual size.
#[derive(Clone, Copy, Debug, Arbitrary)]
pub enum Step {
    /// Some bytes of one value are written.
    Write { offset: u32, len: u16, byte: u8 },
    /// Zeroes are written.
    Zero { offset: u32, len: u32 },
    /// A range is given back.
    Discard { offset: u32, len: u32 },
}

/// One field changed.
#[derive(Clone, Copy, Debug, Arbitrary)]
struct Mutation {
    place: VolumeFiles,
    value: Value,
}

/// Where the field stands.
#[derive(Clone, Copy, Debug, Arbitrary)]
enum VolumeFiles {
    /// In the header or its extensions, so many bytes from the start: a field of four bytes, or of eight.
    Header { offset: u8, wide: bool },
    /// The given word of the given cluster; both modulo what there is.
    Word { cluster: u8, word: u16 },
}

/// What the field becomes.
#[derive(Clone, Copy, Debug, Arbitrary)]
enum Value {
    Zero,
    One,
    Max,
    HalfMax,
    OneMore,
    OneLess,
    Flipped(u8),
    /// What stands in another word: tables that point at each other, or at themselves.
    CopyOf {
        cluster: u8,
        word: u16,
    },
    Any(u64),
}

impl<'a> Arbitrary<'a> for Hostile {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let origin = if u.arbitrary::<u8>()? % 8 == 7 {
            let len = u.arbitrary::<u32>()? as usize;
            Origin::Given(u.bytes(len.min(u.len()))?.to_vec())
        } else {
            Origin::made(u)?
        };
        let mutations = (0..few(u)?).map(|_| u.arbitrary()).collect::<Result<_>>()?;
        let cut = if u.ratio(1, 8)? { Some(u.arbitrary()?) } else { None };
        Ok(Self { origin, mutations, cut })
    }
}

/// How many of something there are.
fn few(u: &mut Unstructured<'_>) -> Result<usize> {
    Ok(u.arbitrary::<usize>()? % 9)
}

impl Origin {
    fn made(u: &mut Unstructured<'_>) -> Result<Self> {
        let mut options = CreateOptions::default();
        let version_2 = u.ratio(1, 4)?;
        options.extended_l2 = !version_2 && u.ratio(1, 3)?;
        let bits = if options.extended_l2 { u.int_in_range(14..=16)? } else { u.int_in_range(9..=16)? };
        options.cluster_bits = ClusterBits::new(bits).unwrap_or_default();
        options.size = u64::from(u.int_in_range(1_u32..=4096)?) << 9;
        if version_2 {
            options.version = Version::V2;
        } else {
            options.refcount_order = RefcountOrder::new(u.int_in_range(0..=6)?).unwrap_or_default();
            options.lazy_refcounts = u.arbitrary()?;
            options.compression_type = if u.arbitrary()? { CompressionType::Zstd } else { CompressionType::Deflate };
        }
        if u.ratio(1, 4)? {
            options = options.with_backing("base.raw", "raw");
        }
        let steps = (0..few(u)?).map(|_| u.arbitrary()).collect::<Result<_>>()?;
        Ok(Self::Made { options, steps })
    }
}

impl Hostile {
    /// The same image over another backing file, or over none. One that is given keeps what it names.
    pub fn over(mut self, backing: Option<(Vec<u8>, Vec<u8>)>) -> Self {
        if let Origin::Made { options, .. } = &mut self.origin {
            options.backing = backing;
        }
        self
    }

    /// The bytes of the image.
    ///
    /// # Panics
    /// Where the library cannot make the image before anything hostile happened to it.
    pub fn bytes(&self) -> Vec<u8> {
        let sound = self.sound();
        self.damage(sound)
    }

    /// Whether its bytes are the input's: then nobody says that it is sound.
    pub fn is_given(&self) -> bool {
        matches!(self.origin, Origin::Given(_))
    }

    /// The bytes of the image before anything hostile happens to it.
    ///
    /// # Panics
    /// Where the library cannot make it.
    pub fn sound(&self) -> Vec<u8> {
        let (options, steps) = match &self.origin {
            Origin::Made { options, steps } => (options, steps),
            Origin::Given(bytes) => return bytes.clone(),
        };
        let storage = Arc::new(MemoryStorage::new("hostile"));
        let image = Image::create(storage.clone(), options).expect("a valid image is created");
        for step in steps {
            // An overlay without its backing file refuses some of it, which is no finding.
            let _ = step.apply(&image);
        }
        image.close().expect("a valid image is closed");
        storage.to_vec()
    }

    /// What becomes of an image of this shape.
    pub fn damage(&self, mut bytes: Vec<u8>) -> Vec<u8> {
        // As the header has it, or as everybody has it where that is none.
        let bits = read(&bytes, 20, 4);
        let cluster_size = 1 << if (9..=21).contains(&bits) { bits } else { 16 };
        for mutation in &self.mutations {
            mutation.apply(&mut bytes, cluster_size);
        }
        if let Some(cut) = self.cut {
            bytes.truncate(bytes.len() * usize::from(cut) / 256);
        }
        bytes
    }
}

impl Step {
    /// Does it.
    ///
    /// # Errors
    /// What the image says.
    pub fn apply(self, image: &Image) -> qcow2_chain::image::Result<()> {
        let size = image.virtual_size().max(1);
        let clip = |offset: u32, len: u64| {
            let offset = u64::from(offset) % size;
            (GuestOffset::new(offset), len.min(size - offset))
        };
        match self {
            Self::Write { offset, len, byte } => {
                let (offset, len) = clip(offset, u64::from(len));
                image.write_at(&vec![byte; len as usize], offset)
            }
            Self::Zero { offset, len } => {
                let (offset, len) = clip(offset, u64::from(len));
                image.write_zeroes_at(offset, len)
            }
            Self::Discard { offset, len } => {
                let (offset, len) = clip(offset, u64::from(len));
                image.discard_at(offset, len)
            }
        }
    }
}

impl Mutation {
    fn apply(self, bytes: &mut [u8], cluster_size: usize) {
        let (at, width) = match self.place {
            VolumeFiles::Header { offset, wide: false } => (usize::from(offset) & !3, 4),
            VolumeFiles::Header { offset, wide: true } => (usize::from(offset) & !7, 8),
            VolumeFiles::Word { cluster, word } => (word_at(bytes, cluster_size, cluster, word), 8),
        };
        let old = read(bytes, at, width);
        let new = match self.value {
            Value::Zero => 0,
            Value::One => 1,
            Value::Max => u64::MAX,
            Value::HalfMax => u64::MAX >> (64 - width * 8 + 1),
            Value::OneMore => old.wrapping_add(1),
            Value::OneLess => old.wrapping_sub(1),
            Value::Flipped(bit) => old ^ 1 << (bit % 64),
            Value::CopyOf { cluster, word } => read(bytes, word_at(bytes, cluster_size, cluster, word), 8),
            Value::Any(value) => value,
        };
        if let Some(field) = bytes.get_mut(at..at + width) {
            field.copy_from_slice(&new.to_be_bytes()[8 - width..]);
        }
    }
}

/// Where a word of a cluster stands. Every other word is looked for at the start of its cluster, where entries are.
fn word_at(bytes: &[u8], cluster_size: usize, cluster: u8, word: u16) -> usize {
    let clusters = (bytes.len() / cluster_size).max(1);
    let words = if word % 2 == 0 { cluster_size / 8 } else { 8 };
    usize::from(cluster) % clusters * cluster_size + usize::from(word / 2) % words * 8
}

fn read(bytes: &[u8], at: usize, width: usize) -> u64 {
    let field = bytes.get(at..at + width).unwrap_or_default();
    field.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}
