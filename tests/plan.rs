//! Plans of merges, against what the merges then do; and refusals, before which nothing is written.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use qcow2_chain::chain::{Chain, ChainOptions, Layer, Node};
use qcow2_chain::format::GuestOffset;
use qcow2_chain::image::{CreateOptions, Image, OpenOptions};
use qcow2_chain::merge::{AfterCommit, CommitOptions, Direction, Error, PullOptions, Report, Way, commit, plan, pull};
use qcow2_chain::storage::{FileStorage, MemoryStorage, Storage};

use crate::support::qemu::Qemu;
use crate::support::recipe::{RandomImage, Shape};
use crate::support::rng::{Rng, cases, trace};

const NAMES: [&str; 3] = ["base.img", "middle.img", "top.img"];

fn open(dir: &Path, writable: usize) -> Chain {
    let options = ChainOptions::default().beneath(dir).with_writable(writable);
    Chain::open(dir.join("top.img"), &options).expect("the chain opens")
}

/// Three layers with random content, which name each other relatively.
fn random_chain(qemu: Qemu, dir: &Path, rng: &mut Rng) -> Vec<RandomImage> {
    let mut layers: Vec<RandomImage> = Vec::new();
    for (index, name) in NAMES.into_iter().enumerate() {
        let mut shape = Shape::random(rng);
        let path = dir.join(name);
        let mut image = match layers.last() {
            None => RandomImage::create(qemu, path, shape),
            Some(below) => {
                shape.preallocation = "off";
                let (file, size, options) = (path.to_string_lossy(), shape.size.to_string(), shape.options());
                let args = ["create", "-q", "-f", "qcow2", "-b", NAMES[index - 1], "-F", "qcow2", "-o"];
                qemu.img(&[&args[..], &[&options, &file, &size]].concat());
                RandomImage::from_model(path.clone(), shape, true, below.model.clone())
            }
        };
        image.apply_random(qemu, rng, 8);
        layers.push(image);
    }
    layers
}

fn copy_to(from: &Path, to: PathBuf) -> PathBuf {
    std::fs::create_dir(&to).unwrap();
    for name in NAMES {
        std::fs::copy(from.join(name), to.join(name)).unwrap();
    }
    to
}

fn assert_as_planned(way: &Way, report: &Report, what: &str) {
    assert_eq!(report.copied + report.copied_in_kernel, way.data, "data, {what}");
    assert_eq!(report.zeroed, way.zeroes, "zeroes, {what}");
    assert_eq!(report.bitmaps_invalidated, way.bitmaps_invalidated, "bitmaps, {what}");
    assert!(way.overwritten <= way.data, "{what}");
}

#[test]
fn merges_do_what_was_planned() {
    let Some(qemu) = Qemu::find() else { return };
    cases("planned merges", 60, |rng| {
        let dir = tempfile::tempdir().unwrap();
        let layers = random_chain(qemu, dir.path(), rng);
        layers.iter().for_each(trace);
        let what = layers.iter().map(ToString::to_string).collect::<String>();
        let base = usize::try_from(rng.within(1..3)).unwrap();
        let chain = open(dir.path(), 0);
        let before = NAMES.map(|name| std::fs::read(dir.path().join(name)).unwrap());
        let planned = plan(&chain, base).expect("a plan");
        chain.close().unwrap();
        assert!(before == NAMES.map(|name| std::fs::read(dir.path().join(name)).unwrap()), "a plan writes nothing");
        // The way that moves less, unless something stands in the way of it.
        let way = planned.way(planned.cheapest);
        let other = if way.direction == Direction::Commit { &planned.pull } else { &planned.commit };
        let weight = |way: &Way| (!way.obstacles.is_empty(), way.data);
        assert!(weight(way) <= weight(other), "{planned}");

        let committed = copy_to(dir.path(), dir.path().join("commit"));
        let chain = open(&committed, base + 1);
        let options = CommitOptions::default().with_base(base).with_allow_stale_snapshots(true);
        let report = commit(&chain, &options, &());
        chain.close().unwrap();
        // A base of version 2 with internal snapshots cannot grow.
        if let Ok(report) = report {
            assert_as_planned(&planned.commit, &report, &format!("commit: {what}"));
        }

        let pulled = copy_to(dir.path(), dir.path().join("pull"));
        let chain = open(&pulled, 1);
        let below = (base + 1 < chain.layers().len()).then_some(base + 1);
        let options = PullOptions::default().with_base(below).with_allow_stale_snapshots(true);
        let report = pull(&chain, &options, &()).expect("a pull");
        chain.close().unwrap();
        assert_as_planned(&planned.pull, &report, &format!("pull: {what}"));
        qemu.assert_clean(&pulled.join("top.img"));
        assert!(qemu.content(&pulled.join("top.img"), None) == layers[2].model, "{what}");
    });
}

