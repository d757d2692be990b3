//! Long chains of unequal layers: everything that changes one, against what `qemu-img` makes of a copy of the same chain.
//!
//! A chain is made once and copied for each operation: starting QEMU's tools is what these tests cost.

use std::path::{Path, PathBuf};

use qcow2_chain::chain::{Chain, Node};
use qcow2_chain::image::ResizeOptions;
use qcow2_chain::merge::{
    AfterCommit, CommitOptions, Onto, PullOptions, RebaseOptions, commit, pull, rebase, rebase_unsafe,
};

use crate::support::layers::{format_of, layers, name_of, open};
use crate::support::qemu::Qemu;
use crate::support::recipe::{RandomImage, Shape};
use crate::support::rng::{Rng, cases, count, trace};

/// A chain of two to eight layers in a directory of its own.
struct Deep {
    qemu: Qemu,
    /// The top first.
    images: Vec<RandomImage>,
    dir: tempfile::TempDir,
}

/// Two copies of a chain, one to be changed by this crate and one by QEMU.
struct Pair {
    ours: PathBuf,
    theirs: PathBuf,
}

impl Deep {
    fn random(qemu: Qemu, rng: &mut Rng) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let chain = dir.path().join("chain");
        std::fs::create_dir(&chain).unwrap();
        // Half of the chains are long.
        let depth = if rng.chance(1, 2) { rng.within(5..9) } else { rng.within(2..5) };
        let shapes = (0..depth).map(|_| Shape::random(rng)).collect();
        let mut images = layers(qemu, &chain, rng, "layer", shapes, 5);
        images.reverse();
        images.iter().for_each(trace);
        Self { qemu, images, dir }
    }

    fn top(&self) -> &RandomImage {
        &self.images[0]
    }

    /// Any layer beneath the top, as its index in the chain.
    fn lower(&self, rng: &mut Rng) -> usize {
        usize::try_from(rng.within(1..self.images.len() as u64)).unwrap()
    }

    /// Two chains whose layers of these indices are copies; the others are the same files.
    fn pair(&self, what: &str, changed: std::ops::RangeInclusive<usize>) -> Pair {
        let copy = |side: &str| {
            let dir = self.dir.path().join(format!("{what}-{side}"));
            std::fs::create_dir(&dir).unwrap();
            for (index, image) in self.images.iter().enumerate() {
                let (from, to) = (&image.path, dir.join(name_of(image)));
                if changed.contains(&index) {
                    std::fs::copy(from, to).unwrap();
                } else {
                    std::fs::hard_link(from, to).unwrap();
                }
            }
            dir
        };
        Pair { ours: copy("ours"), theirs: copy("theirs") }
    }

    /// Fails unless both copies of a layer show the same, and QEMU finds nothing wrong with ours.
    fn assert_same(&self, pair: &Pair, image: &RandomImage, what: &str) {
        let [ours, theirs] = [&pair.ours, &pair.theirs].map(|dir| file(dir, image));
        let format = format_of(image);
        let run = self.qemu.try_img(&["compare", "-f", format, "-F", format, &ours, &theirs]);
        assert_eq!(run.code, 0, "{what}, {}: {}{}{self}", name_of(image), run.stdout, run.stderr);
        self.assert_clean(pair, image);
    }

    fn assert_clean(&self, pair: &Pair, image: &RandomImage) {
        if format_of(image) == "qcow2" {
            self.qemu.assert_clean(&pair.ours.join(name_of(image)));
        }
    }

    /// Whether QEMU may give up growing this layer to that size, as it cannot hide a longer backing file: version 2 has no
    /// zero clusters, and a compressed cluster no zero subclusters. (Here zeroes are written as data.)
    fn cannot_hide(&self, index: usize, size: u64) -> bool {
        let image = &self.images[index];
        let below = self.images.get(index + 1).map_or(0, |below| below.shape.size);
        (image.shape.compat == "0.10" || image.shape.extended_l2) && below > image.shape.size && size > image.shape.size
    }

    /// Fails unless our copy of a layer shows this.
    fn assert_content(&self, pair: &Pair, image: &RandomImage, content: &[u8], what: &str) {
        let path = pair.ours.join(name_of(image));
        let shown =
            if format_of(image) == "raw" { std::fs::read(path).unwrap() } else { self.qemu.content(&path, None) };
        assert!(shown == content, "{what}, {}: {self}", name_of(image));
    }

    fn commit(&self, rng: &mut Rng) {
        let index = self.lower(rng);
        let pair = self.pair("commit", 0..=index);
        let (top, base) = (self.top(), &self.images[index]);
        let empty = index == 1 && rng.chance(1, 2);
        let what = format!("commit into layer {index}, emptied {empty}");
        let (their_top, their_base) = (file(&pair.theirs, top), file(&pair.theirs, base));
        let mut args = vec!["commit", "-q", "-f", "qcow2"];
        match (index, empty) {
            (1, true) => {}
            (1, false) => args.push("-d"),
            _ => args.extend(["-b", &their_base]),
        }
        args.push(&their_top);
        let run = self.qemu.try_img(&args);

        let chain = open(&pair.ours.join(name_of(top)), "qcow2", index + 1);
        let after = if empty { AfterCommit::Empty } else { AfterCommit::Keep };
        let options = CommitOptions::default().with_base(index).with_after(after).with_allow_stale_snapshots(true);
        let done = commit(&chain, &options, &());
        chain.close().unwrap();
        if is_fixed(base) && top.shape.size > base.shape.size {
            assert!(done.is_err() && run.code != 0, "{what}: {done:?}, {run:?}: {self}");
            return;
        }
        done.unwrap_or_else(|error| panic!("{what}: {error}: {self}"));
        if run.code == 0 {
            self.assert_same(&pair, base, &what);
        } else {
            assert!(self.cannot_hide(index, top.shape.size), "{what}: {}{self}", run.stderr);
            self.assert_clean(&pair, base);
        }
        let mut merged = top.model.clone();
        merged.extend(base.model.get(merged.len()..).unwrap_or_default());
        self.assert_content(&pair, base, &merged, &what);
        self.assert_clean(&pair, top);
        self.assert_content(&pair, top, &top.model, &what);
        for (name, model) in &base.snapshots {
            let shown = self.qemu.content(&pair.ours.join(name_of(base)), Some(name));
            assert!(shown[..model.len()] == model[..], "{what}: {name} of the base: {self}");
        }
    }

    /// `qemu-img` has no pull; its safe rebase onto the same layer must come to the same.
    fn pull(&self, rng: &mut Rng) {
        let (pair, top) = (self.pair("pull", 0..=0), self.top());
        let base = (self.images.len() > 2 && rng.chance(3, 4)).then(|| self.lower(rng)).filter(|base| *base > 1);
        let what = format!("pull down to {base:?}");
        let chain = open(&pair.ours.join(name_of(top)), "qcow2", 1);
        pull(&chain, &PullOptions::default().with_base(base).with_allow_stale_snapshots(true), &()).unwrap();
        chain.close().unwrap();
        self.rebase_theirs(&pair, base.map(|base| &self.images[base]), &what);
        self.assert_rebased(&pair, &what);
    }

    fn rebase(&self, rng: &mut Rng) {
        let (pair, top) = (self.pair("rebase", 0..=0), self.top());
        let base = rng.chance(3, 4).then(|| self.lower(rng));
        let drop_equal = rng.chance(1, 3);
        let what = format!("rebase onto {base:?}, dropping {drop_equal}");
        let chain = open(&pair.ours.join(name_of(top)), "qcow2", 1);
        let options = RebaseOptions::default().with_drop_equal(drop_equal).with_ignore_snapshots(true);
        let onto = base.map_or(Onto::Nothing, Onto::Layer);
        // The same layer, met as a chain of its own: both sides are walked to the ground.
        let other = base.filter(|_| rng.chance(1, 2)).map(|base| {
            let base = &self.images[base];
            open(&pair.ours.join(name_of(base)), format_of(base), 0)
        });
        rebase(&chain, other.as_ref().map_or(onto, Onto::Chain), &options, &()).unwrap();
        chain.close().unwrap();
        self.rebase_theirs(&pair, base.map(|base| &self.images[base]), &what);
        self.assert_rebased(&pair, &what);
    }

    fn rebase_theirs(&self, pair: &Pair, base: Option<&RandomImage>, what: &str) {
        let (name, top) = (base.map_or(String::new(), name_of), file(&pair.theirs, self.top()));
        let mut args = vec!["rebase", "-q", "-f", "qcow2", "-b", &name];
        args.extend(base.into_iter().flat_map(|base| ["-F", format_of(base)]));
        args.push(&top);
        let run = self.qemu.try_img(&args);
        assert_eq!(run.code, 0, "{what}: {}{self}", run.stderr);
    }

    fn assert_rebased(&self, pair: &Pair, what: &str) {
        let top = self.top();
        self.assert_same(pair, top, what);
        self.assert_content(pair, top, &top.model, what);
        let [a, b] = [&pair.ours, &pair.theirs].map(|dir| self.qemu.info(&dir.join(name_of(top))));
        for key in ["backing-filename", "backing-filename-format"] {
            assert_eq!(a[key], b[key], "{what}: {key}: {self}");
        }
    }

    /// Only the name changes: what is shown then is what QEMU shows.
    fn rebase_unsafe(&self, rng: &mut Rng) {
        let (pair, top) = (self.pair("unsafe", 0..=0), self.top());
        let base = rng.chance(3, 4).then(|| &self.images[self.lower(rng)]);
        let what = format!("rebase -u onto {:?}", base.map(name_of));
        let chain = open(&pair.ours.join(name_of(top)), "qcow2", 1);
        let (name, image) = (base.map(name_of), chain.top().node.as_qcow2().unwrap());
        rebase_unsafe(image, name.as_deref().map(str::as_bytes), base.map(|base| format_of(base).as_bytes())).unwrap();
        chain.close().unwrap();
        let (name, file) = (name.unwrap_or_default(), file(&pair.theirs, top));
        let mut args = vec!["rebase", "-q", "-u", "-f", "qcow2", "-b", &name];
        args.extend(base.into_iter().flat_map(|base| ["-F", format_of(base)]));
        args.push(&file);
        self.qemu.img(&args);
        self.assert_same(&pair, top, &what);
        let info = |dir: &Path| self.qemu.info(&dir.join(name_of(top)))["backing-filename"].clone();
        assert_eq!(info(&pair.ours), info(&pair.theirs), "{what}: {self}");
    }

    /// A copy of the top over any layer, its own backing file or one further down.
    #[cfg(feature = "cli")]
    fn copy_over(&self, rng: &mut Rng) {
        let (pair, base) = (self.pair("copy", 0..=0), &self.images[self.lower(rng)]);
        let (name, format) = (name_of(base), format_of(base));
        let what = format!("convert -B {name}");
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_qcow2-chain"));
        command.args([
            "convert",
            "-f",
            "qcow2",
            "-O",
            "qcow2",
            "-B",
            &name,
            "-F",
            format,
            &name_of(self.top()),
            "copy",
        ]);
        let done = command.current_dir(&pair.ours).output().unwrap();
        assert!(done.status.success(), "{what}: {}{self}", String::from_utf8_lossy(&done.stderr));
        let copy = pair.ours.join("copy");
        self.qemu.assert_clean(&copy);
        assert_eq!(self.qemu.info(&copy)["backing-filename"].as_str(), Some(&*name), "{what}: {self}");
        assert!(self.qemu.content(&copy, None) == self.top().model, "{what}: {self}");
    }

    /// Any layer becomes larger or smaller; those above it see the difference.
    fn resize(&self, rng: &mut Rng) {
        let index = usize::try_from(rng.within(0..self.images.len() as u64)).unwrap();
        let pair = self.pair("resize", index..=index);
        let image = &self.images[index];
        let old = image.shape.size;
        let size = if rng.chance(1, 2) { rng.within(0..old / 512) } else { rng.within(old / 512..2 * old / 512 + 1) };
        let size = size.max(1) * 512;
        let what = format!("resize of {} from {old} to {size}", name_of(image));
        let (format, their, text) = (format_of(image), file(&pair.theirs, image), size.to_string());
        let run = self.qemu.try_img(&["resize", "-q", "--shrink", "-f", format, &their, &text]);
        let chain = open(&pair.ours.join(name_of(image)), format, 1);
        let done = resize_top(&chain, size);
        chain.close().unwrap();
        if is_fixed(image) {
            assert!(done.is_err() && run.code != 0, "{what}: {done:?}, {run:?}: {self}");
            return;
        }
        done.unwrap_or_else(|error| panic!("{what}: {error}: {self}"));
        let mut model = image.model.clone();
        model.resize(usize::try_from(size).unwrap(), 0);
        self.assert_content(&pair, image, &model, &what);
        if run.code == 0 {
            self.assert_same(&pair, image, &what);
            self.assert_same(&pair, self.top(), &what);
        } else {
            assert!(self.cannot_hide(index, size), "{what}: {}{self}", run.stderr);
            self.assert_clean(&pair, image);
        }
        // What was cut off does not come back. (QEMU, growing, shows again what its last cluster still held.)
        if size < old {
            let chain = open(&pair.ours.join(name_of(image)), format, 1);
            resize_top(&chain, old).unwrap();
            chain.close().unwrap();
            model.resize(usize::try_from(old).unwrap(), 0);
            self.assert_content(&pair, image, &model, &format!("{what} and back"));
        }
    }
}

