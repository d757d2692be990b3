//! A plan is carried out: journal, catalogue, files, catalogue, names, journal. In this order, everywhere.

pub(super) mod executor;
pub(super) mod journal;
pub(super) mod lock;
pub(super) mod offline;
pub(super) mod progress;
pub(super) mod recover;
pub(super) mod report;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::merge::{self, Direction};
use crate::storage;
use crate::vm::execute::executor::{Domain, ExecutionContext, Executor, Merged, Watch};
use crate::vm::execute::journal::{Journal, Progressed, Record};
use crate::vm::execute::offline::in_parallel;
use crate::vm::execute::progress::{OfVolume, Progress, Relay};
use crate::vm::execute::report::{MergedVolume, PathChange, Report};
use crate::vm::files::VolumeFiles;
use crate::vm::model::catalogue::{directory_of, unlink_if_there, with_suffix};
use crate::vm::model::edit::Edit;
use crate::vm::model::store::Store;
use crate::vm::model::{LastOperation, Model};
use crate::vm::plan::{MergeStep, Plan, Purpose, Stage, Step, VolumeWork};
use crate::vm::trace::event;
use crate::vm::{Error, Result};

/// What a plan is carried out with.
#[derive(Clone, Copy)]
pub(in crate::vm) struct Tools<'a> {
    pub(in crate::vm) store: &'a dyn Store,
    pub(in crate::vm) executor: &'a dyn Executor,
    /// What the VM was doing when the operation began.
    pub(in crate::vm) domain: &'a Domain,
    pub(in crate::vm) journal: &'a Path,
    pub(in crate::vm) manner: ExecutionContext<'a>,
    pub(in crate::vm) progress: &'a dyn Progress,
}

impl Tools<'_> {
    fn place(&self) -> &VolumeFiles {
        self.manner.place
    }
}

