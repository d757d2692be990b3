//! Recovery: completes or undoes an interrupted operation.
//!
//! | found | action |
//! |---|---|
//! | no journal, no merging snapshot | none; nothing is written |
//! | a torn journal | it is removed: nothing had changed |
//! | a journal of another set, or of another operation | refused |
//! | a create or revert that the catalogue does not record | undone: the overlays that it created are removed |
//! | such a create, and the VM writes the overlays | completed |
//! | a resize | recorded as the image has it |
//! | any other | completed: each stage, and in it each volume, that the catalogue does not record |
//! | a merging snapshot without a journal | its deletion is planned again |
//!
//! A file that is missing or cannot be read proves nothing: the outcome is an error or uncertain.

use std::collections::BTreeMap;

use super::Run;
use super::executor::Domain;
use super::journal::{Found, Journal, clear};
use super::report::{Released, Report};
use crate::progress::Progress;
use crate::storage::Attributes;
use crate::vm::files::{Hold, VolumeFiles};
use crate::vm::model::catalogue::directory_of;
use crate::vm::model::{Model, SnapshotId};
use crate::vm::options::MergeOptions;
use crate::vm::plan::planner::plan;
use crate::vm::plan::request::{MergePreference, PlanOptions, Request};
use crate::vm::plan::{NewOverlay, Plan, Purpose, Step};
use crate::vm::set::{Operation, SnapshotSet};
use crate::vm::{Error, Refusal, Result};

/// The result of a recovery.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Recovery {
    /// No operation was under way. Nothing was written.
    Clean,
    /// An operation was undone: volumes and snapshots are as before it.
    #[non_exhaustive]
    Undone {
        /// The purpose of the operation.
        operation: String,
        /// Files of the operation that were not removed.
        released: Vec<Released>,
    },
    /// An operation was completed.
    Completed(Box<Report>),
}

/// An interrupted operation.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Pending {
    /// Its purpose, if the journal has it.
    pub operation: Option<Purpose>,
    /// If set, recovery completes it; if not, recovery undoes it.
    pub completes: bool,
    /// The reason why recovery cannot decide, if it cannot.
    pub uncertain: Option<String>,
}

impl From<Pending> for Error {
    fn from(pending: Pending) -> Self {
        let operation = pending.operation.map_or_else(|| "an unknown one".to_owned(), |purpose| purpose.to_string());
        Refusal::Unfinished { operation }.into()
    }
}

impl SnapshotSet {
    /// Recovers. `stated` is the caller's description of the VM, which overrules that of the
    /// executor.
    pub(in crate::vm) fn recover_locked(
        &self,
        stated: Option<&Domain>,
        options: &MergeOptions,
        progress: &dyn Progress,
    ) -> Result<Recovery> {
        match Journal::find(self.files.file_system(), &self.journal)? {
            Found::Journal(journal, plan) => self.resume(*journal, &plan, stated, options, progress),
            Found::Torn => {
                clear(&**self.files.file_system(), &self.journal)?;
                let operation = "an operation that had not changed anything".to_owned();
                Ok(Recovery::Undone { operation, released: Vec::new() })
            }
            Found::Nothing => self.resume_without_journal(stated, options, progress),
        }
    }

    /// Refuses a journal that does not belong to the catalogue: of another set, or not of the last
    /// or the next operation.
    pub(in crate::vm) fn check_journal(&self, plan: &Plan, model: &Model) -> Result<()> {
        let last = model.last_operation.id;
        let why = if plan.set != model.set {
            format!("its set is {}, that of the catalogue {}", plan.set, model.set)
        } else if plan.id != last && plan.id != last + 1 {
            format!("it has operation {}, the catalogue records operation {last}", plan.id)
        } else {
            return Ok(());
        };
        Err(Refusal::ForeignJournal { path: self.journal.display().to_string(), why }.into())
    }

