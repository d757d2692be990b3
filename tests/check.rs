//! Checking and repairing, judged by `qemu-img check`: the same verdict, the same counts, and clean after a repair.

use std::path::Path;
use std::sync::Arc;

use qcow2_chain::format::{ClusterBits, GuestOffset};
use qcow2_chain::image::{self, CheckOptions, CheckReport, CreateOptions, Fix, Image, OpenOptions};
use qcow2_chain::storage::MemoryStorage;

use crate::support::qemu::{Check, Qemu};
use crate::support::recipe::{RandomImage, Shape};
use crate::support::rng::{Rng, cases};
use crate::support::victim::{DAMAGES, Damage, Victim, at};

fn ours(bytes: &[u8], fix: Fix) -> (image::Result<CheckReport>, Vec<u8>) {
    let storage = MemoryStorage::with_bytes("image", bytes);
    let report = image::check(&storage, &CheckOptions::default().with_fix(fix));
    (report, storage.to_vec())
}

/// The report as `qemu-img check` would put it.
fn verdict(report: &CheckReport) -> Check {
    Check {
        code: match report {
            report if report.check_errors > 0 => 1,
            report if report.corruptions > 0 => 2,
            report if report.leaks > 0 => 3,
            _ => 0,
        },
        corruptions: report.corruptions,
        leaks: report.leaks,
        check_errors: report.check_errors,
        corruptions_fixed: report.corruptions_fixed,
        leaks_fixed: report.leaks_fixed,
        allocated_clusters: report.allocated_clusters,
        total_clusters: report.total_clusters,
        fragmented_clusters: report.fragmented_clusters,
        compressed_clusters: report.compressed_clusters,
        image_end_offset: report.image_end_offset,
    }
}

/// Whether `qemu-img` gave no numbers at all.
fn gave_up(check: &Check) -> bool {
    check.code == 1 && *check == Check { code: 1, ..Check::default() }
}

fn assert_same_verdict(qemu: Qemu, path: &Path, what: &str) -> Check {
    let theirs = qemu.check(path, None);
    let (report, _) = ours(&std::fs::read(path).unwrap(), Fix::Nothing);
    match report {
        Ok(report) if gave_up(&theirs) => assert!(!report.is_clean(), "{what}: qemu-img gave up, we found nothing"),
        Ok(report) => assert_eq!(verdict(&report), theirs, "{what}: ours, theirs; {:#?}", report.findings),
        Err(error) => assert!(gave_up(&theirs), "{what}: {error:?}, theirs {theirs:?}"),
    }
    theirs
}

fn random_image(qemu: Qemu, dir: &Path, rng: &mut Rng) -> RandomImage {
    let mut image = RandomImage::create(qemu, dir.join("image.qcow2"), Shape::random(rng));
    let count = rng.within(1..9);
    for _ in 0..count {
        let op = image.random_op(rng);
        image.apply(qemu, vec![op]);
    }
    image
}

#[test]
fn sound_images_are_found_sound() {
    let Some(qemu) = Qemu::find() else { return };
    cases("sound images", 30, |rng| {
        let dir = tempfile::tempdir().unwrap();
        let image = random_image(qemu, dir.path(), rng);
        let what = format!("{:?} {:?}", image.shape, image.ops);
        let theirs = assert_same_verdict(qemu, &image.path, &what);
        assert_eq!(theirs.code, 0, "{what}");
        let bytes = std::fs::read(&image.path).unwrap();
        for fix in [Fix::Leaks, Fix::All] {
            assert_eq!(ours(&bytes, fix).1, bytes, "{fix:?} changes a sound image: {what}");
        }
    });
}

#[test]
fn damage_is_found_and_repaired_as_qemu_does() {
    let Some(qemu) = Qemu::find() else { return };
    cases("damaged images", 28, |rng| {
        let dir = tempfile::tempdir().unwrap();
        let image = random_image(qemu, dir.path(), rng);
        let mut victim = Victim { bytes: std::fs::read(&image.path).unwrap() };
        let damages: Vec<Damage> = (0..rng.within(1..3)).map(|_| rng.pick(&DAMAGES)).collect();
        for damage in &damages {
            victim.damage(*damage, rng);
        }
        let what = format!("{damages:?} on {:?} {:?}", image.shape, image.ops);
        std::fs::write(&image.path, &victim.bytes).unwrap();
        let found = assert_same_verdict(qemu, &image.path, &what);
        for (fix, name) in [(Fix::Leaks, "leaks"), (Fix::All, "all")] {
            // Where refcounts are too low, QEMU's `-r leaks` goes on to store bitmaps in clusters that are in use.
            if fix == Fix::Leaks && found.corruptions > 0 && !image.bitmaps.is_empty() {
                continue;
            }
            assert_same_repair(qemu, &victim.bytes, dir.path(), fix, name, &what);
        }
    });
}