/// A plan that is being carried out.
pub(in crate::vm) struct Run<'a> {
    tools: Tools<'a>,
    relay: Relay<'a>,
    plan: &'a Plan,
    model: Mutex<Model>,
    journal: Mutex<Option<Journal>>,
    report: Mutex<Report>,
    /// Whether the catalogue may say something else than before, or files that are not new may be changed: then there is no
    /// way back, only recovery.
    committed: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a> Run<'a> {
    pub(in crate::vm) fn new(tools: Tools<'a>, plan: &'a Plan, model: Model) -> Self {
        Self {
            tools,
            relay: Relay::new(tools.progress),
            plan,
            model: Mutex::new(model),
            journal: Mutex::default(),
            report: Mutex::new(Report::new(plan.purpose.clone())),
            committed: AtomicBool::new(false),
        }
    }

    /// Carries the plan out from its beginning. Where that fails before there is no way back, everything is as before.
    pub(in crate::vm) fn start(self) -> Result<Report> {
        event!("begin", purpose = %self.plan.purpose, id = self.plan.id);
        if self.plan.is_bookkeeping() {
            let stage = &self.plan.stages[0];
            self.end_stage(0, stage)?;
            return Ok(self.finish());
        }
        let place = self.tools.place();
        match Journal::begin(place.names(), self.tools.journal, self.plan) {
            Ok(journal) => *lock(&self.journal) = Some(journal),
            Err(error) => {
                // At most a torn journal is left, which tells of nothing.
                let _ = crate::vm::execute::journal::clear(&**place.names(), self.tools.journal);
                return Err(error);
            }
        }
        match self.stages(0) {
            Ok(()) => self.clear(),
            Err(error) => {
                if matches!(error, Error::Uncertain { .. }) {
                    // A VM may be writing what would be taken back.
                } else if !self.committed.load(Ordering::SeqCst) {
                    // Where this fails as well, recovery does it.
                    let _ = self.undo();
                } else if matches!(self.plan.purpose, Purpose::Resize { .. }) {
                    let _ = self.settle_resize();
                }
                event!("failed", purpose = %self.plan.purpose, error = %error);
                Err(error)
            }
        }
    }

    /// Carries on with a plan that was interrupted, or takes it back where that is still possible. `journal` and the catalogue
    /// are durable. Returns nothing where it was taken back.
    pub(in crate::vm) fn resume(self, journal: Journal, switched: bool) -> Result<Option<Report>> {
        event!("resume", purpose = %self.plan.purpose, id = self.plan.id);
        *lock(&self.journal) = Some(journal);
        let last = lock(&self.model).last_operation;
        let done = match last.id.cmp(&self.plan.id) {
            std::cmp::Ordering::Less => 0,
            std::cmp::Ordering::Equal => last.stages.min(self.plan.stages.len()),
            std::cmp::Ordering::Greater => self.plan.stages.len(),
        };
        if done == 0 && matches!(self.plan.purpose, Purpose::Resize { .. }) {
            self.settle_resize()?;
            return Ok(Some(self.finish()));
        }
        if done == 0 && !switched && !self.plan.stages[0].create.is_empty() {
            self.undo()?;
            return Ok(None);
        }
        if done == 0 && switched {
            self.end_stage(0, &self.plan.stages[0])?;
        }
        let done = if switched { done.max(1) } else { done };
        if let Some(stage) = done.checked_sub(1).and_then(|last| self.plan.stages.get(last)) {
            self.unlink(&stage.unlink, false)?;
        }
        self.stages(done)?;
        self.clear().map(Some)
    }

    fn stages(&self, from: usize) -> Result<()> {
        for (number, stage) in self.plan.stages.iter().enumerate().skip(from) {
            self.stage(number, stage)?;
        }
        Ok(())
    }

    /// One stage. Between any two lines every path in the catalogue exists.
    fn stage(&self, number: usize, stage: &Stage) -> Result<()> {
        self.record(&stage.begin)?;
        if !stage.create.is_empty() {
            let quiesce = matches!(self.plan.purpose, Purpose::Create { quiesce: true, .. });
            self.tools.executor.create(&stage.create, quiesce, &self.tools.manner)?;
            let paths = stage.create.iter().map(|overlay| self.tools.place().path(&overlay.file.path));
            lock(&self.report).created.extend(paths);
        }
        self.work(number, stage)?;
        self.end_stage(number, stage)?;
        self.unlink(&stage.unlink, false)
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

    /// Notes which active files are others now.
    fn note_moves(&self, old: &Model, new: &Model) {
        let place = self.tools.place();
        let mut report = lock(&self.report);
        for volume in &new.volumes {
            let Some(before) = old.volume(&volume.name) else { continue };
            if before.active.file.path != volume.active.file.path {
                let (old, new) = (place.path(&before.active.file.path), place.path(&volume.active.file.path));
                report.moved.push(PathChange { volume: volume.name.clone(), old, new });
            }
        }
    }

    /// The work on all volumes, on several threads. One that fails does not keep the others from being done.
    fn work(&self, number: usize, stage: &Stage) -> Result<()> {
        let failed: Mutex<Vec<(String, Error)>> = Mutex::default();
        in_parallel(&stage.work, self.tools.manner.jobs, |work| {
            if let Err(error) = self.volume(number, work) {
                event!("volume failed", volume = %work.volume, error = %error);
                lock(&failed).push((work.volume.clone(), error));
            }
            Ok(())
        })?;
        let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
        let left: Vec<String> = failed.iter().map(|(volume, _)| volume.clone()).collect();
        let Some((volume, error)) = failed.into_iter().next() else { return Ok(()) };
        if error.is_cancelled() {
            return Err(Error::Cancelled);
        }
        let done = stage.work.iter().map(|work| work.volume.clone()).filter(|volume| !left.contains(volume));
        Err(Error::Incomplete { volume, done: done.collect(), left, source: Box::new(error) })
    }

    /// The work on one volume: data and mappings, relinks, catalogue, names.
    fn volume(&self, stage: usize, work: &VolumeWork) -> Result<()> {
        let mut held = None;
        if !work.is_recorded(&lock(&self.model)) {
            let mut edits = work.edits.clone();
            for (number, step) in work.steps.iter().enumerate() {
                if self.relay.is_cancelled() {
                    return Err(Error::Cancelled);
                }
                if let Some(merged) = self.step(stage, work, number, step)? {
                    set_size(&mut edits, merged.virtual_size);
                    held = merged.held;
                }
            }
            self.record(&edits)?;
        }
        self.unlink(&work.unlink, held.is_some())?;
        drop(held);
        Ok(())
    }

    fn step(&self, stage: usize, work: &VolumeWork, number: usize, step: &Step) -> Result<Option<Merged>> {
        let (executor, manner) = (self.tools.executor, &self.tools.manner);
        event!("step", volume = %work.volume, step = %step);
        let mut merged = None;
        match step {
            Step::Merge(merge) => {
                if self.is_merged(stage, &work.volume, number, merge)? {
                    return self.merged_before(merge);
                }
                let watch = Watching { run: self, stage, step: number, progress: self.relay.of(&work.volume) };
                let done = executor.merge(merge, manner, &watch)?;
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
            Step::TakeName { from, to } => self.take_name(from, to)?,
            Step::Relink { file, from, to } => executor.relink(file, from, to, manner)?,
            Step::Resize { file, below, size } => {
                self.committed.store(true, Ordering::SeqCst);
                executor.resize(file, below, *size, manner)?;
            }
        }
        let switched = merged.as_ref().is_some_and(|merged| merged.switched);
        self.note(Record::Done { stage, volume: work.volume.clone(), step: number, switched })?;
        Ok(merged)
    }

    /// Appends to the journal, if there is one.
    fn note(&self, record: Record) -> Result<()> {
        lock(&self.journal).as_mut().map_or(Ok(()), |journal| journal.append(record))
    }

    /// Whether a merge needs no doing again. What nobody writes needs no second copy. A top that a VM writes may have changed
    /// since, unless the VM was switched over: then it is the base that is newer.
    fn is_merged(&self, stage: usize, volume: &str, number: usize, step: &MergeStep) -> Result<bool> {
        let progressed = lock(&self.journal).as_ref().map(|journal| journal.progressed(stage, volume, number));
        match progressed.unwrap_or(Progressed::No) {
            Progressed::No => Ok(false),
            Progressed::Done { switched: true } => Ok(true),
            // Done offline, and the VM was started before what stands on the top was relinked: its hypervisor does that with a
            // merge, in which nothing is left to copy.
            Progressed::Done { .. } => Ok(!step.active
                && (step.direction == Direction::Pull
                    || self.tools.domain.disk_with(self.tools.place(), &step.top.path).is_none())),
            begun @ (Progressed::Started | Progressed::Switching) => {
                let (place, domain) = (self.tools.place(), self.tools.domain);
                if step.active && domain.disk_writing(place, &step.base.path).is_some() {
                    return Ok(true);
                }
                // Until it is about to be switched over, all is in the top.
                if begun == Progressed::Started || domain.disk_writing(place, &step.top.path).is_some() {
                    return Ok(false);
                }
                let what = format!("volume {volume}: switching the VM from {} to {}", step.top, step.base);
                Err(Error::Uncertain { what, source: None })
            }
        }
    }

    /// What is left of a merge that was done earlier.
    fn merged_before(&self, step: &MergeStep) -> Result<Option<Merged>> {
        if step.direction == Direction::Pull {
            return Ok(None);
        }
        let virtual_size = self.tools.place().look(&step.base)?.virtual_size;
        Ok(Some(Merged { virtual_size, ..Merged::default() }))
    }

    /// Gives a file the name of another beside it. Its own stays, so that the catalogue's path leads to it all the time; on a
    /// file system that cannot give a file two names it goes.
    fn take_name(&self, from: &str, to: &str) -> Result<()> {
        let place = self.tools.place();
        let names = &**place.names();
        if place.exists(from)? && !place.is_same(from, to) {
            let (old, new) = (place.path(from), place.path(to));
            let beside = with_suffix(&new, ".new");
            unlink_if_there(names, &beside)?;
            match names.link(&old, &beside) {
                Ok(()) => names.rename(&beside, &new)?,
                Err(storage::Error::Unsupported { .. }) => names.rename(&old, &new)?,
                Err(error) => return Err(error.into()),
            }
        }
        names.sync_dir(directory_of(&place.path(to)))?; // barrier: the new name before anything names it
        Ok(())
    }

    /// Takes away names that nothing leads to any more. Between an interrupted operation and its recovery a VM may have been
    /// started on what goes: that is refused, where the files are not `held` by us.
    fn unlink(&self, paths: &[String], held: bool) -> Result<()> {
        let place = self.tools.place();
        if self.tools.manner.recovering && !held {
            for path in paths {
                if place.exists(path)? {
                    drop(place.hold_one(path)?);
                }
            }
        }
        let mut directories = BTreeSet::<PathBuf>::new();
        for path in paths {
            let path = place.path(path);
            if unlink_if_there(&**place.names(), &path)? {
                event!("removed", path = %path.display());
                lock(&self.report).removed.push(path.clone());
            }
            directories.insert(directory_of(&path).to_owned());
        }
        for directory in directories {
            place.names().sync_dir(&directory)?; // barrier: names are gone before the journal that tells of them
        }
        Ok(())
    }

    /// Takes back what is not in the catalogue: the new overlays, and the journal.
    fn undo(&self) -> Result<()> {
        let overlays: Vec<String> = self.plan.created().map(|overlay| overlay.file.path.clone()).collect();
        self.unlink(&overlays, false)?;
        self.end_journal()?;
        event!("undone", purpose = %self.plan.purpose);
        Ok(())
    }

    /// A resize is done or not, by what the image says.
    fn settle_resize(&self) -> Result<()> {
        let stage = &self.plan.stages[0];
        let place = self.tools.place();
        for work in &stage.work {
            for step in &work.steps {
                let Step::Resize { file, .. } = step else { continue };
                // It did not get to its end, or nobody knows whether it did.
                if self.tools.domain.disk_with(place, &file.path).is_none() {
                    let layer = place.layer(file, true)?;
                    if layer.node.as_qcow2().is_some() {
                        crate::vm::files::give_back_leaks(&**layer.node.storage())?;
                    }
                }
                let mut edits = work.edits.clone();
                set_size(&mut edits, place.look(file)?.virtual_size);
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
        report.resized.clone_from(&self.plan.size_changes);
        if let Purpose::Resize { volume, .. } = &self.plan.purpose
            && let Some(volume) = model.volume(volume)
        {
            report.resized.retain(|change| change.new == volume.active.virtual_size);
        }
        report.state = self.plan.state_in(&model);
        event!("done", purpose = %self.plan.purpose, removed = report.removed.len());
        report
    }
}

/// Hears of one step, and notes in the journal what must not be forgotten.
struct Watching<'a> {
    run: &'a Run<'a>,
    stage: usize,
    step: usize,
    progress: OfVolume<'a>,
}

impl Watching<'_> {
    /// Where the step stands in the plan.
    fn place(&self) -> (usize, String, usize) {
        (self.stage, self.progress.volume().to_owned(), self.step)
    }
}

impl merge::Progress for Watching<'_> {
    fn step(&self, step: &merge::Step<'_>) {
        self.progress.step(step);
    }

    fn is_cancelled(&self) -> bool {
        self.progress.is_cancelled()
    }
}

impl Watch for Watching<'_> {
    fn before_start(&self) -> Result<()> {
        let (stage, volume, step) = self.place();
        self.run.note(Record::Started { stage, volume, step })
    }

    fn before_switch(&self) -> Result<()> {
        let (stage, volume, step) = self.place();
        self.run.note(Record::Switching { stage, volume, step })
    }
}

/// Puts the size that a file turned out to have into what is recorded of it.
fn set_size(edits: &mut [Edit], size: u64) {
    for edit in edits {
        if let Edit::SetActive { record, .. } | Edit::SetFile { record, .. } = edit {
            record.virtual_size = size;
        }
    }
}
