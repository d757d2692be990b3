//! What merges would cost, which way is cheaper, and whether anything stands in their way: asked before the first write.

use std::collections::BTreeMap;

use super::{Error, Refusal, Result};
use crate::chain::Format;
use crate::merge::{self, Direction};
use crate::vm::execute::executor::Domain;
use crate::vm::files::{Links, VolumeFiles};
use crate::vm::model::{FileRef, Model};
use crate::vm::options::MergeOptions;
use crate::vm::plan::planner::{PlanOptions, Request, plan};
use crate::vm::plan::{Cost, MergeStep, Plan, Step};

/// Plans with the directions that cost least, or that the caller wants, and the costs.
pub(super) fn plan_with_costs(
    place: &VolumeFiles,
    model: &Model,
    request: &Request,
    domain: &Domain,
    wanted: &MergeOptions,
) -> Result<Plan> {
    let mut options = PlanOptions::default().with_running(domain.running).with_keep_top_names(wanted.keep_top_names);
    let first = plan(model, request, &options)?;
    let mut costs = BTreeMap::new();
    for (volume, step) in first.merges() {
        let cost = weigh(place, model, domain, step, wanted.direction)?;
        options = options.with_direction(volume, cost.direction);
        costs.insert(volume.to_owned(), cost);
    }
    let mut plan = plan(model, request, &options)?;
    // A protected base is pulled whatever is wanted.
    for (volume, direction) in
        plan.merges().map(|(volume, step)| (volume.to_owned(), step.direction)).collect::<Vec<_>>()
    {
        if costs.get(&volume).is_some_and(|cost| cost.direction != direction)
            && let Some(step) = first.merges().find(|(known, _)| *known == volume).map(|(_, step)| step)
        {
            costs.insert(volume, weigh(place, model, domain, step, direction)?);
        }
    }
    plan.costs = costs;
    Ok(plan)
}

/// Whether a running VM has the files of a merge open: then its hypervisor does it.
fn is_live(place: &VolumeFiles, domain: &Domain, step: &MergeStep) -> bool {
    [&step.top, &step.base].iter().any(|file| domain.disk_with(place, &file.path).is_some())
}

fn weigh(place: &VolumeFiles, model: &Model, domain: &Domain, step: &MergeStep, wanted: Direction) -> Result<Cost> {
    if is_live(place, domain, step) {
        // The tables of a file that is being written are not to be relied on: at most all of it moves.
        let data = place.look(&step.top)?.bytes_on_disk.unwrap_or_default();
        return Ok(Cost { direction: Direction::Commit, data, space_needed: data, space_free: None });
    }
    let links = if model.merging().is_some() { Links::MaySkip } else { Links::Exact };
    let files: Vec<FileRef> = [&step.top, &step.base].into_iter().chain(&step.below).cloned().collect();
    let chain = place.chain(&files, 0, links)?;
    let weights = merge::plan(&chain, 1)?;
    let direction = match wanted {
        // What is raw stays raw.
        Direction::Auto if step.base.format == Format::Raw => Direction::Commit,
        Direction::Auto => weights.cheapest,
        told => told,
    };
    let way = weights.way(direction);
    Ok(Cost { direction, data: way.data, space_needed: way.space_needed, space_free: way.space_free })
}

/// Refuses a plan whose merges do not fit where they are done, or whose files somebody else has open.
pub(super) fn check(place: &VolumeFiles, domain: &Domain, plan: &Plan) -> Result<()> {
    // Volumes on one file system share its room.
    let mut needs: BTreeMap<Option<u64>, (u64, u64, String)> = BTreeMap::new();
    for (volume, step) in plan.merges() {
        let written = if step.direction == Direction::Pull { &step.top } else { &step.base };
        if is_live(place, domain, step) {
            place.check_writable(written)?;
            // A hypervisor leaves the lower file as large as it is, and the VM would see what lies behind its disk's end.
            if place.look(&step.base)?.virtual_size > place.look(&step.top)?.virtual_size {
                return Err(Refusal::Running { operation: "merge into a larger file" }.into());
            }
            continue;
        }
        let held = place.hold([&step.top, written].into_iter().take(1 + usize::from(written != &step.top)))?;
        place.check_writable(written)?;
        let Some(cost) = plan.costs.get(volume) else { continue };
        let Some(free) = cost.space_free else { continue };
        let device = held.last().and_then(|storage| storage.file_id()).map(|id| id.device);
        let file = place.path(&written.path).display().to_string();
        let entry = needs.entry(device).or_insert((0, u64::MAX, file));
        entry.0 += cost.space_needed;
        entry.1 = entry.1.min(free);
    }
    if let Some((need, have, file)) = needs.into_values().find(|(need, have, _)| need > have) {
        return Err(Error::NoSpace { file, need, have });
    }
    let new: Vec<&FileRef> = plan.created().map(|overlay| &overlay.file).collect();
    for stage in &plan.stages {
        for work in &stage.work {
            check_relinks(place, domain, &work.steps, &new)?;
        }
    }
    Ok(())
}

/// Refuses where a file that is to be relinked is in use, or says already something else than it should.
fn check_relinks(place: &VolumeFiles, domain: &Domain, steps: &[Step], new: &[&FileRef]) -> Result<()> {
    for step in steps {
        if let Step::Relink { file, from, to } = step
            && !new.contains(&file)
        {
            if domain.disk_with(place, &file.path).is_none() {
                drop(place.hold_one(&file.path)?);
            }
            let layer = place.look_layer(file)?;
            place.check_link(&layer, file, &[from.clone(), to.clone()], Links::MaySkip)?;
        }
    }
    Ok(())
}
