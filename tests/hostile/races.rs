//! Names that change while a chain is opened: a second thread puts something else in their place, over and over.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use qcow2_chain::chain::{Chain, ChainOptions, Policy};
use qcow2_chain::format::GuestOffset;
use qcow2_chain::image::{CreateOptions, Image};
use qcow2_chain::storage::FileStorage;

/// What the guest reads of an allowed base, and of the secret that must never be read.
const ALLOWED: u8 = 0xa1;
const SECRET: u8 = 0x5e;

/// A base image full of one byte.
fn base(path: &Path, byte: u8) {
    let storage = std::sync::Arc::new(FileStorage::create_new(path).expect("a new file"));
    let image = Image::create(storage, &CreateOptions::new(1 << 16)).expect("created");
    image.write_at(&[byte; 1 << 16], GuestOffset::ZERO).expect("written");
    image.close().expect("closed");
}

struct VolumeFiles {
    root: tempfile::TempDir,
}

impl VolumeFiles {
    /// `d/top` over `name`, `d/good` and `d/sub/good` that may be read, `secret/good` that may not.
    fn new(name: &str) -> Self {
        let place = Self { root: tempfile::tempdir().expect("a temporary directory") };
        for directory in ["d", "d/sub", "secret"] {
            std::fs::create_dir(place.path(directory)).expect("a directory");
        }
        base(&place.path("d/good"), ALLOWED);
        base(&place.path("d/sub/good"), ALLOWED);
        base(&place.path("secret/good"), SECRET);
        let top = std::sync::Arc::new(FileStorage::create_new(place.path("d/top")).expect("a new file"));
        let options = CreateOptions::new(1 << 16).with_backing(name, "qcow2");
        Image::create(top, &options).expect("created").close().expect("closed");
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// Opens the chain again and again while `flip` is called in a loop by another thread, with true and false in turn.
    /// Returns how often it opened and how often it did not.
    fn race(&self, policy: &Policy, flip: impl Fn(bool) + Sync) -> (u32, u32) {
        let done = AtomicBool::new(false);
        let (mut opened, mut refused) = (0, 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    flip(true);
                    std::thread::yield_now();
                    flip(false);
                    std::thread::yield_now();
                }
            });
            let start = Instant::now();
            // Long enough for both to happen, and no longer.
            while start.elapsed() < Duration::from_secs(1)
                || (opened.min(refused) < 20 && start.elapsed() < Duration::from_secs(15))
            {
                let options = ChainOptions::default().with_policy(policy.clone());
                match Chain::open(self.path("d/top"), &options) {
                    Err(_) => refused += 1,
                    Ok(chain) => {
                        let mut buf = [0; 512];
                        chain.read_at(&mut buf, GuestOffset::ZERO).expect("what opened reads");
                        if buf != [ALLOWED; 512] {
                            done.store(true, Ordering::Relaxed);
                            panic!("the secret was read after {opened} opens");
                        }
                        opened += 1;
                    }
                }
            }
            done.store(true, Ordering::Relaxed);
        });
        (opened, refused)
    }
}

/// Puts a file of another name in the place of `at`, in one step.
fn replace(at: &Path, make: impl Fn(&Path)) {
    let new = at.with_extension("new");
    make(&new);
    std::fs::rename(&new, at).expect("renamed");
}

/// The backing file is now an image, now a link to a secret.
#[test]
fn a_link_in_the_place_of_the_file() {
    let place = VolumeFiles::new("base");
    let at = place.path("d/base");
    let flip = |bad: bool| {
        replace(&at, |new| {
            if bad {
                symlink(place.path("secret/good"), new).expect("a link");
            } else {
                std::fs::hard_link(place.path("d/good"), new).expect("a link");
            }
        });
    };
    flip(false);
    let (opened, refused) = place.race(&Policy::Beneath(vec![place.path("d")]), flip);
    assert!(opened > 0 && refused > 0, "{opened} opened, {refused} refused: no race");
}