/// Where nothing of the base's clusters is shared, the space that a plan names is what the base then takes.
#[test]
fn the_space_needed_is_the_space_taken() {
    let dir = tempfile::tempdir().unwrap();
    small_chain(dir.path(), 40, 0..8);
    let chain = open(dir.path(), 3);
    let planned = plan(&chain, 1).unwrap();
    assert_eq!((planned.commit.data, planned.commit.overwritten), (8 << 16, 0));
    assert_eq!(planned.commit.space_needed, 8 << 16);
    // The middle and the base hold what the top lacks.
    assert_eq!((planned.pull.data, planned.cheapest), (32 << 16, Direction::Commit));
    assert_eq!(planned.pull.space_needed, 32 << 16);
    let text = planned.to_string();
    assert!(text.contains("moves      512 KiB of data and 0 bytes of zeroes") && text.ends_with("cheapest: commit\n"));
    commit(&chain, &CommitOptions::default(), &()).unwrap();
    let again = plan(&chain, 1).unwrap();
    assert_eq!((again.commit.overwritten, again.commit.space_needed), (8 << 16, 0));
}

/// The base holds nothing, the middle some clusters from 8 on, the top these.
fn small_chain(dir: &Path, middle: u64, top: std::ops::Range<u64>) {
    for (index, (name, clusters)) in NAMES.into_iter().zip([0..0, 8..middle, top]).enumerate() {
        let mut options = CreateOptions::new(16 << 20);
        if index > 0 {
            options = options.with_backing(NAMES[index - 1], "qcow2");
        }
        let storage = Arc::new(FileStorage::create_new(dir.join(name)).unwrap());
        let image = Image::create(storage, &options).unwrap();
        for cluster in clusters {
            image.write_at(&[index as u8 + 1; 1 << 16], GuestOffset::new(cluster << 16)).unwrap();
        }
        image.close().unwrap();
    }
}

#[test]
fn the_cheaper_direction_is_chosen() {
    for (middle, top, expected) in [(200, 0..4, Direction::Commit), (12, 20..200, Direction::Pull)] {
        let dir = tempfile::tempdir().unwrap();
        small_chain(dir.path(), middle, top);
        let planned = plan(&open(dir.path(), 0), 1).unwrap();
        assert_eq!(planned.cheapest, expected, "{planned}");
        assert_eq!(planned.cheapest, expected);
        assert_eq!(planned.way(Direction::Commit).receiver, dir.path().join("middle.img"));
        assert_eq!(planned.way(Direction::Pull).unreachable, [dir.path().join("middle.img")]);
    }
    let dir = tempfile::tempdir().unwrap();
    small_chain(dir.path(), 9, 0..1);
    for base in [0, 3] {
        assert!(matches!(plan(&open(dir.path(), 0), base), Err(Error::Refused { .. })));
    }
}

/// Does something that must fail, and looks whether any byte of the directory changed.
fn assert_nothing_written(dir: &Path, refused: impl FnOnce()) {
    let read = || {
        let mut files: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files.into_iter().map(|path| (std::fs::read(&path).ok(), path)).collect::<Vec<_>>()
    };
    let before = read();
    refused();
    assert!(before == read(), "a refused merge wrote something");
}

#[test]
fn a_base_with_other_dependents_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    small_chain(dir.path(), 12, 0..4);
    let elsewhere = tempfile::tempdir().unwrap();
    let options = CommitOptions::default().with_dependents_in(dir.path()).with_dependents_in(elsewhere.path());
    std::fs::write(dir.path().join("notes.txt"), "no image").unwrap();
    std::fs::write(dir.path().join("broken"), b"QFI\xfb, and no header").unwrap();
    std::os::unix::fs::symlink("nowhere", dir.path().join("dangling")).unwrap();
    let middle = dir.path().join("middle.img").to_string_lossy().into_owned();
    let link = elsewhere.path().join("link.img");
    std::os::unix::fs::symlink(dir.path().join("top.img"), &link).unwrap();
    let chain = open(dir.path(), 2);
    let other = elsewhere.path().join("other.qcow2");
    for name in [middle.clone(), format!("json:{{\"file\": \"{middle}\"}}"), format!("file:{middle}")] {
        let storage = Arc::new(FileStorage::create_new(&other).unwrap());
        Image::create(storage, &CreateOptions::new(1 << 20).with_backing(name, "qcow2")).unwrap().close().unwrap();
        assert_nothing_written(dir.path(), || match commit(&chain, &options, &()) {
            Err(Error::Dependents { dependents, .. }) => assert_eq!(dependents, std::slice::from_ref(&other)),
            done => panic!("{done:?}"),
        });
        std::fs::remove_file(&other).unwrap();
    }
    // Over the deepest layer, which a commit into the middle does not change.
    let deepest = dir.path().join("base.img").to_string_lossy().into_owned();
    let storage = Arc::new(FileStorage::create_new(&other).unwrap());
    Image::create(storage, &CreateOptions::new(1 << 20).with_backing(deepest, "qcow2")).unwrap().close().unwrap();
    commit(&chain, &options, &()).expect("nothing depends on the middle any more");
}

