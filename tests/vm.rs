//! A VM's snapshots on real images: contents, headers, records and directory after every step.

use std::path::Path;
use std::sync::Arc;

use qcow2_chain::chain::Format;
use qcow2_chain::merge::Direction;
use qcow2_chain::storage::{FileSystem, HostFileSystem, MemoryFileSystem};
use qcow2_chain::vm::{MergeOptions, State};

use crate::support::lab::{Lab, LabShape, deps};
use crate::support::rng::{Rng, cases, count, seed};

fn in_memory(shape: LabShape, rng: &mut Rng) -> Lab {
    Lab::new(Arc::new(MemoryFileSystem::new()), Path::new("/vm"), shape, rng)
}

fn random_shape(rng: &mut Rng) -> LabShape {
    let extended_l2 = rng.chance(1, 4);
    let cluster_bits = if extended_l2 { 14 } else { rng.pick(&[9, 10, 12]) };
    let (volumes, size) = (usize::try_from(rng.within(1..4)).unwrap(), rng.within(20..60) * 512);
    LabShape { volumes, size, cluster_bits, extended_l2, raw: rng.chance(1, 3) }
}

#[test]
fn random_operations_keep_every_snapshot() {
    cases("a VM's life", count("QCOW2_CHAIN_VM_CASES", 60), |rng| {
        let mut lab = in_memory(random_shape(rng), rng);
        let mut said = Vec::new();
        for number in 0..20 {
            lab.write_all(rng);
            said.push(lab.random_step(rng, number));
            lab.check().unwrap_or_else(|wrong| panic!("{said:?}: {wrong}"));
        }
    });
}

#[test]
fn advanced_deletion_on_host_files_ends_on_first_files() {
    let directory = tempfile::tempdir().unwrap();
    let mut rng = Rng::new(seed());
    let names: Arc<dyn FileSystem> = Arc::new(HostFileSystem);
    let mut lab = Lab::new(names, directory.path(), LabShape { raw: true, ..LabShape::default() }, &mut rng);
    let mut step = |lab: &mut Lab, what: &str, name: &str| {
        lab.write_all(&mut rng);
        match what {
            "create" => lab.create(name),
            "revert" => lab.revert(name),
            _ => lab.delete(name),
        }
        lab.check().unwrap_or_else(|wrong| panic!("{what} {name}: {wrong}"));
    };
    for name in ["s1", "s2", "s3"] {
        step(&mut lab, "create", name);
    }
    step(&mut lab, "revert", "s2");
    step(&mut lab, "create", "s4");
    step(&mut lab, "delete", "s2");
    assert_eq!(deps(&lab.model(), "s2"), ["s3", "s4"]);
    step(&mut lab, "delete", "s3");
    assert_eq!(lab.model().snapshots.len(), 2, "s2 and s4 have become one");
    step(&mut lab, "create", "s5");
    step(&mut lab, "revert", "s4");
    step(&mut lab, "delete", "s4");
    assert_eq!(deps(&lab.model(), "s4"), ["s5", "VOL"]);
    assert_eq!(lab.model().snapshots.values().filter(|s| s.state == State::Hidden).count(), 1);
    step(&mut lab, "delete", "s5");
    step(&mut lab, "delete", "s1");
    let model = lab.model();
    assert!(model.snapshots.is_empty());
    assert_eq!(model.volumes[0].active.file.path, "vda.img", "the volume has its first path again");
    assert_eq!(model.volumes[0].active.file.format, Format::Raw, "what was raw is raw");
    let left: Vec<_> = std::fs::read_dir(directory.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 4, "two volumes, catalogue, lock: {left:?}");
}

/// The survivor of a merge keeps its own path: with commits a volume ends on its first file, with pulls on its last.
#[test]
fn delete_in_both_directions_keeps_survivor_path() {
    for direction in [Direction::Commit, Direction::Pull] {
        let mut rng = Rng::new(seed());
        let mut lab = in_memory(LabShape::default(), &mut rng);
        for name in ["s1", "s2", "s3"] {
            lab.write_all(&mut rng);
            lab.create(name);
        }
        lab.write_all(&mut rng);
        lab.revert("s2");
        let last = lab.model().volumes[1].active.file.path.clone();
        for name in ["s2", "s3", "s1"] {
            lab.write_all(&mut rng);
            let options = MergeOptions::default().with_direction(direction);
            lab.set.delete(name, &options, &()).unwrap();
            lab.taken.remove(name);
            lab.check().unwrap_or_else(|wrong| panic!("{direction}, {name}: {wrong}"));
        }
        let expected = if direction == Direction::Commit { "vdb.img".to_owned() } else { last };
        assert_eq!(lab.model().volumes[1].active.file.path, expected, "{direction}");
    }
}
