//! Catalogues and journals with correct checksums and impossible content.

use std::path::Path;
use std::sync::Arc;

use qcow2_chain::format::GuestOffset;
use qcow2_chain::image::{CreateOptions, Image};
use qcow2_chain::merge::Direction;
use qcow2_chain::storage::{Access, FileSystem, MemoryFileSystem, MemoryStorage};
use qcow2_chain::vm::{
    AdoptOptions, Catalogue, Edit, Error, Journal, MergeOptions, Model, Plan, Record, Request, SnapshotId,
    SnapshotOptions, SnapshotSet, VerifyOptions, VolumeSpec,
};

const CATALOGUE: &str = "/vm/catalogue.json";
const JOURNAL: &str = "/vm/catalogue.json.journal";

/// Returns a VM of one disk with one snapshot.
fn vm() -> (Arc<MemoryFileSystem>, SnapshotSet) {
    let shared = Arc::new(MemoryFileSystem::new());
    let names: Arc<dyn FileSystem> = shared.clone();
    let disk = names.create_new(Path::new("/vm/vda.qcow2")).expect("made");
    let image = Image::create(disk, &CreateOptions::new(1 << 20)).expect("created");
    image.write_at(b"data", GuestOffset::ZERO).expect("written");
    image.close().expect("closed");
    let volumes = [VolumeSpec::new("vda", "/vm/vda.qcow2")];
    let set = SnapshotSet::adopt_in(names, CATALOGUE, &volumes, &AdoptOptions::default()).expect("adopted");
    set.create("s1", &SnapshotOptions::default()).expect("taken");
    (shared, set)
}

/// Returns the plan that deletes the snapshot.
fn deletion(set: &SnapshotSet) -> Plan {
    let options = MergeOptions::default().with_direction(Direction::Commit);
    set.plan(&Request::Delete { name: "s1".into() }, &options).expect("planned")
}

/// Checks that recovery fails for this reason each time, and that the set can still be read.
#[track_caller]
fn refused(names: &Arc<MemoryFileSystem>, set: &SnapshotSet, plan: &Plan, why: &str) {
    let shared: Arc<dyn FileSystem> = names.clone();
    let _ = shared.unlink(Path::new(JOURNAL));
    drop(Journal::begin(&shared, Path::new(JOURNAL), Path::new(CATALOGUE), plan).expect("begun"));
    let said = [(); 2].map(|()| set.recover(&()).expect_err("there is nothing to recover to").to_string());
    assert!(said[0].contains(why), "{}", said[0]);
    assert_eq!(said[0], said[1]);
    set.list(true).expect("listed");
    let _ = set.verify(&VerifyOptions::default(), &());
    set.model().expect("loaded");
}

#[test]
fn journal_plan_without_stages_is_refused() {
    let (names, set) = vm();
    let mut plan = deletion(&set);
    plan.stages.clear();
    refused(&names, &set, &plan, "no stages");
    assert!(matches!(set.pending(), Err(Error::Journal { .. })));
    assert!(matches!(set.create("s2", &SnapshotOptions::default()), Err(Error::Journal { .. })));
}

/// Recovery must not save a catalogue that cannot be loaded.
#[test]
fn journal_plan_with_contradictory_outcome_is_refused() {
    let (names, set) = vm();
    let mut plan = deletion(&set);
    plan.stages[0].begin = vec![Edit::SetCurrent { id: Some(SnapshotId(77)) }];
    refused(&names, &set, &plan, "the current snapshot #77 does not exist");
}

#[test]
fn catalogue_with_exhausted_numbers_is_refused() {
    let (names, set) = vm();
    let sound = set.model().expect("loaded");
    let damages: [fn(&mut Model); 3] = [
        |model| model.next_snapshot = u64::MAX,
        |model| model.next_file = u64::MAX,
        |model| model.last_operation.id = u64::MAX,
    ];
    for damage in damages {
        let mut model = sound.clone();
        damage(&mut model);
        let error = Catalogue::encode(&model).expect_err("it has no next number").to_string();
        assert!(error.contains("the limit is"), "{error}");
    }
    // A catalogue with such a number and a correct checksum is not read.
    let mut text = Catalogue::encode(&sound).expect("encoded");
    let at = |text: &[u8], what: &str| text.windows(what.len()).position(|window| window == what.as_bytes());
    let number = format!("\"next-file\": {}", sound.next_file);
    let start = at(&text, &number).expect("it has the number");
    text.splice(start..start + number.len(), format!("\"next-file\": {}", u64::MAX).into_bytes());
    let mut model = sound;
    model.next_file = u64::MAX;
    let sum = format!("{:08x}", crc32(&serde_json::to_vec(&model).expect("JSON")));
    let start = at(&text, "\"crc32\": \"").expect("it has a sum") + 10;
    text.splice(start..start + 8, sum.into_bytes());
    names.insert(CATALOGUE, Arc::new(MemoryStorage::with_bytes("catalogue", &text)));
    let error = set.create("s2", &SnapshotOptions::default()).expect_err("it is not read").to_string();
    assert!(error.contains("the limit is"), "{error}");
}

/// Returns the CRC-32 of zip files, computed bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
    !bytes.iter().fold(u32::MAX, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

/// A record before the plan, a plan of another version, and damage before a complete record.
#[test]
fn journal_that_no_crash_leaves_is_refused_and_kept() {
    let (names, set) = vm();
    let plan = deletion(&set);
    let shared: Arc<dyn FileSystem> = names.clone();
    let line = |record: &Record| {
        let json = serde_json::to_vec(record).expect("JSON");
        [format!("{:08x} ", crc32(&json)).as_bytes(), &json, b"\n"].concat()
    };
    let done = line(&Record::Done { stage: usize::MAX, volume: "vda".into(), step: usize::MAX, switched: false });
    let first = line(&Record::Plan { version: 2, plan: plan.clone() });
    let later = line(&Record::Plan { version: 3, plan: plan.clone() });
    let cases = [
        (done.clone(), "its first record is not a plan"),
        (later, "the version of the journal is 3"),
        ([&first[..], b"torn\n", &done].concat(), "is damaged"),
    ];
    for (bytes, why) in cases {
        names.insert(JOURNAL, Arc::new(MemoryStorage::with_bytes("journal", &bytes)));
        let said = [(); 2].map(|()| set.recover(&()).expect_err("damaged").to_string());
        assert!(said[0].contains(why) && said[0] == said[1], "{said:?}");
        let journal = shared.open(Path::new(JOURNAL), &Access::read()).expect("it stays for people to look at");
        assert_eq!(journal.len().expect("measured"), bytes.len() as u64);
    }
    // A journal of another set is refused, even if its plan would fit.
    let mut foreign = plan.clone();
    foreign.set = vm().1.model().expect("loaded").set;
    refused(&names, &set, &foreign, "the journal does not belong to this catalogue: its set is");
    shared.unlink(Path::new(JOURNAL)).expect("removed");
    // So is one of another operation than the last and the next.
    for id in [0, plan.id + 1, u64::MAX] {
        let mut other = plan.clone();
        other.id = id;
        refused(&names, &set, &other, &format!("it has operation {id}"));
        shared.unlink(Path::new(JOURNAL)).expect("removed");
    }
    // A record of a step that the plan does not have has no effect.
    names.insert(JOURNAL, Arc::new(MemoryStorage::with_bytes("journal", [first, done].concat())));
    set.recover(&()).expect("completed");
    assert!(set.list(true).expect("listed").snapshots.is_empty());
}