#[test]
fn internal_snapshots_that_would_change_are_refused() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = tempfile::tempdir().unwrap();
    small_chain(dir.path(), 12, 0..4);
    qemu.img(&["snapshot", "-c", "before", &dir.path().join("top.img").to_string_lossy()]);
    let chain = open(dir.path(), 2);
    assert_nothing_written(dir.path(), || {
        for done in [commit(&chain, &CommitOptions::default(), &()), pull(&chain, &PullOptions::default(), &())] {
            let Err(Error::StaleSnapshots { snapshots, .. }) = done else { panic!("{done:?}") };
            assert_eq!(snapshots, ["before"]);
        }
    });
    assert!(plan(&chain, 1).unwrap().commit.obstacles[0].ends_with("would change: before"));
    commit(&chain, &CommitOptions::default().with_allow_stale_snapshots(true), &()).unwrap();
    chain.close().unwrap();

    // Those of the base keep what they hold.
    let dir = tempfile::tempdir().unwrap();
    small_chain(dir.path(), 12, 0..4);
    let middle = dir.path().join("middle.img");
    qemu.img(&["snapshot", "-c", "before", &middle.to_string_lossy()]);
    let content = qemu.content(&middle, Some("before"));
    let chain = open(dir.path(), 2);
    let planned = plan(&chain, 1).unwrap();
    assert!(planned.commit.obstacles.is_empty(), "{planned}");
    commit(&chain, &CommitOptions::default().with_after(AfterCommit::Empty), &()).unwrap();
    chain.close().unwrap();
    assert!(content == qemu.content(&middle, Some("before")));
    qemu.assert_clean(&middle);
}

#[test]
fn bitmaps_that_a_merge_falsifies_are_told() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = tempfile::tempdir().unwrap();
    small_chain(dir.path(), 12, 0..4);
    let middle = dir.path().join("middle.img").to_string_lossy().into_owned();
    qemu.img(&["bitmap", "--add", &middle, "recording"]);
    qemu.img(&["bitmap", "--add", "--disable", &middle, "frozen"]);
    let chain = open(dir.path(), 2);
    let planned = plan(&chain, 1).unwrap();
    assert_eq!(planned.commit.bitmaps_invalidated, ["recording"]);
    let report = commit(&chain, &CommitOptions::default(), &()).unwrap();
    assert_eq!(report.bitmaps_invalidated, ["recording"]);
    assert_eq!(plan(&chain, 1).unwrap().commit.bitmaps_invalidated, Vec::<String>::new());
}

/// A chain in memory: a base in a container of fixed size, and a top that fills `clusters` of it.
fn in_containers(container: u64, clusters: u64) -> (Chain, Arc<MemoryStorage>) {
    let base = Arc::new(MemoryStorage::fixed("base", container));
    let layer = |storage: Arc<MemoryStorage>, options: &CreateOptions, name: &str| {
        let image = Image::create(storage, options).unwrap();
        Layer { node: Node::Qcow2(image), path: name.into() }
    };
    let below = layer(base.clone(), &CreateOptions::new(16 << 20), "base");
    let options = CreateOptions::new(16 << 20).with_backing("base", "qcow2");
    let chain = Chain::from_layers(layer(Arc::new(MemoryStorage::new("top")), &options, "top"), [below]);
    for cluster in 0..clusters {
        chain.write_at(&[7; 1 << 16], GuestOffset::new(cluster << 16)).unwrap();
    }
    (chain, base)
}

