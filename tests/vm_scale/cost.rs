//! The cost of operations in calls: opens of files, reads of tables, listings of directories. Times are not
//! measured, so that the tests do not depend on the machine.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qcow2_chain::chain::DependentSearch;
use qcow2_chain::image::{CreateOptions, Image};
use qcow2_chain::merge::Direction;
use qcow2_chain::storage::{FileSystem, MemoryStorage};
use qcow2_chain::vm::{AdoptOptions, MergeOptions, SnapshotSet, VolumeSpec};

use crate::support::counted::{CountedFileSystem, Passed, SECTOR, Traffic};
use crate::support::lab::{Lab, LabShape};
use crate::support::rng::Rng;
use crate::support::victim::Victim;

/// Deletes a snapshot of a VM with one volume of 20 files, and returns the cost. The tables of the files are those
/// before the deletion.
fn delete_of_20(name: &str, direction: Direction) -> (Passed, Traffic, BTreeMap<PathBuf, BTreeSet<u64>>) {
    let mut rng = Rng::new(0x5eed);
    let files = Arc::new(CountedFileSystem::default());
    let shape = LabShape { volumes: 1, size: 512 << 10, cluster_bits: 9, ..LabShape::default() };
    let mut lab = Lab::new(Arc::clone(&files) as Arc<dyn FileSystem>, Path::new("/vm"), shape, &mut rng);
    for number in 1..20 {
        lab.write_all(&mut rng);
        lab.create(&format!("s{number:02}"));
    }
    lab.write_all(&mut rng);
    let model = lab.model();
    let tables = model.records().map(|(_, _, record)| {
        let path = lab.set.files().path(&record.file.path);
        let bytes = files.inner.get(&path).expect("a recorded file").to_vec();
        (path, tables(&Victim { bytes }))
    });
    let tables = tables.collect();
    files.take();
    files.take_traffic();
    lab.set.delete(name, &MergeOptions::default().with_direction(direction), &()).unwrap();
    let cost = (files.take(), files.take_traffic(), tables);
    lab.taken.remove(name);
    lab.check().unwrap();
    cost
}

/// Returns the sectors of an image's L2 tables.
fn tables(image: &Victim) -> BTreeSet<u64> {
    let tables = image.l1_entries().into_iter().map(|entry| image.u64(entry) & 0x00ff_ffff_ffff_fe00);
    tables.flat_map(|table| table / SECTOR..(table + image.cluster_size()).div_ceil(SECTOR)).collect()
}

/// The walks over the tables of a merge: the preflight estimates, and the merge copies.
const WALKS: u64 = 2;

/// One open inspects a file, or tests for a writer, or reads with a lock; another one holds the lock for the operation.
#[test]
fn delete_opens_each_file_at_most_twice() {
    for name in ["s10", "s19"] {
        for direction in [Direction::Commit, Direction::Pull] {
            let (_, traffic, tables) = delete_of_20(name, direction);
            let images = traffic.opens.iter().filter(|(path, _)| tables.contains_key(*path));
            let often: Vec<_> = images.filter(|(_, opens)| **opens > 2).collect();
            assert!(often.is_empty(), "{name}, {direction}: opened more than twice: {often:?}");
            let walked = traffic
                .reads
                .iter()
                .filter(|((path, sector), _)| tables.get(path).is_some_and(|tables| tables.contains(sector)));
            let often: Vec<_> = walked.filter(|(_, reads)| **reads > WALKS).collect();
            assert!(often.is_empty(), "{name}, {direction}: tables read more than {WALKS} times: {often:?}");
        }
    }
}

/// The cost of the deletions at commit 6677dba: calls to the images, bytes of the images, and calls to catalogue, journal
/// and lock. Files were neither locked beforehand nor searched for dependents then.
const BEFORE: [(&str, Direction, [u64; 3]); 4] = [
    ("s10", Direction::Commit, [201, 29_552, 33]),
    ("s10", Direction::Pull, [225, 37_896, 35]),
    ("s19", Direction::Commit, [293, 39_152, 31]),
    ("s19", Direction::Pull, [354, 568_200, 33]),
];
/// The calls for each of the 20 files that the checks cost since: an open that tests for a writer, and the resolution of
/// its path for the search for dependents.
const CHECKS: u64 = 2 * 20;
/// The further calls of catalogue, journal and lock: the identity of the journal, its attributes, and its `changing` record.
const RECORDS: u64 = 11;

