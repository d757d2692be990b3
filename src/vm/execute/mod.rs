//! The execution of a plan: journal, catalogue, files, catalogue, names, journal; in this order,
//! for every operation.

pub(super) mod cancel;
pub(super) mod executor;
pub(super) mod journal;
pub(super) mod lock;
pub(super) mod offline;
pub(super) mod progress;
pub(super) mod recover;
mod remove;
pub(super) mod report;
mod watching;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use self::executor::{Created, CreationLog, Domain, ExecutionContext, Executor, Merged};
use self::journal::{Journal, Progressed, Record};
use self::offline::in_parallel;
use self::progress::Relay;
use self::report::{MergedVolume, PathChange, Released, Report};
use self::watching::Watching;
use crate::merge::Direction;
use crate::progress::Progress;
use crate::vm::files::{VolumeFiles, free_leaks};
use crate::vm::model::edit::Edit;
use crate::vm::model::store::Store;
use crate::vm::model::{LastOperation, Model};
use crate::vm::plan::{Leaving, MergeStep, Plan, Purpose, SizeChange, Stage, Step, VolumeWork};
use crate::vm::trace::event;
use crate::vm::{Error, Result};

/// The means by which a plan is carried out.
#[derive(Clone)]
pub(super) struct Tools<'a> {
    pub(super) store: &'a dyn Store,
    pub(super) executor: &'a dyn Executor,
    /// The hypervisor's description when the operation began, or the caller's statement. `None` if
    /// neither is known.
    pub(super) domain: Option<&'a Domain>,
    pub(super) journal: &'a Path,
    pub(super) catalogue: &'a Path,
    pub(super) context: ExecutionContext<'a>,
    pub(super) progress: &'a dyn Progress,
}

impl Tools<'_> {
    fn files(&self) -> &VolumeFiles {
        self.context.files
    }

    /// Returns true if the running VM has a file open.
    fn is_open_in_vm(&self, recorded: &str) -> bool {
        self.domain.is_some_and(|domain| domain.disk_with(self.files(), recorded).is_some())
    }

    /// Returns true if the VM writes a file.
    fn writes(&self, recorded: &str) -> bool {
        self.domain.is_some_and(|domain| domain.disk_writing(self.files(), recorded).is_some())
    }
}

/// A plan that is being carried out.
pub(super) struct Run<'a> {
    tools: Tools<'a>,
    relay: Relay<'a>,
    plan: &'a Plan,
    model: Mutex<Model>,
    journal: Mutex<Option<Journal>>,
    report: Mutex<Report>,
    /// The overlays that this run created.
    created: Mutex<Vec<Created>>,
    /// Set once the catalogue may differ from before, or files that are not new may be changed.
    /// From then on an operation can be completed only.
    committed: AtomicBool,
}

