//! A real block device: fixed in length, without holes of a file, told by the device and not by its node.

#![cfg(target_os = "linux")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
#[cfg(feature = "vm")]
use std::{collections::BTreeMap, sync::Mutex};

#[cfg(feature = "vm")]
use qcow2_chain::chain::Format;
use qcow2_chain::chain::{Chain, ChainOptions, Policy};
use qcow2_chain::format::GuestOffset;
use qcow2_chain::image::{CreateOptions, Image, OpenOptions};
use qcow2_chain::merge::{self, AfterCommit, CommitOptions, commit, plan};
use qcow2_chain::storage::{Access, Error, FileStorage, LockMode, MemoryStorage, Storage};
#[cfg(feature = "vm")]
use qcow2_chain::vm::{self, AdoptOptions, MergeOptions, OverlayProvider, OverlayRequest, SnapshotSet, VolumeSpec};

use crate::support::qemu::Qemu;
use crate::support::say;
use crate::support::stack::content;

const MIB: u64 = 1 << 20;

/// A loop device that is given back when this is dropped.
#[derive(Debug)]
pub(crate) struct Loop(pub(crate) PathBuf);

impl Loop {
    /// A device over a file, or `None` with a loud word where this machine or user may not make one.
    pub(crate) fn over(file: &Path) -> Option<Self> {
        let made = Command::new("losetup").args(["--find", "--show"]).arg(file).output();
        match made {
            Ok(made) if made.status.success() => {
                Some(Self(PathBuf::from(String::from_utf8_lossy(&made.stdout).trim())))
            }
            _ => {
                say("SKIPPED: no loop device can be made (root is needed)");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

/// An image inside a device that is too short for a merge, and long enough when the device was extended.
#[test]
fn a_merge_into_a_full_device_is_refused_and_completed_when_it_was_extended() {
    let Some(qemu) = Qemu::find() else { return };
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("volume");
    let volume = std::fs::File::create(&file).expect("a file");
    volume.set_len(MIB).expect("there is room");
    let Some(device) = Loop::over(&file) else { return };
    let base = FileStorage::open(&device.0, &Access::write()).expect("the device opens");
    Image::create(Arc::new(base), &CreateOptions::new(16 * MIB)).expect("it fits").close().expect("it closes");
    let top = directory.path().join("top.qcow2");
    let name = device.0.to_string_lossy().into_owned();
    let storage = Arc::new(FileStorage::create_new(&top).expect("a file"));
    let options = CreateOptions::new(16 * MIB).with_backing(name, "qcow2");
    Image::create(storage, &options).expect("an overlay").close().expect("it closes");
    let open = |writable| {
        let options = ChainOptions::default().with_policy(Policy::List(vec![device.0.clone()]));
        Chain::open(&top, &options.with_writable(writable)).expect("the chain opens")
    };
    let chain = open(1);
    for place in 0..(2 * MIB) >> 16 {
        chain.write_at(&[7; 1 << 16], GuestOffset::new(place << 17)).expect("written");
    }
    chain.close().expect("it closes");
    let before = content(&open(0)).expect("it reads");

    // What the plan says is what the refusal says, and nothing is written.
    let planned = plan(&open(0), 1).expect("a plan").commit;
    let free = planned.space_free.expect("a device has an end");
    assert!(planned.space_needed == 2 * MIB && free < MIB, "{planned}");
    assert!(planned.obstacles.iter().any(|obstacle| obstacle.contains("bytes are missing")), "{planned}");
    let bytes = std::fs::read(&device.0).expect("the device");
    let chain = open(2);
    let refused = commit(&chain, &CommitOptions::default().with_after(AfterCommit::Empty), &());
    match refused {
        Err(merge::Error::NoSpace { need, have, .. }) => assert_eq!((need, have), (2 * MIB, free)),
        done => panic!("{done:?}"),
    }
    drop(chain);
    assert!(std::fs::read(&device.0).expect("the device") == bytes, "a refused commit wrote something");

    // Longer now, but not by enough; then by enough.
    for (len, fits) in [(2 * MIB, false), (4 * MIB, true)] {
        volume.set_len(len).expect("there is room");
        let extended = Command::new("losetup").arg("--set-capacity").arg(&device.0).status();
        assert!(extended.is_ok_and(|status| status.success()), "the device is not extended");
        let chain = open(2);
        let done = commit(&chain, &CommitOptions::default().with_after(AfterCommit::Empty), &());
        assert!(done.is_ok() == fits, "{done:?}");
        chain.close().expect("it closes");
        assert!(content(&open(0)).expect("it reads") == before, "the guest sees another disk");
    }
    qemu.assert_clean(&device.0);
    qemu.assert_clean(&top);
    let base = Image::open_path(&device.0, &OpenOptions::default()).expect("the base opens");
    let mut merged = vec![0; before.len()];
    base.read_at(&mut merged, GuestOffset::ZERO).expect("it reads");
    assert!(merged == before, "the base does not hold what was merged");
}

#[test]
fn a_block_device_is_a_storage_of_fixed_length() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("file");
    let bytes: Vec<u8> = (0..MIB).map(|at| u8::try_from(at % 251).expect("small")).collect();
    std::fs::write(&file, &bytes).expect("there is room");
    let Some(device) = Loop::over(&file) else { return };

    let storage = FileStorage::open(&device.0, &Access::write()).expect("the device opens");
    assert!(storage.is_fixed_size());
    assert_eq!(storage.len().expect("it has a length"), MIB);
    assert_eq!(storage.allocated_len().expect("no error"), None);
    assert_eq!(storage.free_space().expect("no error"), None);
    assert_eq!(storage.next_data(5).expect("no error"), Some(5..MIB));

    // Unaligned, across the end.
    let mut buf = [0xee; 1000];
    storage.read_at(&mut buf, MIB - 700).expect("the end reads as zeroes");
    assert_eq!(buf[..700], bytes[bytes.len() - 700..]);
    assert_eq!(buf[700..], [0; 300]);
    storage.write_at(&[7; 700], MIB - 700).expect("it ends where the device ends");
    let full = storage.write_at(&[8; 1000], MIB - 10);
    assert!(matches!(full, Err(Error::NoSpace { need: 1000, .. })), "{full:?}");
    storage.set_len(MIB).expect("that is its length");
    assert!(matches!(storage.set_len(2 * MIB), Err(Error::Unsupported { .. })));

    // Aligned or not, what is asked for is zero afterwards, and nothing else.
    qcow2_chain::storage::zero_range(&storage, 4096..8192).expect("zeroed");
    qcow2_chain::storage::zero_range(&storage, 10_001..10_010).expect("zeroed");
    storage.sync().expect("durable");
    let mut model = bytes;
    model[4096..8192].fill(0);
    model[10_001..10_010].fill(0);
    let mut all = vec![0xee; model.len() - 1000];
    storage.read_at(&mut all, 0).expect("it reads");
    assert_eq!(all, model[..all.len()]);

    // By whatever name: it is the device, and not the file that a loop device lies on.
    let node = directory.path().join("node");
    let looker = Access::read().with_lock(LockMode::None);
    std::os::unix::fs::symlink(&device.0, &node).expect("a link");
    let other = FileStorage::open(&node, &looker).expect("the device opens again");
    assert_eq!(storage.file_id(), other.file_id());
    assert!(storage.file_id().is_some());
    assert_ne!(storage.file_id(), FileStorage::open(&file, &looker).expect("the file opens").file_id());
}

/// A provider of loop devices. Each has a link as its path, as a logical volume has, and is full of stale bytes.
#[cfg(feature = "vm")]
#[derive(Debug)]
struct Loops {
    directory: PathBuf,
    devices: Mutex<BTreeMap<PathBuf, Loop>>,
}

#[cfg(feature = "vm")]
impl OverlayProvider for Loops {
    fn path(&self, request: &OverlayRequest<'_>) -> vm::Result<PathBuf> {
        Ok(self.directory.join("group").join(request.name))
    }

    fn create(&self, request: &OverlayRequest<'_>) -> vm::Result<()> {
        let (path, file) = (self.path(request)?, self.directory.join("store").join(request.name));
        let len = usize::try_from(request.full_size.next_multiple_of(MIB)).expect("small");
        std::fs::write(&file, vec![0xff; len]).expect("there is room");
        let device = Loop::over(&file).expect("a device");
        std::os::unix::fs::symlink(&device.0, &path).expect("a link");
        self.devices.lock().expect("no panic").insert(path, device);
        Ok(())
    }

    fn release(&self, path: &Path) -> vm::Result<()> {
        if self.devices.lock().expect("no panic").remove(path).is_some() {
            std::fs::remove_file(path).expect("the link");
        }
        Ok(())
    }
}

#[cfg(feature = "vm")]
#[test]
fn provided_overlays_on_devices_are_released_in_both_directions() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().canonicalize().expect("a path");
    for name in ["group", "store", "overlays"] {
        std::fs::create_dir(path.join(name)).expect("a directory");
    }
    let file = path.join("store/vda");
    std::fs::write(&file, vec![1; 4 << 20]).expect("there is room");
    let Some(device) = Loop::over(&file) else { return };
    let spec = VolumeSpec::new("vda", &device.0).with_format(Format::Raw).with_overlay_dir(path.join("overlays"));
    let set = SnapshotSet::adopt(path.join("vm.json"), &[spec], &AdoptOptions::default()).expect("adopted");
    let loops = Arc::new(Loops { directory: path.clone(), devices: Mutex::default() });
    let set = set.with_provider(Arc::clone(&loops) as _);
    let devices = || loops.devices.lock().expect("no panic").len();

    let mut expected = vec![1; 4 << 20];
    for (number, name) in ["s1", "s2", "s3"].iter().enumerate() {
        set.create(name, &Default::default()).expect("a snapshot");
        assert_eq!(devices(), number + 1);
        let options = ChainOptions::default().with_policy(Policy::Any).with_writable(1);
        let chain = Chain::open(set.active_path("vda").expect("a path"), &options).expect("the chain opens");
        let at = (number << 20) + 1000;
        let bytes = vec![u8::try_from(number).expect("small") + 2; 100_000];
        chain.write_at(&bytes, GuestOffset::new(at as u64)).expect("written");
        expected[at..][..bytes.len()].copy_from_slice(&bytes);
        chain.close().expect("it closes");
        assert!(content(&set.open_active("vda").expect("it opens")).expect("it reads") == expected);
    }
    for (name, direction, left) in
        [("s2", merge::Direction::Commit, 2), ("s3", merge::Direction::Pull, 1), ("s1", merge::Direction::Commit, 0)]
    {
        let report = set.delete(name, &MergeOptions::default().with_direction(direction), &()).expect("deleted");
        assert!(report.released.is_empty() && report.removed.len() == 1, "{name}: {report:?}");
        assert_eq!(devices(), left, "{name}");
        assert!(content(&set.open_active("vda").expect("it opens")).expect("it reads") == expected, "{name}");
    }
    assert!(std::fs::read(&device.0).expect("the device") == expected);
    assert_eq!(std::fs::read_dir(path.join("group")).expect("a directory").count(), 0);
    assert_eq!(std::fs::read_dir(path.join("overlays")).expect("a directory").count(), 0);
}

/// Memory that does not grow.
#[derive(Debug)]
struct Fixed(MemoryStorage);

impl Storage for Fixed {
    fn name(&self) -> &'static str {
        "fixed"
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), Error> {
        self.0.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<(), Error> {
        assert!(offset + buf.len() as u64 <= self.0.len()?, "written behind the end");
        self.0.write_at(buf, offset)
    }
    fn len(&self) -> Result<u64, Error> {
        self.0.len()
    }
    fn set_len(&self, len: u64) -> Result<(), Error> {
        assert_eq!(len, self.0.len()?);
        Ok(())
    }
    fn sync(&self) -> Result<(), Error> {
        self.0.sync()
    }
    fn is_fixed_size(&self) -> bool {
        true
    }
}

/// What was given up makes room as soon as it is needed, not only after the caller's next flush.
#[test]
fn a_full_container_takes_what_replaces_something() {
    let storage = Arc::new(Fixed(MemoryStorage::with_bytes("fixed", vec![0; 1 << 20])));
    let image = Image::create(storage.clone(), &CreateOptions::new(16 * MIB)).expect("it fits");
    let mut held = Vec::new();
    for cluster in 0.. {
        match image.write_at(&[7; 1 << 16], GuestOffset::new(cluster << 16)) {
            Ok(()) => held.push(cluster),
            Err(error) => {
                assert!(error.to_string().contains("fixed"), "{error}");
                break;
            }
        }
    }
    assert!(held.len() > 5);
    image.flush().expect("durable");
    image.discard_at(GuestOffset::ZERO, 1 << 16).expect("given up");
    image.write_at(&[8; 1 << 16], GuestOffset::new(200 << 16)).expect("the room of the first");
    image.close().expect("it closes");
    let image = Image::open(storage, &OpenOptions::default()).expect("it opens");
    let mut bytes = vec![0; 1 << 16];
    for (cluster, expected) in [(0, 0), (1, 7), (200, 8)] {
        image.read_at(&mut bytes, GuestOffset::new(cluster << 16)).expect("it reads");
        assert!(bytes.iter().all(|&byte| byte == expected), "cluster {cluster}");
    }
}
