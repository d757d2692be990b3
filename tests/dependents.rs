//! The search for images outside an operation that depend on its files.

#![cfg(unix)]

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use qcow2_chain::chain::{
    Chain, ChainOptions, DependentSearch, Error, ExternalDependent, Layer, Node, find_dependents,
};
use qcow2_chain::image::{CreateOptions, Image, OpenOptions};
use qcow2_chain::merge::{self, CommitOptions, commit};
use qcow2_chain::storage::fault::{Fault, Faults, FaultyFileSystem};
use qcow2_chain::storage::{
    self, Access, FileStorage, FileSystem, HostFileSystem, ListedFile, MemoryFileSystem, MemoryStorage, Resolved,
    Storage,
};
use tempfile::TempDir;

use crate::support::qemu::Qemu;

/// A directory with a raw file `base`, and the directory `sub`.
fn pool() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("base"), [1; 4096]).unwrap();
    std::fs::create_dir(dir.path().join("sub")).unwrap();
    dir
}

/// The bytes of a qcow2 header with this backing name and these incompatible features.
fn header(name: &[u8], features: u8) -> Vec<u8> {
    let mut bytes = vec![0; 128];
    bytes[..4].copy_from_slice(b"QFI\xfb");
    (bytes[7], bytes[15], bytes[23], bytes[79], bytes[103]) = (3, 128, 16, features, 104);
    bytes[16..20].copy_from_slice(&u32::try_from(name.len()).unwrap().to_be_bytes());
    bytes.extend(name);
    bytes
}

fn overlay(path: impl AsRef<Path>, name: impl AsRef<[u8]>) {
    std::fs::write(path, header(name.as_ref(), 0)).unwrap();
}

fn host() -> Arc<dyn FileSystem> {
    Arc::new(HostFileSystem)
}

fn search(file: &Path, search: &DependentSearch) -> Vec<ExternalDependent> {
    find_dependents(&host(), &[file.to_owned()], &[], search).unwrap()
}

/// The images that depend on a file, found in its directory.
fn over(file: &Path) -> Vec<PathBuf> {
    search(file, &DependentSearch::default()).into_iter().map(|found| found.image).collect()
}

/// Reports whether an image in the pool with this backing name depends on `base`.
fn depends(name: &[u8]) -> bool {
    let dir = pool();
    let text = String::from_utf8_lossy(name);
    let name =
        if text.contains("POOL") { text.replace("POOL", &dir.path().to_string_lossy()).into() } else { name.to_vec() };
    overlay(dir.path().join("image"), name);
    match &over(&dir.path().join("base"))[..] {
        [] => false,
        [image] => *image == dir.path().join("image"),
        more => panic!("{more:?}"),
    }
}

#[test]
fn name_that_leads_to_the_file_counts() {
    for name in [
        "base",
        "./base",
        "sub/../base",
        "POOL/base",
        "POOL/./sub/../base",
        "file:base",
        "file:POOL/base",
        "file:elsewhere/base",
        "host_device:POOL/base",
        "blkdebug::POOL/base",
        "json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"POOL/base\"}}",
        "json:{'file.filename':'POOL\\/sub\\/..\\/ba\\u0073e'}",
        "json:{\"file.filename\":\"base\"}",
        "json:{\"file.filename\":\"elsewhere/base\"}",
        "json:{\"file\":{\"filename\":\"json:{'file.filename':'file:POOL/base'}\"}}",
    ] {
        assert!(depends(name.as_bytes()), "{name}");
    }
}

#[test]
fn name_that_leads_elsewhere_does_not_count() {
    for name in [
        "bas",
        "base2",
        "sub/base",
        "base/base",
        "POOL/none/../base",
        "nbd://host/base",
        "json:{\"base\":\"POOL/other\"}",
        "json:{\"file.filename\":\"POOL/sub/base\"}",
        "json:{\"file.filename\":\"a-base\"}",
        "file:POOL/sub/base",
        "/",
        "..",
        "json:",
    ] {
        assert!(!depends(name.as_bytes()), "{name}");
    }
    assert!(!depends(&[b'x'; 1023]), "a component that is too long");
}

