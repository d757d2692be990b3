//! The library's side of a differential test: it does the same things to the same images as QEMU.

use std::path::Path;
use std::sync::Arc;

use qcow2_chain::format::{ClusterBits, CompressionType, GuestOffset, RefcountOrder, Version};
use qcow2_chain::image::{Backing, CreateOptions, Extent, Image, OpenOptions, Preallocation, ResizeOptions, Result};
use qcow2_chain::storage::MemoryStorage;

use super::recipe::{Op, RandomImage, Shape, noise};

/// A backing file given by what it holds.
#[derive(Clone, Debug)]
pub struct Bytes(pub Vec<u8>);

impl Backing for Bytes {
    fn read_at(&self, buf: &mut [u8], offset: GuestOffset) -> Result<()> {
        let at = usize::try_from(offset.get()).unwrap().min(self.0.len());
        let have = (self.0.len() - at).min(buf.len());
        buf[..have].copy_from_slice(&self.0[at..at + have]);
        buf[have..].fill(0);
        Ok(())
    }
}

/// An image of the file system, open in memory, and what lies beneath it.
#[derive(Debug)]
pub struct Ours {
    pub image: Image,
    storage: Arc<MemoryStorage>,
    beneath: Option<Bytes>,
}

impl Ours {
    /// Takes an image file into memory and opens it.
    pub fn open(path: &Path, write: bool, beneath: Option<&Bytes>) -> Self {
        let bytes = std::fs::read(path).expect("the image is read");
        let storage = Arc::new(MemoryStorage::with_bytes(path.to_string_lossy(), bytes));
        let image = Image::open(storage.clone(), &OpenOptions::default().with_write(write));
        let image = image.unwrap_or_else(|error| panic!("{} opens: {error}", path.display()));
        Self { image, storage, beneath: beneath.cloned() }
    }

    /// Creates an image in memory; `backing` is the name and format of a backing file, and what it holds.
    pub fn create(name: &str, shape: &Shape, backing: Option<(&Path, &Bytes)>) -> Self {
        let storage = Arc::new(MemoryStorage::new(name));
        let mut options = create_options(shape);
        options.backing =
            backing.map(|(path, _)| (path.to_string_lossy().into_owned().into_bytes(), b"qcow2".to_vec()));
        let image = Image::create(storage.clone(), &options);
        let image = image.unwrap_or_else(|error| panic!("{} is created: {error}", shape.options()));
        Self { image, storage, beneath: backing.map(|(_, bytes)| bytes.clone()) }
    }

    /// Closes the image and puts it into the file system, over what is there.
    pub fn close(self, path: &Path) {
        self.image.close().expect("the image closes");
        std::fs::write(path, self.storage.to_vec()).expect("the image is written");
    }

    /// Closes the image and opens it again.
    pub fn reopen(&mut self) {
        let open = || Image::open(self.storage.clone(), &OpenOptions::default().with_write(true)).expect("opens again");
        let idle =
            Image::create(Arc::new(MemoryStorage::new("idle")), &CreateOptions::default()).expect("an empty image");
        std::mem::replace(&mut self.image, idle).close().expect("the image closes");
        self.image = open();
    }

    /// Does one thing to the image. What only QEMU does (compression, snapshots, bitmaps) is none of this.
    pub fn apply(&self, op: &Op) {
        let image = &self.image;
        let at = |range: &std::ops::Range<u64>| (GuestOffset::new(range.start), range.end - range.start);
        let write = |range: &std::ops::Range<u64>, bytes: &[u8]| match &self.beneath {
            Some(beneath) => image.write_at_over(bytes, at(range).0, beneath),
            None => image.write_at(bytes, at(range).0),
        };
        let done = match op {
            Op::Fill(range, byte) => write(range, &vec![*byte; usize::try_from(at(range).1).unwrap()]),
            Op::Noise(range) => {
                let len = usize::try_from(at(range).1).unwrap();
                write(range, &noise().repeat(len / noise().len() + 1)[..len])
            }
            Op::Zero(range) | Op::ZeroUnmap(range) => match &self.beneath {
                Some(beneath) => image.write_zeroes_at_over(at(range).0, at(range).1, beneath),
                None => image.write_zeroes_at(at(range).0, at(range).1),
            },
            Op::Discard(range) => image.discard_at(at(range).0, at(range).1),
            Op::Compressed(..) | Op::CompressedNoise(..) | Op::Snapshot(_) | Op::Bitmap(_) => {
                unreachable!("only QEMU does this: {op:?}")
            }
        };
        done.unwrap_or_else(|error| panic!("{op:x?}: {error}"));
    }

    /// Changes the virtual size.
    ///
    /// # Errors
    /// What the library says.
    pub fn resize(&self, size: u64) -> Result<()> {
        let options = ResizeOptions::default().with_shrink(true);
        match &self.beneath {
            Some(beneath) => self.image.resize_over(size, &options, beneath, beneath.0.len() as u64),
            None => self.image.resize(size, &options),
        }
    }

    /// Reads a range as the guest would.
    pub fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut buf = vec![0xa5; len];
        let mut holes = Vec::new();
        self.image.read_present(&mut buf, GuestOffset::new(offset), &mut holes).expect("the image is read");
        for (start, len) in holes {
            let hole = &mut buf[start..start + len];
            match &self.beneath {
                Some(beneath) => {
                    beneath.read_at(hole, GuestOffset::new(offset + start as u64)).expect("bytes are read")
                }
                None => hole.fill(0),
            }
        }
        buf
    }

    /// All extents.
    pub fn extents(&self) -> Vec<Extent> {
        let extents = self.image.extents(0..self.image.virtual_size());
        extents.map(|extent| extent.expect("the extents are read")).collect()
    }
}

/// What the library is told where `qemu-img create -o` is told the shape.
pub fn create_options(shape: &Shape) -> CreateOptions {
    CreateOptions::new(shape.size)
        .with_version(if shape.compat == "1.1" { Version::V3 } else { Version::V2 })
        .with_cluster_bits(ClusterBits::from_size(shape.cluster_size).expect("a size that QEMU takes"))
        .with_refcount_order(RefcountOrder::from_bits(shape.refcount_bits).expect("a width that QEMU takes"))
        .with_extended_l2(shape.extended_l2)
        .with_lazy_refcounts(shape.lazy_refcounts)
        .with_compression_type(match shape.compression_type {
            "zstd" => CompressionType::Zstd,
            _ => CompressionType::Deflate,
        })
        .with_preallocation(match shape.preallocation {
            "metadata" => Preallocation::Metadata,
            "falloc" => Preallocation::Falloc,
            "full" => Preallocation::Full,
            _ => Preallocation::Off,
        })
}

/// Lets the library do random things to an image, and the model follow. Returns the image, still open.
pub fn apply_random(ours: &mut Ours, image: &mut RandomImage, rng: &mut super::rng::Rng, count: u64) {
    for _ in 0..count {
        let op = match image.random_op(rng) {
            Op::Compressed(range, byte) => Op::Fill(range, byte),
            Op::CompressedNoise(range) => Op::Noise(range),
            Op::Snapshot(_) | Op::Bitmap(_) => {
                ours.reopen();
                continue;
            }
            op => op,
        };
        ours.apply(&op);
        image.follow(&op);
        image.ops.push(op);
    }
}
