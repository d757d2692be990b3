//! The planner alone: thousands of random sequences of operations on files that are modelled as maps of blocks. After every step
//! each snapshot reads as when it was taken, the volumes read as before, and files and records are one to one.

use std::collections::{BTreeMap, BTreeSet};

use qcow2_chain::chain::Format;
use qcow2_chain::merge::Direction;
use qcow2_chain::vm::{
    Base, Edit, FileRecord, FileRef, Fingerprint, MergePreference, Model, Plan, PlanOptions, Refusal, Request,
    SnapshotId, State, Step, Volume, plan,
};

use crate::support::rng::{Rng, cases, count};

/// The size of the model's blocks in bytes.
const BLOCK: u64 = 512;

/// A file as the planner's steps see it: blocks that it holds, and what it stands on.
#[derive(Clone, Debug, Default)]
struct File {
    size: u64,
    blocks: BTreeMap<u64, u64>,
    backing: Option<String>,
}

/// All files there are.
#[derive(Clone, Debug, Default)]
struct Disk(BTreeMap<String, File>);

impl Disk {
    /// What the guest reads of a block: 0 for zeroes.
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

/// A VM, its files, and what each snapshot and volume must read as.
struct Vm {
    model: Model,
    disk: Disk,
    taken: BTreeMap<SnapshotId, BTreeMap<String, Vec<u64>>>,
    now: BTreeMap<String, Vec<u64>>,
    names: u64,
    /// Files that belong to others too: they stay when nothing leads to them any more.
    protected: BTreeSet<String>,
}

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
        let protected = model.records().filter(|(_, _, record)| record.protected);
        let protected = protected.map(|(_, _, record)| record.file.path.clone()).collect();
        Self { model, disk, taken: BTreeMap::new(), now, names: 0, protected }
    }

    /// The guest writes, or discards.
    fn write(&mut self, rng: &mut Rng) {
        let volume = rng.pick(&self.model.volumes);
        if volume.active.protected {
            return; // a protected active file is only looked at
        }
        let file = self.disk.0.get_mut(&volume.active.file.path).unwrap();
        for _ in 0..rng.within(1..4) {
            let (block, value) = (rng.within(0..file.size), if rng.chance(1, 4) { 0 } else { rng.next_u64() });
            file.blocks.insert(block, value);
        }
        self.now.insert(volume.name, self.disk.content(&volume.active.file.path));
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
            4..6 if !known.is_empty() => Request::Revert { name: rng.pick(&known), detach_missing: false },
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
            }
            Edit::apply_all(&stage.end, &mut self.model);
            stage.leaving.remove.iter().for_each(|file| self.disk.unlink(&file.path));
        }
        self.model.last_operation.id = plan.id;
        self.model.last_operation.stages = plan.stages.len();
    }

    /// Follows what the operation promises.
    fn expect(&mut self, request: &Request, before: &Model) {
        match request {
            Request::Create { name, .. } => {
                let id = self.model.find(name).expect("it is there").id;
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
    }

    /// Records, headers and files agree; where `contents` says so, everything reads as it must, too.
    fn check(&self, contents: bool) {
        assert_eq!(self.model.contradictions(), Vec::<String>::new());
        assert!(self.model.overdue().is_empty(), "hidden with fewer than two on it: {:?}", self.model.overdue());
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
        let templates = |path: &&String| path.as_str() != "template" && !self.protected.contains(*path);
        let there: BTreeSet<_> = self.disk.0.keys().filter(templates).cloned().collect();
        let recorded: BTreeSet<_> = files.iter().filter(templates).cloned().collect();
        assert_eq!(there, recorded, "files and records");
    }
}

/// How many operations follow one another; fewer for Miri, which takes seconds for each.
const STEPS: u64 = if cfg!(miri) { 10 } else { 25 };

fn sequence(rng: &mut Rng, steps: u64) {
    let mut vm = Vm::random(rng);
    vm.check(true);
    for step in 0..steps {
        if rng.chance(1, 2) {
            vm.write(rng);
        }
        let request = vm.random_request(rng);
        let mut options = PlanOptions::default().with_token("5eed");
        for volume in &vm.model.volumes {
            options = options.with_direction(
                &volume.name,
                rng.pick(&[MergePreference::CommitElsePull, MergePreference::PullElseCommit, MergePreference::Auto]),
            );
        }
        let before = vm.model.clone();
        let plan = match plan(&vm.model, &request, &options) {
            Ok(plan) => plan,
            Err(Refusal::Protected { .. }) => continue,
            Err(refusal) => panic!("{request:?}: {refusal}"),
        };
        if rng.chance(1, 50) {
            let json = serde_json::to_string(&plan).unwrap();
            assert_eq!(serde_json::from_str::<Plan>(&json).unwrap(), plan);
        }
        vm.carry_out(&plan);
        assert_eq!(vm.model, plan.outcome(&before), "a plan tells its outcome");
        vm.expect(&request, &before);
        vm.check(step % 8 == 7 || step + 1 == steps);
    }
}

#[test]
fn every_random_sequence_keeps_every_snapshot() {
    cases("sequences of operations", count("QCOW2_CHAIN_SEQUENCES", 20_000), |rng| sequence(rng, STEPS));
}