#[test]
fn odd_names_are_compared_by_their_bytes() {
    let dir = pool();
    for name in [&b"a:b"[..], b"\xff\xfe", b" ", b"new\nline", b"json", b"[x]*?"] {
        let base = dir.path().join(std::ffi::OsStr::from_bytes(name));
        std::fs::write(&base, "base").unwrap();
        let image = dir.path().join("image");
        for written in [name.to_vec(), [b"./", name].concat(), base.as_os_str().as_bytes().to_vec()] {
            overlay(&image, &written);
            assert_eq!(over(&base), std::slice::from_ref(&image), "{}", String::from_utf8_lossy(&written));
        }
        std::fs::remove_file(&image).unwrap();
        std::fs::remove_file(&base).unwrap();
    }
}

#[test]
fn name_is_cut_at_its_first_nul_as_by_qemu() {
    assert!(depends(b"base\0.old"));
    assert!(!depends(b"\0base"));
}

#[test]
fn links_and_hard_links_to_the_file_are_followed() {
    let dir = pool();
    let path = |name: &str| dir.path().join(name);
    symlink("base", path("link")).unwrap();
    symlink("link", path("sub/link-to-link")).unwrap();
    symlink(path("link"), path("sub/absolute")).unwrap();
    std::fs::hard_link(path("base"), path("hard")).unwrap();
    symlink(".", path("same")).unwrap();
    for name in ["link", "hard", "sub/absolute", "same/base", "same/same/link"] {
        overlay(path("image"), name);
        for sought in ["base", "link", "hard", "sub/absolute", "same/base"] {
            assert!(over(&path(sought)).iter().any(|image| image.ends_with("image")), "{name}, {sought}");
        }
    }
    overlay(path("image"), "sub/link-to-link");
    assert!(over(&path("base")).is_empty(), "a link that leads nowhere");
}

/// A file that is reached by a link is searched in the directory of the link and in its own.
#[test]
fn directory_of_a_link_and_of_its_target_are_searched() {
    let dir = pool();
    let path = |name: &str| dir.path().join(name);
    symlink("../base", path("sub/disk")).unwrap();
    overlay(path("beside-target"), "base");
    overlay(path("sub/beside-link"), "disk");
    let real = dir.path().canonicalize().unwrap();
    let mut found = over(&path("sub/disk"));
    found.iter_mut().for_each(|image| *image = image.canonicalize().unwrap());
    assert_eq!(found, [real.join("beside-target"), real.join("sub/beside-link")]);
}

/// A relative name in an image that is a link starts at the link or at the image itself, depending
/// on the path that QEMU opens.
#[test]
fn image_that_is_a_link_is_seen_from_both_its_directories() {
    let dir = pool();
    let path = |name: &str| dir.path().join(name);
    std::fs::create_dir_all(path("deep/er")).unwrap();
    symlink("deep/er/image", path("link")).unwrap();
    for (name, depends) in [("base", true), ("../../base", true), ("../base", false)] {
        overlay(path("deep/er/image"), name);
        assert_eq!(!over(&path("base")).is_empty(), depends, "{name}");
    }
}

#[test]
fn image_with_several_names_is_reported_once() {
    let dir = pool();
    let path = |name: &str| dir.path().join(name);
    overlay(path("image"), path("base").as_os_str().as_bytes());
    std::fs::hard_link(path("image"), path("sub/hard")).unwrap();
    symlink("image", path("link")).unwrap();
    symlink(dir.path(), path("sub/pool")).unwrap();
    let options = DependentSearch::default().with_directory(path("sub")).with_directory(path("sub/pool"));
    assert_eq!(search(&path("base"), &options).len(), 1);
}

#[test]
fn images_of_the_operation_do_not_count() {
    let dir = pool();
    let path = |name: &str| dir.path().join(name);
    overlay(path("own"), "base");
    overlay(path("other"), "base");
    std::fs::hard_link(path("own"), path("own-too")).unwrap();
    symlink("own", path("own-link")).unwrap();
    for own in ["own", "own-link", "own-too", "sub/../own"] {
        let files = [path("base")];
        let found = find_dependents(&host(), &files, &[path(own)], &DependentSearch::default()).unwrap();
        assert_eq!(found, [ExternalDependent { image: path("other"), file: path("base") }], "{own}");
    }
}

