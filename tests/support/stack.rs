//! Small chains in memory, given by the bytes of their files: for tests that break them in every way.

use std::path::PathBuf;
use std::sync::Arc;

use qcow2_chain::chain::{Chain, Layer, Node};
use qcow2_chain::format::{ClusterBits, GuestOffset, RefcountOrder, Version};
use qcow2_chain::image::{CheckOptions, CreateOptions, ExtentKind, Fix, Image, OpenOptions, RawImage, check};
use qcow2_chain::merge::{AfterCommit, CommitOptions, PullOptions, commit, pull};
use qcow2_chain::storage::{MemoryStorage, Storage};

use super::rng::Rng;

/// The files of a chain, the top first; each is called `layer` and its number.
#[derive(Clone, Debug)]
pub struct Stack {
    pub files: Vec<Vec<u8>>,
    raw_base: bool,
}

/// A merge to be made, and made again after it was interrupted.
#[derive(Clone, Copy, Debug)]
pub enum Merge {
    Commit { base: usize, after: AfterCommit, shrink: bool },
    Pull { base: Option<usize> },
}

/// What is wrong with a state, in words.
pub type Verdict = Result<(), String>;

fn wrong(what: impl std::fmt::Debug) -> String {
    format!("{what:?}")
}

fn name(number: usize) -> String {
    format!("layer{number}")
}

pub fn shape(rng: &mut Rng, size: u64) -> CreateOptions {
    let version = if rng.chance(1, 3) { Version::V2 } else { Version::V3 };
    let extended = version == Version::V3 && rng.chance(1, 4);
    let bits = if extended { 14 } else { rng.pick(&[9, 9, 10, 11, 12]) };
    let options = CreateOptions::new(size)
        .with_version(version)
        .with_cluster_bits(ClusterBits::new(bits).unwrap())
        .with_extended_l2(extended);
    match version {
        Version::V3 => options.with_refcount_order(RefcountOrder::new(rng.pick(&[0, 1, 3, 4, 6])).unwrap()),
        Version::V2 => options,
    }
}

impl Stack {
    /// A chain of this depth with random content in every layer.
    pub fn random(rng: &mut Rng, depth: usize) -> Self {
        let mut stack = Self { files: Vec::new(), raw_base: rng.chance(1, 5) };
        if stack.raw_base {
            let len = usize::try_from(rng.within(1..80)).unwrap() * 512;
            stack.files.push(rng.bytes(len));
        }
        while stack.files.len() < depth {
            stack.add_layer(rng);
        }
        stack
    }

    /// Puts a layer with random content on top. The names of those beneath move by one, so it is made with them in place.
    fn add_layer(&mut self, rng: &mut Rng) {
        let size = rng.within(1..80) * 512;
        let depth = self.files.len();
        let mut options = shape(rng, size);
        if depth > 0 {
            let format = if depth == 1 && self.raw_base { "raw" } else { "qcow2" };
            options = options.with_backing(name(1), format);
        }
        let storage = Arc::new(MemoryStorage::new(name(0)));
        Image::create(storage.clone(), &options).expect("create").close().expect("close");
        self.files.insert(0, storage.to_vec());
        self.rename();
        let storages = self.storages();
        let chain = self.open(&storages, 1).expect("the chain opens");
        for _ in 0..rng.within(1..7) {
            let range = rng.range(size, 512);
            let (at, len) = (GuestOffset::new(range.start), range.end - range.start);
            match rng.within(0..8) {
                0..5 => {
                    let mut bytes = rng.bytes(usize::try_from(len).unwrap());
                    bytes[0] = rng.pattern();
                    chain.write_at(&bytes, at).expect("write");
                }
                5..7 => chain.write_zeroes_at(at, len).expect("zero"),
                _ => chain.discard_at(at, len).expect("discard"),
            }
        }
        chain.close().expect("close");
        self.files[0] = storages[0].to_vec();
    }

