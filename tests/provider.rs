//! Overlay providers: containers are requested, written and released as the contract of [`OverlayProvider`] states, also
//! when an operation is interrupted at any call, or the container is full. Each container is full of stale bytes.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use qcow2_chain::chain::{Chain, ChainOptions, Policy};
use qcow2_chain::format::{ClusterBits, GuestOffset};
use qcow2_chain::image::{CreateOptions, Image, OpenOptions};
use qcow2_chain::merge::Direction;
use qcow2_chain::storage::fault::{Fault, Faults, FaultyFileSystem, Plan, Reach};
use qcow2_chain::storage::{self, FileSystem, HostFileSystem, MemoryFileSystem, MemoryStorage, Storage};
use qcow2_chain::vm::{self, Error, MergeOptions, OverlayProvider, OverlayRequest, Recovery, SnapshotSet};

use crate::support::lab::{Lab, LabShape, read};
use crate::support::rng::{Rng, cases, count, seed};

/// The content of a container that was another volume's before.
const STALE: u8 = 0xff;

/// A provider of containers of fixed length in memory, beside the other files, so that [`Lab::check`] finds a leaked one.
#[derive(Debug)]
struct Pool {
    memory: Arc<MemoryFileSystem>,
    /// The file system whose faults are those of the provider too.
    names: Arc<dyn FileSystem>,
    /// The length of containers. `None` is that of a full overlay.
    room: Option<u64>,
    calls: Mutex<Vec<String>>,
}

impl Pool {
    fn new(memory: &Arc<MemoryFileSystem>, names: Arc<dyn FileSystem>, room: Option<u64>) -> Arc<Self> {
        Arc::new(Self { memory: Arc::clone(memory), names, room, calls: Mutex::default() })
    }

    fn log(&self, call: &str, path: &Path) {
        self.calls.lock().unwrap().push(format!("{call} {}", path.display()));
    }

    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }
}

/// Returns a container of this length, full of stale bytes.
fn container(path: &Path, len: u64) -> Arc<MemoryStorage> {
    let storage = MemoryStorage::fixed(path.display().to_string(), len);
    storage.write_at(&vec![STALE; usize::try_from(len).unwrap()], 0).unwrap();
    Arc::new(storage)
}

impl OverlayProvider for Pool {
    fn path(&self, request: &OverlayRequest<'_>) -> vm::Result<PathBuf> {
        let path = Path::new("/vm").join(request.name);
        self.log("path", &path);
        Ok(path)
    }

    fn create(&self, request: &OverlayRequest<'_>) -> vm::Result<()> {
        let path = Path::new("/vm").join(request.name);
        self.log("create", &path);
        if self.names.exists(&path)? {
            let why = "it exists".to_owned();
            return Err(storage::Error::Refused { name: path.display().to_string(), why }.into());
        }
        self.memory.insert(&path, container(&path, self.room.unwrap_or(request.full_size)));
        // A fault here is a provider that dies with its container created, or that fails and removes it.
        self.names.exists(&path).map(drop).inspect_err(|_| drop(self.names.unlink(&path))).map_err(Into::into)
    }

    fn release(&self, path: &Path) -> vm::Result<()> {
        self.log("release", path);
        if self.names.exists(path)? {
            self.names.unlink(path)?;
        }
        Ok(())
    }
}

/// A VM in memory whose overlays a pool provides.
struct World {
    memory: Arc<MemoryFileSystem>,
    lab: Lab,
}

impl World {
    fn new(shape: LabShape, rng: &mut Rng) -> Self {
        let memory = Arc::new(MemoryFileSystem::new());
        let lab = Lab::new(Arc::clone(&memory) as _, Path::new("/vm"), shape, rng);
        let mut world = Self { memory, lab };
        world.provide(None);
        world
    }

    /// Opens the set again with a pool whose containers have this length.
    fn provide(&mut self, room: Option<u64>) -> Arc<Pool> {
        let names: Arc<dyn FileSystem> = Arc::clone(&self.memory) as _;
        let pool = Pool::new(&self.memory, Arc::clone(&names), room);
        self.lab = self.lab.on(names).unwrap();
        self.lab.set = self.open(&self.lab.names, Some(Arc::clone(&pool)));
        pool
    }

