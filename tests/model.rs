//! Random sequences of all operations over several layers, against vectors of bytes; proptest shrinks what fails. Cases that
//! failed once stay, as values, in [`cases::regressions`].

mod cases;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use qcow2_chain::chain::{Chain, Layer, Node};
use qcow2_chain::format::{ClusterBits, CompressionType, GuestOffset, HeaderCluster, Limits, RefcountOrder, Version};
use qcow2_chain::image::{CreateOptions, Fix, Image, OpenOptions, RawImage, ResizeOptions};
use qcow2_chain::merge::{
    AfterCommit, CommitOptions, ConvertOptions, ConvertTarget, Onto, PullOptions, RebaseOptions, commit, convert, pull,
    rebase,
};
use qcow2_chain::storage::crash::{Recorder, Tree};
use qcow2_chain::storage::fault::{Fault, Faults, FaultyFileSystem};
use qcow2_chain::storage::{Access, FileSystem, MemoryStorage};

use crate::support::protocol::{Verdict, assert_sound, repair, wrong};
use crate::support::rng::{count, seed};
use cases::{Case, Guest, Op, Shape, case, regressions};

fn options(shape: Shape) -> CreateOptions {
    let options = CreateOptions::new(u64::from(shape.sectors) * 512);
    let bits = if shape.extended && !shape.v2 { shape.cluster_bits.max(14) } else { shape.cluster_bits };
    let options = options.with_cluster_bits(ClusterBits::new(bits).unwrap());
    if shape.v2 {
        return options.with_version(Version::V2);
    }
    options.with_refcount_order(RefcountOrder::new(shape.refcount_order).unwrap()).with_extended_l2(shape.extended)
}

/// The bytes of an overlay of `below` that shows `content` and holds, compressed, the clusters of this part of it. Clusters of
/// zeroes are not allocated, and show what lies below: zeroes too, as nothing else was changed.
fn compressed(
    shape: Shape,
    zstd: bool,
    content: &[u8],
    part: &std::ops::Range<usize>,
    below: &Member,
) -> Result<Vec<u8>, String> {
    let mut options = options(shape);
    if zstd && !shape.v2 {
        options = options.with_compression_type(CompressionType::Zstd);
    }
    let cluster = 1_usize << options.cluster_bits.get();
    let mut source = vec![0; content.len()];
    let held = part.start / cluster * cluster..part.end.next_multiple_of(cluster).min(content.len());
    source[held.clone()].copy_from_slice(&content[held]);
    let source = RawImage::open(Arc::new(MemoryStorage::with_bytes("source", &source))).map_err(wrong)?;
    let chain = Chain::from_layers(Layer { node: Node::Raw(source), path: PathBuf::from("source") }, []);
    let target = Arc::new(MemoryStorage::new("compressed"));
    let how = ConvertOptions::default().with_compress(true).with_threads(1);
    convert(&chain, ConvertTarget::Qcow2(target.clone(), options), &how, &()).map_err(wrong)?;
    let mut bytes = target.to_vec();
    let mut header = HeaderCluster::decode(&bytes, bytes.len() as u64, &Limits::default()).map_err(wrong)?;
    let format = if below.raw { &b"raw"[..] } else { b"qcow2" };
    header.set_backing(Some(below.name.as_bytes()), Some(format));
    let first = header.encode_over(&bytes[..cluster.min(bytes.len())]).map_err(wrong)?;
    bytes[..first.len()].copy_from_slice(&first);
    Ok(bytes)
}

/// A layer: its file, and what a guest of it reads.
#[derive(Clone, Debug)]
struct Member {
    name: String,
    raw: bool,
    content: Vec<u8>,
}

/// The files, and what each layer shows; the base first.
#[derive(Clone, Debug)]
struct World {
    files: Tree,
    layers: Vec<Member>,
    made: usize,
}

fn path(name: &str) -> PathBuf {
    Path::new("/").join(name)
}

impl World {
    fn new(case: &Case) -> Self {
        let content = vec![0; usize::from(case.base.sectors) * 512];
        let bytes = if case.raw {
            content.clone()
        } else {
            let storage = Arc::new(MemoryStorage::new("base"));
            Image::create(storage.clone(), &options(case.base)).unwrap().close().unwrap();
            storage.to_vec()
        };
        let base = Member { name: "layer0".to_owned(), raw: case.raw, content };
        Self { files: [(path("layer0"), bytes)].into(), layers: vec![base], made: 1 }
    }

    fn top(&self) -> &Member {
        self.layers.last().unwrap()
    }
}