fn assert_same_repair(qemu: Qemu, bytes: &[u8], dir: &Path, fix: Fix, name: &str, what: &str) {
    let (theirs, mine) = (dir.join("theirs.qcow2"), dir.join("mine.qcow2"));
    std::fs::write(&theirs, bytes).unwrap();
    let reported = qemu.check(&theirs, Some(name));
    let theirs_after = qemu.check(&theirs, None);
    let (report, repaired) = ours(bytes, fix);
    std::fs::write(&mine, repaired).unwrap();
    let mine_after = assert_same_verdict(qemu, &mine, &format!("after our {name} of {what}"));
    let Ok(report) = report else {
        assert!(gave_up(&reported), "-r {name} of {what}: {report:?}, theirs {reported:?}");
        return;
    };
    if theirs_after.code == 0 {
        assert_eq!(mine_after.code, 0, "-r {name} is clean after QEMU, not after us: {what}: {:#?}", report.findings);
    }
    // QEMU sets flags in tables that start inside a cluster, that is in what may be guest data.
    assert!(
        what.contains("L1Unaligned") || rank(&mine_after) <= rank(&theirs_after),
        "-r {name} left more than QEMU: {mine_after:?}, {theirs_after:?}: {what}: {:#?}",
        report.findings
    );
    let left = Check { corruptions_fixed: 0, leaks_fixed: 0, ..verdict(&report) };
    if report.check_errors > 0 {
        assert_ne!(mine_after.code, 0, "-r {name} of {what} stopped on a sound image: {:#?}", report.findings);
    } else if !gave_up(&mine_after) {
        assert_eq!(left, mine_after, "what we say is left after -r {name} of {what}");
    }
}

fn rank(check: &Check) -> u64 {
    if gave_up(check) { u64::MAX } else { check.corruptions + check.leaks + check.check_errors }
}

/// Somewhere in the metadata, with a liking for what matters: header, tables and their entries.
fn metadata_place(victim: &Victim, header: bool, rng: &mut Rng) -> u64 {
    let (l1, reftable, snapshots) = (victim.u64(40), victim.u64(48), victim.u64(64));
    let table = victim.u64(l1) & 0x00ff_ffff_ffff_fe00;
    // What an earlier mutation made of these may be anything.
    let place = match rng.within(u64::from(!header)..8) {
        0 => rng.within(8..200) & !3,
        1 => l1.saturating_add(rng.within(0..victim.u32(36).max(1)) * 8),
        2 | 3 => table + rng.within(0..victim.cluster_size() / 8) * 8,
        4 => reftable.saturating_add(rng.within(0..4) * 8),
        5 => victim.u64(reftable).saturating_add(rng.within(0..64)),
        6 if snapshots != 0 => snapshots.saturating_add(rng.within(0..80)),
        _ => rng.within(200..victim.len()),
    };
    if place < victim.len() { place } else { rng.within(200..victim.len()) }
}

fn mutate(victim: &mut Victim, header: bool, rng: &mut Rng) {
    let place = metadata_place(victim, header, rng);
    let (size, old) = (victim.cluster_size(), victim.u64(place));
    let clusters = victim.len() / size;
    match rng.within(0..7) {
        0 => victim.set_u64(place, old ^ 1 << rng.within(0..64)),
        1 => victim.set_u64(place, 0),
        2 => victim.set_u64(place, u64::MAX),
        3 => victim.set_u64(place, rng.next_u64()),
        4 => victim.set_u64(place, (1 << 63) | (rng.within(0..clusters + 2) * size)),
        5 => victim.set_u64(place, rng.within(0..clusters + 2) * size + 512 * rng.within(0..2)),
        _ => {
            if let Some(byte) = victim.bytes.get_mut(at(place)) {
                *byte = u8::try_from(rng.within(0..256)).unwrap();
            }
        }
    }
}

fn small_image(qemu: Qemu, dir: &Path, rng: &mut Rng) -> RandomImage {
    let bits = rng.pick(&[9, 9, 10, 12, 14, 16]);
    let mut shape = Shape::random(rng);
    shape.extended_l2 &= bits >= 14;
    (shape.cluster_size, shape.size, shape.preallocation) = (1 << bits, (1 << bits) * 70, "off");
    let mut image = RandomImage::create(qemu, dir.join("image.qcow2"), shape);
    for _ in 0..6 {
        let op = image.random_op(rng);
        image.apply(qemu, vec![op]);
    }
    image
}

