//! Any bytes as a VM's catalogue and journal, and sound ones with some values changed and their sums made right again.
//!
//! Invariants: no panic, and memory stays below the fuzzer's limit. What decodes as a catalogue encodes, and that decodes to
//! the same. Looking (load, list, pending, verify) changes no file. Recovery comes to an end, and there it stays: when it
//! succeeds, the next one finds nothing to do, or completes what the records say is still being merged, and then nothing is
//! left; when it fails, it says why, and the next one fails as well. Whatever a journal asks for, a catalogue that could be
//! read before recovery can be read after it.
#![no_main]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use qcow2_chain::storage::{MemoryFileSystem, MemoryStorage, FileSystem};
use qcow2_chain::vm::{Catalogue, Recovery, SnapshotSet, VerifyOptions};
use qcow2_chain_fuzz::inputs::{Bytes, Records as Input};
use qcow2_chain_fuzz::records::{CATALOGUE, Change, JOURNAL, worlds};

fuzz_target!(|input: Input<'_>| {
    let worlds = worlds();
    let world = &worlds[usize::from(input.world) % worlds.len()];
    let few = |changes: &[Change]| changes[..changes.len().min(6)].to_vec();
    let catalogue = match input.catalogue {
        Bytes::Changed(changes) => world.catalogue(&few(&changes)),
        Bytes::Raw(bytes) => bytes.to_vec(),
    };
    let mut journal = match input.journal {
        Bytes::Changed(changes) => world.journal(&few(&changes), usize::from(input.records)),
        Bytes::Raw(bytes) => bytes.to_vec(),
    };
    journal.truncate(journal.len().saturating_sub(usize::from(input.torn) / 8));

    if let Ok(model) = Catalogue::decode(&catalogue, Path::new(CATALOGUE)) {
        let text = Catalogue::encode(&model).expect("what decodes encodes");
        assert_eq!(Catalogue::decode(&text, Path::new(CATALOGUE)).expect("what encodes decodes"), model);
    }
    let names = world.names();
    names.insert(CATALOGUE, Arc::new(MemoryStorage::with_bytes("catalogue", &catalogue)));
    if !journal.is_empty() {
        names.insert(JOURNAL, Arc::new(MemoryStorage::with_bytes("journal", &journal)));
    }
    let shared: Arc<dyn FileSystem> = names.clone();
    let Ok(set) = SnapshotSet::load_in(shared, CATALOGUE) else { return };
    let set = set.with_jobs(1);

    let before = files(&names);
    look(&set);
    assert!(files(&names) == before, "looking changed something");
    recover(&set);
    set.model().expect("a catalogue that could be read can be read after recovery");
    look(&set);
});

fn look(set: &SnapshotSet) {
    let _ = (set.list(true), set.pending());
    let _ = set.verify(&VerifyOptions::default().with_deep(true), &());
}

fn recover(set: &SnapshotSet) {
    match set.recover(&()) {
        Ok(_) => {
            let again = set.recover(&());
            // A journal may tell of the beginning of a deletion and not of its end.
            if !matches!(again, Ok(Recovery::Clean)) && again.is_ok() {
                let third = set.recover(&()).expect("what was completed twice is complete");
                assert_eq!(third, Recovery::Clean);
            }
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            let again = set.recover(&());
            assert!(again.is_err(), "{error}, and then {again:?}");
        }
    }
}

/// All files of the directory but the locks: the bytes of each.
fn files(names: &MemoryFileSystem) -> Vec<(PathBuf, Vec<u8>)> {
    let paths = names.list(Path::new("/vm")).expect("listed");
    let read = |path: PathBuf| names.get(&path).map(|storage| (path, storage.to_vec()));
    paths.into_iter().filter_map(read).collect()
}
