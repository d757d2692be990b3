//! Reading a VM's snapshots: changed ranges and exported deltas, verification, refusals, reports and resumed deletions.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use qcow2_chain::chain::{Chain, ChainOptions, Format, Policy};
use qcow2_chain::format::{ClusterBits, GuestOffset};
use qcow2_chain::image::{CreateOptions, Image, OpenOptions};
use qcow2_chain::merge::Direction;
use qcow2_chain::storage::fault::{Fault, Faults, FaultyFileSystem};
use qcow2_chain::storage::{Access, FileSystem, HostFileSystem, LockMode, MemoryFileSystem};
use qcow2_chain::vm::{
    AdoptOptions, Domain, Error, ExportOptions, MergeOptions, Point, ProblemKind, Progress, Recovery, Refusal, Request,
    SnapshotOptions, SnapshotSet, State, VerifyOptions, VolumeSpec,
};

use crate::support::lab::{Lab, LabShape, read};
use crate::support::rng::{Rng, cases, count, seed};

fn lab(rng: &mut Rng) -> Lab {
    Lab::new(Arc::new(MemoryFileSystem::new()), Path::new("/vm"), LabShape::default(), rng)
}

fn on_disk(directory: &Path, rng: &mut Rng) -> Lab {
    Lab::new(Arc::new(HostFileSystem), directory, LabShape::default(), rng)
}

/// A lab with a tree of snapshots.
fn tree(rng: &mut Rng) -> Lab {
    let mut lab = lab(rng);
    for number in 0..8 {
        lab.write_all(rng);
        lab.random_step(rng, number);
    }
    lab.write_all(rng);
    lab
}

#[test]
fn changed_ranges_and_deltas_rebuild_later_content() {
    cases("changes", count("QCOW2_CHAIN_VM_CASES", 60), |rng| {
        let lab = tree(rng);
        let names: Vec<String> = lab.taken.keys().cloned().collect();
        for _ in 0..4 {
            let point = |rng: &mut Rng| rng.within(0..names.len() as u64 + 1);
            let (a, b) = (point(rng), point(rng));
            let at = |index: u64| names.get(usize::try_from(index).unwrap());
            let as_point = |index| at(index).map_or(Point::Active, |name| Point::Snapshot(name));
            let content = |index| at(index).map_or(&lab.now, |name| &lab.taken[name])["vda"].clone();
            let (before, after) = (content(a), content(b));
            let changes = lab.set.changed_ranges(as_point(a), as_point(b), "vda").unwrap();
            let mut rebuilt = before.clone();
            rebuilt.resize(after.len(), 0);
            let mut end = 0;
            for range in changes.ranges() {
                let range = range.unwrap();
                assert!(range.offset >= end && range.len > 0 && range.end() <= after.len() as u64, "{range:?}");
                end = range.end();
                let part = usize::try_from(range.offset).unwrap()..usize::try_from(end).unwrap();
                assert!(!range.zero || after[part.clone()].iter().all(|&byte| byte == 0), "{range:?} is zero");
                rebuilt[part.clone()].copy_from_slice(&after[part]);
            }
            assert!(rebuilt == after, "from {:?} to {:?}", at(a), at(b));
            assert!(a != b || end == 0, "nothing changes between a moment and itself");
            export_makes(&lab, as_point(a), as_point(b), &before, &after, rng);
        }
    });
}

