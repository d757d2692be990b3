//! Estimates of merges, and the obstacles that follow from them.

use std::collections::BTreeMap;

use super::Checks;
use crate::chain::{Chain, Format, Layer};
use crate::format::{IncompatibleFeatures, Version};
use crate::merge::{self, Direction, MergePlan, Way};
use crate::storage::{self, FileId};
use crate::vm::files::Links;
use crate::vm::model::FileRef;
use crate::vm::plan::request::MergePreference;
use crate::vm::plan::{Cost, MergeStep, Plan, Step};
use crate::vm::{Error, Refusal, Result};

/// The descriptors that an operation needs besides those of images: catalogue, journal, locks,
/// directories.
const RESERVED_DESCRIPTORS: u64 = 16;

/// The estimate of one volume's merge.
pub(super) enum Estimate {
    /// The library merges: both directions, and top and base, open for reading.
    Offline(Box<MergePlan>, Vec<Layer>),
    /// The hypervisor merges: at most these bytes of data.
    Live(u64),
}

/// The estimates by volume.
pub(super) type Estimates = BTreeMap<String, Estimate>;

/// A layer that the preflight examines: of an estimate, or opened for this.
pub(super) enum Examined<'a> {
    Of(&'a Layer),
    Opened(Box<Layer>),
}

impl Examined<'_> {
    pub(super) fn layer(&self) -> &Layer {
        match self {
            Self::Of(layer) => layer,
            Self::Opened(layer) => layer,
        }
    }
}

impl Estimate {
    /// Returns the estimate of a direction, if the library merges.
    pub(super) fn way(&self, direction: Direction) -> Option<&Way> {
        match self {
            Self::Offline(estimate, _) => Some(estimate.way(direction)),
            Self::Live(_) => None,
        }
    }

    /// Returns the volume and the cost of the direction that the plan has for it.
    pub(super) fn cost(&self, plan: &Plan, volume: &str) -> Option<(String, Cost)> {
        let direction = plan.merges().find(|(name, _)| *name == volume).map(|(_, step)| step.direction)?;
        let cost = match self {
            Self::Live(data) => {
                Cost { direction, data: *data, space_needed: *data, space_free: None, other_direction_data: None }
            }
            Self::Offline(estimate, _) => {
                let (way, other) = match direction {
                    Direction::Commit => (&estimate.commit, &estimate.pull),
                    Direction::Pull => (&estimate.pull, &estimate.commit),
                };
                Cost {
                    direction,
                    data: way.data,
                    space_needed: way.space_needed,
                    space_free: way.space_free,
                    other_direction_data: Some(other.data),
                }
            }
        };
        Some((volume.to_owned(), cost))
    }
}

