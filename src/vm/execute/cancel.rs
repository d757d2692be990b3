//! Calling off an interrupted deletion that has published nothing.

use super::journal::{Found, Journal};
use super::report::Report;
use crate::merge::Direction;
use crate::vm::files::{Hold, VolumeFiles, free_leaks};
use crate::vm::model::edit::Edit;
use crate::vm::model::{LastOperation, Model, State};
use crate::vm::plan::{Plan, Purpose};
use crate::vm::set::SnapshotSet;
use crate::vm::{Refusal, Result};

impl SnapshotSet {
    /// Calls off an interrupted deletion, if it has not changed the content of any file: the
    /// snapshot is ready again, and clusters that the merge reserved are freed.
    ///
    /// # Errors
    /// - [`Refusal::NotCancellable`]: no deletion is under way, or it has changed a file. Recover
    ///   it instead.
    /// - [`Refusal::ForeignJournal`]: the journal does not belong to the catalogue.
    /// - [`Refusal::InUse`]: another program uses a file of the merge.
    pub fn cancel(&self) -> Result<Report> {
        let _locked = self.lock.take()?;
        let model = self.store.load()?;
        let Found::Journal(mut journal, plan) = Journal::find(self.files.file_system(), &self.journal)? else {
            let why = match model.merging() {
                Some(_) => "its journal is missing, so that its progress is not known",
                None => "no operation is under way",
            };
            return Err(Refusal::NotCancellable { why: why.to_owned() }.into());
        };
        self.check_journal(&plan, &model)?;
        let files = self.files.for_operation();
        refuse_published(&files, &journal, &plan, &model)?;
        journal.settle()?;
        self.store.settle()?;
        free_reserved(&files, &plan)?;
        let mut next = model;
        for stage in plan.stages.iter().rev() {
            Edit::apply_all(&stage.cancel, &mut next);
        }
        next.last_operation = LastOperation { id: plan.id, stages: plan.stages.len() };
        self.store.save(&next)?;
        journal.clear()?;
        let mut report = Report::new(plan.purpose.clone());
        report.state = plan.state_in(&next);
        let active = next.volumes.iter();
        report.paths = active.map(|volume| (volume.name.clone(), files.path(&volume.active.file.path))).collect();
        Ok(report)
    }
}

/// Refuses a plan of which anything may have been published.
fn refuse_published(files: &VolumeFiles, journal: &Journal, plan: &Plan, model: &Model) -> Result<()> {
    let refused = |why: String| Err(Refusal::NotCancellable { why }.into());
    let Purpose::Delete { name, .. } = &plan.purpose else {
        return refused(format!("the operation under way is '{}', not a deletion", plan.purpose));
    };
    if model.last_operation.id == plan.id {
        return refused(format!("a part of the deletion of {name} is complete; recover it"));
    }
    if journal.used_hypervisor() {
        return refused("a hypervisor was merging; recover with that hypervisor".to_owned());
    }
    if let Some(volume) = journal.first_change() {
        return refused(format!("the merge of volume {volume} has changed a file; recover it"));
    }
    let restores_ready = plan
        .stages
        .iter()
        .flat_map(|stage| &stage.cancel)
        .all(|edit| !matches!(edit, Edit::SetState { state, .. } if *state != State::Ready));
    if !restores_ready {
        return refused("the merge is that of a hidden snapshot, which nothing but recovery can end".to_owned());
    }
    for (volume, step) in plan.merges() {
        for file in [&step.top, &step.base] {
            if let Hold::Shared(held) = files.hold(&file.path)?
                && file == step.survivor()
            {
                return Err(Refusal::InUse { path: files.shown(&file.path), held }.into());
            }
        }
        if step.direction == Direction::Pull && files.has_pulled(step)? {
            return refused(format!("the merge of volume {volume} is complete; recover it"));
        }
    }
    Ok(())
}

/// Frees the clusters that the merges reserved and did not map.
fn free_reserved(files: &VolumeFiles, plan: &Plan) -> Result<()> {
    for (_, step) in plan.merges() {
        let layer = files.layer(step.survivor(), true)?;
        if layer.node.as_qcow2().is_some() {
            free_leaks(&**layer.node.storage())?;
        }
    }
    Ok(())
}