/// Exports in both formats and applies what was exported to the earlier content.
fn export_makes(lab: &Lab, a: Point<'_>, b: Point<'_>, before: &[u8], after: &[u8], rng: &mut Rng) {
    let changes = lab.set.changed_ranges(a, b, "vda").unwrap();
    let [base, delta, raw] = ["/out/base", "/out/delta", "/out/raw"].map(Path::new);
    for path in [base, delta, raw] {
        let _ = lab.names.unlink(path);
    }
    lab.names.create_new(base).unwrap().write_at(before, 0).unwrap();
    let bits = ClusterBits::new(rng.pick(&[9, 12, 16])).unwrap();
    let options = ExportOptions::default().with_cluster_bits(bits).with_backing("base", Format::Raw);
    let exported = lab.set.export(&changes, delta, &options, &()).unwrap();
    let chain = Chain::open_in(&lab.names, delta, &ChainOptions::default().with_policy(Policy::Any)).unwrap();
    assert!(read(&chain).unwrap() == after, "the delta over the earlier moment is the later one");
    let held: u64 = chain
        .extents_of(0..1, 0..after.len() as u64)
        .map(|e| e.unwrap())
        .filter(|e| e.layer.is_some())
        .map(|e| e.len)
        .sum();
    assert_eq!(held, exported.data + exported.zeroes, "nothing else is allocated");

    let exported = lab.set.export(&changes, raw, &ExportOptions::default().with_format(Format::Raw), &()).unwrap();
    let storage = lab.names.open(raw, &Access::read()).unwrap();
    let mut rebuilt = before.to_vec();
    rebuilt.resize(after.len(), 0);
    for range in &exported.ranges {
        let part = usize::try_from(range.offset).unwrap()..usize::try_from(range.end()).unwrap();
        storage.read_at(&mut rebuilt[part], range.offset).unwrap();
    }
    assert!(rebuilt == after, "the raw delta's ranges make the later moment");
}

#[test]
fn small_write_is_small_changed_range() {
    let mut rng = Rng::new(seed());
    let mut lab = lab(&mut rng);
    lab.create("s1");
    let chain = lab.open_as_qemu("vda", true).unwrap();
    chain.write_at(&[7; 512], GuestOffset::new(1024)).unwrap();
    chain.write_zeroes_at(GuestOffset::new(4096), 1024).unwrap();
    chain.close().unwrap();
    let changes = lab.set.changed_ranges("s1", Point::Active, "vda").unwrap();
    let ranges: Vec<_> = changes.ranges().map(|range| range.unwrap()).map(|r| (r.offset, r.len, r.zero)).collect();
    assert_eq!(ranges, [(1024, 512, false), (4096, 1024, true)]);
    let all = lab.set.changed_ranges(Point::Nothing, "s1", "vda").unwrap();
    assert_eq!(all.ranges().map(|range| range.unwrap().len).sum::<u64>(), 24 << 10);
    assert!(lab.set.changed_ranges("s1", Point::Nothing, "vda").is_err());
}

