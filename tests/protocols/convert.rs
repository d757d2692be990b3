//! A conversion to a new image, under a new name or on a device.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use qcow2_chain::chain::{Chain, Layer, Node};
use qcow2_chain::image::{CreateOptions, Image, OpenOptions};
use qcow2_chain::merge::{ConvertOptions, ConvertTarget, convert};
use qcow2_chain::storage::crash::{RecorderOptions, Tree};
use qcow2_chain::storage::{Access, FileSystem};

use crate::support::images::{random_image, random_options, try_shown};
use crate::support::protocol::{Protocol, Verdict, assert_sound, memory, open, wrong};
use crate::support::rng::Rng;

/// A chain of two images and what it is to become.
pub struct Convert {
    path: &'static str,
    start: Tree,
    in_kernel: bool,
    raw: bool,
    options: ConvertOptions,
    shape: CreateOptions,
    model: Vec<u8>,
    /// What an image shows that was there before, if there was one.
    old: Option<Vec<u8>>,
}

impl Convert {
    pub fn random(rng: &mut Rng) -> Self {
        let size = rng.within(8..96) * 512;
        let (base, below) = random_image(rng, 512 * rng.clone().within(8..96), None);
        let (top, model) = random_image(rng, size, Some(("base", &below)));
        let raw = rng.chance(1, 4);
        let in_kernel = rng.chance(1, 2);
        let compress = !raw && rng.chance(1, 3);
        let options = ConvertOptions::default()
            .with_compress(compress)
            .with_offload(!compress && rng.chance(1, 4))
            .with_sparse(rng.pick(&[0, 512, 4096]))
            .with_threads(usize::try_from(rng.within(1..3)).unwrap());
        let mut start: Tree = [("/s/top".into(), top), ("/s/base".into(), base)].into();
        let device = rng.chance(1, 4);
        if device {
            // An odd size, so that what was there before is not mistaken for the copy.
            let (mut image, _) = random_image(rng, 161 * 512, None);
            image.resize(1 << 18, 0x55);
            start.insert("/dev/disk".into(), image);
        }
        let path = if device { "/dev/disk" } else { "/d/new" };
        let shape = random_options(rng, size);
        let mut convert = Self { path, start, in_kernel, raw, options, shape, model, old: None };
        convert.old = convert.shown(&convert.start);
        convert
    }

    fn is_device(&self) -> bool {
        self.path.starts_with("/dev/")
    }

    /// What is shown, where there is an image.
    fn shown(&self, tree: &Tree) -> Option<Vec<u8>> {
        let storage = memory(tree, self.path).ok()?;
        if self.raw {
            let mut bytes = storage.to_vec();
            bytes.truncate(self.model.len());
            return Some(bytes);
        }
        try_shown(&Image::open(storage, &OpenOptions::default()).ok()?, &[])
    }
}

impl Protocol for Convert {
    fn what(&self) -> String {
        format!("{} raw {} {:?} {:?}", self.path, self.raw, self.options, self.shape)
    }

    fn start(&self) -> &Tree {
        &self.start
    }

    fn recorder(&self) -> RecorderOptions {
        RecorderOptions::default().with_in_kernel(self.in_kernel).with_fixed("/dev/")
    }

    fn run(&self, names: &Arc<dyn FileSystem>, _promised: &dyn Fn()) -> Verdict {
        let layer = |name: &str| {
            let image = open(&**names, name, false)?;
            Ok::<Layer, String>(Layer { node: Node::Qcow2(image), path: PathBuf::from(name) })
        };
        let source = Chain::from_layers(layer("/s/top")?, [layer("/s/base")?]);
        let path = Path::new(self.path);
        let storage = if self.is_device() {
            names.open(path, &Access::write()).map_err(wrong)?
        } else {
            names.create_new(path).map_err(wrong)?
        };
        let target =
            if self.raw { ConvertTarget::Raw(storage) } else { ConvertTarget::Qcow2(storage, self.shape.clone()) };
        convert(&source, target, &self.options, &()).map_err(wrong)?;
        names.sync_dir(path.parent().unwrap_or(path)).map_err(wrong)
    }

    /// A raw file that is not finished looks like any other.
    fn judge(&self, tree: &Tree, promises: usize) -> Verdict {
        let source = |path: &Path| tree.get(path) == self.start.get(path);
        if !source(Path::new("/s/top")) || !source(Path::new("/s/base")) {
            return Err("the source was written".to_owned());
        }
        let shown = self.shown(tree);
        if promises == 0 && self.is_device() && !self.raw && shown == self.old {
            return assert_sound(tree, self.path, true);
        }
        if shown.is_some() && !self.raw {
            assert_sound(tree, self.path, promises == 0)?;
        }
        if shown.as_ref() == Some(&self.model) || (promises == 0 && (shown.is_none() || self.raw)) {
            return Ok(());
        }
        Err(format!("the copy is another disk, or none: {:?}", shown.map(|shown| shown.len())))
    }

    fn judge_kept(&self, tree: &Tree, promises: usize) -> Verdict {
        self.judge(tree, promises)
    }

    fn recover(&self, names: &Arc<dyn FileSystem>) -> Verdict {
        let path = Path::new(self.path);
        if names.exists(path).map_err(wrong)? {
            if !self.raw
                && open(&**names, self.path, false).is_ok_and(|image| image.virtual_size() == self.model.len() as u64)
            {
                return names.sync_dir(path.parent().unwrap_or(path)).map_err(wrong);
            }
            if !self.is_device() {
                names.unlink(path).map_err(wrong)?;
            }
        }
        self.run(names, &|| ())
    }

    /// A raw file does not say that it is finished.
    fn settles(&self) -> bool {
        !self.raw
    }

    fn judge_recovered(&self, tree: &Tree) -> Verdict {
        self.judge_kept(tree, 1)
    }
}
