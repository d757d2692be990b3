//! The oracle: the conditions that hold after every operation, and the directory trees that it compares.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use super::devices::in_dev;
use super::images;
use super::program::Run;
use super::world::{Contents, State, World};
use crate::support::rng::Rng;

/// The kind of a directory entry, with what it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    File { content: Vec<u8>, mtime: (i64, i64) },
    Directory,
    Link(PathBuf),
    Other(u64),
}

/// A directory entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub kind: Kind,
    pub identity: (u64, u64),
    pub mode: u32,
    pub owner: (u32, u32),
}

impl Entry {
    fn read(path: &Path) -> std::io::Result<Self> {
        let found = path.symlink_metadata()?;
        let kind = found.file_type();
        let kind = if kind.is_dir() {
            Kind::Directory
        } else if kind.is_symlink() {
            Kind::Link(std::fs::read_link(path)?)
        } else if kind.is_block_device() || !kind.is_file() {
            Kind::Other(found.rdev())
        } else {
            Kind::File { content: std::fs::read(path)?, mtime: (found.mtime(), found.mtime_nsec()) }
        };
        let (identity, owner) = ((found.dev(), found.ino()), (found.uid(), found.gid()));
        Ok(Self { kind, identity, mode: found.mode() & 0o7777, owner })
    }

    /// A description of the difference from another entry, or `None` if there is none.
    fn difference(&self, other: &Self) -> Option<String> {
        if self.identity != other.identity {
            return Some("is another file".to_owned());
        }
        if (self.mode, self.owner) != (other.mode, other.owner) {
            let now = format!("{:o} {:?}", other.mode, other.owner);
            return Some(format!("mode and owner {:o} {:?} became {now}", self.mode, self.owner));
        }
        match (&self.kind, &other.kind) {
            (Kind::File { content, .. }, Kind::File { content: now, .. }) if content != now => {
                Some(format!("content changed, {} bytes before, {} now", content.len(), now.len()))
            }
            (Kind::File { mtime, .. }, Kind::File { mtime: now, .. }) if mtime != now => {
                Some("was written to".to_owned())
            }
            (kind, now) if std::mem::discriminant(kind) != std::mem::discriminant(now) => {
                Some("is of another type".to_owned())
            }
            (Kind::Link(target), Kind::Link(now)) if target != now => Some(format!("points to {}", now.display())),
            _ => None,
        }
    }
}

/// All that is in some directories.
#[derive(Clone, Debug)]
pub struct Tree(pub BTreeMap<PathBuf, Entry>);

impl Tree {
    /// Reads directories with everything in them.
    pub fn read(directories: &[PathBuf]) -> Self {
        let mut entries = BTreeMap::new();
        let mut open = directories.to_vec();
        while let Some(directory) = open.pop() {
            for entry in std::fs::read_dir(&directory).expect("a directory of the world").flatten() {
                let path = entry.path();
                let Ok(found) = Entry::read(&path) else { continue };
                if found.kind == Kind::Directory {
                    open.push(path.clone());
                }
                entries.insert(path, found);
            }
        }
        Self(entries)
    }

    /// Fails the test unless nothing changed, apart from lock files.
    pub fn assert_unchanged(&self, now: &Self, what: &str) {
        let locks = |path: &Path| path.extension().is_some_and(|extension| extension == "lock");
        let changes = self.changes(now, locks);
        assert!(changes.is_empty(), "{what}: was refused, but\n{}", changes.join("\n"));
    }

    /// Describes the changes of entries that `may_change` does not accept.
    pub fn changes(&self, now: &Self, may_change: impl Fn(&Path) -> bool) -> Vec<String> {
        let mut changes = Vec::new();
        let paths: BTreeSet<_> = self.0.keys().chain(now.0.keys()).collect();
        for path in paths.into_iter().filter(|path| !may_change(path)) {
            let change = match (self.0.get(path), now.0.get(path)) {
                (Some(old), Some(new)) => old.difference(new),
                (Some(_), None) => Some("is gone".to_owned()),
                _ => Some("is new".to_owned()),
            };
            changes.extend(change.map(|change| format!("{}: {change}", path.display())));
        }
        changes
    }
}

/// The content of the catalogue, as `vm list` prints it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// The active files, by volume.
    pub active: BTreeMap<String, PathBuf>,
    /// Name, state and files of the snapshots.
    pub snapshots: Vec<(String, String, BTreeMap<String, PathBuf>)>,
    pub current: Option<String>,
}