#[test]
fn cancelled_export_leaves_no_file() {
    struct Stop;
    impl Progress for Stop {
        fn step(&self, _step: &qcow2_chain::progress::Step<'_>) {}
        fn is_cancelled(&self) -> bool {
            true
        }
    }
    let mut rng = Rng::new(seed());
    let lab = lab(&mut rng);
    let changes = lab.set.changed_ranges(Point::Nothing, Point::Active, "vda").unwrap();
    let path = Path::new("/out/delta");
    let error = lab.set.export(&changes, path, &ExportOptions::default(), &Stop).unwrap_err();
    assert!(error.is_cancelled() && !lab.names.exists(path).unwrap(), "{error}");
}

fn kinds(lab: &Lab, deep: bool) -> Vec<ProblemKind> {
    let found = lab.set.verify(&VerifyOptions::default().with_deep(deep), &()).unwrap();
    found.problems.iter().map(|problem| problem.kind).collect()
}

#[test]
fn verify_reports_each_kind_of_problem() {
    let mut rng = Rng::new(seed());
    let mut lab = tree(&mut rng);
    lab.create("one more");
    assert_eq!(kinds(&lab, true), []);
    let digests = lab.set.verify(&VerifyOptions::default().with_digests(true), &()).unwrap().digests;
    assert_eq!(digests.len(), 2 * (lab.taken.len() + 1));
    for digest in &digests {
        let content = digest.snapshot.as_ref().map_or(&lab.now, |name| &lab.taken[name]);
        assert_eq!(digest.crc32, crc32fast::hash(&content[&digest.volume]), "{digest:?}");
    }

    lab.names.create_new(Path::new("/vm/vm-vda.999-5eed.qcow2")).unwrap();
    lab.names.create_new(Path::new("/vm/other-vda.1-5eed.qcow2")).unwrap();
    assert_eq!(kinds(&lab, false), [ProblemKind::Orphan]);
    lab.names.unlink(Path::new("/vm/vm-vda.999-5eed.qcow2")).unwrap();

    let active = lab.set.active_path("vda").unwrap();
    let image =
        Image::open(lab.names.open(&active, &Access::write()).unwrap(), &OpenOptions::default().with_write(true))
            .unwrap();
    let (name, format) = (image.header().backing_file.unwrap(), image.header().backing_format().unwrap().to_vec());
    image.set_backing_file(Some(b"elsewhere"), Some(&format)).unwrap();
    assert_eq!(kinds(&lab, false), [ProblemKind::Link]);
    let refused = lab.set.create("s", &SnapshotOptions::default()).unwrap_err();
    assert!(matches!(refused.refusal(), Some(Refusal::Disagreement { .. })), "{refused}");
    image.set_backing_file(Some(&name), Some(b"raw")).unwrap();
    let refused = lab.set.create("s", &SnapshotOptions::default()).unwrap_err();
    assert!(matches!(refused.refusal(), Some(Refusal::Format { .. })), "{refused}");
    image.set_backing_file(Some(&name), Some(&format)).unwrap();
    assert_eq!(kinds(&lab, false), []);

    let frozen = lab.set.snapshot_path("one more", "vdb").unwrap();
    let storage = lab.names.open(&frozen, &Access::write()).unwrap();
    let mut byte = [0];
    storage.read_at(&mut byte, 79).unwrap();
    storage.write_at(&[byte[0] | 2], 79).unwrap(); // the corrupt bit
    assert_eq!(kinds(&lab, false), [ProblemKind::Corrupt]);
    storage.write_at(&byte, 79).unwrap();
    lab.names.unlink(&frozen).unwrap();
    assert!(kinds(&lab, false).contains(&ProblemKind::Missing));
}

#[test]
fn changed_base_is_refused_until_accepted() {
    let names: Arc<dyn FileSystem> = Arc::new(MemoryFileSystem::new());
    let options = CreateOptions::new(8192);
    let base = Image::create(names.create_new(Path::new("/vm/template")).unwrap(), &options).unwrap();
    base.write_at(&[1; 8192], GuestOffset::ZERO).unwrap();
    base.close().unwrap();
    let over = options.with_backing("template", "qcow2");
    Image::create(names.create_new(Path::new("/vm/disk")).unwrap(), &over).unwrap().close().unwrap();
    let volumes = [VolumeSpec::new("vda", "/vm/disk")];
    assert!(
        SnapshotSet::adopt_in(names.clone(), "/vm/vm.json", &volumes, &AdoptOptions::default()).is_err(),
        "not followed"
    );
    let adopt = AdoptOptions::default().with_policy(Policy::Beneath(vec!["/vm".into()]));
    let set = SnapshotSet::adopt_in(names.clone(), "/vm/vm.json", &volumes, &adopt).unwrap();
    set.create("s1", &SnapshotOptions::default()).unwrap();
    set.delete("s1", &MergeOptions::default(), &()).unwrap();
    assert_eq!(read(&set.open_active("vda").unwrap()).unwrap(), vec![1; 8192]);

    let base = Image::open(
        names.open(Path::new("/vm/template"), &Access::write()).unwrap(),
        &OpenOptions::default().with_write(true),
    );
    base.unwrap().resize(16384, &Default::default()).unwrap();
    for error in [set.create("s2", &SnapshotOptions::default()).map(|_| ()), set.open_active("vda").map(|_| ())] {
        let error = error.unwrap_err();
        assert!(matches!(error.refusal(), Some(Refusal::BaseChanged { .. })), "{error}");
    }
    let kinds: Vec<_> = set.verify(&VerifyOptions::default(), &()).unwrap().problems.iter().map(|p| p.kind).collect();
    assert_eq!(kinds, [ProblemKind::BaseChanged]);
    let refused = set.accept_base("/vm/disk").unwrap_err();
    assert!(matches!(refused.refusal(), Some(Refusal::NotABase { .. })), "{refused}");
    set.accept_base("/vm/template").unwrap();
    assert_eq!(set.verify(&VerifyOptions::default(), &()).unwrap().problems, []);
    set.create("s2", &SnapshotOptions::default()).unwrap();
    assert_eq!(read(&set.open_active("vda").unwrap()).unwrap(), vec![1; 8192]);
}

#[test]
fn adopted_chain_becomes_snapshots() {
    let mut rng = Rng::new(seed());
    let mut lab = lab(&mut rng);
    for name in ["s1", "s2"] {
        lab.write_all(&mut rng);
        lab.create(name);
    }
    lab.write_all(&mut rng);
    let volumes = ["vda", "vdb"].map(|name| VolumeSpec::new(name, lab.set.active_path(name).unwrap()));
    let adopt = AdoptOptions::default().with_policy(Policy::Beneath(vec!["/vm".into()])).with_snapshots(["old", "new"]);
    let set = SnapshotSet::adopt_in(lab.names.clone(), "/vm/again.json", &volumes, &adopt).unwrap();
    assert_eq!(read(&set.open("old", "vda").unwrap()).unwrap(), lab.taken["s1"]["vda"]);
    assert_eq!(read(&set.open("new", "vdb").unwrap()).unwrap(), lab.taken["s2"]["vdb"]);
    let error = SnapshotSet::adopt_in(lab.names.clone(), "/vm/again.json", &volumes, &adopt).unwrap_err();
    assert!(matches!(error.refusal(), Some(Refusal::Exists { .. })));
}

#[test]
fn refused_operation_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let mut rng = Rng::new(seed());
    let mut lab = on_disk(directory.path(), &mut rng);
    for name in ["s1", "s2"] {
        lab.write_all(&mut rng);
        lab.create(name);
    }
    lab.revert("s1");
    lab.delete("s1"); // hidden
    let model = lab.model();
    let create = |name: &str| lab.set.create(name, &SnapshotOptions::default()).map(|_| ());
    let merge = MergeOptions::default();
    let refused = |done: qcow2_chain::vm::Result<()>| match done {
        Err(Error::Refused(refusal)) => refusal,
        other => panic!("not refused: {other:?}"),
    };
    assert!(matches!(refused(create("s2")), Refusal::NameTaken { .. }));
    assert!(matches!(refused(create("")), Refusal::NameLength { .. }));
    assert!(matches!(refused(create(&"x".repeat(256))), Refusal::NameLength { .. }));
    assert!(matches!(refused(create("a\nb")), Refusal::NameControl { .. }));
    let shallow = lab.set.create("deep", &SnapshotOptions::default().with_max_depth(2)).map(|_| ());
    assert!(matches!(refused(shallow), Refusal::Depth { depth: 3, max: 2, .. }));
    // A hidden snapshot has no name.
    assert!(matches!(refused(lab.set.revert("s1", &merge, &()).map(|_| ())), Refusal::UnknownSnapshot { .. }));
    assert!(matches!(refused(lab.set.delete("s1", &merge, &()).map(|_| ())), Refusal::UnknownSnapshot { .. }));
    assert!(matches!(refused(lab.set.open("s2", "vdz").map(|_| ())), Refusal::UnknownVolume { .. }));
    assert!(matches!(refused(lab.set.resize("vdz", 512, false).map(|_| ())), Refusal::UnknownVolume { .. }));
    assert!(matches!(refused(lab.set.resize("vda", 512, false).map(|_| ())), Refusal::Shrinks { .. }));
    assert!(matches!(refused(lab.set.resize("vda", 511, true).map(|_| ())), Refusal::Size { .. }));
    assert!(matches!(refused(lab.set.detach("vdz").map(|_| ())), Refusal::UnknownVolume { .. }));
    let spec = VolumeSpec::new("vda", directory.path().join("vda.img"));
    assert!(matches!(refused(lab.set.attach(&spec, &AdoptOptions::default())), Refusal::VolumeName { .. }));

    // A running VM holds its active files.
    let active = lab.names.open(&lab.set.active_path("vdb").unwrap(), &Access::write()).unwrap();
    assert!(matches!(refused(create("s3")), Refusal::InUse { .. }));
    assert!(matches!(refused(lab.set.revert("s2", &merge, &()).map(|_| ())), Refusal::InUse { .. }));
    assert!(matches!(
        refused(lab.set.plan(&Request::Delete { name: "s2".into() }, &merge).map(|_| ())),
        Refusal::InUse { .. }
    ));
    drop(active);
    // Another operation on this VM.
    let lock = lab.names.open(&directory.path().join("vm.json.lock"), &Access::write()).unwrap();
    assert!(matches!(refused(create("s3")), Refusal::Locked { .. }));
    drop(lock);
    assert_eq!(lab.model(), model);
    assert!(create("s3").is_ok());
}

