//! Writes, zeroes, discards and flushes on one image.

use std::ops::Range;
use std::sync::Arc;

use qcow2_chain::format::{BitmapDirectoryEntry, ClusterBits, GuestOffset, RefcountOrder};
use qcow2_chain::image::{CreateOptions, Fix, Image, OpenOptions};
use qcow2_chain::storage::crash::{RecorderOptions, Tree};
use qcow2_chain::storage::{FileSystem, MemoryStorage};

use crate::support::images::{UNKNOWN, random_content, random_options, try_shown, vouch};
use crate::support::ours::Bytes;
use crate::support::protocol::{Protocol, Verdict, assert_sound, memory, open, repair, wrong};
use crate::support::rng::Rng;

const SECTOR: usize = 512;
const PATH: &str = "/disk";

#[derive(Clone, Debug)]
enum Op {
    Write(Range<u64>, u8),
    Zero(Range<u64>),
    Discard(Range<u64>),
    Flush,
}

/// Random changes of one image, alone or over a backing file, and what the disk held after each.
pub struct Writer {
    start: Tree,
    in_kernel: bool,
    below: Vec<u8>,
    ops: Vec<Op>,
    versions: Vec<Vec<u8>>,
    /// For each promise, the version that was the newest then.
    promised: Vec<usize>,
}

impl Writer {
    pub fn random(rng: &mut Rng) -> Self {
        // Large ones get new refcount blocks while they are written.
        let large = rng.chance(1, 4);
        let size = if large { rng.within(100..300) } else { rng.within(8..96) } * 512;
        let below = if rng.chance(1, 2) { rng.bytes(usize::try_from(size).unwrap() / 2) } else { Vec::new() };
        let over = (!below.is_empty()).then_some(("below", &below[..]));
        let mut shape = random_options(rng, size);
        if large {
            let (smallest, widest) = (ClusterBits::new(9).unwrap(), RefcountOrder::new(6).unwrap());
            shape = CreateOptions::new(size).with_cluster_bits(smallest).with_refcount_order(widest);
        }
        let (mut image, model) = random_content(rng, shape, over);
        if rng.chance(1, 3) {
            vouch(rng, &mut image);
        }
        let op = |rng: &mut Rng| {
            let range = rng.range(size, 512);
            match rng.within(0..6) {
                0..3 => Op::Write(range, rng.pattern()),
                3 => Op::Zero(range),
                4 => Op::Discard(range),
                _ => Op::Flush,
            }
        };
        let ops: Vec<Op> = (0..rng.within(1..8)).map(|_| op(rng)).collect();
        let start = [(PATH.into(), image)].into();
        let mut writer =
            Self { start, in_kernel: rng.chance(1, 2), below, ops, versions: vec![model], promised: Vec::new() };
        writer.rehearse();
        writer
    }

    /// Does it once where nothing can go wrong, and notes what the disk then shows.
    fn rehearse(&mut self) {
        let storage = memory(&self.start, PATH).expect("it is there");
        let image = Image::open(storage, &OpenOptions::default().with_write(true)).expect("opens");
        for op in &self.ops {
            self.apply(&image, op).expect("nothing fails");
            let mut now = self.versions.last().expect("there is a first one").clone();
            let span = |range: &Range<u64>| usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
            match op {
                Op::Write(range, pattern) => now[span(range)].fill(*pattern),
                Op::Zero(range) => now[span(range)].fill(0),
                Op::Discard(range) => {
                    // How much of it are whole clusters is the image's to say; what is no zero then is as it was.
                    let shown = try_shown(&image, &self.below).expect("reads");
                    let (old, new) = (now[span(range)].iter(), shown[span(range)].iter());
                    assert!(old.zip(new).all(|(old, new)| *new == 0 || new == old), "a discard makes something up");
                    now[span(range)].copy_from_slice(&shown[span(range)]);
                }
                Op::Flush => {
                    self.promised.push(self.versions.len() - 1);
                    continue;
                }
            }
            assert!(try_shown(&image, &self.below).expect("reads") == now, "{op:?} is read back");
            self.versions.push(now);
        }
        self.promised.push(self.versions.len() - 1);
    }

