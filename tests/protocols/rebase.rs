//! A rebase onto nothing, onto a lower layer, onto another chain.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use qcow2_chain::chain::{Chain, Layer, Node};
use qcow2_chain::image::{Fix, Image, OpenOptions};
use qcow2_chain::merge::{Onto, RebaseOptions, rebase};
use qcow2_chain::storage::crash::{RecorderOptions, Tree};
use qcow2_chain::storage::{Access, FileSystem};

use crate::support::images::{random_image, try_shown};
use crate::support::protocol::{Protocol, Verdict, assert_sound, memory, repair, wrong};
use crate::support::rng::Rng;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum To {
    Nothing,
    Base,
    Other,
}

/// `top` over `middle` over `base`, or alone; and `other`.
pub struct Rebase {
    start: Tree,
    in_kernel: bool,
    to: To,
    drop_equal: bool,
    /// What the top shows, and what each backing file does.
    model: Vec<u8>,
    shown: Vec<(&'static str, Vec<u8>)>,
}

impl Rebase {
    pub fn random(rng: &mut Rng) -> Self {
        let sizes: [u64; 4] = std::array::from_fn(|_| rng.within(8..96) * 512);
        let (base, base_shown) = random_image(rng, sizes[0], None);
        let (middle, middle_shown) = random_image(rng, sizes[1], Some(("base", &base_shown)));
        let (other, other_shown) = random_image(rng, sizes[2], None);
        let alone = rng.chance(1, 5);
        let over = (!alone).then_some(("middle", &middle_shown[..]));
        let (top, model) = random_image(rng, sizes[3], over);
        let to = if alone { To::Other } else { rng.pick(&[To::Nothing, To::Base, To::Other]) };
        let files = [("/top", top), ("/middle", middle), ("/base", base), ("/other", other)];
        Self {
            start: files.into_iter().map(|(path, bytes)| (path.into(), bytes)).collect(),
            in_kernel: rng.chance(1, 2),
            to,
            drop_equal: rng.chance(1, 2),
            model,
            shown: vec![("middle", middle_shown), ("base", base_shown), ("other", other_shown)],
        }
    }

    fn new_name(&self) -> Option<Vec<u8>> {
        match self.to {
            To::Nothing => None,
            To::Base => Some(b"base".to_vec()),
            To::Other => Some(b"other".to_vec()),
        }
    }
}

fn layer(names: &dyn FileSystem, name: &str, write: bool) -> Result<Layer, String> {
    let access = if write { Access::write() } else { Access::read() };
    let storage = names.open(&Path::new("/").join(name), &access).map_err(wrong)?;
    let image = Image::open(storage, &OpenOptions::default().with_write(write)).map_err(wrong)?;
    Ok(Layer { node: Node::Qcow2(image), path: PathBuf::from(name) })
}

/// The chain as the images name each other.
fn chain(names: &dyn FileSystem, top: &str, write: bool) -> Result<Chain, String> {
    let top = layer(names, top, write)?;
    let mut below = Vec::new();
    let mut next = top.node.as_qcow2().and_then(|image| image.header().backing_file);
    while let Some(name) = next {
        let name = String::from_utf8(name).map_err(wrong)?;
        let layer = layer(names, &name, false)?;
        next = layer.node.as_qcow2().and_then(|image| image.header().backing_file);
        below.push(layer);
    }
    Ok(Chain::from_layers(top, below))
}

impl Protocol for Rebase {
    fn what(&self) -> String {
        format!("to {:?}, drop {}", self.to, self.drop_equal)
    }

    fn start(&self) -> &Tree {
        &self.start
    }

    fn recorder(&self) -> RecorderOptions {
        RecorderOptions::default().with_in_kernel(self.in_kernel)
    }

    fn run(&self, names: &Arc<dyn FileSystem>, _promised: &dyn Fn()) -> Verdict {
        let chain = chain(&**names, "top", true)?;
        if chain.top().node.as_qcow2().and_then(|image| image.header().backing_file) == self.new_name() {
            return Ok(());
        }
        let other = Chain::from_layers(layer(&**names, "other", false)?, []);
        let onto = match self.to {
            To::Nothing => Onto::Nothing,
            To::Base => Onto::Layer(2),
            To::Other => Onto::Chain(&other),
        };
        let options = RebaseOptions::default().with_drop_equal(self.drop_equal);
        rebase(&chain, onto, &options, &()).map(drop).map_err(wrong)
    }

    fn judge(&self, tree: &Tree, promises: usize) -> Verdict {
        if tree.iter().any(|(path, bytes)| path != Path::new("/top") && self.start.get(path) != Some(bytes)) {
            return Err("a backing file was written".to_owned());
        }
        assert_sound(tree, "/top", true)?;
        let image = Image::open(memory(tree, "/top")?, &OpenOptions::default()).map_err(wrong)?;
        let backing = image.header().backing_file;
        if promises > 0 && backing != self.new_name() {
            return Err(format!("still over {backing:?}"));
        }
        let below = match &backing {
            None => &[][..],
            Some(name) => {
                let known = self.shown.iter().find(|(known, _)| known.as_bytes() == name);
                &known.ok_or_else(|| format!("a name that nobody gave: {name:?}"))?.1
            }
        };
        if try_shown(&image, below).ok_or("the disk cannot be read")? != self.model {
            return Err(format!("the guest sees another disk over {backing:?}"));
        }
        Ok(())
    }

    fn judge_kept(&self, tree: &Tree, promises: usize) -> Verdict {
        self.judge(tree, promises)?;
        assert_sound(tree, "/top", false)
    }

    fn recover(&self, names: &Arc<dyn FileSystem>) -> Verdict {
        self.run(names, &|| ())?;
        repair(&**names, "/top", Fix::Leaks)
    }

    fn judge_recovered(&self, tree: &Tree) -> Verdict {
        self.judge_kept(tree, 1)
    }
}