impl Listing {
    /// Reads the output of `vm list --json`. JSON has no bytes that are not UTF-8: `odd` are the
    /// directory names that may have them.
    fn parse(text: &str, base: &Path, odd: &[&OsStr]) -> Self {
        let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("vm list: {error}: {text}"));
        let all = |value: &Value| value.as_array().cloned().unwrap_or_default();
        let word = |value: &Value| value.as_str().map(str::to_owned).unwrap_or_default();
        // Paths are printed as seen from the working directory.
        let path = |value: &Value| {
            let exact = |part: Component<'_>| {
                let name = odd.iter().find(|name| name.to_string_lossy() == part.as_os_str().to_string_lossy());
                name.map_or_else(|| part.as_os_str().to_owned(), |name| (*name).to_owned())
            };
            let path: PathBuf = base.join(word(value)).components().map(exact).collect();
            resolve(path)
        };
        let files = |value: &Value| {
            let files = value.as_object().cloned().unwrap_or_default();
            files.iter().map(|(volume, file)| (volume.clone(), path(file))).collect()
        };
        let snapshots = all(&value["snapshots"]);
        Self {
            active: all(&value["volumes"]).iter().map(|v| (word(&v["name"]), path(&v["active"]))).collect(),
            snapshots: snapshots.iter().map(|s| (word(&s["name"]), word(&s["state"]), files(&s["files"]))).collect(),
            current: value["current"].as_str().map(str::to_owned),
        }
    }

    /// All files of the set, with links resolved.
    pub fn files(&self) -> BTreeSet<PathBuf> {
        let frozen = self.snapshots.iter().flat_map(|(_, _, files)| files.values());
        self.active.values().chain(frozen).cloned().collect()
    }

    /// The file of a snapshot that is not hidden.
    pub fn frozen(&self, snapshot: &str, volume: &str) -> Option<&PathBuf> {
        let listed = |s: &&(String, String, _)| s.0 == snapshot && s.1 != "hidden";
        self.snapshots.iter().find(listed).and_then(|(_, _, files)| files.get(volume))
    }
}

/// The world before an operation.
pub struct Before {
    pub tree: Tree,
    pub listing: Listing,
    /// The extended attribute of each active file.
    attributes: BTreeMap<String, String>,
}

