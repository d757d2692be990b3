//! Opening a chain from its top.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::format::{HeaderCluster, Limits};
use crate::image::{Image, OpenOptions, RawImage};
use crate::storage::{Access, FileSystem, HostFileSystem, LockMode, Storage};

use super::policy::{Link, Opened, Policy, Seen};
use super::{Chain, Error, Format, Layer, Node, Result};

/// The four bytes that a qcow2 file starts with.
const MAGIC: [u8; 4] = *b"QFI\xfb";

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
    /// The locks taken; [`LockMode::None`] looks without any. Writable layers take [`LockMode::Write`] unless `None`,
    /// all others [`LockMode::Read`].
    pub lock: LockMode,
    /// The most layers (256).
    pub max_depth: usize,
    /// What each image may claim.
    pub limits: Limits,
    /// Whether a backing file without a recorded format may be taken for what its content says (off). A guest can write
    /// a qcow2 header into a raw disk, and so make its next start read any file that the policy allows.
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

impl ChainOptions {
    /// The same with another policy.
    #[must_use]
    pub fn with_policy(mut self, policy: Policy) -> Self {
        self.policy = policy;
        self
    }

    /// The same, following backing files beneath one directory.
    #[must_use]
    pub fn beneath(self, directory: impl Into<PathBuf>) -> Self {
        self.with_policy(Policy::Beneath(vec![directory.into()]))
    }

    /// The same with another format of the top.
    #[must_use]
    pub fn with_format(mut self, format: Format) -> Self {
        self.format = format;
        self
    }

    /// The same with so many layers from the top opened for writing.
    #[must_use]
    pub fn with_writable(mut self, layers: usize) -> Self {
        self.writable = layers;
        self
    }

    /// The same with other locks.
    #[must_use]
    pub fn with_lock(mut self, lock: LockMode) -> Self {
        self.lock = lock;
        self
    }

    /// The same with another limit of layers.
    #[must_use]
    pub fn with_max_depth(mut self, layers: usize) -> Self {
        self.max_depth = layers;
        self
    }

    /// The same with other limits of each image.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// The same, taking backing files without a recorded format for what their content says, or not.
    #[must_use]
    pub fn with_probe(mut self, probe: bool) -> Self {
        self.probe = probe;
        self
    }

    fn access(&self, index: usize) -> Access {
        let write = index < self.writable;
        let lock = match self.lock {
            LockMode::None => LockMode::None,
            _ if write => LockMode::Write,
            _ => LockMode::Read,
        };
        if write { Access::write().with_lock(lock) } else { Access::read().with_lock(lock) }
    }

    fn open_node(&self, index: usize, storage: Arc<dyn Storage>, format: Format) -> Result<Node> {
        let write = index < self.writable;
        let options = OpenOptions::default().with_write(write).with_limits(self.limits.clone());
        Ok(match format {
            Format::Qcow2 => Node::Qcow2(Image::open(storage, &options)?),
            Format::Raw => Node::Raw(RawImage::open(storage)?),
        })
    }

    /// The recorded format of a backing file; `None` where its content may tell.
    fn recorded_format(&self, link: Link<'_>, header: &HeaderCluster) -> Result<Option<Format>> {
        match header.backing_format() {
            Some(name) => match Format::from_name(name) {
                Some(format) => Ok(Some(format)),
                None => Err(Error::UnsupportedFormat {
                    file: link.file(),
                    backing: link.backing(),
                    format: String::from_utf8_lossy(name).into_owned(),
                }),
            },
            None if self.probe => Ok(None),
            None => Err(Error::UnknownFormat { file: link.file(), backing: link.backing() }),
        }
    }
}

/// What the content of a backing file looks like.
fn probe(storage: &dyn Storage) -> Result<Format> {
    let mut magic = [0; MAGIC.len()];
    storage.read_at(&mut magic, 0)?;
    Ok(if magic == MAGIC { Format::Qcow2 } else { Format::Raw })
}

impl Chain {
    /// Opens a chain from its top: images are opened and locked from the top down, each backing file as the policy
    /// allows and in the format that its overlay records.
    ///
    /// # Errors
    /// [`Error::Refused`] for a backing file that the policy forbids, [`Error::Loop`], [`Error::Depth`],
    /// [`Error::UnknownFormat`], [`Error::UnsupportedFormat`]; [`Error::Storage`] where a file cannot be opened or is
    /// locked; [`Error::Image`] where it is no valid image.
    ///
    /// ```no_run
    /// use qcow2_chain::chain::{Chain, ChainOptions};
    ///
    /// let chain = Chain::open("/images/vm.qcow2", &ChainOptions::default().beneath("/images"))?;
    /// println!("{}", chain.describe()?);
    /// # Ok::<(), qcow2_chain::chain::Error>(())
    /// ```
    pub fn open(path: impl AsRef<Path>, options: &ChainOptions) -> Result<Self> {
        let names: Arc<dyn FileSystem> = Arc::new(HostFileSystem);
        Self::open_in(&names, path.as_ref(), options)
    }

    /// As [`Chain::open`], on other names than the operating system's.
    ///
    /// # Errors
    /// As [`Chain::open`].
    pub fn open_in(names: &Arc<dyn FileSystem>, path: &Path, options: &ChainOptions) -> Result<Self> {
        let opened_in = Arc::clone(names);
        let names = &**names;
        let mut seen = Seen::default();
        let storage = names.open(path, &options.access(0))?;
        seen.insert(names, path, &*storage);
        let node = options.open_node(0, storage, options.format)?;
        let top = Layer { node, path: path.to_owned() };
        let mut below = Vec::new();
        while let Some(layer) = next_layer(names, below.last().unwrap_or(&top), 1 + below.len(), options, &mut seen)? {
            below.push(layer);
        }
        Ok(Self { names: Some(opened_in), ..Self::from_layers(top, below) })
    }
}

/// Opens what an image is over, if it is over anything, as the layer of this index.
fn next_layer(
    names: &dyn FileSystem,
    over: &Layer,
    index: usize,
    options: &ChainOptions,
    seen: &mut Seen,
) -> Result<Option<Layer>> {
    let Some(image) = over.node.as_qcow2() else { return Ok(None) };
    let header = image.header();
    let Some(name) = &header.backing_file else { return Ok(None) };
    let link = Link { image: &over.path, name };
    link.target()?;
    if index >= options.max_depth {
        return Err(Error::Depth { file: link.file(), limit: options.max_depth });
    }
    options.policy.check(names, link)?;
    let format = options.recorded_format(link, &header)?;
    let Opened { storage, path } = options.policy.open(names, link, &options.access(index), seen)?;
    if !seen.insert(names, &path, &*storage) {
        return Err(Error::Loop { file: link.file(), backing: link.backing() });
    }
    let format = format.map_or_else(|| probe(&*storage), Ok)?;
    let node = options.open_node(index, storage, format)?;
    Ok(Some(Layer { node, path }))
}
