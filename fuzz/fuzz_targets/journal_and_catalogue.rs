//! Any bytes as a VM's catalogue and journal, and sound ones with some values changed and correct checksums.
//!
//! Invariants:
//! - No panic, and memory stays below the fuzzer's limit.
//! - A catalogue that decodes can be encoded, and decodes to the same model again.
//! - Reading (load, list, pending, verify) changes no file.
//! - Recovery ends. If it succeeds, the next one has nothing to do, or completes a merge that the catalogue records, and
//!   then nothing is left. If it fails, it returns a reason, and so does the next one.
//! - A journal of another set or operation is refused, and no file changes.
//! - A cancellation that is refused changes no file.
//! - A catalogue that could be read before recovery can be read after it.
#![no_main]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use qcow2_chain::storage::{FileSystem, MemoryFileSystem, MemoryStorage};
use qcow2_chain::vm::{Catalogue, Recovery, Refusal, SnapshotSet, VerifyOptions};
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
    assert!(files(&names) == before, "reading changed a file");
    if input.cancel
        && let Err(error) = set.cancel()
        && error.refusal().is_some()
    {
        assert!(files(&names) == before, "a refused cancellation changed a file: {error}");
    }
    recover(&set, &names);
    set.model().expect("a catalogue that could be read can be read after recovery");
    look(&set);
});

fn look(set: &SnapshotSet) {
    let _ = (set.list(true), set.pending());
    let _ = set.verify(&VerifyOptions::default().with_deep(true), &());
}

fn recover(set: &SnapshotSet, names: &MemoryFileSystem) {
    let before = files(names);
    match set.recover(&()) {
        Ok(_) => {
            let again = set.recover(&());
            // A journal may have the beginning of a deletion and not its end.
            if !matches!(again, Ok(Recovery::Clean)) && again.is_ok() {
                let third = set.recover(&()).expect("an operation that was completed twice is complete");
                assert_eq!(third, Recovery::Clean);
            }
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            if matches!(error.refusal(), Some(Refusal::ForeignJournal { .. })) {
                assert!(files(names) == before, "a refused journal changed a file: {error}");
            }
            let again = set.recover(&());
            assert!(again.is_err(), "{error}, and then {again:?}");
        }
    }
}

/// Returns the files of the directory, except for locks, with their content.
fn files(names: &MemoryFileSystem) -> Vec<(PathBuf, Vec<u8>)> {
    let paths = names.list(Path::new("/vm")).expect("listed");
    let read = |path: PathBuf| names.get(&path).map(|storage| (path, storage.to_vec()));
    let is_lock = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "lock");
    paths.into_iter().filter(|path| !is_lock(path)).filter_map(read).collect()
}
