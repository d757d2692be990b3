use std::sync::Arc;

use super::*;

const MIB: u64 = 1 << 20;

fn new_file() -> (tempfile::TempDir, FileStorage) {
    new_file_in(&std::env::temp_dir())
}

fn new_file_in(parent: &Path) -> (tempfile::TempDir, FileStorage) {
    let directory = tempfile::tempdir_in(parent).unwrap();
    let file = FileStorage::create_new(directory.path().join("image")).unwrap();
    (directory, file)
}

fn read(storage: &dyn Storage, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0xee; len];
    storage.read_at(&mut buf, offset).unwrap();
    buf
}

#[test]
fn file_reads_written_data_and_zeroes_past_the_end() {
    let (_directory, file) = new_file();
    assert!(file.is_empty().unwrap());
    file.write_at(b"hello", 1000).unwrap();
    assert_eq!(file.len().unwrap(), 1005);
    assert_eq!(read(&file, 998, 10), b"\0\0hello\0\0\0");
    assert_eq!(read(&file, 5000, 3), [0; 3]);
    assert_eq!(read(&file, u64::MAX - 1, 3), [0; 3]);
    file.read_at(&mut [], 7).unwrap();
    file.write_at(&[], 1 << 40).unwrap();
    file.sync().unwrap();
    assert!(matches!(file.write_at(b"x", u64::MAX), Err(Error::NoSpace { need: 1, .. })));
    assert!(matches!(file.write_at(b"xy", MAX_LEN - 1), Err(Error::NoSpace { need: 2, .. })));
}

#[test]
fn set_len_truncates_and_extends() {
    let (_directory, file) = new_file();
    file.write_at(&[7; 100], 0).unwrap();
    file.set_len(10).unwrap();
    file.set_len(MIB).unwrap();
    assert_eq!(file.len().unwrap(), MIB);
    assert_eq!(read(&file, 8, 4), [7, 7, 0, 0]);
    assert!(matches!(file.set_len(u64::MAX), Err(Error::NoSpace { .. })));
    assert!(!file.is_fixed_size());
}

#[test]
fn errors_name_path_and_action_and_keep_the_source() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("none");
    let error = FileStorage::open(&path, &Access::read()).unwrap_err();
    assert_eq!(error.to_string(), format!("{}: cannot open it", path.display()));
    let Error::Io { source, .. } = &error else { panic!("{error:?}") };
    assert_eq!(source.kind(), io::ErrorKind::NotFound);
    assert_eq!(io::Error::from(error).kind(), io::ErrorKind::NotFound);

    FileStorage::create_new(&path).unwrap();
    let error = FileStorage::create_new(&path).unwrap_err();
    assert_eq!(io::Error::from(error).kind(), io::ErrorKind::AlreadyExists);
}

#[test]
fn read_only_file_refuses_changes() {
    let (directory, file) = new_file();
    file.write_at(b"data", 0).unwrap();
    drop(file);
    let file = FileStorage::open(directory.path().join("image"), &Access::read()).unwrap();
    assert!(file.is_read_only());
    let refused = [
        file.write_at(b"x", 0),
        file.set_len(0),
        file.zero_range(0..1),
        file.punch_range(0..1),
        file.allocate_range(0..1),
        file.copy_from(&file, 0, 0, 1).map(|_| ()),
    ];
    for result in refused {
        assert!(matches!(result, Err(Error::ReadOnly { .. })), "{result:?}");
    }
    file.sync().unwrap();
    assert_eq!(read(&file, 0, 4), b"data");
}

#[test]
fn failed_sync_poisons_the_handle() {
    let (_directory, file) = new_file();
    file.write_at(b"data", 0).unwrap();
    file.poisoned.store(true, Ordering::Release);
    for result in [file.sync(), file.write_at(b"x", 0), file.set_len(0), file.zero_range(0..1)] {
        assert!(matches!(result, Err(Error::Poisoned { .. })), "{result:?}");
    }
    assert_eq!(read(&file, 0, 4), b"data");
}

