use std::os::unix::fs::FileTypeExt;

use super::*;

fn unlocked() -> Access {
    Access::read().with_lock(LockMode::None)
}

#[test]
fn names_are_created_renamed_listed_and_removed() {
    let directory = tempfile::tempdir().unwrap();
    let [a, b, sub] = ["a", "b", "sub"].map(|name| directory.path().join(name));
    std::fs::create_dir(&sub).unwrap();
    let created = HostFileSystem.create_new(&a).unwrap();
    created.write_at(b"image", 0).unwrap();
    assert!(HostFileSystem.exists(&a).unwrap() && !HostFileSystem.exists(&b).unwrap());
    assert!(!HostFileSystem.exists(&a.join("below a file")).unwrap());
    HostFileSystem.rename(&a, &b).unwrap();
    HostFileSystem.sync_dir(directory.path()).unwrap();
    std::os::unix::fs::symlink("nowhere", &a).unwrap();
    assert!(HostFileSystem.exists(&a).unwrap());
    assert_eq!(HostFileSystem.list(directory.path()).unwrap(), [a.clone(), b.clone()]);
    HostFileSystem.unlink(&a).unwrap();
    assert_eq!(HostFileSystem.open(&b, &unlocked()).unwrap().len().unwrap(), 5);
    HostFileSystem.sync_dir(Path::new("")).unwrap();
}

