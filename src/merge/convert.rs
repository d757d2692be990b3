//! Convert: a chain becomes one image that needs no other.

mod header_last;
mod plan;
mod store;
mod workers;

use std::sync::Arc;

use crate::chain::in_order;
use crate::chain::{Chain, Layer, Node};
use crate::format::GuestOffset;
use crate::image::{CreateOptions, Image, Preallocation, RawImage};
use crate::storage::{self, Storage};

use super::absorb::weigh;
use super::copy::{Copier, Report};
use super::target::Target;
use super::{Error, Result};
use crate::progress::{Phase, Progress, Step};
use header_last::HeaderLast;
use plan::Plan;
use store::Store;
use workers::{Look, look_at_all};

/// What a chain is converted to.
#[derive(Debug)]
pub enum ConvertTarget {
    /// A new qcow2 image on an empty storage. Its size is the chain's, whatever the options say; it has no backing file.
    Qcow2(Arc<dyn Storage>, CreateOptions),
    /// A new raw image on an empty storage, or on one of fixed size that has room.
    Raw(Arc<dyn Storage>),
    /// The top of this chain, which must be open for writing and as large as the source at least. What it held is lost;
    /// what it is longer, it keeps.
    Existing(Chain),
}

/// How to convert.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ConvertOptions {
    /// Whether clusters are compressed (qcow2 only), by the type that the image's options name.
    pub compress: bool,
    /// How many threads read, look for zeroes and compress; 0 for as many as there are processors.
    pub threads: usize,
    /// Runs of zeroes from this length on, in bytes, are not written; clusters of zeroes are not allocated at all. 0
    /// writes everything, also what the source does not hold.
    pub sparse: u64,
    /// Leaves data to the kernel unseen, which shares blocks where the file system can. Zeroes among it are not found.
    pub offload: bool,
}

impl Default for ConvertOptions {
    /// As `qemu-img convert`: not compressed, zeroes found from 4 KiB on.
    fn default() -> Self {
        Self { compress: false, threads: 0, sparse: 4096, offload: false }
    }
}

impl ConvertOptions {
    /// The same, compressed or not.
    #[must_use]
    pub fn with_compress(mut self, compress: bool) -> Self {
        self.compress = compress;
        self
    }

    /// The same with another number of threads.
    #[must_use]
    pub fn with_threads(mut self, threads: usize) -> Self {
        self.threads = threads;
        self
    }

    /// The same with another length of zeroes that counts.
    #[must_use]
    pub fn with_sparse(mut self, sparse: u64) -> Self {
        self.sparse = sparse;
        self
    }

    /// The same, with data left to the kernel or not.
    #[must_use]
    pub fn with_offload(mut self, offload: bool) -> Self {
        self.offload = offload;
        self
    }
}

/// Writes what the guest sees of a chain into one image that needs no other. Only data is read: what no layer holds and
/// what is known to be zero costs nothing. `Ok` means durable.
///
/// The same source and options give the same bytes, whatever the number of threads. A new qcow2 image has no valid header
/// until all else is durable: what a crash or an error leaves is no image. A raw file that was not finished looks like any
/// other: remove it.
///
/// ```
/// use std::sync::Arc;
///
/// use qcow2_chain::chain::{Chain, Layer, Node};
/// use qcow2_chain::format::GuestOffset;
/// use qcow2_chain::image::{CreateOptions, Image, OpenOptions};
/// use qcow2_chain::merge::{ConvertOptions, ConvertTarget, convert};
/// use qcow2_chain::storage::MemoryStorage;
///
/// let image = Image::create(Arc::new(MemoryStorage::new("disk")), &CreateOptions::new(10 << 20))?;
/// image.write_at(&[7; 100_000], GuestOffset::new(5 << 20))?;
/// let source = Chain::from_layers(Layer { node: Node::Qcow2(image), path: "disk".into() }, []);
///
/// let storage = Arc::new(MemoryStorage::new("copy"));
/// let target = ConvertTarget::Qcow2(storage.clone(), CreateOptions::default());
/// let report = convert(&source, target, &ConvertOptions::default().with_compress(true), &())?;
/// assert_eq!(report.copied, 2 * 65536);
/// assert!(storage.to_vec().len() < 400_000);
///
/// let copy = Image::open(storage, &OpenOptions::default())?;
/// let mut byte = [0];
/// copy.read_at(&mut byte, GuestOffset::new(5 << 20))?;
/// assert_eq!(byte, [7]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Nobody may write the source meanwhile.
///
/// # Errors
/// [`Error::Refused`] for options and targets that do not go together, for a target that is one of the source's files, is
/// not empty, or is too small; [`Error::Image`] with [`crate::image::Error::Unsupported`] for encrypted sources and those with an
/// external data file; [`Error::NoSpace`] where it is known before the first write; [`Error::Cancelled`]; and what reading
/// and writing the images give.
pub fn convert(
    source: &Chain,
    target: ConvertTarget,
    options: &ConvertOptions,
    progress: &dyn Progress,
) -> Result<Report> {
    refuse_unfit(source, &target, options)?;
    let size = source.virtual_size();
    let (receiver, header) = prepare(target, size)?;
    let target = Target::of(&receiver, 0)?;
    let work = weigh(source, &target, source.layers().len(), |_| true)?;
    let total = if options.sparse == 0 { size } else { work.data };
    if options.offload {
        target.check_room(work.new_bytes)?;
    }

    let report = if options.offload {
        let mut copier = Copier::new(source, &target, total, progress);
        for extent in source.extents(0..size) {
            let extent = extent?;
            if !extent.is_zero() {
                copier.take(extent)?;
            }
        }
        copier.finish()?
    } else {
        pipe(source, &target, options, total, progress)?
    };
    progress.step(&Step::new(Phase::Publishing, total, total, target.file()));
    target.flush()?; // barrier: the whole image, before the header that makes it one
    if let Some(header) = header {
        header.write()?;
    }
    Ok(report)
}

