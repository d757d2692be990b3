//! Interrupted snapshots whose overlays cannot be read: uncertain, until the caller states which
//! file the VM runs on.

use std::fs;
use std::os::unix::fs::FileExt as _;

use super::world::{OLD, World, interrupted_create};

/// An interrupted snapshot whose overlay holds 4 MiB of the guest, with the damage that `damage`
/// does.
fn damaged(damage: impl Fn(&fs::File)) -> Option<(World, String)> {
    let (world, overlay) = interrupted_create(true)?;
    world.write(&overlay, "-P 6 0 4M");
    let file = fs::File::options().read(true).write(true).open(world.path(&overlay)).unwrap();
    damage(&file);
    file.sync_all().unwrap();
    Some((world, overlay))
}

/// Makes the first L1 entry point out of the file.
fn break_l1(file: &fs::File) {
    let mut offset = [0; 8];
    file.read_exact_at(&mut offset, 40).unwrap();
    file.write_all_at(&0x8000_00ff_ffff_0000_u64.to_be_bytes(), u64::from_be_bytes(offset)).unwrap();
}

fn break_header(file: &fs::File) {
    file.write_all_at(&[0; 512], 0).unwrap();
}

#[track_caller]
fn recovery_is_uncertain(world: &World, overlay: &str) {
    for args in [&["recover", "web.json"][..], &["recover", "web.json"]] {
        let said = world.unchanged(args);
        assert!(said.to_lowercase().contains("uncertain"), "{said}");
        assert!(said.contains(overlay), "the message does not name the overlay: {said}");
        assert!(!said.contains("VM can be started"), "{said}");
        assert!(said.contains("--vm-runs-on"), "the message names no way out: {said}");
    }
    assert!(world.exists(overlay), "the overlay was removed");
}

#[test]
fn recovery_with_damaged_overlay_is_uncertain() {
    let Some((world, overlay)) = damaged(break_l1) else { return };
    recovery_is_uncertain(&world, &overlay);
}

#[test]
fn recovery_with_overlay_without_header_is_uncertain() {
    let Some((world, overlay)) = damaged(break_header) else { return };
    recovery_is_uncertain(&world, &overlay);
}

#[test]
fn recovery_with_damaged_overlay_obeys_the_statement() {
    for verb in ["recover", "reconcile"] {
        let Some((world, _)) = damaged(break_l1) else { return };
        let run = world.vm(&[verb, "web.json", "--vm-runs-on", "vda.qcow2"]);
        // The overlay stays, and `reconcile` reports it as a difference that is left.
        assert_eq!(run.code, if verb == "recover" { 0 } else { 2 }, "{}{}", run.stdout, run.stderr);
        assert_eq!(world.active("vda"), "vda.qcow2");
        assert_eq!(world.state("s1"), None);
        world.assert_reads("vda.qcow2", OLD);
        assert!(!world.exists("web.json.journal"));
    }
}

#[test]
fn recovery_with_overlay_stated_completes() {
    for verb in ["recover", "reconcile"] {
        let Some((world, overlay)) = damaged(|_| ()) else { return };
        world.ok(&[verb, "web.json", "--vm-runs-on", &overlay]);
        assert_eq!(world.active("vda"), overlay);
        assert_eq!(world.state("s1").as_deref(), Some("ready"));
        world.assert_reads(&overlay, "-P 6 0 4M");
        world.assert_sound();
    }
}

#[test]
fn reconcile_dry_run_changes_nothing() {
    let Some((world, overlay)) = damaged(|_| ()) else { return };
    let before = world.tree();
    world.ok(&["reconcile", "web.json", "--vm-runs-on", &overlay, "--dry-run"]);
    super::world::assert_same(&before, &world.tree(), "a dry run");
}

#[test]
fn recovery_with_unknown_file_stated_is_refused() {
    let Some((world, _)) = damaged(|_| ()) else { return };
    world.image("other.qcow2", "8M");
    let said = world.unchanged(&["recover", "web.json", "--vm-runs-on", "other.qcow2"]);
    assert!(said.contains("other.qcow2"), "{said}");
}
