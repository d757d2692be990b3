//! `qcow2-chain convert` and `measure` beside `qemu-img`: the same words, the same exit codes, images that hold the same.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::support::qemu::{Qemu, Run};
use crate::support::recipe::{RandomImage, Shape};
use crate::support::rng::cases;

fn start(program: &str, dir: &Path, line: &str) -> Run {
    let mut command = Command::new(program);
    let output = command.args(line.split_whitespace()).current_dir(dir).stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let run =
        Run { code: output.status.code().unwrap_or(-1), stdout: text(&output.stdout), stderr: text(&output.stderr) };
    assert!(!run.stderr.contains("panicked"), "{line}: {}", run.stderr);
    run
}

fn ours(dir: &Path, line: &str) -> Run {
    start(env!("CARGO_BIN_EXE_qcow2-chain"), dir, line)
}

/// The same command line for both, on images that neither changes.
fn agree(dir: &Path, line: &str) -> Run {
    let (ours, theirs) = (ours(dir, line), start("qemu-img", dir, line));
    assert_eq!((&ours.stdout, ours.code), (&theirs.stdout, theirs.code), "{line}:\n{}{}", ours.stderr, theirs.stderr);
    ours
}

/// A zoo: an overlay over a raw image, images of several shapes, and one with bitmaps.
fn zoo(qemu: Qemu, dir: &Path) {
    let name = |name: &str| dir.join(name).to_string_lossy().into_owned();
    let bytes: Vec<u8> =
        (0..3_000_320_u32).map(|at| if at % 700_000 < 300_000 { (at >> 9).to_le_bytes()[0] } else { 0 }).collect();
    std::fs::write(dir.join("raw"), bytes).unwrap();
    qemu.img(&["create", "-q", "-f", "qcow2", "-b", "raw", "-F", "raw", &name("over"), "4M"]);
    qemu.io(&dir.join("over"), &["write -q -P 7 100000 200000", "write -q -z 1M 500k", "write -q -P 3 3900000 4304"]);
    qemu.img(&["create", "-q", "-f", "qcow2", "-o", "compat=0.10,cluster_size=4k", &name("old"), "5M"]);
    qemu.io(&dir.join("old"), &["write -q -P 9 1M 64k", "write -q -c -P 8 2M 64k", "write -q -P 0 3M 1M"]);
    qemu.img(&["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", &name("pre"), "3M"]);
    qemu.io(&dir.join("pre"), &["write -q -P 9 1M 300k"]);
    qemu.img(&["create", "-q", "-f", "qcow2", &name("bits"), "9M"]);
    qemu.img(&["bitmap", "--add", &name("bits"), "first"]);
    qemu.img(&["bitmap", "--add", "-g", "512", &name("bits"), "second"]);
    qemu.img(&["create", "-q", "-f", "qcow2", &name("empty"), "0"]);
}

