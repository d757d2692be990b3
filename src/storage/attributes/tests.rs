//! Access rights of new files on real file systems. Most tests need root, which CI has.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;

use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Uid, geteuid, setfsgid, setfsuid};
use tempfile::TempDir;

use super::*;
use crate::storage::{Access, FileSystem, HostFileSystem, LockMode};

const USER: u32 = 64_055;
const GROUP: u32 = 64_056;
const DEFAULT_ACL: &str = "system.posix_acl_default";

fn is_root() -> bool {
    let root = geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: needs root");
    }
    root
}

/// Runs on a thread with its own umask, and as another user without privileges over files if one is
/// given.
fn on_thread<T: Send>(mask: u32, user: Option<u32>, run: impl FnOnce() -> T + Send) -> T {
    let run = || {
        unshare(CloneFlags::CLONE_FS).unwrap();
        umask(Mode::from_bits_truncate(mask));
        if let Some(user) = user {
            setfsgid(Gid::from_raw(user));
            setfsuid(Uid::from_raw(user));
        }
        run()
    };
    std::thread::scope(|scope| scope.spawn(run).join().unwrap())
}

/// A directory in which everybody may create files.
fn directory() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    std::fs::set_permissions(directory.path(), Permissions::from_mode(0o777)).unwrap();
    directory
}

fn model(directory: &TempDir, owner: u32, group: u32, mode: u32) -> File {
    let file = File::options().read(true).write(true).create_new(true).open(directory.path().join("model")).unwrap();
    fchown(&file, Some(owner), Some(group)).unwrap();
    file.set_permissions(Permissions::from_mode(mode)).unwrap();
    file
}

/// The value of an ACL with these entries (tag, permissions, id), which must be in the order of
/// their tags.
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut value = vec![2, 0, 0, 0];
    for (tag, permissions, id) in entries {
        value.extend(tag.to_le_bytes());
        value.extend(permissions.to_le_bytes());
        value.extend(id.to_le_bytes());
    }
    value
}

const NO_ID: u32 = u32::MAX;

/// Read and write for a named user, read for the group, mask `rw-`, nothing for others.
fn named_acl(user: u32) -> Vec<u8> {
    acl(&[
        (0x01, 6, NO_ID),
        (ACL_USER, 6, user),
        (ACL_GROUP_OBJ, 4, NO_ID),
        (ACL_MASK, 6, NO_ID),
        (ACL_OTHER, 0, NO_ID),
    ])
}

fn get(file: &File, name: &str) -> Option<Vec<u8>> {
    sys::xattr(file, OsStr::new(name)).unwrap()
}

fn set(file: &File, name: &str, value: &[u8]) {
    sys::set_xattr(file, OsStr::new(name), value).unwrap();
}

/// Owner, group and permissions.
fn rights(file: &File) -> (u32, u32, u32) {
    let metadata = file.metadata().unwrap();
    (metadata.uid(), metadata.gid(), metadata.mode() & 0o7777)
}

fn names(directory: &TempDir) -> Vec<PathBuf> {
    HostFileSystem.list(directory.path()).unwrap()
}

#[test]
fn owner_group_and_mode_are_copied_under_any_umask() {
    if !is_root() {
        return;
    }
    for mask in [0o000, 0o022, 0o077, 0o777] {
        for mode in [0o600, 0o640, 0o664, 0o444, 0o604] {
            let directory = directory();
            let model = model(&directory, USER, GROUP, mode);
            let new = directory.path().join("new");
            let created = on_thread(mask, None, || create(&new, &model, Attributes::Require)).unwrap();
            assert_eq!(rights(created.as_file().unwrap()), (USER, GROUP, mode), "umask {mask:o}");
            assert_eq!(created.lock_mode(), LockMode::Write);
            created.write_at(b"image", 0).unwrap();
        }
    }
}

#[test]
fn set_id_bits_are_not_copied() {
    if !is_root() {
        return;
    }
    let directory = directory();
    let model = model(&directory, USER, GROUP, 0o7750);
    let created = create(&directory.path().join("new"), &model, Attributes::Require).unwrap();
    assert_eq!(rights(created.as_file().unwrap()), (USER, GROUP, 0o750));
}