#[cfg(unix)]
#[test]
fn only_files_and_block_devices_are_opened() {
    let directory = tempfile::tempdir().unwrap();
    let fifo = directory.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let socket = directory.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    // None of these may be waited for.
    for path in [fifo.as_path(), &socket, directory.path(), Path::new("/dev/zero")] {
        for access in [Access::read(), Access::write()] {
            let error = FileStorage::open(path, &access).unwrap_err();
            assert!(matches!(error, Error::Refused { .. }), "{error:?}");
        }
    }
}

#[cfg(target_os = "linux")]
#[test]
fn ranges_are_reserved_zeroed_and_released() {
    // A disk's file system, as a rule, and one of memory, which can do less.
    for parent in [&std::env::temp_dir(), Path::new("/dev/shm")].into_iter().filter(|parent| parent.is_dir()) {
        serves_ranges(&new_file_in(parent).1);
    }
}

#[cfg(target_os = "linux")]
fn serves_ranges(file: &FileStorage) {
    let mib = usize::try_from(MIB).unwrap();
    file.write_at(&vec![1; 4 * mib], 0).unwrap();
    file.sync().unwrap();
    let full = file.allocated_len().unwrap().unwrap();
    assert!(full >= 4 * MIB);

    // A supported operation takes effect. Others return that they are unsupported.
    match file.punch_range(MIB..2 * MIB) {
        Ok(()) => {
            assert_eq!(file.len().unwrap(), 4 * MIB);
            assert_eq!(read(file, MIB, mib), vec![0; mib]);
            assert!(file.allocated_len().unwrap().unwrap() <= full - MIB);
            assert_eq!(file.next_data(0).unwrap(), Some(0..MIB));
            assert_eq!(file.next_data(MIB + 5).unwrap(), Some(2 * MIB..4 * MIB));
            assert_eq!(file.next_data(3 * MIB).unwrap(), Some(3 * MIB..4 * MIB));
        }
        Err(error) => assert!(matches!(error, Error::Unsupported { .. }), "{error:?}"),
    }
    super::super::zero_range(file, 3 * MIB - 1..3 * MIB + 1).unwrap();
    assert_eq!(read(file, 3 * MIB - 2, 4), [1, 0, 0, 1]);
    super::super::zero_range(file, 4 * MIB - 1..4 * MIB + 1).unwrap();
    assert_eq!(file.len().unwrap(), 4 * MIB + 1);
    match file.allocate_range(5 * MIB..6 * MIB) {
        Ok(()) => assert_eq!(file.len().unwrap(), 6 * MIB),
        Err(error) => assert!(matches!(error, Error::Unsupported { .. }), "{error:?}"),
    }
    assert_eq!(file.next_data(u64::MAX).unwrap(), None);
    for result in [file.zero_range(7..7), file.punch_range(7..7), file.allocate_range(7..7)] {
        result.unwrap();
    }
    assert!(file.free_space().unwrap().is_some_and(|bytes| bytes > 0));
    // Reads go by position, wherever the search for data has left the file.
    assert_eq!(read(file, 0, 2), [1, 1]);
}

#[cfg(target_os = "linux")]
#[test]
fn copy_from_copies_within_the_kernel() {
    let (directory, source) = new_file();
    let target = FileStorage::create_new(directory.path().join("target")).unwrap();
    let bytes: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
    source.write_at(&bytes, 0).unwrap();
    match target.copy_from(&source, 1000, 500, 1 << 40) {
        Ok(copied) => {
            assert_eq!(copied, 399_000);
            assert_eq!(target.len().unwrap(), 399_500);
            assert_eq!(read(&target, 500, 399_000), bytes[1000..]);
            assert_eq!(target.copy_from(&source, 400_000, 0, 10).unwrap(), 0);
        }
        Err(error) => assert!(matches!(error, Error::Unsupported { .. }), "{error:?}"),
    }
    // Ranges of one file that overlap: the kernel will not, so the caller copies by itself.
    assert!(matches!(source.copy_from(&source, 0, 100, 1000), Err(Error::Unsupported { .. })));
    let memory = super::super::MemoryStorage::with_bytes("memory", vec![1; 10]);
    assert!(matches!(target.copy_from(&memory, 0, 0, 10), Err(Error::Unsupported { .. })));
}

