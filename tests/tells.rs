//! Texts for people and programs: plans, listings, refusals, kinds of errors, and the contradictions of a catalogue.

use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use qcow2_chain::chain::{self, Chain, ChainOptions, Format, Policy};
use qcow2_chain::format::{ClusterBits, GuestOffset};
use qcow2_chain::image::{self, CreateOptions, Image};
use qcow2_chain::merge::{self, AfterCommit, CommitOptions, Direction, Onto, PullOptions, RebaseOptions};
use qcow2_chain::storage::{Access, FileSystem, HostFileSystem, MemoryFileSystem};
use qcow2_chain::vm::{
    AdoptOptions, Base, Error, Fingerprint, MergeOptions, MergePreference, Model, PlanOptions, ProblemKind, Progress,
    Refusal, Request, SnapshotId, SnapshotOptions, SnapshotSet, State, VerifyOptions, VolumeSpec, plan,
};

use crate::support::lab::{Lab, LabShape, read};
use crate::support::rng::{Rng, seed};

fn lab(rng: &mut Rng) -> Lab {
    Lab::new(Arc::new(MemoryFileSystem::new()), Path::new("/vm"), LabShape::default(), rng)
}

/// Returns a VM with the snapshots `s2` and `s3` on `s1`, which is hidden.
fn branches(rng: &mut Rng) -> Lab {
    let mut lab = lab(rng);
    for name in ["s1", "s2"] {
        lab.write_all(rng);
        lab.create(name);
    }
    lab.revert("s1");
    lab.write_all(rng);
    lab.create("s3");
    lab.delete("s1");
    lab
}

fn create(name: &str) -> Request {
    Request::Create { name: name.to_owned(), description: String::new(), created: 0, quiesce: false, max_depth: 256 }
}

#[test]
fn listing_omits_hidden_snapshots() {
    let lab = branches(&mut Rng::new(seed()));
    let rows = |hidden| {
        let listing = lab.set.list(hidden).unwrap();
        assert_eq!((listing.vm.as_str(), listing.current.as_deref()), ("vm", Some("s3")));
        let row = |s: qcow2_chain::vm::ListedSnapshot| (s.name, s.state.to_string(), s.parent, s.current);
        listing.snapshots.into_iter().map(row).collect::<Vec<_>>()
    };
    let row = |name: &str, state: &str, parent: Option<&str>, current| {
        (name.to_owned(), state.to_owned(), parent.map(str::to_owned), current)
    };
    assert_eq!(rows(false), [row("s2", "ready", None, false), row("s3", "ready", None, true)]);
    let all =
        [row("s1", "hidden", None, false), row("s2", "ready", Some("s1"), false), row("s3", "ready", Some("s1"), true)];
    assert_eq!(rows(true), all);
    let listing = lab.set.list(false).unwrap();
    for volume in &listing.volumes {
        assert_eq!(Path::new(&volume.active), lab.set.active_path(&volume.name).unwrap());
        assert_eq!(volume.virtual_size, 24 << 10);
        let file = &listing.snapshots[0].files[&volume.name];
        assert_eq!(Path::new(file), lab.set.snapshot_path("s2", &volume.name).unwrap());
    }
}

