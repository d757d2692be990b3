//! Random surroundings of a VM: directories, names, owners, neighbours, and the images in them.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Once, OnceLock};
use std::time::Duration;

use super::access::{ACCESSES, Access, HYPERVISOR};
use super::devices::{Loop, Mount};
use super::images;
use super::names::{Naming, backing_name, relative, volume_argument};
use super::neighbours::{Neighbour, Template, Twin, bystanders};
use super::program::{Caller, args, give, is_root};
use super::recipe::{Call, Layout, Link, Recipe};
use crate::support::qemu::Qemu;
use crate::support::rng::Rng;
use crate::support::{ram, say};

/// The content of volumes, by their names.
pub type Contents = BTreeMap<String, Vec<u8>>;

/// The virtual sizes of volumes, in bytes.
pub const SIZES: [u64; 4] = [256 << 10, 320 << 10, 512 << 10, 1 << 20];

/// The content that the snapshots and the volumes of the VM must have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    pub taken: BTreeMap<String, Contents>,
    pub now: Contents,
}

/// The program.
const PROGRAM: &str = env!("CARGO_BIN_EXE_qcow2-chain");

/// The directories, tools and rights that all worlds of a test share.
pub struct Grounds {
    pub qemu: Qemu,
    pub root: bool,
    /// The kinds of access that images can have here.
    pub accesses: Vec<Access>,
    /// A second file system.
    pub other: Option<PathBuf>,
    /// A copy of the program that other users can reach.
    open_binary: OnceLock<PathBuf>,
    // Unmounted before its directory is removed.
    _mount: Option<Mount>,
    dir: tempfile::TempDir,
}

impl Grounds {
    /// Prepares a directory; `None` without QEMU's tools.
    pub fn new() -> Option<Self> {
        Self::prepare(false)
    }

    /// Prepares a directory and, as root, a second file system; `None` without QEMU's tools.
    pub fn with_second_file_system() -> Option<Self> {
        Self::prepare(true)
    }

    fn prepare(second: bool) -> Option<Self> {
        static SAID: Once = Once::new();
        let qemu = Qemu::find()?;
        let dir = ram::dir();
        // Another user must reach the program and the worlds.
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(dir.path(), mode).expect("the mode is changed");
        let root = is_root();
        let mount = if root && second { Mount::new(dir.path()) } else { None };
        let other = mount.as_ref().map(|mount| mount.path().to_owned());
        let possible = |access: &Access| {
            [Some(dir.path()), other.as_deref()].into_iter().flatten().all(|on| access.is_possible(on))
        };
        let accesses: Vec<Access> = ACCESSES.into_iter().filter(possible).collect();
        SAID.call_once(|| {
            if !root {
                say("SKIPPED: foreign owners, other users, a second file system and devices need root");
            }
            for access in ACCESSES.iter().filter(|access| !accesses.contains(access)) {
                say(&format!("SKIPPED: {}: needs setfattr, getfattr and a file system that has it", access.label()));
            }
        });
        Some(Self { qemu, root, accesses, other, open_binary: OnceLock::new(), _mount: mount, dir })
    }

    /// A path in memory that no other world uses.
    pub fn fresh(&self, kind: &str) -> PathBuf {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        self.dir.path().join(format!("{kind}{}", NEXT.fetch_add(1, Ordering::Relaxed)))
    }

    /// A way to start the program in a directory, as another user if one is named.
    pub fn caller(&self, cwd: &Path, user: Option<(u32, u32)>) -> Caller {
        let binary = if user.is_some() { self.open_binary() } else { Path::new(PROGRAM) };
        Caller { binary: binary.to_owned(), cwd: cwd.to_owned(), user }
    }

    fn open_binary(&self) -> &Path {
        self.open_binary.get_or_init(|| {
            let copy = self.dir.path().join("program");
            std::fs::copy(PROGRAM, &copy).expect("the program is copied");
            copy
        })
    }
}

/// A VM in its surroundings, and what it must read as.
pub struct World<'a> {
    pub grounds: &'a Grounds,
    pub recipe: Recipe,
    /// The directory of the world.
    pub root: PathBuf,
    /// The directories whose content must not change unless an operation has a reason to.
    pub watched: Vec<PathBuf>,
    /// The directories of the images.
    pub dirs: Vec<PathBuf>,
    /// Files of the test.
    pub scratch: PathBuf,
    pub caller: Caller,
    /// The catalogue's own path.
    pub catalogue: PathBuf,
    pub state: State,
    pub neighbours: Vec<Neighbour>,
    pub twin: Option<Twin>,
    pub device: Option<Loop>,
    /// The name of the VM, the first part of its overlays' names.
    pub vm: String,
    /// The events so far, for the message of a failure.
    pub log: Vec<String>,
    /// The time that operations take here.
    pub pace: Duration,
    /// Files left the set and are still there: they were released, or their volume was detached.
    pub leftovers: bool,
    /// Numbers for new names.
    pub next: usize,
}

