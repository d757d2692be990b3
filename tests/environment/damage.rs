//! Files that are missing or damaged for a while, catalogues from a backup, and journals that were
//! left behind.

use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use qcow2_chain::chain::Format;

use super::images;
use super::oracle::{Listing, Tree, reads_as};
use super::world::World;
use crate::support::rng::Rng;
use crate::support::victim::{Damage, Victim};

/// Damage to a file of the set that can be taken back.
#[derive(Debug)]
pub struct Harm {
    pub path: PathBuf,
    undo: Undo,
}

#[derive(Debug)]
enum Undo {
    /// The file is at another path.
    Missing { away: PathBuf },
    /// The file was cut to this length.
    Truncated { len: u64, tail: Vec<u8> },
    /// Some bytes were changed.
    Changed { offset: u64, damaged: Vec<u8>, sound: Vec<u8> },
}

impl Harm {
    /// Damages a random file of the set; `None` where nothing suits.
    pub fn do_to(world: &World<'_>, listing: &Listing, rng: &mut Rng) -> Option<Self> {
        let files: Vec<PathBuf> = listing.files().into_iter().filter(|path| !world.is_device(path)).collect();
        if files.is_empty() {
            return None;
        }
        let path = rng.pick(&files);
        let undo = match rng.within(0..4) {
            0 | 1 => Self::remove(world, &path)?,
            2 => Self::truncate(&path)?,
            _ => Self::change(&path, rng)?,
        };
        Some(Self { path, undo })
    }

    fn remove(world: &World<'_>, path: &Path) -> Option<Undo> {
        let away = world.scratch.join("away");
        // A rename keeps the file's identity; it does not reach another file system.
        std::fs::rename(path, &away).is_ok().then_some(Undo::Missing { away })
    }

    fn truncate(path: &Path) -> Option<Undo> {
        let bytes = std::fs::read(path).expect("an image of the set");
        let len = bytes.len() / 4096 * 2048;
        if images::format_of(path) == Format::Raw || len < 4096 {
            return None;
        }
        let file = std::fs::File::options().write(true).open(path).expect("an image of the set");
        file.set_len(len as u64).expect("the image is cut");
        Some(Undo::Truncated { len: len as u64, tail: bytes[len..].to_vec() })
    }

    fn change(path: &Path, rng: &mut Rng) -> Option<Undo> {
        if images::format_of(path) == Format::Raw {
            return None;
        }
        let sound = std::fs::read(path).expect("an image of the set");
        let mut victim = Victim { bytes: sound.clone() };
        victim.damage(rng.pick(&[Damage::L1PastEnd, Damage::L1Unaligned, Damage::DataUnaligned]), rng);
        let first = sound.iter().zip(&victim.bytes).position(|(a, b)| a != b)?;
        let first = first / 8 * 8;
        let (sound, damaged) = (sound[first..first + 8].to_vec(), victim.bytes[first..first + 8].to_vec());
        let undo = Undo::Changed { offset: first as u64, damaged, sound };
        if let Undo::Changed { offset, damaged, .. } = &undo {
            let file = std::fs::File::options().write(true).open(path).expect("an image of the set");
            file.write_all_at(damaged, *offset).expect("the image is damaged");
        }
        Some(undo)
    }

    /// Returns `true` if the file is missing.
    pub fn is_missing(&self) -> bool {
        matches!(self.undo, Undo::Missing { .. })
    }

    /// Takes the damage back, as far as the file still has it.
    pub fn undo(self, still_used: bool) {
        let open = || std::fs::File::options().read(true).write(true).open(&self.path);
        match self.undo {
            Undo::Missing { away } if still_used => {
                assert!(!self.path.exists(), "{}: created in place of a missing file", self.path.display());
                std::fs::rename(away, &self.path).expect("the file is returned");
            }
            Undo::Missing { away } => std::fs::remove_file(away).expect("the file is removed"),
            Undo::Truncated { len, tail } => {
                if let Some(file) = open().ok().filter(|file| file.metadata().is_ok_and(|found| found.len() == len)) {
                    file.write_all_at(&tail, len).expect("the tail is returned");
                }
            }
            Undo::Changed { offset, damaged, sound } => {
                let mut found = vec![0; damaged.len()];
                if let Ok(file) = open()
                    && file.read_exact_at(&mut found, offset).is_ok()
                    && found == damaged
                {
                    file.write_all_at(&sound, offset).expect("the bytes are returned");
                }
            }
        }
    }
}

