//! The planner alone: thousands of random sequences of operations, with random facts about the files, on files that are
//! modelled as maps of blocks. After every step each snapshot has the content of its creation, the volumes have theirs,
//! files and records are one to one, and no file was written, relinked or removed that the facts forbid.

use std::collections::{BTreeMap, BTreeSet};

use qcow2_chain::chain::Format;
use qcow2_chain::merge::Direction;
use qcow2_chain::vm::{
    Base, Edit, FileFacts, FileRecord, FileRef, Fingerprint, MergePreference, Model, Plan, PlanOptions, Purpose,
    Refusal, Request, SnapshotId, State, Step, Volume, plan,
};

use crate::support::rng::{Rng, cases, count};

/// The size of the model's blocks in bytes.
const BLOCK: u64 = 512;

/// A file: the blocks that it holds, and its backing file.
#[derive(Clone, Debug, Default)]
struct File {
    size: u64,
    blocks: BTreeMap<u64, u64>,
    backing: Option<String>,
}

/// All files.
#[derive(Clone, Debug, Default)]
struct Disk(BTreeMap<String, File>);

impl Disk {
    /// Returns the content of a block as a guest reads it: 0 for zeroes.
    fn read(&self, path: &str, block: u64) -> u64 {
        let file = &self.0[path];
        if block >= file.size {
            return 0;
        }
        match (file.blocks.get(&block), &file.backing) {
            (Some(&value), _) => value,
            (None, Some(backing)) => self.read(backing, block),
            (None, None) => 0,
        }
    }

    fn content(&self, path: &str) -> Vec<u64> {
        (0..self.0[path].size).map(|block| self.read(path, block)).collect()
    }

    fn resize(&mut self, path: &str, size: u64) {
        let old = self.0[path].size;
        let file = self.0.get_mut(path).unwrap();
        file.blocks.retain(|&block, _| block < size);
        file.blocks.extend((old..size).map(|block| (block, 0)));
        file.size = size;
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Merge(merge) if merge.direction == Direction::Pull => {
                let (top, base) = (&merge.top.path, &merge.base.path);
                assert_eq!(self.0[top].backing.as_ref(), Some(base));
                let below = merge.below.first().map(|file| file.path.clone());
                assert_eq!(self.0[base].backing, below);
                let seen = self.content(top);
                let (held, size) = (self.0[base].blocks.clone(), self.0[base].size);
                let file = self.0.get_mut(top).unwrap();
                for (block, value) in (0..).zip(seen) {
                    if held.contains_key(&block) || block >= size {
                        file.blocks.insert(block, value);
                    }
                }
                file.backing = below;
            }
            Step::Merge(merge) => {
                let (top, base) = (&merge.top.path, &merge.base.path);
                assert_eq!(self.0[top].backing.as_ref(), Some(base));
                let top = self.0[top].clone();
                self.resize(base, top.size);
                self.0.get_mut(base).unwrap().blocks.extend(top.blocks);
            }
            Step::Relink { file, from, to } => {
                assert_eq!(self.0[&file.path].backing.as_ref(), Some(&from.path));
                assert_eq!(self.content(&from.path), self.content(&to.path), "a relink changes nothing");
                self.0.get_mut(&file.path).unwrap().backing = Some(to.path.clone());
            }
            Step::Resize { file, size, .. } => self.resize(&file.path, size / BLOCK),
            other => panic!("{other:?}"),
        }
    }

    fn unlink(&mut self, path: &str) {
        assert!(self.0.values().all(|file| file.backing.as_deref() != Some(path)), "{path} is needed");
        self.0.remove(path).unwrap_or_else(|| panic!("{path} is there to be removed"));
    }
}

/// A VM, its files, and the expected contents.
struct Vm {
    model: Model,
    disk: Disk,
    taken: BTreeMap<SnapshotId, BTreeMap<String, Vec<u64>>>,
    now: BTreeMap<String, Vec<u64>>,
    names: u64,
    /// The files that left the set and were not removed.
    outside: BTreeSet<String>,
    /// The contents of those files outside, and of the template, that no guest writes to or beneath.
    kept: BTreeMap<String, Vec<u64>>,
}

/// The facts about the files, by path.
type AllFacts = BTreeMap<String, FileFacts>;

