//! The life of a VM in a world: random operations, kills, moves, damage, and the judgement after
//! each.

use std::os::unix::ffi::OsStringExt as _;
use std::path::PathBuf;
use std::time::Duration;

use super::access::{Access, HYPERVISOR, Holder};
use super::damage::Harm;
use super::images;
use super::names::Naming;
use super::neighbours::Neighbour;
use super::operations::{Expect, Op};
use super::oracle::{Before, Tree, reads_as};
use super::program::{Run, give, render, tool};
use super::recipe::Recipe;
use super::table::Table;
use super::world::{Grounds, State, World};
use crate::support::rng::{Rng, trace};

/// Builds a random world, takes its VM in and lets it live.
pub fn live(grounds: &Grounds, table: &Table, rng: &mut Rng) {
    let recipe = Recipe::random(grounds, rng);
    let (world, init) = World::build(grounds, recipe, rng);
    let labels = world.recipe.labels();
    let mut life = Life { world, table, labels, backup: None, journal: None, over: false };
    if !life.init(&init, rng) {
        return;
    }
    for _ in 0..rng.within(5..14) {
        if !life.over {
            life.step(rng);
        }
    }
    if !life.over {
        life.end(rng);
    }
    trace(&life.world.log.join("\n"));
}

/// A VM in a world and what the test remembers of it.
struct Life<'a> {
    world: World<'a>,
    table: &'a Table,
    labels: Vec<String>,
    /// An earlier catalogue.
    backup: Option<Vec<u8>>,
    /// The journal of an operation that was killed.
    journal: Option<Vec<u8>>,
    /// Nothing more can be expected of this world.
    over: bool,
}