impl World<'_> {
    /// Reads the catalogue by `vm list`, which must succeed.
    pub fn list(&mut self, rng: &mut Rng) -> Listing {
        let more = ["--all".into(), "--json".into()];
        let args = self.verb("list", &more, rng);
        let run = self.caller.run(&args);
        assert!(run.done(), "vm list: {}", run.stderr);
        let odd: Vec<&OsStr> = self.dirs.iter().filter_map(|directory| directory.file_name()).collect();
        Listing::parse(&run.stdout, &self.caller.cwd, &odd)
    }

    /// Pictures the world before an operation.
    pub fn before(&mut self, rng: &mut Rng) -> Before {
        let listing = self.list(rng);
        let access = self.recipe.access;
        let read = |(volume, path): (&String, &PathBuf)| Some((volume.clone(), access.read_attribute(path)?));
        let attributes = listing.active.iter().filter_map(read).collect();
        Before { tree: Tree::read(&self.watched), listing, attributes }
    }

    /// Judges an operation that was refused: nothing may have changed.
    pub fn judge_refused(&self, before: &Before, what: &str) {
        before.tree.assert_unchanged(&Tree::read(&self.watched), what);
        self.judge_neighbours(what);
    }

    /// Judges an operation that was done, or that was recovered: the VM must read as one of the
    /// `candidates`, which becomes the state of the world. Returns its number.
    pub fn judge_done(&mut self, before: &Before, run: Option<&Run>, candidates: &[State], rng: &mut Rng) -> usize {
        let what = &self.log.last().cloned().unwrap_or_default();
        let listing = self.list(rng);
        let tree = Tree::read(&self.watched);
        self.judge_released(before, &listing, run, what);
        self.judge_files(before, &listing, &tree, what);
        self.judge_new(before, &listing, &tree, what);
        let mut wrong = Vec::new();
        for (number, candidate) in candidates.iter().enumerate() {
            match reads_as(&listing, candidate) {
                Ok(()) => {
                    self.state = candidate.clone();
                    self.judge_images(&listing, what);
                    self.judge_neighbours(what);
                    return number;
                }
                Err(message) => wrong.push(message),
            }
        }
        panic!("{what}: {}", wrong.join("; "));
    }

    /// Only files of the set changed, appeared or vanished, and none was replaced by another file.
    fn judge_files(&self, before: &Before, listing: &Listing, tree: &Tree, what: &str) {
        let (old, new) = (before.listing.files(), listing.files());
        let companions = self.catalogue.as_os_str();
        let ours = |path: &Path| {
            let name = path.as_os_str();
            old.contains(path) || new.contains(path) || starts_with(name, companions) || self.is_second_name(path, tree)
        };
        let changes = before.tree.changes(tree, ours);
        assert!(changes.is_empty(), "{what}: other files changed:\n{}", changes.join("\n"));
        for path in old.iter().filter(|path| tree.0.contains_key(*path)) {
            let Some(entry) = before.tree.0.get(path) else { continue };
            let now = &tree.0[path];
            assert!(entry.identity == now.identity, "{what}: {} was replaced", path.display());
            let access = |entry: &Entry| (entry.mode, entry.owner);
            assert_eq!(access(entry), access(now), "{what}: mode and owner of {}", path.display());
            if !new.contains(path) {
                let change = entry.difference(now);
                assert!(change.is_none(), "{what}: {}, which was released, {change:?}", path.display());
            }
        }
        let catalogue =
            [&before.tree, tree].map(|tree| tree.0.get(&self.catalogue).map(|entry| (entry.mode, entry.owner)));
        assert_eq!(catalogue[0], catalogue[1], "{what}: mode and owner of the catalogue");
        for path in new.iter().filter(|path| !self.is_device(path)) {
            let known = self.watched.iter().any(|directory| path.starts_with(directory));
            assert!(known && path.exists(), "{what}: {} is in the catalogue", path.display());
        }
        if let Some(device) = &self.device {
            let kind = device.path.metadata().map(|found| found.file_type().is_block_device());
            assert!(kind.is_ok_and(|is_block| is_block), "{what}: {} is no device now", device.path.display());
            assert_eq!(in_dev(&self.vm), Vec::<String>::new(), "{what}: files in /dev");
        }
    }

    /// Returns `true` if a path is the block device of this world.
    pub fn is_device(&self, path: &Path) -> bool {
        self.device.as_ref().is_some_and(|device| device.path == path)
    }

    /// A second name of an image of the set, made by this world.
    fn is_second_name(&self, path: &Path, tree: &Tree) -> bool {
        let second = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("second-"));
        second && tree.0.contains_key(path)
    }

    /// New images have the owner, mode and attributes of the volume's active file.
    fn judge_new(&self, before: &Before, listing: &Listing, tree: &Tree, what: &str) {
        for (volume, path) in &listing.active {
            let Some(now) = tree.0.get(path).filter(|_| !before.tree.0.contains_key(path)) else { continue };
            let old = before.listing.active.get(volume);
            let Some(old) = old.and_then(|old| before.tree.0.get(old)) else { continue };
            assert_eq!(
                (format!("{:o}", now.mode), now.owner),
                (format!("{:o}", old.mode), old.owner),
                "{what}: mode and owner of {}",
                path.display()
            );
            if let Some(kept) = before.attributes.get(volume) {
                let now = self.recipe.access.read_attribute(path);
                assert_eq!(now.as_ref(), Some(kept), "{what}: attribute of {}", path.display());
            }
        }
    }

    /// After a kill: foreign files are as before, and no new file is readable by more users than
    /// the set's files.
    pub fn judge_killed(&self, before: &Before, what: &str) {
        let tree = Tree::read(&self.watched);
        let old = before.listing.files();
        let companions = self.catalogue.as_os_str();
        let new = |path: &Path| !before.tree.0.contains_key(path);
        let ours = |path: &Path| {
            old.contains(path)
                || starts_with(path.as_os_str(), companions)
                || self.is_second_name(path, &tree)
                || new(path)
        };
        let changes = before.tree.changes(&tree, ours);
        assert!(changes.is_empty(), "{what}: other files changed:\n{}", changes.join("\n"));
        let widest = old.iter().filter_map(|path| before.tree.0.get(path)).fold(0, |mode, entry| mode | entry.mode);
        for (path, entry) in tree.0.iter().filter(|(path, _)| new(path) && !starts_with(path.as_os_str(), companions)) {
            let wider = entry.mode & 0o777 & !widest;
            let image = self.device.is_none() && matches!(entry.kind, Kind::File { .. });
            assert!(wider == 0 || !image, "{what}: {} has mode {:o}", path.display(), entry.mode);
        }
    }

    /// Every image of the set is sound and has no leaks.
    fn judge_images(&self, listing: &Listing, what: &str) {
        for path in listing.files() {
            images::sound(&path).unwrap_or_else(|wrong| panic!("{what}: {wrong}"));
        }
    }

    /// Other VMs read what they read before.
    pub fn judge_neighbours(&self, what: &str) {
        for neighbour in &self.neighbours {
            neighbour.judge().unwrap_or_else(|wrong| panic!("{what}: {wrong}"));
        }
    }

    /// Files that left the set and are still there are reported as released.
    fn judge_released(&mut self, before: &Before, listing: &Listing, run: Option<&Run>, what: &str) {
        let new = listing.files();
        let left: Vec<PathBuf> =
            before.listing.files().difference(&new).filter(|path| path.exists()).cloned().collect();
        self.leftovers |= !left.is_empty();
        // The files of a detached volume are the caller's.
        let detached = listing.active.len() < before.listing.active.len();
        let Some(run) = run.filter(|_| !detached) else { return };
        for path in left {
            let reported = run.stdout.contains("released");
            assert!(reported, "{what}: {} is left over and not reported:\n{}", path.display(), run.stdout);
        }
    }

    /// At the end of a case QEMU judges: every image is clean, and every volume and snapshot reads
    /// as it must.
    pub fn judge_by_qemu(&mut self, rng: &mut Rng) {
        let listing = self.list(rng);
        let qemu = self.grounds.qemu;
        for path in listing.files() {
            if images::format_of(&path) == qcow2_chain::chain::Format::Qcow2 {
                qemu.assert_clean(&path);
            }
        }
        let raw = self.scratch.join("expected");
        for (path, expected) in expectations(&listing, &self.state).expect("the state was compared before") {
            std::fs::write(&raw, expected).expect("there is room");
            let format = images::format_of(&path).name();
            let args = ["compare", "-U", "-f", format, "-F", "raw"].map(OsString::from);
            let run = qemu.try_img(&[&args[..], &[path.clone().into(), raw.clone().into()]].concat());
            assert_eq!(run.code, 0, "QEMU reads {}: {}{}", path.display(), run.stdout, run.stderr);
        }
    }
}