#[cfg(unix)]
#[test]
fn file_id_is_equal_under_all_names() {
    let (directory, file) = new_file();
    let [link, other] = ["link", "other"].map(|name| directory.path().join(name));
    std::fs::hard_link(directory.path().join("image"), &link).unwrap();
    let unlocked = Access::read().with_lock(LockMode::None);
    let linked = FileStorage::open(&link, &unlocked).unwrap();
    let other = FileStorage::create_new(&other).unwrap();
    assert!(file.file_id().is_some());
    assert_eq!(file.file_id(), linked.file_id());
    assert_ne!(file.file_id(), other.file_id());
}

#[test]
fn threads_share_one_handle() {
    let (_directory, file) = new_file();
    let file = Arc::new(file);
    std::thread::scope(|scope| {
        for thread in 0..8_u8 {
            let file = Arc::clone(&file);
            scope.spawn(move || {
                for round in 0..64_u64 {
                    let at = (round * 8 + u64::from(thread)) * 512;
                    file.write_at(&[thread + 1; 512], at).unwrap();
                    assert_eq!(read(&*file, at, 512), [thread + 1; 512]);
                    file.next_data(at).unwrap();
                    if round % 16 == 0 {
                        file.sync().unwrap();
                    }
                }
            });
        }
    });
    for sector in 0..512_u64 {
        let byte = u8::try_from(sector % 8 + 1).unwrap();
        assert_eq!(read(&*file, sector * 512, 512), [byte; 512], "sector {sector}");
    }
}

/// Bytes that start so far behind a multiple of 4096 in memory.
struct Aligned(Vec<u8>, usize);

impl Aligned {
    fn new(len: usize, behind: usize, byte: u8) -> Self {
        let mut bytes = vec![byte; len + 3 * DIRECT_UNIT];
        let start = bytes.as_ptr().align_offset(DIRECT_UNIT) + behind;
        bytes.truncate(start + len);
        Self(bytes, start)
    }

    fn bytes(&self) -> &[u8] {
        &self.0[self.1..]
    }
}

/// Aligned or not, in the file, over its end and behind it: the reader sees what was written last,
/// by whichever way.
#[test]
fn bulk_write_equals_write() {
    let (directory, file) = new_file();
    let reader = FileStorage::open(directory.path().join("image"), &Access::read().with_lock(LockMode::None)).unwrap();
    let mut model = vec![1; 100_000];
    file.write_at(&model, 0).unwrap();
    let writes =
        [(0, 8192, 0), (4096, 65536, 0), (512, 4096, 0), (8192, 4096, 512), (8192, 5000, 0), (98_304, 8192, 0)];
    for (number, (at, len, behind)) in writes.into_iter().chain([(1 << 20, 4096, 0)]).enumerate() {
        assert_eq!(read(&reader, 0, model.len()), model, "the cache holds the old bytes");
        let byte = u8::try_from(number + 2).unwrap();
        file.write_bulk_at(Aligned::new(len, behind, byte).bytes(), at as u64).unwrap();
        model.resize(model.len().max(at + len), 0);
        model[at..at + len].fill(byte);
        // By the ordinary way, over a part of it.
        file.write_at(&[byte; 100], at as u64 + 1000).unwrap();
        assert_eq!(read(&reader, 0, model.len()), model, "write {number}");
        assert_eq!(read(&file, 0, model.len()), model, "write {number}");
    }
    file.sync().unwrap();
    file.will_not_need(0..u64::MAX);
    file.will_not_need(5..700_000);
    assert_eq!(read(&file, 0, model.len()), model);
    let refused = reader.write_bulk_at(Aligned::new(4096, 0, 9).bytes(), 0);
    assert!(matches!(refused, Err(Error::ReadOnly { .. })), "{refused:?}");
    let full = file.write_bulk_at(Aligned::new(4096, 0, 9).bytes(), MAX_LEN & !4095);
    assert!(matches!(full, Err(Error::NoSpace { .. })), "{full:?}");
    // Memory is not a file, whatever the file system.
    assert!(!file.prefers_copy_from(&crate::storage::MemoryStorage::new("memory")));
}