/// Locks a part of a [`Run`]. Each part is a plain value that is replaced or extended in one step,
/// so that a panic elsewhere leaves it consistent; the journal on disk decides what happened.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a> Run<'a> {
    pub(super) fn new(tools: Tools<'a>, plan: &'a Plan, model: Model) -> Self {
        Self {
            relay: Relay::new(tools.progress),
            tools,
            plan,
            model: Mutex::new(model),
            journal: Mutex::default(),
            report: Mutex::new(Report::new(plan.purpose.clone())),
            created: Mutex::default(),
            committed: AtomicBool::new(false),
        }
    }

    /// Carries the plan out from its beginning. If it fails while it can be undone, it is undone.
    pub(super) fn start(self) -> Result<Report> {
        event!("begin", purpose = %self.plan.purpose, id = self.plan.id);
        if self.relay.is_cancelled() {
            return Err(Error::Cancelled);
        }
        if self.plan.is_bookkeeping() {
            let stage = &self.plan.stages[0];
            self.end_stage(0, stage)?;
            self.release(&stage.leaving);
            return Ok(self.finish());
        }
        let (files, journal) = (self.tools.files(), self.tools.journal);
        match Journal::begin(files.file_system(), journal, self.tools.catalogue, self.plan) {
            Ok(journal) => *lock(&self.journal) = Some(journal),
            Err(error) => {
                // At most a torn journal is left, which recovery removes if this fails.
                let _ = journal::clear(&**files.file_system(), journal);
                return Err(error);
            }
        }
        match self.stages(0) {
            Ok(()) => self.clear(),
            Err(error) => {
                self.after_failure(&error);
                event!("failed", purpose = %self.plan.purpose, error = %error);
                Err(error)
            }
        }
    }

    /// Undoes a failed operation if that is possible. Otherwise recovery completes it.
    fn after_failure(&self, error: &Error) {
        if error.is_uncertain() {
            // A VM may be writing to what an undo would remove.
        } else if !self.committed.load(Ordering::SeqCst) {
            // If this fails as well, recovery does it.
            let _ = self.undo();
        } else if matches!(self.plan.purpose, Purpose::Resize { .. }) {
            let _ = self.settle_resize();
        }
    }

    fn stages(&self, from: usize) -> Result<()> {
        for (number, stage) in self.plan.stages.iter().enumerate().skip(from) {
            self.stage(number, stage)?;
        }
        Ok(())
    }

    /// Carries out one stage. Between any two lines, every path in the catalogue exists.
    fn stage(&self, number: usize, stage: &Stage) -> Result<()> {
        self.record(&stage.begin)?;
        if !stage.create.is_empty() {
            let quiesce = matches!(self.plan.purpose, Purpose::Create { quiesce: true, .. });
            let log = StageLog { run: self, stage: number };
            self.tools.executor.create(&stage.create, quiesce, &self.tools.context, &log)?;
            let paths = stage.create.iter().map(|overlay| self.tools.files().path(&overlay.file.path));
            lock(&self.report).created.extend(paths);
        }
        self.work(number, stage)?;
        self.end_stage(number, stage)?;
        self.leave(&stage.leaving)
    }

    /// Records the end of a stage.
    fn end_stage(&self, number: usize, stage: &Stage) -> Result<()> {
        let mut model = lock(&self.model);
        let mut next = model.clone();
        Edit::apply_all(&stage.end, &mut next);
        next.last_operation = LastOperation { id: self.plan.id, stages: number + 1 };
        self.save(&mut model, next)
    }

    /// Records edits, if they change anything.
    fn record(&self, edits: &[Edit]) -> Result<()> {
        let mut model = lock(&self.model);
        let mut next = model.clone();
        Edit::apply_all(edits, &mut next);
        if next == *model { Ok(()) } else { self.save(&mut model, next) }
    }

    fn save(&self, model: &mut Model, next: Model) -> Result<()> {
        self.committed.store(true, Ordering::SeqCst);
        self.tools.store.save(&next)?;
        self.note_moves(model, &next);
        *model = next;
        Ok(())
    }

    /// Reports the active files that changed.
    fn note_moves(&self, old: &Model, new: &Model) {
        let files = self.tools.files();
        let mut report = lock(&self.report);
        for volume in &new.volumes {
            let Some(before) = old.volume(&volume.name) else { continue };
            if before.active.file.path != volume.active.file.path {
                let (old, new) = (files.path(&before.active.file.path), files.path(&volume.active.file.path));
                report.moved.push(PathChange { volume: volume.name.clone(), old, new });
            }
        }
    }

    /// Does the work on all volumes, on several threads. A volume that fails does not keep the
    /// others from being done.
    fn work(&self, number: usize, stage: &Stage) -> Result<()> {
        let failed: Mutex<Vec<(String, Error)>> = Mutex::default();
        in_parallel(&stage.work, self.tools.context.jobs, |work| {
            if let Err(error) = self.volume(number, work) {
                event!("volume failed", volume = %work.volume, error = %error);
                lock(&failed).push((work.volume.clone(), error));
            }
            Ok(())
        })?;
        let mut failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
        let left: Vec<String> = failed.iter().map(|(volume, _)| volume.clone()).collect();
        // An uncertain outcome is reported before any other failure: it decides if the VM may be
        // started.
        failed.sort_by_key(|(_, error)| !error.is_uncertain());
        let Some((volume, error)) = failed.into_iter().next() else { return Ok(()) };
        if error.is_cancelled() {
            return Err(Error::Cancelled);
        }
        let done = stage.work.iter().map(|work| work.volume.clone()).filter(|volume| !left.contains(volume));
        Err(Error::Incomplete { volume, done: done.collect(), left, source: Box::new(error) })
    }

    /// Does the work on one volume: data and mappings, relinks, catalogue, names.
    fn volume(&self, stage: usize, work: &VolumeWork) -> Result<()> {
        if !work.is_recorded(&lock(&self.model)) {
            let mut edits = work.edits.clone();
            for (number, step) in work.steps.iter().enumerate() {
                if self.relay.is_cancelled() {
                    return Err(Error::Cancelled);
                }
                if let Some(merged) = self.step(stage, work, number, step)? {
                    self.report_size(&work.volume, &edits, merged.virtual_size);
                    set_size(&mut edits, merged.virtual_size);
                }
            }
            self.record(&edits)?;
        }
        self.leave(&work.leaving)
    }

    /// Reports the size of an active file that differs from the planned one: a device keeps its
    /// length.
    fn report_size(&self, volume: &str, edits: &[Edit], new: u64) {
        let planned = edits.iter().find_map(|edit| match edit {
            Edit::SetActive { record, .. } => Some(record.virtual_size),
            _ => None,
        });
        if let Some(old) = planned.filter(|old| *old != new) {
            lock(&self.report).resized.push(SizeChange { volume: volume.to_owned(), old, new });
        }
    }

    fn step(&self, stage: usize, work: &VolumeWork, number: usize, step: &Step) -> Result<Option<Merged>> {
        let (executor, context) = (self.tools.executor, &self.tools.context);
        event!("step", volume = %work.volume, step = %step);
        let mut merged = None;
        match step {
            Step::Merge(merge) => {
                if self.is_merged(stage, &work.volume, number, merge)? {
                    return self.merged_before(merge);
                }
                let watch = Watching::new(self, stage, number, merge, self.relay.of(&work.volume));
                let done = executor.merge(merge, context, &watch)?;
                let report = &done.report;
                let moved = MergedVolume {
                    direction: merge.direction,
                    copied: report.copied,
                    copied_in_kernel: report.copied_in_kernel,
                    zeroed: report.zeroed,
                    bitmaps_invalidated: report.bitmaps_invalidated.clone(),
                };
                lock(&self.report).merged.insert(work.volume.clone(), moved);
                merged = Some(done);
            }
            Step::Relink { file, from, to } => executor.relink(file, from, to, context)?,
            Step::Resize { file, below, size } => {
                self.committed.store(true, Ordering::SeqCst);
                executor.resize(file, below, *size, context)?;
            }
        }
        let switched = merged.as_ref().is_some_and(|merged| merged.switched);
        self.note(Record::Done { stage, volume: work.volume.clone(), step: number, switched })?;
        Ok(merged)
    }

    /// Appends to the journal, if one exists.
    fn note(&self, record: Record) -> Result<()> {
        lock(&self.journal).as_mut().map_or(Ok(()), |journal| journal.append(record))
    }

    /// Returns true if a merge must not be repeated.
    ///
    /// A frozen top is merged once. An active top may have changed since, unless the VM was
    /// switched to the base: then the base is newer. If a hypervisor was asked for the merge, only
    /// a hypervisor or the caller can say which file the VM wrote last.
    fn is_merged(&self, stage: usize, volume: &str, number: usize, step: &MergeStep) -> Result<bool> {
        let progressed = lock(&self.journal).as_ref().map(|journal| journal.progressed(stage, volume, number));
        let progressed = progressed.unwrap_or(Progressed::No);
        match progressed {
            Progressed::No | Progressed::Changing => Ok(false),
            Progressed::Done { switched: true } => Ok(true),
            // The VM was started after the merge and before the relinks: its hypervisor relinks
            // with a merge of its own, in which nothing is left to copy.
            Progressed::Done { .. } => {
                Ok(!step.active && (step.direction == Direction::Pull || !self.tools.is_open_in_vm(&step.top.path)))
            }
            Progressed::Started | Progressed::Switching => {
                if self.tools.domain.is_none() {
                    let what = format!(
                        "volume {volume}: a hypervisor was merging {} into {}, and none was asked now",
                        step.top, step.base
                    );
                    return Err(Error::Uncertain { what, source: None });
                }
                if step.active && self.tools.writes(&step.base.path) {
                    return Ok(true);
                }
                // Until the switch begins, the top is the newer file.
                if progressed == Progressed::Started || !step.active || self.tools.writes(&step.top.path) {
                    return Ok(false);
                }
                let what = format!("volume {volume}: switching the VM from {} to {}", step.top, step.base);
                Err(Error::Uncertain { what, source: None })
            }
        }
    }

    /// Returns the result of a merge that was completed earlier.
    fn merged_before(&self, step: &MergeStep) -> Result<Option<Merged>> {
        if step.direction == Direction::Pull {
            return Ok(None);
        }
        let virtual_size = self.tools.files().look(&step.base)?.virtual_size;
        Ok(Some(Merged { virtual_size, ..Merged::default() }))
    }

    /// Undoes an operation that the catalogue does not record: removes the overlays that this run
    /// created, then the journal.
    fn undo(&self) -> Result<()> {
        let created = std::mem::take(&mut *lock(&self.created));
        self.remove_created(&created)?;
        self.end_journal()?;
        event!("undone", purpose = %self.plan.purpose);
        Ok(())
    }

    /// Records the size that a volume has after an interrupted resize.
    fn settle_resize(&self) -> Result<()> {
        let stage = &self.plan.stages[0];
        let files = self.tools.files();
        for work in &stage.work {
            for step in &work.steps {
                let Step::Resize { file, .. } = step else { continue };
                if !self.tools.is_open_in_vm(&file.path) {
                    let layer = files.layer(file, true)?;
                    if layer.node.as_qcow2().is_some() {
                        free_leaks(&**layer.node.storage())?;
                    }
                }
                let mut edits = work.edits.clone();
                set_size(&mut edits, files.look(file)?.virtual_size);
                self.record(&edits)?;
            }
        }
        self.end_stage(0, stage)?;
        self.end_journal()
    }

    fn end_journal(&self) -> Result<()> {
        let journal = lock(&self.journal).take();
        journal.map_or(Ok(()), Journal::clear)
    }

    fn clear(self) -> Result<Report> {
        self.end_journal()?;
        Ok(self.finish())
    }

    fn finish(self) -> Report {
        let model = self.model.into_inner().unwrap_or_else(PoisonError::into_inner);
        let mut report = self.report.into_inner().unwrap_or_else(PoisonError::into_inner);
        report.resized.extend(self.plan.size_changes.iter().cloned());
        if let Purpose::Resize { volume, .. } = &self.plan.purpose
            && let Some(volume) = model.volume(volume)
        {
            report.resized.retain(|change| change.new == volume.active.virtual_size);
        }
        let files = self.tools.files();
        let active = model.volumes.iter();
        report.paths = active.map(|volume| (volume.name.clone(), files.path(&volume.active.file.path))).collect();
        report.state = self.plan.state_in(&model);
        event!("done", purpose = %self.plan.purpose, removed = report.removed.len());
        report
    }

    /// Reports the files that leave the set and are not removed.
    fn release(&self, leaving: &Leaving) {
        let files = self.tools.files();
        for release in &leaving.release {
            self.report_release(files.path(&release.path), release.reason.clone());
        }
    }

    fn report_release(&self, path: std::path::PathBuf, reason: String) {
        event!("released", path = %path.display());
        let mut report = lock(&self.report);
        if !report.released.iter().any(|known| known.path == path) {
            report.released.push(Released { path, reason });
        }
    }
}

/// Records the overlays of one stage.
struct StageLog<'a> {
    run: &'a Run<'a>,
    stage: usize,
}

impl CreationLog for StageLog<'_> {
    fn created(&self, created: Created) {
        lock(&self.run.created).push(created);
    }

    fn completed(&self) -> Result<()> {
        self.run.note(Record::Created { stage: self.stage })
    }
}

/// Puts the size that a survivor has into the records of it.
fn set_size(edits: &mut [Edit], size: u64) {
    for edit in edits {
        if let Edit::SetActive { record, .. } | Edit::SetFile { record, .. } = edit {
            record.virtual_size = size;
        }
    }
}
