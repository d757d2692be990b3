//! Journals that do not belong to the catalogue beside them: left over, foreign, or newer than a
//! restored catalogue.

use std::fs;

use super::world::{NEW, OLD, World, interrupted_create};

const JOURNAL: &str = "web.json.journal";

/// Fails unless a message names the journal and a way out.
#[track_caller]
fn assert_names_journal(said: &str) {
    assert!(said.contains(JOURNAL), "the message does not name the journal: {said}");
    let remedy = ["remove", "delete", "move", "restore"].into_iter().any(|word| said.contains(word));
    assert!(remedy, "the message names no way out: {said}");
}

#[test]
fn init_with_leftover_delete_journal_is_refused() {
    let Some(world) = World::with_snapshot() else { return };
    world.interrupt_delete(&["--direction", "commit"]);
    let active = world.active("vda");
    fs::remove_file(world.path("web.json")).unwrap();
    let said = world.unchanged(&["init", "web.json", "--volume", &format!("vda={active}")]);
    assert_names_journal(&said);
    assert!(!world.exists("web.json"), "a catalogue was made beside a leftover journal");
    // The way out: without the journal, a catalogue can be made.
    fs::remove_file(world.path(JOURNAL)).unwrap();
    world.ok(&["init", "web.json", "--volume", &format!("vda={active}"), "--snapshot", "s1"]);
    world.assert_reads(&active, NEW);
}

#[test]
fn init_with_leftover_create_journal_is_refused() {
    let Some((world, overlay)) = interrupted_create(true) else { return };
    fs::remove_file(world.path("web.json")).unwrap();
    let said = world.unchanged(&["init", "web.json", "--volume", &format!("vda={overlay}")]);
    assert_names_journal(&said);
}

/// Takes the active file into a new catalogue of the same name, and puts the old journal beside it.
#[track_caller]
fn renew(world: &World, active: &str) {
    fs::rename(world.path(JOURNAL), world.path("kept")).unwrap();
    fs::remove_file(world.path("web.json")).unwrap();
    world.ok(&["init", "web.json", "--volume", &format!("vda={active}")]);
    fs::rename(world.path("kept"), world.path(JOURNAL)).unwrap();
}

#[test]
fn recover_with_delete_journal_of_other_catalogue_is_refused() {
    let Some(world) = World::with_snapshot() else { return };
    world.interrupt_delete(&["--direction", "commit"]);
    let active = world.active("vda");
    renew(&world, &active);
    for args in [&["recover", "web.json", "--dry-run"][..], &["recover", "web.json"]] {
        let said = world.unchanged(args);
        assert_names_journal(&said);
    }
    for args in [&["snapshot", "web.json", "x"][..], &["resize", "web.json", "vda", "64M"]] {
        world.unchanged(args);
    }
    assert_eq!(world.active("vda"), active);
    world.assert_reads(&active, NEW);
}

#[test]
fn recover_with_create_journal_of_other_catalogue_is_refused() {
    let Some((world, overlay)) = interrupted_create(true) else { return };
    renew(&world, &overlay);
    let said = world.unchanged(&["recover", "web.json"]);
    assert_names_journal(&said);
    assert_eq!(world.active("vda"), overlay);
    world.assert_reads(&overlay, OLD);
}

#[test]
fn recover_with_restored_older_catalogue_is_refused() {
    let Some(world) = World::with_volume() else { return };
    fs::copy(world.path("web.json"), world.path("backup")).unwrap();
    world.ok(&["snapshot", "web.json", "s1"]);
    world.write(&world.active("vda"), NEW);
    world.ok(&["snapshot", "web.json", "s2"]);
    world.interrupt_delete(&["--direction", "commit"]);
    let newest = world.active("vda");
    fs::copy(world.path("backup"), world.path("web.json")).unwrap();
    // The catalogue knows no snapshot, and the journal is of its third operation.
    let said = world.unchanged(&["recover", "web.json"]);
    assert_names_journal(&said);
    world.assert_reads(&newest, NEW);
}
