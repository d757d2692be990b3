//! Worlds that are built on purpose: links, owners, leftovers, templates and neighbours.

use std::ffi::OsString;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::access::{HYPERVISOR, Holder};
use super::images::{self, Write};
use super::oracle::Tree;
use super::program::{Caller, Run, args, give};
use super::world::Grounds;
use crate::support::say;

pub const MIB: u64 = 1 << 20;

/// A directory with the program in it.
pub struct Scene<'a> {
    _grounds: &'a Grounds,
    pub dir: PathBuf,
    pub caller: Caller,
}

impl Drop for Scene<'_> {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

impl<'a> Scene<'a> {
    pub fn new(grounds: &'a Grounds) -> Self {
        let dir = grounds.fresh("scene");
        std::fs::create_dir(&dir).expect("a directory");
        Self { _grounds: grounds, caller: grounds.caller(&dir, None), dir }
    }

    /// Creates a scene with a VM of one volume and its snapshot `s1`. The volume reads as 1.
    pub fn with_snapshot(grounds: &'a Grounds) -> Self {
        let scene = Self::new(grounds);
        scene.image("vda.qcow2", None, 1);
        scene.ok("init web.json --volume vda=vda.qcow2");
        scene.ok("snapshot web.json s1");
        scene
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Creates a qcow2 image of 1 MiB with one byte everywhere, on another one if `backing` names
    /// it.
    pub fn image(&self, name: &str, backing: Option<&str>, byte: u8) -> PathBuf {
        let path = self.path(name);
        images::create(&path, false, MIB, backing.map(|backing| (backing.as_bytes().to_vec(), "qcow2")));
        images::write(&path, &[whole(byte)]);
        path
    }

    /// Runs a `vm` verb; words are separated by spaces.
    pub fn run(&self, words: &str) -> Run {
        self.caller.run(&args(&words.split(' ').collect::<Vec<_>>()))
    }

    /// Runs a `vm` verb, which must succeed.
    pub fn ok(&self, words: &str) -> Run {
        let run = self.run(words);
        assert!(run.done(), "{words}: {}", run.stderr);
        run
    }

    /// Runs a `vm` verb, which must be refused and change nothing.
    pub fn refused(&self, words: &str) -> String {
        let before = self.tree();
        let run = self.run(words);
        assert_eq!(run.code, Some(1), "{words}: {}{}", run.stdout, run.stderr);
        before.assert_unchanged(&self.tree(), words);
        run.stderr
    }

    pub fn tree(&self) -> Tree {
        Tree::read(std::slice::from_ref(&self.dir))
    }

    /// The path of a volume's active file, or of a snapshot's file.
    pub fn active(&self, catalogue: &str, more: &str) -> PathBuf {
        let run = self.ok(&format!("path {catalogue} {more}"));
        let path = self.caller.cwd.join(run.stdout.trim_end_matches('\n'));
        std::fs::canonicalize(&path).unwrap_or(path)
    }

    /// Fails the test unless an image has one byte everywhere.
    pub fn reads(&self, path: &Path, byte: u8) {
        images::compare(path, &vec![byte; 1 << 20]).unwrap_or_else(|wrong| panic!("{wrong}"));
    }
}

/// A write of the whole disk.
pub fn whole(byte: u8) -> Write {
    (0, MIB, byte)
}

/// Interrupts `vm delete` by SIGINT, slowed down by a rate limit, so that nothing has been
/// published.
fn interrupted(scene: &Scene<'_>, words: &str) {
    let words = format!("vm {words} --rate-limit 64k");
    let mut child = Command::new(&scene.caller.binary);
    child.args(words.split(' ')).current_dir(&scene.dir).stdout(std::process::Stdio::null());
    let mut child = child.stderr(std::process::Stdio::null()).spawn().expect("the program starts");
    let journal = |dir: &Path| {
        let entries = std::fs::read_dir(dir).expect("the directory").flatten();
        entries.map(|entry| entry.file_name()).any(|name| name.to_string_lossy().ends_with(".journal"))
    };
    while !journal(&scene.dir) && child.try_wait().expect("the child").is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(Duration::from_millis(300));
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).expect("a process"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).expect("the signal is sent");
    let status = child.wait().expect("the child");
    assert_eq!(status.code(), Some(130), "{words}: it was done before it was interrupted");
}