#[test]
fn plan_text_names_steps_and_files() {
    let mut rng = Rng::new(seed());
    let mut lab = lab(&mut rng);
    let text_of = |lab: &Lab, request: &Request, direction: MergePreference| {
        let planned = lab.set.plan(request, &MergeOptions::default().with_direction(direction)).unwrap();
        let removed: Vec<_> = planned.removals().map(|file| file.path.clone()).collect();
        (planned.to_string(), removed)
    };
    let before = lab.model();
    let file = |model: &Model, volume: &str| model.volume(volume).unwrap().active.file.to_string();
    let (text, removed) = text_of(&lab, &create("s1"), MergePreference::Auto);
    lab.create("s1");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!((lines.len(), lines[0]), (3, "create snapshot s1"), "{text}");
    for (line, (number, volume)) in lines[1..].iter().zip([(1, "vda"), (2, "vdb")]) {
        // The names have a random part, which differs from plan to plan.
        assert!(line.starts_with(&format!("  {volume}: create vm-{volume}.{number}-")), "{text}");
        assert!(line.ends_with(&format!(" backed by {}, 24576 bytes", file(&before, volume))), "{text}");
    }
    assert!(removed.is_empty());

    lab.write_all(&mut rng);
    let (top, base) = (file(&lab.model(), "vda"), file(&before, "vda"));
    let delete = Request::Delete { name: "s1".into() };
    let (text, removed) = text_of(&lab, &delete, MergePreference::Commit);
    assert!(text.starts_with(&format!("delete snapshot s1\n  vda: commit {top} into {base} (")), "{text}");
    assert!(text.contains(&format!("  vda: remove {top}\n")), "{text}");
    assert!(removed.contains(&top) && !removed.contains(&base), "{removed:?}");
    let (text, _) = text_of(&lab, &delete, MergePreference::Pull);
    assert!(text.contains(&format!("  vda: pull {base} into {top} (")), "{text}");
    assert!(text.contains(&format!("  vda: remove {base}\n")), "{text}");
    let planned = lab.set.plan(&delete, &MergeOptions::default()).unwrap();
    assert_eq!(planned.merged().collect::<Vec<_>>(), [lab.model().find("s1").unwrap().id]);

    let resize = Request::Resize { volume: "vda".into(), size: 32 << 10, shrink: false };
    let (text, _) = text_of(&lab, &resize, MergePreference::Auto);
    assert!(
        text.starts_with(&format!("resize volume vda to 32768 bytes\n  vda: resize {top} to 32768 bytes")),
        "{text}"
    );
    assert!(text.contains("  vda: size 24576 -> 32768 bytes\n"), "{text}");
    let (text, removed) =
        text_of(&lab, &Request::Revert { name: "s1".into(), detach_missing: false }, MergePreference::Auto);
    assert!(text.starts_with("revert to snapshot s1\n"), "{text}");
    assert!(text.contains(&format!("  remove {top}\n")), "{text}");
    assert!(removed.contains(&top));

    lab.revert("s1");
    lab.create("s2");
    lab.revert("s1");
    let (text, _) = text_of(&lab, &delete, MergePreference::Auto);
    assert_eq!(text, "delete snapshot s1\n  catalogue only\n");
}

#[test]
fn contradictory_model_lists_each_contradiction() {
    let lab = branches(&mut Rng::new(seed()));
    let sound = lab.model();
    assert!(sound.contradictions().is_empty());
    let id = |name: &str| sound.find(name).unwrap().id;
    let (s2, s3) = (id("s2"), id("s3"));
    let message = |damage: &dyn Fn(&mut Model)| {
        let mut model = sound.clone();
        damage(&mut model);
        model.contradictions().join("; ")
    };
    let snapshot = |model: &mut Model, id: SnapshotId, damage: &dyn Fn(&mut qcow2_chain::vm::Snapshot)| {
        damage(model.snapshots.get_mut(&id).unwrap());
    };
    assert!(message(&|m| m.volumes[1].name = "vda".into()).starts_with("volume vda is recorded twice"));
    assert_eq!(message(&|m| snapshot(m, s3, &|s| s.name = "s2".into())), "two ready snapshots have the name s2");
    let merging = |m: &mut Model| m.snapshots.values_mut().for_each(|s| s.state = State::Merging);
    assert_eq!(message(&merging), "two snapshots are in the state merging");
    let limit = format!("the number of the next overlay is {}, the limit is {}", u64::MAX, 1_u64 << 62);
    assert_eq!(message(&|m| m.next_file = u64::MAX), limit);
    assert_eq!(message(&|m| m.current = Some(SnapshotId(99))), "the current snapshot #99 does not exist");
    assert_eq!(message(&|m| m.current = None), "no snapshot is current");
    let first = sound.volumes[0].active.clone();
    let twice = message(&|m| snapshot(m, s2, &|s| *s.files.get_mut("vda").unwrap() = first.clone()));
    assert_eq!(twice, format!("{} is recorded twice", first.file));
    let base = Base::new(first.file.clone(), Fingerprint::new(0, 0, 0));
    assert_eq!(
        message(&|m| m.volumes[1].bases.push(base.clone())),
        format!("{} is recorded as a base and as a file of the set", first.file)
    );
    assert_eq!(
        message(&|m| m.next_snapshot = s3.0),
        format!("the number of snapshot s3 is {s3}, which is not assigned yet")
    );
    assert_eq!(
        message(&|m| snapshot(m, s3, &|s| s.name = String::new())),
        "a snapshot has the name \"\", which is not allowed"
    );
    assert_eq!(
        message(&|m| snapshot(m, s2, &|s| s.parent = Some(s3))),
        format!("snapshot s2 is older than its parent {s3}")
    );
    assert!(
        message(&|m| drop(m.snapshots.remove(&SnapshotId(1)))).contains("the parent #1 of snapshot s2 does not exist")
    );
    assert_eq!(message(&|m| snapshot(m, s2, &|s| drop(s.files.remove("vdb")))), "", "vdb was attached later");
    assert_eq!(
        message(&|m| m.volumes[0].active.file.path = "a\u{1b}b".into()),
        r#"the path "a\u{1b}b" has control characters"#
    );
    let other = message(&|m| snapshot(m, s2, &|s| drop(s.files.insert("vdz".into(), first.clone()))));
    assert_eq!(other, "snapshot s2 has a file of volume vdz, which does not exist");
}