#[test]
fn acl_and_extended_attributes_are_copied() {
    if !is_root() {
        return;
    }
    let directory = directory();
    let model = model(&directory, USER, GROUP, 0o600);
    let copied: [(&str, &[u8]); 4] = [
        (ACL, &named_acl(1234)),
        ("user.note", b"a disk"),
        ("security.SMACK64", b"label"),
        ("trusted.origin", b"\0\xff"),
    ];
    // A program's capabilities: version 2, all sets empty.
    let mut capability = vec![0, 0, 0, 2];
    capability.resize(20, 0);
    let left_out: [(&str, &[u8]); 2] = [("security.capability", &capability), ("trusted.overlay.opaque", b"y")];
    for (name, value) in copied.iter().chain(&left_out) {
        set(&model, name, value);
    }
    assert_eq!(rights(&model).2, 0o660, "the mask is the group's permissions");
    for attributes in [Attributes::Require, Attributes::BestEffort] {
        let created = create(&directory.path().join(format!("{attributes:?}")), &model, attributes).unwrap();
        let file = created.as_file().unwrap();
        assert_eq!(rights(file), (USER, GROUP, 0o660));
        for (name, value) in &copied {
            assert_eq!(get(file, name).as_deref(), Some(*value), "{name}");
        }
        for (name, _) in &left_out {
            assert_eq!(get(file, name), None, "{name}");
        }
    }
}

#[test]
fn default_acl_of_the_directory_does_not_widen_access() {
    if !is_root() {
        return;
    }
    let directory = directory();
    let model = model(&directory, USER, GROUP, 0o640);
    let opened = File::open(directory.path()).unwrap();
    set(&opened, DEFAULT_ACL, &named_acl(1234));
    let inherits = File::create_new(directory.path().join("inherits")).unwrap();
    assert!(get(&inherits, ACL).is_some(), "the directory's default ACL is in effect");

    let created = create(&directory.path().join("new"), &model, Attributes::Require).unwrap();
    let file = created.as_file().unwrap();
    assert_eq!((rights(file), get(file, ACL)), ((USER, GROUP, 0o640), None));

    let other = named_acl(4321);
    set(&model, ACL, &other);
    let created = create(&directory.path().join("newer"), &model, Attributes::Require).unwrap();
    assert_eq!(get(created.as_file().unwrap(), ACL), Some(other));
}

/// After every step: no access for group and others before owner, group and label are right, and
/// never more than the model permits. The directory's default ACL grants more than the model.
#[test]
fn no_step_permits_more_than_the_model() {
    if !is_root() {
        return;
    }
    for model_acl in [None, Some(named_acl(1234))] {
        let directory = directory();
        let model = model(&directory, USER, GROUP, 0o640);
        if let Some(acl) = &model_acl {
            set(&model, ACL, acl);
        }
        set(&model, "security.SMACK64", b"label");
        set(&File::open(directory.path()).unwrap(), DEFAULT_ACL, &named_acl(4321));
        let permitted = rights(&model).2;
        let mut steps = Vec::new();
        let mut watch = |file: &File| {
            let (owner, group, mode) = rights(file);
            let right = (owner, group) == (USER, GROUP) && get(file, "security.SMACK64").is_some();
            assert_eq!(mode & !permitted & 0o077, 0, "mode {mode:o}");
            assert!(right || mode == 0o600, "mode {mode:o} of {owner}:{group}");
            // The mask of an inherited ACL is the group's permissions.
            assert!(mode & 0o070 == 0 || get(file, ACL) == model_acl, "mode {mode:o} with the inherited ACL");
            steps.push((owner, group, mode));
        };
        let new = directory.path().join("new");
        on_thread(0, None, || create_watched(&new, &model, Attributes::Require, &mut watch)).unwrap();
        assert_eq!(steps.len(), 6, "{steps:?}");
        assert_eq!(steps[0], (0, 0, 0o600), "as it was created");
        assert_eq!(steps[5], (USER, GROUP, permitted));
    }
}

#[test]
fn required_owner_that_cannot_be_set_leaves_no_file() {
    if !is_root() {
        return;
    }
    let directory = directory();
    let model = model(&directory, USER, GROUP, 0o664);
    let new = directory.path().join("new");
    let before = names(&directory);
    let error = on_thread(0o022, Some(7777), || create(&new, &model, Attributes::Require)).unwrap_err();
    assert_eq!(error.to_string(), format!("{}: cannot set group {GROUP} on a new file", new.display()));
    assert_eq!(io::Error::from(error).kind(), io::ErrorKind::PermissionDenied);
    fchown(&model, None, Some(7777)).unwrap();
    let error = on_thread(0o022, Some(7777), || create(&new, &model, Attributes::Require)).unwrap_err();
    assert!(error.to_string().ends_with(&format!("cannot set owner {USER} on a new file")), "{error}");
    assert_eq!(names(&directory), before);

    std::fs::write(&new, b"of somebody else").unwrap();
    assert!(matches!(create(&new, &model, Attributes::Require), Err(Error::Io { .. })), "the name is taken");
    assert_eq!(std::fs::read(&new).unwrap(), b"of somebody else");
}

