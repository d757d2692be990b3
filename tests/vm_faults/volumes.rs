//! Volumes that are attached and detached while there are snapshots, and volumes whose files are
//! lost.

use std::fs;

use super::world::{NEW, OLD, World};

/// A set with `s1` of `vda`, then the volume `vdb`, then `s2` of both.
fn attached() -> Option<World> {
    let world = World::with_snapshot()?;
    world.image("vdb.qcow2", "8M");
    world.write("vdb.qcow2", "-P 4 0 64k");
    world.ok(&["attach", "web.json", "--volume", "vdb=vdb.qcow2"]);
    world.ok(&["snapshot", "web.json", "s2"]);
    world.write(&world.active("vdb"), "-P 5 0 64k");
    Some(world)
}

fn volumes(world: &World) -> Vec<String> {
    let list = world.list();
    list["volumes"].as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn attached_volume_takes_part_in_snapshots() {
    let Some(world) = attached() else { return };
    assert_eq!(volumes(&world), ["vda", "vdb"]);
    let list = world.list();
    assert!(list["snapshots"][0]["files"]["vdb"].is_null(), "{list}");
    assert_eq!(list["snapshots"][1]["files"]["vdb"], "vdb.qcow2");
    world.assert_sound();
    world.ok(&["revert", "web.json", "s2"]);
    world.assert_reads(world.active("vdb"), "-P 4 0 64k");
    world.assert_sound();
}

#[test]
fn delete_with_attached_volume_merges_it() {
    for order in [["s1", "s2"], ["s2", "s1"]] {
        let Some(world) = attached() else { return };
        for name in order {
            world.ok(&["delete", "web.json", name]);
            world.assert_sound();
        }
        world.assert_reads(world.active("vda"), NEW);
        world.assert_reads(world.active("vdb"), "-P 5 0 64k");
        assert_eq!([world.active("vda"), world.active("vdb")], ["vda.qcow2", "vdb.qcow2"]);
    }
}

#[test]
fn revert_to_snapshot_without_volume_needs_confirmation() {
    let Some(world) = attached() else { return };
    let said = world.obstacle(&["revert", "web.json", "s1"]);
    assert!(said.contains("vdb") && said.contains("--detach-missing"), "{said}");
    let active = world.active("vdb");
    world.ok(&["revert", "web.json", "s1", "--detach-missing"]);
    assert_eq!(volumes(&world), ["vda"]);
    world.assert_reads(world.active("vda"), OLD);
    world.assert_reads(world.active("vda"), "-P 0 8M 16M");
    // The frozen file is still that of s2.
    world.assert_reads("vdb.qcow2", "-P 4 0 64k");
    let kept = world.exists(&active);
    if kept {
        world.assert_reads(&active, "-P 5 0 64k");
    }
    world.ok(&["revert", "web.json", "s2"]);
    assert_eq!(volumes(&world), ["vda", "vdb"]);
    world.assert_reads(world.active("vdb"), "-P 4 0 64k");
}

#[test]
fn attach_of_known_volume_or_file_is_refused() {
    let Some(world) = attached() else { return };
    world.image("vdc.qcow2", "8M");
    let active = world.active("vda");
    for volume in ["vda=vdc.qcow2".to_owned(), format!("vdc={active}"), "vdc=vda.qcow2".to_owned()] {
        world.unchanged(&["attach", "web.json", "--volume", &volume]);
    }
}

#[test]
fn detach_keeps_the_files() {
    let Some(world) = attached() else { return };
    let active = world.active("vdb");
    world.ok(&["detach", "web.json", "vdb"]);
    assert_eq!(volumes(&world), ["vda"]);
    world.assert_reads(&active, "-P 5 0 64k");
    world.ok(&["snapshot", "web.json", "s3"]);
    world.unchanged(&["detach", "web.json", "vdb"]);
}

#[test]
fn lost_active_file_is_discarded_on_request() {
    let Some(world) = World::with_snapshot() else { return };
    let active = world.active("vda");
    fs::rename(world.path(&active), world.path("lost")).unwrap();
    let said = world.obstacle(&["revert", "web.json", "s1"]);
    assert!(said.contains(&active) && said.contains("--discard-lost"), "{said}");
    world.ok(&["revert", "web.json", "s1", "--discard-lost"]);
    world.assert_reads(world.active("vda"), OLD);
    world.assert_sound();
}

#[test]
fn damaged_active_file_is_discarded_on_request() {
    let Some(world) = World::with_snapshot() else { return };
    let active = world.active("vda");
    fs::write(world.path(&active), b"no image").unwrap();
    let said = world.obstacle(&["revert", "web.json", "s1"]);
    assert!(said.contains(&active) && said.contains("--discard-lost"), "{said}");
    world.ok(&["revert", "web.json", "s1", "--discard-lost"]);
    world.assert_reads(world.active("vda"), OLD);
    world.ok(&["verify", "web.json"]);
}

#[test]
fn discard_lost_keeps_frozen_files_required() {
    let Some(world) = World::with_snapshot() else { return };
    fs::rename(world.path("vda.qcow2"), world.path("lost")).unwrap();
    let said = world.unchanged(&["revert", "web.json", "s1", "--discard-lost"]);
    assert!(said.contains("vda.qcow2"), "{said}");
}

#[test]
fn volume_with_lost_file_can_be_detached() {
    let Some(world) = attached() else { return };
    let lost = world.active("vdb");
    fs::rename(world.path(&lost), world.path("lost")).unwrap();
    world.ok(&["detach", "web.json", "vdb"]);
    world.ok(&["snapshot", "web.json", "s3"]);
    world.ok(&["delete", "web.json", "s3"]);
    world.assert_reads(world.active("vda"), NEW);
}
