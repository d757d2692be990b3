use std::collections::BTreeSet;
use std::path::Path;

use super::*;
use crate::storage::{Access, Attributes, EntryKind, FileSystem, Storage};

fn states(log: &Log) -> Vec<State> {
    let mut states = Vec::new();
    let count = log.each_state(7, 4, |state| {
        states.push(state.clone());
        Ok::<(), ()>(())
    });
    assert_eq!(count, Ok(states.len()));
    assert!(states.iter().enumerate().all(|(number, state)| state.number == number));
    states
}

/// Returns the number of different contents among the states.
fn distinct(states: &[State]) -> usize {
    states.iter().map(|state| &state.files).collect::<BTreeSet<_>>().len()
}

/// The different trees of all states, in short: names with the first byte of what they hold.
fn trees(log: &Log) -> BTreeSet<String> {
    let short = |(path, bytes): (&PathBuf, &Vec<u8>)| {
        format!(
            "{}={}",
            path.display(),
            bytes.first().map_or_else(|| "-".to_owned(), |byte| char::from(*byte).to_string())
        )
    };
    states(log).iter().map(|state| state.tree().iter().map(short).collect::<Vec<_>>().join(" ")).collect()
}

fn set<const N: usize>(trees: [&str; N]) -> BTreeSet<String> {
    trees.into_iter().map(str::to_owned).collect()
}

fn path(name: &str) -> &Path {
    Path::new(name)
}

#[test]
fn synced_writes_are_in_every_later_state() {
    let recorder = Recorder::new();
    let file = recorder.storage("a", vec![0; 1024]);
    file.write_at(&[1; 1024], 0).unwrap();
    file.sync().unwrap();
    file.write_at(&[2; 512], 512).unwrap();
    let states = states(&recorder.log());
    // Two sectors before the sync: four states. One after it: two.
    assert_eq!(states.len(), 6);
    assert_eq!(distinct(&states), 5);
    assert_eq!(recorder.durable(), [[1; 1024]]);
    assert!(states[4..].iter().all(|state| state.files[0][..512] == [1; 512]));
}

#[test]
fn sync_covers_one_file_only() {
    let recorder = Recorder::new();
    let (a, b) = (recorder.storage("a", vec![0; 512]), recorder.storage("b", vec![0; 512]));
    a.write_at(&[1; 512], 0).unwrap();
    b.sync().unwrap();
    let last = states(&recorder.log()).into_iter().skip(2).collect::<Vec<_>>();
    assert_eq!(distinct(&last), 2, "the write may still be lost");
}

#[test]
fn omitted_sync_is_not_recorded() {
    let recorder = Recorder::without_sync(0);
    let file = recorder.storage("a", vec![0; 512]);
    file.write_at(&[1; 512], 0).unwrap();
    file.sync().unwrap();
    assert_eq!(recorder.syncs(), 1);
    assert_eq!(states(&recorder.log()).len(), 2);
    let whole = Recorder::new();
    let file = whole.storage("a", vec![0; 512]);
    file.write_at(&[1; 512], 0).unwrap();
    file.sync().unwrap();
    assert_eq!(states(&whole.log()).len(), 3);
    assert_eq!(states(&whole.log().without(|number| number == 0)).len(), 2);
}

#[test]
fn range_operations_are_recorded() {
    let plain = Recorder::new().storage("plain", vec![1; 512]);
    assert!(plain.zero_range(0..512).is_err() && plain.allocate_range(0..1024).is_err());
    assert!(plain.copy_from(&MemoryStorage::new("source"), 0, 0, 1).is_err());
    let recorder = Recorder::with(RecorderOptions::default().with_in_kernel(true));
    let file = recorder.storage("a", vec![1; 1024]);
    file.zero_range(512..1536).unwrap();
    file.allocate_range(0..2048).unwrap();
    let source = MemoryStorage::with_bytes("source", [7; 700]);
    assert_eq!(file.copy_from(&source, 200, 0, 1000).unwrap(), 500);
    file.punch_range(100..200).unwrap();
    let mut model = vec![1; 1024];
    model.resize(2048, 0);
    model[512..].fill(0);
    model[..500].fill(7);
    model[100..200].fill(0);
    let log = recorder.log();
    assert_eq!(log.last().files, [model.clone()]);
    assert_eq!(states(&log).last().unwrap().files, [model]);
    assert_eq!(log.durable().files, [[1; 1024]]);
}