#[test]
fn best_effort_never_permits_more_than_the_model() {
    if !is_root() {
        return;
    }
    for (mode, expected) in
        [(0o600, 0o600), (0o660, 0o600), (0o640, 0o600), (0o644, 0o644), (0o664, 0o644), (0o604, 0o600)]
    {
        let directory = directory();
        let model = model(&directory, USER, GROUP, mode);
        set(&model, "user.note", b"a disk");
        let new = directory.path().join("new");
        let created = on_thread(0, Some(7777), || create(&new, &model, Attributes::BestEffort)).unwrap();
        let file = created.as_file().unwrap();
        assert_eq!(rights(file), (7777, 7777, expected), "{mode:o}");
        // Attributes of users can be read only where the content can.
        assert_eq!(get(file, "user.note").is_some(), mode & 0o004 != 0, "{mode:o}");

        // The named user's rights cannot be kept: no user gets a right that the ACL denied.
        set(&model, ACL, &named_acl(1234));
        let newer = directory.path().join("newer");
        let created = on_thread(0, Some(7777), || create(&newer, &model, Attributes::BestEffort)).unwrap();
        let file = created.as_file().unwrap();
        assert_eq!((rights(file), get(file, ACL)), ((7777, 7777, 0o600), None));
    }
}

#[test]
fn check_reports_what_creation_would_and_leaves_nothing() {
    if !is_root() {
        return;
    }
    let directory = directory();
    let model = model(&directory, USER, GROUP, 0o640);
    set(&model, ACL, &named_acl(1234));
    let before = names(&directory);
    check(directory.path(), Some(&model)).unwrap();
    check(directory.path(), None).unwrap();
    let error = on_thread(0o022, Some(7777), || check(directory.path(), Some(&model))).unwrap_err();
    let text = format!("{}: cannot set group {GROUP} on a new file", directory.path().display());
    assert_eq!(error.to_string(), text);
    assert!(matches!(check(&directory.path().join("none"), Some(&model)), Err(Error::Io { .. })));
    std::fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    let error = on_thread(0o022, Some(7777), || check(directory.path(), None)).unwrap_err();
    assert_eq!(io::Error::from(error).kind(), io::ErrorKind::PermissionDenied);
    assert_eq!(names(&directory), before);
}

/// `/proc` has no files without a name, and cannot be written to.
#[test]
fn check_without_unnamed_files_looks_at_the_directory() {
    assert!(sys::open_unnamed(Path::new("/proc")).is_ok_and(|file| file.is_none()));
    let directory = directory();
    sys::check_writable(directory.path()).unwrap();
    if is_root() {
        std::fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
        assert!(on_thread(0, Some(7777), || sys::check_writable(directory.path())).is_err());
    }
}

#[test]
fn device_gives_owner_group_and_mode_without_execution() {
    let devices = HostFileSystem.list(Path::new("/dev")).unwrap();
    let access = Access::read().with_lock(LockMode::None);
    let device = devices.iter().find_map(|path| FileStorage::open(path, &access).ok().filter(Storage::is_fixed_size));
    let Some(device) = device.filter(|_| is_root()) else {
        eprintln!("SKIPPED: no block device that can be opened");
        return;
    };
    let directory = directory();
    let new = directory.path().join("new");
    let created = HostFileSystem.create_new_like(&new, &device, Attributes::Require).unwrap();
    let (owner, group, mode) = rights(device.as_file().unwrap());
    assert_eq!(rights(created.as_file().unwrap()), (owner, group, mode & 0o666));
    assert_eq!(device.stamp().unwrap(), None);
}

#[test]
fn model_without_a_file_gives_a_plain_new_file() {
    let directory = directory();
    let memory = crate::storage::MemoryStorage::new("memory");
    let new = directory.path().join("new");
    HostFileSystem.check_create_like(directory.path(), &memory).unwrap();
    let created: Arc<dyn Storage> = HostFileSystem.create_new_like(&new, &memory, Attributes::Require).unwrap();
    assert!(created.is_empty().unwrap());
    assert_eq!(names(&directory), [new]);
}

