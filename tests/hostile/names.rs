//! Chains that somebody made to do harm: names that lead out, loops, things that are no images, numbers that are lies.
//!
//! The images are made by hand, byte by byte, as no tool would make them.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use qcow2_chain::chain::{Chain, ChainOptions, Error, Format, Policy, Remedy};
use qcow2_chain::format::GuestOffset;
use qcow2_chain::storage::LockMode;

/// The bytes of an empty qcow2 image of 1 MiB over a backing file.
fn image(backing: Option<&[u8]>, format: Option<&[u8]>) -> Vec<u8> {
    const CLUSTER: usize = 65536;
    let mut bytes = vec![0; 4 * CLUSTER];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, b"QFI\xfb");
    put(4, &3_u32.to_be_bytes());
    put(20, &16_u32.to_be_bytes());
    put(24, &(1_u64 << 20).to_be_bytes());
    put(36, &1_u32.to_be_bytes());
    put(40, &(3 * CLUSTER as u64).to_be_bytes());
    put(48, &(CLUSTER as u64).to_be_bytes());
    put(56, &1_u32.to_be_bytes());
    put(96, &4_u32.to_be_bytes());
    put(100, &104_u32.to_be_bytes());
    let mut at = 104;
    if let Some(format) = format {
        put(at, &0xe279_2aca_u32.to_be_bytes());
        put(at + 4, &u32::try_from(format.len()).unwrap().to_be_bytes());
        put(at + 8, format);
        at += 8 + format.len().next_multiple_of(8);
    }
    at += 8;
    if let Some(backing) = backing {
        put(8, &(at as u64).to_be_bytes());
        put(16, &u32::try_from(backing.len()).unwrap().to_be_bytes());
        put(at, backing);
    }
    put(CLUSTER, &(2 * CLUSTER as u64).to_be_bytes());
    for cluster in 0..4 {
        put(2 * CLUSTER + 2 * cluster, &1_u16.to_be_bytes());
    }
    bytes
}

/// A directory tree: `allowed`, where the images lie, and `secret` beside it.
struct VolumeFiles {
    root: tempfile::TempDir,
}