/// A directory on the way is now one, now a link out.
#[test]
fn a_link_in_the_place_of_a_directory() {
    let place = VolumeFiles::new("way/good");
    let (way, aside) = (place.path("d/way"), place.path("d/aside"));
    std::fs::rename(place.path("d/sub"), &way).expect("renamed");
    let flip = |bad: bool| {
        if bad {
            std::fs::rename(&way, &aside).expect("renamed");
            symlink(place.path("secret"), &way).expect("a link");
        } else {
            std::fs::remove_file(&way).expect("removed");
            std::fs::rename(&aside, &way).expect("renamed");
        }
    };
    let (opened, refused) = place.race(&Policy::Beneath(vec![place.path("d")]), flip);
    assert!(opened > 0 && refused > 0, "{opened} opened, {refused} refused: no race");
}

/// `..` is followed while the directory that it starts from moves in and out.
#[test]
fn dots_from_a_directory_that_moves() {
    let place = VolumeFiles::new("sub/../good");
    std::fs::create_dir(place.path("secret/inner")).expect("a directory");
    let (inside, outside) = (place.path("d/sub"), place.path("secret/moved"));
    let flip = |bad: bool| {
        let (from, to) = if bad { (&inside, &outside) } else { (&outside, &inside) };
        std::fs::rename(from, to).expect("renamed");
    };
    let (opened, refused) = place.race(&Policy::Beneath(vec![place.path("d")]), flip);
    assert!(opened > 0 && refused > 0, "{opened} opened, {refused} refused: no race");
}

/// A listed file is opened by the path that the caller listed, whatever the image's own name leads to by then.
#[test]
fn a_listed_file_by_another_name() {
    let place = VolumeFiles::new("alias");
    let at = place.path("d/alias");
    let flip = |bad: bool| {
        let target = if bad { place.path("secret/good") } else { place.path("d/good") };
        replace(&at, |new| symlink(&target, new).expect("a link"));
    };
    flip(false);
    let (opened, refused) = place.race(&Policy::List(vec![place.path("d/good")]), flip);
    assert!(opened > 0 && refused > 0, "{opened} opened, {refused} refused: no race");
}

/// A FIFO takes the place of the file: opening must never wait for somebody to write into it.
#[test]
fn a_fifo_in_the_place_of_the_file() {
    let place = VolumeFiles::new("base");
    let fifo = place.path("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().is_ok_and(|status| status.success()));
    let at = place.path("d/base");
    let flip = |bad: bool| {
        let target = if bad { fifo.clone() } else { place.path("d/good") };
        replace(&at, |new| std::fs::hard_link(&target, new).expect("a link"));
    };
    flip(false);
    for policy in [Policy::Beneath(vec![place.path("d")]), Policy::Any] {
        let start = Instant::now();
        let (opened, refused) = place.race(&policy, flip);
        assert!(opened > 0 && refused > 0, "{opened} opened, {refused} refused: no race");
        assert!(start.elapsed() < Duration::from_secs(20), "an open waited");
    }
}

/// `/proc/self/fd/N` and its like lead to whatever this process has open.
#[test]
fn what_this_process_has_open() {
    use std::os::fd::AsRawFd;
    let root = VolumeFiles::new("base");
    let secret = std::fs::File::open(root.path("secret/good")).expect("opened");
    let fd = secret.as_raw_fd();
    let names = [
        format!("/proc/self/fd/{fd}"),
        format!("/proc/{}/fd/{fd}", std::process::id()),
        format!("/dev/fd/{fd}"),
        format!("/proc/self/root{}", root.path("secret/good").display()),
        format!("/proc/self/cwd/../../../../../../../..{}", root.path("secret/good").display()),
    ];
    for name in names {
        let place = VolumeFiles::new(&name);
        for directory in [place.path("d"), "/proc".into(), "/proc/self".into(), "/dev".into()] {
            let options = ChainOptions::default().beneath(&directory);
            let result = Chain::open(place.path("d/top"), &options);
            assert!(result.is_err(), "{name} is opened beneath {}", directory.display());
        }
        let other = ChainOptions::default().with_policy(Policy::List(vec![place.path("d/good")]));
        assert!(Chain::open(place.path("d/top"), &other).is_err(), "{name} is none of the listed");
    }
}
