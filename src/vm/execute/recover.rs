//! After an interruption: what the journal tells of is completed or undone.
//!
//! | found | done |
//! |---|---|
//! | no journal, no snapshot being merged | nothing is written |
//! | a torn journal | it is removed: nothing had happened |
//! | a create or revert that is not in the catalogue | undone: its overlays are removed |
//! | a resize | recorded as the image has it |
//! | anything else | completed: each stage that the catalogue does not have yet, each volume that is not recorded yet |
//! | a snapshot being merged, without a journal | its deletion is planned anew |

use crate::vm::execute::Run;
use crate::vm::execute::executor::Domain;
use crate::vm::execute::journal::{Found, Journal, clear};
use crate::vm::execute::progress::Progress;
use crate::vm::execute::report::Report;
use crate::vm::model::Model;
use crate::vm::model::catalogue::directory_of;
use crate::vm::options::MergeOptions;
use crate::vm::plan::planner::{PlanOptions, Request, plan};
use crate::vm::plan::{Plan, Purpose};
use crate::vm::set::{Recovery, SnapshotSet};
use crate::vm::{Error, Result};

impl SnapshotSet {
    /// Recovers; `told` is what the VM is doing, by the caller, who knows better than the executor.
    pub(in crate::vm) fn recover_locked(
        &self,
        told: Option<&Domain>,
        options: &MergeOptions,
        progress: &dyn Progress,
    ) -> Result<Recovery> {
        match Journal::find(self.place.names(), &self.journal)? {
            Found::Journal(journal, plan) => self.resume(*journal, &plan, told, options, progress),
            Found::Torn => {
                clear(&**self.place.names(), &self.journal)?;
                Ok(Recovery::Undone("an operation that had not changed anything".to_owned()))
            }
            Found::Nothing => self.resume_without_journal(told, options, progress),
        }
    }

    fn resume(
        &self,
        journal: Journal,
        plan: &Plan,
        told: Option<&Domain>,
        options: &MergeOptions,
        progress: &dyn Progress,
    ) -> Result<Recovery> {
        // What is seen must be durable before anything is built on it.
        journal.settle()?;
        self.store.settle()?;
        let model = self.store.load()?;
        let domain = told.map_or_else(|| self.executor.domain(&model.vm), |domain| Ok(domain.clone()))?;
        // Once it is in the catalogue it does not matter, and the overlays may be merged already.
        let switched = model.last_operation.id < plan.id && self.is_switched(plan, &domain)?;
        let run = Run::new(self.tools(&domain, options, progress, true), plan, model);
        Ok(match run.resume(journal, switched)? {
            Some(report) => Recovery::Completed(Box::new(report)),
            None => Recovery::Undone(plan.purpose.to_string()),
        })
    }

    /// Whether a running VM writes to the new overlays, although the catalogue does not know them: by its hypervisor, or by
    /// what they hold. All of them were switched over at one instant, or none.
    fn is_switched(&self, plan: &Plan, domain: &Domain) -> Result<bool> {
        let (Some(first), Purpose::Create { .. }) = (plan.stages.first(), &plan.purpose) else { return Ok(false) };
        let mut overlays = first.create.iter();
        if overlays.any(|overlay| domain.disk_writing(&self.place, &overlay.file.path).is_some()) {
            return Ok(true);
        }
        for overlay in &first.create {
            if !self.place.is_written(&overlay.file)? {
                continue;
            }
            // Started anew on the files beneath: either of them holds what the other lacks.
            if domain.running && domain.disk_writing(&self.place, &overlay.backing.path).is_some() {
                let (backing, file) = (&overlay.backing, &overlay.file);
                let what =
                    format!("the VM writes {backing}, and {file} over it holds data of its own; {}", plan.purpose);
                return Err(Error::Uncertain { what, source: None });
            }
            return Ok(true);
        }
        Ok(false)
    }

    fn resume_without_journal(
        &self,
        told: Option<&Domain>,
        options: &MergeOptions,
        progress: &dyn Progress,
    ) -> Result<Recovery> {
        let model = self.store.load()?;
        let Some(merging) = model.merging() else {
            // A journal that was taken away, but whose end could not be made durable, would come back after a crash.
            self.place.names().sync_dir(directory_of(&self.journal))?;
            return Ok(Recovery::Clean);
        };
        let plan = self.plan_anew(&model, &merging.name.clone())?;
        let journal = Journal::begin(self.place.names(), &self.journal, &plan)?;
        self.resume(journal, &plan, told, options, progress)
    }

    /// The plan that deletes a snapshot on.
    fn plan_anew(&self, model: &Model, name: &str) -> Result<Plan> {
        let mut options = PlanOptions::default();
        let first = plan(model, &Request::Delete { name: name.to_owned() }, &options)?;
        for (volume, step) in first.merges() {
            // A top that does not stand on its base any more has taken it in.
            if self.place.has_pulled(step)? {
                options = options.with_direction(volume, crate::merge::Direction::Pull);
            }
        }
        Ok(plan(model, &Request::Delete { name: name.to_owned() }, &options)?)
    }

    /// Deletes on a snapshot whose deletion was interrupted; `None` where this was none.
    pub(in crate::vm) fn resume_deletion(
        &self,
        name: &str,
        options: &MergeOptions,
        progress: &dyn Progress,
    ) -> Result<Option<Report>> {
        let model = self.store.load()?;
        let merging =
            model.merging().is_some_and(|merging| model.find(name).is_some_and(|found| found.id == merging.id));
        let journalled = match Journal::find(self.place.names(), &self.journal)? {
            Found::Journal(_, plan) => plan.purpose == Purpose::Delete { name: name.to_owned() },
            _ => false,
        };
        if !merging && !journalled {
            return Ok(None);
        }
        match self.recover_locked(None, options, progress)? {
            Recovery::Completed(report) => Ok(Some(*report)),
            Recovery::Undone(_) | Recovery::Clean => Ok(None),
        }
    }

    /// What [`SnapshotSet::recover`] would do, without doing it: what was under way, and whether it would be completed.
    ///
    /// # Errors
    /// What reading journal and catalogue gives.
    pub fn pending(&self) -> Result<Option<Pending>> {
        let model = self.store.load()?;
        match Journal::find(self.place.names(), &self.journal)? {
            Found::Torn => Ok(Some(Pending { operation: None, completes: false })),
            Found::Nothing => Ok(model.merging().map(|merging| Pending {
                operation: Some(Purpose::Delete { name: merging.name.clone() }),
                completes: true,
            })),
            Found::Journal(_, plan) => {
                let recorded = model.last_operation.id >= plan.id;
                let asked = || self.executor.domain(&model.vm).and_then(|domain| self.is_switched(&plan, &domain));
                let switched = !recorded
                    && match asked() {
                        // It does neither: people must decide.
                        Err(Error::Uncertain { .. }) => false,
                        switched => switched?,
                    };
                let undoable = plan.stages.first().is_some_and(|stage| !stage.create.is_empty());
                Ok(Some(Pending { operation: Some(plan.purpose), completes: recorded || switched || !undoable }))
            }
        }
    }
}

/// An operation that was interrupted.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Pending {
    /// What it was for, if its journal says that.
    pub operation: Option<Purpose>,
    /// Whether recovery completes it rather than undo it.
    pub completes: bool,
}

impl From<Pending> for Error {
    fn from(pending: Pending) -> Self {
        let operation = pending.operation.map_or_else(|| "an unknown one".to_owned(), |purpose| purpose.to_string());
        crate::vm::Refusal::Unfinished { operation }.into()
    }
}