/// The refusal precedes the first record: a snapshot that cannot be merged does not become `merging`.
#[test]
#[cfg(unix)]
fn commit_into_read_only_base_is_refused_default_pulls() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let mut rng = Rng::new(seed());
    let mut lab = on_disk(directory.path(), &mut rng);
    lab.write_all(&mut rng);
    lab.create("s1");
    let model = lab.model();
    let base = lab.set.snapshot_path("s1", "vdb").unwrap();
    let mode = |mode| std::fs::set_permissions(&base, std::fs::Permissions::from_mode(mode)).unwrap();
    mode(0o444);
    let commit = MergeOptions::default().with_direction(qcow2_chain::merge::Direction::Commit);
    match lab.set.delete("s1", &commit, &()) {
        Err(Error::Refused(Refusal::Unwritable { path, .. })) => assert!(base.ends_with(&path), "{path}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(lab.model(), model);
    assert!(lab.set.pending().unwrap().is_none());
    let before = std::fs::read(&base).unwrap();
    let report = lab.set.delete("s1", &MergeOptions::default(), &()).unwrap();
    lab.taken.remove("s1");
    assert_eq!(report.merged["vda"].direction, Direction::Commit);
    assert_eq!(report.merged["vdb"].direction, Direction::Pull);
    assert_eq!(report.released.iter().map(|file| &file.path).collect::<Vec<_>>(), [&base]);
    assert!(std::fs::read(&base).unwrap() == before, "neither written nor removed");
    lab.outside.push(base);
    lab.check().unwrap();
}

/// Cancels after a number of progress steps.
struct StopAfter(AtomicU64);

impl Progress for StopAfter {
    fn step(&self, _step: &qcow2_chain::progress::Step<'_>) {
        let left = self.0.load(Ordering::SeqCst);
        self.0.store(left.saturating_sub(1), Ordering::SeqCst);
    }
    fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::SeqCst) == 0
    }
}