impl Drop for World<'_> {
    fn drop(&mut self) {
        self.device = None;
        let kept = std::env::var_os("QCOW2_CHAIN_CASE").is_some() && std::thread::panicking();
        if std::thread::panicking() {
            say(&format!("{:#?}\n{}\nin {}", self.recipe, self.log.join("\n"), self.root.display()));
        }
        for directory in self.watched.iter().chain([&self.scratch]).filter(|_| !kept) {
            let _ = std::fs::remove_dir_all(directory);
        }
    }
}

impl<'a> World<'a> {
    /// Builds the files of a world. The VM is not taken in yet; the result has the arguments of `vm
    /// init`.
    pub fn build(grounds: &'a Grounds, recipe: Recipe, rng: &mut Rng) -> (Self, Vec<OsString>) {
        let (root, scratch) = (grounds.fresh("world"), grounds.fresh("scratch"));
        std::fs::create_dir(&scratch).expect("a directory");
        std::fs::create_dir(&root).expect("a directory");
        let mut watched = vec![root.clone()];
        let mut dirs = vec![root.join(recipe.naming.directory("a"))];
        match recipe.layout {
            Layout::One => {}
            Layout::Two => dirs.push(root.join(recipe.naming.directory("b"))),
            Layout::TwoFileSystems => {
                let other = grounds.other.as_ref().expect("a second file system");
                let other = other.join(root.file_name().expect("a name"));
                std::fs::create_dir(&other).expect("a directory");
                dirs.push(other.join(recipe.naming.directory("b")));
                watched.push(other);
            }
        }
        for directory in dirs.iter().chain([&root.join("links"), &root.join("templates"), &root.join("twin")]) {
            std::fs::create_dir(directory).expect("a directory");
        }
        let home = if recipe.catalogue_above { root.clone() } else { dirs[0].clone() };
        let odd = matches!(recipe.naming, Naming::Space | Naming::Unicode | Naming::Quotes | Naming::Dash);
        let name = if odd { recipe.naming.image("web", "json") } else { "web.json".into() };
        // The names in /dev are common to all worlds.
        let number = scratch.file_name().expect("a name").to_string_lossy().into_owned();
        let vm = if recipe.device { format!("web{}{number}", std::process::id()) } else { "web".to_owned() };
        let mut world = Self {
            caller: grounds.caller(Path::new("/"), recipe.access.user()),
            catalogue: home.join(name),
            state: State::default(),
            neighbours: Vec::new(),
            twin: None,
            device: None,
            log: Vec::new(),
            pace: Duration::from_millis(10),
            leftovers: false,
            next: 0,
            grounds,
            recipe,
            root,
            watched,
            dirs,
            scratch,
            vm,
        };
        let init = world.furnish(rng);
        (world, init)
    }

    /// Creates the images and the neighbours, and returns the arguments of `vm init`.
    fn furnish(&mut self, rng: &mut Rng) -> Vec<OsString> {
        self.own_directories();
        let mut init = self.verb("init", &[], rng);
        init.extend(args(&["--vm", &self.vm]));
        for number in 0..self.recipe.adopted {
            let name = format!("a{number}");
            init.extend(args(&["--snapshot", &name]));
            self.state.taken.insert(name, Contents::new());
        }
        for directory in self.dirs.iter().chain([&self.root.join("templates")]) {
            init.extend(["--allow".into(), directory.clone().into()]);
        }
        for number in 0..self.recipe.volumes {
            let name = format!("vd{}", char::from(b'a' + u8::try_from(number).unwrap()));
            let argument = if self.recipe.device && number == 0 {
                self.device_volume(&name, rng)
            } else {
                self.volume(&name, rng)
            };
            init.extend(["--volume".into(), argument]);
        }
        if self.recipe.bystanders {
            bystanders(&self.dirs[0], rng);
        }
        if self.recipe.twin {
            let (home, pool) = (self.root.join("twin"), self.dirs[0].clone());
            self.twin = Some(Twin::new(&home, &pool, &self.caller, &self.recipe, rng));
        }
        init
    }

    /// Gives the directories to the user that the program runs as.
    fn own_directories(&self) {
        if self.recipe.access.user().is_none() {
            return;
        }
        let inner = [self.root.join("links"), self.root.join("templates"), self.root.join("twin")];
        for directory in self.watched.iter().chain(&self.dirs).chain(&inner) {
            give(directory, HYPERVISOR, 0o755);
        }
    }