/// The chain that begins with a layer, its upper ones open for writing.
fn open(names: &dyn FileSystem, layers: &[Member], writable: usize) -> Result<Chain, String> {
    let layer = |(depth, layer): (usize, &Member)| {
        let write = depth < writable;
        let access = if write { Access::write() } else { Access::read() };
        let storage = names.open(&path(&layer.name), &access).map_err(wrong)?;
        let node = if layer.raw {
            Node::Raw(RawImage::open(storage).map_err(wrong)?)
        } else {
            Node::Qcow2(Image::open(storage, &OpenOptions::default().with_write(write)).map_err(wrong)?)
        };
        Ok::<Layer, String>(Layer { node, path: PathBuf::from(&layer.name) })
    };
    let mut all = layers.iter().rev().enumerate().map(layer).collect::<Result<Vec<_>, _>>()?.into_iter();
    let top = all.next().ok_or("no layers")?;
    Ok(Chain::from_layers(top, all))
}

fn content(chain: &Chain) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0xee; usize::try_from(chain.virtual_size()).map_err(wrong)?];
    chain.read_at(&mut bytes, GuestOffset::ZERO).map_err(wrong)?;
    Ok(bytes)
}

/// Part of a disk of `size` bytes.
fn part(size: usize, at: u32, len: u16) -> std::ops::Range<usize> {
    let at = at as usize % size;
    at..(at + usize::from(len)).min(size)
}

impl World {
    /// What the layers are and show after an operation; `None` where this chain cannot do it.
    fn after(&self, op: Op) -> Option<Vec<Member>> {
        let mut layers = self.layers.clone();
        let depth = layers.len();
        let top = layers.last_mut()?;
        let size = top.content.len();
        match op {
            Op::Write { at, len, byte } => top.content[part(size, at, len)].fill(byte),
            Op::Zero { at, len } => top.content[part(size, at, len)].fill(0),
            // What a discard leaves is looked at when it is done.
            Op::Discard { .. } | Op::Flush => {}
            Op::Compressed { shape, at, len, byte, .. } => {
                let mut content = top.content.clone();
                content.resize(usize::from(shape.sectors) * 512, 0);
                let part = part(content.len(), at, len);
                content[part].fill(byte);
                layers.push(Member { name: format!("layer{}", self.made), raw: false, content });
            }
            Op::Session(steps) => {
                for step in steps {
                    match step {
                        Guest::Write { at, len, byte } => top.content[part(size, at, len)].fill(byte),
                        Guest::Zero { at, len } => top.content[part(size, at, len)].fill(0),
                        Guest::Flush | Guest::Reopen => {}
                    }
                }
            }
            Op::Overlay(shape) => {
                let mut content = top.content.clone();
                content.resize(usize::from(shape.sectors) * 512, 0);
                layers.push(Member { name: format!("layer{}", self.made), raw: false, content });
            }
            Op::Commit { base, .. } => {
                let base = self.base(base)?;
                let merged = top.content.clone();
                let keep = depth - base;
                let beneath = layers[keep - 1].content.iter().skip(merged.len());
                layers[keep - 1].content = merged.iter().chain(beneath).copied().collect();
                if base > 1 {
                    layers.truncate(keep);
                }
            }
            Op::Pull { base } | Op::Rebase { onto: base } => {
                let base = usize::from(base) % depth;
                if depth == 1 {
                    return None;
                }
                // 0 means none of them.
                let kept = if base == 0 { 0 } else { depth - base };
                layers.drain(kept..depth - 1);
            }
            Op::Resize { sectors } => {
                if top.raw {
                    return None;
                }
                top.content.resize(usize::from(sectors) * 512, 0);
            }
            Op::Flatten { .. } => {
                let content = top.content.clone();
                layers = vec![Member { name: format!("layer{}", self.made), raw: false, content }];
            }
            Op::Crash(_) | Op::FailNext(_) => return None,
        }
        Some(layers)
    }

    /// How many layers below the top a commit goes.
    fn base(&self, base: u8) -> Option<usize> {
        let depth = self.layers.len();
        (depth > 1).then(|| 1 + usize::from(base) % (depth - 1))
    }