#[test]
fn each_file_is_reported_with_its_own_dependents() {
    let dir = pool();
    let path = |name: &str| dir.path().join(name);
    overlay(path("middle"), "base");
    overlay(path("top"), "middle");
    let files = [path("base"), path("middle")];
    let found = find_dependents(&host(), &files, &[], &DependentSearch::default()).unwrap();
    let pair = |image, file| ExternalDependent { image: path(image), file: path(file) };
    assert_eq!(found, [pair("middle", "base"), pair("top", "middle")]);
}

#[test]
fn further_directories_are_searched_where_named() {
    let (dir, elsewhere) = (pool(), tempfile::tempdir().unwrap());
    let image = elsewhere.path().join("image");
    overlay(&image, dir.path().join("base").as_os_str().as_bytes());
    overlay(dir.path().join("sub/image"), "../base");
    let base = dir.path().join("base");
    assert!(over(&base).is_empty(), "neither elsewhere nor in subdirectories");
    let options = DependentSearch::default().with_directory(elsewhere.path()).with_directory(dir.path().join("sub"));
    let mut found: Vec<_> = search(&base, &options).into_iter().map(|found| found.image).collect();
    found.sort_by_key(|path| path.starts_with(dir.path()));
    assert_eq!(found, [image, dir.path().join("sub/image")]);
    let mut off = options;
    off.enabled = false;
    assert!(search(&base, &off).is_empty());
    assert!(!DependentSearch::disabled().enabled);
}

#[test]
fn data_file_counts_as_backing_file_does() {
    let dir = pool();
    let image = dir.path().join("image");
    let with_data_file = |name: &str, features: u8| {
        let mut bytes = header(b"", features);
        bytes[15] = 0;
        bytes[104..108].copy_from_slice(b"DATA");
        bytes[111] = u8::try_from(name.len()).unwrap();
        bytes.splice(112.., name.bytes());
        std::fs::write(&image, bytes).unwrap();
        !over(&dir.path().join("base")).is_empty()
    };
    let whole = dir.path().join("base").to_string_lossy().into_owned();
    for (name, expected) in [("base", true), ("elsewhere/base", true), (&*whole, true), ("/base", false), ("b", false)]
    {
        assert_eq!(with_data_file(name, 4), expected, "{name}");
    }
    assert!(!with_data_file("base", 0), "without the feature bit the extension means nothing");
}

#[test]
fn images_that_qemu_wrote_are_found() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = pool();
    let text = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
    let data_file = format!("data_file={}", text("base"));
    let json = format!("json:{{\"file\":{{\"driver\":\"file\",\"filename\":\"{}\"}}}}", text("base"));
    let of_raw = ["-u", "-F", "raw", "-b"];
    qemu.img(&["create", "-q", "-f", "qcow2", "-o", &data_file, &text("data"), "4096"]);
    for (name, backing, options) in [
        ("plain", "base", "compat=1.1"),
        ("version2", "base", "compat=0.10"),
        ("small", "base", "cluster_size=512"),
        ("large", "base", "cluster_size=2M"),
        ("json", &json, "compat=1.1"),
    ] {
        let start = ["create", "-q", "-f", "qcow2", "-o", options];
        qemu.img(&[&start[..], &of_raw, &[backing, &text(name), "4096"]].concat());
    }
    let encrypted = ["create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=x"];
    let luks = ["-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"];
    qemu.img(&[&encrypted[..], &luks, &of_raw, &["base", &text("secret"), "4096"]].concat());
    let names = ["data", "json", "large", "plain", "secret", "small", "version2"];
    assert_eq!(over(&dir.path().join("base")), names.map(|name| dir.path().join(name)));
}

