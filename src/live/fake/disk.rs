//! A disk of the VM, with its files and its job.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;

use super::super::hypervisor::{Commit, DiskFile, Event, JobEvent, JobKind, Result};
use super::failed;
use crate::chain::{Chain, ChainOptions, Format, Layer, Node, Policy};
use crate::format::GuestOffset;
use crate::image::{ExtentKind, Image, OpenOptions, RawImage, ResizeOptions};
use crate::merge::{self, CommitOptions};
use crate::storage::{Access, LockMode, Storage};
use crate::vm::VolumeFiles;

/// The number of parts in which a job copies.
const PARTS: u64 = 3;

/// A disk of the VM.
#[derive(Debug)]
pub(super) struct FakeDisk {
    pub(super) name: String,
    /// The active file in the definition of the VM.
    pub(super) defined: PathBuf,
    /// The files, from the active file down; of a VM that is off, those of its last run.
    pub(super) files: Vec<DiskFile>,
    pub(super) job: Option<FakeJob>,
    /// A delayed switch: the number of polls that are left, and the index of the new active file.
    pub(super) switching: Option<(u32, usize)>,
    pub(super) events: VecDeque<Event>,
    /// The files, open for their locks.
    pub(super) held: Vec<Arc<dyn Storage>>,
}

/// A commit job.
#[derive(Debug)]
pub(super) struct FakeJob {
    pub(super) kind: JobKind,
    /// The indices of its files.
    pub(super) top: usize,
    pub(super) base: usize,
    /// The number of parts that are copied. One more poll makes the job ready or done.
    pub(super) parts: u64,
    pub(super) ready: bool,
    /// The reported number of bytes to copy.
    pub(super) total: u64,
    /// The requested limit, in bytes per second.
    pub(super) rate_limit: Option<u64>,
    pub(super) stalls: u32,
    pub(super) vanishes: bool,
    pub(super) never_ends: bool,
}

impl FakeJob {
    /// Removes the faults of the job.
    pub(super) fn clear_faults(&mut self) {
        (self.stalls, self.vanishes, self.never_ends) = (0, false, false);
    }

    /// Refaults the reported progress: 0 of 0 at first.
    pub(super) fn progress(&self) -> (u64, u64) {
        if self.parts == 0 { (0, 0) } else { (self.total * self.parts.min(PARTS) / PARTS, self.total) }
    }
}

impl FakeDisk {
    pub(super) fn new(name: String, defined: PathBuf) -> Self {
        let (files, events, held) = (Vec::new(), VecDeque::new(), Vec::new());
        Self { name, defined, files, job: None, switching: None, events, held }
    }

    /// Queues an event of the job.
    pub(super) fn notify(&mut self, event: JobEvent) {
        self.events.push_back(Event::Job { disk: self.name.clone(), event });
    }

    /// Opens the active file of the definition, and its backing files by their headers.
    pub(super) fn open(&mut self, files: &VolumeFiles) -> Result<()> {
        let wrong = |error: &dyn std::fmt::Display| failed(format!("cannot open a disk: {error}"));
        let known = self.files.iter().find(|file| file.path == self.defined).and_then(|file| file.format);
        let format = match known {
            Some(format) => format,
            None => probe(files, &self.defined).map_err(|error| wrong(&error))?,
        };
        let options = ChainOptions::default().with_policy(Policy::Any).with_lock(LockMode::None).with_format(format);
        let chain = Chain::open_in(files.file_system(), &self.defined, &options).map_err(|error| wrong(&error))?;
        let file = |layer: &Layer| DiskFile { path: layer.path.clone(), format: Some(layer.format()) };
        self.files = chain.layers().iter().map(file).collect();
        self.events.clear();
        self.hold(files)
    }

    /// Locks the files.
    pub(super) fn hold(&mut self, files: &VolumeFiles) -> Result<()> {
        self.held.clear();
        for (index, file) in self.files.iter().enumerate() {
            let access = if index == 0 { Access::write() } else { Access::read() };
            let opened = files.file_system().open(&file.path, &access);
            self.held.push(opened.map_err(|error| failed(error.to_string()))?);
        }
        Ok(())
    }

    /// Refaults the index of a file.
    pub(super) fn position(&self, files: &VolumeFiles, path: &std::path::Path) -> Result<usize> {
        let found = self.files.iter().position(|file| files.leads_to(&file.path, path));
        found.ok_or_else(|| failed(format!("disk {} has no file {}", self.name, path.display())))
    }