    fn resume(
        &self,
        mut journal: Journal,
        plan: &Plan,
        stated: Option<&Domain>,
        options: &MergeOptions,
        progress: &dyn Progress,
    ) -> Result<Recovery> {
        let model = self.store.load()?;
        self.check_journal(plan, &model)?;
        let domain = stated.cloned().map_or_else(|| self.executor.domain(&model.vm), |domain| Ok(Some(domain)))?;
        if let Some(stated) = stated {
            self.check_statement(stated, plan, &model)?;
        }
        let files = self.files.for_operation();
        // Once the catalogue records the creation, the overlays may be merged already.
        let created = journal.has_created(0);
        let recorded = model.last_operation.id == plan.id;
        let switched = !recorded && is_switched(&files, plan, created, domain.as_ref())?;
        if domain.is_none() && journal.needs_hypervisor() {
            let what = format!("{}: a hypervisor was merging, and none was asked now", plan.purpose);
            return Err(Error::Uncertain { what, source: None });
        }
        // What recovery builds on must be durable.
        journal.settle()?;
        self.store.settle()?;
        hold_files(&files, plan, &model, domain.as_ref());
        let operation = Operation {
            files: &files,
            domain: domain.as_ref(),
            jobs: self.jobs,
            vm: &model.vm,
            recovering: true,
            attributes: Attributes::BestEffort,
            estimates: &BTreeMap::new(),
        };
        let run = Run::new(self.tools(&operation, options, progress), plan, model.clone());
        let outcome = run.resume(journal, switched)?;
        Ok(match outcome {
            Outcome::Completed(report) => Recovery::Completed(report),
            Outcome::Undone(released) => Recovery::Undone { operation: plan.purpose.to_string(), released },
        })
    }

    /// Refuses a statement about a file that is neither recorded nor planned.
    fn check_statement(&self, stated: &Domain, plan: &Plan, model: &Model) -> Result<()> {
        if !stated.stated {
            return Ok(());
        }
        let recorded = model.records().map(|(_, _, record)| record.file.path.clone());
        let planned = plan.created().map(|overlay| overlay.file.path.clone());
        let known: Vec<_> = recorded.chain(planned).map(|path| self.files.path(&path)).collect();
        for file in stated.disks.values().flatten() {
            if !known.iter().any(|path| self.files.leads_to(path, file)) {
                let why = "it is not a file of this set; name the file that the VM runs on";
                return Err(Refusal::Path { path: file.display().to_string(), why }.into());
            }
        }
        Ok(())
    }

    fn resume_without_journal(
        &self,
        stated: Option<&Domain>,
        options: &MergeOptions,
        progress: &dyn Progress,
    ) -> Result<Recovery> {
        let model = self.store.load()?;
        let Some(merging) = model.merging() else {
            // The removal of a journal that could not be made durable would be lost in a crash.
            self.files.file_system().sync_dir(directory_of(&self.journal))?;
            return Ok(Recovery::Clean);
        };
        let plan = self.plan_anew(&model, merging.id)?;
        let journal = Journal::begin(self.files.file_system(), &self.journal, &self.catalogue, &plan)?;
        self.resume(journal, &plan, stated, options, progress)
    }

    /// Plans the deletion of a merging snapshot again. The direction of a merge that was complete
    /// is read from the header of its top.
    fn plan_anew(&self, model: &Model, id: SnapshotId) -> Result<Plan> {
        let mut options = PlanOptions::default();
        let request = Request::ResumeDelete { id };
        let first = plan(model, &request, &options)?;
        for (volume, step) in first.merges() {
            if self.files.has_pulled(step)? {
                options = options.with_direction(volume, MergePreference::Pull);
            }
        }
        Ok(plan(model, &request, &options)?)
    }

    /// Resumes an interrupted deletion of this snapshot, also if only the merge that follows it is
    /// left. Returns `None` if no deletion of it is under way.
    pub(in crate::vm) fn resume_deletion(
        &self,
        name: &str,
        options: &MergeOptions,
        progress: &dyn Progress,
    ) -> Result<Option<Report>> {
        let model = self.store.load()?;
        let found = model.find(name).map(|found| found.id);
        let merging = model.merging().is_some_and(|merging| found == Some(merging.id));
        let journalled = match Journal::find(self.files.file_system(), &self.journal)? {
            Found::Journal(_, plan) => match &plan.purpose {
                Purpose::Delete { id, name: deleted } => {
                    // The snapshot is gone already if a merge of the hidden one beneath follows.
                    plan.set == model.set && found.map_or(deleted == name, |found| found == *id)
                }
                _ => false,
            },
            _ => false,
        };
        if !merging && !journalled {
            return Ok(None);
        }
        match self.recover_locked(None, options, progress)? {
            Recovery::Completed(report) => Ok(Some(*report)),
            Recovery::Undone { .. } | Recovery::Clean => Ok(None),
        }
    }