    fn open(&self, names: &Arc<dyn FileSystem>, pool: Option<Arc<Pool>>) -> SnapshotSet {
        let set = SnapshotSet::load_in(Arc::clone(names), &self.lab.catalogue).unwrap().with_jobs(1);
        match pool {
            Some(pool) => set.with_provider(pool),
            None => set,
        }
    }

    /// A copy of all files, with the same expectations.
    fn copy(&self) -> Self {
        let memory = Arc::new(MemoryFileSystem::new());
        for path in self.memory.list(Path::new("/vm")).unwrap() {
            let (storage, name) = (self.memory.get(&path).unwrap(), path.display().to_string());
            let bytes = storage.to_vec();
            let copy = if storage.is_fixed_size() {
                let copy = MemoryStorage::fixed(name, bytes.len() as u64);
                copy.write_at(&bytes, 0).unwrap();
                copy
            } else {
                MemoryStorage::with_bytes(name, bytes)
            };
            memory.insert(&path, Arc::new(copy));
        }
        let lab = self.lab.on(Arc::clone(&memory) as _).unwrap();
        let mut world = Self { memory, lab };
        world.provide(None);
        world
    }

    /// Runs an operation on a set with faults, for the set and its provider alike.
    fn run_with(&self, operation: Operation, plan: Plan) -> (vm::Result<()>, u64) {
        let faults = Faults::new(plan);
        let names: Arc<dyn FileSystem> = Arc::new(FaultyFileSystem::new(Arc::clone(&self.memory) as _, &faults));
        let pool = Pool::new(&self.memory, Arc::clone(&names), None);
        // Loading the catalogue is not a part of the operation.
        let set = SnapshotSet::load_in(Arc::clone(&names), &self.lab.catalogue);
        let done = set.and_then(|set| operation.run(&set.with_jobs(1).with_provider(pool)));
        (done, faults.calls())
    }

    fn containers(&self) -> Vec<PathBuf> {
        let all = self.memory.list(Path::new("/vm")).unwrap();
        all.into_iter().filter(|path| self.memory.get(path).unwrap().is_fixed_size()).collect()
    }
}

/// An operation on a VM with the snapshots s1 and s2, of which s2 is current.
#[derive(Clone, Copy, Debug)]
enum Operation {
    Create,
    Revert,
    Delete(Direction),
}

const OPERATIONS: [Operation; 4] =
    [Operation::Create, Operation::Revert, Operation::Delete(Direction::Commit), Operation::Delete(Direction::Pull)];

impl Operation {
    fn run(self, set: &SnapshotSet) -> vm::Result<()> {
        match self {
            Self::Create => set.create("new", &Default::default()),
            Self::Revert => set.revert("s1", &Default::default(), &()),
            Self::Delete(direction) => set.delete("s2", &MergeOptions::default().with_direction(direction), &()),
        }
        .map(drop)
    }

    fn expect(self, lab: &mut Lab) {
        match self {
            Self::Create => drop(lab.taken.insert("new".to_owned(), lab.now.clone())),
            Self::Revert => lab.now = lab.taken["s1"].clone(),
            Self::Delete(_) => drop(lab.taken.remove("s2")),
        }
    }
}

/// A world with s1 and s2, and data in every layer.
fn with_snapshots(rng: &mut Rng) -> World {
    let shape = LabShape { volumes: 2, size: 8 << 10, raw: rng.chance(1, 2), ..LabShape::default() };
    let mut world = World::new(shape, rng);
    for name in ["s1", "s2"] {
        world.lab.write_all(rng);
        world.lab.create(name);
    }
    world.lab.write_all(rng);
    world.lab.check().expect("the state before");
    world
}

/// Checks that the world is as before the operation or as after it, and that no container is leaked or lost.
fn judge(world: &World, operation: Operation, at: &str) -> bool {
    let mut after = world.lab.on(Arc::clone(&world.memory) as _).unwrap();
    operation.expect(&mut after);
    let (before, after) = (world.lab.check(), after.check());
    assert!(before.is_ok() || after.is_ok(), "{operation:?}, {at}: neither before ({before:?}) nor after ({after:?})");
    after.is_ok()
}