fn record(path: &str, format: Format, blocks: u64) -> FileRecord {
    let file = FileRef { path: path.to_owned(), format };
    FileRecord::new(file, blocks * BLOCK)
}

impl Vm {
    fn random(rng: &mut Rng) -> Self {
        let mut disk = Disk::default();
        let mut volumes = Vec::new();
        for number in 0..rng.within(1..4) {
            let (name, size) = (format!("vd{number}"), rng.within(1..9));
            let path = if rng.chance(1, 3) { format!("dir{number}/{name}.img") } else { format!("{name}.img") };
            let mut active = record(&path, rng.pick(&[Format::Qcow2, Format::Raw]), size);
            active.protected = rng.chance(1, 8);
            let mut file =
                File { size, blocks: (0..size).map(|block| (block, rng.next_u64())).collect(), backing: None };
            let mut bases = Vec::new();
            if active.file.format == Format::Qcow2 && rng.chance(1, 4) {
                let base = FileRef { path: "template".to_owned(), format: Format::Raw };
                disk.0.insert(
                    base.path.clone(),
                    File { size: 6, blocks: (0..6).map(|b| (b, b + 1)).collect(), backing: None },
                );
                file.backing = Some(base.path.clone());
                file.blocks.retain(|block, _| block % 2 == 0);
                bases.push(Base::new(base, Fingerprint::new(0, 0, 0)));
            }
            disk.0.insert(path, file);
            let mut volume = Volume::new(name, active);
            volume.bases = bases;
            volumes.push(volume);
        }
        let model = Model::new("vm", volumes);
        let now = model.volumes.iter().map(|v| (v.name.clone(), disk.content(&v.active.file.path))).collect();
        let template = disk.0.contains_key("template").then(|| ("template".to_owned(), disk.content("template")));
        let kept = template.into_iter().collect();
        Self { model, disk, taken: BTreeMap::new(), now, names: 0, outside: BTreeSet::new(), kept }
    }

    /// Attaches a new volume, or detaches one.
    fn change_volumes(&mut self, rng: &mut Rng) {
        if self.model.volumes.len() > 1 && rng.chance(1, 2) {
            let volume = rng.pick(&self.model.volumes);
            Edit::Detach { volume: volume.name.clone() }.apply(&mut self.model);
            self.now.remove(&volume.name);
            self.leave(&volume.active.file.path);
        } else if self.model.volumes.len() < 4 {
            self.names += 1;
            let (name, size) = (format!("new{}", self.names), rng.within(1..9));
            let path = format!("{name}.img");
            let blocks = (0..size).map(|block| (block, rng.next_u64())).collect();
            self.disk.0.insert(path.clone(), File { size, blocks, backing: None });
            self.now.insert(name.clone(), self.disk.content(&path));
            let mut volume = Volume::new(name, record(&path, Format::Qcow2, size));
            volume.active.protected = rng.chance(1, 8);
            self.model.volumes.push(volume);
        }
    }

    /// Notes a file that left the set and was not removed.
    fn leave(&mut self, path: &str) {
        self.outside.insert(path.to_owned());
        self.kept.insert(path.to_owned(), self.disk.content(path));
    }

    /// Returns true if a file is backed by another one, directly or not.
    fn is_above(&self, path: &str, below: &str) -> bool {
        let backing = self.disk.0[path].backing.as_deref();
        backing.is_some_and(|backing| backing == below || self.is_above(backing, below))
    }

    /// Returns random facts about the files, and the true dependents outside the set.
    fn facts(&self, rng: &mut Rng) -> AllFacts {
        let mut all = AllFacts::new();
        if rng.chance(1, 2) {
            for path in self.disk.0.keys() {
                let mut facts = FileFacts::default();
                if rng.chance(1, 6) {
                    facts = facts.with_unwritable("it is read-only");
                }
                if rng.chance(1, 6) {
                    facts = facts.with_unremovable("it is a block device");
                }
                if rng.chance(1, 10) {
                    facts.in_use = Some("write".to_owned());
                }
                if rng.chance(1, 10) {
                    facts = facts.with_dependent("clone");
                }
                all.insert(path.clone(), facts);
            }
        }
        for path in &self.outside {
            if let Some(backing) = &self.disk.0[path].backing {
                let facts = all.remove(backing).unwrap_or_default();
                all.insert(backing.clone(), facts.with_dependent(path));
            }
        }
        all
    }

