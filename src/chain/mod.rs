//! Several images as one disk. OWNER: chain helper

mod error;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use error::{Error, Result};

use crate::format::{GuestOffset, Limits};
use crate::image::{ExtentKind, Image, RawImage};
use crate::storage::{LockMode, Names};

/// The format of a chain's member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// qcow2.
    Qcow2,
    /// Raw.
    Raw,
}

/// Which of the names that images write of their backing files are opened.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Policy {
    /// None: an image with a backing file is an error.
    #[default]
    Refuse,
    /// Those that lie beneath one of these directories; enforced by the kernel where it can.
    Beneath(Vec<PathBuf>),
    /// Exactly these files, whatever name an image uses for them.
    List(Vec<PathBuf>),
    /// Any regular file or block device. Only for images that nobody hostile could have written.
    Any,
}

/// How a chain is opened.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ChainOptions {
    /// Which backing files may be opened.
    pub policy: Policy,
    /// The format of the top; never guessed.
    pub format: Format,
    /// How many layers from the top are opened for writing: 0 none, 1 the top, 2 the top and its backing file, ...
    pub writable: usize,
    /// The locks taken; [`LockMode::None`] looks without any. Writable layers take [`LockMode::Write`] unless `None`.
    pub lock: LockMode,
    /// The most layers (256).
    pub max_depth: usize,
    /// What each image may claim.
    pub limits: Limits,
    /// Whether a backing file without a recorded format may be taken for what its content says (off).
    pub probe: bool,
}

impl Default for ChainOptions {
    fn default() -> Self {
        Self {
            policy: Policy::Refuse,
            format: Format::Qcow2,
            writable: 0,
            lock: LockMode::Read,
            max_depth: 256,
            limits: Limits::default(),
            probe: false,
        }
    }
}

/// One image of a chain.
#[derive(Debug)]
pub enum Node {
    /// A qcow2 image.
    Qcow2(Image),
    /// A raw image.
    Raw(RawImage),
}

/// One layer of a chain: the image and how it was reached.
#[derive(Debug)]
pub struct Layer {
    /// The image.
    pub node: Node,
    /// The path it was opened by.
    pub path: PathBuf,
}

/// Several images as one disk, the top first.
#[derive(Debug)]
pub struct Chain {
    layers: Vec<Layer>,
}

/// A run of guest addresses that one layer decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChainExtent {
    /// Where it starts.
    pub guest: GuestOffset,
    /// Its length in bytes.
    pub len: u64,
    /// The deciding layer, 0 for the top; `None` where no layer holds anything and zeroes are read.
    pub layer: Option<usize>,
    /// What that layer holds; never [`ExtentKind::Unallocated`] with a layer.
    pub kind: ExtentKind,
}

impl Chain {
    /// Opens a chain from its top.
    ///
    /// # Errors
    /// Fill in.
    pub fn open(_path: impl AsRef<Path>, _options: &ChainOptions) -> Result<Self> {
        todo!()
    }

    /// As [`Chain::open`], on other names than the operating system's.
    ///
    /// # Errors
    /// As [`Chain::open`].
    pub fn open_in(_names: &Arc<dyn Names>, _path: &Path, _options: &ChainOptions) -> Result<Self> {
        todo!()
    }

    /// The layers, the top first.
    #[must_use]
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The virtual size: the top's.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        todo!()
    }

    /// Reads guest data.
    ///
    /// # Errors
    /// Fill in.
    pub fn read_at(&self, _buf: &mut [u8], _offset: GuestOffset) -> Result<()> {
        todo!()
    }

    /// Writes guest data to the top.
    ///
    /// # Errors
    /// Fill in.
    pub fn write_at(&self, _buf: &[u8], _offset: GuestOffset) -> Result<()> {
        todo!()
    }

    /// What the layers from `top` (0) down to `bottom` (inclusive) decide of a range, coalesced and lazily.
    pub fn extents(&self, _range: Range<u64>) -> impl Iterator<Item = Result<ChainExtent>> + '_ {
        std::iter::from_fn(|| todo!())
    }
}