#[test]
fn provider_is_asked_for_each_overlay_and_releases_it() {
    let mut rng = Rng::new(seed());
    let shape = LabShape { volumes: 2, ..LabShape::default() };
    let mut world = World::new(shape, &mut rng);
    let pool = world.provide(None);
    world.lab.write_all(&mut rng);
    world.lab.create("s1");
    let paths: Vec<PathBuf> = ["vda", "vdb"].map(|name| world.lab.set.active_path(name).unwrap()).to_vec();
    let calls = |verb: &str| paths.iter().map(|path| format!("{verb} {}", path.display())).collect::<Vec<_>>();
    assert_eq!(pool.calls(), [calls("path"), calls("create")].concat());
    assert_eq!(world.containers(), paths);
    world.lab.write_all(&mut rng);

    // A dry run creates nothing.
    let request = vm::Request::Create {
        name: "dry".to_owned(),
        description: String::new(),
        created: 0,
        quiesce: false,
        max_depth: 9,
    };
    world.lab.set.plan(&request, &MergeOptions::default()).unwrap();
    assert!(pool.calls().iter().all(|call| call.starts_with("path ")));
    assert_eq!(world.containers(), paths);

    // The files that were taken in are not the provider's.
    let report = world.lab.set.delete("s1", &MergeOptions::default(), &()).unwrap();
    world.lab.taken.clear();
    assert_eq!(pool.calls(), calls("release"));
    assert_eq!((report.removed, report.released), (paths, Vec::new()));
    assert!(world.containers().is_empty());
    world.lab.check().unwrap();
}

#[test]
fn provider_error_refuses_snapshot() {
    #[derive(Debug)]
    struct Nothing;
    impl OverlayProvider for Nothing {
        fn path(&self, request: &OverlayRequest<'_>) -> vm::Result<PathBuf> {
            Err(storage::Error::NoSpace { name: request.volume.to_owned(), need: request.full_size }.into())
        }
        fn create(&self, _: &OverlayRequest<'_>) -> vm::Result<()> {
            panic!("the path was refused")
        }
        fn release(&self, _: &Path) -> vm::Result<()> {
            panic!("nothing was created")
        }
    }
    let mut rng = Rng::new(seed());
    let mut world = World::new(LabShape::default(), &mut rng);
    world.lab.set = world.open(&world.lab.names, None).with_provider(Arc::new(Nothing));
    let before = world.memory.list(Path::new("/vm")).unwrap();
    let error = world.lab.set.create("s1", &Default::default()).unwrap_err();
    assert!(matches!(error, Error::Storage(storage::Error::NoSpace { .. })), "{error:?}");
    assert_eq!(world.memory.list(Path::new("/vm")).unwrap(), before);
    world.lab.check().unwrap();
}

#[test]
fn interrupted_operation_leaks_no_container() {
    cases("provider", count("QCOW2_CHAIN_VM_CASES", 1), |rng| {
        let start = with_snapshots(rng);
        for operation in OPERATIONS {
            let calls = start.copy().run_with(operation, Fault::Io.at(u64::MAX)).1;
            for number in 0..calls {
                let reach = rng.pick(&[Reach::Nothing, Reach::Half, Reach::All]);
                let world = start.copy();
                // From this call on nothing succeeds, the removal of what was created included: the process died.
                let plan = Fault::Io.at(number).with_reach(reach).ever_after();
                let (done, _) = world.run_with(operation, plan);
                let at = format!("{reach:?} of call {number} of {calls}: {done:?}");
                let recovered = world.lab.set.recover(&()).unwrap_or_else(|error| panic!("{at}: {error:?}"));
                let after = judge(&world, operation, &at);
                assert!(after || done.is_err(), "{operation:?}, {at}: reported as done, then {recovered:?}");
                assert_eq!(world.lab.set.recover(&()).unwrap(), Recovery::Clean, "{at}");
            }
        }
    });
}

#[test]
fn single_failure_leaks_no_container() {
    cases("provider once", count("QCOW2_CHAIN_VM_CASES", 2), |rng| {
        let start = with_snapshots(rng);
        for operation in OPERATIONS {
            let calls = start.copy().run_with(operation, Fault::Io.at(u64::MAX)).1;
            for number in 0..calls {
                let world = start.copy();
                let (done, _) = world.run_with(operation, Fault::Io.at(number));
                let at = format!("call {number} of {calls}: {done:?}");
                world.lab.set.recover(&()).unwrap_or_else(|error| panic!("{operation:?}, {at}: {error:?}"));
                let after = judge(&world, operation, &at);
                assert!(after || done.is_err(), "{operation:?}, {at}");
            }
        }
    });
}