    /// Asserts that a plan changes no file that the facts forbid, and that exactly the other ones that leave are removed.
    fn check_plan(&self, plan: &Plan, facts: &AllFacts) {
        let of = |path: &str| facts.get(path).cloned().unwrap_or_default();
        let new: BTreeSet<&str> = plan.created().map(|overlay| overlay.file.path.as_str()).collect();
        let protected: BTreeSet<&str> = self
            .model
            .records()
            .filter(|(_, _, record)| record.protected)
            .map(|(_, _, record)| record.file.path.as_str())
            .collect();
        let may_write = |path: &str, why: &str| {
            let facts = of(path);
            assert!(facts.unwritable.is_none() && facts.in_use.is_none(), "{why} {path}: {facts:?}");
            assert!(!protected.contains(path) && path != "template", "{why} {path}, which is shared");
        };
        for step in plan.works().flat_map(|work| &work.steps) {
            match step {
                Step::Merge(merge) => {
                    may_write(&merge.survivor().path, "writes");
                    assert!(of(&merge.survivor().path).dependents.is_empty(), "writes beneath a file outside");
                }
                // The content stays the same, so that files outside may depend on it.
                Step::Relink { file, .. } if !new.contains(file.path.as_str()) => may_write(&file.path, "relinks"),
                Step::Relink { .. } => {}
                Step::Resize { file, .. } => {
                    may_write(&file.path, "resizes");
                    assert!(of(&file.path).dependents.is_empty(), "resizes beneath a file outside");
                }
                other => panic!("{other:?}"),
            }
        }
        for removal in plan.removals() {
            let facts = of(&removal.path);
            let free = facts.unremovable.is_none() && facts.in_use.is_none() && facts.dependents.is_empty();
            assert!(free && !protected.contains(removal.path.as_str()), "removes {}: {facts:?}", removal.path);
        }
        let after = plan.outcome(&self.model);
        let named = |model: &Model| -> BTreeSet<String> {
            model.records().map(|(_, _, record)| record.file.path.clone()).collect()
        };
        let mut left: Vec<String> = named(&self.model).difference(&named(&after)).cloned().collect();
        // An overlay of the first stage may leave in the second one.
        left.extend(new.iter().filter(|path| !named(&after).contains(**path)).map(|path| (*path).to_owned()));
        let removed = plan.removals().map(|removal| removal.path.clone());
        let mut leaving: Vec<String> = removed.chain(plan.releases().map(|release| release.path.clone())).collect();
        left.sort();
        leaving.sort();
        assert_eq!(leaving, left, "each file that leaves is removed or released, once");
        for release in plan.releases() {
            let facts = of(&release.path);
            let detached = matches!(plan.purpose, Purpose::Revert { .. }) && release.reason.contains("is detached");
            let forbidden = facts.unremovable.is_some()
                || facts.unwritable.is_some()
                || facts.in_use.is_some()
                || !facts.dependents.is_empty()
                || protected.contains(release.path.as_str())
                || plan.releases().any(|other| {
                    self.disk.0.get(&other.path).is_some_and(|file| file.backing.as_ref() == Some(&release.path))
                });
            assert!(detached || forbidden, "releases {}, which may be removed", release.path);
        }
    }

    /// Asserts that the facts, or the records, are a reason for a refusal.
    fn check_refusal(&self, refusal: &Refusal, request: &Request, facts: &AllFacts) {
        let of = |path: &String| facts.get(path).cloned().unwrap_or_default();
        let found = |path: &String| {
            let mut records = self.model.records();
            records.find(|(_, _, record)| record.file.path == *path).map(|(_, _, record)| record.clone())
        };
        let justified = match refusal {
            Refusal::Protected { path } => found(path).is_some_and(|record| record.protected),
            Refusal::Unwritable { path, .. } => {
                of(path).unwritable.is_some() || found(path).is_some_and(|record| record.file.format == Format::Raw)
            }
            Refusal::InUse { path, .. } => of(path).in_use.is_some(),
            // A file that the plan itself would release becomes a dependent.
            Refusal::Dependents { path, images } => images.iter().all(|image| {
                let released = self.disk.0.get(image).is_some_and(|file| file.backing.as_ref() == Some(path));
                released || of(path).dependents.contains(image)
            }),
            Refusal::LacksVolumes { snapshot, volumes } => {
                let held = &self.model.find(snapshot).expect("a snapshot").files;
                let lacking = !volumes.is_empty() && volumes.iter().all(|volume| !held.contains_key(volume));
                lacking && matches!(request, Request::Revert { detach_missing: false, .. })
            }
            _ => false,
        };
        assert!(justified, "{request:?} is refused without a reason: {refusal}");
    }