impl Life<'_> {
    fn count(&self, column: &'static str, done: bool) {
        self.table.count(&self.labels, column, done);
    }

    /// Takes the VM in; returns `false` if that is refused, as it may be in some worlds.
    fn init(&mut self, init: &[std::ffi::OsString], rng: &mut Rng) -> bool {
        let before = Tree::read(&self.world.watched);
        let run = self.world.caller.run(init);
        self.world.log.push(format!("vm {} -> {:?} {}", render(init), run.code, run.stderr));
        self.count("init", run.done());
        let now = Tree::read(&self.world.watched);
        if !run.done() {
            before.assert_unchanged(&now, "init");
            assert!(self.world.recipe.may_refuse_init(), "init is refused: {}", run.stderr);
            return false;
        }
        let catalogue = self.world.catalogue.as_os_str().as_encoded_bytes();
        let changes = before.changes(&now, |path| path.as_os_str().as_encoded_bytes().starts_with(catalogue));
        assert!(changes.is_empty(), "init: {}", changes.join("\n"));
        if matches!(self.world.recipe.access, Access::Owned | Access::OwnedByGroup) {
            give(&self.world.catalogue, HYPERVISOR, 0o640);
        }
        if matches!(self.world.recipe.naming, Naming::Bytes | Naming::ByteDirectory) {
            self.path_has_all_bytes(rng);
        }
        // The name of such an image cannot be read back from JSON.
        self.world.recipe.naming != Naming::Bytes
    }

    /// A path that is not UTF-8 is printed byte by byte.
    fn path_has_all_bytes(&mut self, rng: &mut Rng) {
        for volume in self.world.state.now.clone().into_keys() {
            let args = self.world.verb("path", &[volume.into()], rng);
            let run = self.world.caller.run(&args);
            let bytes = run.bytes.strip_suffix(b"\n").expect("a line").to_vec();
            let path = self.world.caller.cwd.join(std::ffi::OsString::from_vec(bytes));
            assert!(path.exists(), "vm path prints {} ({:?})", path.display(), run.stdout);
        }
    }

    /// One random event.
    fn step(&mut self, rng: &mut Rng) {
        if rng.chance(2, 3) {
            let listing = self.world.list(rng);
            self.world.guest_writes(&listing, rng);
        }
        if self.backup.is_none() && rng.chance(1, 4) {
            self.backup = Some(std::fs::read(&self.world.catalogue).expect("the catalogue"));
        }
        match rng.within(0..32) {
            0..13 => self.operate(rng),
            13..19 => self.kill(rng),
            19 | 20 => self.plan(rng),
            21 | 22 => self.hold(rng),
            23 | 24 => self.damage(rng),
            25 | 26 => self.neighbours(rng),
            27 | 28 => self.relocate(rng),
            29 => self.attach(rng),
            30 => self.stale_journal(rng),
            _ => self.stale_catalogue(rng),
        }
    }

    fn operate(&mut self, rng: &mut Rng) {
        let op = self.random_operation(rng);
        let expect = op.expect(&self.world);
        let before = self.world.before(rng);
        let run = self.world.act(&op, rng);
        self.judge(&op, &before, &run, expect, rng);
        self.count(op.column(), run.done());
    }

    fn random_operation(&mut self, rng: &mut Rng) -> Op {
        let op = Op::random(&mut self.world, rng);
        if matches!(op, Op::Resize { .. }) {
            self.world.drop_clones_of_active();
        }
        op
    }

    fn judge(&mut self, op: &Op, before: &Before, run: &Run, expect: Expect, rng: &mut Rng) {
        if run.done() {
            assert!(expect != Expect::Refused, "{op}: done, and should be refused: {}", run.stdout);
            let after = op.after(&self.world.state);
            self.world.judge_done(before, Some(run), &after, rng);
            if matches!(op, Op::Snapshot { .. }) {
                // The active file is frozen now: its clones keep their base.
                self.world.neighbours.iter_mut().for_each(|neighbour| neighbour.on_active = false);
            }
        } else {
            self.world.judge_refused(before, &op.to_string());
            assert!(expect != Expect::Done, "{op}: refused: {}", run.stderr);
        }
    }

    /// An operation is killed; the VM can start, and recovery ends before or after the operation.
    fn kill(&mut self, rng: &mut Rng) {
        let op = self.random_operation(rng);
        let expect = op.expect(&self.world);
        let before = self.world.before(rng);
        let args = self.world.command(&op, rng);
        let delay = self.world.pace.mul_f64(rng.within(200..1100) as f64 / 1000.0);
        let run = self.world.caller.run_killed(&args, delay);
        self.world.log.push(format!("{op} killed after {delay:?} -> {:?} {}", run.code, run.stderr));
        if run.code.is_some() {
            return self.judge(&op, &before, &run, expect, rng);
        }
        let column = match op {
            Op::Snapshot { .. } => "kill snapshot",
            Op::Delete { .. } => "kill delete",
            Op::Revert { .. } => "kill revert",
            Op::Resize { .. } => "kill resize",
            Op::Detach { .. } => "kill detach",
        };
        let journal = std::fs::read(self.world.journal()).ok();
        self.count(column, journal.is_some());
        self.journal = journal.or(self.journal.take());
        self.world.judge_killed(&before, "killed");
        let after = op.after(&self.world.state);
        self.can_start(&after, rng);
        let mut candidates = after;
        if matches!(op, Op::Delete { .. }) && rng.chance(1, 3) {
            let called_off = self.cancel(rng);
            if called_off {
                candidates.clear();
            }
        }
        candidates.push(self.world.state.clone());
        self.recover(&before, &candidates, delay, rng);
    }

    /// After any interruption every volume reads as before or as after.
    fn can_start(&mut self, after: &[State], rng: &mut Rng) {
        let listing = self.world.list(rng);
        let reads = |now: &super::world::Contents| -> Result<(), String> {
            for (volume, content) in now {
                let path = listing.active.get(volume).ok_or_else(|| format!("{volume} is not listed"))?;
                images::compare(path, content)?;
            }
            Ok(())
        };
        let wrong = reads(&self.world.state.now).err();
        let starts = wrong.is_none() || after.iter().any(|state| reads(&state.now).is_ok());
        assert!(starts, "the VM cannot be started: {}", wrong.unwrap_or_default());
    }

    /// Calls a killed deletion off. If that is refused, nothing may have changed. Returns `true` if
    /// the deletion was under way, so that its snapshot must be there again.
    fn cancel(&mut self, rng: &mut Rng) -> bool {
        let merging = self.world.list(rng).snapshots.iter().any(|(_, state, _)| state == "merging");
        let before = Tree::read(&self.world.watched);
        let args = self.world.verb("cancel", &[], rng);
        let run = self.world.caller.run(&args);
        self.world.log.push(format!("cancel, merging: {merging} -> {:?} {}", run.code, run.stderr));
        if merging {
            self.count("cancel", run.done());
        }
        if !run.done() {
            before.assert_unchanged(&Tree::read(&self.world.watched), "cancel");
        }
        merging && run.done()
    }

    /// Recovers, sometimes killed at first; the VM is then in one of the states.
    fn recover(&mut self, before: &Before, candidates: &[State], delay: Duration, rng: &mut Rng) {
        while rng.chance(1, 3) {
            let args = self.world.verb("recover", &[], rng);
            let run = self.world.caller.run_killed(&args, delay.mul_f64(rng.within(0..1500) as f64 / 1000.0));
            self.world.log.push(format!("recover killed -> {:?} {}", run.code, run.stderr));
            if run.code.is_none() {
                self.count("recover killed", true);
                self.world.judge_killed(before, "recovery killed");
                self.can_start(candidates, rng);
            }
        }
        let args = self.world.verb("recover", &[], rng);
        let run = self.world.caller.run(&args);
        self.world.log.push(format!("recover -> {:?} {}{}", run.code, run.stdout, run.stderr));
        self.count("recover", run.done());
        assert!(run.done(), "recovery fails: {}", run.stderr);
        // The report of the killed command is lost.
        self.world.judge_done(before, None, candidates, rng);
    }

    /// A dry run changes nothing, and refuses what the operation refuses.
    fn plan(&mut self, rng: &mut Rng) {
        let op = Op::disturbed(&mut self.world, rng);
        if matches!(op, Op::Snapshot { .. }) {
            return;
        }
        let before = self.world.before(rng);
        let mut args = self.world.command(&op, rng);
        args.push("--dry-run".into());
        let run = self.world.caller.run(&args);
        self.world.log.push(format!("{op} --dry-run -> {:?} {}", run.code, run.stderr));
        self.world.judge_refused(&before, "a dry run");
        self.count("plan", run.done());
        let done = self.world.act(&op, rng);
        let expect = op.expect(&self.world);
        self.judge(&op, &before, &done, expect, rng);
        assert_eq!(
            run.done(),
            done.done(),
            "{op}: the dry run and the operation disagree: {}{}",
            run.stderr,
            done.stderr
        );
    }

    /// Another program has a file of the set open.
    fn hold(&mut self, rng: &mut Rng) {
        let listing = self.world.list(rng);
        let files: Vec<PathBuf> = listing.files().into_iter().collect();
        let (path, writes) = (rng.pick(&files), rng.chance(2, 3));
        let Some(holder) = Holder::open(&path, images::format_of(&path).name(), writes) else { return };
        self.world.log.push(format!("{} is held, for writing: {}", holder.path.display(), holder.writes));
        let active = listing.active.values().any(|file| *file == path);
        let op = Op::disturbed(&mut self.world, rng);
        let expect = match (&op, writes, active) {
            (_, true, false) => Expect::Refused,
            (Op::Snapshot { .. } | Op::Revert { .. }, true, true) => Expect::Refused,
            _ => Expect::Either,
        };
        let before = self.world.before(rng);
        let run = self.world.act(&op, rng);
        self.judge(&op, &before, &run, expect, rng);
        self.count("held", run.done());
        if writes && !active {
            let args = self.world.verb("verify", &[], rng);
            let run = self.world.caller.run(&args);
            assert_eq!(run.code, Some(2), "verify of a frozen file that is written: {}{}", run.stdout, run.stderr);
        }
    }

    /// A file is missing or damaged for a while.
    fn damage(&mut self, rng: &mut Rng) {
        let listing = self.world.list(rng);
        let Some(harm) = Harm::do_to(&self.world, &listing, rng) else { return };
        self.world.log.push(format!("{harm:?}"));
        let args = self.world.verb("verify", &["--deep".into()], rng);
        let run = self.world.caller.run(&args);
        assert_eq!(run.code, Some(2), "verify of {harm:?}: {}{}", run.stdout, run.stderr);
        let mut op = Op::disturbed(&mut self.world, rng);
        let lost = harm.is_missing() && listing.active.values().any(|file| *file == harm.path);
        let mut discards = false;
        if let Op::Revert { more, .. } = &mut op
            && lost
            && !self.world.has_clones()
        {
            more.push("--discard-lost");
            discards = true;
        }
        let expect = if discards { op.expect(&self.world) } else { Expect::Either };
        let before = self.world.before(rng);
        let run = self.world.act(&op, rng);
        self.count(if discards { "discard lost" } else { "damaged" }, run.done());
        let path = harm.path.clone();
        if run.done() {
            let still_used = self.world.list(rng).files().contains(&path);
            harm.undo(still_used);
            let after = op.after(&self.world.state);
            self.world.judge_done(&before, Some(&run), &after, rng);
        } else {
            before.tree.assert_unchanged(&Tree::read(&self.world.watched), &op.to_string());
            assert!(expect != Expect::Done, "{op}: refused: {}", run.stderr);
            harm.undo(true);
            self.world.judge_neighbours(&op.to_string());
            let listing = self.world.list(rng);
            reads_as(&listing, &self.world.state).unwrap_or_else(|wrong| panic!("{op}: {wrong}"));
        }
    }

    /// Something happens next door.
    fn neighbours(&mut self, rng: &mut Rng) {
        if self.world.recipe.clones && rng.chance(1, 2) {
            return self.clone_image(rng);
        }
        let before = self.world.before(rng);
        let files = before.listing.files();
        let Some(twin) = self.world.twin.as_mut() else { return };
        twin.snapshot(&self.world.caller);
        self.world.log.push("the other VM takes a snapshot".to_owned());
        self.count("other VM", true);
        let now = Tree::read(&self.world.watched);
        let ours = |path: &std::path::Path| !files.contains(path) && path != self.world.catalogue;
        let changes = before.tree.changes(&now, ours);
        assert!(changes.is_empty(), "a snapshot of the other VM: {}", changes.join("\n"));
    }

    /// Someone creates an image on a frozen or an active file of the VM.
    fn clone_image(&mut self, rng: &mut Rng) {
        let listing = self.world.list(rng);
        let state = self.world.state.clone();
        let mut images: Vec<(PathBuf, Vec<u8>, bool)> = Vec::new();
        for (snapshot, contents) in &state.taken {
            let frozen = |(volume, content): (&String, &Vec<u8>)| {
                listing.frozen(snapshot, volume).map(|path| (path.clone(), content.clone(), false))
            };
            images.extend(contents.iter().filter_map(frozen));
        }
        for (volume, path) in &listing.active {
            images.push((path.clone(), state.now[volume].clone(), true));
        }
        let (path, content, on_active) = rng.pick(&images);
        self.world.next += 1;
        // The search for dependents covers the directories of the set's files.
        let on_device = self.world.device.is_some();
        let directory = if on_device { &self.world.dirs[0] } else { path.parent().expect("a directory") };
        let clone = directory.join(format!("clone-{}.qcow2", self.world.next));
        let neighbour = Neighbour::on(&clone, &path, &content, rng);
        self.world.log.push(format!("{} is cloned, active: {on_active}", path.display()));
        self.world.neighbours.push(Neighbour { on_active, clone_of_ours: true, ..neighbour });
        self.count("clone", true);
    }

    /// The directory of the world is moved or copied; the VM lives on in the new one.
    fn relocate(&mut self, rng: &mut Rng) {
        if !self.world.recipe.movable() {
            return;
        }
        let (old, new) = (self.world.root.clone(), self.world.grounds.fresh("world"));
        let copies = rng.chance(1, 2);
        if copies {
            tool("cp", &["-a".as_ref(), old.as_os_str(), new.as_os_str()]).expect("the world is copied");
        } else {
            std::fs::rename(&old, &new).expect("the world is moved");
        }
        let moved = |path: &PathBuf| path.strip_prefix(&old).map_or_else(|_| path.clone(), |rest| new.join(rest));
        let world = &mut self.world;
        world.log.push(format!("{} to {}, copied: {copies}", old.display(), new.display()));
        world.catalogue = moved(&world.catalogue);
        world.dirs = world.dirs.iter().map(moved).collect();
        world.neighbours.iter_mut().for_each(|neighbour| neighbour.path = moved(&neighbour.path));
        world.watched[0].clone_from(&new);
        world.root = new;
        if copies {
            // The original belongs to someone else now.
            world.watched.push(old);
        }
        self.count(if copies { "copy" } else { "move" }, true);
        if copies && self.world.recipe.template {
            for volume in self.world.state.now.clone().into_keys() {
                let base = self.world.root.join("templates").join(format!("{volume}.qcow2"));
                if !base.exists() {
                    continue;
                }
                let args = self.world.verb("accept-base", &[base.into()], rng);
                let run = self.world.caller.run(&args);
                assert!(run.done(), "accept-base: {}", run.stderr);
            }
        }
        self.verify(rng);
    }

    fn attach(&mut self, rng: &mut Rng) {
        let (before, run, after) = self.world.attach(rng);
        assert!(run.done(), "attach: {}", run.stderr);
        self.count("attach", true);
        self.world.judge_done(&before, Some(&run), &[after], rng);
    }

    fn stale_journal(&mut self, rng: &mut Rng) {
        let Some(journal) = self.journal.take() else { return };
        self.world.restore_journal(&journal, rng);
        self.count("old journal", true);
    }

    fn stale_catalogue(&mut self, rng: &mut Rng) {
        let present = std::fs::read(&self.world.catalogue).expect("the catalogue");
        let Some(backup) = self.backup.take().filter(|backup| *backup != present) else { return };
        let Some(column) = self.world.restore_catalogue(&backup, rng) else { return };
        self.count(column, true);
        self.over = true;
    }

    /// Nothing is wrong in an undamaged world. Files that look like overlays of the VM may be
    /// reported.
    fn verify(&mut self, rng: &mut Rng) {
        let args = self.world.verb("verify", &["--deep".into()], rng);
        let run = self.world.caller.run(&args);
        self.count("verify", run.done());
        let recipe = &self.world.recipe;
        let like_ours = recipe.bystanders || recipe.twin || recipe.clones || self.world.leftovers;
        assert!(run.done() || (like_ours && run.code == Some(2)), "verify: {}{}", run.stdout, run.stderr);
    }

    fn end(&mut self, rng: &mut Rng) {
        self.verify(rng);
        self.world.judge_by_qemu(rng);
    }
}