#[test]
fn entry_returns_the_kind_without_following_links() {
    let (_root, top) = tree();
    let entry = |path: PathBuf| HostFileSystem.entry(&path).unwrap();
    std::os::unix::fs::symlink("nowhere", top.join("dangling")).unwrap();
    for (name, kind) in [
        ("a/b/image", EntryKind::File),
        ("down/b/image", EntryKind::File),
        ("leaf", EntryKind::Link),
        ("dangling", EntryKind::Link),
        ("a", EntryKind::Other),
        ("none", EntryKind::Missing),
        ("none/image", EntryKind::Missing),
        ("a/b/image/below", EntryKind::Missing),
    ] {
        assert_eq!(entry(top.join(name)), kind, "{name}");
    }
    let socket = top.join("socket");
    let _socket = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    assert_eq!((entry(socket), entry("/dev/null".into())), (EntryKind::Other, EntryKind::Other));
    assert!(HostFileSystem.entry(&top.join("n".repeat(300))).is_err(), "neither there nor missing");
    let devices = HostFileSystem.list(Path::new("/dev")).unwrap();
    for device in devices {
        let is_block = std::fs::symlink_metadata(&device).is_ok_and(|found| found.file_type().is_block_device());
        assert_eq!(entry(device) == EntryKind::BlockDevice, is_block);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn device_tree_is_in_memory_and_other_directories_are_not() {
    let directory = tempfile::tempdir().unwrap();
    let in_memory = |path: &Path| HostFileSystem.is_memory_backed(path).unwrap();
    std::os::unix::fs::symlink("/dev", directory.path().join("link")).unwrap();
    assert!(in_memory(Path::new("/dev")) && in_memory(&directory.path().join("link")));
    assert!(!in_memory(directory.path()) && !in_memory(Path::new("")));
    // A mount of its own, whose content the administrator chose to keep in memory.
    if std::fs::read_to_string("/proc/self/mounts").unwrap().contains(" /dev/shm ") {
        assert!(!in_memory(Path::new("/dev/shm")));
    }
    assert!(HostFileSystem.is_memory_backed(&directory.path().join("none")).is_err());
}

/// Directories of `/proc` answer a sync with EINVAL, as some network file systems do.
#[cfg(target_os = "linux")]
#[test]
fn sync_dir_without_support_is_no_error() {
    let refused = std::fs::File::open("/proc").unwrap().sync_all().unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
    HostFileSystem.sync_dir(Path::new("/proc")).unwrap();
    assert!(HostFileSystem.sync_dir(Path::new("/proc/none")).is_err());
}

#[test]
fn errors_name_path_and_action() {
    let directory = tempfile::tempdir().unwrap();
    let [a, b] = ["a", "b"].map(|name| directory.path().join(name));
    let text = |error: Error| error.to_string();
    let renamed = text(HostFileSystem.rename(&a, &b).unwrap_err());
    assert_eq!(renamed, format!("{}: cannot rename it to {}", a.display(), b.display()));
    assert_eq!(text(HostFileSystem.unlink(&a).unwrap_err()), format!("{}: cannot remove it", a.display()));
    assert_eq!(text(HostFileSystem.list(&a).unwrap_err()), format!("{}: cannot list it", a.display()));
    assert!(text(HostFileSystem.sync_dir(&a).unwrap_err()).contains("make its names durable"));
}

/// Creates a directory `top` with `a/b/image` and links of all kinds, and `outside` beside it.
fn tree() -> (tempfile::TempDir, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let top = root.path().join("top");
    std::fs::create_dir_all(top.join("a/b")).unwrap();
    std::fs::create_dir_all(root.path().join("other/deep")).unwrap();
    std::fs::create_dir(root.path().join("other/top")).unwrap();
    std::fs::write(top.join("a/b/image"), b"inside").unwrap();
    std::fs::write(root.path().join("outside"), b"outside").unwrap();
    for (target, link) in [("../outside", "leaf"), ("..", "up"), ("a", "down"), ("/proc/self/fd", "magic")] {
        std::os::unix::fs::symlink(target, top.join(link)).unwrap();
    }
    std::os::unix::fs::symlink(&top, root.path().join("way")).unwrap();
    std::os::unix::fs::symlink(root.path().join("other/deep"), root.path().join("sideways")).unwrap();
    (root, top)
}

#[test]
fn beneath_refuses_every_way_out_of_the_directory() {
    let (root, top) = tree();
    let open = |path: PathBuf| HostFileSystem.open(&path, &unlocked().with_beneath(&top));
    for path in ["a/b/image", "a/../a/b/image", "./a//b/./image", "../top/a/b/image"] {
        assert_eq!(open(top.join(path)).unwrap().len().unwrap(), 6, "{path}");
    }
    let outside = [
        "../outside",
        "a/../../outside",
        "leaf",
        "up/outside",
        "up/top/a/b/image",
        "down/b/image",
        "magic/0",
        "a/../../../../../../../etc/passwd",
    ];
    for path in outside {
        let error = open(top.join(path)).unwrap_err();
        assert!(matches!(error, Error::Refused { .. }), "{path}: {error:?}");
    }
    for path in [root.path().join("outside"), PathBuf::from("/etc/passwd"), top.clone(), "outside".into()] {
        assert!(matches!(open(path.clone()), Err(Error::Refused { .. })), "{}", path.display());
    }
    let missing = open(top.join("a/none")).unwrap_err();
    assert_eq!(io::Error::from(missing).kind(), io::ErrorKind::NotFound);
    assert!(matches!(open(top.join("a")), Err(Error::Refused { .. })));
    // The path may pass through a sibling, unless a link there makes it mean another directory.
    assert!(open(root.path().join("other/../top/a/b/image")).is_ok());
    let error = open(root.path().join("sideways/../top/a/b/image")).unwrap_err();
    assert!(matches!(error, Error::Refused { .. }), "{error:?}");
}

#[test]
fn resolve_follows_links() {
    let (root, top) = tree();
    let plain = top.canonicalize().unwrap().join("a/b/image");
    let resolved = HostFileSystem.resolve(&root.path().join("way/down/../a/b/image")).unwrap();
    assert_eq!(resolved.path, plain);
    assert_eq!(resolved.file, HostFileSystem.open(&plain, &unlocked()).unwrap().file_id());
    assert!(HostFileSystem.resolve(&top.join("none")).is_err());
    assert_eq!(HostFileSystem.resolve(Path::new("")).unwrap().path, std::env::current_dir().unwrap());
}

#[test]
fn beneath_accepts_a_link_to_the_directory() {
    let (root, _top) = tree();
    let way = root.path().join("way");
    let access = unlocked().with_beneath(&way);
    assert!(HostFileSystem.open(&way.join("a/b/image"), &access).is_ok());
    assert!(HostFileSystem.open(&way.join("down/b/image"), &access).is_err());
    // The same directory, but the path does not begin with it.
    assert!(HostFileSystem.open(&root.path().join("top/a/b/image"), &access).is_err());
}

#[test]
fn beneath_holds_for_writers() {
    let (_root, top) = tree();
    let access = Access::write().with_lock(LockMode::None).with_beneath(&top);
    HostFileSystem.open(&top.join("a/b/image"), &access).unwrap().write_at(b"I", 0).unwrap();
    assert!(HostFileSystem.open(&top.join("leaf"), &access).is_err());
    assert!(HostFileSystem.open(&top.join("a"), &access).is_err());
}