#[test]
fn no_mutation_is_too_much() {
    let Some(qemu) = Qemu::find() else { return };
    cases("mutated images", 8, |rng| {
        let dir = tempfile::tempdir().unwrap();
        let image = small_image(qemu, dir.path(), rng);
        let sound = std::fs::read(&image.path).unwrap();
        for round in 0..150 {
            let mut victim = Victim { bytes: sound.clone() };
            let header = round % 3 == 0;
            for _ in 0..rng.within(1..5) {
                mutate(&mut victim, header, rng);
            }
            let started = std::time::Instant::now();
            let found = ours(&victim.bytes, Fix::Nothing);
            assert_eq!(found.1, victim.bytes, "a check that repairs nothing writes nothing");
            let (Ok(report), repaired) = ours(&victim.bytes, Fix::All) else { continue };
            let (after, _) = ours(&repaired, Fix::Nothing);
            let after = after.expect("what was repaired is an image");
            let left = |report: &CheckReport| (report.corruptions, report.leaks, report.check_errors);
            if report.check_errors == 0 {
                assert_eq!(left(&report), left(&after), "what is left is said: {:#?}", report.findings);
            }
            assert!(started.elapsed().as_secs() < 20, "a check of {} bytes takes this long", victim.len());
            if !header && round % 30 == 1 {
                std::fs::write(&image.path, &victim.bytes).unwrap();
                if !gave_up(&qemu.check(&image.path, None)) {
                    assert_same_verdict(qemu, &image.path, &format!("mutation {round} of {:?}", image.shape));
                }
            }
        }
    });
}

#[test]
fn a_header_that_claims_the_world_costs_nothing() {
    // A version 3 header alone: 2^56 bytes of disk, 32 MiB of L1, 8 MiB of refcount table, 65,536 snapshots.
    let mut bytes = vec![0; 1024];
    bytes[..4].copy_from_slice(b"QFI\xfb");
    let fields: [(usize, u64, usize); 12] = [
        (4, 3, 4),
        (20, 21, 4),
        (24, 1 << 56, 8),
        (36, 4 << 20, 4),
        (40, 1 << 40, 8),
        (48, 1 << 41, 8),
        (56, 4, 4),
        (60, 65_536, 4),
        (64, 1 << 42, 8),
        (96, 4, 4),
        (100, 104, 4),
        (104, 0, 8),
    ];
    for (place, value, len) in fields {
        bytes[place..place + len].copy_from_slice(&value.to_be_bytes()[8 - len..]);
    }
    let started = std::time::Instant::now();
    if let (Ok(report), _) = ours(&bytes, Fix::Nothing) {
        assert!(report.corruptions > 0, "nothing of it is there: {report:?}");
    }
    assert!(started.elapsed().as_secs() < 5);
}

#[test]
fn an_incomplete_snapshot_table_is_completed() {
    let Some(qemu) = Qemu::find() else { return };
    for refcount_bits in [8, 16, 64] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image.qcow2");
        let name = path.to_str().unwrap();
        let options = format!("cluster_size=4096,refcount_bits={refcount_bits}");
        qemu.img(&["create", "-q", "-f", "qcow2", "-o", &options, name, "1M"]);
        qemu.io(&path, &["write -P 1 0 300k"]);
        qemu.img(&["snapshot", "-c", "before", name]);
        qemu.io(&path, &["write -P 2 100k 300k"]);
        let (now, before) = (qemu.content(&path, None), qemu.content(&path, Some("before")));

        // Sixteen of the 24 bytes of extra data go; ID and name move up.
        let mut victim = Victim { bytes: std::fs::read(&path).unwrap() };
        let record = at(victim.u64(64));
        assert_eq!(victim.bytes[record + 36..record + 40], [0, 0, 0, 24]);
        victim.bytes[record + 39] = 8;
        victim.bytes.copy_within(record + 64..record + 80, record + 48);
        victim.bytes[79] |= 3;
        std::fs::write(&path, &victim.bytes).unwrap();
        let found = assert_same_verdict(qemu, &path, "an incomplete snapshot table");
        assert_eq!((found.code, found.corruptions), (2, 1));

        let (report, repaired) = ours(&victim.bytes, Fix::All);
        let report = report.unwrap();
        assert!(report.is_clean() && report.corruptions_fixed == 1, "{report:#?}");
        assert_eq!(repaired[79] & 3, 0, "dirty and corrupt, although nothing is left");
        std::fs::write(&path, &repaired).unwrap();
        qemu.assert_clean(&path);
        assert!(qemu.content(&path, None) == now && qemu.content(&path, Some("before")) == before);
    }
}