/// Resolves links in a path, also of a file that is missing.
fn resolve(path: PathBuf) -> PathBuf {
    if let Ok(resolved) = std::fs::canonicalize(&path) {
        return resolved;
    }
    let parent = path.parent().and_then(|parent| std::fs::canonicalize(parent).ok());
    match (parent, path.file_name()) {
        (Some(parent), Some(name)) => parent.join(name),
        _ => path,
    }
}

/// Returns `true` if a path is another path with something appended.
fn starts_with(path: &OsStr, prefix: &OsStr) -> bool {
    path.as_encoded_bytes().starts_with(prefix.as_encoded_bytes())
}

/// The files that must read as something, with that content.
///
/// # Errors
/// A message if the volumes or snapshots are not those of the state.
fn expectations<'s>(listing: &Listing, state: &'s State) -> Result<Vec<(PathBuf, &'s Vec<u8>)>, String> {
    let mut expected = Vec::new();
    let volumes: Vec<_> = listing.active.keys().collect();
    if volumes != state.now.keys().collect::<Vec<_>>() {
        return Err(format!("the volumes are {volumes:?}"));
    }
    let listed = listing.snapshots.iter().filter(|(_, state, _)| state != "hidden");
    let names: BTreeSet<_> = listed.map(|(name, _, _)| name).collect();
    if names != state.taken.keys().collect() {
        let wanted: Vec<_> = state.taken.keys().collect();
        return Err(format!("the snapshots are {names:?} instead of {wanted:?}"));
    }
    for (volume, content) in &state.now {
        expected.push((listing.active[volume].clone(), content));
    }
    let of = |(name, contents): (&'s String, &'s Contents)| {
        contents.iter().map(move |(volume, content)| (name, volume, content)).collect::<Vec<_>>()
    };
    for (snapshot, volume, content) in state.taken.iter().flat_map(of) {
        let path = listing.frozen(snapshot, volume).ok_or_else(|| format!("{snapshot} has no file of {volume}"))?;
        expected.push((path.clone(), content));
    }
    Ok(expected)
}

/// Compares all volumes and snapshots with a state.
///
/// # Errors
/// A message with the first difference.
pub fn reads_as(listing: &Listing, state: &State) -> Result<(), String> {
    for (path, content) in expectations(listing, state)? {
        images::compare(&path, content)?;
    }
    Ok(())
}