#[test]
fn image_of_unknown_features_counts_and_garbage_does_not() {
    let dir = pool();
    std::fs::write(dir.path().join("future"), header(b"base", 0x80)).unwrap();
    let mut encrypted = header(b"base", 0);
    encrypted[35] = 9;
    std::fs::write(dir.path().join("encrypted"), encrypted).unwrap();
    std::fs::write(dir.path().join("garbage"), b"QFI\xfb, and no header. base base base").unwrap();
    std::fs::write(dir.path().join("magic"), b"QFI\xfb").unwrap();
    std::fs::write(dir.path().join("short"), b"QF").unwrap();
    std::fs::write(dir.path().join("empty"), b"").unwrap();
    let mut long = header(&[b'x'; 1024], 0);
    long[128..132].copy_from_slice(b"base");
    std::fs::write(dir.path().join("long"), long).unwrap();
    assert_eq!(over(&dir.path().join("base")), ["encrypted", "future"].map(|name| dir.path().join(name)));
}

#[test]
fn file_that_does_not_exist_is_compared_by_its_path() {
    let dir = pool();
    overlay(dir.path().join("image"), "sub/../lost");
    overlay(dir.path().join("other"), "sub/lost");
    assert_eq!(over(&dir.path().join("lost")), [dir.path().join("image")]);
}

#[test]
fn special_files_are_not_opened() {
    use nix::sys::stat::Mode;
    let dir = pool();
    let path = |name: &str| dir.path().join(name);
    overlay(path("image"), "base");
    nix::unistd::mkfifo(&path("fifo"), Mode::S_IRWXU).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
    for (target, name) in [("fifo", "to-fifo"), ("socket", "to-socket"), ("sub", "to-sub"), ("/dev/zero", "to-zero")] {
        symlink(target, path(name)).unwrap();
    }
    let opened = Arc::new(Probe::default());
    let file_system: Arc<dyn FileSystem> = opened.clone();
    let found = find_dependents(&file_system, &[path("base")], &[], &DependentSearch::default()).unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(opened.opens.load(Ordering::Relaxed), 2, "base and image");
    // A file system that does not know the types leaves them to the open, which does not wait.
    let untyped: Arc<dyn FileSystem> = Arc::new(Probe { untyped: true, ..Probe::default() });
    assert_eq!(find_dependents(&untyped, &[path("base")], &[], &DependentSearch::default()).unwrap(), found);
}

#[test]
fn file_that_vanishes_is_skipped() {
    let dir = pool();
    let path = |name: &str| dir.path().join(name);
    overlay(path("image"), "base");
    symlink("nowhere", path("dangling")).unwrap();
    symlink("itself", path("itself")).unwrap();
    overlay(path("looped"), "itself");
    let gone = Probe { fails: Some((path("gone"), io::ErrorKind::NotFound)), ..Probe::default() };
    std::fs::write(path("gone"), "").unwrap();
    let file_system: Arc<dyn FileSystem> = Arc::new(gone);
    let found = find_dependents(&file_system, &[path("base")], &[], &DependentSearch::default()).unwrap();
    assert_eq!(found, [ExternalDependent { image: path("image"), file: path("base") }]);
}

/// The file that an error names, which must state the remedy.
fn unknown_file(result: Result<Vec<ExternalDependent>, Error>) -> PathBuf {
    let error = result.unwrap_err();
    assert!(error.to_string().contains("--no-dependents"), "{error}");
    let Error::DependentsUnknown { file, .. } = error else { panic!("{error:?}") };
    PathBuf::from(file)
}