    /// Lets each layer name the one beneath it.
    fn rename(&mut self) {
        let formats = self.files.len() - 1;
        for number in 0..formats {
            let raw = number + 2 == self.files.len() && self.raw_base;
            let storage = Arc::new(MemoryStorage::with_bytes(name(number), &self.files[number]));
            let image = Image::open(storage.clone(), &OpenOptions::default().with_write(true)).expect("opens");
            let format: &[u8] = if raw { b"raw" } else { b"qcow2" };
            image.set_backing_file(Some(name(number + 1).as_bytes()), Some(format)).expect("renamed");
            drop(image);
            self.files[number] = storage.to_vec();
        }
    }

    /// Each file in memory.
    pub fn storages(&self) -> Vec<Arc<MemoryStorage>> {
        self.files.iter().enumerate().map(|(n, bytes)| Arc::new(MemoryStorage::with_bytes(name(n), bytes))).collect()
    }

    /// The same chain with other bytes in its files.
    pub fn with_files(&self, files: Vec<Vec<u8>>) -> Self {
        Self { files, raw_base: self.raw_base }
    }

    /// Whether the layer of this number is a raw file.
    pub fn is_raw(&self, number: usize) -> bool {
        self.raw_base && number + 1 == self.files.len()
    }

    /// The chain on these storages, with its upper `writable` layers open for writing, as the images name each other now.
    ///
    /// # Errors
    /// What opening says.
    pub fn open<S: Storage + 'static>(&self, storages: &[Arc<S>], writable: usize) -> Result<Chain, String> {
        self.open_from(&seams(storages), 0, writable)
    }

    /// The same on storages of any kind.
    ///
    /// # Errors
    /// What opening says.
    pub fn open_on(&self, storages: &[Arc<dyn Storage>], writable: usize) -> Result<Chain, String> {
        self.open_from(storages, 0, writable)
    }

    fn open_from(&self, storages: &[Arc<dyn Storage>], top: usize, writable: usize) -> Result<Chain, String> {
        let mut layers = Vec::new();
        let mut next = Some(top);
        while let Some(number) = next {
            let storage = storages[number].clone();
            let path = PathBuf::from(name(number));
            if self.is_raw(number) {
                layers.push(Layer { node: Node::Raw(RawImage::open(storage).map_err(wrong)?), path });
                break;
            }
            let write = layers.len() < writable;
            let image = Image::open(storage, &OpenOptions::default().with_write(write)).map_err(wrong)?;
            let backing = image.header().backing_file;
            next = (0..self.files.len()).find(|&other| backing.as_deref() == Some(name(other).as_bytes()));
            if backing.is_some() && next.is_none_or(|next| next <= number) {
                return Err(format!("layer {number} names {backing:?}"));
            }
            layers.push(Layer { node: Node::Qcow2(image), path });
        }
        let mut layers = layers.into_iter();
        let top = layers.next().ok_or("no layers")?;
        Ok(Chain::from_layers(top, layers))
    }

    /// What a guest of the top reads.
    ///
    /// # Errors
    /// What opening and reading say.
    pub fn content(&self) -> Result<Vec<u8>, String> {
        self.content_from(0)
    }

    fn content_from(&self, top: usize) -> Result<Vec<u8>, String> {
        content(&self.open_from(&seams(&self.storages()), top, 0)?)
    }

    /// Whether every qcow2 file is free of corruption; leaks count only where `leaks` says so.
    ///
    /// # Errors
    /// What check finds.
    pub fn check(&self, leaks: bool) -> Verdict {
        for (number, storage) in self.storages().iter().enumerate().filter(|(number, _)| !self.is_raw(*number)) {
            let report = check(&**storage, &CheckOptions::default()).map_err(wrong)?;
            if (report.corruptions, report.check_errors) != (0, 0) || (leaks && report.leaks > 0) {
                return Err(format!("layer {number}: {report:?}"));
            }
        }
        Ok(())
    }

    /// The same after `check -r leaks` of every qcow2 file.
    ///
    /// # Errors
    /// What check says.
    pub fn without_leaks(&self) -> Result<Self, String> {
        let storages = self.storages();
        for (_, storage) in storages.iter().enumerate().filter(|(number, _)| !self.is_raw(*number)) {
            let mut options = CheckOptions::default();
            options.fix = Fix::Leaks;
            check(&**storage, &options).map_err(wrong)?;
        }
        Ok(self.with_files(storages.iter().map(|storage| storage.to_vec()).collect()))
    }
}

