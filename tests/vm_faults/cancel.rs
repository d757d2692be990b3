//! `vm cancel`: an interrupted deletion is called off while nothing is published, and not
//! afterwards.

use std::time::Duration;

use super::world::{NEW, OLD, SIZE, World};

#[test]
fn cancel_of_unpublished_deletion_restores_the_snapshot() {
    for direction in ["commit", "pull"] {
        let Some(world) = World::with_snapshot() else { return };
        let active = world.active("vda");
        world.interrupt_delete(&["--direction", direction]);
        world.ok(&["cancel", "web.json"]);
        assert_eq!(world.state("s1").as_deref(), Some("ready"));
        assert_eq!(world.active("vda"), active);
        assert!(!world.exists("web.json.journal"));
        world.ok(&["verify", "web.json"]);
        world.assert_reads(&active, NEW);
        world.assert_reads("vda.qcow2", OLD);
        world.assert_reads("vda.qcow2", "-P 0 8M 16M");
        // All verbs work again.
        world.ok(&["snapshot", "web.json", "s2"]);
        world.ok(&["revert", "web.json", "s1"]);
        world.ok(&["delete", "web.json", "s2"]);
        world.assert_reads(world.active("vda"), OLD);
        world.ok(&["delete", "web.json", "s1"]);
        assert_eq!(world.active("vda"), "vda.qcow2");
        world.ok(&["verify", "web.json"]);
    }
}

#[test]
fn cancel_of_partly_published_deletion_is_refused() {
    let Some(world) = World::new() else { return };
    for name in ["a.qcow2", "b.qcow2"] {
        world.image(name, SIZE);
        world.write(name, OLD);
    }
    world.ok(&["init", "web.json", "--volume", "vda=a.qcow2", "--volume", "vdb=b.qcow2"]);
    world.ok(&["snapshot", "web.json", "s1"]);
    // The first volume is done at once, the second one takes seconds.
    world.write(&world.active("vda"), "-P 3 0 64k");
    world.write(&world.active("vdb"), NEW);
    let args = ["delete", "web.json", "s1", "--rate-limit", "2M", "--direction", "commit"];
    world.interrupt(&args, Duration::from_secs(3));
    world.assert_reads("a.qcow2", "-P 3 0 64k");
    let said = world.unchanged(&["cancel", "web.json"]);
    assert!(said.contains("recover") || said.contains("delete"), "the message names no way out: {said}");
    world.ok(&["recover", "web.json"]);
    assert_eq!(world.state("s1"), None);
    world.assert_reads(world.active("vda"), "-P 3 0 64k");
    world.assert_reads(world.active("vdb"), NEW);
    world.assert_sound();
}

#[test]
fn cancel_without_interrupted_deletion_is_refused() {
    let Some(world) = World::with_snapshot() else { return };
    let before = world.tree();
    let run = world.vm(&["cancel", "web.json"]);
    super::world::assert_supported(&run, &["cancel"]);
    super::world::assert_same(&before, &world.tree(), "cancel with nothing under way");
    assert!(run.code == 0 || run.code == 1, "{}", run.stderr);
}

#[test]
fn cancel_of_interrupted_create_is_refused() {
    let Some((world, _)) = super::world::interrupted_create(true) else { return };
    let said = world.unchanged(&["cancel", "web.json"]);
    assert!(said.contains("recover"), "the message names no way out: {said}");
}
