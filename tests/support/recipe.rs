//! Random images: how they are created, what happens to them, and a model of what they then hold.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::qemu::Qemu;
use super::rng::Rng;

/// What `qemu-img create -o` is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    pub size: u64,
    pub compat: &'static str,
    pub cluster_size: u64,
    pub refcount_bits: u32,
    pub extended_l2: bool,
    pub lazy_refcounts: bool,
    pub compression_type: &'static str,
    pub preallocation: &'static str,
}

/// One thing that happens to an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Every byte of the range becomes this one.
    Fill(Range<u64>, u8),
    /// The range is written with incompressible bytes, the same ones over and over.
    Noise(Range<u64>),
    /// As `Fill`, as compressed clusters.
    Compressed(Range<u64>, u8),
    /// As `Noise`, compressed: does not shrink, so QEMU stores plain clusters.
    CompressedNoise(Range<u64>),
    /// Zeroes, keeping space reserved where there is some.
    Zero(Range<u64>),
    /// Zeroes, giving space back.
    ZeroUnmap(Range<u64>),
    /// Whole clusters of the range are given back.
    Discard(Range<u64>),
    /// An internal snapshot.
    Snapshot(String),
    /// A persistent dirty bitmap.
    Bitmap(String),
}

/// An image that QEMU made and what it holds.
#[derive(Debug)]
pub struct RandomImage {
    pub path: PathBuf,
    pub shape: Shape,
    /// The guest's bytes.
    pub model: Vec<u8>,
    /// The internal snapshots and what they hold.
    pub snapshots: Vec<(String, Vec<u8>)>,
    /// The names of the bitmaps.
    pub bitmaps: Vec<String>,
    /// What was done, for the message of a failing test.
    pub ops: Vec<Op>,
    /// Whether there is a backing file.
    pub backed: bool,
    /// Which clusters were ever allocated: QEMU compresses into fresh ones only.
    touched: Vec<bool>,
}

/// Incompressible bytes; the odd length makes no two clusters the same.
const NOISE_LEN: usize = 4999;

/// The bytes of [`Op::Noise`], over and over.
pub fn noise() -> Vec<u8> {
    Rng::new(1).bytes(NOISE_LEN)
}

impl Shape {
    /// Any shape that QEMU accepts, of up to some MiB.
    pub fn random(rng: &mut Rng) -> Self {
        let v3 = rng.chance(4, 5);
        let extended_l2 = v3 && rng.chance(1, 4);
        let cluster_bits = match rng.within(0..4) {
            _ if extended_l2 => rng.within(14..22),
            0 => 9,
            1 => 16,
            _ => rng.within(9..22),
        };
        let cluster_size = 1 << cluster_bits;
        // Some hundred small clusters or a handful of large ones, and rarely a disk that ends on a cluster's boundary.
        let largest = (cluster_size * 300).clamp(256 << 10, 6 << 20);
        let size = rng.within(1..largest / 512 + 1) * 512;
        Self {
            size: if rng.chance(1, 4) { size.next_multiple_of(cluster_size) } else { size },
            compat: if v3 { "1.1" } else { "0.10" },
            cluster_size,
            refcount_bits: if v3 { 1 << rng.within(0..7) } else { 16 },
            extended_l2,
            lazy_refcounts: v3 && rng.chance(1, 8),
            compression_type: if v3 && rng.chance(1, 2) { "zstd" } else { "zlib" },
            preallocation: if rng.chance(3, 4) { "off" } else { rng.pick(&["metadata", "falloc", "full"]) },
        }
    }

    /// The argument of `qemu-img create -o`.
    pub fn options(&self) -> String {
        let mut options =
            format!("compat={},cluster_size={},preallocation={}", self.compat, self.cluster_size, self.preallocation);
        if self.compat == "1.1" {
            let on = |on| if on { "on" } else { "off" };
            options += &format!(
                ",refcount_bits={},extended_l2={},lazy_refcounts={},compression_type={}",
                self.refcount_bits,
                on(self.extended_l2),
                on(self.lazy_refcounts),
                self.compression_type
            );
        }
        options
    }

