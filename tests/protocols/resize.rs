//! Growing and shrinking an image.

use std::sync::Arc;

use qcow2_chain::image::{Fix, Image, OpenOptions, Preallocation, ResizeOptions};
use qcow2_chain::storage::FileSystem;
use qcow2_chain::storage::crash::{RecorderOptions, Tree};

use crate::support::images::{random_image, try_shown};
use crate::support::ours::Bytes;
use crate::support::protocol::{Protocol, Verdict, assert_sound, memory, open, repair, wrong};
use crate::support::rng::Rng;

const PATH: &str = "/disk";

/// One change of size.
pub struct Resize {
    start: Tree,
    in_kernel: bool,
    below: Vec<u8>,
    size: u64,
    options: ResizeOptions,
    before: Vec<u8>,
    after: Vec<u8>,
}

impl Resize {
    pub fn random(rng: &mut Rng) -> Self {
        let (old, size) = (rng.within(8..96) * 512, rng.within(1..200) * 512);
        let below = if rng.chance(1, 3) {
            let len = usize::try_from(rng.within(1..160)).unwrap() * 512;
            rng.bytes(len)
        } else {
            Vec::new()
        };
        let over = (!below.is_empty()).then_some(("below", &below[..]));
        let (image, before) = random_image_cut(rng, old, over);
        let mut after = before.clone();
        after.resize(usize::try_from(size).unwrap(), 0);
        let kind = match rng.within(0..6) {
            _ if size <= old || !below.is_empty() => Preallocation::Off,
            0 => Preallocation::Metadata,
            1 => Preallocation::Falloc,
            2 => Preallocation::Full,
            _ => Preallocation::Off,
        };
        let options = ResizeOptions::default().with_shrink(true).with_preallocation(kind);
        Self { start: [(PATH.into(), image)].into(), in_kernel: rng.chance(1, 2), below, size, options, before, after }
    }

    fn shown(&self, tree: &Tree) -> Result<Vec<u8>, String> {
        let image = Image::open(memory(tree, PATH)?, &OpenOptions::default()).map_err(wrong)?;
        try_shown(&image, &self.below).ok_or_else(|| "the disk cannot be read".to_owned())
    }
}

/// A random image over a backing file that may be longer than it: what lies behind its end is not shown.
fn random_image_cut(rng: &mut Rng, size: u64, over: Option<(&str, &[u8])>) -> (Vec<u8>, Vec<u8>) {
    let len = usize::try_from(size).unwrap();
    random_image(rng, size, over.map(|(name, below)| (name, &below[..below.len().min(len)])))
}

impl Protocol for Resize {
    fn what(&self) -> String {
        format!("from {} to {}, {:?}", self.before.len(), self.size, self.options)
    }

    fn start(&self) -> &Tree {
        &self.start
    }

    fn recorder(&self) -> RecorderOptions {
        RecorderOptions::default().with_in_kernel(self.in_kernel)
    }

    fn run(&self, names: &Arc<dyn FileSystem>, _promised: &dyn Fn()) -> Verdict {
        let below = Bytes(self.below.clone());
        let image = open(&**names, PATH, true)?;
        image.resize_over(self.size, &self.options, &below, self.below.len() as u64).map_err(wrong)
    }

    fn judge(&self, tree: &Tree, promises: usize) -> Verdict {
        assert_sound(tree, PATH, true)?;
        let now = self.shown(tree)?;
        if now == self.after || (promises == 0 && now == self.before) {
            return Ok(());
        }
        Err("neither the old disk nor the new".to_owned())
    }

    fn judge_kept(&self, tree: &Tree, promises: usize) -> Verdict {
        self.judge(tree, promises)?;
        assert_sound(tree, PATH, false)
    }

    fn recover(&self, names: &Arc<dyn FileSystem>) -> Verdict {
        self.run(names, &|| ())?;
        repair(&**names, PATH, Fix::Leaks)
    }

    fn judge_recovered(&self, tree: &Tree) -> Verdict {
        self.judge_kept(tree, 1)
    }
}
