//! The preflight: everything that is checked, locked and estimated before the first durable change.
//!
//! An operation computes one [`Preflight`] and then carries out its plan. A dry run computes the
//! same value and drops it, so that it reports exactly the obstacles that the operation would meet.
//!
//! Each file that the plan writes, relinks or removes is opened once, locked, and stays open until
//! the operation ends. The estimates and the merge itself use that handle. After the preflight only
//! I/O errors, lack of space and cancellation can stop an operation.

mod estimates;
mod inspect;
mod losses;
mod overlays;

use std::collections::{BTreeMap, BTreeSet};

use super::Result;
use super::execute::executor::{Domain, OpenFiles};
use super::files::{Links, VolumeFiles};
use super::model::identity::random_token;
use super::model::{FileRef, Model};
use super::options::MergeOptions;
use super::plan::planner::plan;
use super::plan::request::{FileFacts, PlanOptions, Request};
use super::plan::{Plan, Purpose};
use super::set::{SnapshotSet, find_ready};
use crate::merge::{Direction, Way};

/// An operation that was checked: no obstacle exists, and its files are locked.
#[derive(Debug)]
pub(super) struct Preflight {
    /// The model, with the present sizes of the active files.
    pub(super) model: Model,
    /// The hypervisor's description, if there is a hypervisor.
    pub(super) domain: Option<Domain>,
    /// The plan.
    pub(super) plan: Plan,
    /// The files, with the locked ones.
    pub(super) files: VolumeFiles,
    /// The number of volumes that can be worked on at once.
    pub(super) jobs: usize,
    /// The estimates of the merges, by the recorded path of the survivor.
    pub(super) estimates: BTreeMap<String, Way>,
}

/// The part of a preflight that is computed step by step.
struct Checks<'a> {
    set: &'a SnapshotSet,
    request: &'a Request,
    options: &'a MergeOptions,
    files: VolumeFiles,
    model: Model,
    /// If set, the VM is running by its hypervisor.
    running: bool,
    /// The files that the running VM has open: disk, and index in its chain.
    open: OpenFiles,
    /// The active files that are missing or damaged, by recorded path. Only a revert may discard
    /// them.
    lost: Vec<String>,
    facts: BTreeMap<String, FileFacts>,
}

impl Preflight {
    /// Checks an operation and locks its files.
    ///
    /// # Errors
    /// Every obstacle as a [`Refusal`](super::Refusal) or
    /// [`Error::NoSpace`](super::Error::NoSpace); any error of opening the files.
    pub(super) fn new(set: &SnapshotSet, request: &Request, options: &MergeOptions) -> Result<Self> {
        set.refuse_unfinished()?;
        let model = set.store.load()?;
        let known = set.executor.domain(&model.vm)?;
        let files = set.files.for_operation();
        let running = known.as_ref().is_some_and(|domain| domain.running);
        let open = OpenFiles::of(known.as_ref(), &files);
        let (lost, facts) = (Vec::new(), BTreeMap::new());
        let mut checks = Checks { set, request, options, files, model, running, open, lost, facts };
        checks.refuse_wrong_disks()?;
        checks.inspect_active_files()?;
        let (plan, estimates) = checks.plan()?;
        checks.refuse_writers(&examined(&plan))?;
        checks.check_overlays(&plan)?;
        let jobs = checks.jobs(&plan)?;
        let Checks { model, files, .. } = checks;
        Ok(Self { model, domain: known, plan, files, jobs, estimates })
    }
}

/// Returns the files beneath the merges of a plan. The estimates opened them with a reader's lock,
/// which proves that no other program writes them.
fn examined(plan: &Plan) -> BTreeSet<String> {
    plan.merges().flat_map(|(_, step)| &step.below).map(|file| file.path.clone()).collect()
}

impl Checks<'_> {
    /// Returns true if the running VM has a file open: then it is neither locked nor merged by the
    /// library.
    fn is_open_in_vm(&self, recorded: &str) -> bool {
        self.disk_with(recorded).is_some()
    }

    /// Returns the disk of the running VM that has a file open, and the file's index in its chain.
    fn disk_with(&self, recorded: &str) -> Option<(&str, usize)> {
        self.open.disk_with(&self.files, recorded)
    }

    /// Plans once to learn which files are concerned, and again with the facts about these and the
    /// directions that the estimates decide on.
    fn plan(&mut self) -> Result<(Plan, BTreeMap<String, Way>)> {
        let mut options = PlanOptions::default().with_running(self.running).with_token(random_token());
        self.choose_overlays(&mut options)?;
        let first = self.planned(&options)?;
        self.refuse_jobs(&first)?;
        self.check_heads(&first)?;
        self.inspect_files(&first)?;
        self.find_dependents(&first)?;
        options.facts = self.facts.clone();
        let estimates = self.estimate(&first)?;
        for (volume, preference) in self.preferences(&estimates) {
            options = options.with_direction(volume, preference);
        }
        let mut plan = self.planned(&options)?;
        plan.costs = estimates.iter().filter_map(|(volume, estimate)| estimate.cost(&plan, volume)).collect();
        for (volume, cost) in &mut plan.costs {
            // The estimates do not know which files may be written.
            let other = match cost.direction {
                Direction::Commit => Direction::Pull,
                Direction::Pull => Direction::Commit,
            };
            if self.planned(&options.clone().with_direction(volume, other)).is_err() {
                cost.other_direction_data = None;
            }
        }
        self.refuse_open_in_vm(&plan)?;
        self.check_removals(&plan)?;
        self.check_losses(&mut plan, &estimates)?;
        self.check_merges(&plan, &estimates)?;
        let ways = plan.merges().filter_map(|(volume, step)| {
            Some((step.survivor().path.clone(), estimates.get(volume)?.way(step.direction)?.clone()))
        });
        let ways = ways.collect();
        Ok((plan, ways))
    }

    fn planned(&self, options: &PlanOptions) -> Result<Plan> {
        let planned = plan(&self.model, self.request, options);
        planned.map_err(|refusal| refusal.with_path(|path| self.files.shown(path)).into())
    }

    /// Compares the bases with their fingerprints, and the header of each file to revert to with
    /// the records. The headers of the active files were compared when these were inspected, the
    /// others are when the files are opened, so that the cost of a snapshot does not grow with the
    /// depth.
    fn check_heads(&self, plan: &Plan) -> Result<()> {
        for volume in &self.model.volumes {
            if self.lost.contains(&volume.active.file.path) {
                continue;
            }
            volume.bases.iter().try_for_each(|base| self.files.check_base(base))?;
        }
        if let Purpose::Revert { name } = &plan.purpose {
            let snapshot = find_ready(&self.model, name)?;
            for volume in self.model.all_volumes().filter(|volume| snapshot.files.contains_key(&volume.name)) {
                self.check_head(&self.model.files_from(Some(snapshot.id), volume))?;
            }
        }
        Ok(())
    }

    fn check_head(&self, files: &[FileRef]) -> Result<()> {
        let Some((first, below)) = files.split_first() else { return Ok(()) };
        self.files.check_head(first, below, Links::Exact)
    }
}