/// Fault 1: a journal that was left behind by another catalogue.
#[test]
fn leftover_journal_is_refused_by_init() {
    let Some(grounds) = Grounds::new() else { return };
    let scene = Scene::with_snapshot(&grounds);
    let active = scene.active("web.json", "vda");
    images::write(&active, &[whole(2)]);
    interrupted(&scene, "delete web.json s1 --direction commit");
    std::fs::rename(scene.path("web.json"), scene.path("lost.json")).expect("the catalogue is lost");
    let name = active.file_name().expect("a name").to_string_lossy().into_owned();
    let error = scene.refused(&format!("init web.json --volume vda={name}"));
    assert!(error.contains("journal"), "{error}");
    scene.reads(&active, 2);
    // Under another name nothing is left over.
    std::fs::rename(scene.path("lost.json"), scene.path("web.json")).expect("the catalogue is found");
    scene.ok("recover web.json");
    scene.reads(&scene.active("web.json", "vda"), 2);
}

/// Fault 3: two VMs of one name whose images are in one directory, at the same time.
#[test]
fn two_vms_of_one_name_in_one_pool_keep_their_overlays() {
    let Some(grounds) = Grounds::new() else { return };
    let scene = Scene::new(&grounds);
    for (vm, byte) in [("a", 10), ("b", 20)] {
        std::fs::create_dir(scene.path(vm)).expect("a directory");
        scene.image(&format!("{vm}.qcow2"), None, byte);
        scene.ok(&format!("init {vm}/web.json --vm web --volume vda={vm}.qcow2"));
    }
    for round in 1..6_u8 {
        std::thread::scope(|scope| {
            for vm in ["a", "b"] {
                let scene = &scene;
                scope.spawn(move || scene.ok(&format!("snapshot {vm}/web.json s{round}")));
            }
        });
        for (vm, byte) in [("a", 10), ("b", 20)] {
            images::write(&scene.active(&format!("{vm}/web.json"), "vda"), &[whole(byte + round)]);
        }
    }
    // One of them is killed again and again; the other one's files are not touched by its recovery.
    let pace = scene.ok("snapshot a/web.json last").time;
    for step in 0..40_u32 {
        let name = format!("k{step}");
        let words = args(&["snapshot", "a/web.json", &name]);
        scene.caller.run_killed(&words, pace * step / 40);
        scene.ok(&format!("snapshot b/web.json {name}"));
        images::write(&scene.active("b/web.json", "vda"), &[whole(25)]);
        scene.ok("recover a/web.json");
        scene.reads(&scene.active("a/web.json", "vda"), 15);
        scene.reads(&scene.active("b/web.json", "vda"), 25);
    }
    for (vm, byte) in [("a", 10), ("b", 20)] {
        for round in 1..6_u8 {
            let frozen = scene.active(&format!("{vm}/web.json"), &format!("vda --snapshot s{round}"));
            scene.reads(&frozen, byte + round - 1);
        }
    }
}

/// Fault 4: a file that another program writes is not removed with its snapshot.
#[test]
fn leaf_that_is_written_is_not_removed() {
    let Some(grounds) = Grounds::new() else { return };
    let scene = Scene::with_snapshot(&grounds);
    let leaf = scene.active("web.json", "vda");
    images::write(&leaf, &[whole(2)]);
    scene.ok("snapshot web.json s2");
    scene.ok("revert web.json s1");
    let holder = Holder::open(&leaf, "qcow2", true).expect("QEMU opens the leaf");
    for words in ["delete web.json s2", "snapshot web.json s3", "revert web.json s2"] {
        scene.refused(words);
    }
    assert_eq!(scene.run("verify web.json").code, Some(2), "a frozen file is written");
    drop(holder);
    scene.reads(&leaf, 2);
    scene.ok("delete web.json s2");
    assert!(!leaf.exists(), "the leaf was removed after its writer ended");
}

