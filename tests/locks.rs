//! Image locks, against a real program that holds the image: what it holds we respect, what we hold it respects.

#![cfg(target_os = "linux")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use qcow2_chain::storage::{Access, Error, FileStorage, LockMode, MappedStorage, Storage as _};

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

/// A program of QEMU's that goes on until this is dropped.
struct Daemon(Child);

impl Daemon {
    /// Starts it and waits until it has made the file that says that it is ready. Nothing where it is not installed.
    fn start(program: &str, args: &[String], ready: &Path) -> Option<Self> {
        let child = match Command::new(program).args(args).stdin(Stdio::null()).spawn() {
            Ok(child) => child,
            Err(_) if std::env::var_os("QCOW2_CHAIN_REQUIRE_QEMU").is_none() => {
                crate::support::say(&format!("SKIPPED: locks against {program}, which is not here"));
                return None;
            }
            Err(error) => panic!("{program}: {error}"),
        };
        let mut daemon = Self(child);
        let start = Instant::now();
        while !ready.exists() {
            assert!(daemon.0.try_wait().expect("a child").is_none(), "{program} ended");
            assert!(start.elapsed() < Duration::from_secs(60), "{program} is not ready");
            std::thread::sleep(Duration::from_millis(10));
        }
        Some(daemon)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn nbd(image: &Path, more: &[&str]) -> Option<Daemon> {
    let socket = image.with_extension("socket");
    let ready = image.with_extension("pid");
    for old in [&socket, &ready] {
        let _ = std::fs::remove_file(old);
    }
    let mut args = vec!["-f".into(), "qcow2".into(), "-t".into(), format!("--socket={}", socket.display())];
    args.push(format!("--pid-file={}", ready.display()));
    args.extend(more.iter().map(|arg| (*arg).to_owned()));
    args.push(image.display().to_string());
    Daemon::start("qemu-nbd", &args, &ready)
}

#[test]
fn what_qemu_nbd_serves_is_busy() {
    let Some(qemu) = Qemu::find() else { return };
    let (_directory, path) = image(qemu);
    let Some(server) = nbd(&path, &[]) else { return };
    assert_eq!(held(&path, &Access::write()).as_deref(), Some(WRITE));
    assert_eq!(held(&path, &Access::read()).as_deref(), Some(SHARED));
    drop(server);
    assert_eq!(held(&path, &Access::write()), None);
    let Some(reader) = nbd(&path, &["--read-only"]) else { return };
    assert_eq!(held(&path, &Access::read()), None);
    assert_eq!(held(&path, &Access::write()).as_deref(), Some(WRITE));
    drop(reader);
    // What we hold, it does not serve.
    let _writer = FileStorage::open(&path, &Access::write()).expect("nobody else has it");
    let socket = format!("--socket={}", path.with_extension("other").display());
    let refused = Command::new("qemu-nbd").args(["-f", "qcow2", &socket]).arg(&path).output().expect("it starts");
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("Failed to get \"write\" lock"), "{refused:?}");
}

#[test]
fn what_the_storage_daemon_has_is_busy() {
    let Some(qemu) = Qemu::find() else { return };
    let (directory, base) = image(qemu);
    let path = directory.path().join("overlay.qcow2");
    create(qemu, &path, Some(&base));
    let pid = directory.path().join("pid");
    let args = [
        "--blockdev".to_owned(),
        format!("driver=file,node-name=file,filename={}", path.display()),
        "--blockdev".to_owned(),
        "driver=qcow2,node-name=disk,file=file".to_owned(),
        "--pidfile".to_owned(),
        pid.display().to_string(),
    ];
    let Some(daemon) = Daemon::start("qemu-storage-daemon", &args, &pid) else { return };
    assert_eq!(held(&path, &Access::write()).as_deref(), Some(WRITE));
    assert_eq!(held(&path, &Access::read()).as_deref(), Some(SHARED));
    assert_eq!(held(&base, &Access::write()).as_deref(), Some(WRITE));
    assert_eq!(held(&base, &Access::read()), None);
    drop(daemon);
    assert_eq!(held(&path, &Access::write()), None);
}

/// The program, as another process of ours.
#[cfg(feature = "cli")]
fn program(args: &[&str], path: &Path) -> (bool, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qcow2-chain"));
    let out = command.args(&args[..1]).arg(path).args(&args[1..]).output().expect("the program runs");
    (out.status.success(), String::from_utf8_lossy(&out.stderr).into_owned())
}

#[cfg(feature = "cli")]
#[test]
fn two_processes_of_ours_respect_each_other() {
    let directory = tempfile::tempdir().expect("a directory for images");
    let path = directory.path().join("image.qcow2");
    let storage = std::sync::Arc::new(FileStorage::create_new(&path).expect("a new file"));
    let options = qcow2_chain::image::CreateOptions::new(1 << 20);
    qcow2_chain::image::Image::create(storage, &options).expect("created").close().expect("closed");
    let busy = |said: (bool, String)| !said.0 && said.1.contains("\"write\" lock");
    let writer = FileStorage::open(&path, &Access::write()).expect("nobody else has it");
    assert!(busy(program(&["info"], &path)) && busy(program(&["resize", "2M"], &path)));
    writer.set_lock(LockMode::Read).expect("less is always to be had");
    assert!(program(&["info"], &path).0 && busy(program(&["resize", "2M"], &path)));
    drop(writer);
    assert_eq!(program(&["resize", "2M"], &path), (true, String::new()));
}

/// Waits until nobody holds a file. A child that another test is just starting may have it open until it is executed.
fn is_free_soon(path: &Path) -> bool {
    let start = Instant::now();
    while held(path, &Access::write()).is_some() {
        if start.elapsed() > Duration::from_secs(10) {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

/// A program that this one starts does not inherit the locks: the file is closed when it is executed.
#[test]
fn a_child_program_holds_nothing() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let writer = FileStorage::open(file.path(), &Access::write()).expect("nobody else has it");
    let mut child = Command::new("sleep").arg("60").spawn().expect("sleep starts");
    drop(writer);
    let free = is_free_soon(file.path());
    child.kill().and_then(|()| child.wait()).expect("sleep ends");
    assert!(free);
}

/// A forked process shares its parent's open files, and so the locks. They are given back with the handle all the same: a
/// child that lives on does not keep an image locked. The child gets the file as its standard input, as forking this
/// process would give it the files of all other tests as well.
#[test]
fn a_child_that_shares_the_file_does_not_keep_the_locks() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let writer = FileStorage::open(file.path(), &Access::write()).expect("nobody else has it");
    let shared = writer.as_file().expect("a file").try_clone().expect("a second descriptor");
    let mut child = Command::new("sleep").arg("60").stdin(shared).spawn().expect("sleep starts");
    let before = held(file.path(), &Access::write());
    drop(writer);
    let after = held(file.path(), &Access::write());
    child.kill().and_then(|()| child.wait()).expect("sleep ends");
    assert_eq!((before.as_deref(), after), (Some(WRITE), None));
}
