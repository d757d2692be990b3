//! The program beside `qemu-img`: the same command line on the same images must give the same text on standard output
//! and the same exit code.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::support::qemu::{Qemu, Run};

/// A directory of images that both programs work on, with paths relative to it.
struct Lab {
    qemu: Qemu,
    dir: tempfile::TempDir,
}

impl Lab {
    /// An empty one, or `None` without qemu tools.
    fn new() -> Option<Self> {
        Some(Self { qemu: Qemu::find()?, dir: tempfile::tempdir().expect("a temporary directory") })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn start(&self, program: &str, args: &[&str]) -> Run {
        let mut command = Command::new(program);
        let output = command.args(args).current_dir(self.dir.path()).stdin(Stdio::null()).output();
        let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
        Run {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    fn ours(&self, args: &[&str]) -> Run {
        let run = self.start(env!("CARGO_BIN_EXE_qcow2-chain"), args);
        assert!(!run.stderr.contains("panicked"), "{args:?}: {}", run.stderr);
        run
    }

    fn theirs(&self, args: &[&str]) -> Run {
        self.start("qemu-img", args)
    }

    /// `qemu-img` for building, which must succeed.
    fn make(&self, args: &str) {
        let args: Vec<&str> = args.split_whitespace().collect();
        let run = self.theirs(&args);
        assert_eq!(run.code, 0, "qemu-img {args:?}: {}", run.stderr);
    }

    fn io(&self, image: &str, commands: &[&str]) {
        self.qemu.io(&self.path(image), commands);
    }

    fn patch(&self, image: &str, offset: u64, bytes: &[u8]) {
        use std::os::unix::fs::FileExt as _;
        let file = std::fs::File::options().write(true).open(self.path(image)).expect("the image opens");
        file.write_all_at(bytes, offset).expect("the image is patched");
    }

    /// Makes all images durable: until then a file system may still change its mind about what they occupy.
    fn settle(&self) {
        let mut folders = vec![self.dir.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).expect("a directory").flatten() {
                if entry.path().is_dir() {
                    folders.push(entry.path());
                } else {
                    std::fs::File::open(entry.path()).and_then(|file| file.sync_all()).expect("the image is durable");
                }
            }
        }
    }

    /// Both programs on images that neither changes.
    fn agree(&self, line: &str) -> Run {
        let args: Vec<&str> = line.split_whitespace().collect();
        let (ours, theirs) = (self.ours(&args), self.theirs(&args));
        assert_same(line, &ours, &theirs);
        ours
    }

    /// Both programs, each on copies of its own of the named images, which are as before afterwards. Returns where the
    /// results of our program and of theirs lie.
    fn agree_changing(&self, line: &str, images: &[&str]) -> [PathBuf; 2] {
        let args: Vec<&str> = line.split_whitespace().collect();
        let mut results = Vec::new();
        let mut runs = Vec::new();
        for (side, program) in [("ours", env!("CARGO_BIN_EXE_qcow2-chain")), ("theirs", "qemu-img")] {
            let kept = self.path(side);
            let _ = std::fs::remove_dir_all(&kept);
            std::fs::create_dir(&kept).expect("a directory for copies");
            for image in images.iter().filter(|image| self.path(image).exists()) {
                copy(&self.path(image), &kept.join(image));
            }
            let inner = Command::new(program).args(&args).current_dir(&kept).stdin(Stdio::null()).output();
            let output = inner.expect("the program starts");
            runs.push(Run {
                code: output.status.code().unwrap_or(-1),
                stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
                stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            });
            results.push(kept);
        }
        assert_same(line, &runs[0], &runs[1]);
        [results.remove(0), results.remove(0)]
    }
}

/// Copies a file with its holes: what it occupies is part of the output.
fn copy(from: &Path, to: &Path) {
    let status = Command::new("cp").arg("--sparse=always").arg(from).arg(to).status();
    assert!(status.is_ok_and(|status| status.success()), "cp {}", from.display());
}

#[track_caller]
fn assert_same(line: &str, ours: &Run, theirs: &Run) {
    assert!(
        ours.stdout == theirs.stdout && ours.code == theirs.code,
        "{line}\n--- ours: exit {}\n{}{}\n--- qemu-img: exit {}\n{}{}",
        ours.code,
        ours.stdout,
        ours.stderr,
        theirs.code,
        theirs.stdout,
        theirs.stderr
    );
}

/// A zoo of images: geometries, contents, chains. All that is in it is read the same by both programs.
fn zoo(lab: &Lab) -> Vec<&'static str> {
    let shapes = [
        ("plain.q", "", "1M"),
        ("v2.q", "-o compat=0.10", "1M"),
        ("small.q", "-o cluster_size=512", "300k"),
        ("large.q", "-o cluster_size=2M,refcount_bits=64", "5G"),
        ("ext.q", "-o extended_l2=on,cluster_size=128k,compression_type=zstd", "1000001"),
        ("narrow.q", "-o refcount_bits=1,lazy_refcounts=on", "8M"),
        ("meta.q", "-o preallocation=metadata", "1M"),
        ("falloc.q", "-o preallocation=falloc", "1M"),
        ("full.q", "-o preallocation=full,cluster_size=4k", "1M"),
        ("none.q", "", "0"),
    ];
    for (name, options, size) in shapes {
        lab.make(&format!("create -q -f qcow2 {options} {name} {size}"));
    }
    for name in ["v2.q", "small.q", "large.q", "ext.q", "narrow.q", "meta.q"] {
        lab.io(name, &["write -P 1 3k 70k", "write -P 2 200k 10k"]);
    }
    for name in ["small.q", "ext.q", "meta.q"] {
        lab.io(name, &["write -z 64k 32k", "write -P 0 128k 4k", "discard 4k 8k"]);
    }
    lab.io("ext.q", &["write -c -P 7 256k 128k", "write -c -P 8 512k 128k", "discard 140k 20k"]);
    lab.io("large.q", &["write -P 7 4G 3M", "write -c -P 8 512M 2M"]);

    lab.make("create -q -f qcow2 snap.q 4M");
    lab.io("snap.q", &["write -P 1 0 256k"]);
    lab.make("snapshot -c first snap.q");
    lab.io("snap.q", &["write -P 2 128k 256k"]);
    lab.make("snapshot -c a-name-that-is-longer-than-its-column-ü snap.q");
    lab.make("create -q -f qcow2 bits.q 4M");
    lab.make("bitmap --add bits.q b0");
    lab.make("bitmap --add -g 1M bits.q b1");
    lab.make("bitmap --disable bits.q b1");
    lab.io("bits.q", &["write -P 1 0 256k"]);
    chains(lab);
    lab.settle();
    vec![
        "plain.q",
        "v2.q",
        "small.q",
        "large.q",
        "ext.q",
        "narrow.q",
        "meta.q",
        "falloc.q",
        "full.q",
        "none.q",
        "snap.q",
        "bits.q",
        "base.q",
        "mid.q",
        "top.q",
        "deep/er/top.q",
        "onraw.q",
    ]
}

fn chains(lab: &Lab) {
    lab.make("create -q -f qcow2 base.q 2M");
    lab.io("base.q", &["write -P 1 0 512k", "write -z 1M 64k"]);
    lab.make("create -q -f qcow2 -b base.q -F qcow2 -o cluster_size=16k mid.q 3M");
    lab.io("mid.q", &["write -P 2 256k 300k", "write -z 0 16k", "discard 512k 32k"]);
    lab.make("create -q -f qcow2 -b ./mid.q -F qcow2 -o extended_l2=on top.q 4M");
    lab.io("top.q", &["write -P 3 300k 7k", "write -P 3 3500k 7k"]);
    std::fs::create_dir_all(lab.path("deep/er")).expect("directories");
    copy(&lab.path("base.q"), &lab.path("deep/er/base.q"));
    lab.make("create -q -f qcow2 -b base.q -F qcow2 deep/er/top.q");
    lab.io("deep/er/top.q", &["write -P 2 100k 64k"]);
    let raw: Vec<u8> = [vec![0; 300_000], vec![5; 5000], vec![0; 695_001]].concat();
    std::fs::write(lab.path("flat"), raw).expect("a raw image");
    let status = Command::new("fallocate").arg("--dig-holes").arg(lab.path("flat")).status();
    assert!(status.is_ok_and(|status| status.success()), "holes in a raw image");
    lab.make("create -q -f qcow2 -b flat -F raw onraw.q 4M");
    lab.io("onraw.q", &["write -P 2 2M 64k"]);
}

#[test]
fn info_says_the_same() {
    let Some(lab) = Lab::new() else { return };
    let images = zoo(&lab);
    for image in &images {
        lab.agree(&format!("info {image}"));
        lab.agree(&format!("info --output=json {image}"));
        lab.agree(&format!("info --backing-chain -U -f qcow2 {image}"));
        lab.agree(&format!("info --backing-chain --output json {image}"));
    }
    lab.agree("info -f raw flat");
    lab.agree("info -f raw --output=json plain.q");
    for broken in
        ["info nothing.q", "info", "info --nonsense plain.q", "info -f qcow2 flat", "info --output=xml plain.q"]
    {
        assert_eq!(lab.agree(broken).code, 1, "{broken}");
    }
}

#[test]
fn info_of_unusual_images() {
    let Some(lab) = Lab::new() else { return };
    lab.make("create -q -f qcow2 plain.q 1M");
    for (bits, name) in [(1, "dirty.q"), (2, "corrupt.q"), (3, "both.q")] {
        copy(&lab.path("plain.q"), &lab.path(name));
        lab.patch(name, 79, &[bits]);
        lab.settle();
        lab.agree(&format!("info {name}"));
        lab.agree(&format!("info --output=json {name}"));
    }
    // A snapshot whose extra data end before the instruction count.
    lab.make("create -q -f qcow2 -o compat=0.10 old.q 1M");
    lab.make("snapshot -c first old.q");
    let table = std::fs::read(lab.path("old.q")).expect("the image");
    let table = u64::from_be_bytes(table[64..72].try_into().expect("eight bytes"));
    lab.patch("old.q", table + 36, &16_u32.to_be_bytes());
    lab.patch("old.q", table + 40 + 16, b"1first\0\0");
    lab.settle();
    for line in ["info old.q", "info --output=json old.q"] {
        assert!(!lab.agree(line).stdout.contains("icount"), "{line}");
    }
    lab.make("create -q -f qcow2 -o data_file=data,data_file_raw=on far.q 1M");
    let secret = "--object secret,id=s,data=abc";
    let luks = "encrypt.format=luks,encrypt.iter-time=10,encrypt.key-secret=s";
    lab.make(&format!("create -q -f qcow2 {secret} -o {luks} luks.q 1M"));
    let essiv =
        "encrypt.cipher-alg=aes-256,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256";
    lab.make(&format!("create -q -f qcow2 {secret} -o {luks},{essiv} essiv.q 1M"));
    lab.make(&format!("create -q -f qcow2 {secret} -o encrypt.format=aes,encrypt.key-secret=s aes.q 1M"));
    lab.settle();
    for name in ["far.q", "luks.q", "essiv.q", "aes.q"] {
        lab.agree(&format!("info {name}"));
        lab.agree(&format!("info --output=json {name}"));
    }
    lab.make("create -q -f qcow2 -u -b elsewhere/it -F raw lost.q 1M");
    for backing in ["/abs/path", "nbd://host/x", "json:{\"driver\":\"null-co\"}", "a,b\u{e9}\"c"] {
        lab.make(&format!("rebase -u -F raw -b {backing} lost.q"));
        lab.settle();
        for line in ["info lost.q", "info ./lost.q", "info --output=json lost.q"] {
            lab.agree(line);
        }
    }
}

#[test]
fn map_says_the_same() {
    let Some(lab) = Lab::new() else { return };
    for image in zoo(&lab) {
        lab.agree(&format!("map {image}"));
        lab.agree(&format!("map --output=json {image}"));
        lab.agree(&format!("map --output=json --start-offset=3000 --max-length=400k -U {image}"));
        lab.agree(&format!("map -f qcow2 -s 64k {image}"));
    }
    lab.agree("map -f raw flat");
    lab.agree("map -f raw --output=json flat");
    assert_eq!(lab.agree("map --start-offset=x plain.q").code, 1);
}

#[test]
fn check_says_the_same() {
    let Some(lab) = Lab::new() else { return };
    for image in zoo(&lab) {
        lab.agree(&format!("check {image}"));
        lab.agree(&format!("check -f qcow2 --output=json {image}"));
        assert_eq!(lab.agree(&format!("check -q -U {image}")).stdout, "");
    }
    assert_eq!(lab.agree("check -f raw flat").code, 63);
    assert_eq!(lab.agree("check -r everything plain.q").code, 1);
    assert_eq!(lab.agree("check nothing.q").code, 1);
}

#[test]
fn check_of_damaged_images_says_the_same() {
    let Some(lab) = Lab::new() else { return };
    lab.make("create -q -f qcow2 whole.q 10M");
    lab.io("whole.q", &["write -P 1 0 256k"]);
    // Clusters: 0 header, 1 refcount table, 2 refcount block, 3 L1, 4 L2, 5 to 8 data.
    let (block, l2) = (0x2_0000_u64, 0x4_0000_u64);
    let copied = |cluster: u64| (1_u64 << 63 | cluster << 16).to_be_bytes();
    let damages: [(&str, u64, Vec<u8>); 6] = [
        ("leak", l2 + 24, vec![0; 8]),
        ("low", block + 2 * 6, vec![0, 0]),
        ("high", block + 2 * 7, vec![0, 5]),
        ("past", l2 + 8, copied(5000).to_vec()),
        ("twice", l2 + 8, copied(5).to_vec()),
        ("uncopied", l2, (5_u64 << 16).to_be_bytes().to_vec()),
    ];
    for (damage, offset, bytes) in damages {
        let name = format!("{damage}.q");
        copy(&lab.path("whole.q"), &lab.path(&name));
        lab.patch(&name, offset, &bytes);
        assert_ne!(lab.agree(&format!("check {name}")).code, 0, "{damage}");
        lab.agree(&format!("check --output=json {name}"));
        for options in ["-r all", "-r leaks", "-r all --output=json", "-q -r leaks"] {
            let [ours, _] = lab.agree_changing(&format!("check {options} {name}"), &[&name]);
            // An entry past the end is beyond repair for both.
            if options.contains("all") && damage != "past" {
                lab.qemu.assert_clean(&ours.join(&name));
            }
        }
    }
}

#[test]
fn compare_says_the_same() {
    let Some(lab) = Lab::new() else { return };
    let images = zoo(&lab);
    for pair in images.windows(2) {
        lab.agree(&format!("compare {} {}", pair[0], pair[1]));
        lab.agree(&format!("compare -s {} {}", pair[1], pair[0]));
    }
    for image in images {
        assert_eq!(lab.agree(&format!("compare -s -U {image} {image}")).code, 0);
    }
    lab.make("create -q -f qcow2 a.q 1M");
    lab.make("create -q -f qcow2 b.q 2M");
    for line in [
        "compare a.q b.q",
        "compare -s a.q b.q",
        "compare -q a.q b.q",
        "compare -q -p a.q b.q",
        "compare a.q nothing.q",
        "compare a.q",
        "compare -f qcow2 -F raw a.q flat",
        "compare -F raw a.q flat",
    ] {
        lab.agree(line);
    }
    for write in ["write -P 7 1200k 1", "write -P 0 64k 64k", "write -P 9 70001 1", "write -z 0 64k"] {
        lab.io("b.q", &[write]);
        lab.agree("compare a.q b.q");
        lab.agree("compare b.q a.q");
        lab.io("a.q", &["write -P 1 400k 512"]);
    }
}

#[test]
fn create_makes_the_same() {
    let Some(lab) = Lab::new() else { return };
    lab.make("create -q -f qcow2 base.q 3M");
    std::fs::write(lab.path("flat"), [7; 5000]).expect("a raw image");
    let lines = [
        "-f qcow2 new 64M",
        "-f qcow2 new 1000001",
        "-f qcow2 new 0x100000",
        "-f qcow2 new 1.7k",
        "-f qcow2 -o size=32M,compat=0.10 new",
        "-f qcow2 -o compat=v3 -o cluster_size=4k -o cluster_size=8192 new 1M",
        "-f qcow2 -o extended_l2=on,cluster_size=128k,compression_type=zstd,lazy_refcounts=yes,refcount_bits=32 new 10G",
        "-f qcow2 -o preallocation=metadata new 3M",
        "-f qcow2 -o preallocation=full,cluster_size=512 new 300k",
        "-f qcow2 -b base.q -F qcow2 new",
        "-f qcow2 -b base.q -F raw new",
        "-f qcow2 -b flat -F raw new 1M",
        "-f qcow2 -o backing_file=./base.q,backing_fmt=qcow2,preallocation=off new",
        "-f qcow2 -u -b a,b -F raw new 1M",
        "-f qcow2 -q new 1M",
        "-f raw new 1000001",
        "new 1M",
        "-f raw -o preallocation=full,size=33k new",
        "-f qcow2 base.q 1M",
    ];
    for line in lines {
        let [ours, theirs] = lab.agree_changing(&format!("create {line}"), &["base.q", "flat"]);
        let name = if line.contains("base.q 1M") { "base.q" } else { "new" };
        let info = |dir: &Path| lab.qemu.info(&dir.join(name));
        let (mut a, mut b) = (info(&ours), info(&theirs));
        for told in [&mut a, &mut b] {
            told.as_object_mut().expect("an object").retain(|key, _| {
                !["children", "filename", "actual-size", "full-backing-filename"].contains(&key.as_str())
            });
        }
        assert_eq!(a, b, "{line}");
        if a["format"] == "qcow2" && !line.contains("-u ") {
            lab.qemu.assert_clean(&ours.join(name));
        }
    }
}

#[test]
fn create_refuses_the_same() {
    let Some(lab) = Lab::new() else { return };
    lab.make("create -q -f qcow2 base.q 3M");
    let lines = [
        "-f qcow2 new",
        "-f qcow2 new 1X",
        "-f qcow2 new 1.5",
        "-f qcow2 new 9E",
        "-f qcow2 new 7E",
        "-f qcow2 new 1M 2M",
        "-f qcow2 -o size=1M new 2M",
        "-f qcow2 -o blah=3 new 1M",
        "-f qcow2 -o cluster_size=3k new 1M",
        "-f qcow2 -o refcount_bits=3 new 1M",
        "-f qcow2 -o compat=2 new 1M",
        "-f qcow2 -o lazy_refcounts=maybe new 1M",
        "-f qcow2 -o compat=v2,lazy_refcounts=on new 1M",
        "-f qcow2 -o extended_l2=on,cluster_size=4k new 1M",
        "-f qcow2 -o preallocation=some new 1M",
        "-f qcow2 -o cluster_size=512 new 1T",
        "-f qcow2 -b base.q new",
        "-f qcow2 -b base.q -F qcow2 -o preallocation=metadata new",
        "-f qcow2 -b missing -F raw new",
        "-f qcow2 -b missing -F raw new 1M",
        "-f qcow2 -u -b missing -F raw new",
        "-f qcow2 -F qcow2 new 1M",
        "-f qcow2 -b base.q -F qcow2 base.q",
        "-f qcow2 -b base.q -F what new",
        "-f raw -b base.q -F qcow2 new",
        "-f raw -o cluster_size=3 new 1M",
        "-f raw -o preallocation=metadata new 1M",
        "-f qcow2 no/where 1M",
    ];
    for line in lines {
        let [ours, _] = lab.agree_changing(&format!("create {line}"), &["base.q"]);
        let before = std::fs::read(lab.path("base.q")).expect("the base");
        assert_eq!(std::fs::read(ours.join("base.q")).expect("the base"), before, "{line}");
    }
}

#[test]
fn resize_does_the_same() {
    let Some(lab) = Lab::new() else { return };
    lab.make("create -q -f qcow2 base.q 4M");
    lab.io("base.q", &["write -P 1 0 4M"]);
    lab.make("create -q -f qcow2 -b base.q -F qcow2 top.q 1M");
    lab.io("top.q", &["write -P 2 960k 64k"]);
    std::fs::write(lab.path("flat"), [7; 5000]).expect("a raw image");
    let images = ["base.q", "top.q", "flat"];
    let lines = [
        "top.q +1M",
        "top.q 3M",
        "top.q +0",
        "--shrink top.q 512k",
        "--shrink top.q -512k",
        "-q top.q 16M",
        "--preallocation=full base.q +1M",
        "--preallocation=metadata base.q 5M",
        "base.q 6G",
        "--shrink base.q 64k",
        "-f raw flat 1000001",
        "-f raw --shrink flat 1k",
        "top.q 1k",
        "top.q -512k",
        "top.q +1000",
        "top.q +",
        "top.q 1M 2M",
        "top.q",
        "--shrink top.q -5M",
        "--shrink top.q 0",
        "--preallocation=some top.q 5M",
        "--preallocation=full --shrink top.q 512k",
        "missing 1M",
    ];
    for line in lines {
        let [ours, theirs] = lab.agree_changing(&format!("resize {line}"), &images);
        for image in images {
            let format = if image == "flat" { "raw" } else { "qcow2" };
            let (a, b) = (ours.join(image), theirs.join(image));
            let [a, b] = [&a, &b].map(|path| path.to_str().expect("a path in UTF-8"));
            let run = lab.theirs(&["compare", "-f", format, "-F", format, a, b]);
            assert_eq!((run.stdout.as_str(), run.code), ("Images are identical.\n", 0), "resize {line}: {image}");
            if format == "qcow2" {
                lab.qemu.assert_clean(&ours.join(image));
            }
        }
    }
}

#[test]
fn commit_does_the_same() {
    let Some(lab) = Lab::new() else { return };
    zoo(&lab);
    let images = ["base.q", "mid.q", "top.q", "flat", "onraw.q", "plain.q"];
    for (line, merged) in [
        ("top.q", vec!["mid.q", "top.q"]),
        ("-q top.q", vec!["mid.q", "top.q"]),
        ("-d -f qcow2 top.q", vec!["mid.q", "top.q"]),
        ("-b base.q top.q", vec!["base.q"]),
        ("-t none mid.q", vec!["base.q", "mid.q"]),
        ("onraw.q", vec!["flat", "onraw.q"]),
        ("plain.q", vec![]),
        ("-b nothing.q top.q", vec![]),
        ("-t sometimes top.q", vec![]),
        ("nothing.q", vec![]),
    ] {
        let [ours, theirs] = lab.agree_changing(&format!("commit {line}"), &images);
        for image in merged {
            let format = if image == "flat" { "raw" } else { "qcow2" };
            let (a, b) = (ours.join(image), theirs.join(image));
            let [a, b] = [&a, &b].map(|path| path.to_str().expect("a path in UTF-8"));
            let run = lab.theirs(&["compare", "-f", format, "-F", format, a, b]);
            assert_eq!((run.stdout.as_str(), run.code), ("Images are identical.\n", 0), "commit {line}: {image}");
            if format == "qcow2" {
                lab.qemu.assert_clean(&ours.join(image));
            }
        }
    }
}

#[test]
fn rebase_does_the_same() {
    let Some(lab) = Lab::new() else { return };
    zoo(&lab);
    let images = ["base.q", "mid.q", "top.q", "flat", "onraw.q", "plain.q", "v2.q", "snap.q"];
    for (line, changed) in [
        ("-b base.q -F qcow2 top.q", "top.q"),
        ("-q -f qcow2 -b flat -F raw top.q", "top.q"),
        ("-b ./mid.q -F qcow2 -t none -T none onraw.q", "onraw.q"),
        ("-b v2.q -F qcow2 plain.q", "plain.q"),
        ("-b plain.q -F qcow2 v2.q", "v2.q"),
        ("-u -b nothing.q -F qcow2 top.q", ""),
        ("-u -b nothing.q -F vmdk top.q", ""),
        ("-u top.q", "top.q"),
        ("-b v2.q top.q", ""),
        ("-u -b v2.q top.q", ""),
        ("-b v2.q -F bogus top.q", ""),
        ("-b nothing.q -F qcow2 top.q", ""),
        ("-b top.q -F qcow2 top.q", ""),
        ("-T sometimes -b v2.q -F qcow2 top.q", ""),
        ("-f raw -b v2.q -F qcow2 top.q", ""),
        ("-F qcow2 top.q", ""),
        ("top.q", ""),
        ("-b v2.q -F qcow2", ""),
    ] {
        let [ours, theirs] = lab.agree_changing(&format!("rebase {line}"), &images);
        let [a, b] = [&ours, &theirs].map(|dir| lab.qemu.info(&dir.join("top.q")));
        for key in ["backing-filename", "backing-filename-format"] {
            assert_eq!(a[key], b[key], "rebase {line}: {key}");
        }
        if !changed.is_empty() {
            let (a, b) = (ours.join(changed), theirs.join(changed));
            let [a, b] = [&a, &b].map(|path| path.to_str().expect("a path in UTF-8"));
            let run = lab.theirs(&["compare", a, b]);
            assert_eq!((run.stdout.as_str(), run.code), ("Images are identical.\n", 0), "rebase {line}");
            lab.qemu.assert_clean(&ours.join(changed));
        }
    }
    // No words to split: an empty name, which is none.
    let run = lab.ours(&["rebase", "-b", "", "top.q"]);
    assert_eq!((run.code, run.stdout.as_str()), (0, ""), "{}", run.stderr);
    assert!(lab.qemu.info(&lab.path("top.q"))["backing-filename"].is_null());
    let run = lab.ours(&["rebase", "-b", "v2.q", "-F", "qcow2", "snap.q"]);
    assert!(run.code == 1 && run.stderr.contains("--ignore-snapshots"), "{}", run.stderr);
}

#[test]
fn pull_takes_in_what_lies_beneath() {
    let Some(lab) = Lab::new() else { return };
    zoo(&lab);
    let before = lab.qemu.content(&lab.path("top.q"), None);
    for (args, text, backing) in [
        (&["pull", "--base", "base.q", "top.q"][..], "Image pulled.\n", Some("base.q")),
        (&["pull", "-q", "top.q"][..], "", None),
    ] {
        let run = lab.ours(args);
        assert_eq!((run.code, run.stdout.as_str()), (0, text), "{}", run.stderr);
        let info = lab.qemu.info(&lab.path("top.q"));
        assert_eq!(info["backing-filename"].as_str(), backing, "{info}");
        lab.qemu.assert_clean(&lab.path("top.q"));
        assert!(lab.qemu.content(&lab.path("top.q"), None) == before, "{args:?}");
    }
    let run = lab.ours(&["pull", "top.q"]);
    assert!(run.code == 1 && run.stderr.contains("does not have a backing file"), "{}", run.stderr);
}

#[test]
fn chain_draws_every_layer() {
    let Some(lab) = Lab::new() else { return };
    zoo(&lab);
    let run = lab.ours(&["chain", "top.q"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    for layer in ["top.q", "mid.q", "base.q"] {
        assert!(run.stdout.contains(layer), "{}", run.stdout);
    }
    let run = lab.ours(&["chain", "--output=json", "onraw.q"]);
    let json: serde_json::Value = serde_json::from_str(&run.stdout).expect("JSON");
    assert_eq!(json["layers"][0]["format"], "qcow2", "{json}");
    assert_eq!(json["layers"][1]["path"], "flat", "{json}");
}

#[test]
fn what_is_not_served_is_refused_before_anything_is_done() {
    let lab = Lab {
        qemu: match Qemu::find() {
            Some(qemu) => qemu,
            None => return,
        },
        dir: tempfile::tempdir().expect("a directory"),
    };
    lab.make("create -q -f qcow2 a.q 1M");
    for line in [
        "info --image-opts driver=qcow2,file.filename=a.q",
        "map --object secret,id=s,data=abc a.q",
        "create -f qcow2 --object secret,id=s,data=abc new 1M",
        "create -f qcow2 -o encryption=on new 1M",
        "create -f qcow2 -o encrypt.format=luks new 1M",
        "create -f qcow2 -o data_file=d new 1M",
        "check --image-opts -r all driver=qcow2,file.filename=a.q",
        "resize --image-opts driver=qcow2,file.filename=a.q 2M",
        "commit --image-opts driver=qcow2,file.filename=a.q",
        "commit -r 10M a.q",
        "rebase -c -b b.q -F qcow2 a.q",
        "rebase -U -b b.q -F qcow2 a.q",
        "rebase --image-opts -b b.q -F qcow2 driver=qcow2,file.filename=a.q",
        "compare --image-opts driver=qcow2,file.filename=a.q a.q",
        "convert --image-opts driver=qcow2,file.filename=a.q new",
        "convert --object secret,id=s,data=abc a.q new",
        "convert --target-image-opts a.q driver=raw,file.filename=new",
        "measure --image-opts -O qcow2 driver=qcow2,file.filename=a.q",
        "snapshot -c one a.q",
        "bitmap --add a.q b",
        "amend -o compat=0.10 a.q",
        "dd if=a.q of=new",
        "bench -w a.q",
    ] {
        let run = lab.ours(&line.split_whitespace().collect::<Vec<_>>());
        assert_eq!((run.code, run.stdout.as_str()), (1, ""), "{line}");
        assert!(
            run.stderr.starts_with("qcow2-chain: ") && run.stderr.contains("is not supported, use "),
            "{}",
            run.stderr
        );
    }
    assert!(!lab.path("new").exists());
}

#[test]
fn backing_files_are_followed_as_far_as_allowed() {
    let Some(lab) = Lab::new() else { return };
    for dir in ["in", "out"] {
        std::fs::create_dir(lab.path(dir)).expect("a directory");
    }
    lab.make("create -q -f qcow2 out/base.q 1M");
    lab.make("create -q -f qcow2 -b ../out/base.q -F qcow2 in/top.q");
    let refused = lab.ours(&["map", "in/top.q"]);
    assert_eq!(refused.code, 1);
    assert!(refused.stderr.contains("--allow "), "{}", refused.stderr);
    assert_eq!(lab.ours(&["info", "in/top.q"]).code, 0, "one file is looked at without the other");
    assert_eq!(lab.ours(&["compare", "in/top.q", "out/base.q"]).code, 2);
    for allowed in [vec!["--allow", "out"], vec!["--allow", "nowhere", "--allow", "out"], vec!["--allow-any"]] {
        let args = [vec!["map", "--output=json"], allowed, vec!["in/top.q"]].concat();
        assert_same("map", &lab.ours(&args), &lab.theirs(&["map", "--output=json", "in/top.q"]));
    }
    let raw = lab.path("raw");
    std::fs::write(&raw, [1; 4096]).expect("a raw image");
    let refused = lab.ours(&["map", "raw"]);
    assert!(refused.code == 1 && refused.stderr.contains("-f raw"), "{}", refused.stderr);
}

#[test]
fn an_image_in_use_is_busy() {
    let Some(lab) = Lab::new() else { return };
    lab.make("create -q -f qcow2 a.q 1M");
    let mut holder = Command::new("qemu-io")
        .args(["-f", "qcow2", "a.q"])
        .current_dir(lab.dir.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("qemu-io starts");
    // Its prompt says that the image is open.
    let mut prompt = [0; 8];
    std::io::Read::read_exact(holder.stdout.as_mut().expect("a pipe"), &mut prompt).expect("a prompt");
    for line in ["info a.q", "map a.q", "check a.q", "check -r all a.q", "compare a.q a.q", "resize a.q +1M"] {
        let run = lab.agree(line);
        assert_ne!(run.code, 0, "{line}");
        assert!(run.stderr.contains("lock"), "{line}: {}", run.stderr);
    }
    for line in ["info -U a.q", "map -U a.q", "check -U a.q", "compare -U a.q a.q"] {
        assert_eq!(lab.agree(line).code, 0, "{line}");
    }
    assert_eq!(lab.agree("create -f qcow2 a.q 2M").code, 1);
    drop(holder.stdin.take());
    assert!(holder.wait().is_ok_and(|status| status.success()));
}

#[test]
fn progress_is_printed_where_it_is_asked_for() {
    let Some(lab) = Lab::new() else { return };
    lab.make("create -q -f qcow2 a.q 1M");
    let run = lab.ours(&["compare", "-p", "a.q", "a.q"]);
    assert!(run.stdout.starts_with("    (0.00/100%)\r"), "{:?}", run.stdout);
    assert!(run.stdout.ends_with("    (100.00/100%)\rImages are identical.\n\n"), "{:?}", run.stdout);
}

#[test]
fn dump_tells_fields_with_their_places() {
    let Some(lab) = Lab::new() else { return };
    for image in zoo(&lab) {
        let run = lab.ours(&["dump", image]);
        assert_eq!(run.code, 0, "{image}: {}", run.stderr);
        assert!(run.stdout.starts_with("header at 0x0\n") && run.stdout.contains("L1 table at 0x"), "{}", run.stdout);
        let run = lab.ours(&["dump", "--output=json", image]);
        let json: serde_json::Value = serde_json::from_str(&run.stdout).expect("JSON");
        assert_eq!(json[0]["entries"][0]["name"], "magic", "{image}");
    }
    assert_eq!(lab.ours(&["dump", "flat"]).code, 1);
}