#[test]
fn cancelled_deletion_is_resumed() {
    for direction in [Direction::Commit, Direction::Pull] {
        let mut rng = Rng::new(seed());
        let mut lab = lab(&mut rng);
        lab.write_all(&mut rng);
        lab.create("s1");
        lab.write_all(&mut rng);
        let options = MergeOptions::default().with_direction(direction);
        let error = lab.set.delete("s1", &options, &StopAfter(AtomicU64::new(3))).unwrap_err();
        assert!(error.is_cancelled(), "{error}");
        assert_eq!(lab.model().find("s1").unwrap().state, State::Merging);
        lab.can_start(&lab.now).unwrap();
        // The VM may run meanwhile. Other operations are refused.
        let refused = lab.set.create("s2", &SnapshotOptions::default()).unwrap_err();
        assert!(matches!(refused.refusal(), Some(Refusal::Unfinished { .. })), "{refused}");
        let refused = lab.set.open("s1", "vda").unwrap_err();
        assert!(matches!(refused.refusal(), Some(Refusal::NotReady { .. })), "{refused}");
        lab.write_all(&mut rng);
        lab.delete("s1");
        lab.check().unwrap_or_else(|wrong| panic!("{direction}: {wrong}"));
    }
}

/// The snapshot is gone already when the merge of the hidden one beneath it is interrupted.
#[test]
fn deletion_interrupted_in_its_second_stage_is_resumed() {
    let mut rng = Rng::new(seed());
    let mut lab = lab(&mut rng);
    for name in ["s1", "s2"] {
        lab.write_all(&mut rng);
        lab.create(name);
    }
    lab.revert("s1");
    lab.write_all(&mut rng);
    lab.create("s3");
    lab.write_all(&mut rng);
    lab.delete("s1");
    let error = lab.set.delete("s2", &MergeOptions::default(), &StopAfter(AtomicU64::new(3))).unwrap_err();
    assert!(error.is_cancelled(), "{error}");
    assert!(lab.model().find("s2").is_none() && lab.model().merging().is_some());
    lab.delete("s2");
    assert!(lab.set.pending().unwrap().is_none());
    lab.check().unwrap();
}