    /// Writes or discards blocks of a volume, as its guest.
    fn write(&mut self, rng: &mut Rng) {
        let volume = rng.pick(&self.model.volumes);
        if volume.active.protected {
            return;
        }
        let file = self.disk.0.get_mut(&volume.active.file.path).unwrap();
        for _ in 0..rng.within(1..4) {
            let (block, value) = (rng.within(0..file.size), if rng.chance(1, 4) { 0 } else { rng.next_u64() });
            file.blocks.insert(block, value);
        }
        let path = volume.active.file.path;
        self.now.insert(volume.name, self.disk.content(&path));
        // A guest does not know of the files outside that are backed by its volume.
        let above: Vec<String> = self.outside.iter().filter(|file| self.is_above(file, &path)).cloned().collect();
        above.iter().for_each(|file| drop(self.kept.remove(file)));
    }

    fn random_request(&mut self, rng: &mut Rng) -> Request {
        let ready = |model: &Model| -> Vec<String> {
            model.snapshots.values().filter(|s| s.state == State::Ready).map(|s| s.name.clone()).collect()
        };
        let known = ready(&self.model);
        match rng.within(0..10) {
            0..4 => {
                self.names += 1;
                let (name, description) = (format!("s{}", self.names), String::new());
                Request::Create { name, description, created: 0, quiesce: false, max_depth: 256 }
            }
            4..6 if !known.is_empty() => Request::Revert { name: rng.pick(&known), detach_missing: rng.chance(1, 2) },
            6..9 if !known.is_empty() => Request::Delete { name: rng.pick(&known) },
            _ => {
                let volume = rng.pick(&self.model.volumes);
                Request::Resize { volume: volume.name, size: rng.within(1..12) * BLOCK, shrink: true }
            }
        }
    }

    fn carry_out(&mut self, plan: &Plan) {
        for stage in &plan.stages {
            Edit::apply_all(&stage.begin, &mut self.model);
            for overlay in &stage.create {
                let backing = Some(overlay.backing.path.clone());
                let file = File { size: overlay.size / BLOCK, blocks: BTreeMap::new(), backing };
                assert!(self.disk.0.insert(overlay.file.path.clone(), file).is_none(), "{overlay:?} is new");
            }
            for work in &stage.work {
                work.steps.iter().for_each(|step| self.disk.step(step));
                Edit::apply_all(&work.edits, &mut self.model);
                work.leaving.remove.iter().for_each(|file| self.disk.unlink(&file.path));
                work.leaving.release.iter().for_each(|file| self.leave(&file.path));
            }
            Edit::apply_all(&stage.end, &mut self.model);
            stage.leaving.remove.iter().for_each(|file| self.disk.unlink(&file.path));
            stage.leaving.release.iter().for_each(|file| self.leave(&file.path));
        }
        self.model.last_operation.id = plan.id;
        self.model.last_operation.stages = plan.stages.len();
    }

    /// Changes the expectations to those after an operation.
    fn expect(&mut self, request: &Request, before: &Model) {
        match request {
            Request::Create { name, .. } => {
                let id = self.model.find(name).expect("the new snapshot").id;
                assert_eq!(self.model.current, Some(id));
                self.taken.insert(id, self.now.clone());
            }
            Request::Revert { name, .. } => {
                let id = before.find(name).unwrap().id;
                assert_eq!(self.model.current, self.model.find(name).map(|s| s.id));
                self.now = self.taken[&id].clone();
            }
            Request::Delete { name } => assert!(self.model.find(name).is_none(), "{name} is not listed"),
            Request::Resize { volume, size, .. } => {
                let blocks = usize::try_from(size / BLOCK).unwrap();
                self.now.get_mut(volume).unwrap().resize(blocks, 0);
            }
            other => panic!("{other:?}"),
        }
    }