#[test]
fn the_program_converts_as_qemu_img_does() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    zoo(qemu, dir);
    let sources = ["-f qcow2 over", "-f raw raw", "-f qcow2 old", "-f qcow2 pre", "-f qcow2 bits", "-f qcow2 empty"];
    let targets = [
        "-O qcow2",
        "-O raw",
        "-p -O qcow2 -c",
        "-q -p -O qcow2 -c -W -m 2 -o compression_type=zstd,cluster_size=4k",
        "-O qcow2 -o extended_l2=on,cluster_size=128k",
        "-O qcow2 -o compat=0.10 -o cluster_size=512",
        "-O qcow2 -o preallocation=metadata,refcount_bits=64",
        "-O qcow2 -S 0",
        "-O raw -S 64k -t none -T none",
        "-O qcow2 -C -m 16",
        "-O raw -o preallocation=falloc",
        "-O raw -U -W",
    ];
    for source in sources {
        for target in targets {
            let line = |to: &str| format!("convert {target} {source} {to}");
            let (mine, theirs) = (ours(dir, &line("mine")), start("qemu-img", dir, &line("theirs")));
            assert_eq!((mine.code, theirs.code), (0, 0), "{}: {}{}", line("mine"), mine.stderr, theirs.stderr);
            let ends = |text: &str| text.starts_with("    (0.00/100%)\r") && text.ends_with("    (100.00/100%)\r\n");
            assert!(mine.stdout == theirs.stdout || ends(&mine.stdout) && ends(&theirs.stdout), "{:?}", mine.stdout);
            let format = if target.contains("-O raw") { "raw" } else { "qcow2" };
            let told = |name: &str| {
                let run = start("qemu-img", dir, &format!("compare -f {format} -F {format} mine {name}"));
                assert_eq!(run.code, 0, "{}: {}{}", line("mine"), run.stdout, run.stderr);
            };
            told("theirs");
            if format == "qcow2" {
                qemu.assert_clean(&dir.join("mine"));
                let info = |name: &str| qemu.info(&dir.join(name));
                let (mine, theirs) = (info("mine"), info("theirs"));
                for key in ["virtual-size", "cluster-size", "format-specific"] {
                    assert_eq!(mine[key], theirs[key], "{}", line("mine"));
                }
            } else {
                let len = |name: &str| std::fs::metadata(dir.join(name)).unwrap().len();
                assert_eq!(len("mine"), len("theirs"));
            }
        }
    }
    // Into an image that is there.
    qemu.img(&["create", "-q", "-f", "qcow2", &dir.join("mine").to_string_lossy(), "8M"]);
    qemu.io(&dir.join("mine"), &["write -q -P 1 0 8M"]);
    std::fs::copy(dir.join("mine"), dir.join("theirs")).unwrap();
    let line = "convert -n -f qcow2 -O qcow2 over";
    assert_eq!(ours(dir, &format!("{line} mine")).code, 0);
    assert_eq!(start("qemu-img", dir, &format!("{line} theirs")).code, 0);
    agree(dir, "compare -f qcow2 -F qcow2 mine theirs");
    qemu.assert_clean(&dir.join("mine"));
}

/// The new image names the backing file as it was told to, reads as the source, and holds hardly more than QEMU's.
#[test]
fn a_copy_over_a_backing_file_holds_what_differs() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    zoo(qemu, dir);
    std::fs::copy(dir.join("raw"), dir.join("same")).unwrap();
    let held = |name: &str| qemu.check(&dir.join(name), None).allocated_clusters;
    for options in [
        "-B same -F raw",
        "-p -B same -F raw -W -m 4 -t none -T none",
        "-o backing_file=same,backing_fmt=raw,cluster_size=4k",
        "-B ./same -F raw -o extended_l2=on,cluster_size=64k -o compat=1.1",
        "-q -B same -F raw -o compat=0.10 -S 64k",
        "-B raw -F raw -C",
    ] {
        let line = |to: &str| format!("convert -O qcow2 {options} -f qcow2 over {to}");
        let (mine, theirs) = (ours(dir, &line("mine")), start("qemu-img", dir, &line("theirs")));
        assert_eq!((mine.code, theirs.code), (0, 0), "{}: {}{}", line("mine"), mine.stderr, theirs.stderr);
        qemu.assert_clean(&dir.join("mine"));
        agree(dir, "compare -f qcow2 -F qcow2 mine theirs");
        let same = start("qemu-img", dir, "compare -f qcow2 -F qcow2 mine over");
        assert_eq!(same.code, 0, "{}: {}", line("mine"), same.stdout);
        let (a, b) = (qemu.info(&dir.join("mine")), qemu.info(&dir.join("theirs")));
        for key in ["virtual-size", "cluster-size", "format-specific", "backing-filename", "backing-filename-format"] {
            assert_eq!(a[key], b[key], "{}: {key}", line("mine"));
        }
        // Whole clusters of the source that the backing file lacks are moved with the zeroes in them, which QEMU looks for.
        assert!(held("mine") <= held("theirs") + 4, "{}: {} and {}", line("mine"), held("mine"), held("theirs"));
    }
    // Where the new backing file is another disk, QEMU lets it show through. Here the copy reads as the source.
    let made = ours(dir, "convert -O qcow2 -B old -F qcow2 -f qcow2 over mine");
    assert_eq!(made.code, 0, "{}", made.stderr);
    qemu.assert_clean(&dir.join("mine"));
    assert_eq!(start("qemu-img", dir, "compare -f qcow2 -F qcow2 mine over").code, 0);
    assert_eq!(qemu.info(&dir.join("mine"))["backing-filename"], "old");
}