    fn clusters(&self) -> usize {
        usize::try_from(self.size.div_ceil(self.cluster_size)).unwrap()
    }
}

impl RandomImage {
    /// A new image of this shape without a backing file.
    pub fn create(qemu: Qemu, path: PathBuf, shape: Shape) -> Self {
        let size = shape.size.to_string();
        let name = path.to_string_lossy().into_owned();
        qemu.img(&["create", "-q", "-f", "qcow2", "-o", &shape.options(), &name, &size]);
        Self::from_model(path, shape, false, Vec::new())
    }

    /// A new overlay of this shape over another image. Preallocation is switched off: it would hide the backing file.
    pub fn create_over(qemu: Qemu, path: PathBuf, mut shape: Shape, base: &RandomImage) -> Self {
        shape.preallocation = "off";
        let size = shape.size.to_string();
        let name = path.to_string_lossy().into_owned();
        let backing = base.path.to_string_lossy().into_owned();
        let options = shape.options();
        qemu.img(&["create", "-q", "-f", "qcow2", "-b", &backing, "-F", "qcow2", "-o", &options, &name, &size]);
        Self::from_model(path, shape, true, base.model.clone())
    }

    /// An image that holds this model already, whoever made it; the model is cut or extended to the shape's size.
    pub fn from_model(path: PathBuf, shape: Shape, backed: bool, mut model: Vec<u8>) -> Self {
        model.resize(usize::try_from(shape.size).unwrap(), 0);
        let touched = vec![shape.preallocation != "off"; shape.clusters()];
        Self { path, shape, model, snapshots: Vec::new(), bitmaps: Vec::new(), ops: Vec::new(), backed, touched }
    }

    /// A random thing that can happen to this image next.
    pub fn random_op(&self, rng: &mut Rng) -> Op {
        let range = rng.range(self.shape.size, self.shape.cluster_size);
        match rng.within(0..40) {
            0..12 => Op::Fill(range, rng.pattern()),
            12..16 => Op::Noise(range),
            16..22 => Op::Zero(range),
            22..26 => Op::ZeroUnmap(range),
            26..31 => Op::Discard(range),
            31..37 if self.shape.refcount_bits >= 16 || self.snapshots.is_empty() => {
                self.untouched(range).map_or(Op::Noise(0..512), |range| match rng.chance(1, 4) {
                    true => Op::CompressedNoise(range),
                    false => Op::Compressed(range, rng.pattern()),
                })
            }
            37 | 38 if self.can_snapshot() => Op::Snapshot(format!("s{}", self.snapshots.len())),
            39 if self.shape.compat == "1.1" && self.bitmaps.len() < 2 => {
                Op::Bitmap(format!("b{}", self.bitmaps.len()))
            }
            _ => Op::Fill(range, rng.pattern()),
        }
    }

    /// Whether refcounts are wide enough for one more snapshot: many compressed clusters may share a host cluster.
    fn can_snapshot(&self) -> bool {
        let compressed = self.ops.iter().any(|op| matches!(op, Op::Compressed(..) | Op::CompressedNoise(..)));
        match self.shape.refcount_bits {
            1 => false,
            16.. => self.snapshots.len() < 3,
            _ => self.snapshots.len() < 2 && !compressed,
        }
    }

    /// The first run of whole clusters at or behind the range's start that nothing was ever written to.
    fn untouched(&self, range: Range<u64>) -> Option<Range<u64>> {
        let size = self.shape.cluster_size;
        let (first, wanted) = (range.start / size, (range.end - range.start).div_ceil(size));
        let free = |cluster: &u64| !self.touched[usize::try_from(*cluster).unwrap()];
        let start = (first..self.touched.len() as u64).find(free)?;
        let end =
            (start..self.touched.len() as u64).take_while(free).take(usize::try_from(wanted).unwrap()).last()? + 1;
        Some(start * size..(end * size).min(self.shape.size))
    }