#[test]
fn thin_container_without_space_is_resumable() {
    cases("provider full", count("QCOW2_CHAIN_VM_CASES", 2), |rng| {
        let start = with_snapshots(rng);
        for operation in OPERATIONS {
            let calls = start.copy().run_with(operation, Fault::NoSpace.at(u64::MAX)).1;
            for number in 0..calls {
                let world = start.copy();
                let (done, _) = world.run_with(operation, Fault::NoSpace.at(number).ever_after());
                let at = format!("full at call {number} of {calls}: {done:?}");
                // The VM can be started before the pool is extended.
                let [before, after] = [&world.lab.now, &world.lab.taken["s1"]].map(|now| world.lab.can_start(now));
                assert!(before.is_ok() || after.is_ok(), "{operation:?}, {at}: {before:?}");
                world.lab.set.recover(&()).unwrap_or_else(|error| panic!("{operation:?}, {at}: {error:?}"));
                judge(&world, operation, &at);
            }
        }
    });
}

#[test]
fn container_smaller_than_metadata_undoes_snapshot() {
    let mut rng = Rng::new(seed());
    let mut world = with_snapshots(&mut rng);
    let containers = world.containers();
    world.provide(Some(1024));
    let error = world.lab.set.create("s3", &Default::default()).unwrap_err();
    assert!(error.to_string().contains("no space left"), "{error}");
    assert_eq!(world.containers(), containers);
    assert_eq!(world.lab.set.recover(&()).unwrap(), Recovery::Clean);
    world.lab.check().unwrap();
}

#[test]
fn commit_into_full_container_is_refused() {
    let mut rng = Rng::new(seed());
    let shape = LabShape { volumes: 1, size: 64 << 10, ..LabShape::default() };
    let mut world = World::new(shape, &mut rng);
    // Room for the metadata and a part of the data.
    world.provide(Some(16 << 10));
    world.lab.create("s1");
    let small = world.containers().pop().unwrap();
    world.provide(None);
    world.lab.create("s2");
    let all = rng.bytes(64 << 10);
    let chain = world.lab.open_as_qemu("vda", true).unwrap();
    chain.write_at(&all, GuestOffset::ZERO).unwrap();
    chain.close().unwrap();
    world.lab.now.insert("vda".to_owned(), all);
    let bytes = world.memory.get(&small).unwrap().to_vec();
    let commit = MergeOptions::default().with_direction(Direction::Commit);
    let error = world.lab.set.delete("s2", &commit, &()).unwrap_err();
    assert!(matches!(error, Error::NoSpace { .. }), "{error:?}");
    assert!(world.memory.get(&small).unwrap().to_vec() == bytes, "a refused merge wrote something");
    world.lab.check().unwrap();
    // The upper container is large enough.
    world.lab.set.delete("s2", &MergeOptions::default().with_direction(Direction::Pull), &()).unwrap();
    world.lab.taken.remove("s2");
    assert!(!world.containers().contains(&small));
    world.lab.check().unwrap();
}

#[test]
fn set_without_provider_releases_and_removes_nothing() {
    let mut rng = Rng::new(seed());
    for direction in [Direction::Commit, Direction::Pull] {
        let mut world = with_snapshots(&mut rng);
        let containers = world.containers();
        world.lab.set = world.open(&world.lab.names, None);
        let report = world.lab.set.delete("s2", &MergeOptions::default().with_direction(direction), &()).unwrap();
        let released: Vec<_> = report.released.iter().map(|released| released.path.clone()).collect();
        assert_eq!((released.len(), report.removed.len()), (2, 0), "{direction:?}");
        assert!(report.released.iter().all(|released| released.reason.contains("provider")), "{report:?}");
        assert_eq!(world.containers(), containers, "{direction:?}: a container was removed");
        assert!(released.iter().all(|path| containers.contains(path)));
        // The contents are those after the deletion.
        world.lab.taken.remove("s2");
        world.lab.can_start(&world.lab.now).unwrap();
    }
}