#[test]
fn an_internal_snapshot_is_copied_as_qemu_img_copies_it() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    zoo(qemu, dir);
    let over = dir.join("over");
    for (name, write) in
        [("first", "write -q -P 1 0 100k"), ("2", "write -q -P 2 50k 100k"), ("third", "write -q -z 0 4M")]
    {
        qemu.img(&["snapshot", "-c", name, &over.to_string_lossy()]);
        qemu.io(&over, &[write]);
    }
    let mut seen = Vec::new();
    for wanted in
        ["first", "2", "third", "1", "3", "snapshot.id=1", "snapshot.name=third", "snapshot.id=2,snapshot.name=2"]
    {
        for target in ["-O raw", "-O qcow2", "-O qcow2 -c"] {
            let line = |to: &str| format!("convert {target} -l {wanted} -f qcow2 over {to}");
            let (mine, theirs) = (ours(dir, &line("mine")), start("qemu-img", dir, &line("theirs")));
            assert_eq!((mine.code, theirs.code), (0, 0), "{}: {}{}", line("mine"), mine.stderr, theirs.stderr);
            let format = if target == "-O raw" { "raw" } else { "qcow2" };
            let same = start("qemu-img", dir, &format!("compare -f {format} -F {format} mine theirs"));
            assert_eq!(same.code, 0, "{}: {}", line("mine"), same.stdout);
            if format == "raw" {
                seen.push(std::fs::read(dir.join("mine")).unwrap());
            }
        }
    }
    assert!(seen[0] != seen[1] && seen[1] != seen[2], "the snapshots are told apart");
    for wanted in ["nothing", "snapshot.id=1,snapshot.name=2", "snapshot.id", "snapshot.nothing=1"] {
        assert_eq!(agree(dir, &format!("convert -O qcow2 -l {wanted} -f qcow2 over no")).code, 1, "{wanted}");
    }
    assert!(!dir.join("no").exists());
}

#[test]
fn an_image_known_to_be_zero_is_filled_as_qemu_img_fills_it() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    zoo(qemu, dir);
    for options in ["-n --target-is-zero", "-n --target-is-zero -W -m 8 -t unsafe", "-n -t writeback -T none"] {
        for to in ["mine", "theirs"] {
            qemu.img(&["create", "-q", "-f", "qcow2", &dir.join(to).to_string_lossy(), "5M"]);
        }
        let line = |to: &str| format!("convert {options} -O qcow2 -f qcow2 old {to}");
        assert_eq!((ours(dir, &line("mine")).code, start("qemu-img", dir, &line("theirs")).code), (0, 0), "{options}");
        agree(dir, "compare -f qcow2 -F qcow2 mine theirs");
        qemu.assert_clean(&dir.join("mine"));
    }
}