#[test]
fn planner_refuses_contradictory_requests() {
    let lab = branches(&mut Rng::new(seed()));
    let sound = lab.model();
    let [revert, delete] =
        [Request::Revert { name: "s2".into(), detach_missing: false }, Request::Delete { name: "s2".into() }];
    let refused = |request: &Request, options: &PlanOptions, damage: &dyn Fn(&mut Model)| {
        let mut model = sound.clone();
        damage(&mut model);
        plan(&model, request, options).unwrap_err()
    };
    let off = PlanOptions::default();
    let running = PlanOptions::default().with_running(true);
    assert_eq!(refused(&create("s9"), &off, &|m| m.volumes.clear()), Refusal::NoVolumes);
    assert_eq!(refused(&revert, &running, &|_| {}), Refusal::Running { operation: "revert" });
    let merging = |m: &mut Model| m.snapshots.get_mut(&SnapshotId(1)).unwrap().state = State::Merging;
    let operation = "delete snapshot s1".to_owned();
    assert_eq!(refused(&delete, &off, &merging), Refusal::Unfinished { operation });
    let lacking = |m: &mut Model| {
        let id = m.find("s2").unwrap().id;
        m.snapshots.get_mut(&id).unwrap().files.remove("vdb");
    };
    let lacks = Refusal::LacksVolumes { snapshot: "s2".into(), volumes: vec!["vdb".into()] };
    assert_eq!(refused(&revert, &off, &lacking), lacks);
    let text = "snapshot s2 lacks the volumes vdb; confirm that they are to be detached (detach-missing)";
    assert_eq!(lacks.to_string(), text);
}

#[test]
fn planner_never_writes_protected_files() {
    let mut rng = Rng::new(seed());
    let mut lab = lab(&mut rng);
    lab.create("s1");
    let sound = lab.model();
    let id = sound.find("s1").unwrap().id;
    let delete = Request::Delete { name: "s1".into() };
    let (off, running) = (PlanOptions::default(), PlanOptions::default().with_running(true));

    let mut model = sound.clone();
    model.volumes[0].active.protected = true;
    let path = model.volumes[0].active.file.path.clone();
    assert_eq!(plan(&model, &delete, &off).unwrap_err(), Refusal::Protected { path });

    let mut model = sound.clone();
    model.snapshots.get_mut(&id).unwrap().files.get_mut("vda").unwrap().protected = true;
    let operation = "merge into the file above a protected one";
    assert_eq!(plan(&model, &delete, &running).unwrap_err(), Refusal::Running { operation });
    assert!(plan(&model, &delete, &off).unwrap().merges().any(|(_, step)| step.direction == Direction::Pull));

    let pull = running.with_direction("vda", Direction::Pull);
    let planned = plan(&sound, &delete, &pull).unwrap();
    assert!(planned.merges().all(|(_, step)| step.direction == Direction::Commit), "a hypervisor merges downwards");

    let mut model = sound;
    model.snapshots.get_mut(&id).unwrap().files.remove("vdb");
    let planned = plan(&model, &delete, &off).unwrap();
    assert_eq!(planned.works().map(|work| work.volume.as_str()).collect::<Vec<_>>(), ["vda"], "vdb was attached later");
}

