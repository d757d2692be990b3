//! The operations that the crash tests interrupt, each on a VM for which it has work to do.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use qcow2_chain::chain::{Format, Policy};
use qcow2_chain::format::{ClusterBits, GuestOffset};
use qcow2_chain::image::{CreateOptions, Image};
use qcow2_chain::merge::Direction;
use qcow2_chain::storage::{Access, MemoryFileSystem};
use qcow2_chain::vm::{self, AdoptOptions, FileRecord, FileRef, MergeOptions, Progress, State, VolumeSpec};

use crate::support::lab::Lab;
use crate::support::rng::Rng;

/// The virtual size of the volumes, in bytes.
pub const SIZE: u64 = 2048;

const EXTRA: &str = "/vm/extra.img";
const BASE: &str = "/vm/base.img";

/// An operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    Create,
    Revert,
    /// The revert leaves a hidden snapshot with one dependent, which is merged.
    RevertAndMerge(Direction),
    /// The snapshot lacks a volume that was attached later.
    RevertDetaching,
    /// The snapshot has a volume that was detached since.
    RevertAttaching,
    /// The snapshot has no dependents.
    DeleteLeaf,
    /// The snapshot has no dependents, and a hidden one beneath it is merged with another snapshot.
    DeleteLeafAndMerge(Direction),
    /// The snapshot has no dependents, and a hidden one beneath it is merged with the volumes.
    DeleteLeafAndMergeCurrent(Direction),
    /// The snapshot has one dependent, which has two.
    DeleteInner(Direction),
    DeleteCurrent(Direction),
    /// One file of the snapshot is protected: it is pulled from and released.
    DeleteProtected,
    /// The snapshot has several dependents.
    Hide,
    /// A deletion that was interrupted before it changed any content.
    Cancel(Direction),
    Grow,
    Shrink,
    Attach,
    Detach,
    AcceptBase,
}

pub const SHAPES: [Shape; 24] = [
    Shape::Create,
    Shape::Revert,
    Shape::RevertAndMerge(Direction::Commit),
    Shape::RevertAndMerge(Direction::Pull),
    Shape::RevertDetaching,
    Shape::RevertAttaching,
    Shape::DeleteLeaf,
    Shape::DeleteLeafAndMerge(Direction::Commit),
    Shape::DeleteLeafAndMerge(Direction::Pull),
    Shape::DeleteLeafAndMergeCurrent(Direction::Commit),
    Shape::DeleteLeafAndMergeCurrent(Direction::Pull),
    Shape::DeleteInner(Direction::Commit),
    Shape::DeleteInner(Direction::Pull),
    Shape::DeleteCurrent(Direction::Commit),
    Shape::DeleteCurrent(Direction::Pull),
    Shape::DeleteProtected,
    Shape::Hide,
    Shape::Cancel(Direction::Commit),
    Shape::Cancel(Direction::Pull),
    Shape::Grow,
    Shape::Shrink,
    Shape::Attach,
    Shape::Detach,
    Shape::AcceptBase,
];

/// Cancels when it is asked for this many times.
struct CancelAt(AtomicU64);

impl Progress for CancelAt {
    fn step(&self, _step: &qcow2_chain::progress::Step<'_>) {}
    fn is_cancelled(&self) -> bool {
        let left = self.0.load(Ordering::SeqCst);
        self.0.store(left.saturating_sub(1), Ordering::SeqCst);
        left == 0
    }
}

impl Shape {
    fn options(self) -> MergeOptions {
        let options = MergeOptions::default();
        match self {
            Self::RevertAndMerge(direction)
            | Self::DeleteLeafAndMerge(direction)
            | Self::DeleteLeafAndMergeCurrent(direction)
            | Self::DeleteInner(direction)
            | Self::DeleteCurrent(direction)
            | Self::Cancel(direction) => options.with_direction(direction),
            Self::RevertDetaching => options.with_detach_missing(true),
            _ => options,
        }
    }

    /// Returns the operations that lead there: `+` creates, `=` reverts, `-` deletes. The guest
    /// writes before each.
    fn steps(self) -> &'static [&'static str] {
        match self {
            Self::Attach | Self::AcceptBase => &[],
            Self::Create | Self::Grow | Self::Shrink | Self::RevertDetaching | Self::RevertAttaching => &["+s1"],
            Self::DeleteCurrent(_) | Self::DeleteProtected | Self::Cancel(_) | Self::Detach => &["+s1"],
            Self::Revert => &["+s1", "+s2"],
            Self::RevertAndMerge(_) => &["+s1", "+s2", "=s1", "-s1"],
            Self::DeleteLeaf | Self::Hide => &["+s1", "+s2", "=s1"],
            Self::DeleteLeafAndMerge(_) => &["+s1", "+s2", "=s1", "+s3", "-s1"],
            Self::DeleteLeafAndMergeCurrent(_) => &["+s1", "+s2", "=s1", "-s1"],
            Self::DeleteInner(_) => &["+s1", "+s2", "+s3", "=s2"],
        }
    }