/// Fault 5: a base that is read-only or that others use survives a deletion in any direction.
#[test]
fn read_only_template_survives_every_direction() {
    let Some(grounds) = Grounds::new() else { return };
    for direction in ["commit", "pull", "auto"] {
        let scene = Scene::new(&grounds);
        let template = scene.image("tmpl.qcow2", None, 1);
        scene.image("web.qcow2", Some("tmpl.qcow2"), 2);
        let other = scene.path("other.qcow2");
        images::create(&other, false, MIB, Some((b"tmpl.qcow2".to_vec(), "qcow2")));
        give_mode(&template, 0o444);
        let before = scene.tree();
        let init = "init web.json --volume vda=web.qcow2 --snapshot golden";
        scene.refused(init);
        scene.ok(&format!("{init} --no-dependents"));
        let deletion = scene.run(&format!("delete web.json golden --direction {direction}"));
        if deletion.done() {
            assert!(deletion.stdout.contains("released"), "the template is not reported: {}", deletion.stdout);
        }
        scene.reads(&template, 1);
        scene.reads(&other, 1);
        scene.reads(&scene.active("web.json", "vda"), 2);
        let kept = |path: &Path| path != template && path != other;
        assert_eq!(before.changes(&scene.tree(), kept), Vec::<String>::new(), "{direction}");
    }
}

fn give_mode(path: &Path, mode: u32) {
    let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
    std::fs::set_permissions(path, mode).expect("the mode is changed");
}

/// Fault 7: a chain over two directories, or over two file systems.
#[test]
fn chain_over_two_directories_is_merged_in_both_directions() {
    let Some(grounds) = Grounds::with_second_file_system() else { return };
    let second = [None, grounds.other.clone()];
    for other in second.iter().take(if grounds.other.is_some() { 2 } else { 1 }) {
        for direction in ["commit", "pull"] {
            let scene = Scene::new(&grounds);
            let b = match other {
                None => scene.path("b"),
                Some(other) => other.join(scene.dir.file_name().expect("a name")),
            };
            std::fs::create_dir(scene.path("a")).and_then(|()| std::fs::create_dir(&b)).expect("directories");
            let (root, mid, top) = (scene.path("a/root.qcow2"), b.join("mid.qcow2"), scene.path("a/top.qcow2"));
            let mut below: Option<&PathBuf> = None;
            for (byte, path) in [(1, &root), (2, &mid), (3, &top)] {
                let name = below.map(|below| (below.as_os_str().as_encoded_bytes().to_vec(), "qcow2"));
                images::create(path, false, MIB, name);
                images::write(path, &[(0, MIB / byte, u8::try_from(byte).expect("small"))]);
                below = Some(path);
            }
            let expected = images::read(&top).expect("the chain reads");
            let oldest = images::read(&root).expect("the root reads");
            let allow = format!("--allow {} --allow {}", scene.path("a").display(), b.display());
            scene.ok(&format!("init web.json --volume vda=a/top.qcow2 {allow} --snapshot s0 --snapshot s1"));
            scene.ok(&format!("delete web.json s1 --direction {direction}"));
            let active = scene.active("web.json", "vda");
            images::compare(&active, &expected).unwrap_or_else(|wrong| panic!("{direction}: {wrong}"));
            let frozen = scene.active("web.json", "vda --snapshot s0");
            images::compare(&frozen, &oldest).unwrap_or_else(|wrong| panic!("{direction}: {wrong}"));
            grounds.qemu.assert_content(&active, &expected);
            scene.ok("verify web.json --deep");
            scene.ok(&format!("delete web.json s0 --direction {direction}"));
            let active = scene.active("web.json", "vda");
            images::compare(&active, &expected).unwrap_or_else(|wrong| panic!("{direction}: {wrong}"));
            let _ = std::fs::remove_dir_all(&b);
        }
    }
}