#[test]
fn what_was_found_is_told_as_qemu_tells_it() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    let name = path.to_str().unwrap();
    qemu.img(&["create", "-q", "-f", "qcow2", name, "1M"]);
    qemu.io(&path, &["write -P 1 0 300k"]);
    let content = qemu.content(&path, None);
    let mut victim = Victim { bytes: std::fs::read(&path).unwrap() };
    let mut rng = Rng::new(1);
    victim.damage(Damage::Leak, &mut rng);
    victim.set_refcount(6, false);
    std::fs::write(&path, &victim.bytes).unwrap();
    let theirs = qemu.try_img(&["check", name]).stderr;
    let theirs: Vec<&str> = theirs.lines().filter(|line| line.contains(" reference=")).collect();

    let lines = |report: &CheckReport| report.findings.iter().map(ToString::to_string).collect::<Vec<_>>();
    let found = ours(&victim.bytes, Fix::Nothing).0.unwrap();
    let refcounts: Vec<String> = lines(&found).into_iter().filter(|line| line.contains(" reference=")).collect();
    assert_eq!(refcounts, theirs);
    assert!(matches!(refcounts.as_slice(), [_, _]), "one too low, one leak: {refcounts:?}");

    let (report, repaired) = ours(&victim.bytes, Fix::All);
    assert!(lines(&report.unwrap()).iter().all(|line| line.starts_with("Repairing ")));
    std::fs::write(&path, repaired).unwrap();
    qemu.assert_clean(&path);
    assert!(qemu.content(&path, None) == content, "a repair does not touch what the guest reads");
}

/// A new image of two clusters of data, which ends with the second, as bytes.
fn full_image() -> Victim {
    let storage = Arc::new(MemoryStorage::new("image"));
    let options = CreateOptions::new(64 << 10).with_cluster_bits(ClusterBits::new(12).unwrap());
    Image::create(storage.clone(), &options).unwrap();
    let image = Image::open(storage.clone(), &OpenOptions::default().with_write(true)).unwrap();
    image.write_at(&[1; 8192], GuestOffset::new(0)).unwrap();
    image.close().unwrap();
    Victim { bytes: storage.to_vec() }
}

/// What the guest reads of its first two clusters.
fn two_clusters(bytes: &[u8]) -> Vec<u8> {
    let storage = Arc::new(MemoryStorage::with_bytes("image", bytes));
    let image = Image::open(storage, &OpenOptions::default()).unwrap();
    let mut read = vec![0; 8192];
    image.read_at(&mut read, GuestOffset::new(0)).unwrap();
    read
}

#[test]
fn a_rebuild_keeps_clear_of_what_entries_behind_the_end_call_data() {
    for behind in 0..6 {
        let mut victim = full_image();
        let (size, end) = (victim.cluster_size(), victim.len());
        let entries = victim.l2_entries();
        let kept = (victim.u64(entries[1]) & 0x00ff_ffff_ffff_fe00) / size;
        // The first guest cluster lies behind the end, and the refcount of the second is gone: all is built anew. One cluster
        // is free within the file, and refcount table and block need two.
        victim.set_u64(entries[0], 1 << 63 | (end + behind * size));
        victim.set_refcount(kept, false);
        let content = two_clusters(&victim.bytes);
        assert!(content == [[0; 4096], [1; 4096]].concat(), "behind the end there are zeroes");

        let (report, repaired) = ours(&victim.bytes, Fix::All);
        let report = report.unwrap();
        assert!(report.corruptions_fixed > 0, "{report:#?}");
        assert!(two_clusters(&repaired) == content, "{behind} clusters behind the end: the guest reads metadata");
        let found = ours(&repaired, Fix::Nothing).0.unwrap();
        assert_eq!(verdict(&found), Check { corruptions_fixed: 0, leaks_fixed: 0, ..verdict(&report) });
        assert!(found.corruptions <= 1, "at most the entry that still points behind the end: {found:#?}");
        assert!(ours(&repaired, Fix::All).1 == repaired, "{behind} clusters behind the end: a second repair writes");
    }
}

#[test]
fn refcounts_behind_the_end_are_cleared_and_told() {
    for fix in [Fix::Leaks, Fix::All] {
        let mut victim = full_image();
        let (size, clusters) = (victim.cluster_size(), victim.len() / victim.cluster_size());
        victim.set_refcount(clusters, true);
        victim.set_refcount(clusters + 40, true);
        let found = ours(&victim.bytes, Fix::Nothing).0.unwrap();
        assert!(found.is_clean() && found.findings.is_empty(), "as QEMU sees it: {found:#?}");

        let (report, repaired) = ours(&victim.bytes, fix);
        let report = report.unwrap();
        assert!(report.is_clean() && report.leaks_fixed == 2, "{report:#?}");
        let told: Vec<(u64, bool)> = report.findings.iter().map(|found| (found.offset, found.repaired)).collect();
        assert_eq!(told, [(clusters * size, true), ((clusters + 40) * size, true)]);
        let (again, bytes) = ours(&repaired, fix);
        assert!(again.unwrap().leaks_fixed == 0 && bytes == repaired, "a second repair does nothing");
        let mut grown = repaired;
        grown.resize(at(victim.len() + 64 * size), 0);
        assert!(ours(&grown, Fix::Nothing).0.unwrap().is_clean(), "no leaks as the file grows");
    }
}
