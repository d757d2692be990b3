//! The executor for a stopped VM, and for files that a running VM does not have open.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::executor::{Created, CreationLog, Domain, ExecutionContext, Executor, Merged, Watch, sealed};
use crate::chain::{Chain, Format, Node};
use crate::format::ClusterBits;
use crate::image::{CreateOptions, Image, ResizeOptions};
use crate::merge::{self, CommitOptions, Direction, PullOptions};
use crate::progress::Progress;
use crate::storage::{Access, LockMode, Storage};
use crate::vm::files::{Links, VolumeFiles, free_leaks};
use crate::vm::model::catalogue::directory_of;
use crate::vm::model::{FileRef, OverlayShape};
use crate::vm::plan::{MergeStep, NewOverlay};
use crate::vm::provider::OverlayRequest;
use crate::vm::{Error, Refusal, Result};

/// Carries out every step itself, under QEMU's image locks. Files that a running VM has open are
/// refused.
#[derive(Clone, Copy, Debug, Default)]
pub struct OfflineExecutor;

impl sealed::Sealed for OfflineExecutor {}

impl Executor for OfflineExecutor {
    fn domain(&self, _vm: &str) -> Result<Option<Domain>> {
        Ok(None)
    }

    fn job_on(&self, _disk: &str) -> Result<Option<String>> {
        Ok(None)
    }

    fn create(
        &self,
        overlays: &[NewOverlay],
        _quiesce: bool,
        context: &ExecutionContext<'_>,
        log: &dyn CreationLog,
    ) -> Result<()> {
        in_parallel(overlays, context.jobs, |overlay| create(overlay, context, log))?;
        let directories =
            overlays.iter().map(|overlay| directory_of(&context.files.path(&overlay.file.path)).to_owned());
        for directory in directories.collect::<BTreeSet<_>>() {
            // barrier: the names of the overlays before the catalogue names them
            context.files.file_system().sync_dir(&directory)?;
        }
        log.completed()
    }

    fn merge(&self, step: &MergeStep, context: &ExecutionContext<'_>, watch: &dyn Watch) -> Result<Merged> {
        match step.direction {
            Direction::Pull => pull(step, context, watch),
            Direction::Commit => commit(step, context, watch),
        }
    }

    fn relink(&self, file: &FileRef, from: &FileRef, to: &FileRef, context: &ExecutionContext<'_>) -> Result<()> {
        let layer = context.files.layer(file, true)?;
        let Node::Qcow2(image) = &layer.node else { return Ok(()) };
        let name = context.files.backing_name(&file.path, &to.path);
        let header = image.header();
        if header.backing_file.as_deref() == Some(&name) && header.backing_format() == Some(to.format.name().as_bytes())
        {
            return Ok(());
        }
        context.files.check_link(&layer, file, &[from.clone(), to.clone()], Links::MaySkip)?;
        Ok(image.set_backing_file(Some(&name), Some(to.format.name().as_bytes()))?)
    }

    fn resize(&self, file: &FileRef, below: &[FileRef], size: u64, context: &ExecutionContext<'_>) -> Result<()> {
        let files: Vec<FileRef> = std::iter::once(file).chain(below).cloned().collect();
        let chain = context.files.chain(&files, 1, Links::Exact)?;
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

/// Does something with each item on several threads. Returns the error of the first item that
/// failed; all items are tried.
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
                let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
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
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    failed.map_or(Ok(()), |(_, error)| Err(error))
}

fn create(overlay: &NewOverlay, context: &ExecutionContext<'_>, log: &dyn CreationLog) -> Result<()> {
    let files = context.files;
    let backing = files.backing_name(&overlay.file.path, &overlay.backing.path);
    let storage = container(overlay, context)?;
    log.created(Created { path: overlay.file.path.clone(), identity: storage.file_id(), provided: overlay.provided });
    Ok(Image::create(storage, &overlay.options(backing))?.close()?)
}

impl NewOverlay {
    /// Returns the options that create the image, with this name of its backing file.
    pub(in crate::vm) fn options(&self, backing: Vec<u8>) -> CreateOptions {
        CreateOptions::new(self.size)
            .with_cluster_bits(ClusterBits::new(self.shape.cluster_bits).unwrap_or_default())
            .with_extended_l2(self.shape.extended_l2)
            .with_backing(backing, self.backing.format.name())
    }
}

/// Creates the empty file or device of an overlay, with the attributes of the active file.
fn container(overlay: &NewOverlay, context: &ExecutionContext<'_>) -> Result<Arc<dyn Storage>> {
    let files = context.files;
    let path = files.path(&overlay.file.path);
    if overlay.provided {
        let provider = context.provider.ok_or_else(|| no_provider(files, &overlay.file.path))?;
        provider.create(&request(overlay, context.vm)?)?;
        return files.file_system().open(&path, &Access::write()).map_err(|error| {
            // It is not recorded yet, so that no undo would find it. If this fails too, recovery
            // releases it.
            let _ = provider.release(&path);
            error.into()
        });
    }
    let model = model_of(overlay, files)?;
    Ok(files.file_system().create_new_like(&path, &*model, context.attributes)?)
}

/// Opens the file whose attributes an overlay gets: the active file or, where that is lost, the
/// backing file.
pub(in crate::vm) fn model_of(overlay: &NewOverlay, files: &VolumeFiles) -> Result<Arc<dyn Storage>> {
    let access = Access::read().with_lock(LockMode::None);
    match files.storage(&overlay.like, &access) {
        Ok(storage) => Ok(storage),
        Err(_) => files.storage(&overlay.backing.path, &access),
    }
}

/// Returns the provider's request for an overlay.
pub(in crate::vm) fn request<'a>(overlay: &'a NewOverlay, vm: &'a str) -> Result<OverlayRequest<'a>> {
    overlay_request(vm, &overlay.volume, &overlay.request, overlay.size, overlay.shape)
}

/// Returns the request for an overlay of a volume, with the space that a full overlay takes.
pub(in crate::vm) fn overlay_request<'a>(
    vm: &'a str,
    volume: &'a str,
    name: &'a str,
    virtual_size: u64,
    shape: OverlayShape,
) -> Result<OverlayRequest<'a>> {
    let options = CreateOptions::new(virtual_size)
        .with_cluster_bits(ClusterBits::new(shape.cluster_bits).unwrap_or_default())
        .with_extended_l2(shape.extended_l2);
    let full_size = merge::measure(None, &options)?.fully_allocated;
    Ok(OverlayRequest { vm, volume, name, virtual_size, full_size })
}