#[test]
fn file_that_cannot_be_read_is_an_error() {
    let dir = pool();
    let path = |name: &str| dir.path().join(name);
    let find = |probe: Probe, options: &DependentSearch| {
        let file_system: Arc<dyn FileSystem> = Arc::new(probe);
        find_dependents(&file_system, &[path("base")], &[], options)
    };
    let options = DependentSearch::default();
    overlay(path("closed"), "elsewhere/disk");
    let fails = |name: &str, kind| Probe { fails: Some((path(name), kind)), ..Probe::default() };
    for kind in [io::ErrorKind::PermissionDenied, io::ErrorKind::Other] {
        assert_eq!(unknown_file(find(fails("closed", kind), &options)), path("closed"));
        // The file that an image names, too: it may be the one that is sought.
        assert_eq!(unknown_file(find(fails("elsewhere/disk", kind), &options)), path("closed"));
        assert_eq!(unknown_file(find(fails("sub", kind), &options.clone().with_directory(path("sub")))), path("sub"));
    }
    assert_eq!(unknown_file(find(Probe::default(), &options.with_directory(path("none")))), path("none"));
    let denied = find(fails("closed", io::ErrorKind::PermissionDenied), &DependentSearch::default()).unwrap_err();
    assert_eq!(io::Error::from(denied).kind(), io::ErrorKind::PermissionDenied);
    assert!(find(fails("closed", io::ErrorKind::Other), &DependentSearch::disabled()).unwrap().is_empty());
}

#[test]
#[cfg(target_os = "linux")]
fn file_that_fails_while_it_is_read_is_an_error() {
    let dir = pool();
    let image = dir.path().join("image");
    symlink("/proc/self/mem", &image).unwrap();
    let base = [dir.path().join("base")];
    assert_eq!(unknown_file(find_dependents(&host(), &base, &[], &DependentSearch::default())), image);
}

#[test]
fn more_files_than_the_limit_are_refused_before_any_is_read() {
    let dir = pool();
    for index in 0..9 {
        overlay(dir.path().join(format!("image{index}")), "base");
    }
    overlay(dir.path().join("sub/image"), "../base");
    let find = |limit: usize| {
        let probe = Arc::new(Probe::default());
        let file_system: Arc<dyn FileSystem> = probe.clone();
        let options = DependentSearch::default().with_directory(dir.path().join("sub")).with_max_files(limit);
        let found = find_dependents(&file_system, &[dir.path().join("base")], &[], &options);
        (found, probe.opens.load(Ordering::Relaxed))
    };
    assert_eq!(find(11).0.unwrap().len(), 10);
    let (refused, opens) = find(10);
    let error = refused.unwrap_err();
    assert!(error.to_string().contains("--no-dependents") && error.to_string().contains("raise the limit"), "{error}");
    let Error::DependentsLimit { directory, found, limit } = error else { panic!("{error:?}") };
    assert_eq!((Path::new(&directory), found, limit, opens), (&*dir.path().join("sub"), 11, 10, 0));
}

/// The work of a search does not grow with the number of distinct names in a directory.
#[test]
fn large_directory_costs_one_open_and_one_read_for_each_file() {
    let dir = pool();
    let path = |index: usize| dir.path().join(format!("image{index:04}"));
    overlay(path(0), "base");
    for index in 1..1500 {
        let below = path(index - 1);
        match index % 3 {
            0 => overlay(path(index), dir.path().join("base").as_os_str().as_bytes()),
            1 => overlay(path(index), below.as_os_str().as_bytes()),
            _ => overlay(path(index), below.file_name().unwrap().as_bytes()),
        }
    }
    let probe = Arc::new(Probe::default());
    let file_system: Arc<dyn FileSystem> = probe.clone();
    let base = [dir.path().join("base")];
    let found = find_dependents(&file_system, &base, &[], &DependentSearch::default()).unwrap();
    let expected: Vec<_> = (0..1500).filter(|index| index % 3 == 0).map(path).collect();
    assert_eq!(found.into_iter().map(|found| found.image).collect::<Vec<_>>(), expected);
    assert_eq!(probe.opens.load(Ordering::Relaxed), 1501);
    assert_eq!(probe.reads.load(Ordering::Relaxed), 1501);
    let resolves = probe.resolves.load(Ordering::Relaxed);
    assert!(resolves <= 6, "{resolves} names were resolved");
}