    /// Does it, on files that may have been left by an earlier attempt.
    fn run(&self, names: &dyn FileSystem, op: Op) -> Verdict {
        let depth = self.layers.len();
        let open = |writable| open(names, &self.layers, writable);
        let size = self.top().content.len();
        let span = |at, len| {
            let part = part(size, at, len);
            (GuestOffset::new(part.start as u64), part.len())
        };
        let new = path(&format!("layer{}", self.made));
        let create = || {
            if names.exists(&new).map_err(wrong)? {
                names.unlink(&new).map_err(wrong)?;
            }
            names.create_new(&new).map_err(wrong)
        };
        match op {
            Op::Write { at, len, byte } => {
                let (chain, (at, len)) = (open(1)?, span(at, len));
                chain.write_at(&vec![byte; len], at).map_err(wrong)?;
                chain.close().map_err(wrong)
            }
            Op::Zero { at, len } => {
                let (chain, (at, len)) = (open(1)?, span(at, len));
                chain.write_zeroes_at(at, len as u64).map_err(wrong)?;
                chain.close().map_err(wrong)
            }
            Op::Discard { at, len } => {
                let (chain, (at, len)) = (open(1)?, span(at, len));
                chain.discard_at(at, len as u64).map_err(wrong)?;
                chain.close().map_err(wrong)
            }
            Op::Flush => open(1)?.flush().map_err(wrong),
            Op::Overlay(shape) => {
                let format = if self.top().raw { "raw" } else { "qcow2" };
                let options = options(shape).with_backing(self.top().name.clone(), format);
                options.write_to(&*create()?).map_err(wrong)?;
                names.sync_dir(Path::new("/")).map_err(wrong)
            }
            Op::Commit { base, empty } => {
                let base = self.base(base).unwrap_or(1);
                let after = if empty && base == 1 { AfterCommit::Empty } else { AfterCommit::Keep };
                let options = CommitOptions::default().with_base(base).with_after(after);
                commit(&open(base + 1)?, &options, &()).map(drop).map_err(wrong)
            }
            Op::Pull { base } => {
                let base = Some(usize::from(base) % depth).filter(|base| *base > 0);
                pull(&open(1)?, &PullOptions::default().with_base(base), &()).map(drop).map_err(wrong)
            }
            Op::Rebase { onto } => {
                let onto = match usize::from(onto) % depth {
                    0 => Onto::Nothing,
                    index => Onto::Layer(index),
                };
                rebase(&open(1)?, onto, &RebaseOptions::default(), &()).map(drop).map_err(wrong)
            }
            Op::Resize { sectors } => {
                let chain = open(1)?;
                let below = chain.below(0);
                let image = chain.top().node.as_qcow2().ok_or("no image")?;
                let beneath = self.layers.len().checked_sub(2).map_or(0, |below| self.layers[below].content.len());
                let options = ResizeOptions::default().with_shrink(true);
                image.resize_over(u64::from(sectors) * 512, &options, &below, beneath as u64).map_err(wrong)
            }
            Op::Flatten { compress } => {
                let target = ConvertTarget::Qcow2(
                    create()?,
                    CreateOptions::default().with_cluster_bits(ClusterBits::new(12).unwrap()),
                );
                let options = ConvertOptions::default().with_compress(compress).with_threads(1);
                convert(&open(0)?, target, &options, &()).map_err(wrong)?;
                names.sync_dir(Path::new("/")).map_err(wrong)
            }
            Op::Compressed { shape, zstd, at, len, .. } => {
                let after = self.after(op).ok_or("no layers")?;
                let shown = &after.last().ok_or("no layers")?.content;
                let bytes = compressed(shape, zstd, shown, &part(shown.len(), at, len), self.top())?;
                let file = create()?;
                file.write_at(&bytes, 0).map_err(wrong)?;
                file.sync().map_err(wrong)?;
                names.sync_dir(Path::new("/")).map_err(wrong)
            }
            Op::Session(steps) => {
                let mut chain = open(1)?;
                for step in steps {
                    match step {
                        Guest::Write { at, len, byte } => {
                            let (at, len) = span(at, len);
                            chain.write_at(&vec![byte; len], at).map_err(wrong)?;
                        }
                        Guest::Zero { at, len } => {
                            let (at, len) = span(at, len);
                            chain.write_zeroes_at(at, len as u64).map_err(wrong)?;
                        }
                        Guest::Flush => chain.flush().map_err(wrong)?,
                        Guest::Reopen => {
                            chain.close().map_err(wrong)?;
                            chain = open(1)?;
                        }
                    }
                }
                let expected = self.after(op).ok_or("no layers")?;
                if Some(&content(&chain)?) != expected.last().map(|top| &top.content) {
                    return Err("the open chain shows something else".to_owned());
                }
                chain.close().map_err(wrong)
            }
            Op::Crash(_) | Op::FailNext(_) => Ok(()),
        }
    }