/// Refuses a file of a provider in a set without one.
pub(in crate::vm) fn no_provider(files: &VolumeFiles, recorded: &str) -> Error {
    Refusal::Obstacle {
        path: files.shown(recorded),
        problem: "an overlay provider manages it, and none is given".to_owned(),
        remedy: "open the set with its provider".to_owned(),
    }
    .into()
}

/// Returns the files of a merge, the topmost first.
fn chain_of(step: &MergeStep) -> Vec<FileRef> {
    [&step.top, &step.base].into_iter().chain(&step.below).cloned().collect()
}

fn commit(step: &MergeStep, context: &ExecutionContext<'_>, watch: &dyn Watch) -> Result<Merged> {
    free_reserved(&step.base, context)?;
    let chain = context.files.chain(&chain_of(step), 2, Links::Exact)?;
    let options = CommitOptions::default()
        .with_shrink_base(true)
        .with_rate_limit(context.rate_limit)
        .with_allow_stale_snapshots(step.drop_internal)
        .with_estimate(context.estimates.get(&step.survivor().path).cloned());
    let report = merge::commit_watched(&chain, &options, watch, &|| watch.before_change())?;
    finish(&chain, 1, report, context)
}

fn pull(step: &MergeStep, context: &ExecutionContext<'_>, progress: &dyn Progress) -> Result<Merged> {
    let files = context.files;
    if files.has_pulled(step)? {
        let above: Vec<FileRef> = std::iter::once(&step.top).chain(&step.below).cloned().collect();
        let chain = files.chain(&above, 1, Links::Exact)?;
        return finish(&chain, 0, merge::Report::default(), context);
    }
    free_reserved(&step.top, context)?;
    let chain = files.chain(&chain_of(step), 1, Links::Exact)?;
    let mut options = PullOptions::default()
        .with_rate_limit(context.rate_limit)
        .with_allow_stale_snapshots(step.drop_internal)
        .with_estimate(context.estimates.get(&step.survivor().path).cloned());
    if let Some(onto) = step.below.first() {
        options = options.with_base(Some(2)).with_backing_file(files.backing_name(&step.top.path, &onto.path));
    }
    let report = merge::pull(&chain, &options, progress)?;
    finish(&chain, 0, report, context)
}

/// Frees the clusters that an interrupted merge reserved in its survivor. In a container of fixed
/// size, the space that is left without them may not suffice for the merge.
fn free_reserved(survivor: &FileRef, context: &ExecutionContext<'_>) -> Result<()> {
    if !context.recovering || survivor.format != Format::Qcow2 {
        return Ok(());
    }
    let storage = context.files.storage(&survivor.path, &Access::write())?;
    if storage.is_fixed_size() { free_leaks(&*storage) } else { Ok(()) }
}

/// Returns the result of a merge into the layer of this index.
fn finish(chain: &Chain, into: usize, report: merge::Report, context: &ExecutionContext<'_>) -> Result<Merged> {
    let layer = chain.layers().get(into).unwrap_or(chain.top());
    if context.recovering && layer.node.as_qcow2().is_some() {
        free_leaks(&**layer.node.storage())?;
    }
    Ok(Merged { virtual_size: layer.node.virtual_size(), report, switched: false })
}