#[test]
#[cfg(target_os = "linux")]
fn block_devices_are_read_in_named_directories_only() {
    let (dir, volumes) = (pool(), tempfile::tempdir().unwrap());
    let base = dir.path().join("base");
    let mut volume = header(base.as_os_str().as_bytes(), 0);
    volume.resize(1 << 20, 0);
    std::fs::write(volumes.path().join("volume"), volume).unwrap();
    let Some(device) = crate::devices::Loop::over(&volumes.path().join("volume")) else { return };
    let lv = dir.path().join("lv");
    symlink(&device.0, &lv).unwrap();
    assert!(over(&base).is_empty());
    let named = DependentSearch::default().with_directory(dir.path());
    assert_eq!(search(&base, &named), [ExternalDependent { image: lv, file: base.clone() }]);
    // An image over a device is found by the device, whichever of its nodes it names.
    let image = dir.path().join("image");
    overlay(&image, "lv");
    assert_eq!(search(&device.0, &named), [ExternalDependent { image, file: device.0.clone() }]);
}

/// A pool in memory with `base`, `middle` over it, and `clone` over `middle`.
fn memory_pool() -> Arc<MemoryFileSystem> {
    let files = Arc::new(MemoryFileSystem::new());
    for (name, below) in [("base", None), ("middle", Some("base")), ("top", Some("middle")), ("clone", Some("middle"))]
    {
        let storage = Arc::new(MemoryStorage::new(name));
        files.insert(Path::new("/pool").join(name), Arc::clone(&storage));
        let mut options = CreateOptions::new(1 << 20);
        if let Some(below) = below {
            options = options.with_backing(below, "qcow2");
        }
        Image::create(storage, &options).unwrap().close().unwrap();
    }
    files
}

#[test]
fn search_uses_the_file_system_of_the_caller() {
    let file_system: Arc<dyn FileSystem> = memory_pool();
    let files = ["/pool/base", "/pool/middle"].map(PathBuf::from);
    let own = [PathBuf::from("/pool/top"), files[0].clone(), files[1].clone()];
    let found = find_dependents(&file_system, &files, &own, &DependentSearch::default()).unwrap();
    assert_eq!(found, [ExternalDependent { image: "/pool/clone".into(), file: files[1].clone() }]);
}

#[test]
fn commit_searches_the_file_system_of_its_chain() {
    let files = memory_pool();
    let file_system: Arc<dyn FileSystem> = Arc::clone(&files) as _;
    let options = ChainOptions::default().beneath("/pool").with_writable(3);
    let chain = Chain::open_in(&file_system, Path::new("/pool/top"), &options).unwrap();
    let merge = CommitOptions::default().with_base(2).with_dependents_in("/pool");
    let Err(merge::Error::Dependents { file, dependents }) = commit(&chain, &merge, &()) else { panic!("not refused") };
    assert_eq!((&*file, &dependents[..]), ("/pool/middle", &[PathBuf::from("/pool/clone")][..]));
    files.unlink(Path::new("/pool/clone")).unwrap();
    commit(&chain, &merge, &()).unwrap();
}

/// A chain that the caller opened has no file system of its own: its paths are those of the host.
#[test]
fn commit_of_layers_searches_the_host() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    for (name, below) in [("base", None), ("top", Some("base")), ("clone", Some("base"))] {
        let storage = Arc::new(FileStorage::create_new(path(name)).unwrap());
        let options = CreateOptions::new(1 << 20);
        let options = below.map_or_else(|| options.clone(), |below| options.clone().with_backing(below, "qcow2"));
        Image::create(storage, &options).unwrap().close().unwrap();
    }
    let layer = |name: &str| {
        let storage = Arc::new(FileStorage::open(path(name), &Access::write()).unwrap());
        let image = Image::open(storage, &OpenOptions::default().with_write(true)).unwrap();
        Layer { node: Node::Qcow2(image), path: path(name) }
    };
    let chain = Chain::from_layers(layer("top"), [layer("base")]);
    let options = CommitOptions::default().with_dependents_in(dir.path());
    let Err(merge::Error::Dependents { dependents, .. }) = commit(&chain, &options, &()) else { panic!("not refused") };
    assert_eq!(dependents, [path("clone")]);
}