#[test]
fn a_container_that_cannot_grow_is_asked_what_it_has_left() {
    let (chain, base) = in_containers(1 << 20, 14);
    let before = base.to_vec();
    let planned = plan(&chain, 1).unwrap();
    let free = planned.commit.space_free.unwrap();
    assert!((10 << 16..14 << 16).contains(&free), "{planned}");
    assert!(planned.commit.obstacles[0].ends_with("bytes are missing") && planned.cheapest == Direction::Pull);
    match commit(&chain, &CommitOptions::default(), &()) {
        Err(Error::NoSpace { need, have, .. }) => assert_eq!((need, have), (14 << 16, free)),
        done => panic!("{done:?}"),
    }
    assert!(base.to_vec() == before);

    // What lies there already is overwritten and needs no room.
    let (chain, _) = in_containers(1 << 20, 9);
    commit(&chain, &CommitOptions::default(), &()).expect("it fits");
    assert_eq!(plan(&chain, 1).unwrap().commit.space_needed, 0);
    commit(&chain, &CommitOptions::default(), &()).expect("it fits again");
}

#[test]
fn a_full_file_system_refuses_before_the_first_write() {
    let base = Arc::new(MemoryStorage::with_capacity_limit("base", 500 << 10));
    let below = Image::create(base.clone(), &CreateOptions::new(16 << 20)).unwrap();
    let top = Arc::new(MemoryStorage::new("top"));
    let top = Image::create(top, &CreateOptions::new(16 << 20).with_backing("base", "qcow2")).unwrap();
    let layer = |image, name: &str| Layer { node: Node::Qcow2(image), path: name.into() };
    let chain = Chain::from_layers(layer(top, "top"), [layer(below, "base")]);
    chain.write_at(&vec![7; 1 << 20], GuestOffset::new(5 << 20)).unwrap();
    let before = base.to_vec();
    let done = commit(&chain, &CommitOptions::default(), &());
    assert!(matches!(done, Err(Error::NoSpace { need, .. }) if need == 1 << 20), "{done:?}");
    assert!(base.to_vec() == before);
}

#[test]
fn what_cannot_be_written_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    small_chain(dir.path(), 12, 0..4);
    assert_nothing_written(dir.path(), || {
        let done = commit(&open(dir.path(), 0), &CommitOptions::default(), &());
        assert!(matches!(done, Err(Error::Refused { .. })), "{done:?}");
        let done = pull(&open(dir.path(), 0), &PullOptions::default(), &());
        assert!(matches!(done, Err(Error::Refused { .. })), "{done:?}");
        // Somebody reads the base: it cannot be opened for a commit.
        let reader = FileStorage::open(dir.path().join("middle.img"), &qcow2_chain::storage::Access::write()).unwrap();
        let options = ChainOptions::default().beneath(dir.path()).with_writable(2);
        let busy = Chain::open(dir.path().join("top.img"), &options);
        let busy = busy.expect_err("the base is locked");
        assert!(busy.to_string().contains("middle.img"), "{busy}");
        drop(reader);
    });
    // Marked corrupt: a plan says so, and nobody gets to write.
    let path = dir.path().join("middle.img");
    let storage = FileStorage::open(&path, &qcow2_chain::storage::Access::write()).unwrap();
    storage.write_at(&[2], 79).unwrap();
    drop(storage);
    assert_nothing_written(dir.path(), || {
        let planned = plan(&open(dir.path(), 0), 1).unwrap();
        assert!(planned.commit.obstacles[0].ends_with("marked corrupt") && planned.cheapest == Direction::Pull);
        let options = OpenOptions::default().with_write(true);
        assert!(Image::open_path(&path, &options).is_err());
        let options = ChainOptions::default().beneath(dir.path()).with_writable(2);
        assert!(Chain::open(dir.path().join("top.img"), &options).is_err());
    });
}

#[test]
fn the_rate_is_kept() {
    let (chain, _) = in_containers(32 << 20, 64);
    let start = Instant::now();
    let options = CommitOptions::default().with_rate_limit(Some(8 << 20));
    let report = commit(&chain, &options, &()).unwrap();
    assert_eq!(report.copied + report.copied_in_kernel, 4 << 20);
    assert!(start.elapsed() >= Duration::from_millis(300), "{:?}", start.elapsed());
    let options = PullOptions::default().with_rate_limit(Some(1 << 40));
    pull(&chain, &options, &()).unwrap();
}

/// The program: plans, the direction, the limit, and Ctrl-C in the middle of a merge.
#[cfg(all(feature = "cli", unix))]
mod program {
    use std::process::{Command, Output};

    use super::*;

    fn start(dir: &Path, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qcow2-chain"));
        command.args(args).current_dir(dir);
        command
    }

    fn run(dir: &Path, args: &[&str]) -> Output {
        start(dir, args).output().unwrap()
    }

    fn text(bytes: &[u8]) -> String {
        String::from_utf8_lossy(bytes).into_owned()
    }