    fn apply(&self, image: &Image, op: &Op) -> Verdict {
        let below = Bytes(self.below.clone());
        let at = |range: &Range<u64>| (GuestOffset::new(range.start), range.end - range.start);
        let done = match op {
            Op::Write(range, pattern) => {
                image.write_at_over(&vec![*pattern; usize::try_from(at(range).1).unwrap()], at(range).0, &below)
            }
            Op::Zero(range) => image.write_zeroes_at_over(at(range).0, at(range).1, &below),
            Op::Discard(range) => image.discard_at(at(range).0, at(range).1),
            Op::Flush => image.flush(),
        };
        done.map_err(wrong)
    }

    /// Nothing that vouches for the old content is left on a new one.
    fn judge_vouchers(&self, tree: &Tree) -> Verdict {
        let image = Image::open(memory(tree, PATH)?, &OpenOptions::default()).map_err(wrong)?;
        if self.shown(tree)? == self.versions[0] {
            return Ok(());
        }
        if image.header().header.autoclear_features.0 & UNKNOWN != 0 {
            return Err("an unknown feature still vouches for what was written".to_owned());
        }
        let bitmaps = image.bitmaps().map_err(wrong)?;
        if bitmaps.iter().any(|bitmap| bitmap.flags & BitmapDirectoryEntry::IN_USE == 0) {
            return Err("a bitmap still vouches for what was written".to_owned());
        }
        Ok(())
    }

    fn shown(&self, tree: &Tree) -> Result<Vec<u8>, String> {
        let storage: Arc<MemoryStorage> = memory(tree, PATH)?;
        let image = Image::open(storage, &OpenOptions::default()).map_err(wrong)?;
        try_shown(&image, &self.below).ok_or_else(|| "the disk cannot be read".to_owned())
    }
}

impl Protocol for Writer {
    fn what(&self) -> String {
        format!("{:?}", self.ops)
    }

    fn start(&self) -> &Tree {
        &self.start
    }

    fn recorder(&self) -> RecorderOptions {
        RecorderOptions::default().with_in_kernel(self.in_kernel)
    }

    fn run(&self, names: &Arc<dyn FileSystem>, promised: &dyn Fn()) -> Verdict {
        let image = open(&**names, PATH, true)?;
        for op in &self.ops {
            self.apply(&image, op)?;
            if matches!(op, Op::Flush) {
                promised();
            }
        }
        image.close().map_err(wrong)
    }

    /// Each sector is one that the disk has held since the last promise.
    fn judge(&self, tree: &Tree, promises: usize) -> Verdict {
        assert_sound(tree, PATH, true)?;
        self.judge_vouchers(tree)?;
        let content = self.shown(tree)?;
        let since = promises.checked_sub(1).map_or(0, |last| self.promised[last]);
        for at in (0..content.len()).step_by(SECTOR) {
            let sector = at..(at + SECTOR).min(content.len());
            if !self.versions[since..].iter().any(|then| then[sector.clone()] == content[sector.clone()]) {
                return Err(format!("the sector at {at} never was so since promise {promises}"));
            }
        }
        Ok(())
    }

    fn judge_kept(&self, tree: &Tree, promises: usize) -> Verdict {
        if self.shown(tree)? != self.versions[self.promised[promises - 1]] {
            return Err("what was flushed is not there".to_owned());
        }
        assert_sound(tree, PATH, false)
    }

    fn recover(&self, names: &Arc<dyn FileSystem>) -> Verdict {
        repair(&**names, PATH, Fix::Leaks)
    }

    fn judge_recovered(&self, tree: &Tree) -> Verdict {
        self.judge(tree, 0)?;
        assert_sound(tree, PATH, false)
    }
}