    /// Returns the interrupted operation, and what [`SnapshotSet::recover`] would do with it.
    /// Changes nothing.
    ///
    /// # Errors
    /// - [`Refusal::ForeignJournal`]: the journal does not belong to the catalogue.
    /// - [`Error::Journal`], [`Error::Catalogue`]: a file is damaged.
    pub fn pending(&self) -> Result<Option<Pending>> {
        let model = self.store.load()?;
        match Journal::find(self.files.file_system(), &self.journal)? {
            Found::Torn => Ok(Some(Pending { operation: None, completes: false, uncertain: None })),
            Found::Nothing => Ok(model.merging().map(|merging| Pending {
                operation: Some(Purpose::Delete { id: merging.id, name: merging.name.clone() }),
                completes: true,
                uncertain: None,
            })),
            Found::Journal(journal, plan) => {
                self.check_journal(&plan, &model)?;
                self.pending_plan(&journal, *plan, &model).map(Some)
            }
        }
    }

    fn pending_plan(&self, journal: &Journal, plan: Plan, model: &Model) -> Result<Pending> {
        let recorded = model.last_operation.id >= plan.id;
        let domain = self.executor.domain(&model.vm)?;
        let mut uncertain = None;
        let mut switched = false;
        if !recorded {
            match is_switched(&self.files, &plan, journal.has_created(0), domain.as_ref()) {
                Err(Error::Uncertain { what, .. }) => uncertain = Some(what),
                found => switched = found?,
            }
        }
        if domain.is_none() && journal.needs_hypervisor() {
            uncertain = Some("a hypervisor was merging, and none was asked now".to_owned());
        }
        let undoable = plan.stages.first().is_some_and(|stage| !stage.create.is_empty());
        Ok(Pending { operation: Some(plan.purpose), completes: recorded || switched || !undoable, uncertain })
    }
}

/// The result of resuming a plan.
pub(super) enum Outcome {
    Completed(Box<Report>),
    Undone(Vec<Released>),
}

impl Run<'_> {
    /// Completes an interrupted plan, or undoes it if that is still possible. Journal and catalogue
    /// are durable.
    fn resume(self, journal: Journal, switched: bool) -> Result<Outcome> {
        let created = journal.has_created(0);
        *super::lock(&self.journal) = Some(journal);
        let last = super::lock(&self.model).last_operation;
        let stages = self.plan.stages.len();
        let mut done = if last.id == self.plan.id { last.stages.min(stages) } else { 0 };
        if done == 0 && matches!(self.plan.purpose, Purpose::Resize { .. }) {
            self.settle_resize()?;
            return Ok(Outcome::Completed(Box::new(self.finish())));
        }
        if done == 0 && !switched && !self.plan.stages[0].create.is_empty() {
            return self.undo_planned(created);
        }
        if done == 0 && switched {
            self.end_stage(0, &self.plan.stages[0])?;
            done = 1;
        }
        if let Some(stage) = done.checked_sub(1).and_then(|last| self.plan.stages.get(last)) {
            self.leave(&stage.leaving)?;
        }
        self.stages(done)?;
        self.clear().map(|report| Outcome::Completed(Box::new(report)))
    }

    /// Undoes a create or revert that the catalogue does not record: removes those of the planned
    /// overlays that the interrupted operation provably created and to which nothing was written.
    fn undo_planned(self, created: bool) -> Result<Outcome> {
        let files = self.tools.files();
        let mut ours = Vec::new();
        for overlay in self.plan.created() {
            let path = files.path(&overlay.file.path);
            let exists = files.file_system().exists(&path)?;
            // The provider may have created a container that has no path yet.
            if !exists && (created || !overlay.provided) {
                continue;
            }
            let kept = if overlay.provided && !created {
                // The name is unique, and the content of a new container is not defined.
                None
            } else if created {
                self.reason_to_keep(overlay)?
            } else if files.is_partial_overlay(overlay)? {
                None
            } else {
                Some("it is not the overlay that was planned".to_owned())
            };
            match kept {
                Some(reason) => self.report_release(path, reason),
                None => ours.push(super::executor::Created {
                    path: overlay.file.path.clone(),
                    identity: if exists { files.identity(&overlay.file.path)? } else { None },
                    provided: overlay.provided,
                }),
            }
        }
        self.remove_created(&ours)?;
        self.end_journal()?;
        let report = self.finish();
        Ok(Outcome::Undone(report.released))
    }

    /// Returns the reason to keep a complete overlay, if there is one.
    fn reason_to_keep(&self, overlay: &NewOverlay) -> Result<Option<String>> {
        let files = self.tools.files();
        if files.check_overlay(overlay).is_err() {
            return Ok(Some("it is not the overlay that was planned".to_owned()));
        }
        let stated = self.tools.domain.is_some_and(|domain| domain.stated);
        let written = match files.is_written(overlay) {
            // The caller stated that the VM runs on another file. The overlay stays nevertheless.
            Err(_) if stated => true,
            written => written.map_err(|error| uncertain(overlay, error))?,
        };
        Ok(written.then(|| "it has data of its own".to_owned()))
    }
}