    /// Opens the files from an index on, the first `writable` of them for writing.
    fn open_from(&self, files: &VolumeFiles, from: usize, writable: usize) -> Result<Chain> {
        let mut layers = Vec::new();
        for (index, file) in self.files.iter().skip(from).enumerate() {
            let layer = layer(files, file, index < writable).map_err(|error| failed(error.to_string()))?;
            layers.push(layer);
        }
        let mut layers = layers.into_iter();
        let top = layers.next().ok_or_else(|| failed("a disk without files"))?;
        Ok(Chain::from_layers(top, layers))
    }

    /// Opens the files, the first `writable` of them for writing.
    pub(super) fn chain(&self, files: &VolumeFiles, writable: usize) -> Result<Chain> {
        self.open_from(files, 0, writable)
    }

    pub(super) fn write(&self, files: &VolumeFiles, offset: u64, bytes: &[u8]) -> Result<()> {
        let chain = self.chain(files, 1)?;
        let done = chain.write_at(bytes, GuestOffset::new(offset)).and_then(|()| chain.close());
        done.map_err(|error| failed(error.to_string()))
    }

    pub(super) fn read(&self, files: &VolumeFiles, offset: u64, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        let read = self.chain(files, 0)?.read_at(&mut bytes, GuestOffset::new(offset));
        read.map(|()| bytes).map_err(|error| failed(error.to_string()))
    }

    pub(super) fn resize(&self, files: &VolumeFiles, size: u64) -> Result<()> {
        if self.job.is_some() {
            return Err(failed("a block job uses the disk"));
        }
        set_size(&self.chain(files, 1)?, size)
    }

    /// Starts a commit. A base that is smaller than the top grows first.
    pub(super) fn start_job(&mut self, files: &VolumeFiles, commit: &Commit) -> Result<()> {
        if self.job.is_some() || self.switching.is_some() {
            return Err(failed(format!("disk {} has an active block job", self.name)));
        }
        let (top, base) = (self.position(files, &commit.top)?, self.position(files, &commit.base)?);
        if top >= base || commit.active != (top == 0) {
            return Err(failed("the top is not above the base, or is not the active file"));
        }
        let total = self.open_from(files, top, 0)?.virtual_size();
        let below = self.open_from(files, base, 1)?;
        if below.virtual_size() < total {
            set_size(&below, total)?;
        }
        let kind = if commit.active { JobKind::ActiveCommit } else { JobKind::Commit };
        let (parts, ready, stalls, rate_limit) = (0, false, 0, commit.rate_limit);
        self.job = Some(FakeJob {
            kind,
            top,
            base,
            parts,
            ready,
            total,
            rate_limit,
            stalls,
            vanishes: false,
            never_ends: false,
        });
        Ok(())
    }

    /// Advances the job or a delayed switch by one step. A copied part is in the base before the
    /// job is done.
    pub(super) fn advance(&mut self, files: &VolumeFiles) -> Result<()> {
        if let Some((polls, base)) = self.switching {
            self.switching = Some((polls.saturating_sub(1), base));
            return if polls == 0 { self.switch(files, base) } else { Ok(()) };
        }
        let Some(job) = self.job.as_mut() else { return Ok(()) };
        if job.stalls > 0 {
            job.stalls -= 1;
            return Ok(());
        }
        if job.parts < PARTS {
            job.parts += 1;
            let (part, top, base, total) = (job.parts - 1, job.top, job.base, job.total);
            return self.copy_part(files, top, base, part * total / PARTS..(part + 1) * total / PARTS);
        }
        if job.vanishes {
            self.job = None;
            self.notify(JobEvent::Failed);
            return Ok(());
        }
        if job.never_ends || job.ready {
            return Ok(());
        }
        self.complete(files)
    }

    /// Completes the copy. A job on the active file becomes ready; otherwise the file above the top
    /// gets the base as its backing file.
    pub(super) fn complete(&mut self, files: &VolumeFiles) -> Result<()> {
        let Some(job) = self.job.as_mut() else { return Ok(()) };
        job.parts = PARTS;
        let (top, base) = (job.top, job.base);
        if job.kind == JobKind::ActiveCommit {
            job.ready = true;
            self.commit(files, top, base)?;
            self.notify(JobEvent::Ready);
            return Ok(());
        }
        self.commit(files, top, base)?;
        let target = &self.files[base];
        let absolute = std::path::absolute(&target.path).unwrap_or_else(|_| target.path.clone());
        let format = target.format.map(Format::name).unwrap_or_default();
        let name = self.relative_name(files, top - 1, base)?.unwrap_or(absolute);
        let above = layer(files, &self.files[top - 1], true).map_err(|error| failed(error.to_string()))?;
        if let Node::Qcow2(image) = above.node {
            let name = name.into_os_string().into_encoded_bytes();
            let linked = image.set_backing_file(Some(&name), Some(format.as_bytes())).and_then(|()| image.close());
            linked.map_err(|error| failed(error.to_string()))?;
        }
        self.files.drain(top..base);
        self.job = None;
        self.notify(JobEvent::Completed);
        self.hold(files)
    }