fn seams<S: Storage + 'static>(storages: &[Arc<S>]) -> Vec<Arc<dyn Storage>> {
    storages.iter().map(|storage| Arc::clone(storage) as Arc<dyn Storage>).collect()
}

/// What a guest of this chain reads.
///
/// # Errors
/// What reading says.
pub fn content(chain: &Chain) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0xee; usize::try_from(chain.virtual_size()).map_err(wrong)?];
    chain.read_at(&mut bytes, GuestOffset::ZERO).map_err(wrong)?;
    Ok(bytes)
}

impl Merge {
    /// Any merge that a chain of this depth allows.
    pub fn random(rng: &mut Rng, depth: usize) -> Self {
        let base = usize::try_from(rng.within(1..depth as u64)).unwrap();
        match rng.within(0..5) {
            0 => Self::Pull { base: None },
            1 => Self::Pull { base: Some(base) },
            2 => Self::Commit { base, after: AfterCommit::Keep, shrink: rng.chance(1, 2) },
            _ => Self::Commit { base: 1, after: AfterCommit::Empty, shrink: rng.chance(1, 3) },
        }
    }

    /// Makes it, or completes it, on a chain of so many layers originally.
    ///
    /// # Errors
    /// What the merge says.
    pub fn run(self, chain: &Chain, depth: usize) -> Result<(), qcow2_chain::merge::Error> {
        match self {
            Self::Commit { base, after, shrink } => {
                let options = CommitOptions::default().with_base(base).with_after(after).with_shrink_base(shrink);
                commit(chain, &options, &())?;
            }
            // Where the header is switched already, the rest is done.
            Self::Pull { .. } if chain.layers().len() < depth => {}
            Self::Pull { base } => {
                pull(chain, &PullOptions::default().with_base(base), &())?;
            }
        }
        Ok(())
    }

    /// How many layers it needs to write.
    pub fn writable(self) -> usize {
        match self {
            Self::Commit { base, .. } => base + 1,
            Self::Pull { .. } => 1,
        }
    }

    /// Whether these files are what it is to achieve: `before` is what the top held, `beneath` the base's own content.
    ///
    /// # Errors
    /// What is missing.
    pub fn is_complete(self, stack: &Stack, before: &[u8], beneath: &[u8]) -> Verdict {
        let storages = stack.storages();
        match self {
            Self::Commit { base, after, shrink } => {
                let mut merged = before.to_vec();
                if !shrink {
                    merged.extend(beneath.get(merged.len()..).unwrap_or_default());
                }
                if stack.content_from(base)? != merged {
                    return Err("the base does not hold what was merged".to_owned());
                }
                let chain = stack.open(&storages, 0)?;
                let mut held = chain.top().node.extents(0..u64::MAX);
                if after == AfterCommit::Empty && !held.all(|e| e.is_ok_and(|e| e.kind == ExtentKind::Unallocated)) {
                    return Err("the top is not empty".to_owned());
                }
            }
            Self::Pull { base } => {
                let chain = stack.open(&storages, 0)?;
                let depth = base.map_or(1, |base| stack.files.len() - base + 1);
                if chain.layers().len() != depth {
                    return Err(format!("the chain has {} layers, not {depth}", chain.layers().len()));
                }
            }
        }
        Ok(())
    }

    /// The content of the layer that a commit merges into; nothing for a pull.
    pub fn beneath(self, stack: &Stack) -> Vec<u8> {
        match self {
            Self::Commit { base, .. } => stack.content_from(base).expect("the base reads"),
            Self::Pull { .. } => Vec::new(),
        }
    }
}