#[test]
fn catalogue_with_snapshot_listed_twice_is_refused() {
    let lab = branches(&mut Rng::new(seed()));
    let mut json = serde_json::to_value(lab.model()).unwrap();
    assert_eq!(serde_json::from_value::<Model>(json.clone()).unwrap(), lab.model());
    let snapshots = json["snapshots"].as_array_mut().unwrap();
    snapshots.push(snapshots[0].clone());
    let message = serde_json::from_value::<Model>(json).unwrap_err().to_string();
    assert_eq!(message, "snapshot #1 is listed twice");
}

#[test]
fn attached_volume_is_read_and_detached() {
    let mut rng = Rng::new(seed());
    let mut lab = lab(&mut rng);
    let new = |path: &str| {
        let image = Image::create(lab.names.create_new(Path::new(path)).unwrap(), &CreateOptions::new(8192)).unwrap();
        image.write_at(&[9; 8192], GuestOffset::ZERO).unwrap();
        image.close().unwrap();
    };
    new("/vm/more.img");
    let options = AdoptOptions::default();
    lab.set.attach(&VolumeSpec::new("vdc", "/vm/more.img"), &options).unwrap();
    assert_eq!(read(&lab.set.open_active("vdc").unwrap()).unwrap(), vec![9; 8192]);
    let again = lab.set.attach(&VolumeSpec::new("vdc", "/vm/more.img"), &options).unwrap_err();
    assert_eq!(
        again.to_string(),
        "the volume name 'vdc' is not allowed: the set has a volume, or snapshots of a detached one, by this name"
    );
    let shared = lab.set.attach(&VolumeSpec::new("vdd", "/vm/more.img"), &options).unwrap_err();
    assert!(matches!(&shared, Error::Catalogue { why, .. } if why.ends_with("more.img is recorded twice")), "{shared}");
    assert!(matches!(lab.set.detach("vdd").unwrap_err().refusal(), Some(Refusal::UnknownVolume { .. })));
    lab.set.detach("vdc").unwrap();
    assert!(lab.set.model().unwrap().volume("vdc").is_none());
    assert!(lab.names.exists(Path::new("/vm/more.img")).unwrap(), "its file stays");
    lab.create("s1");
    lab.names.unlink(Path::new("/vm/more.img")).unwrap();
    lab.check().unwrap();
}

#[test]
fn adopt_refuses_wrong_names_with_reason() {
    let lab = lab(&mut Rng::new(seed()));
    let options = AdoptOptions::default().with_policy(Policy::Any);
    let message = |volumes: &[VolumeSpec], options: &AdoptOptions| {
        let error = SnapshotSet::adopt_in(lab.names.clone(), "/vm/new.json", volumes, options).unwrap_err();
        assert!(!lab.names.exists(Path::new("/vm/new.json")).unwrap(), "{error}");
        error.to_string()
    };
    let disk = VolumeSpec::new("vda", "/vm/vda.img");
    assert_eq!(message(&[], &options), "the VM has no volumes");
    let refused =
        "the VM name 'a/b' is not allowed: '/', ':' and a leading '.' are not allowed; choose another one (vm)";
    assert_eq!(message(std::slice::from_ref(&disk), &options.clone().with_vm("a/b")), refused);
    let named = |name: &str| message(std::slice::from_ref(&disk), &options.clone().with_snapshots([name, name]));
    assert_eq!(named(""), "a snapshot name must have 1 to 255 bytes, got 0");
    assert_eq!(named("s"), "snapshot s has no file of volume vda");
    let twice = message(&[disk.clone(), disk.clone()], &options);
    assert!(twice.contains("volume vda is recorded twice"), "{twice}");
    for (name, why) in [
        ("", "it is empty"),
        (&*"x".repeat(65), "it has more than 64 bytes"),
        ("a b", "only letters, digits, '.', '_' and '-' are allowed"),
    ] {
        let wanted = format!("the volume name '{name}' is not allowed: {why}");
        assert_eq!(message(&[VolumeSpec::new(name, "/vm/vda.img")], &options), wanted);
    }
}