/// Whether an image cannot be resized: version 2 does not record the size of its internal snapshots.
fn is_fixed(image: &RandomImage) -> bool {
    image.shape.compat == "0.10" && !image.snapshots.is_empty()
}

fn file(dir: &Path, image: &RandomImage) -> String {
    dir.join(name_of(image)).to_string_lossy().into_owned()
}

fn resize_top(chain: &Chain, size: u64) -> qcow2_chain::image::Result<()> {
    let options = ResizeOptions::default().with_shrink(true);
    match &chain.top().node {
        Node::Raw(raw) => raw.resize(size),
        Node::Qcow2(image) => {
            let below = chain.layers().get(1).map_or(0, |layer| layer.node.virtual_size());
            image.resize_over(size, &options, &chain.below(0), below)
        }
    }
}

impl std::fmt::Display for Deep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.images.iter().try_for_each(|image| image.fmt(f))
    }
}

#[test]
fn whatever_changes_a_long_chain_agrees_with_qemu() {
    let Some(qemu) = Qemu::find() else { return };
    cases("long chains", count("QCOW2_CHAIN_DEEP_CASES", 30), |rng| {
        let deep = Deep::random(qemu, rng);
        deep.commit(rng);
        deep.pull(rng);
        deep.rebase(rng);
        deep.rebase_unsafe(rng);
        deep.resize(rng);
        #[cfg(feature = "cli")]
        deep.copy_over(rng);
    });
}