#[test]
fn recovery_without_provider_releases_containers() {
    let mut rng = Rng::new(seed());
    let start = with_snapshots(&mut rng);
    let calls = start.copy().run_with(Operation::Create, Fault::Io.at(u64::MAX)).1;
    let mut found = 0;
    for number in 0..calls {
        let mut world = start.copy();
        let before = world.containers();
        let _ = world.run_with(Operation::Create, Fault::Io.at(number).ever_after());
        let left = world.containers();
        world.lab.set = world.open(&world.lab.names, None);
        if let Recovery::Undone { released, .. } = world.lab.set.recover(&()).unwrap() {
            let new: Vec<_> = left.iter().filter(|path| !before.contains(path)).collect();
            let released: Vec<_> = released.iter().map(|released| &released.path).collect();
            assert_eq!(released, new, "call {number}");
            found += released.len();
            world.lab.can_start(&world.lab.now).unwrap();
        }
        assert_eq!(world.containers(), left, "call {number}: a container was removed");
    }
    assert!(found > 0, "no interruption left a container");
}

#[test]
fn full_overlay_fits_into_its_container() {
    let mut rng = Rng::new(seed());
    for (cluster_bits, extended_l2, size) in [(9, false, 2 << 20), (16, false, 4 << 20), (16, true, 4 << 20)] {
        let shape = LabShape { volumes: 1, size, cluster_bits, extended_l2, raw: false };
        let mut world = World::new(shape, &mut rng);
        for name in ["s1", "s2"] {
            world.lab.create(name);
            let content = rng.bytes(usize::try_from(size).unwrap());
            let chain = world.lab.open_as_qemu("vda", true).unwrap();
            // In small parts and in a random order, so that the metadata grows step by step.
            let mut parts: Vec<usize> = (0..content.len() >> 12).collect();
            parts.sort_by_cached_key(|_| rng.within(0..u64::MAX));
            for part in parts {
                let written = chain.write_at(&content[part << 12..][..4096], GuestOffset::new((part as u64) << 12));
                written.unwrap_or_else(|error| panic!("{cluster_bits} {extended_l2}: part {part}: {error}"));
            }
            chain.close().unwrap();
            world.lab.now.insert("vda".to_owned(), content);
        }
        world.lab.check().unwrap();
        // A full overlay is committed into another full one.
        let commit = MergeOptions::default().with_direction(Direction::Commit);
        world.lab.set.delete("s2", &commit, &()).unwrap_or_else(|error| panic!("{cluster_bits}: {error:?}"));
        world.lab.taken.remove("s2");
        world.lab.check().unwrap();
    }
}

/// One random change of an image, and of the model of its content.
fn change(chain: &Chain, model: &mut [u8], rng: &mut Rng) {
    let range = rng.range(model.len() as u64, 512);
    let (at, len) = (GuestOffset::new(range.start), range.end - range.start);
    let part = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
    if rng.chance(1, 4) {
        chain.write_zeroes_at(at, len).unwrap();
        model[part].fill(0);
    } else {
        let bytes = rng.bytes(part.len());
        chain.write_at(&bytes, at).unwrap();
        model[part].copy_from_slice(&bytes);
    }
}

#[test]
fn stale_bytes_of_container_never_show() {
    cases("stale", count("QCOW2_CHAIN_VM_CASES", 60), |rng| {
        let (bits, extended_l2) = rng.pick(&[(9, false), (12, false), (16, false), (14, true), (16, true)]);
        let (size, backed) = (rng.within(1..512) * 512, rng.chance(1, 2));
        let mut model = vec![0; usize::try_from(size).unwrap()];
        let memory = MemoryFileSystem::new();
        memory.insert("/overlay", container(Path::new("/overlay"), 4 << 20));
        let mut options =
            CreateOptions::new(size).with_cluster_bits(ClusterBits::new(bits).unwrap()).with_extended_l2(extended_l2);
        if backed {
            model = rng.bytes(model.len());
            memory.insert("/base", Arc::new(MemoryStorage::with_bytes("base", &model)));
            options = options.with_backing("base", "raw");
        }
        let names: Arc<dyn FileSystem> = Arc::new(memory);
        let storage = names.open(Path::new("/overlay"), &storage::Access::write()).unwrap();
        Image::create(Arc::clone(&storage), &options).unwrap().close().unwrap();
        for _ in 0..4 {
            let options = ChainOptions::default().with_policy(Policy::Any).with_writable(1);
            let chain = Chain::open_in(&names, Path::new("/overlay"), &options).unwrap();
            assert!(read(&chain).unwrap() == model);
            (0..rng.within(1..6)).for_each(|_| change(&chain, &mut model, rng));
            assert!(read(&chain).unwrap() == model);
            chain.close().unwrap();
            if backed {
                continue;
            }
            // A larger L1 table comes from clusters with stale bytes, and so does the end of a disk that grows.
            let image = Image::open(Arc::clone(&storage), &OpenOptions::default().with_write(true)).unwrap();
            let grown = model.len() as u64 + rng.within(0..256) * 512;
            image.resize(grown, &Default::default()).unwrap();
            image.close().unwrap();
            model.resize(usize::try_from(grown).unwrap(), 0);
        }
        let report = qcow2_chain::image::check(&*storage, &Default::default()).unwrap();
        assert_eq!((report.corruptions, report.leaks, report.check_errors), (0, 0, 0), "{report:?}");
    });
}