impl World<'_> {
    /// An older catalogue is restored from a backup, and something is done with it. Whatever
    /// becomes of that, the present volumes and every snapshot must read as before. Returns a
    /// column of the table and ends the case; `None` if the older catalogue names an active file of
    /// the present.
    pub fn restore_catalogue(&mut self, backup: &[u8], rng: &mut Rng) -> Option<&'static str> {
        let listing = self.list(rng);
        let present = std::fs::read(&self.catalogue).expect("the catalogue");
        std::fs::write(&self.catalogue, backup).expect("the backup is restored");
        let old = self.list(rng);
        if old.active.values().any(|path| listing.active.values().any(|active| active == path)) {
            std::fs::write(&self.catalogue, present).expect("the catalogue is returned");
            return None;
        }
        let ready = old.snapshots.iter().filter(|(_, state, _)| state == "ready");
        let names: Vec<String> = ready.map(|(name, _, _)| name.clone()).collect();
        let (verb, name) = match rng.within(0..4) {
            0 | 1 if !names.is_empty() => ("delete", rng.pick(&names)),
            2 if !names.is_empty() => ("revert", rng.pick(&names)),
            _ => ("snapshot", "after-restore".to_owned()),
        };
        let before = Tree::read(&self.watched);
        let args = self.verb(verb, &[name.clone().into()], rng);
        let run = self.caller.run(&args);
        let what = format!("with the catalogue of a backup: {verb} {name}");
        self.log.push(format!("{what} -> {:?} {}", run.code, run.stderr));
        if !run.done() {
            before.assert_unchanged(&Tree::read(&self.watched), &what);
        }
        let now = self.list(rng);
        for (volume, content) in &self.state.now {
            images::compare(&listing.active[volume], content).unwrap_or_else(|wrong| panic!("{what}: {wrong}"));
        }
        for (snapshot, contents) in self.state.taken.iter().filter(|(s, _)| verb != "delete" || **s != name) {
            for (volume, content) in contents {
                // A merge may have moved a snapshot that the older catalogue has too.
                let moved = now.frozen(snapshot, volume).filter(|path| old.frozen(snapshot, volume) != Some(path));
                let path = moved.or_else(|| listing.frozen(snapshot, volume)).expect("a file of the snapshot");
                images::compare(path, content).unwrap_or_else(|wrong| panic!("{what}: {snapshot}: {wrong}"));
            }
        }
        self.judge_neighbours(&what);
        Some(if run.done() { "backup used" } else { "backup refused" })
    }

    /// A journal of an earlier operation is put beside the catalogue: no recovery may act on it.
    pub fn restore_journal(&mut self, journal: &[u8], rng: &mut Rng) {
        let path = self.journal();
        let before = Tree::read(&self.watched);
        std::fs::write(&path, journal).expect("the journal is restored");
        if let Some((user, group)) = self.caller.user {
            super::program::give(&path, (user, group), 0o600);
        }
        let args = self.verb("recover", &[], rng);
        let run = self.caller.run(&args);
        self.log.push(format!("recover with an old journal -> {:?} {}", run.code, run.stderr));
        let _ = std::fs::remove_file(&path);
        let left = |path: &Path| path.extension().is_some_and(|extension| extension == "lock");
        let catalogue = |path: &Path| run.done() && path == self.catalogue;
        let changes = before.changes(&Tree::read(&self.watched), |path| left(path) || catalogue(path));
        assert!(changes.is_empty(), "recovery by an old journal: {}", changes.join("\n"));
        let listing = self.list(rng);
        reads_as(&listing, &self.state).unwrap_or_else(|wrong| panic!("recovery by an old journal: {wrong}"));
    }

    /// The path of the catalogue's journal.
    pub fn journal(&self) -> PathBuf {
        let mut path = self.catalogue.clone().into_os_string();
        path.push(".journal");
        path.into()
    }
}