    /// Brings a new VM into the state in which the operation starts.
    pub fn prepare(self, lab: &mut Lab, files: &MemoryFileSystem, rng: &mut Rng) {
        for step in self.steps() {
            if rng.chance(1, 6) {
                lab.resize("vdb", rng.within(2..8) * 512);
            }
            lab.write_all(rng);
            let name = &step[1..];
            match &step[..1] {
                "+" => lab.create(name),
                "=" => lab.revert(name),
                _ => lab.delete(name),
            }
        }
        match self {
            Self::Attach => drop(new_image(lab, EXTRA, None, rng)),
            Self::RevertDetaching => {
                let content = new_image(lab, EXTRA, None, rng);
                attach(lab, content);
            }
            Self::RevertAttaching => detach(lab),
            Self::DeleteProtected => protect(lab),
            Self::AcceptBase => {
                new_image(lab, BASE, None, rng);
                let content = new_image(lab, EXTRA, Some("base.img"), rng);
                attach(lab, content);
            }
            _ => {}
        }
        lab.write_all(rng);
        lab.check().expect("the VM at the start");
        match self {
            Self::Cancel(_) => {
                self.interrupt(lab, files, rng);
                // Unless it is cancelled, recovery completes the deletion.
                lab.taken.remove("s1");
            }
            Self::AcceptBase => {
                let base = lab.names.open(Path::new(BASE), &Access::write()).expect("the base opens");
                base.set_len(base.len().expect("a length") + 512).expect("the base grows");
            }
            _ => {}
        }
    }

    /// Interrupts the deletion of `s1` at a random point before it changes any content.
    fn interrupt(self, lab: &mut Lab, files: &MemoryFileSystem, rng: &mut Rng) {
        let (mut cancellable, mut refused) = (Vec::new(), Vec::new());
        for polls in 0.. {
            let copy = Arc::new(files.copy());
            let tried = lab.on(copy.clone()).expect("the VM loads");
            match tried.set.delete("s1", &self.options(), &CancelAt(AtomicU64::new(polls))) {
                Err(error) if error.is_cancelled() => {}
                Err(error) => panic!("{self:?}: {error}"),
                Ok(_) => break,
            }
            if tried.set.pending().expect("pending").is_some() {
                let left = copy.copy();
                match tried.set.cancel() {
                    Ok(_) => cancellable.push(left),
                    Err(error) => refused.push((polls, error.to_string())),
                }
            }
        }
        assert!(!cancellable.is_empty(), "{self:?}: no interruption can be cancelled: {refused:?}");
        let index = usize::try_from(rng.within(0..cancellable.len() as u64)).expect("an index");
        for path in cancellable[index].to_map().into_keys() {
            files.insert(&path, cancellable[index].get(&path).expect("a listed file"));
        }
        assert_eq!(lab.model().find("s1").map(|snapshot| snapshot.state), Some(State::Merging));
    }

    /// Does the operation.
    pub fn run(self, lab: &Lab) -> vm::Result<()> {
        let (set, options) = (&lab.set, self.options());
        match self {
            Self::Create => set.create("new", &Default::default()).map(drop),
            Self::Revert | Self::RevertDetaching | Self::RevertAttaching => set.revert("s1", &options, &()).map(drop),
            Self::RevertAndMerge(_) => set.revert("s2", &options, &()).map(drop),
            Self::DeleteLeaf | Self::DeleteLeafAndMerge(_) | Self::DeleteLeafAndMergeCurrent(_) => {
                set.delete("s2", &options, &()).map(drop)
            }
            Self::DeleteInner(_) | Self::DeleteCurrent(_) | Self::DeleteProtected | Self::Hide => {
                set.delete("s1", &options, &()).map(drop)
            }
            Self::Cancel(_) => set.cancel().map(drop),
            Self::Grow => set.resize("vda", SIZE + 1024, false).map(drop),
            Self::Shrink => set.resize("vda", SIZE - 1024, true).map(drop),
            Self::Attach => set.attach(&VolumeSpec::new("vdc", EXTRA), &AdoptOptions::default()),
            Self::Detach => set.detach("vdb").map(drop),
            Self::AcceptBase => set.accept_base(BASE),
        }
    }

