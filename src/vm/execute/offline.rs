//! The executor for a VM that is off, and for files that a running VM does not have open.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::chain::{Chain, Node};
use crate::format::ClusterBits;
use crate::image::{CreateOptions, Image, ResizeOptions};
use crate::merge::{self, CommitOptions, Direction, PullOptions};
use crate::vm::execute::executor::{Domain, ExecutionContext, Executor, Merged, Watch};
use crate::vm::files::{Links, give_back_leaks};
use crate::vm::model::FileRef;
use crate::vm::plan::{MergeStep, NewOverlay};
use crate::vm::{Error, Refusal, Result};

/// Does everything itself, under QEMU's image locks: what a running VM has open is refused.
#[derive(Clone, Copy, Debug, Default)]
pub struct OfflineExecutor;

impl Executor for OfflineExecutor {
    fn domain(&self, _vm: &str) -> Result<Domain> {
        Ok(Domain::default())
    }

    fn create(&self, overlays: &[NewOverlay], _quiesce: bool, manner: &ExecutionContext<'_>) -> Result<()> {
        in_parallel(overlays, manner.jobs, |overlay| create(overlay, manner))?;
        let directories = overlays.iter().map(|overlay| {
            let path = manner.place.path(&overlay.file.path);
            path.parent().unwrap_or(&path).to_owned()
        });
        for directory in directories.collect::<BTreeSet<_>>() {
            manner.place.names().sync_dir(&directory)?; // barrier: the overlays' names before the catalogue names them
        }
        Ok(())
    }

    fn merge(&self, step: &MergeStep, manner: &ExecutionContext<'_>, watch: &dyn Watch) -> Result<Merged> {
        match step.direction {
            Direction::Pull => pull(step, manner, watch),
            Direction::Commit | Direction::Auto => commit(step, manner, watch),
        }
    }

    fn relink(&self, file: &FileRef, from: &FileRef, to: &FileRef, manner: &ExecutionContext<'_>) -> Result<()> {
        let layer = manner.place.layer(file, true)?;
        let Node::Qcow2(image) = &layer.node else { return Ok(()) };
        let name = manner.place.backing_name(&file.path, &to.path);
        let header = image.header();
        // By the letters: a file that has both names is no reason to keep the old one.
        if header.backing_file.as_deref() == Some(&name) && header.backing_format() == Some(to.format.name().as_bytes())
        {
            return Ok(());
        }
        manner.place.check_link(&layer, file, &[from.clone(), to.clone()], Links::MaySkip)?;
        Ok(image.set_backing_file(Some(&name), Some(to.format.name().as_bytes()))?)
    }

    fn resize(&self, file: &FileRef, below: &[FileRef], size: u64, manner: &ExecutionContext<'_>) -> Result<()> {
        let files: Vec<FileRef> = std::iter::once(file).chain(below).cloned().collect();
        let chain = manner.place.chain(&files, 1, Links::Exact)?;
        match &chain.top().node {
            Node::Qcow2(image) => {
                let beneath = chain.below(0);
                let options = ResizeOptions::default().with_shrink(true);
                image.resize_over(size, &options, &beneath, beneath.virtual_size())?;
            }
            Node::Raw(raw) => {
                raw.resize(size)?;
                raw.flush()?;
            }
        }
        Ok(chain.close()?)
    }
}

/// Does something with each item on several threads. Returns the first error; all items are tried.
pub(in crate::vm) fn in_parallel<T: Sync>(
    items: &[T],
    jobs: usize,
    work: impl Fn(&T) -> Result<()> + Sync,
) -> Result<()> {
    let next = AtomicUsize::new(0);
    let failed: Mutex<Option<(usize, Error)>> = Mutex::default();
    let run = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(index) else { return };
            if let Err(error) = work(item) {
                let mut failed = failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                if failed.as_ref().is_none_or(|(earlier, _)| index < *earlier) {
                    *failed = Some((index, error));
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..jobs.min(items.len()) {
            scope.spawn(run);
        }
        run();
    });
    let failed = failed.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    failed.map_or(Ok(()), |(_, error)| Err(error))
}

fn create(overlay: &NewOverlay, manner: &ExecutionContext<'_>) -> Result<()> {
    let place = manner.place;
    let backing = place.backing_name(&overlay.file.path, &overlay.backing.path);
    let options = CreateOptions::new(overlay.size)
        .with_cluster_bits(ClusterBits::new(overlay.shape.cluster_bits).unwrap_or_default())
        .with_extended_l2(overlay.shape.extended_l2)
        .with_backing(backing, overlay.backing.format.name());
    let storage = place.names().create_new(&place.path(&overlay.file.path))?;
    Ok(Image::create(storage, &options)?.close()?)
}

/// The files of a merge, the topmost first.
fn files(step: &MergeStep) -> Vec<FileRef> {
    [&step.top, &step.base].into_iter().chain(&step.below).cloned().collect()
}

fn commit(step: &MergeStep, manner: &ExecutionContext<'_>, progress: &dyn merge::Progress) -> Result<Merged> {
    let chain = manner.place.chain(&files(step), 2, Links::Exact)?;
    let options = CommitOptions::default().with_shrink_base(true).with_rate_limit(manner.rate_limit);
    let report = merge::commit(&chain, &options, progress)?;
    finish(chain, 1, report, manner)
}

fn pull(step: &MergeStep, manner: &ExecutionContext<'_>, progress: &dyn merge::Progress) -> Result<Merged> {
    let place = manner.place;
    // It may have the base's name already, beside its own or instead of it.
    let renamed = !place.exists(&step.top.path)? || place.is_same(&step.top.path, &step.base.path);
    let top =
        if renamed { FileRef { path: step.base.path.clone(), format: step.top.format } } else { step.top.clone() };
    let mut without_base = vec![top.clone()];
    without_base.extend(step.below.iter().cloned());
    let is_done = {
        let layer = place.layer(&top, true)?;
        place.check_link(&layer, &top, &step.below, Links::Exact).is_ok()
    };
    if is_done {
        return finish(place.chain(&without_base, 1, Links::Exact)?, 0, merge::Report::default(), manner);
    }
    let chain = place.chain(&files(step), 1, Links::Exact)?;
    let mut options = PullOptions::default().with_rate_limit(manner.rate_limit);
    if let Some(onto) = step.below.first() {
        options = options.with_base(Some(2)).with_backing_file(place.backing_name(&top.path, &onto.path));
    }
    let report = merge::pull(&chain, &options, progress)?;
    finish(chain, 0, report, manner)
}

/// The result of a merge into the layer of this index.
fn finish(chain: Chain, into: usize, report: merge::Report, manner: &ExecutionContext<'_>) -> Result<Merged> {
    let layer = chain.layers().get(into).unwrap_or(chain.top());
    if layer.node.is_read_only() {
        let path = layer.path.display().to_string();
        return Err(Refusal::Protected { path }.into());
    }
    if manner.recovering && layer.node.as_qcow2().is_some() {
        give_back_leaks(&**layer.node.storage())?;
    }
    let virtual_size = layer.node.virtual_size();
    Ok(Merged { virtual_size, report, held: Some(chain), switched: false })
}
