//! Image locks, against a real program that holds the image: what it holds we respect, what we hold it respects.

#![cfg(target_os = "linux")]

use std::path::{Path, PathBuf};

use qcow2_chain::storage::{Access, Error, FileStorage, LockMode, MappedStorage};

use crate::support::holder::Holder;
use crate::support::qemu::Qemu;

fn image(qemu: Qemu) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().expect("a directory for images");
    let path = directory.path().join("image.qcow2");
    create(qemu, &path, None);
    (directory, path)
}

fn create(qemu: Qemu, path: &Path, backing: Option<&Path>) {
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    let backing = backing.map(|backing| backing.to_str().expect("a plain path"));
    args.extend(backing.into_iter().flat_map(|backing| ["-F", "qcow2", "-b", backing]));
    qemu.img(&[&args[..], &[path.to_str().expect("a plain path"), "1M"]].concat());
}

/// What is held, where the open says that something is.
fn held(path: &Path, access: &Access) -> Option<String> {
    match FileStorage::open(path, access) {
        Ok(_) => None,
        Err(Error::Busy { held, .. }) => Some(held),
        Err(error) => panic!("neither open nor busy: {error:?}"),
    }
}

const WRITE: &str = "failed to get \"write\" lock";
const SHARED: &str = "failed to get shared \"write\" lock";

#[test]
fn what_qemu_writes_is_busy() {
    let Some(qemu) = Qemu::find() else { return };
    let (_directory, path) = image(qemu);
    let holder = Holder::open(&path, &[]);
    assert_eq!(held(&path, &Access::write()).as_deref(), Some(WRITE));
    assert_eq!(held(&path, &Access::read()).as_deref(), Some(SHARED));
    assert!(matches!(MappedStorage::open(&path, &Access::read()), Err(Error::Busy { .. })));
    let looker = FileStorage::open(&path, &Access::read().with_lock(LockMode::None)).expect("looking takes no lock");
    assert!(matches!(looker.set_lock(LockMode::Read), Err(Error::Busy { .. })));
    drop(holder);
    looker.set_lock(LockMode::Read).expect("qemu-io is gone");
}

#[test]
fn what_qemu_reads_is_read_and_not_written() {
    let Some(qemu) = Qemu::find() else { return };
    let (_directory, path) = image(qemu);
    let holder = Holder::open(&path, &["-r"]);
    let reader = FileStorage::open(&path, &Access::read()).expect("readers live together");
    assert_eq!(held(&path, &Access::write()).as_deref(), Some(WRITE));
    assert!(matches!(reader.set_lock(LockMode::Write), Err(Error::Busy { .. })));
    drop(holder);
    reader.set_lock(LockMode::Write).expect("qemu-io is gone");
}

#[test]
fn the_base_of_a_running_overlay_is_not_written() {
    let Some(qemu) = Qemu::find() else { return };
    let (directory, base) = image(qemu);
    let overlay = directory.path().join("overlay.qcow2");
    create(qemu, &overlay, Some(&base));
    let holder = Holder::open(&overlay, &[]);
    assert_eq!(held(&base, &Access::write()).as_deref(), Some(WRITE));
    assert_eq!(held(&base, &Access::read()), None);
    assert_eq!(held(&overlay, &Access::read()).as_deref(), Some(SHARED));
    drop(holder);
    assert_eq!(held(&base, &Access::write()), None);
}

#[test]
fn what_we_write_qemu_leaves_alone() {
    let Some(qemu) = Qemu::find() else { return };
    let (_directory, path) = image(qemu);
    let text = path.to_str().expect("a plain path");
    let writer = FileStorage::open(&path, &Access::write()).expect("nobody else has it");
    for args in [&["info"][..], &["check"], &["map"], &["resize"]] {
        let mut args = [args, &[text]].concat();
        args.extend((args[0] == "resize").then_some("2M"));
        let run = qemu.try_img(&args);
        assert_ne!(run.code, 0, "qemu-img {args:?}");
        assert!(run.stderr.contains("Failed to get") && run.stderr.contains("\"write\" lock"), "{}", run.stderr);
    }
    assert!(qemu.try_img(&["info", text]).stderr.contains("Failed to get shared \"write\" lock"));
    let run = qemu.try_io(&path, "qcow2", &["write 0 64k"]);
    assert!(run.stderr.contains("Failed to get \"write\" lock"), "{}", run.stderr);
    qemu.img(&["info", "-U", text]);

    // Going back to a reader's locks lets readers in, and no writer.
    writer.set_lock(LockMode::Read).expect("less is always to be had");
    qemu.img(&["info", text]);
    let run = qemu.try_io(&path, "qcow2", &["write 0 64k"]);
    assert!(run.stderr.contains("Failed to get \"write\" lock"), "{}", run.stderr);
    drop(writer);
    qemu.io(&path, &["write 0 64k"]);
}

#[test]
fn what_we_read_qemu_reads_too() {
    let Some(qemu) = Qemu::find() else { return };
    let (_directory, path) = image(qemu);
    let _map = MappedStorage::open(&path, &Access::read()).expect("nobody else has it");
    let _holder = Holder::open(&path, &["-r"]);
    let run = qemu.try_io(&path, "qcow2", &["write 0 64k"]);
    assert!(run.stderr.contains("Failed to get \"write\" lock"), "{}", run.stderr);
}

#[test]
fn a_new_image_is_ours_until_it_is_closed() {
    let Some(qemu) = Qemu::find() else { return };
    let (directory, template) = image(qemu);
    let path = directory.path().join("new.qcow2");
    let file = FileStorage::create_new(&path).expect("the name is free");
    let bytes = std::fs::read(template).expect("the template is read");
    qcow2_chain::storage::Storage::write_at(&file, &bytes, 0).expect("there is room");
    let text = path.to_str().expect("a plain path");
    let run = qemu.try_img(&["info", text]);
    assert!(run.stderr.contains("Failed to get shared \"write\" lock"), "{}", run.stderr);
    drop(file);
    qemu.img(&["info", text]);
}