/// A failed call makes the search fail or changes nothing; it never shortens the result.
#[test]
fn failed_call_never_hides_a_dependent() {
    let inner: Arc<dyn FileSystem> = memory_pool();
    let files = [PathBuf::from("/pool/middle")];
    let expected = find_dependents(&inner, &files, &files, &DependentSearch::default()).unwrap();
    assert_eq!(expected.len(), 2);
    let mut failed = 0;
    for call in 0.. {
        let faults = Faults::new(Fault::Io.at(call));
        let file_system: Arc<dyn FileSystem> = Arc::new(FaultyFileSystem::new(Arc::clone(&inner), &faults));
        match find_dependents(&file_system, &files, &files, &DependentSearch::default()) {
            Ok(found) => assert_eq!(found, expected, "call {call}"),
            Err(Error::DependentsUnknown { .. }) => failed += 1,
            Err(error) => panic!("call {call}: {error:?}"),
        }
        if faults.calls() <= call {
            break;
        }
    }
    assert!(failed >= 10, "{failed} calls failed");
}

/// The host's files, with counted calls and one path that fails.
#[derive(Debug, Default)]
struct Probe {
    opens: AtomicUsize,
    resolves: AtomicUsize,
    reads: Arc<AtomicUsize>,
    fails: Option<(PathBuf, io::ErrorKind)>,
    /// Lists files without their types.
    untyped: bool,
}

impl Probe {
    fn check(&self, path: &Path) -> storage::Result<()> {
        match &self.fails {
            Some((failing, kind)) if failing == path => {
                Err(storage::Error::io(&path.display().to_string(), "look at it", 0, (*kind).into()))
            }
            _ => Ok(()),
        }
    }
}

impl FileSystem for Probe {
    fn open(&self, path: &Path, access: &Access) -> storage::Result<Arc<dyn Storage>> {
        self.opens.fetch_add(1, Ordering::Relaxed);
        self.check(path)?;
        Ok(Arc::new(CountedReads(HostFileSystem.open(path, access)?, Arc::clone(&self.reads))))
    }
    fn create_new(&self, path: &Path) -> storage::Result<Arc<dyn Storage>> {
        HostFileSystem.create_new(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> storage::Result<()> {
        HostFileSystem.rename(from, to)
    }
    fn unlink(&self, path: &Path) -> storage::Result<()> {
        HostFileSystem.unlink(path)
    }
    fn sync_dir(&self, directory: &Path) -> storage::Result<()> {
        HostFileSystem.sync_dir(directory)
    }
    fn list(&self, directory: &Path) -> storage::Result<Vec<PathBuf>> {
        self.check(directory)?;
        HostFileSystem.list(directory)
    }
    fn list_openable(&self, directory: &Path) -> storage::Result<Vec<ListedFile>> {
        self.check(directory)?;
        if self.untyped {
            let file = |path| ListedFile { path, link: false, block_device: false };
            return Ok(self.list(directory)?.into_iter().map(file).collect());
        }
        HostFileSystem.list_openable(directory)
    }
    fn exists(&self, path: &Path) -> storage::Result<bool> {
        HostFileSystem.exists(path)
    }
    fn resolve(&self, path: &Path) -> storage::Result<Resolved> {
        self.resolves.fetch_add(1, Ordering::Relaxed);
        self.check(path)?;
        HostFileSystem.resolve(path)
    }
}

/// A storage that counts its reads.
#[derive(Debug)]
struct CountedReads(Arc<dyn Storage>, Arc<AtomicUsize>);

impl Storage for CountedReads {
    fn name(&self) -> &str {
        self.0.name()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> storage::Result<()> {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.0.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> storage::Result<()> {
        self.0.write_at(buf, offset)
    }
    fn len(&self) -> storage::Result<u64> {
        self.0.len()
    }
    fn set_len(&self, len: u64) -> storage::Result<()> {
        self.0.set_len(len)
    }
    fn sync(&self) -> storage::Result<()> {
        self.0.sync()
    }
    fn is_fixed_size(&self) -> bool {
        self.0.is_fixed_size()
    }
    fn file_id(&self) -> Option<storage::FileId> {
        self.0.file_id()
    }
}