fn uncertain(overlay: &NewOverlay, error: Error) -> Error {
    let what = format!("it is not known if a VM wrote to {}, which cannot be read: {error}", overlay.file);
    Error::Uncertain { what, source: Some(Box::new(error)) }
}

/// Returns true if a VM writes to the new overlays of a snapshot that the catalogue does not
/// record: by its hypervisor or the caller's statement, or by the data in them. A VM switches to
/// all of them at one instant, or to none.
fn is_switched(files: &VolumeFiles, plan: &Plan, created: bool, domain: Option<&Domain>) -> Result<bool> {
    let (Some(first), Purpose::Create { .. }) = (plan.stages.first(), &plan.purpose) else { return Ok(false) };
    let writes = |path: &str| domain.is_some_and(|domain| domain.disk_writing(files, path).is_some());
    let as_planned = |overlay: &NewOverlay| {
        files.check_overlay(overlay).map_err(|error| {
            let what = format!("{} is not the overlay that was planned: {error}; {}", overlay.file, plan.purpose);
            Error::Uncertain { what, source: None }
        })
    };
    if let Some(overlay) = first.create.iter().find(|overlay| writes(&overlay.file.path)) {
        return as_planned(overlay).map(|()| true);
    }
    // Before the overlays were complete, no VM was switched to them.
    if !created || domain.is_some_and(|domain| domain.stated) {
        return Ok(false);
    }
    let mut written = None;
    for overlay in &first.create {
        if !files.exists(&overlay.file.path)? {
            let what = format!("the overlay {} was created and is missing now; {}", overlay.file, plan.purpose);
            return Err(Error::Uncertain { what, source: None });
        }
        if files.is_written(overlay).map_err(|error| uncertain(overlay, error))? {
            written = Some(overlay);
            break;
        }
    }
    let Some(overlay) = written else { return Ok(false) };
    as_planned(overlay)?;
    // The VM was started again on the files beneath: each of the two has data that the other lacks.
    if domain.is_some_and(|domain| domain.running) && writes(&overlay.backing.path) {
        let (backing, file) = (&overlay.backing, &overlay.file);
        let what = format!("the VM writes {backing}, and {file} above it has data of its own; {}", plan.purpose);
        return Err(Error::Uncertain { what, source: None });
    }
    Ok(true)
}

/// Locks the files of the work that is left. A file that cannot be locked makes its volume fail
/// later, and no other.
fn hold_files(files: &VolumeFiles, plan: &Plan, model: &Model, domain: Option<&Domain>) {
    let new: Vec<&str> = plan.created().map(|overlay| overlay.file.path.as_str()).collect();
    for work in plan.works().filter(|work| !work.is_recorded(model)) {
        for step in &work.steps {
            let (concerned, written) = match step {
                Step::Merge(merge) => (vec![&merge.top, &merge.base], merge.survivor()),
                Step::Relink { file, .. } => (vec![file], file),
                Step::Resize { .. } => continue,
            };
            for file in concerned {
                let open = domain.is_some_and(|domain| domain.disk_with(files, &file.path).is_some());
                if open || new.contains(&file.path.as_str()) {
                    continue;
                }
                if !matches!(files.hold(&file.path), Ok(Hold::Writable)) && file == written {
                    // The executor opens it again, and reports why it may not be written.
                    files.held().release(&files.path(&file.path));
                }
            }
        }
    }
}