    #[test]
    fn a_dry_run_prints_the_plan_and_writes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        small_chain(dir.path(), 12, 20..60);
        assert_nothing_written(dir.path(), || {
            let human = run(dir.path(), &["commit", "--dry-run", "top.img"]);
            assert_eq!(text(&human.stdout), plan_of(dir.path(), 1), "{}", text(&human.stderr));
            for args in [&["commit", "--dry-run", "--json", "top.img"][..], &["pull", "--dry-run", "--json", "top.img"]]
            {
                let json: serde_json::Value = serde_json::from_slice(&run(dir.path(), args).stdout).unwrap();
                assert_eq!(json["cheapest"], "pull", "{json}");
                // A pull to the end takes in the deepest layer too, or the other way round.
                let clusters = if args[0] == "commit" { 40 } else { 44 };
                assert_eq!(json["commit"]["data"], clusters << 16, "{json}");
            }
        });
    }

    fn plan_of(dir: &Path, base: usize) -> String {
        // The program was given a bare name.
        plan(&open(dir, 0), base).unwrap().to_string().replace(&format!("{}/", dir.display()), "")
    }

    #[test]
    fn the_direction_that_is_cheaper_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        small_chain(dir.path(), 12, 20..60);
        let middle = std::fs::read(dir.path().join("middle.img")).unwrap();
        let done = run(dir.path(), &["commit", "--direction", "auto", "top.img"]);
        assert_eq!(text(&done.stdout), "Image pulled.\n", "{}", text(&done.stderr));
        assert!(middle == std::fs::read(dir.path().join("middle.img")).unwrap());
        let chain = open(dir.path(), 0);
        assert_eq!(chain.layers().len(), 2, "the top sits on the base now");
        let mut buf = [0; 4];
        chain.read_at(&mut buf, GuestOffset::new(9 << 16)).unwrap();
        assert_eq!(buf, [2; 4]);
    }

    #[test]
    fn dependents_are_looked_for_where_the_user_says() {
        let dir = tempfile::tempdir().unwrap();
        small_chain(dir.path(), 12, 20..60);
        let other = Arc::new(FileStorage::create_new(dir.path().join("other.img")).unwrap());
        Image::create(other, &CreateOptions::new(1 << 20).with_backing("middle.img", "qcow2"))
            .unwrap()
            .close()
            .unwrap();
        assert_nothing_written(dir.path(), || {
            let refused = run(dir.path(), &["commit", "--dependents-in", ".", "top.img"]);
            assert_eq!(refused.status.code(), Some(1));
            assert!(text(&refused.stderr).contains("other.img"), "{}", text(&refused.stderr));
        });
    }

    /// Interrupted in the middle, a merge says what it left; the next run completes it.
    #[test]
    fn ctrl_c_leaves_a_whole_chain() {
        use nix::sys::signal::{Signal, kill};
        for verb in ["commit", "pull"] {
            let dir = tempfile::tempdir().unwrap();
            small_chain(dir.path(), 100, 60..200);
            let disk = || {
                let chain = open(dir.path(), 0);
                let mut content = vec![0; 16 << 20];
                chain.read_at(&mut content, GuestOffset::ZERO).unwrap();
                content
            };
            let before = disk();
            let mut command = start(dir.path(), &[verb, "-p", "--rate-limit", "1M", "top.img"]);
            let mut child =
                command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap();
            // Once something has moved, so that the signal comes in the middle.
            let mut seen = String::new();
            let out = child.stdout.as_mut().unwrap();
            while !seen.chars().any(|letter| ('1'..='9').contains(&letter)) || !seen.contains(".") {
                let mut byte = [0];
                assert_eq!(std::io::Read::read(out, &mut byte).unwrap(), 1, "{verb} ended early: {seen}");
                seen.push_str(&text(&byte).replace("/100%", ""));
            }
            kill(nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGINT).unwrap();
            let ended = child.wait_with_output().unwrap();
            assert_eq!(ended.status.code(), Some(130), "{verb}: {}", text(&ended.stderr));
            assert!(text(&ended.stderr).contains("cancelled: top.img reads as before"), "{}", text(&ended.stderr));
            assert!(disk() == before, "{verb} changed what the guest reads");
            let again = run(dir.path(), &[verb, "top.img"]);
            assert!(again.status.success(), "{}", text(&again.stderr));
            assert!(disk() == before, "{verb} changed what the guest reads");
            for name in NAMES {
                assert!(run(dir.path(), &["check", name]).status.success(), "{name}");
            }
        }
    }
}