#[test]
fn name_and_content_are_durable_by_separate_syncs() {
    let recorder = Recorder::new();
    let names = recorder.names(&Tree::new());
    let file = names.create_new(path("d/a")).unwrap();
    file.write_at(b"x", 0).unwrap();
    file.sync().unwrap();
    assert_eq!(trees(&recorder.log()), set(["", "/d/a=-", "/d/a=x"]));
    assert_eq!(recorder.log().durable().tree(), Tree::new(), "synced bytes without a name are lost");
    names.sync_dir(path("/other")).unwrap();
    assert_eq!(recorder.log().durable().tree(), Tree::new());
    names.sync_dir(path("/d")).unwrap();
    assert_eq!(recorder.log().durable().tree(), names.tree());
    file.write_at(b"y", 0).unwrap();
    assert_eq!(recorder.log().durable().tree()[path("/d/a")], b"x");
}

#[test]
fn renames_and_removals_are_lost_independently() {
    let start: Tree =
        [("/d/a".into(), b"a".to_vec()), ("/d/b".into(), b"b".to_vec()), ("/d/c".into(), b"c".to_vec())].into();
    let recorder = Recorder::new();
    let names = recorder.names(&start);
    names.rename(path("/d/a"), path("/d/b")).unwrap();
    names.unlink(path("/d/c")).unwrap();
    assert_eq!(trees(&recorder.log()), set(["/d/a=a /d/b=b /d/c=c", "/d/b=a /d/c=c", "/d/a=a /d/b=b", "/d/b=a"]),);
    names.sync_dir(path("/d")).unwrap();
    assert_eq!(recorder.log().durable().tree(), [("/d/b".into(), b"a".to_vec())].into());
    // A handle from before the rename leads to the same file.
    names.open(path("/d/b"), &Access::write()).unwrap().write_at(b"n", 0).unwrap();
    assert_eq!(names.tree()[path("/d/b")], b"n");
    assert!(names.open(path("/d/b"), &Access::read()).unwrap().write_at(b"n", 0).is_err());
}

#[test]
fn rename_between_directories_waits_for_both_syncs() {
    let start: Tree = [("/x/a".into(), b"a".to_vec())].into();
    let recorder = Recorder::new();
    let names = recorder.names(&start);
    names.rename(path("/x/a"), path("/y/a")).unwrap();
    names.unlink(path("/y/a")).unwrap();
    names.create_new(path("/y/b")).unwrap();
    names.sync_dir(path("/y")).unwrap();
    let durable: Tree = [("/x/a".into(), b"a".to_vec()), ("/y/b".into(), Vec::new())].into();
    assert_eq!(recorder.log().durable().tree(), durable);
    // Kept after all, it does not come behind the removal that followed it.
    assert!(states(&recorder.log()).iter().skip(8).all(|state| !state.tree().contains_key(path("/y/a"))));
    names.sync_dir(path("/x")).unwrap();
    assert_eq!(recorder.log().durable().tree(), [("/y/b".into(), Vec::new())].into());
}

#[test]
fn crash_state_starts_another_recording() {
    let recorder = Recorder::new();
    let names = recorder.names(&[("/a".into(), b"1".to_vec())].into());
    names.open(path("a"), &Access::write()).unwrap().write_at(b"2", 0).unwrap();
    let mut seen = BTreeSet::new();
    for state in states(&recorder.log()) {
        let again = Recorder::new();
        let recovered = again.names(&state.tree());
        recovered.rename(path("/a"), path("/b")).unwrap();
        seen.extend(trees(&again.log()));
    }
    assert_eq!(seen, set(["/a=1", "/b=1", "/a=2", "/b=2"]));
}

#[test]
fn only_listed_files_tear() {
    let torn_lengths = |name: &str| {
        let recorder = Recorder::with(RecorderOptions::default().with_torn("journal"));
        let names = recorder.names(&Tree::new());
        let file = names.create_new(path("/new")).unwrap();
        names.rename(path("/new"), path(name)).unwrap();
        names.sync_dir(path("/")).unwrap();
        file.write_at(&[9; 40], 0).unwrap();
        let lengths = |seed| {
            let mut lengths = BTreeSet::new();
            let all = recorder.log().each_state(seed, 4, |state| {
                lengths.extend(state.tree().get(path(name)).map(Vec::len));
                Ok::<(), ()>(())
            });
            assert!(all.is_ok());
            lengths
        };
        (1..200).flat_map(lengths).collect::<BTreeSet<usize>>()
    };
    assert_eq!(torn_lengths("/disk"), [0, 40].into());
    assert_eq!(torn_lengths("/a.journal"), (0..=40).collect());
}

