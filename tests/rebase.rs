//! Rebase, against `qemu-img rebase` on copies of the same chains, and at every instant of a crash.

use std::sync::Arc;

use qcow2_chain::format::{ClusterBits, Extension, HeaderCluster, Limits, Version};
use qcow2_chain::image::{CreateOptions, Image, OpenOptions};
use qcow2_chain::storage::crash::{CrashState, Recorder};
use qcow2_chain::storage::{MemoryStorage, Storage};

use crate::support::rng::{Rng, cases};

/// A backing file's name and format.
type Backing = Option<(Vec<u8>, Option<Vec<u8>>)>;

fn random_backing(rng: &mut Rng) -> Backing {
    if rng.chance(1, 6) {
        return None;
    }
    let longest = rng.pick(&[8, 60, 400, 1023]);
    let len = usize::try_from(rng.within(1..longest + 1)).unwrap();
    let letter = rng.pattern();
    Some((
        vec![letter; len],
        rng.pick(&[None, Some(b"raw".to_vec()), Some(b"qcow2".to_vec()), Some(b"long-format".to_vec())]),
    ))
}

/// An image with a random header: version, cluster size, backing file, further extensions.
fn random_header(rng: &mut Rng) -> Option<(Vec<u8>, Backing)> {
    let version = rng.pick(&[Version::V2, Version::V3, Version::V3]);
    let bits = rng.pick(&[9, 10, 11, 12, 13, 16]);
    let storage = Arc::new(MemoryStorage::new("new"));
    let options = CreateOptions::new(1 << 20).with_version(version).with_cluster_bits(ClusterBits::new(bits).unwrap());
    Image::create(storage.clone(), &options).unwrap().close().unwrap();
    let mut bytes = storage.to_vec();
    let mut header = HeaderCluster::decode(&bytes, bytes.len() as u64, &Limits::default()).unwrap();
    for number in 0..rng.within(0..4) {
        let len = usize::try_from(rng.within(0..200)).unwrap();
        let data = rng.bytes(len);
        header.set_extension(Extension::Unknown { kind: 0x7000_0000 + u32::try_from(number).unwrap(), data });
    }
    let backing = random_backing(rng);
    if let Some((name, format)) = &backing {
        header.set_backing(Some(name), format.as_deref());
    }
    let encoded = header.encode_over(&bytes[..1 << bits]).ok()?;
    bytes[..encoded.len()].copy_from_slice(&encoded);
    Some((bytes, backing))
}

fn backing_of(header: &HeaderCluster) -> Backing {
    header.backing_file.clone().map(|name| (name, header.backing_format().map(<[u8]>::to_vec)))
}

/// Whether one sector is all that differs.
fn is_one_sector(a: &[u8], b: &[u8]) -> bool {
    a.chunks(512).zip(b.chunks(512)).filter(|(a, b)| a != b).count() <= 1
}

#[test]
fn every_crash_of_a_header_change_leaves_the_old_backing_file_or_the_new() {
    let [changed, refused, torn] = [const { std::sync::atomic::AtomicUsize::new(0) }; 3];
    let count = |counter: &std::sync::atomic::AtomicUsize| counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    cases("header changes", 1500, |rng| {
        let Some((start, old)) = random_header(rng) else { return };
        let new = random_backing(rng);
        let recorder = Recorder::new();
        let storage = Arc::new(recorder.storage("image", start.clone()));
        let image = Image::open(storage.clone(), &OpenOptions::default().with_write(true)).unwrap();
        let before = image.header();
        let name = new.as_ref().map(|(name, _)| name.as_slice());
        let format = new.as_ref().and_then(|(_, format)| format.as_deref());
        if let Err(error) = image.set_backing_file(name, format) {
            // There was no room; nothing was written.
            assert_eq!(recorder.crash_states(1, 1, |_| Ok::<(), ()>(())).unwrap(), 1, "{error}");
            if error.to_string().contains("safely") {
                assert!(before.header.cluster_size() <= 4096, "{error}");
                count(&refused);
            }
            return;
        }
        let mut last = None;
        recorder
            .crash_states(rng.next_u64(), 24, |state: &CrashState| {
                let bytes = &state[0];
                let header = HeaderCluster::decode(bytes, bytes.len() as u64, &Limits::default()).expect("decodes");
                let now = backing_of(&header);
                assert!(now == old || now == new, "neither the old backing file nor the new");
                let others = |header: &HeaderCluster| {
                    let mut header = header.clone();
                    header.set_backing(None, None);
                    header.remove_extension(0x5143_4750);
                    (header.header.backing_file_offset, header.header.backing_file_size) = (0, 0);
                    (header.header, header.extensions)
                };
                assert_eq!(others(&header), others(&before), "everything else stays");
                last = Some(header);
                Ok::<(), ()>(())
            })
            .unwrap();
        let last = last.unwrap();
        assert_eq!(backing_of(&last), new);
        assert!(last.extension(0x5143_4750).is_none(), "no gap is left");
        assert_eq!(backing_of(&image.header()), new);
        let mut bytes = vec![0; start.len()];
        storage.read_at(&mut bytes, 0).unwrap();
        count(&changed);
        if !is_one_sector(&start, &bytes) {
            count(&torn);
        }
        // The header in memory is the one of the file: what is written next goes over the right bytes.
        let gone = image.set_backing_file(None, None);
        assert_eq!(backing_of(&image.header()), if gone.is_ok() { None } else { new });
    });
    let [changed, refused, torn] = [changed, refused, torn].map(std::sync::atomic::AtomicUsize::into_inner);
    println!("{changed} changes, {torn} of them over several sectors; {refused} refused");
    assert!(torn > 300 && refused < 100);
}