#[test]
fn protected_base_is_pulled_from_and_released() {
    let directory = tempfile::tempdir().unwrap();
    let [protected, other] = ["protected.img", "other.img"].map(|name| directory.path().join(name));
    for path in [&protected, &other] {
        let image = Image::create(HostFileSystem.create_new(path).unwrap(), &CreateOptions::new(8192)).unwrap();
        image.write_at(&[3; 8192], GuestOffset::ZERO).unwrap();
        image.close().unwrap();
    }
    let before = std::fs::read(&protected).unwrap();
    let catalogue = directory.path().join("vm.json");
    let volumes = [VolumeSpec::new("vda", &protected).with_protected(true), VolumeSpec::new("vdb", &other)];
    let set = SnapshotSet::adopt(&catalogue, &volumes, &AdoptOptions::default().with_vm("guest")).unwrap();
    assert_eq!((set.catalogue(), set.model().unwrap().vm.as_str()), (&*catalogue, "guest"));
    set.create("s1", &SnapshotOptions::default()).unwrap();
    let overlays = ["vda", "vdb"].map(|volume| set.active_path(volume).unwrap());
    let delete = Request::Delete { name: "s1".into() };
    let refused = set.plan(&delete, &MergeOptions::default().with_direction(Direction::Commit)).unwrap_err();
    assert!(matches!(refused.refusal(), Some(Refusal::Protected { .. })), "{refused}");
    let planned = set.plan(&delete, &MergeOptions::default()).unwrap();
    let ways: Vec<_> = planned.merges().map(|(volume, step)| (volume, step.direction)).collect();
    assert_eq!(ways, [("vda", Direction::Pull), ("vdb", Direction::Commit)], "nothing is merged into a protected file");

    let keep = MergeOptions::default().with_direction(Direction::Pull);
    let report = set.delete("s1", &keep.with_rate_limit(Some(1 << 30)), &()).unwrap();
    assert_eq!(
        ["vda", "vdb"].map(|volume| set.active_path(volume).unwrap()),
        overlays,
        "the survivors keep their paths"
    );
    let released: Vec<_> = report.released.iter().map(|file| (file.path.as_path(), file.reason.as_str())).collect();
    assert_eq!(released, [(&*protected, "it is protected")]);
    assert_eq!(report.removed, std::slice::from_ref(&other));
    for volume in ["vda", "vdb"] {
        assert_eq!(read(&set.open_active(volume).unwrap()).unwrap(), vec![3; 8192]);
    }
    assert!(!other.exists());
    assert!(std::fs::read(&protected).unwrap() == before, "neither written nor removed");
}

#[test]
fn verify_reports_sizes_and_unreadable_images() {
    let mut rng = Rng::new(seed());
    let mut lab = lab(&mut rng);
    lab.create("s1");
    let found = |lab: &Lab| lab.set.verify(&VerifyOptions::default().with_deep(true), &()).unwrap();
    assert!(found(&lab).is_sound());
    let frozen = lab.set.snapshot_path("s1", "vda").unwrap();
    let storage = lab.names.open(&frozen, &Access::write()).unwrap();
    let mut size = [0; 8];
    storage.read_at(&mut size, 24).unwrap();
    storage.write_at(&(24_064_u64).to_be_bytes(), 24).unwrap();
    let wrong = found(&lab).problems;
    assert_eq!(wrong[0].kind, ProblemKind::Size);
    let message = format!("{}: the virtual size is 24064 bytes, recorded are 24576", frozen.display());
    assert_eq!(wrong[0].to_string(), message);
    storage.write_at(&size, 24).unwrap();
    assert!(found(&lab).is_sound());

    let len = storage.len().unwrap();
    storage.write_at(b"not qcow2", 0).unwrap();
    let wrong = found(&lab);
    assert!(!wrong.is_sound());
    let kinds: Vec<_> = wrong.problems.iter().map(|problem| problem.kind).collect();
    assert_eq!(kinds, [ProblemKind::Unreadable], "reported once, by the record");
    assert_eq!(storage.len().unwrap(), len);
}