/// Fault 8: an image with a colon in its name is refused, or its overlays open in QEMU.
#[test]
fn colon_in_a_name_is_refused_or_opens_in_qemu() {
    let Some(grounds) = Grounds::new() else { return };
    let scene = Scene::new(&grounds);
    scene.image("disk:0.qcow2", None, 1);
    let before = scene.tree();
    let run = scene.run("init web.json --volume vda=./disk:0.qcow2");
    if !run.done() {
        return before.assert_unchanged(&scene.tree(), "init");
    }
    scene.ok("snapshot web.json s1");
    let active = scene.active("web.json", "vda");
    grounds.qemu.assert_content(&active, &vec![1; 1 << 20]);
    images::write(&active, &[whole(2)]);
    scene.ok("snapshot web.json s2");
    for (name, direction) in [("s1", "commit"), ("s2", "pull")] {
        scene.ok(&format!("delete web.json {name} --direction {direction}"));
        grounds.qemu.assert_content(&scene.active("web.json", "vda"), &vec![2; 1 << 20]);
    }
}

/// Fault 8: the name of a VM becomes a part of file names.
#[test]
fn colon_in_the_name_of_a_vm_is_refused() {
    let Some(grounds) = Grounds::new() else { return };
    let scene = Scene::new(&grounds);
    scene.image("vda.qcow2", None, 1);
    scene.refused("init web.json --vm web:1 --volume vda=vda.qcow2");
    scene.refused("init web:1.json --volume vda=vda.qcow2");
}

/// Fault 13: an upper file that is missing is an error, not a completed merge.
#[test]
fn missing_top_of_an_interrupted_pull_is_no_completion() {
    let Some(grounds) = Grounds::new() else { return };
    let scene = Scene::with_snapshot(&grounds);
    let active = scene.active("web.json", "vda");
    images::write(&active, &[(MIB / 4, MIB / 4, 2)]);
    let expected = images::read(&active).expect("the volume reads");
    interrupted(&scene, "delete web.json s1 --direction pull");
    let away = grounds.fresh("away");
    std::fs::rename(&active, &away).expect("the file is moved away");
    let run = scene.run("recover web.json");
    assert_eq!(run.code, Some(1), "recovery without the upper file: {}", run.stdout);
    std::fs::rename(&away, &active).expect("the file is returned");
    scene.ok("recover web.json");
    images::compare(&scene.active("web.json", "vda"), &expected).unwrap_or_else(|wrong| panic!("{wrong}"));
}

/// Fault 17: QEMU as its own user opens the overlays, and no other user reads them.
#[test]
fn overlays_belong_to_the_owner_of_the_active_file() {
    let Some(grounds) = Grounds::new() else { return };
    if !grounds.root {
        return say("SKIPPED: foreign owners need root");
    }
    let scene = Scene::new(&grounds);
    let base = scene.image("vda.qcow2", None, 1);
    give(&base, HYPERVISOR, 0o600);
    give_mode(&scene.dir, 0o755);
    let opens = |path: &Path| {
        let ids = [format!("--reuid={}", HYPERVISOR.0), format!("--regid={}", HYPERVISOR.1)];
        let mut command = Command::new("setpriv");
        command.args(ids).arg("--clear-groups").args(["qemu-io", "-f", "qcow2", "-c", "write -q 0 512"]).arg(path);
        let output = command.output().expect("setpriv starts");
        assert!(output.status.success(), "{}: {}", path.display(), String::from_utf8_lossy(&output.stderr));
        let found = std::fs::metadata(path).expect("the image");
        let access =
            (std::os::unix::fs::MetadataExt::mode(&found) & 0o777, std::os::unix::fs::MetadataExt::uid(&found));
        assert_eq!(access, (0o600, HYPERVISOR.0), "mode and owner of {}", path.display());
    };
    scene.ok("init web.json --volume vda=vda.qcow2");
    give(&scene.path("web.json"), HYPERVISOR, 0o640);
    for words in ["snapshot web.json s1", "snapshot web.json s2", "revert web.json s1", "delete web.json s2"] {
        scene.ok(words);
        opens(&scene.active("web.json", "vda"));
    }
    for direction in ["pull", "commit"] {
        scene.ok(&format!("delete web.json s1 --direction {direction}"));
        opens(&scene.active("web.json", "vda"));
        scene.ok("snapshot web.json s1");
    }
    let found = std::fs::metadata(scene.path("web.json")).expect("the catalogue");
    let access = (std::os::unix::fs::MetadataExt::mode(&found) & 0o777, std::os::unix::fs::MetadataExt::uid(&found));
    assert_eq!(access, (0o640, HYPERVISOR.0), "mode and owner of the catalogue");
}