#[test]
fn delete_costs_no_more_than_before_but_for_its_checks() {
    for (name, direction, [calls, bytes, records]) in BEFORE {
        let (cost, _, _) = delete_of_20(name, direction);
        println!("{name} {direction}: {cost:?}");
        let limits = [calls + CHECKS, bytes, records + RECORDS];
        let found = [cost.images.calls, cost.images.bytes, cost.records.calls];
        assert!(
            found.iter().zip(&limits).all(|(found, limit)| found <= limit),
            "{name}, {direction}: {found:?} {limits:?}"
        );
    }
}

const VMS: usize = 300;
const FILES: usize = 10_000;

/// Creates a VM with one volume and one snapshot in `/pool`, without a search for dependents.
fn small_vm(files: &Arc<dyn FileSystem>, number: usize) -> SnapshotSet {
    let disk = PathBuf::from(format!("/pool/vm{number:03}.qcow2"));
    let image = Image::create(files.create_new(&disk).unwrap(), &CreateOptions::new(1 << 20)).unwrap();
    image.write_at(&[7; 512], qcow2_chain::format::GuestOffset::ZERO).unwrap();
    image.close().unwrap();
    let options = AdoptOptions::default().with_dependents(DependentSearch::disabled());
    let catalogue = format!("/pool/vm{number:03}.json");
    let set = SnapshotSet::adopt_in(Arc::clone(files), catalogue, &[VolumeSpec::new("vda", disk)], &options).unwrap();
    set.create("first", &Default::default()).unwrap();
    set
}

/// Creates, reverts and deletes on one VM, and returns the cost of each.
fn life(files: &CountedFileSystem, set: &SnapshotSet) -> [(Passed, Traffic); 3] {
    let options = MergeOptions::default();
    files.take();
    files.take_traffic();
    set.create("more", &Default::default()).unwrap();
    let create = (files.take(), files.take_traffic());
    set.revert("first", &options, &()).unwrap();
    let revert = (files.take(), files.take_traffic());
    set.delete("more", &options, &()).unwrap();
    [create, revert, (files.take(), files.take_traffic())]
}

/// A snapshot does not look at other files. A revert and a deletion read the header of each once, to find dependents.
#[test]
fn operations_among_10000_files_look_at_each_at_most_once() {
    let alone = {
        let files = Arc::new(CountedFileSystem::default());
        let shared: Arc<dyn FileSystem> = files.clone();
        life(&files, &small_vm(&shared, 0))
    };
    let files = Arc::new(CountedFileSystem::default());
    let shared: Arc<dyn FileSystem> = files.clone();
    let sets: Vec<SnapshotSet> = (0..VMS).map(|number| small_vm(&shared, number)).collect();
    let clone = files.inner.get(sets[7].active_path("vda").unwrap()).unwrap().to_vec();
    let present = shared.list(Path::new("/pool")).unwrap().len();
    for number in present..FILES {
        let path = format!("/pool/clone{number:05}.qcow2");
        files.inner.insert(&path, Arc::new(MemoryStorage::with_bytes(path.clone(), &clone)));
    }
    assert_eq!(shared.list(Path::new("/pool")).unwrap().len(), FILES);
    let crowded = life(&files, &sets[0]);

    let foreign = |traffic: &Traffic| -> BTreeMap<PathBuf, u64> {
        let own = |path: &Path| path.file_name().unwrap().to_string_lossy().starts_with("vm000");
        traffic.opens.iter().filter(|(path, _)| !own(path)).map(|(path, opens)| (path.clone(), *opens)).collect()
    };
    let [(passed, traffic), ..] = &crowded;
    assert_eq!(passed.images.calls, alone[0].0.images.calls, "calls of a snapshot");
    assert_eq!((foreign(traffic).len(), traffic.lists.len()), (0, 0), "a snapshot looks at its own files only");
    for (name, ((passed, traffic), (alone, _))) in ["revert", "delete"].iter().zip(crowded[1..].iter().zip(&alone[1..]))
    {
        assert_eq!(traffic.lists, [(PathBuf::from("/pool"), 1)].into(), "{name}: the directory is listed once");
        let opened = foreign(traffic);
        assert!(opened.values().all(|opens| *opens == 1), "{name}: each header is read at most once");
        assert!(opened.len() <= FILES, "{name}");
        // An open and a read of each file, and one path for each name of a backing file that several images share.
        let more = passed.images.calls + passed.records.calls - alone.images.calls - alone.records.calls;
        let allowed = 3 * FILES as u64 + VMS as u64;
        assert!(more <= allowed, "{name}: {more} calls more than alone");
        let more = passed.images.bytes - alone.images.bytes;
        assert!(more <= 1024 * FILES as u64, "{name}: {more} bytes more than alone");
    }
}