    /// Lets QEMU do these things to the image, in as few processes as can be, and the model follow.
    pub fn apply(&mut self, qemu: Qemu, ops: Vec<Op>) {
        let pattern = self.path.with_extension("noise");
        std::fs::write(&pattern, noise()).expect("the noise is written");
        let mut commands = Vec::new();
        for op in ops {
            match &op {
                Op::Snapshot(name) => {
                    self.flush_commands(qemu, &mut commands);
                    qemu.img(&["snapshot".as_ref(), "-c".as_ref(), name.as_ref(), self.path.as_os_str()]);
                    self.snapshots.push((name.clone(), self.model.clone()));
                }
                Op::Bitmap(name) => {
                    self.flush_commands(qemu, &mut commands);
                    qemu.img(&["bitmap".as_ref(), "--add".as_ref(), self.path.as_os_str(), name.as_ref()]);
                    self.bitmaps.push(name.clone());
                }
                // QEMU 10.0 goes on filling the host cluster of its last compressed one even if that was freed and given
                // to data meanwhile, which `check` then calls corrupt. A fresh process starts a fresh host cluster.
                Op::Compressed(..) | Op::CompressedNoise(..) => {
                    if self.ops.last().is_some_and(|last| !matches!(last, Op::Compressed(..) | Op::CompressedNoise(..)))
                    {
                        self.flush_commands(qemu, &mut commands);
                    }
                    commands.push(op.qemu_io(&pattern));
                }
                _ => commands.push(op.qemu_io(&pattern)),
            }
            self.follow(&op);
            self.ops.push(op);
        }
        self.flush_commands(qemu, &mut commands);
        std::fs::remove_file(pattern).expect("the noise is removed");
    }

    /// Lets QEMU do `count` random things.
    pub fn apply_random(&mut self, qemu: Qemu, rng: &mut Rng, count: u64) {
        // One after the other, as what can come next depends on what came before; qemu-io still runs once for many.
        let mut planned = Self {
            path: self.path.clone(),
            shape: self.shape.clone(),
            model: self.model.clone(),
            snapshots: self.snapshots.clone(),
            bitmaps: self.bitmaps.clone(),
            ops: Vec::new(),
            backed: self.backed,
            touched: self.touched.clone(),
        };
        for _ in 0..count {
            let op = planned.random_op(rng);
            planned.follow(&op);
            match &op {
                Op::Snapshot(name) => planned.snapshots.push((name.clone(), Vec::new())),
                Op::Bitmap(name) => planned.bitmaps.push(name.clone()),
                _ => {}
            }
            planned.ops.push(op);
        }
        self.apply(qemu, planned.ops);
    }

    fn flush_commands(&self, qemu: Qemu, commands: &mut Vec<String>) {
        if !commands.is_empty() {
            qemu.io(&self.path, commands);
            commands.clear();
        }
    }

    /// The model does what the image did.
    pub fn follow(&mut self, op: &Op) {
        let (range, allocates) = match op {
            Op::Snapshot(_) | Op::Bitmap(_) => return,
            Op::Discard(range) => (self.discarded(range), false),
            Op::Fill(range, _) | Op::Noise(range) | Op::Zero(range) | Op::ZeroUnmap(range) => (range.clone(), true),
            Op::Compressed(range, _) | Op::CompressedNoise(range) => (range.clone(), true),
        };
        let bytes = &mut self.model[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()];
        match op {
            Op::Fill(_, pattern) | Op::Compressed(_, pattern) => bytes.fill(*pattern),
            Op::Noise(_) | Op::CompressedNoise(_) => {
                let noise = noise();
                bytes.chunks_mut(NOISE_LEN).for_each(|chunk| chunk.copy_from_slice(&noise[..chunk.len()]));
            }
            _ => bytes.fill(0),
        }
        if allocates && !range.is_empty() {
            let size = self.shape.cluster_size;
            let clusters = range.start / size..range.end.div_ceil(size);
            clusters.for_each(|cluster| self.touched[usize::try_from(cluster).unwrap()] = true);
        }
    }