#[test]
fn failed_volume_leaves_others_done_and_is_resumed() {
    let mut rng = Rng::new(seed());
    let names = Arc::new(MemoryFileSystem::new());
    let shape = LabShape { volumes: 3, ..LabShape::default() };
    let mut lab = Lab::new(names.clone(), Path::new("/vm"), shape, &mut rng);
    lab.write_all(&mut rng);
    lab.create("s1");
    lab.write_all(&mut rng);
    // Only the second volume's base is on the failing disk.
    let broken: Arc<dyn FileSystem> = Arc::new(OneBroken(lab.names.clone(), "vdb.img"));
    let failing = lab.on(broken).unwrap();
    let options = MergeOptions::default().with_direction(Direction::Commit);
    match failing.set.delete("s1", &options, &()).unwrap_err() {
        Error::Incomplete { volume, done, left, .. } => {
            assert_eq!(
                (volume.as_str(), done, left),
                ("vdb", vec!["vda".to_owned(), "vdc".to_owned()], vec!["vdb".to_owned()])
            );
        }
        other => panic!("{other}"),
    }
    let model = lab.model();
    let merging = model.find("s1").unwrap();
    assert_eq!((merging.state, merging.files.keys().map(String::as_str).collect()), (State::Merging, vec!["vdb"]));
    lab.can_start(&lab.now).unwrap();
    lab.write_all(&mut rng);
    assert!(lab.set.pending().unwrap().unwrap().completes);
    match lab.set.recover(&()).unwrap() {
        Recovery::Completed(report) => {
            assert_eq!(report.merged.keys().collect::<Vec<_>>(), ["vdb"], "only what was left")
        }
        other => panic!("{other:?}"),
    }
    lab.taken.remove("s1");
    lab.check().unwrap();
}