/// Reads, looks and compresses on several threads, and writes on this one, in order.
fn pipe(
    source: &Chain,
    target: &Target<'_>,
    options: &ConvertOptions,
    total: u64,
    progress: &dyn Progress,
) -> Result<Report> {
    let kind = target.image().filter(|_| options.compress).map(|image| image.header().header.compression_type);
    let look = Look { unit: target.unit(), sparse: options.sparse, kind };
    let sort = target.image().is_some() && kind.is_none();
    let plan = Plan::new(source, look.unit, options.sparse == 0, sort);
    let mut store = Store::new(target, source.virtual_size(), total, progress);
    let threads = match options.threads {
        0 => in_order::threads(),
        threads => threads.min(in_order::MAX_THREADS),
    };
    look_at_all(source, plan, &look, threads, &mut |seen| store.take(seen))?;
    store.finish()
}

impl Target<'_> {
    /// What is written whole, or not at all where it is zero.
    fn unit(&self) -> u64 {
        self.image().map_or(4096, |image| image.geometry().cluster_size())
    }
}

/// Makes the target an image that reads as zeroes as far as the source goes; a new qcow2 image keeps its header back.
fn prepare(target: ConvertTarget, size: u64) -> Result<(Chain, Option<Arc<HeaderLast>>)> {
    let alone = |node: Node| {
        let path = node.name().into();
        Chain::from_layers(Layer { node, path }, [])
    };
    match target {
        ConvertTarget::Qcow2(storage, options) => {
            let header = Arc::new(HeaderLast::new(storage));
            let image = Image::create(Arc::clone(&header) as Arc<dyn Storage>, &CreateOptions { size, ..options })?;
            Ok((alone(Node::Qcow2(image)), Some(header)))
        }
        ConvertTarget::Raw(storage) => {
            if storage.is_fixed_size() {
                storage::zero_range(&*storage, 0..size)?;
            } else {
                storage.set_len(size)?;
            }
            Ok((alone(Node::Raw(RawImage::open(storage)?)), None))
        }
        ConvertTarget::Existing(chain) => {
            let target = Target::of(&chain, 0)?;
            target.zero(GuestOffset::ZERO, size)?;
            target.flush()?; // what the clusters held is free from here on
            drop(target);
            Ok((chain, None))
        }
    }
}

/// Refuses what cannot be done before anything is written.
fn refuse_unfit(source: &Chain, target: &ConvertTarget, options: &ConvertOptions) -> Result<()> {
    for layer in source.layers() {
        layer.node.data_access()?;
    }
    let storage = match target {
        ConvertTarget::Qcow2(storage, _) | ConvertTarget::Raw(storage) => storage,
        ConvertTarget::Existing(chain) => chain.top().node.storage(),
    };
    let refused = |why: &str| Err(Error::Refused { file: storage.name().to_owned(), why: why.to_owned() });
    let itself = storage.file_id();
    if itself.is_some() && source.layers().iter().any(|layer| layer.node.storage().file_id() == itself) {
        return refused("the source cannot be converted into one of its own files");
    }
    if options.compress && options.offload {
        return refused("data cannot be compressed unseen");
    }
    if !options.sparse.is_multiple_of(512) {
        return refused("the length of zeroes to look for is not a multiple of 512");
    }
    match target {
        ConvertTarget::Qcow2(_, create) if create.backing.is_some() => refused("a converted image has no backing file"),
        ConvertTarget::Qcow2(_, create) if options.compress && create.preallocation != Preallocation::Off => {
            refused("what is compressed cannot be preallocated")
        }
        ConvertTarget::Raw(_) if options.compress => refused("a raw image cannot be compressed"),
        ConvertTarget::Existing(_) if options.compress => refused("only a new image is written compressed"),
        ConvertTarget::Existing(chain) if chain.virtual_size() < source.virtual_size() => {
            refused("the target is smaller than the source")
        }
        ConvertTarget::Raw(storage) if storage.is_fixed_size() && storage.len()? < source.virtual_size() => {
            Err(storage::Error::NoSpace { name: storage.name().to_owned(), need: source.virtual_size() }.into())
        }
        ConvertTarget::Raw(storage) if !storage.is_fixed_size() && !storage.is_empty()? => {
            refused("a new image needs an empty file")
        }
        _ => Ok(()),
    }
}