impl Checks<'_> {
    /// Estimates the merges of a plan. Each table is walked once, for both directions.
    pub(super) fn estimate(&self, plan: &Plan) -> Result<Estimates> {
        let mut estimates = BTreeMap::new();
        for (volume, step) in plan.merges() {
            let estimate = if self.is_live(step) {
                // The tables of a file that is being written cannot be relied on: all of it may
                // move.
                Estimate::Live(self.files.look(&step.top)?.bytes_on_disk.unwrap_or_default())
            } else {
                let chain = self.chain_of(step)?;
                let plan = Box::new(merge::plan(&chain, 1)?);
                let mut layers = chain.into_layers();
                layers.truncate(2);
                Estimate::Offline(plan, layers)
            };
            estimates.insert(volume.to_owned(), estimate);
        }
        Ok(estimates)
    }

    /// Returns true if the running VM has a file of a merge open: its hypervisor merges then.
    fn is_live(&self, step: &MergeStep) -> bool {
        [&step.top, &step.base].iter().any(|file| self.is_open_in_vm(&file.path))
    }

    fn chain_of(&self, step: &MergeStep) -> Result<Chain> {
        let files: Vec<FileRef> = [&step.top, &step.base].into_iter().chain(&step.below).cloned().collect();
        self.files.chain(&files, 0, Links::Exact).map_err(|error| self.explain_writer(error))
    }

    /// Returns a file as a layer. Those of estimates are not read again.
    pub(super) fn examined<'e>(&self, file: &FileRef, estimates: &'e Estimates) -> Result<Examined<'e>> {
        let path = self.files.path(&file.path);
        let mut layers = estimates.values().flat_map(|estimate| match estimate {
            Estimate::Offline(_, layers) => layers.as_slice(),
            Estimate::Live(_) => &[],
        });
        match layers.find(|layer| layer.path == path) {
            Some(layer) => Ok(Examined::Of(layer)),
            None => Ok(Examined::Opened(Box::new(self.files.look_layer(file)?))),
        }
    }

    /// Resolves the preferred direction for each volume.
    pub(super) fn preferences(&self, estimates: &Estimates) -> Vec<(String, MergePreference)> {
        let resolve = |estimate: &Estimate| match (self.options.direction, estimate) {
            (MergePreference::Auto, Estimate::Offline(estimate, _)) if estimate.cheapest == Direction::Pull => {
                MergePreference::PullElseCommit
            }
            (MergePreference::Auto, _) => MergePreference::CommitElsePull,
            (preference, _) => preference,
        };
        estimates.iter().map(|(volume, estimate)| (volume.clone(), resolve(estimate))).collect()
    }

    /// Refuses merges that cannot succeed: images that may not be written, devices that are too
    /// small, and lack of space. Volumes on one file system share its space; a container of fixed
    /// size has its own.
    pub(super) fn check_merges(&self, plan: &Plan, estimates: &Estimates) -> Result<()> {
        let mut needs: BTreeMap<Option<FileId>, (u64, u64, String)> = BTreeMap::new();
        for (volume, step) in plan.merges() {
            if self.is_live(step) {
                self.check_live(step)?;
                continue;
            }
            self.check_survivor(step, estimates)?;
            let Some(way) = estimates.get(volume).and_then(|estimate| estimate.way(step.direction)) else { continue };
            let Some(free) = way.space_free else { continue };
            let path = self.files.path(&step.survivor().path);
            let medium = self.files.held().storage(&path).and_then(|storage| {
                let id = storage.file_id()?;
                Some(if storage.is_fixed_size() { id } else { FileId { inode: 0, ..id } })
            });
            let entry = needs.entry(medium).or_insert((0, u64::MAX, path.display().to_string()));
            entry.0 += way.space_needed;
            entry.1 = entry.1.min(free);
        }
        if let Some((need, have, file)) = needs.into_values().find(|(need, have, _)| need > have) {
            return Err(Error::NoSpace { file, need, have });
        }
        self.check_relinks(plan, estimates)
    }

    fn check_live(&self, step: &MergeStep) -> Result<()> {
        // A hypervisor leaves the base as large as it is, and the VM would see what is past the end
        // of its disk.
        if self.files.look(&step.base)?.virtual_size > self.files.look(&step.top)?.virtual_size {
            return Err(Refusal::Running { operation: "merge into a larger file" }.into());
        }
        Ok(())
    }

    fn check_survivor(&self, step: &MergeStep, estimates: &Estimates) -> Result<()> {
        let other = if step.direction == Direction::Pull { &step.base } else { &step.top };
        self.check_image(step.survivor(), true, estimates)?;
        self.check_image(other, false, estimates)?;
        if step.direction == Direction::Pull {
            return Ok(());
        }
        let (base, top) = (self.examined(&step.base, estimates)?, self.examined(&step.top, estimates)?);
        let (size, have) = (top.layer().node.virtual_size(), base.layer().node.virtual_size());
        let base = base.layer();
        if step.base.format == Format::Raw && base.node.storage().is_fixed_size() && have < size {
            return Err(Refusal::DeviceTooSmall { path: self.files.shown(&step.base.path), need: size, have }.into());
        }
        let fixed = base.node.as_qcow2().is_some_and(|image| {
            let header = image.header().header;
            header.version == Version::V2 && header.nb_snapshots > 0
        });
        if fixed && have != size {
            return Err(Refusal::Obstacle {
                path: self.files.shown(&step.base.path),
                problem: format!(
                    "it has {have} bytes and would get {size}, and a version 2 image with internal snapshots cannot be \
                     resized"
                ),
                remedy: "delete its internal snapshots".to_owned(),
            }
            .into());
        }
        Ok(())
    }

    /// Refuses to read or write an image that is marked corrupt, and to write one that was not
    /// closed.
    fn check_image(&self, file: &FileRef, write: bool, estimates: &Estimates) -> Result<()> {
        let layer = self.examined(file, estimates)?;
        let layer = layer.layer();
        let Some(image) = layer.node.as_qcow2() else { return Ok(()) };
        let features = image.header().header.incompatible_features;
        let problem = if features.has(IncompatibleFeatures::CORRUPT) {
            "it is marked corrupt"
        } else if write && features.has(IncompatibleFeatures::DIRTY) {
            "it was not closed, and its refcounts are not up to date"
        } else {
            return Ok(());
        };
        let path = self.files.shown(&file.path);
        let remedy = format!("repair it: qcow2-chain check -r all {path}");
        Err(Refusal::Obstacle { path, problem: problem.to_owned(), remedy }.into())
    }

    /// Refuses files to relink whose header names neither the old nor the new backing file, or may
    /// not be written.
    fn check_relinks(&self, plan: &Plan, estimates: &Estimates) -> Result<()> {
        let new: Vec<&str> = plan.created().map(|overlay| overlay.file.path.as_str()).collect();
        for step in plan.works().flat_map(|work| &work.steps) {
            let Step::Relink { file, from, to } = step else { continue };
            if new.contains(&file.path.as_str()) {
                continue;
            }
            let layer = self.files.look_layer(file)?;
            self.files.check_link(&layer, file, &[from.clone(), to.clone()], Links::MaySkip)?;
            if self.is_open_in_vm(&file.path) {
                continue;
            }
            let facts = self.facts.get(&file.path).cloned().unwrap_or_default();
            let path = self.files.shown(&file.path);
            match (facts.unwritable, facts.in_use) {
                (Some(reason), _) => return Err(Refusal::Unwritable { path, reason }.into()),
                (None, Some(held)) => return Err(Refusal::InUse { path, held }.into()),
                (None, None) => self.check_image(file, true, estimates)?,
            }
        }
        Ok(())
    }

    /// Refuses an operation for which the process may not open enough files.
    pub(super) fn check_descriptors(plan: &Plan, files: usize) -> Result<()> {
        let Some(have) = storage::descriptors_left() else { return Ok(()) };
        let need = files as u64 + chain_descriptors(plan) + RESERVED_DESCRIPTORS;
        if need > have { Err(Refusal::Descriptors { need, have }.into()) } else { Ok(()) }
    }

    /// Returns the number of volumes that can be worked on at once with the descriptors that are
    /// left.
    pub(super) fn jobs(&self, plan: &Plan) -> Result<usize> {
        let wanted = self.set.jobs;
        let Some(left) = storage::descriptors_left() else { return Ok(wanted) };
        let each = chain_descriptors(plan);
        let possible = left.saturating_sub(RESERVED_DESCRIPTORS) / each;
        if possible == 0 {
            return Err(Refusal::Descriptors { need: each + RESERVED_DESCRIPTORS, have: left }.into());
        }
        Ok(wanted.min(usize::try_from(possible).unwrap_or(usize::MAX)))
    }
}

/// Returns the descriptors that the work on one volume needs besides the locked files.
fn chain_descriptors(plan: &Plan) -> u64 {
    let deepest = plan.merges().map(|(_, step)| step.below.len() as u64).max().unwrap_or_default();
    deepest + 4
}