#[test]
fn attribute_names_are_selected_by_namespace() {
    let copied = |name: &str, device| is_copied(OsStr::new(name), device);
    for name in ["user.a", "trusted.a", "security.selinux", "security.imagine"] {
        assert!(copied(name, false), "{name}");
    }
    let left_out = [ACL, DEFAULT_ACL, "security.ima", "security.evm", "trusted.overlay.redirect", "btrfs.compression"];
    for name in left_out {
        assert!(!copied(name, false), "{name}");
    }
    assert!(copied("security.selinux", true) && !copied("user.a", true) && !copied("trusted.a", true));
}

/// A user as the two files see him.
#[derive(Clone, Copy, Debug)]
struct Person {
    owner: bool,
    group: bool,
}

fn access(mode: u32, person: Person) -> u32 {
    match person {
        Person { owner: true, .. } => mode >> 6 & 7,
        Person { group: true, .. } => mode >> 3 & 7,
        _ => mode & 7,
    }
}

#[test]
fn reduced_modes_permit_nobody_more_for_all_modes() {
    const BOTH: [bool; 2] = [false, true];
    for mode in 0..0o1000 {
        assert_eq!(reduced(mode, true, true), mode);
        for (same_owner, same_group) in [(false, true), (true, false), (false, false)] {
            let new = reduced(mode, same_owner, same_group);
            assert_eq!(new >> 6, mode >> 6);
            for (owner, old_group, new_group) in
                BOTH.iter().flat_map(|a| BOTH.iter().flat_map(move |b| BOTH.iter().map(move |c| (*a, *b, *c))))
            {
                // The process's own user is not asked for: he owns the file.
                let before = Person { owner, group: old_group };
                let group = if same_group { old_group } else { new_group };
                let after = Person { owner: owner && same_owner, group };
                let more = access(new, after) & !access(mode, before);
                assert_eq!(more, 0, "{mode:o} {new:o} {before:?} {after:?}");
            }
        }
    }
}

/// POSIX 1003.1e: the first entry that applies decides. A user of several groups with entries has
/// their union.
#[test]
fn modes_without_an_acl_permit_nobody_more() {
    for bits in 0..1_u32 << 15 {
        let of = |at: u32| u16::try_from(bits >> at & 7).unwrap();
        let (user, group, named_group, mask, others) = (of(0), of(3), of(6), of(9), of(12));
        let value = acl(&[
            (0x01, 6, NO_ID),
            (ACL_USER, user, 1),
            (ACL_GROUP_OBJ, group, NO_ID),
            (ACL_GROUP, named_group, 2),
            (ACL_MASK, mask, NO_ID),
            (ACL_OTHER, others, NO_ID),
        ]);
        let shown = 0o600 | u32::from(mask) << 3 | u32::from(others);
        let mode = without_acl(shown, &value);
        assert_eq!(mode & 0o700, 0o600);
        for (is_user, in_group, in_named) in (0..8).map(|person| (person & 1 != 0, person & 2 != 0, person & 4 != 0)) {
            let permitted = match (is_user, in_group, in_named) {
                (true, ..) => user & mask,
                (_, true, true) => (group | named_group) & mask,
                (_, true, false) => group & mask,
                (_, false, true) => named_group & mask,
                _ => others,
            };
            let new = access(mode, Person { owner: false, group: in_group });
            assert_eq!(new & !u32::from(permitted), 0, "{mode:o} {value:?}");
        }
    }
    let plain = acl(&[(0x01, 6, NO_ID), (ACL_GROUP_OBJ, 4, NO_ID), (ACL_OTHER, 4, NO_ID)]);
    assert_eq!(without_acl(0o644, &plain), 0o644);
    assert_eq!(without_acl(0o644, &[3, 0, 0, 0]), 0o600, "an unknown version");
    assert_eq!(without_acl(0o644, &plain[..plain.len() - 3]), 0o640, "a value that is cut off");
}

/// The mode permits reading to all; an entry of the ACL denies it to one user.
#[test]
fn best_effort_without_the_acl_keeps_its_denials() {
    if !is_root() {
        return;
    }
    let directory = directory();
    let model = model(&directory, USER, GROUP, 0o644);
    let denial = acl(&[
        (0x01, 6, NO_ID),
        (ACL_USER, 0, 1234),
        (ACL_GROUP_OBJ, 4, NO_ID),
        (ACL_MASK, 4, NO_ID),
        (ACL_OTHER, 4, NO_ID),
    ]);
    set(&model, ACL, &denial);
    assert_eq!(rights(&model).2, 0o644);
    let new = directory.path().join("new");
    let created = on_thread(0, Some(7777), || create(&new, &model, Attributes::BestEffort)).unwrap();
    assert_eq!(rights(created.as_file().unwrap()), (7777, 7777, 0o600));
}