impl VolumeFiles {
    fn new() -> Self {
        let root = tempfile::tempdir().expect("a temporary directory");
        std::fs::create_dir(root.path().join("allowed")).expect("a directory");
        std::fs::write(root.path().join("secret"), image(None, None)).expect("a secret");
        Self { root }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn allowed(&self, name: &str) -> PathBuf {
        self.path("allowed").join(name)
    }

    /// Puts an image over this backing name into the allowed directory.
    fn over(&self, name: &str, backing: impl AsRef<Path>) -> PathBuf {
        let path = self.allowed(name);
        let backing = backing.as_ref().as_os_str().as_encoded_bytes();
        std::fs::write(&path, image(Some(backing), Some(b"qcow2"))).expect("an image");
        path
    }

    fn options(&self) -> ChainOptions {
        ChainOptions::default().beneath(self.path("allowed"))
    }

    /// The reason and remedy of a refusal; anything else fails the test.
    #[track_caller]
    fn refused(&self, path: &Path, options: &ChainOptions) -> (String, Remedy) {
        let start = Instant::now();
        let result = Chain::open(path, options);
        assert!(start.elapsed() < Duration::from_secs(5), "at once");
        match result {
            Err(Error::Refused { file, why, remedy, .. }) => {
                assert_eq!(file, path.display().to_string());
                (why, remedy)
            }
            other => panic!("not refused: {other:?}"),
        }
    }
}

#[test]
fn the_images_made_here_are_sound() {
    let place = VolumeFiles::new();
    let base = place.allowed("base");
    std::fs::write(&base, image(None, None)).expect("an image");
    let top = place.over("top", "base");
    let chain = Chain::open(&top, &place.options()).expect("opened");
    assert_eq!(chain.layers().len(), 2);
    assert_eq!(chain.layers()[1].path, base);
    assert_eq!(chain.virtual_size(), 1 << 20);
    let mut buf = [1; 512];
    chain.read_at(&mut buf, GuestOffset::ZERO).expect("read");
    assert_eq!(buf, [0; 512]);
    if let Some(qemu) = crate::support::qemu::Qemu::find() {
        qemu.assert_clean(&top);
    }
}

#[test]
fn nothing_is_followed_by_default() {
    let place = VolumeFiles::new();
    std::fs::write(place.allowed("base"), image(None, None)).expect("an image");
    let top = place.over("top", "base");
    let (_, remedy) = place.refused(&top, &ChainOptions::default());
    let directory = place.path("allowed").canonicalize().expect("a directory");
    assert_eq!(remedy, Remedy::Beneath(directory.clone()));
    Chain::open(&top, &ChainOptions::default().beneath(directory)).expect("the remedy helps");
    Chain::open(place.allowed("base"), &ChainOptions::default()).expect("nothing to follow");
}

#[test]
fn protocols_are_never_followed() {
    let place = VolumeFiles::new();
    for name in [
        "json:{\"driver\":\"file\",\"filename\":\"/etc/passwd\"}",
        "nbd:localhost:10809",
        "nbd+unix:///x?socket=/tmp/s",
        "http://localhost/x",
        "file:base",
        "fat:rw:/etc",
        "x y:z",
        ":base",
    ] {
        // A file of that very name changes nothing.
        if !name.contains('/') {
            std::fs::write(place.allowed(name), image(None, None)).expect("an image");
        }
        let top = place.over("top", name);
        for policy in [Policy::Refuse, Policy::Any, Policy::Beneath(vec![place.path("allowed")])] {
            let (why, remedy) = place.refused(&top, &ChainOptions::default().with_policy(policy));
            assert_eq!((why.as_str(), remedy), ("it names a protocol, not a file", Remedy::Never), "{name}");
        }
    }
    std::fs::write(place.allowed("a:b"), image(None, None)).expect("an image");
    let top = place.over("top", "./a:b");
    Chain::open(&top, &place.options()).expect("a colon behind a slash is no protocol");
}

#[test]
fn odd_names_are_refused() {
    let place = VolumeFiles::new();
    for policy in [Policy::Any, Policy::Beneath(vec![place.path("allowed")]), Policy::List(vec![place.path("secret")])]
    {
        let options = ChainOptions::default().with_policy(policy);
        let top = place.over("top", Path::new("secret\0x"));
        assert_eq!(place.refused(&top, &options).1, Remedy::Never);
    }
}

#[test]
fn names_that_are_not_unicode_are_names() {
    use std::os::unix::ffi::OsStrExt;
    let place = VolumeFiles::new();
    let name = std::ffi::OsStr::from_bytes(b"b\xe4se");
    std::fs::write(place.path("allowed").join(name), image(None, None)).expect("an image");
    let chain = Chain::open(place.over("top", name), &place.options()).expect("opened");
    assert_eq!(chain.layers()[1].path, place.path("allowed").join(name));
    assert!(chain.describe().expect("described").to_string().contains("b\u{fffd}se"));
}

#[test]
fn names_do_not_leave_the_directory() {
    let place = VolumeFiles::new();
    std::fs::create_dir(place.allowed("sub")).expect("a directory");
    let secret = place.path("secret");
    for name in [
        secret.clone(),
        "../secret".into(),
        "sub/../../secret".into(),
        "./../secret".into(),
        "/etc/passwd".into(),
        place.allowed("../secret"),
        place.allowed("sub/../../secret"),
        format!("../../../../../../../../../../../..{}", secret.display()).into(),
    ] {
        let top = place.over("top", &name);
        place.refused(&top, &place.options());
    }
    let top = place.over("top", "../secret");
    let (_, remedy) = place.refused(&top, &place.options());
    let directory = place.root.path().canonicalize().expect("a directory");
    assert_eq!(remedy, Remedy::Beneath(directory.clone()));
    Chain::open(&top, &ChainOptions::default().beneath(directory)).expect("the remedy helps");
}

#[test]
fn names_within_the_directory_are_followed() {
    let place = VolumeFiles::new();
    std::fs::create_dir(place.allowed("sub")).expect("a directory");
    std::fs::write(place.allowed("base"), image(None, None)).expect("an image");
    for name in ["base".into(), "./base".into(), "sub/../base".into(), "../allowed/base".into(), place.allowed("base")]
    {
        let top = place.over("top", &name);
        Chain::open(&top, &place.options()).unwrap_or_else(|error| panic!("{}: {error}", name.display()));
    }
    // From a directory further down, and by an image that is reached through a link: the caller may name what he likes.
    std::fs::write(place.allowed("sub/top"), image(Some(b"../base"), Some(b"qcow2"))).expect("an image");
    Chain::open(place.allowed("sub/top"), &place.options()).expect("up, but not out");
    symlink(place.path("allowed"), place.path("alias")).expect("a link");
    let aliased = ChainOptions::default().beneath(place.path("alias"));
    place.over("top", "base");
    for top in [place.path("alias/top"), place.allowed("top")] {
        for options in [&aliased, &place.options()] {
            Chain::open(&top, options).unwrap_or_else(|error| panic!("{}: {error}", top.display()));
        }
    }
    let none = ChainOptions::default().with_policy(Policy::Beneath(Vec::new()));
    place.refused(&place.allowed("top"), &none);
    let several = Policy::Beneath(vec![place.path("nowhere"), place.allowed("sub"), place.path("allowed")]);
    Chain::open(place.allowed("top"), &ChainOptions::default().with_policy(several)).expect("the last one allows it");
}

#[test]
fn links_are_not_followed_beneath_a_directory() {
    let place = VolumeFiles::new();
    std::fs::write(place.allowed("base"), image(None, None)).expect("an image");
    symlink(place.path("secret"), place.allowed("out")).expect("a link");
    symlink("base", place.allowed("in")).expect("a link");
    symlink(place.root.path(), place.allowed("dir")).expect("a link");
    for name in ["out", "in", "dir/secret", "dir/allowed/base"] {
        place.refused(&place.over("top", name), &place.options());
    }
    let (_, remedy) = place.refused(&place.over("top", "in"), &place.options());
    let Remedy::List(file) = remedy else { panic!("{remedy:?}") };
    let list = ChainOptions::default().with_policy(Policy::List(vec![file]));
    Chain::open(place.allowed("top"), &list).expect("the remedy helps");
}

#[test]
fn magic_links_are_not_followed() {
    use std::os::fd::AsRawFd;
    let place = VolumeFiles::new();
    let held = std::fs::File::open(place.path("secret")).expect("opened");
    let name = format!("/proc/self/fd/{}", held.as_raw_fd());
    let top = place.over("top", &name);
    place.refused(&top, &place.options());
    place.refused(&top, &ChainOptions::default().beneath("/proc"));
    place.refused(&top, &ChainOptions::default().with_policy(Policy::List(vec![place.allowed("top2")])));
}

#[test]
fn a_list_allows_files_by_whatever_name() {
    let place = VolumeFiles::new();
    let base = place.path("base");
    std::fs::write(&base, image(None, None)).expect("an image");
    symlink(&base, place.allowed("soft")).expect("a link");
    std::fs::hard_link(&base, place.allowed("hard")).expect("a link");
    let options = ChainOptions::default().with_policy(Policy::List(vec![place.path("nowhere"), base.clone()]));
    for name in [base, "../base".into(), "soft".into(), "hard".into(), "./../allowed/../base".into()] {
        let top = place.over("top", &name);
        Chain::open(&top, &options).unwrap_or_else(|error| panic!("{}: {error}", name.display()));
    }
    for name in ["../secret", "nowhere", "top"] {
        place.refused(&place.over("top", name), &options);
    }
}

#[test]
fn only_files_are_opened() {
    let place = VolumeFiles::new();
    let fifo = place.allowed("fifo");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status();
    assert!(made.is_ok_and(|status| status.success()));
    std::fs::create_dir(place.allowed("dir")).expect("a directory");
    let socket = std::os::unix::net::UnixListener::bind(place.allowed("socket")).expect("a socket");
    for name in ["fifo", "dir", "socket", ".", "/dev/null", "/dev/zero", "/dev/tty"] {
        for policy in [
            Policy::Any,
            Policy::Beneath(vec![place.path("allowed"), "/dev".into()]),
            Policy::List(vec![place.allowed(name), name.into()]),
        ] {
            let top = place.over("top", name);
            let start = Instant::now();
            let result = Chain::open(&top, &ChainOptions::default().with_policy(policy));
            assert!(start.elapsed() < Duration::from_secs(5), "{name} hangs");
            assert!(matches!(result, Err(Error::Refused { .. } | Error::Storage(_))), "{name}: {result:?}");
        }
    }
    drop(socket);
    // The top is no better.
    for path in [fifo, place.allowed("dir"), "/dev/zero".into()] {
        let options = ChainOptions::default().with_format(Format::Raw);
        assert!(Chain::open(&path, &options).is_err(), "{}", path.display());
    }
}

#[track_caller]
fn looped(path: &Path, options: &ChainOptions) {
    for options in [options.clone(), options.clone().with_writable(1), options.clone().with_lock(LockMode::None)] {
        let result = Chain::open(path, &options);
        assert!(matches!(result, Err(Error::Loop { .. })), "{}: {result:?}", path.display());
    }
}

#[test]
fn loops_are_found() {
    let place = VolumeFiles::new();
    let any = ChainOptions::default().with_policy(Policy::Any);
    let itself = place.over("itself", "itself");
    looped(&itself, &place.options());
    looped(&itself, &any);
    let one = place.over("one", "two");
    place.over("two", "one");
    looped(&one, &place.options());
    looped(&one, &any);
    let soft = place.over("soft", "link");
    symlink("soft", place.allowed("link")).expect("a link");
    looped(&soft, &any);
    let hard = place.over("hard", "twin");
    std::fs::hard_link(&hard, place.allowed("twin")).expect("a link");
    looped(&hard, &any);
    looped(&hard, &place.options());
    let listed = ChainOptions::default().with_policy(Policy::List(vec![hard.clone(), place.allowed("twin")]));
    looped(&hard, &listed);
}

#[test]
fn a_chain_without_end_is_cut() {
    let place = VolumeFiles::new();
    for index in 0..20 {
        place.over(&index.to_string(), (index + 1).to_string());
    }
    let result = Chain::open(place.allowed("0"), &place.options().with_max_depth(10));
    assert!(matches!(&result, Err(Error::Depth { limit: 10, .. })), "{result:?}");
}

#[test]
fn formats_are_not_guessed() {
    let place = VolumeFiles::new();
    std::fs::write(place.allowed("base"), image(None, None)).expect("an image");
    std::fs::write(place.allowed("plain"), vec![5; 65536]).expect("a raw image");
    let with = |backing: &str, format: Option<&[u8]>| {
        let path = place.allowed("top");
        std::fs::write(&path, image(Some(backing.as_bytes()), format)).expect("an image");
        path
    };
    let result = Chain::open(with("base", None), &place.options());
    assert!(matches!(&result, Err(Error::UnknownFormat { .. })), "{result:?}");
    for (name, format) in [("base", Format::Qcow2), ("plain", Format::Raw)] {
        let chain = Chain::open(with(name, None), &place.options().with_probe(true)).expect("probed");
        assert_eq!(chain.layers()[1].format(), format);
    }
    for format in [&b"vmdk"[..], b"", b"QCOW2", b"qcow2\0", b"\xff"] {
        let result = Chain::open(with("base", Some(format)), &place.options().with_probe(true));
        assert!(matches!(&result, Err(Error::UnsupportedFormat { .. } | Error::Image(_))), "{format:?}: {result:?}");
    }
    // What is recorded as raw stays raw, whatever the guest wrote into it.
    place.over("base", "/etc/passwd");
    let chain = Chain::open(with("base", Some(b"raw")), &place.options().with_probe(true)).expect("opened");
    assert_eq!((chain.layers().len(), chain.layers()[1].format()), (2, Format::Raw));
    let result = Chain::open(with("plain", Some(b"qcow2")), &place.options());
    assert!(matches!(&result, Err(Error::Image(_))), "{result:?}");
    // A policy's refusal is the worse news.
    let top = with("../secret", None);
    place.refused(&top, &ChainOptions::default());
}

#[test]
fn what_is_not_there_is_named() {
    let place = VolumeFiles::new();
    let top = place.over("top", "gone");
    let error = Chain::open(&top, &place.options()).expect_err("it is not there");
    assert!(error.to_string().contains("gone"), "{error}");
    assert_eq!(std::io::Error::from(error).kind(), std::io::ErrorKind::NotFound);
}

/// Cluster bits and L1 sizes for [`claim`].
const CLAIMS: [(u32, u32); 6] = [(9, u32::MAX), (16, 1), (16, 1 << 22), (21, 1 << 17), (21, 1 << 22), (21, 1)];

/// A file of 1 KiB that claims a disk of 2^56 bytes.
fn claim(cluster_bits: u32, l1_size: u32) -> Vec<u8> {
    let mut bytes = image(None, None);
    bytes.truncate(1024);
    bytes[20..24].copy_from_slice(&cluster_bits.to_be_bytes());
    bytes[24..32].copy_from_slice(&(1_u64 << 56).to_be_bytes());
    bytes[36..40].copy_from_slice(&l1_size.to_be_bytes());
    bytes[40..48].copy_from_slice(&(3_u64 << cluster_bits).to_be_bytes());
    bytes[48..56].copy_from_slice(&(1_u64 << cluster_bits).to_be_bytes());
    bytes
}

/// A file of 1 KiB that claims a disk of 2^56 bytes: it opens or fails at once, and nothing that is done with it takes
/// memory or time by its claims.
#[test]
fn a_small_file_with_a_large_claim() {
    let place = VolumeFiles::new();
    for (cluster_bits, l1_size) in CLAIMS {
        let path = place.allowed("claim");
        std::fs::write(&path, claim(cluster_bits, l1_size)).expect("an image");
        let start = Instant::now();
        if let Ok(chain) = Chain::open(&path, &place.options()) {
            let mut buf = [1; 4096];
            let _ = chain.read_at(&mut buf, GuestOffset::new((1 << 56) - 4096));
            let _ = chain.extents(0..u64::MAX).take(1000).collect::<Vec<_>>();
            let _ = chain.describe();
        }
        assert!(start.elapsed() < Duration::from_secs(5), "{cluster_bits} {l1_size}");
    }
}

/// What the program does with such files fits into an address space of 64 MiB, its own code and stack included; with libvirt's C
/// libraries, which are mapped before it begins, of 320 MiB.
#[cfg(all(feature = "cli", target_os = "linux"))]
#[test]
fn large_claims_fit_into_64_mib() {
    let place = VolumeFiles::new();
    let limit = if cfg!(feature = "libvirt") { 320 << 10 } else { 64 << 10 };
    let limited = format!("ulimit -v {limit}; exec \"$0\" \"$@\"");
    for (cluster_bits, l1_size) in CLAIMS {
        let path = place.allowed("claim");
        std::fs::write(&path, claim(cluster_bits, l1_size)).expect("an image");
        for verb in ["info", "check", "map", "chain", "dump"] {
            let mut shell = std::process::Command::new("sh");
            shell.args(["-c", &limited, env!("CARGO_BIN_EXE_qcow2-chain"), verb]);
            let out = shell.arg(&path).output().expect("the program runs");
            // An exit code, not a signal: an allocation that failed would have aborted it.
            let said = String::from_utf8_lossy(&out.stderr);
            assert!(
                out.status.code().is_some_and(|code| code <= 3 || code == 63),
                "{verb} {cluster_bits} {l1_size}: {said}"
            );
            assert!(out.status.success() || !said.trim().is_empty(), "{verb} fails without a word");
        }
    }
}