    /// The model and the shape follow a resize; what is new reads as zeroes.
    pub fn resize(&mut self, size: u64) {
        self.shape.size = size;
        self.model.resize(usize::try_from(size).unwrap(), 0);
        // A partial last cluster becomes a whole one, or the other way round: nothing there counts as fresh.
        let clusters = self.shape.clusters();
        self.touched.truncate(clusters.saturating_sub(1));
        self.touched.resize(clusters, true);
    }

    /// What a discard of `range` turns into zeroes: whole clusters (the disk's last one is whole at the disk's end), and
    /// nothing in an overlay of version 2, which has no way to say zero.
    pub fn discarded(&self, range: &Range<u64>) -> Range<u64> {
        let size = self.shape.cluster_size;
        let start = range.start.next_multiple_of(size).min(self.shape.size);
        let end = if range.end == self.shape.size { range.end } else { range.end - range.end % size };
        if self.backed && self.shape.compat == "0.10" || end < start { start..start } else { start..end }
    }
}

impl fmt::Display for RandomImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} of {} bytes, {}", self.path.display(), self.shape.size, self.shape.options())?;
        self.ops.iter().try_for_each(|op| writeln!(f, "  {op:x?}"))
    }
}

impl Op {
    /// The command that makes `qemu-io` do it.
    fn qemu_io(&self, noise: &Path) -> String {
        let noise = noise.display();
        let at = |range: &Range<u64>| format!("{} {}", range.start, range.end - range.start);
        match self {
            Self::Fill(range, pattern) => format!("write -q -P {pattern} {}", at(range)),
            Self::Noise(range) => format!("write -q -s {noise} {}", at(range)),
            Self::Compressed(range, pattern) => format!("write -q -c -P {pattern} {}", at(range)),
            Self::CompressedNoise(range) => format!("write -q -c -s {noise} {}", at(range)),
            Self::Zero(range) => format!("write -q -z {}", at(range)),
            Self::ZeroUnmap(range) => format!("write -q -z -u {}", at(range)),
            Self::Discard(range) => format!("discard -q {}", at(range)),
            Self::Snapshot(_) | Self::Bitmap(_) => unreachable!("qemu-img does these"),
        }
    }
}

#[test]
fn the_model_holds_what_qemu_wrote() {
    let Some(qemu) = Qemu::find() else { return };
    super::rng::cases("recipes", 24, |rng| {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut base = RandomImage::create(qemu, dir.path().join("base.qcow2"), Shape::random(rng));
        base.apply_random(qemu, rng, 12);
        let mut top = RandomImage::create_over(qemu, dir.path().join("top.qcow2"), Shape::random(rng), &base);
        top.apply_random(qemu, rng, 12);
        for image in [&base, &top] {
            super::rng::trace(image);
            qemu.assert_clean(&image.path);
            assert!(qemu.content(&image.path, None) == image.model, "content is not the model's: {image}");
            for (name, model) in &image.snapshots {
                assert!(qemu.content(&image.path, Some(name)) == *model, "snapshot {name} is not the model's: {image}");
            }
            let held: u64 = qemu.map(&image.path).iter().map(|entry| entry.length).sum();
            assert_eq!(held, image.shape.size, "map covers the disk: {image}");
            assert_eq!(qemu.info(&image.path)["virtual-size"].as_u64(), Some(image.shape.size));
            assert_eq!(qemu.check(&image.path, None).leaks, 0);
        }
        qemu.assert_content(&top.path, &top.model);
    });
}
