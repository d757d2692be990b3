//! The plan of a merge: which file survives, which files are relinked, and which leave the set.

use crate::merge::Direction;

use crate::vm::model::edit::Edit;
use crate::vm::model::{Dependent, FileRecord, Model, Snapshot, State, Volume};
use crate::vm::plan::refusal::Refusal;
use crate::vm::plan::request::MergePreference;
use crate::vm::plan::{Leaving, MergeStep, Release, Removal, Stage, Step, VolumeWork};

use super::Planner;

impl Planner<'_> {
    /// Returns the stage that merges a snapshot with its only dependent. A volume that the snapshot
    /// lacks has nothing to merge: it was attached later, or is merged already.
    pub(super) fn merge(&self, model: &Model, merged: &Snapshot, dep: Dependent) -> Result<Stage, Refusal> {
        let mut work = Vec::new();
        for (name, base) in &merged.files {
            let Some(volume) = model.any_volume(name) else { continue };
            work.push(match model.record_of(dep, name) {
                Some(top) => self.merge_volume(model, merged, dep, volume, base, top)?,
                None => self.drop_volume_file(merged, volume, base)?,
            });
        }
        let handed_on = match dep {
            Dependent::Volumes => Edit::SetCurrent { id: merged.parent },
            Dependent::Snapshot(id) => Edit::SetParent { id, parent: merged.parent },
        };
        let set_state = |state| Edit::SetState { id: merged.id, state };
        let before = match merged.state {
            State::Merging if model.find(&merged.name).is_some_and(|found| found.id != merged.id) => State::Hidden,
            State::Merging => State::Ready,
            state => state,
        };
        Ok(Stage {
            begin: vec![set_state(State::Merging)],
            cancel: vec![set_state(before)],
            work,
            end: vec![handed_on, Edit::RemoveSnapshot { id: merged.id }],
            ..Stage::default()
        })
    }

    /// Returns the work on a volume of which the dependent has no file: the snapshot's file leaves
    /// the set. It is released if images outside the set depend on it, such as the file of the
    /// volume when it was detached.
    fn drop_volume_file(&self, merged: &Snapshot, volume: &Volume, base: &FileRecord) -> Result<VolumeWork, Refusal> {
        let mut leaving = Leaving::default();
        if self.facts(&base.file.path).dependents.is_empty() {
            self.discard(base, &mut leaving)?;
        } else {
            leaving = self.leftover(base, Direction::Commit);
        }
        let edits = vec![Edit::DropFile { id: merged.id, volume: volume.name.clone() }];
        Ok(VolumeWork { volume: volume.name.clone(), steps: Vec::new(), edits, leaving })
    }

    fn merge_volume(
        &self,
        model: &Model,
        merged: &Snapshot,
        dep: Dependent,
        volume: &Volume,
        base: &FileRecord,
        top: &FileRecord,
    ) -> Result<VolumeWork, Refusal> {
        let is_open = self.options.running
            && model.volume(&volume.name).is_some_and(|volume| model.active_chain(volume).contains(&top.file));
        let relinked = records_on(model, dep, &volume.name);
        let direction = self.direction(&volume.name, base, top, &relinked, is_open)?;
        let commit = direction == Direction::Commit;
        let survivor = FileRecord {
            virtual_size: top.virtual_size,
            bytes_on_disk: top.bytes_on_disk,
            ..if commit { base.clone() } else { top.clone() }
        };
        let mut steps = vec![Step::Merge(MergeStep {
            top: top.file.clone(),
            base: base.file.clone(),
            below: model.files_from(merged.parent, volume),
            direction,
            active: dep == Dependent::Volumes,
            drop_internal: false,
        })];
        if commit {
            let relink = |record: &&FileRecord| {
                let file = record.file.clone();
                Step::Relink { file, from: top.file.clone(), to: base.file.clone() }
            };
            steps.extend(relinked.iter().map(relink));
        }
        let leaving = self.leftover(if commit { top } else { base }, direction);
        let moved = match dep {
            Dependent::Volumes => Edit::SetActive { volume: volume.name.clone(), record: survivor },
            Dependent::Snapshot(id) => Edit::SetFile { id, volume: volume.name.clone(), record: survivor },
        };
        let dropped = Edit::DropFile { id: merged.id, volume: volume.name.clone() };
        Ok(VolumeWork { volume: volume.name.clone(), steps, edits: vec![moved, dropped], leaving })
    }

    /// Decides on the file that a merge leaves over. After a pull, a base that may not be written
    /// is not removed either.
    fn leftover(&self, record: &FileRecord, direction: Direction) -> Leaving {
        let path = record.file.path.clone();
        let facts = self.facts(&path);
        let kept = match direction {
            _ if record.protected => Some("it is protected".to_owned()),
            _ if !facts.dependents.is_empty() => {
                Some(format!("images outside the set depend on it: {}", facts.dependents.join(", ")))
            }
            Direction::Pull => {
                let in_use = facts.in_use.map(|held| format!("another program uses it: {held}"));
                facts.unremovable.or(facts.unwritable).or(in_use)
            }
            Direction::Commit => facts.unremovable,
        };
        let mut leaving = Leaving::default();
        match kept {
            Some(reason) => leaving.release.push(Release { path, reason }),
            None => leaving.remove.push(Removal { path, identity: facts.identity, provided: record.provided }),
        }
        leaving
    }

    /// Chooses the direction, or refuses if neither is possible.
    fn direction(
        &self,
        volume: &str,
        base: &FileRecord,
        top: &FileRecord,
        relinked: &[&FileRecord],
        is_open: bool,
    ) -> Result<Direction, Refusal> {
        self.refuse_shared_top(top)?;
        let commit = self.refuse_commit(base);
        // A hypervisor merges downwards only.
        if is_open {
            return commit.map(|()| Direction::Commit).map_err(|why| match why {
                Refusal::Protected { .. } => {
                    Refusal::Running { operation: "merge into the file above a protected one" }
                }
                why => why,
            });
        }
        let commit = commit.and_then(|()| relinked.iter().try_for_each(|record| self.refuse_relink(record)));
        let pull = self.refuse_pull(top);
        let preference = self.options.directions.get(volume).copied().unwrap_or_default();
        match preference {
            MergePreference::Commit => commit.map(|()| Direction::Commit),
            MergePreference::Pull => pull.map(|()| Direction::Pull),
            MergePreference::PullElseCommit => match (pull, commit) {
                (Ok(()), _) => Ok(Direction::Pull),
                (Err(_), Ok(())) => Ok(Direction::Commit),
                (Err(why), Err(_)) => Err(why),
            },
            // The preflight resolves `Auto` by the estimates; without them it means the default.
            MergePreference::CommitElsePull | MergePreference::Auto => match (commit, pull) {
                (Ok(()), _) => Ok(Direction::Commit),
                (Err(_), Ok(())) => Ok(Direction::Pull),
                (Err(why), Err(_)) => Err(why),
            },
        }
    }

    /// Refuses a top that others share: it is removed by a commit and written by a pull.
    fn refuse_shared_top(&self, top: &FileRecord) -> Result<(), Refusal> {
        let path = top.file.path.clone();
        if top.protected {
            return Err(Refusal::Protected { path });
        }
        let facts = self.facts(&path);
        match facts.in_use {
            Some(held) => Err(Refusal::InUse { path, held }),
            None if !facts.dependents.is_empty() => Err(Refusal::Dependents { path, images: facts.dependents }),
            None => Ok(()),
        }
    }

    fn refuse_commit(&self, base: &FileRecord) -> Result<(), Refusal> {
        let path = base.file.path.clone();
        let facts = self.facts(&path);
        match facts.unwritable {
            _ if base.protected => Err(Refusal::Protected { path }),
            Some(reason) => Err(Refusal::Unwritable { path, reason }),
            None if facts.in_use.is_some() => Err(Refusal::InUse { path, held: facts.in_use.unwrap_or_default() }),
            None if !facts.dependents.is_empty() => Err(Refusal::Dependents { path, images: facts.dependents }),
            None => Ok(()),
        }
    }

    /// Refuses to relink a file whose header may not be written. A pull relinks none.
    fn refuse_relink(&self, record: &FileRecord) -> Result<(), Refusal> {
        let path = record.file.path.clone();
        let facts = self.facts(&path);
        match (facts.unwritable, facts.in_use) {
            _ if record.protected => Err(Refusal::Protected { path }),
            (Some(reason), _) => Err(Refusal::Unwritable { path, reason }),
            (None, Some(held)) => Err(Refusal::InUse { path, held }),
            (None, None) => Ok(()),
        }
    }

    fn refuse_pull(&self, top: &FileRecord) -> Result<(), Refusal> {
        let path = top.file.path.clone();
        match self.facts(&path).unwritable {
            Some(reason) => Err(Refusal::Unwritable { path, reason }),
            None if top.file.format != crate::chain::Format::Qcow2 => {
                Err(Refusal::Unwritable { path, reason: "a raw image has no backing file".to_owned() })
            }
            None => Ok(()),
        }
    }
}

/// Returns the records of the files that are backed by a dependent's file: those of hidden
/// snapshots and the active one included.
fn records_on<'a>(model: &'a Model, dep: Dependent, volume: &str) -> Vec<&'a FileRecord> {
    let Dependent::Snapshot(id) = dep else { return Vec::new() };
    model.deps(id).into_iter().filter_map(|above| model.record_of(above, volume)).collect()
}