/// Fault 17: a process that may not give a file its owner refuses.
#[test]
fn owner_that_cannot_be_set_is_refused() {
    let Some(grounds) = Grounds::new() else { return };
    if !grounds.root {
        return say("SKIPPED: other users need root");
    }
    let mut scene = Scene::new(&grounds);
    let base = scene.image("vda.qcow2", None, 1);
    give(&base, (HYPERVISOR.0 + 1, HYPERVISOR.1), 0o666);
    give(&scene.dir, HYPERVISOR, 0o755);
    scene.caller = grounds.caller(&scene.dir, Some(HYPERVISOR));
    scene.ok("init web.json --volume vda=vda.qcow2");
    scene.refused("snapshot web.json s1");
    scene.ok("snapshot web.json s1 --ignore-attributes");
    scene.reads(&scene.active("web.json", "vda"), 1);
}

/// Fault 18: overlays of an image that is named by a link are beside the image, and a merge keeps
/// the link.
#[test]
fn link_to_the_active_file_stays_a_link() {
    let Some(grounds) = Grounds::new() else { return };
    for direction in ["commit", "pull"] {
        let scene = Scene::new(&grounds);
        std::fs::create_dir(scene.path("pool")).expect("a directory");
        let real = scene.image("pool/real.qcow2", None, 1);
        symlink("pool/real.qcow2", scene.path("vda.qcow2")).expect("a link");
        scene.ok("init web.json --volume vda=vda.qcow2");
        scene.ok("snapshot web.json s1");
        let active = scene.active("web.json", "vda");
        assert_eq!(active.parent(), Some(scene.path("pool").as_path()), "the overlay's directory");
        images::write(&active, &[whole(2)]);
        scene.ok(&format!("delete web.json s1 --direction {direction}"));
        assert!(scene.path("vda.qcow2").is_symlink(), "the link was replaced");
        scene.reads(&scene.active("web.json", "vda"), 2);
        let survivor = if direction == "commit" { &real } else { &active };
        assert_eq!(&scene.active("web.json", "vda"), survivor, "the survivor's path");
        scene.ok("verify web.json --deep");
    }
}

/// Fault 19: a link to a catalogue is the catalogue.
#[test]
fn link_to_the_catalogue_is_the_catalogue() {
    let Some(grounds) = Grounds::new() else { return };
    let scene = Scene::new(&grounds);
    std::fs::create_dir(scene.path("cats")).expect("a directory");
    scene.image("vda.qcow2", None, 1);
    scene.ok(&format!("init cats/web.json --volume vda={}", scene.path("vda.qcow2").display()));
    symlink("cats/web.json", scene.path("web.json")).expect("a link");
    for (catalogue, name, byte) in [("web.json", "s1", 2), ("cats/web.json", "s2", 3), ("web.json", "s3", 4)] {
        scene.ok(&format!("snapshot {catalogue} {name}"));
        images::write(&scene.active("cats/web.json", "vda"), &[whole(byte)]);
        assert!(scene.path("web.json").is_symlink(), "the link was replaced");
    }
    scene.ok("delete web.json s2");
    for (name, byte) in [("s1", 1), ("s3", 3)] {
        for catalogue in ["web.json", "cats/web.json"] {
            scene.reads(&scene.active(catalogue, &format!("vda --snapshot {name}")), byte);
        }
    }
    scene.reads(&scene.active("web.json", "vda"), 4);
}