    /// Changes the expectations to those after the operation.
    pub fn expect(self, lab: &mut Lab, before: &Lab) {
        match self {
            Self::Create => drop(lab.taken.insert("new".to_owned(), lab.now.clone())),
            Self::Revert | Self::RevertAttaching => lab.now = lab.taken["s1"].clone(),
            Self::RevertDetaching => {
                lab.now = lab.taken["s1"].clone();
                lab.outside.push(EXTRA.into());
            }
            Self::RevertAndMerge(_) => lab.now = lab.taken["s2"].clone(),
            Self::DeleteLeaf | Self::DeleteLeafAndMerge(_) | Self::DeleteLeafAndMergeCurrent(_) => {
                drop(lab.taken.remove("s2"));
            }
            Self::DeleteInner(_) | Self::DeleteCurrent(_) | Self::Hide => drop(lab.taken.remove("s1")),
            Self::DeleteProtected => {
                lab.taken.remove("s1");
                lab.outside.push("/vm/vda.img".into());
            }
            Self::Cancel(_) => {
                let model = before.model();
                let files = &model.find("s1").expect("the snapshot").files;
                let read = |(volume, record): (&String, &FileRecord)| {
                    (volume.clone(), before.read_file(&record.file).expect("the file reads"))
                };
                lab.taken.insert("s1".to_owned(), files.iter().map(read).collect());
            }
            Self::Grow => lab.now.get_mut("vda").unwrap().resize(usize::try_from(SIZE).unwrap() + 1024, 0),
            Self::Shrink => lab.now.get_mut("vda").unwrap().truncate(usize::try_from(SIZE).unwrap() - 1024),
            Self::Attach => {
                lab.outside.clear();
                let content = before.read_file(&qcow2(EXTRA)).expect("the image reads");
                lab.now.insert("vdc".to_owned(), content);
            }
            Self::Detach => {
                lab.outside.push(before.set.active_path("vdb").expect("the volume exists"));
                lab.now.remove("vdb");
            }
            Self::AcceptBase => {}
        }
    }

    /// Checks what an operation promises besides contents and records.
    ///
    /// # Errors
    /// The promise that is not kept.
    pub fn check_promise(self, lab: &Lab) -> Result<(), String> {
        if self == Self::AcceptBase {
            lab.set.open_active("vdc").map_err(|error| format!("the base is not accepted: {error}"))?;
        }
        Ok(())
    }
}

/// Creates an image that is not part of the set, and returns its content.
fn new_image(lab: &mut Lab, path: &str, backing: Option<&str>, rng: &mut Rng) -> Vec<u8> {
    let options = CreateOptions::new(SIZE).with_cluster_bits(ClusterBits::new(9).unwrap());
    let options = match backing {
        Some(backing) => options.with_backing(backing, "qcow2"),
        None => options,
    };
    let image = Image::create(lab.names.create_new(Path::new(path)).expect("a new file"), &options).expect("an image");
    if backing.is_none() {
        let content = rng.bytes(usize::try_from(SIZE).unwrap());
        image.write_at(&content, GuestOffset::ZERO).expect("written");
    }
    image.close().expect("closed");
    lab.outside.push(PathBuf::from(path));
    lab.read_file(&qcow2(path)).expect("the image reads")
}

fn qcow2(path: &str) -> FileRef {
    FileRef { path: path.to_owned(), format: Format::Qcow2 }
}

/// Attaches the extra image as volume `vdc`.
fn attach(lab: &mut Lab, content: Vec<u8>) {
    let options = AdoptOptions::default().with_policy(Policy::Beneath(vec!["/vm".into()]));
    lab.set.attach(&VolumeSpec::new("vdc", EXTRA), &options).expect("attached");
    lab.outside.retain(|path| path != Path::new(EXTRA));
    lab.now.insert("vdc".to_owned(), content);
}

/// Detaches volume `vdb`.
fn detach(lab: &mut Lab) {
    let released = lab.set.detach("vdb").expect("detached");
    lab.outside.push(released.path);
    lab.now.remove("vdb");
}

/// Records the first file of `vda` as protected.
fn protect(lab: &Lab) {
    let mut model = lab.model();
    for snapshot in model.snapshots.values_mut() {
        if let Some(record) = snapshot.files.get_mut("vda") {
            record.protected = true;
        }
    }
    lab.save(&model);
}