#[test]
fn verify_deep_reports_leaks_and_corruption() {
    struct Stop;
    impl Progress for Stop {
        fn step(&self, _step: &qcow2_chain::progress::Step<'_>) {}
        fn is_cancelled(&self) -> bool {
            true
        }
    }
    let mut lab = lab(&mut Rng::new(seed()));
    lab.create("s1");
    let frozen = lab.set.snapshot_path("s1", "vda").unwrap();
    let storage = lab.names.open(&frozen, &Access::write()).unwrap();
    let word = |at| {
        let mut bytes = [0; 8];
        storage.read_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    let deep = VerifyOptions::default().with_deep(true);
    let message = || {
        let found = lab.set.verify(&deep, &()).unwrap();
        found.problems.iter().map(|problem| (problem.kind, problem.to_string())).collect::<Vec<_>>()
    };
    assert_eq!(message(), []);
    // One more cluster, which is counted and not used. Counts have 16 bits, clusters 512 bytes.
    let (table, len) = (word(48), storage.len().unwrap());
    assert!(len / 512 < 256, "one refcount block counts all");
    storage.set_len(len + 512).unwrap();
    storage.write_at(&1_u16.to_be_bytes(), word(table) + len / 512 * 2).unwrap();
    assert_eq!(message(), [(ProblemKind::Leaks, format!("{}: 1 clusters are allocated and unused", frozen.display()))]);
    // Nothing is counted.
    storage.write_at(&[0; 8], table).unwrap();
    let wrong = message();
    assert_eq!((wrong.len(), wrong[0].0), (1, ProblemKind::Corrupt), "{wrong:?}");
    assert!(wrong[0].1.contains(" corruptions, "), "{wrong:?}");
    assert!(lab.set.verify(&deep, &Stop).unwrap_err().is_cancelled());
}

#[test]
fn errors_convert_to_io_error_kinds() {
    let file = || "f".to_owned();
    let incomplete = |source: Error| Error::Incomplete {
        volume: "vda".into(),
        done: vec![],
        left: vec!["vda".into()],
        source: Box::new(source),
    };
    let timed_out = || Error::TimedOut { disk: "vda".into(), after: std::time::Duration::from_secs(2), running: true };
    assert!(timed_out().is_timed_out() && incomplete(timed_out()).is_timed_out());
    assert!(!Error::Cancelled.is_timed_out() && !timed_out().is_cancelled());
    assert_eq!(
        timed_out().to_string(),
        "disk vda: the merge timed out after 2 s; its block job continues, and the same deletion takes it over"
    );
    for cancelled in [merge::Error::Cancelled.into(), image::Error::Cancelled.into(), chain::Error::Cancelled.into()] {
        assert!(incomplete(cancelled).is_cancelled());
    }
    assert!(Error::Cancelled.refusal().is_none());
    let held = || "write".to_owned();
    for (error, kind) in [
        (Error::Refused(Refusal::Locked { path: file() }), ErrorKind::ResourceBusy),
        (Error::Refused(Refusal::InUse { path: file(), held: held() }), ErrorKind::ResourceBusy),
        (Error::Refused(Refusal::NoVolumes), ErrorKind::InvalidInput),
        (Error::NoSpace { file: file(), need: 2, have: 1 }, ErrorKind::StorageFull),
        (Error::Catalogue { file: file(), why: file() }, ErrorKind::InvalidData),
        (Error::Journal { file: file(), why: file() }, ErrorKind::InvalidData),
        (Error::Cancelled, ErrorKind::Interrupted),
        (timed_out(), ErrorKind::TimedOut),
        (incomplete(Error::Cancelled), ErrorKind::Other),
    ] {
        let text = error.to_string();
        let io = std::io::Error::from(error);
        assert_eq!((io.kind(), io.to_string()), (kind, text));
    }
    let dependents = merge::Error::Dependents { file: file(), dependents: vec!["a".into(), "b".into()] };
    assert_eq!(dependents.to_string(), "f: other images are over it and would change: a, b");
    for (error, kind) in [
        (dependents, ErrorKind::InvalidInput),
        (merge::Error::Refused { file: file(), why: file() }, ErrorKind::InvalidInput),
        (merge::Error::StaleSnapshots { file: file(), snapshots: vec![] }, ErrorKind::InvalidInput),
        (merge::Error::NoSpace { file: file(), need: 2, have: 1 }, ErrorKind::StorageFull),
        (merge::Error::Cancelled, ErrorKind::Interrupted),
        (merge::Error::Image(image::Error::Cancelled), ErrorKind::Interrupted),
        (merge::Error::Chain(chain::Error::Cancelled), ErrorKind::Interrupted),
    ] {
        let text = error.to_string();
        assert_eq!(std::io::Error::from(error).kind(), kind, "{text}");
    }
}

/// Returns a chain of a full `/base`, a `/middle` with one data cluster, and a `/top` with one zero cluster.
fn three_layers() -> (Arc<dyn FileSystem>, Chain) {
    let names: Arc<dyn FileSystem> = Arc::new(MemoryFileSystem::new());
    let options = CreateOptions::new(4 << 16);
    for (name, below) in [("base", None), ("middle", Some("base")), ("top", Some("middle"))] {
        let path = Path::new("/").join(name);
        let options = below.map_or_else(|| options.clone(), |below| options.clone().with_backing(below, "qcow2"));
        let image = Image::create(names.create_new(&path).unwrap(), &options).unwrap();
        match name {
            "base" => image.write_at(&vec![1; 4 << 16], GuestOffset::ZERO).unwrap(),
            "middle" => image.write_at(&vec![2; 1 << 16], GuestOffset::new(1 << 16)).unwrap(),
            _ => image.write_zeroes_at(GuestOffset::new(2 << 16), 1 << 16).unwrap(),
        }
        image.close().unwrap();
    }
    let options = ChainOptions::default().with_policy(Policy::Any).with_format(Format::Qcow2).with_writable(1);
    let chain = Chain::open_in(&names, Path::new("/top"), &options).unwrap();
    (names, chain)
}

#[test]
fn rebase_plan_agrees_with_rebase() {
    let (names, chain) = three_layers();
    let options = RebaseOptions::default().with_backing_file("/base").with_rate_limit(Some(1 << 30));
    let planned = merge::plan_rebase(&chain, Onto::Layer(2), &options).unwrap();
    // Both sides hold the middle's cluster; nobody reads data for a plan.
    assert_eq!((planned.data + planned.compared, planned.zeroes), (1 << 16, 0));
    let text = planned.to_string();
    assert!(text.starts_with("rebase of /top\n  moves      "), "{text}");
    assert!(text.contains("\n  compares   "), "{text}");
    let json = serde_json::to_value(&planned).unwrap();
    assert_eq!((&json["receiver"], &json["zeroes"]), (&"/top".into(), &0.into()));
    let flat = merge::plan_rebase(&chain, Onto::Nothing, &options).unwrap();
    assert_eq!((flat.data, flat.compared), (3 << 16, 0), "all but the zeroes of the top");

    let before = read(&chain).unwrap();
    merge::rebase(&chain, Onto::Layer(2), &options, &()).unwrap();
    let top = chain.top().node.as_qcow2().unwrap();
    assert_eq!(top.header().backing_file.as_deref(), Some(&b"/base"[..]));
    chain.close().unwrap();
    let options = ChainOptions::default().with_policy(Policy::Any).with_format(Format::Qcow2);
    let after = Chain::open_in(&names, Path::new("/top"), &options).unwrap();
    assert_eq!((after.layers().len(), read(&after).unwrap() == before), (2, true));
}

#[test]
fn merge_of_missing_layers_is_refused() {
    let (_, chain) = three_layers();
    let commit = |base, after| {
        let options = CommitOptions::default().with_base(base).with_after(after);
        merge::commit(&chain, &options, &()).unwrap_err().to_string()
    };
    assert_eq!(commit(0, AfterCommit::Keep), "/top: the top cannot be merged into itself");
    assert_eq!(commit(2, AfterCommit::Empty), "/top: only a top that sits directly on the base can be emptied");
    assert_eq!(commit(9, AfterCommit::Keep), "/top: there is no such layer to merge into");
    let pull = merge::pull(&chain, &PullOptions::default().with_base(Some(9)), &()).unwrap_err();
    assert_eq!(pull.to_string(), "/top: there is no such layer to sit on");
    assert_eq!(merge::plan(&chain, 3).unwrap_err().to_string(), "/top: there is no such layer to merge");
    let json = serde_json::to_value(merge::plan(&chain, 2).unwrap()).unwrap();
    assert_eq!(json["commit"]["unreachable"], serde_json::json!(["/top", "/middle"]));
    assert_eq!(format!("{:>6}", Direction::Pull), "  pull");

    let small = CreateOptions::new(1 << 20).with_cluster_bits(ClusterBits::new(12).unwrap()).with_extended_l2(true);
    let measured = merge::Measurement::of_qcow2(&small, []).unwrap_err().to_string();
    assert!(measured.ends_with("extended L2 entries need clusters of at least 16 KiB"), "{measured}");
    let large = CreateOptions::new(1 << 60).with_cluster_bits(ClusterBits::new(9).unwrap());
    let measured = merge::Measurement::of_qcow2(&large, []).unwrap_err().to_string();
    assert!(measured.contains(&format!("a disk of {} bytes with clusters of 512 bytes", 1_u64 << 60)), "{measured}");
}