#[test]
fn the_program_refuses_what_qemu_img_refuses() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    zoo(qemu, dir);
    for line in [
        "convert",
        "convert old",
        "convert -O foo old b",
        "convert -c old b",
        "convert -c -O qcow2 -o preallocation=metadata old b",
        "convert -S x old b",
        "convert -S 100 old b",
        "convert -S 32M old b",
        "convert -m 0 old b",
        "convert -m 17 old b",
        "convert -m x old b",
        "convert -n -O qcow2 old nofile",
        "convert -n -o size=1M -O qcow2 old old",
        "convert -n -f qcow2 -O qcow2 bits old",
        "convert -C -c -O qcow2 old b",
        "convert -C -S 4k -O qcow2 old b",
        "convert -f foo old b",
        "convert nofile b",
        "convert old /nodir/b",
        "convert old old",
        "convert -O qcow2 over raw",
        "convert -O qcow2 -o foo=1 old b",
        "convert -O qcow2 -o cluster_size=3 old b",
        "convert -O qcow2 -o compat=0.10,compression_type=zstd old b",
        "convert -O raw -o preallocation=metadata old b",
        "convert -t foo old b",
        "convert -T foo old b",
        "convert --target-is-zero old b",
        "convert -B raw -O qcow2 old b",
        "convert -F raw -O qcow2 old b",
        "convert -B raw -F raw -O raw old b",
        "convert -B nofile -F raw -O qcow2 old b",
        "convert -B raw -F nonsense -O qcow2 old b",
        "convert -l nothing -O qcow2 old b",
        "convert -l snapshot.nothing=x -O qcow2 old b",
        "convert -l x -f raw -O raw raw b",
        "measure",
        "measure --size 1G old",
        "measure --size -1",
        "measure --size x",
        "measure --size 1G -O vmfoo",
        "measure --size 1G -O qcow2 -o cluster_size=3",
        "measure --size 7E -O qcow2",
        "measure -l x --size 1G",
        "measure -f qcow2 --size 1M",
        "measure old over",
        "measure nofile",
        "measure -O raw -o foo=1 --size 1M",
        "measure -O qcow2 -o extended_l2=on,cluster_size=8k --size 8M",
        "measure -O qcow2 -o compat=0.10,refcount_bits=8 --size 8M",
    ] {
        let run = agree(dir, line);
        assert_eq!(run.code, 1, "{line}");
        let theirs = start("qemu-img", dir, line).stderr;
        // Where qemu-img says it well, so do we.
        if theirs.contains(". Must be") || theirs.contains("Cannot enable") || theirs.contains("sparse output") {
            assert_eq!(run.stderr.replace("qcow2-chain: ", ""), theirs.replace("qemu-img: ", ""), "{line}");
        }
    }
    // qemu-img leaves its failures, or not.
    let _ = std::fs::remove_file(dir.join("b"));
    assert_eq!(std::fs::metadata(dir.join("raw")).unwrap().len(), 3_000_320, "a file of the source is not emptied");
    for line in [
        "convert -c -B raw -F raw -O qcow2 old b",
        "convert -n -B raw -F raw -O qcow2 old bits",
        "convert -l x -B raw -F raw -O qcow2 old b",
        "convert -O qcow2 -o preallocation=full,backing_file=raw,backing_fmt=raw old b",
        "convert -O qcow2 -B raw -F raw -f qcow2 over raw",
        "convert -r 1M old b",
        "convert --bitmaps -O qcow2 bits b",
        "convert old bits b",
        "convert -U -O qcow2 old old",
        "convert -f qcow2 -c -n -O qcow2 old bits",
    ] {
        let run = ours(dir, line);
        assert_eq!(run.code, 1, "{line}: {}", run.stderr);
    }
    assert!(!dir.join("b").exists());
    qemu.assert_clean(&dir.join("old"));
}

#[test]
fn the_program_measures_as_qemu_img_does() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    zoo(qemu, dir);
    for source in [
        "-f qcow2 over",
        "-f raw raw",
        "-f qcow2 old",
        "-f qcow2 pre",
        "-f qcow2 bits",
        "-f qcow2 empty",
        "--size 1001",
        "--size 5T",
    ] {
        for target in [
            "",
            "-O raw -U",
            "-O qcow2",
            "-O qcow2 --output=json",
            "-O qcow2 -o compat=0.10,cluster_size=2M --output json",
            "-O qcow2 -o extended_l2=on,refcount_bits=1,preallocation=falloc",
            "-O qcow2 -o backing_file=x,size=1M",
        ] {
            agree(dir, &format!("measure {target} {source}"));
        }
    }
    cases("measuring programs", 40, |rng| {
        let dir = tempfile::tempdir().unwrap();
        let mut image = RandomImage::create(qemu, dir.path().join("0.qcow2"), Shape::random(rng));
        image.apply_random(qemu, rng, 10);
        let over = Shape::random(rng);
        let mut top = RandomImage::create_over(qemu, dir.path().join("1.qcow2"), over, &image);
        top.apply_random(qemu, rng, 6);
        // A file system may still change its mind about what a file occupies.
        for name in ["0.qcow2", "1.qcow2"] {
            std::fs::File::open(dir.path().join(name)).unwrap().sync_all().unwrap();
        }
        let options = Shape::random(rng).options();
        agree(dir.path(), &format!("measure -O qcow2 -o {options} -f qcow2 1.qcow2"));
    });
}