    /// Does one thing, cut off where `fate` says so and then done again; compares every layer with the model.
    fn step(&mut self, op: Op, fate: Option<Op>) -> Verdict {
        let Some(mut after) = self.after(op) else { return Ok(()) };
        let recorder = Recorder::new();
        let names = Arc::new(recorder.names(&self.files));
        let mut files = match fate {
            Some(Op::FailNext(call)) => {
                let faults = Faults::new(Fault::Io.at(call.into()));
                let failed = self.run(&FaultyFileSystem::new(names.clone(), &faults), op);
                if let Err(error) = &failed
                    && !error.contains("injected")
                    && !error.contains("Poisoned")
                {
                    return Err(format!("without its fault: {error}"));
                }
                names.tree()
            }
            fate => {
                self.run(&*names, op)?;
                match fate {
                    Some(Op::Crash(state)) => crashed(&recorder.log(), state.into()),
                    _ => recorder.log().durable().tree(),
                }
            }
        };
        if fate.is_some() {
            let again = Recorder::new();
            self.run(&again.names(&files), op).map_err(|wrong| format!("again: {wrong}"))?;
            files = again.log().durable().tree();
        }
        self.made += 1;
        let old = std::mem::replace(&mut self.files, files);
        if let Op::Discard { at, len } = op {
            self.follow_discard(&mut after, at, len)?;
        }
        self.layers = after;
        drop(old);
        // Files that no layer needs any more are removed.
        let layers = &self.layers;
        self.files.retain(|file, _| layers.iter().any(|layer| path(&layer.name) == *file));
        self.verify(fate.is_some())
    }

    /// A discard zeroes whole clusters of its range, which ones is the image's to say, and nothing else.
    fn follow_discard(&self, after: &mut [Member], at: u32, len: u16) -> Verdict {
        let shown = content(&open(&Recorder::new().names(&self.files), &self.layers, 0)?)?;
        let Some(top) = after.last_mut() else { return Ok(()) };
        for at in part(top.content.len(), at, len) {
            if shown[at] != 0 && shown[at] != top.content[at] {
                return Err(format!("a discard makes up the byte at {at}"));
            }
            top.content[at] = shown[at];
        }
        Ok(())
    }

    /// Every layer shows what the model says, and no image is corrupt; what a cut leaked can be repaired.
    fn verify(&mut self, cut: bool) -> Verdict {
        let names = Recorder::new().names(&self.files);
        for layer in self.layers.iter().filter(|layer| !layer.raw) {
            let file = path(&layer.name);
            if cut {
                repair(&names, &file.to_string_lossy(), Fix::Leaks)?;
            }
            assert_sound(&names.tree(), &file.to_string_lossy(), false)?;
        }
        self.files = names.tree();
        for depth in 1..=self.layers.len() {
            let chain = open(&names, &self.layers[..depth], 0)?;
            if content(&chain)? != self.layers[depth - 1].content {
                return Err(format!("{} shows something else", self.layers[depth - 1].name));
            }
        }
        Ok(())
    }
}

/// A state that a crash could have left. Of large images only the one is looked at in which most is lost.
fn crashed(log: &qcow2_chain::storage::crash::Log, wanted: usize) -> Tree {
    let size: usize = log.last().files.iter().map(Vec::len).sum();
    if size > 1 << 20 {
        return log.durable().tree();
    }
    let states = log.each_state(7, 4, |_| Ok::<(), ()>(())).unwrap_or(1);
    let mut chosen = Tree::new();
    let found = log.each_state(7, 4, |state| {
        if state.number == wanted % states {
            chosen = state.tree();
            return Err(());
        }
        Ok(())
    });
    assert!(found.is_err(), "the state with this number is among them");
    chosen
}

fn run(case: &Case) -> Verdict {
    let mut world = World::new(case);
    let mut fate = None;
    for (number, op) in case.ops.iter().enumerate() {
        if matches!(op, Op::Crash(_) | Op::FailNext(_)) {
            fate = Some(*op);
            continue;
        }
        world.step(*op, fate.take()).map_err(|wrong| format!("operation {number}, {op:?}: {wrong}"))?;
    }
    Ok(())
}

#[test]
fn cases_that_failed_once_do_not_fail_again() {
    for case in regressions() {
        run(&case).unwrap_or_else(|wrong| panic!("{wrong}: {case:?}"));
    }
}

#[test]
fn random_sequences_agree_with_vectors_of_bytes() {
    let cases = u32::try_from(count("QCOW2_CHAIN_MODEL_CASES", 150)).unwrap();
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed().to_le_bytes());
    println!("model: {cases} cases, seed {:#x}", seed());
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let rng = prop::test_runner::TestRng::from_seed(prop::test_runner::RngAlgorithm::ChaCha, &bytes);
    let outcome = TestRunner::new_with_rng(config, rng).run(&case(), |case| run(&case).map_err(TestCaseError::fail));
    outcome.unwrap_or_else(|error| panic!("{error}"));
}