/// A file system on which one file finds no space.
#[derive(Debug)]
struct OneBroken(Arc<dyn FileSystem>, &'static str);

impl FileSystem for OneBroken {
    fn open(
        &self,
        path: &Path,
        access: &Access,
    ) -> qcow2_chain::storage::Result<Arc<dyn qcow2_chain::storage::Storage>> {
        if access.write && path.ends_with(self.1) {
            let faulty = FaultyFileSystem::new(self.0.clone(), &Faults::new(Fault::NoSpace.at(0).ever_after()));
            return faulty.open(path, access);
        }
        self.0.open(path, access)
    }
    fn create_new(&self, path: &Path) -> qcow2_chain::storage::Result<Arc<dyn qcow2_chain::storage::Storage>> {
        self.0.create_new(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> qcow2_chain::storage::Result<()> {
        self.0.rename(from, to)
    }
    fn unlink(&self, path: &Path) -> qcow2_chain::storage::Result<()> {
        self.0.unlink(path)
    }
    fn sync_dir(&self, directory: &Path) -> qcow2_chain::storage::Result<()> {
        self.0.sync_dir(directory)
    }
    fn list(&self, directory: &Path) -> qcow2_chain::storage::Result<Vec<std::path::PathBuf>> {
        self.0.list(directory)
    }
    fn exists(&self, path: &Path) -> qcow2_chain::storage::Result<bool> {
        self.0.exists(path)
    }
    fn resolve(&self, path: &Path) -> qcow2_chain::storage::Result<qcow2_chain::storage::Resolved> {
        self.0.resolve(path)
    }
}

#[test]
fn merging_snapshot_without_journal_is_deleted() {
    let mut rng = Rng::new(seed());
    let mut lab = lab(&mut rng);
    for name in ["s1", "s2"] {
        lab.write_all(&mut rng);
        lab.create(name);
    }
    lab.write_all(&mut rng);
    lab.set.delete("s1", &MergeOptions::default(), &StopAfter(AtomicU64::new(2))).unwrap_err();
    lab.names.unlink(Path::new("/vm/vm.json.journal")).unwrap();
    assert!(matches!(lab.set.recover(&()).unwrap(), Recovery::Completed(_)));
    lab.taken.remove("s1");
    lab.check().unwrap();
}

#[test]
fn reports_list_changes() {
    let mut rng = Rng::new(seed());
    let mut lab = lab(&mut rng);
    let report = lab.set.create("s1", &SnapshotOptions::default().with_description("the first")).unwrap();
    assert_eq!((report.created.len(), report.moved.len(), report.state), (2, 2, Some(State::Ready)));
    lab.taken.insert("s1".into(), lab.now.clone());
    lab.resize("vdb", 48 << 10);
    lab.write_all(&mut rng);
    let plan =
        lab.set.plan(&Request::Revert { name: "s1".into(), detach_missing: false }, &MergeOptions::default()).unwrap();
    let report = lab.set.revert("s1", &MergeOptions::default(), &()).unwrap();
    let sizes: Vec<_> = report.resized.iter().map(|change| (change.volume.as_str(), change.old, change.new)).collect();
    assert_eq!(sizes, [("vdb", 48 << 10, 24 << 10)], "one change, of the right volume");
    assert_eq!(plan.size_changes, report.resized);
    assert_eq!(report.removed.len(), 2);
    lab.now = lab.taken["s1"].clone();
    lab.write_all(&mut rng);
    let steps = AtomicU64::new(0);
    struct Count<'a>(&'a AtomicU64);
    impl Progress for Count<'_> {
        fn step(&self, step: &qcow2_chain::progress::Step<'_>) {
            assert!(step.done <= step.total && step.all_done <= step.all_total && step.volume.starts_with("vd"));
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    let report =
        lab.set.delete("s1", &MergeOptions::default().with_direction(Direction::Commit), &Count(&steps)).unwrap();
    assert!(report.merged.values().all(|merged| merged.copied + merged.copied_in_kernel + merged.zeroed > 0));
    assert!(steps.into_inner() > 4);
    assert_eq!(report.state, None);
}

#[test]
fn reconcile_reports_disk_on_other_file() {
    let mut rng = Rng::new(seed());
    let lab = lab(&mut rng);
    let mut domain = Domain::default();
    domain.running = true;
    domain.disks.insert("vda".into(), vec!["/vm/vda.img".into()]);
    assert!(lab.set.reconcile(Some(&domain), true, &()).unwrap().problems.is_empty());
    domain.disks.insert("vdb".into(), vec!["/vm/elsewhere".into()]);
    let found = lab.set.reconcile(Some(&domain), false, &()).unwrap();
    assert_eq!(found.problems.iter().map(|p| p.kind).collect::<Vec<_>>(), [ProblemKind::Domain]);
    assert_eq!(found.recovery, Some(Recovery::Clean));
}

#[test]
fn damaged_catalogue_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let mut rng = Rng::new(seed());
    let mut lab = on_disk(directory.path(), &mut rng);
    lab.create("s1");
    let text = std::fs::read_to_string(&lab.catalogue).unwrap();
    assert!(
        text.contains("\"path\": \"vda.img\"") && !text.contains(&directory.path().display().to_string()),
        "{text}"
    );
    for (from, to, why) in [
        ("\"s1\"", "\"s2\"", "the checksum is"),
        ("\"version\": 2", "\"version\": 3", "the version of the catalogue is 3"),
        ("vm catalogue", "shopping list", "is not a catalogue"),
    ] {
        std::fs::write(&lab.catalogue, text.replacen(from, to, 1)).unwrap();
        let error = SnapshotSet::load(&lab.catalogue).unwrap_err();
        assert!(matches!(error, Error::Catalogue { .. }) && error.to_string().contains(why), "{error}");
    }
    std::fs::write(&lab.catalogue, &text[..text.len() / 2]).unwrap();
    assert!(matches!(SnapshotSet::load(&lab.catalogue), Err(Error::Catalogue { .. })));
}

#[test]
fn snapshot_that_is_read_is_pulled_from_and_released() {
    let directory = tempfile::tempdir().unwrap();
    let mut rng = Rng::new(seed());
    let mut lab = on_disk(directory.path(), &mut rng);
    lab.create("s1");
    let one = lab.set.open("s1", "vda").unwrap();
    let other = lab.set.open("s1", "vda").unwrap();
    assert_eq!(read(&one).unwrap(), read(&other).unwrap());
    // A file that another program reads is neither written nor removed.
    let commit = MergeOptions::default().with_direction(Direction::Commit);
    let refused = lab.set.delete("s1", &commit, &()).unwrap_err();
    assert!(matches!(refused.refusal(), Some(Refusal::InUse { .. })), "{refused}");
    let report = lab.set.delete("s1", &MergeOptions::default(), &()).unwrap();
    let base = directory.path().join("vda.img");
    assert_eq!(report.released.iter().map(|file| &file.path).collect::<Vec<_>>(), [&base]);
    assert_eq!(read(&one).unwrap(), lab.taken.remove("s1").unwrap()["vda"]);
    drop((one, other));
    lab.outside.push(base);
    let unlocked = Access::read().with_lock(LockMode::None);
    assert!(lab.names.open(&lab.set.active_path("vda").unwrap(), &unlocked).is_ok());
    lab.check().unwrap();
}

/// The file of a volume that a revert detaches is backed by the file of a hidden snapshot, which the same revert merges.
#[test]
fn revert_detaching_volume_releases_its_backing_file() {
    let mut rng = Rng::new(seed());
    let mut lab = lab(&mut rng);
    lab.create("s1");
    let base = lab.set.snapshot_path("s1", "vdb").unwrap();
    let first = lab.set.detach("vdb").unwrap().path;
    lab.now.remove("vdb");
    lab.create("s2");
    lab.revert("s1");
    lab.write_all(&mut rng);
    let (detached, content) = (lab.set.active_path("vdb").unwrap(), lab.now["vdb"].clone());
    lab.set.delete("s1", &MergeOptions::default(), &()).unwrap();
    lab.taken.remove("s1");
    let options = MergeOptions::default().with_detach_missing(true);
    let report = lab.set.revert("s2", &options, &()).unwrap();
    lab.now = lab.taken["s2"].clone();
    let released: Vec<_> = report.released.iter().map(|file| file.path.clone()).collect();
    assert_eq!(released, [detached.clone(), base.clone()], "{report:?}");
    let options = ChainOptions::default().with_policy(Policy::Any).with_format(Format::Qcow2);
    let chain = Chain::open_in(&lab.names, &detached, &options).unwrap();
    assert!(read(&chain).unwrap() == content, "the detached disk has its content");
    lab.outside = vec![base, first, detached];
    lab.outside.sort();
    lab.check().unwrap();
}