    fn check_contents(&self) {
        for snapshot in self.model.snapshots.values() {
            for (volume, record) in &snapshot.files {
                let content = self.disk.content(&record.file.path);
                assert!(
                    snapshot.state == State::Hidden || content == self.taken[&snapshot.id][volume],
                    "{volume} of {}",
                    snapshot.name
                );
            }
        }
        for volume in &self.model.volumes {
            assert_eq!(self.disk.content(&volume.active.file.path), self.now[&volume.name], "{}", volume.name);
        }
        for (path, content) in &self.kept {
            assert_eq!(self.disk.content(path), *content, "{path} outside the set");
        }
    }

    /// Asserts that records, headers and files agree; and if `contents` is set, that all contents are the expected ones.
    fn check(&self, contents: bool) {
        assert_eq!(self.model.contradictions(), Vec::<String>::new());
        assert!(self.model.overdue().is_empty(), "hidden with fewer than two dependents: {:?}", self.model.overdue());
        assert!(self.model.merging().is_none());
        let mut files = BTreeSet::new();
        for (volume, on, record) in self.model.records() {
            let below = self.model.files_from(on, volume).first().map(|file| file.path.clone());
            let file = &self.disk.0[&record.file.path];
            assert_eq!(file.backing, below, "the header of {}", record.file.path);
            assert_eq!(file.size * BLOCK, record.virtual_size, "the size of {}", record.file.path);
            files.insert(record.file.path.clone());
        }
        if contents {
            self.check_contents();
        }
        assert_eq!(self.now.keys().collect::<BTreeSet<_>>(), self.model.volumes.iter().map(|v| &v.name).collect());
        let present: BTreeSet<_> = self.disk.0.keys().filter(|path| *path != "template").cloned().collect();
        let recorded: BTreeSet<_> = files.union(&self.outside).cloned().collect();
        assert_eq!(present, recorded, "files and records");
        assert!(files.is_disjoint(&self.outside), "files outside the set are recorded");
    }
}

/// The number of operations of a sequence; fewer for Miri, which takes seconds for each.
const STEPS: u64 = if cfg!(miri) { 10 } else { 25 };

const PREFERENCES: [MergePreference; 5] = [
    MergePreference::CommitElsePull,
    MergePreference::PullElseCommit,
    MergePreference::Auto,
    MergePreference::Commit,
    MergePreference::Pull,
];

fn sequence(rng: &mut Rng, steps: u64) {
    let mut vm = Vm::random(rng);
    vm.check(true);
    for step in 0..steps {
        if rng.chance(1, 2) {
            vm.write(rng);
        }
        if rng.chance(1, 8) {
            vm.change_volumes(rng);
        }
        let request = vm.random_request(rng);
        let facts = vm.facts(rng);
        let mut options = PlanOptions::default().with_token("5eed");
        for volume in &vm.model.volumes {
            options = options.with_direction(&volume.name, rng.pick(&PREFERENCES));
        }
        for (path, facts) in &facts {
            options = options.with_facts(path, facts.clone());
        }
        let before = vm.model.clone();
        let plan = match plan(&vm.model, &request, &options) {
            Ok(plan) => plan,
            Err(refusal) => {
                vm.check_refusal(&refusal, &request, &facts);
                continue;
            }
        };
        vm.check_plan(&plan, &facts);
        if rng.chance(1, 50) {
            let json = serde_json::to_string(&plan).unwrap();
            assert_eq!(serde_json::from_str::<Plan>(&json).unwrap(), plan);
        }
        vm.carry_out(&plan);
        assert_eq!(vm.model, plan.outcome(&before), "the outcome of the plan");
        vm.expect(&request, &before);
        vm.check(step % 8 == 7 || step + 1 == steps);
    }
}

#[test]
fn random_plans_keep_snapshots_and_obey_facts() {
    cases("sequences of operations", count("QCOW2_CHAIN_SEQUENCES", 5_000), |rng| sequence(rng, STEPS));
}