    /// Refaults the path of a file relative to the directory of a file above it, from the names in
    /// the headers. As with libvirt, there is none if a header has an absolute name.
    fn relative_name(&self, files: &VolumeFiles, from: usize, to: usize) -> Result<Option<PathBuf>> {
        let mut name = PathBuf::new();
        for file in &self.files[from..to] {
            let layer = layer(files, file, false).map_err(|error| failed(error.to_string()))?;
            let header = layer.node.as_qcow2().map(Image::header);
            let next =
                header.and_then(|header| Some(PathBuf::from(String::from_utf8(header.backing_file.clone()?).ok()?)));
            let Some(next) = next.filter(|next| next.is_relative()) else { return Ok(None) };
            name = name.parent().map(|directory| directory.join(&next)).unwrap_or(next);
        }
        Ok(Some(name))
    }

    /// Switches the VM to the base, which has all data that was written to the top until now.
    pub(super) fn switch(&mut self, files: &VolumeFiles, base: usize) -> Result<()> {
        self.commit(files, 0, base)?;
        self.files.drain(..base);
        (self.job, self.switching) = (None, None);
        self.notify(JobEvent::Completed);
        self.hold(files)
    }

    fn commit(&self, files: &VolumeFiles, top: usize, base: usize) -> Result<()> {
        let chain = self.open_from(files, top, base - top + 1)?;
        let options = CommitOptions::default().with_base(base - top).with_shrink_base(false);
        let done = merge::commit(&chain, &options, &());
        done.map_err(|error| failed(error.to_string()))?;
        chain.close().map_err(|error| failed(error.to_string()))
    }

    fn copy_part(&self, files: &VolumeFiles, top: usize, base: usize, part: std::ops::Range<u64>) -> Result<()> {
        let wrong = |error: crate::chain::Error| failed(error.to_string());
        let from = self.open_from(files, top, 0)?;
        let mut pieces = Vec::new();
        for extent in from.extents_of(0..base - top, part) {
            let extent = extent.map_err(wrong)?;
            if extent.kind == ExtentKind::Unallocated {
                continue;
            }
            let mut bytes = vec![0; usize::try_from(extent.len).unwrap_or_default()];
            from.read_at(&mut bytes, extent.guest).map_err(wrong)?;
            pieces.push((extent.guest, bytes));
        }
        drop(from);
        let to = self.open_from(files, base, 1)?;
        pieces.iter().try_for_each(|(at, bytes)| to.write_at(bytes, *at)).map_err(wrong)?;
        to.close().map_err(wrong)
    }
}

/// Refaults the format by the first bytes of a file.
fn probe(files: &VolumeFiles, path: &std::path::Path) -> crate::storage::Result<Format> {
    let storage = files.file_system().open(path, &Access::read().with_lock(LockMode::None))?;
    let mut magic = [0; 4];
    storage.read_at(&mut magic, 0)?;
    Ok(if magic == *b"QFI\xfb" { Format::Qcow2 } else { Format::Raw })
}

fn layer(files: &VolumeFiles, file: &DiskFile, write: bool) -> Result<Layer, crate::image::Error> {
    let access = if write { Access::write() } else { Access::read() };
    let storage = files.file_system().open(&file.path, &access.with_lock(LockMode::None))?;
    let node = match file.format {
        Some(Format::Raw) => Node::Raw(RawImage::open(storage)?),
        _ => Node::Qcow2(Image::open(storage, &OpenOptions::default().with_write(write))?),
    };
    Ok(Layer { node, path: file.path.clone() })
}

/// Changes the size of the topmost image of a chain.
fn set_size(chain: &Chain, size: u64) -> Result<()> {
    let done = match &chain.top().node {
        Node::Qcow2(image) => {
            let below = chain.below(0);
            image.resize_over(size, &ResizeOptions::default().with_shrink(true), &below, below.virtual_size())
        }
        Node::Raw(raw) => raw.resize(size),
    };
    done.map_err(|error| failed(error.to_string()))?;
    chain.flush().map_err(|error| failed(error.to_string()))
}