#[test]
fn barriers_have_call_sites() {
    let recorder = Recorder::with(RecorderOptions::default().with_sites(true));
    let names = recorder.names(&Tree::new());
    let file = names.create_new(path("/d/a")).unwrap();
    file.sync().unwrap();
    let line = line!() - 1;
    names.sync_dir(path("/d")).unwrap();
    let barriers = recorder.log().barriers();
    let sites: Vec<&Site> = barriers.iter().map(|barrier| barrier.site.as_ref().unwrap()).collect();
    assert_eq!(barriers.iter().map(|barrier| barrier.number).collect::<Vec<_>>(), [0, 1]);
    assert_eq!((&barriers[0].directory, &barriers[1].directory), (&None, &Some("/d".into())));
    for (site, line) in [(sites[0], line), (sites[1], line + 2)] {
        let caller = &site.frames[0];
        assert!(caller.function.contains("barriers_have_call_sites"), "{site:?}");
        assert!(caller.file.ends_with("src/storage/crash/tests.rs"), "{site:?}");
        assert_eq!(caller.line, line, "{site}");
        assert_eq!(site.to_string(), format!("{}:{line} {}", caller.file, caller.function));
    }
}

#[test]
fn marks_separate_old_states_from_new() {
    let recorder = Recorder::new();
    let file = recorder.storage("a", vec![0; 512]);
    file.write_at(&[1; 512], 0).unwrap();
    file.sync().unwrap();
    recorder.mark();
    file.write_at(&[2; 512], 0).unwrap();
    file.sync().unwrap();
    let log = recorder.log();
    for state in states(&log) {
        assert!(state.files[0][0] >= u8::try_from(state.marks).unwrap(), "{}", state.number);
    }
    assert_eq!([log.up_to(0).durable(), log.durable()].map(|state| state.files[0][0]), [1, 2]);
    assert_eq!((log.up_to(0).durable().marks, log.durable().marks, log.last().marks), (0, 1, 1));
    // Without the first sync the promise was not kept.
    assert_eq!(log.without(|number| number == 0).up_to(0).durable().files[0][0], 0);
}

#[test]
fn fixed_file_keeps_its_length() {
    let recorder = Recorder::with(RecorderOptions::default().with_fixed("dev/"));
    let names = recorder.names(&[("/dev/disk".into(), vec![1; 1024]), ("/file".into(), vec![1; 1024])].into());
    let open = |name| names.open(path(name), &Access::write()).unwrap();
    let (device, file) = (open("/dev/disk"), open("/file"));
    assert!(device.is_fixed_size() && !file.is_fixed_size());
    assert!(recorder.log().is_unchanged());
    assert!(device.set_len(512).is_err() && device.write_at(&[2; 2], 1023).is_err());
    assert!(recorder.log().is_unchanged(), "what failed is not recorded");
    device.write_at(&[2; 2], 1022).unwrap();
    assert_eq!(names.tree()[path("/dev/disk")][1021..], [1, 2, 2]);
}

#[test]
fn creation_like_a_model_is_recorded_as_a_creation() {
    let recorder = Recorder::new();
    let names = recorder.names(&Tree::new());
    let model = recorder.storage("model", vec![1]);
    names.check_create_like(path("/d"), &model).unwrap();
    let created = names.create_new_like(path("/d/a"), &model, Attributes::Require).unwrap();
    created.write_at(b"x", 0).unwrap();
    created.sync().unwrap();
    assert_eq!(trees(&recorder.log()), set(["", "/d/a=-", "/d/a=x"]));
    names.sync_dir(path("/d")).unwrap();
    assert_eq!(recorder.log().durable().tree()[path("/d/a")], b"x");
    assert_eq!(names.entry(path("/d/a")).unwrap(), EntryKind::File);
    assert!(!names.is_memory_backed(path("/d")).unwrap());
    assert_eq!(created.stamp().unwrap(), None);
}
