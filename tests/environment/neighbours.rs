//! Files in the directories of a VM that do not belong to it: templates, other VMs, clones and
//! bystanders.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::images;
use super::names::{backing_name, volume_argument};
use super::program::{Caller, args};
use super::recipe::Recipe;
use super::world::SIZES;
use crate::support::rng::Rng;

/// An image of someone else, and what its guest reads.
#[derive(Clone, Debug)]
pub struct Neighbour {
    pub path: PathBuf,
    pub content: Vec<u8>,
    /// Backed by the active file of a volume: the guest's next write invalidates it.
    pub on_active: bool,
    /// Backed by a file of the set.
    pub clone_of_ours: bool,
}

impl Neighbour {
    /// Creates an image on another one, with data of its own.
    pub fn on(path: &Path, backing: &Path, content: &[u8], rng: &mut Rng) -> Self {
        let format = images::format_of(backing).name();
        let size = content.len() as u64;
        let name = backing_name(path.parent().expect("a directory"), backing, false);
        images::create(path, false, size, Some((name, format)));
        let mut content = content.to_vec();
        let writes = images::writes(size, rng);
        images::write(path, &writes);
        images::apply(&mut content, &writes);
        Self { path: path.to_owned(), content, on_active: false, clone_of_ours: false }
    }

    /// Compares what its guest reads with what it must read.
    ///
    /// # Errors
    /// A message with the difference.
    pub fn judge(&self) -> Result<(), String> {
        images::compare(&self.path, &self.content).map_err(|wrong| format!("neighbour: {wrong}"))
    }
}

/// A read-only image that several VMs are based on.
#[derive(Clone, Debug)]
pub struct Template {
    pub path: PathBuf,
    pub content: Vec<u8>,
}

impl Template {
    /// Creates a template of `size` bytes, mode 0444, in a directory.
    pub fn new(path: PathBuf, size: u64, rng: &mut Rng) -> Self {
        let mut content = vec![0; usize::try_from(size).unwrap()];
        images::create(&path, false, size, None);
        for _ in 0..2 {
            let writes = images::writes(size, rng);
            images::write(&path, &writes);
            images::apply(&mut content, &writes);
        }
        Self { path, content }
    }

    /// Makes the file read-only for all.
    pub fn protect(&self) {
        let mut permissions = std::fs::metadata(&self.path).expect("the template").permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o444);
        std::fs::set_permissions(&self.path, permissions).expect("the template is read-only");
    }
}

/// A second VM of the same name, whose images are in the same directory.
#[derive(Clone, Debug)]
pub struct Twin {
    pub catalogue: PathBuf,
    snapshots: usize,
}

impl Twin {
    /// Creates the second VM with one snapshot.
    pub fn new(home: &Path, pool: &Path, caller: &Caller, recipe: &Recipe, rng: &mut Rng) -> Self {
        let image = pool.join("twin-vda.qcow2");
        let size = rng.pick(&SIZES);
        images::create(&image, false, size, None);
        images::write(&image, &images::writes(size, rng));
        recipe.access.apply(&image);
        let mut twin = Self { catalogue: home.join("web.json"), snapshots: 0 };
        let mut init = args(&["init", "--vm", "web", "--volume"]);
        init.push(volume_argument("vda", &image, &[]));
        init.push(twin.catalogue.clone().into());
        let run = caller.run(&init);
        assert!(run.done(), "the second VM is not taken in: {}", run.stderr);
        twin.snapshot(caller);
        twin
    }

    /// Takes a snapshot of the second VM, which must succeed.
    pub fn snapshot(&mut self, caller: &Caller) {
        self.snapshots += 1;
        let words: [OsString; 3] =
            ["snapshot".into(), self.catalogue.clone().into(), format!("t{}", self.snapshots).into()];
        let run = caller.run(&words);
        assert!(run.done(), "the second VM's snapshot fails: {}", run.stderr);
    }
}

/// Creates files that a careless program takes for its own, or that stop a careless search of the
/// directory.
pub fn bystanders(pool: &Path, rng: &mut Rng) {
    for name in ["vda.qcow2.new", "vda-0.qcow2.new", "web-vda.1.qcow2", "web-vdb.2.qcow2", "web-vda.3.qcow2", "notes"] {
        std::fs::write(pool.join(name), rng.bytes(3000)).expect("there is room");
    }
    let junk = [&b"QFI\xfb\0\0\0\x03"[..], &rng.bytes(4096)].concat();
    std::fs::write(pool.join("junk.qcow2"), junk).expect("there is room");
    std::fs::write(pool.join("empty.qcow2"), b"").expect("there is room");
    std::fs::create_dir(pool.join("directory.qcow2")).expect("a directory");
    let fifo = nix::sys::stat::Mode::from_bits_truncate(0o644);
    nix::unistd::mkfifo(&pool.join("fifo.qcow2"), fifo).expect("a FIFO");
    for (name, target) in [("dangling.qcow2", "nothing"), ("loop.qcow2", "loop.qcow2")] {
        std::os::unix::fs::symlink(target, pool.join(name)).expect("a link");
    }
}