    /// Creates the files of a volume, from the oldest to the active one, and returns its argument
    /// for `vm init`.
    fn volume(&mut self, name: &str, rng: &mut Rng) -> OsString {
        let number = self.state.now.len();
        let size = rng.pick(&SIZES);
        let mut content = vec![0; usize::try_from(size).unwrap()];
        let mut below: Option<PathBuf> = None;
        if self.recipe.template {
            let template = Template::new(self.root.join("templates").join(format!("{name}.qcow2")), size, rng);
            let other = self.root.join("templates").join(format!("other-{name}.qcow2"));
            self.neighbours.push(Neighbour::on(&other, &template.path, &template.content, rng));
            template.protect();
            content.clone_from(&template.content);
            below = Some(template.path);
        }
        let raw_root = self.recipe.raw && below.is_none();
        for level in 0..=self.recipe.adopted {
            let raw = raw_root && level == 0;
            let top = level == self.recipe.adopted;
            let stem = if top { name.to_owned() } else { format!("{name}-{level}") };
            let directory = &self.dirs[(number + level) % self.dirs.len()];
            let path = directory.join(self.recipe.naming.image(&stem, if raw { "img" } else { "qcow2" }));
            let absolute = self.recipe.absolute_names || self.recipe.layout == Layout::TwoFileSystems;
            let backing = below.as_ref().map(|below| {
                let absolute = absolute && below.parent() != Some(directory);
                (backing_name(directory, below, absolute), images::format_of(below).name())
            });
            images::create(&path, raw, size, backing);
            let writes = images::writes(size, rng);
            images::write(&path, &writes);
            images::apply(&mut content, &writes);
            self.recipe.access.apply(&path);
            if !top {
                let taken = self.state.taken.get_mut(&format!("a{level}")).expect("a snapshot that is taken in");
                taken.insert(name.to_owned(), content.clone());
            }
            below = Some(path);
        }
        self.state.now.insert(name.to_owned(), content);
        let active = below.expect("at least one file");
        let raw = raw_root && self.recipe.adopted == 0;
        self.volume_argument(name, &active, raw, rng)
    }

    /// The argument of a volume, by the path or the link that this world uses.
    fn volume_argument(&self, name: &str, path: &Path, raw: bool, rng: &mut Rng) -> OsString {
        let file = path.file_name().expect("an image has a name");
        let links = self.root.join("links");
        let named = match self.recipe.link {
            Link::Image => {
                let link = links.join(file);
                std::os::unix::fs::symlink(path, &link).expect("a link");
                link
            }
            Link::Directory => {
                let link = links.join(format!("to-{name}"));
                std::os::unix::fs::symlink(path.parent().expect("a directory"), &link).expect("a link");
                link.join(file)
            }
            Link::Hard if path.starts_with(&self.root) => {
                std::fs::hard_link(path, links.join(format!("second-{name}"))).expect("a second name");
                path.to_owned()
            }
            _ if rng.chance(1, 2) => relative(&self.caller.cwd, path),
            _ => path.to_owned(),
        };
        let more = raw.then(|| ("format", "raw".as_ref()));
        volume_argument(name, &named, more.as_slice())
    }

    /// Creates a volume on a loop device, raw or qcow2, and returns its argument for `vm init`.
    fn device_volume(&mut self, name: &str, rng: &mut Rng) -> OsString {
        let size = rng.pick(&SIZES);
        let raw = self.recipe.raw;
        let length = if raw { size } else { 8 << 20 };
        let device = Loop::new(&self.scratch.join("device"), length).expect("a loop device, as root");
        if !raw {
            let access = qcow2_chain::storage::Access::write();
            let storage = qcow2_chain::storage::FileStorage::open(&device.path, &access).expect("the device opens");
            images::create_in(storage, size, None);
        }
        let mut content = vec![0; usize::try_from(size).unwrap()];
        let writes = images::writes(size, rng);
        images::write(&device.path, &writes);
        images::apply(&mut content, &writes);
        self.state.now.insert(name.to_owned(), content);
        let overlays = self.dirs[0].as_os_str();
        let format = if raw { "raw" } else { "qcow2" };
        let named = if rng.chance(1, 2) {
            // As LVM names its volumes.
            let link = self.root.join("links").join("volume");
            std::os::unix::fs::symlink(&device.path, &link).expect("a link");
            link
        } else {
            device.path.clone()
        };
        self.device = Some(device);
        volume_argument(name, &named, &[("format", format.as_ref()), ("overlay_dir", overlays)])
    }

    /// A `vm` verb with the catalogue as this world names it, from the directory that this world
    /// uses.
    pub fn verb(&mut self, verb: &str, more: &[OsString], rng: &mut Rng) -> Vec<OsString> {
        let link = self.root.join("links").join("catalogue.json");
        let mut named = self.catalogue.clone();
        if self.recipe.link == Link::Catalogue && self.catalogue.exists() {
            if !link.is_symlink() {
                std::os::unix::fs::symlink(&self.catalogue, &link).expect("a link");
            }
            named = rng.pick(&[named, link]);
        }
        let home = named.parent().expect("a directory").to_owned();
        (self.caller.cwd, named) = match self.recipe.call {
            Call::Absolute => (PathBuf::from("/"), named),
            Call::Here => (home.clone(), relative(&home, &named)),
            Call::Elsewhere => (self.root.join("twin"), relative(&self.root.join("twin"), &named)),
        };
        [&[verb.into(), named.into()], more].concat()
    }
}