/// The file is found by its descriptor, whatever has become of its name.
#[test]
fn bulk_write_reaches_renamed_or_removed_file() {
    let (directory, file) = new_file();
    let path = directory.path().join("image");
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, b"somebody else's").unwrap();
    file.write_bulk_at(Aligned::new(4096, 0, 5).bytes(), 0).unwrap();
    assert_eq!(read(&file, 0, 4096), [5; 4096]);
    assert_eq!(std::fs::read(&path).unwrap(), b"somebody else's");
}

#[cfg(unix)]
#[test]
fn stamp_changes_with_content_metadata_and_identity() {
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    let (directory, file) = new_file();
    let path = directory.path().join("image");
    file.write_at(b"hello", 0).unwrap();
    // Times have the resolution of the kernel's clock tick, or of the file system.
    let set_modified = |seconds| {
        file.as_file().unwrap().set_modified(std::time::UNIX_EPOCH + Duration::new(seconds, 7)).unwrap();
    };
    set_modified(1_000);
    let stamp = file.stamp().unwrap().unwrap();
    assert_eq!((stamp.len, stamp.modified), (5, 1_000_000_000_007));
    assert_eq!(stamp.inode, file.file_id().unwrap().inode);
    assert!(stamp.changed > 1_000_000_000_007, "the change of the times is a change now");
    let reader = FileStorage::open(&path, &Access::read().with_lock(LockMode::None)).unwrap();
    read(&reader, 0, 5);
    assert_eq!(reader.stamp().unwrap(), Some(stamp), "reading changes nothing");
    let wrapped = crate::storage::ReadOnlyStorage::new(Arc::new(reader));
    assert_eq!(wrapped.stamp().unwrap(), Some(stamp));

    file.write_at(b"J", 0).unwrap();
    let written = file.stamp().unwrap().unwrap();
    assert!(written.modified > stamp.modified && written.len == 5);
    set_modified(1_000);
    std::thread::sleep(Duration::from_millis(20));
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let changed = file.stamp().unwrap().unwrap();
    assert!(changed.modified == stamp.modified && changed.changed > stamp.changed);

    let other = FileStorage::create_new(directory.path().join("other")).unwrap();
    assert_ne!(other.stamp().unwrap().unwrap().inode, stamp.inode);
}

#[cfg(target_os = "linux")]
#[test]
fn descriptors_left_falls_with_every_open_file() {
    const OPENED: u64 = 200;
    let before = crate::storage::descriptors_left().unwrap();
    let opened: Vec<_> = (0..OPENED).map_while(|_| File::open("/proc/self/stat").ok()).collect();
    assert_eq!(opened.len() as u64, OPENED);
    let after = crate::storage::descriptors_left().unwrap();
    // Tests on other threads open and close files meanwhile.
    assert!(before - after > OPENED / 2 && before - after < OPENED * 2, "{before} {after}");
}

#[cfg(feature = "json")]
#[test]
fn stamp_is_kept_in_json() {
    let stamp = FileStamp { inode: u64::MAX, len: 5, modified: i64::MIN, changed: -1 };
    let json = serde_json::to_string(&stamp).unwrap();
    assert_eq!(json, r#"{"inode":18446744073709551615,"len":5,"modified":-9223372036854775808,"changed":-1}"#);
    assert_eq!(serde_json::from_str::<FileStamp>(&json).unwrap(), stamp);
}
