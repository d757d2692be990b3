//! The time of a live deletion compared with virsh, for the same delta of the same guest: `cargo
//! test --all-features --test live -- --ignored --nocapture overhead`, `QCOW2_CHAIN_LIVE_ROUNDS`
//! times each.

use std::fs;
use std::time::{Duration, Instant};

use crate::baseline;
use crate::hypervisor::Hypervisor;
use crate::scene::Scene;
use crate::snapshots::listening;

const DELTA_MIB: u64 = 256;
const DEFAULT_ROUNDS: usize = 3;

#[test]
#[ignore = "prints times and asserts none"]
fn live_deletion_compared_with_blockcommit() {
    let Some(hypervisor) = Hypervisor::get() else { return };
    let rounds = std::env::var("QCOW2_CHAIN_LIVE_ROUNDS").map_or(DEFAULT_ROUNDS, |text| text.parse().unwrap());
    let mut scene = Scene::start(&hypervisor, "live-overhead", &["vda"], listening);
    scene.guest.stop_writer();
    // The first fill is the slowest.
    scene.guest.tell(&format!("fill vda {DELTA_MIB}"));
    let (mut ours, mut virsh) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let name = format!("s{round}");
        scene.set.create(&name, &Default::default()).unwrap();
        scene.guest.tell(&format!("fill vda {DELTA_MIB}"));
        let start = Instant::now();
        scene.set.delete(&name, &Default::default(), &()).unwrap();
        ours.push(start.elapsed());

        baseline::create(&hypervisor, &scene.guest, &scene.lab, &name, false);
        scene.guest.tell(&format!("fill vda {DELTA_MIB}"));
        virsh.push(baseline::commit(&hypervisor, &scene.guest, "vda"));
        fs::remove_file(scene.lab.path().join(format!("vda-{name}"))).unwrap();
    }
    println!("live deletion of {DELTA_MIB} MiB: ours {ours:.2?}, virsh blockcommit --active --pivot {virsh:.2?}");
    let (ours, virsh) = (median(ours), median(virsh));
    println!(
        "medians: ours {ours:.2?}, virsh {virsh:.2?}: {:+.1} %",
        100.0 * (ours.as_secs_f64() / virsh.as_secs_f64() - 1.0)
    );
    scene.guest.start_writer();
    scene.guest.wait_for_records(3);
    assert_eq!(scene.set.list(true).unwrap().snapshots.len(), 0);
    scene.end();
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}
