//! A new image under a new name, or on a device that held another.

use std::path::Path;
use std::sync::Arc;

use qcow2_chain::image::{CreateOptions, Image, OpenOptions, Preallocation};
use qcow2_chain::storage::crash::{RecorderOptions, Tree};
use qcow2_chain::storage::{Access, FileSystem};

use crate::support::images::{random_image, random_options, try_shown};
use crate::support::protocol::{Protocol, Verdict, assert_sound, memory, wrong};
use crate::support::rng::Rng;

/// The creation of one image.
pub struct Create {
    path: &'static str,
    start: Tree,
    options: CreateOptions,
    in_kernel: bool,
    /// What the image shows that was there before, if there was one.
    old: Option<Vec<u8>>,
}

impl Create {
    pub fn random(rng: &mut Rng) -> Self {
        let mut options = random_options(rng, 512 * rng.clone().within(1..120));
        if rng.chance(1, 4) {
            options = options.with_backing("base", "raw");
        } else if rng.chance(1, 3) {
            let kinds = [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full];
            options = options.with_preallocation(rng.pick(&kinds));
        }
        let in_kernel = rng.chance(1, 2);
        if rng.chance(1, 2) {
            return Self { path: "/d/new", start: Tree::new(), options, in_kernel, old: None };
        }
        // An odd size, so that it is not mistaken for the new one.
        let (mut image, old) = random_image(rng, 161 * 512, None);
        // What lies behind it is not of the image, and may not show in the new one.
        image.resize(image.len().next_multiple_of(1 << 14), 0);
        image.resize(1 << 18, 0x55);
        Self { path: "/dev/disk", start: [("/dev/disk".into(), image)].into(), options, in_kernel, old: Some(old) }
    }

    fn is_device(&self) -> bool {
        self.old.is_some()
    }

    /// The image, if it is one.
    fn image(&self, tree: &Tree) -> Option<Image> {
        Image::open(memory(tree, self.path).ok()?, &OpenOptions::default()).ok()
    }
}

impl Protocol for Create {
    fn what(&self) -> String {
        format!("{} {:?}", self.path, self.options)
    }

    fn start(&self) -> &Tree {
        &self.start
    }

    fn recorder(&self) -> RecorderOptions {
        RecorderOptions::default().with_in_kernel(self.in_kernel).with_fixed("/dev/")
    }

    fn run(&self, names: &Arc<dyn FileSystem>, _promised: &dyn Fn()) -> Verdict {
        let path = Path::new(self.path);
        if self.is_device() {
            let storage = names.open(path, &Access::write()).map_err(wrong)?;
            return self.options.write_to(&*storage).map_err(wrong);
        }
        let storage = names.create_new(path).map_err(wrong)?;
        Image::create(storage, &self.options).map_err(wrong)?.close().map_err(wrong)?;
        names.sync_dir(Path::new("/d")).map_err(wrong)
    }

    fn judge(&self, tree: &Tree, promises: usize) -> Verdict {
        let Some(image) = self.image(tree) else {
            return if promises == 0 { Ok(()) } else { Err("there is no image".to_owned()) };
        };
        assert_sound(tree, self.path, true)?;
        let shown = try_shown(&image, &[]).ok_or("it cannot be read")?;
        if promises == 0 && self.old.as_ref() == Some(&shown) {
            return Ok(());
        }
        if shown.len() as u64 != self.options.size || shown.iter().any(|byte| *byte != 0) {
            return Err("neither the old disk nor an empty one".to_owned());
        }
        let backing = image.header().backing_file;
        if backing != self.options.backing.as_ref().map(|(name, _)| name.clone()) {
            return Err(format!("over {backing:?}"));
        }
        Ok(())
    }

    fn judge_kept(&self, tree: &Tree, promises: usize) -> Verdict {
        self.judge(tree, promises)?;
        assert_sound(tree, self.path, false)
    }

    fn recover(&self, names: &Arc<dyn FileSystem>) -> Verdict {
        let path = Path::new(self.path);
        if names.exists(path).map_err(wrong)? {
            let storage = names.open(path, &Access::read()).map_err(wrong)?;
            if Image::open(storage, &OpenOptions::default()).is_ok_and(|i| i.virtual_size() == self.options.size) {
                // Whole, but perhaps not durable yet.
                return names.sync_dir(path.parent().unwrap_or(path)).map_err(wrong);
            }
            if !self.is_device() {
                names.unlink(path).map_err(wrong)?;
            }
        }
        self.run(names, &|| ())
    }

    fn judge_recovered(&self, tree: &Tree) -> Verdict {
        self.judge_kept(tree, 1)
    }
}