/// A provider that dies in `create`: the container exists, and its path does not, as of an inactive logical volume.
#[derive(Debug, Default)]
struct Inactive(Mutex<BTreeSet<PathBuf>>);

impl OverlayProvider for Inactive {
    fn path(&self, request: &OverlayRequest<'_>) -> vm::Result<PathBuf> {
        Ok(Path::new("/vm").join(request.name))
    }

    fn create(&self, request: &OverlayRequest<'_>) -> vm::Result<()> {
        let path = self.path(request)?;
        self.0.lock().unwrap().insert(path);
        panic!("killed")
    }

    fn release(&self, path: &Path) -> vm::Result<()> {
        self.0.lock().unwrap().remove(path);
        Ok(())
    }
}

#[test]
fn recovery_releases_container_without_path() {
    let mut rng = Rng::new(seed());
    let mut world = World::new(LabShape { volumes: 1, ..LabShape::default() }, &mut rng);
    let provider = Arc::new(Inactive::default());
    world.lab.set = world.open(&world.lab.names, None).with_provider(Arc::clone(&provider) as _);
    let killed = AssertUnwindSafe(|| world.lab.set.create("s1", &Default::default()));
    assert!(catch_unwind(killed).is_err());
    let containers = || provider.0.lock().unwrap_or_else(PoisonError::into_inner).len();
    assert_eq!(containers(), 1);
    let recovered = world.lab.set.recover(&()).unwrap();
    assert!(matches!(&recovered, Recovery::Undone { released, .. } if released.is_empty()), "{recovered:?}");
    assert_eq!(containers(), 0, "the container is leaked");
    world.lab.check().unwrap();
}

/// A provider of regular files in a directory of their own.
#[derive(Debug)]
struct Directory(PathBuf);

impl OverlayProvider for Directory {
    fn path(&self, request: &OverlayRequest<'_>) -> vm::Result<PathBuf> {
        Ok(self.0.join(request.name))
    }

    fn create(&self, request: &OverlayRequest<'_>) -> vm::Result<()> {
        HostFileSystem.create_new(&self.0.join(request.name)).map(drop).map_err(Into::into)
    }

    fn release(&self, path: &Path) -> vm::Result<()> {
        if HostFileSystem.exists(path)? { HostFileSystem.unlink(path).map_err(Into::into) } else { Ok(()) }
    }
}

#[test]
fn provider_of_files_in_another_directory_works() {
    let mut rng = Rng::new(seed());
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().canonicalize().unwrap();
    let (vm, pool) = (path.join("vm"), path.join("pool"));
    for directory in [&vm, &pool] {
        std::fs::create_dir(directory).unwrap();
    }
    let mut lab = Lab::new(Arc::new(HostFileSystem), &vm, LabShape::default(), &mut rng);
    lab.set = SnapshotSet::load(&lab.catalogue).unwrap().with_provider(Arc::new(Directory(pool.clone())));
    let files = || std::fs::read_dir(&pool).unwrap().count();
    for (number, name) in ["s1", "s2", "s3"].iter().enumerate() {
        lab.write_all(&mut rng);
        lab.create(name);
        lab.write_all(&mut rng);
        assert_eq!(files(), 2 * (number + 1));
    }
    let pull = MergeOptions::default().with_direction(Direction::Pull);
    lab.set.delete("s3", &pull, &()).unwrap();
    lab.taken.remove("s3");
    assert_eq!(files(), 4);
    lab.can_start(&lab.now).unwrap();
    lab.revert("s1");
    assert_eq!(files(), 4, "s2 keeps its files");
    lab.delete("s2");
    lab.delete("s1");
    assert_eq!(files(), 0);
    lab.check().unwrap();
}