/// Fault 21: a stopped clone of a frozen file keeps its content.
#[test]
fn clone_of_a_frozen_file_keeps_its_content() {
    let Some(grounds) = Grounds::new() else { return };
    for direction in ["commit", "pull", "auto"] {
        let scene = Scene::new(&grounds);
        let base = scene.image("vda.qcow2", None, 1);
        scene.ok("init web.json --volume vda=vda.qcow2");
        scene.ok("snapshot web.json s1");
        images::write(&scene.active("web.json", "vda"), &[whole(2)]);
        let clone = scene.path("clone.qcow2");
        images::create(&clone, false, MIB, Some((b"vda.qcow2".to_vec(), "qcow2")));
        let before = scene.tree();
        let run = scene.run(&format!("delete web.json s1 --direction {direction}"));
        if !run.done() {
            before.assert_unchanged(&scene.tree(), direction);
        }
        scene.reads(&clone, 1);
        scene.reads(&base, 1);
        scene.reads(&scene.active("web.json", "vda"), 2);
    }
}

/// Fault 22: one file by two names is refused.
#[test]
fn one_file_by_two_names_is_refused() {
    let Some(grounds) = Grounds::new() else { return };
    let scene = Scene::new(&grounds);
    std::fs::create_dir(scene.path("real")).expect("a directory");
    let image = scene.image("real/vda.qcow2", None, 1);
    std::fs::hard_link(&image, scene.path("real/vdb.qcow2")).expect("a second name");
    symlink("vda.qcow2", scene.path("real/link.qcow2")).expect("a link");
    symlink("real", scene.path("also")).expect("a link");
    for second in ["real/vdb.qcow2", "real/link.qcow2", "also/vda.qcow2", "real/../real/vda.qcow2"] {
        scene.refused(&format!("init web.json --volume vda=real/vda.qcow2 --volume vdb={second}"));
    }
    // Two volumes on one template, whose snapshot would be merged into it twice.
    for (name, template) in [("vdc", "real/vda.qcow2"), ("vdd", "also/vda.qcow2")] {
        let backing = Some((template.as_bytes().to_vec(), "qcow2"));
        images::create(&scene.path(&format!("{name}.qcow2")), false, MIB, backing);
    }
    let allow = format!("--allow {}", scene.dir.display());
    let volumes = "--volume vdc=vdc.qcow2 --volume vdd=vdd.qcow2";
    scene.refused(&format!("init web.json {volumes} {allow} --snapshot golden"));
}

/// Control characters end up in terminals and file names.
#[test]
fn control_characters_in_names_are_refused() {
    let Some(grounds) = Grounds::new() else { return };
    let scene = Scene::new(&grounds);
    scene.image("vda.qcow2", None, 1);
    scene.image("v\nda.qcow2", None, 1);
    scene.refused("init web.json --volume vda=v\nda.qcow2");
    scene.refused("init web.json --vm w\u{1b}[31mb --volume vda=vda.qcow2");
    scene.ok("init web.json --volume vda=vda.qcow2");
    let words: Vec<OsString> = args(&["snapshot", "web.json", "a\n\u{1b}[31mb"]);
    let before = scene.tree();
    assert_eq!(scene.caller.run(&words).code, Some(1), "a control character in a snapshot's name");
    before.assert_unchanged(&scene.tree(), "snapshot");
}
