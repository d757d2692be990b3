//! Verification: compares records, headers, directories and the hypervisor, and checks images.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::chain::Format;
use crate::format::IncompatibleFeatures;
use crate::image::{CheckOptions, check};
use crate::progress::Progress;
use crate::storage::{Access, LockMode};
use crate::vm::execute::executor::Domain;
use crate::vm::execute::recover::{Pending, Recovery};
use crate::vm::execute::report::as_text;
use crate::vm::files::Links;
use crate::vm::model::catalogue::directory_of;
use crate::vm::model::{FileRecord, FileRef, Model, State, Volume};
use crate::vm::plan::planner::overlay_stem;
use crate::vm::set::SnapshotSet;
use crate::vm::{Error, Refusal, Result};

/// The kind of a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ProblemKind {
    /// An operation was interrupted. Recovery completes or undoes it.
    Unfinished,
    /// The journal does not belong to the catalogue, or is damaged.
    Journal,
    /// A hidden snapshot has fewer than two dependents.
    Overdue,
    /// A recorded file does not exist.
    Missing,
    /// A recorded file cannot be opened in its recorded format, or a directory cannot be read.
    Unreadable,
    /// A header names another backing file or format than the catalogue.
    Link,
    /// The virtual size of a frozen file is not the recorded one.
    Size,
    /// A base was changed or replaced.
    BaseChanged,
    /// A file has the name of an overlay of this VM, depends on its files, and is not recorded.
    Orphan,
    /// An image is marked corrupt, or the check found corruption.
    Corrupt,
    /// The check found clusters that are allocated and unused.
    Leaks,
    /// The hypervisor writes another file than the active one.
    Domain,
    /// Another program writes a file that is not the active one: probably the VM, on the wrong
    /// file.
    WrongFile,
}

/// A problem that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Problem {
    /// The kind.
    pub kind: ProblemKind,
    /// The file, if the problem concerns one.
    #[serde(serialize_with = "as_text::optional")]
    pub file: Option<PathBuf>,
    /// The description.
    pub what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.file {
            Some(file) => write!(f, "{}: {}", file.display(), self.what),
            None => f.write_str(&self.what),
        }
    }
}

/// The digest of a volume's guest-visible content at a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct ContentDigest {
    /// The snapshot; `None` for the present.
    pub snapshot: Option<String>,
    /// The volume.
    pub volume: String,
    /// The virtual size in bytes.
    pub size: u64,
    /// The CRC-32 of the whole content.
    pub crc32: u32,
}

/// Options of [`SnapshotSet::verify`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct VerifyOptions {
    /// If set, every cluster of every image is checked. Default: false.
    pub deep: bool,
    /// If set, all content is read and digested. Default: false.
    pub digests: bool,
}

impl VerifyOptions {
    /// Sets whether every cluster of every image is checked.
    #[must_use]
    pub fn with_deep(mut self, deep: bool) -> Self {
        self.deep = deep;
        self
    }

    /// Sets whether all content is read and digested.
    #[must_use]
    pub fn with_digests(mut self, digests: bool) -> Self {
        self.digests = digests;
        self
    }
}

/// The result of [`SnapshotSet::verify`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Verification {
    /// The problems; empty if there are none.
    pub problems: Vec<Problem>,
    /// The requested digests, of every ready snapshot and of the present.
    pub digests: Vec<ContentDigest>,
    /// The number of images examined.
    pub images: usize,
}

impl Verification {
    /// Returns true if there are no problems.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.problems.is_empty()
    }

    fn add(&mut self, kind: ProblemKind, file: Option<PathBuf>, what: impl Into<String>) {
        self.problems.push(Problem { kind, file, what: what.into() });
    }
}

/// The result of [`SnapshotSet::reconcile`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Reconciliation {
    /// The operation that was under way.
    pub pending: Option<Pending>,
    /// The recovery; `None` in a dry run.
    pub recovery: Option<Recovery>,
    /// The problems that are left for people to decide on.
    pub problems: Vec<Problem>,
}

impl SnapshotSet {
    /// Compares records, headers, directories and the hypervisor's description. Images in use are
    /// examined without a lock; data that a running VM writes meanwhile may appear as leaks.
    ///
    /// # Errors
    /// - Any error of the store. A problem of an image is a [`Problem`].
    /// - [`Error::Cancelled`].
    pub fn verify(&self, options: &VerifyOptions, progress: &dyn Progress) -> Result<Verification> {
        let domain = self.executor.domain(&self.store.load()?.vm)?;
        self.verify_with(domain.as_ref(), *options, progress)
    }

    fn verify_with(
        &self,
        domain: Option<&Domain>,
        options: VerifyOptions,
        progress: &dyn Progress,
    ) -> Result<Verification> {
        let model = self.store.load()?;
        let mut found = Verification::default();
        match self.pending() {
            Ok(None) => {}
            Ok(Some(pending)) => found.add(ProblemKind::Unfinished, None, Error::from(pending).to_string()),
            Err(error @ (Error::Refused(Refusal::ForeignJournal { .. }) | Error::Journal { .. })) => {
                found.add(ProblemKind::Journal, None, error.to_string());
            }
            Err(error) => found.add(ProblemKind::Journal, Some(self.journal.clone()), error.to_string()),
        }
        for snapshot in model.overdue() {
            let what = format!("snapshot {} is hidden and has fewer than two dependents", snapshot.name);
            found.add(ProblemKind::Overdue, None, what);
        }
        for (volume, on, record) in model.records() {
            if progress.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let is_active = model.volume(&volume.name).is_some_and(|attached| attached.active == *record);
            self.verify_record(&model, &model.files_from(on, volume), record, is_active, &mut found);
            if !is_active {
                self.verify_writer(&model, volume, record, domain, &mut found);
            }
            if options.deep && record.file.format == Format::Qcow2 {
                self.verify_clusters(record, &mut found);
            }
        }
        self.verify_bases(&model, &mut found);
        self.find_orphans(&model, &mut found);
        if let Some(domain) = domain {
            self.compare_with_domain(&model, domain, &mut found);
        }
        if options.digests {
            self.digest(&model, &mut found, progress)?;
        }
        Ok(found)
    }

    fn verify_record(
        &self,
        model: &Model,
        below: &[FileRef],
        record: &FileRecord,
        is_active: bool,
        found: &mut Verification,
    ) {
        let path = self.files.path(&record.file.path);
        found.images += 1;
        match self.files.exists(&record.file.path) {
            Ok(true) => {}
            Ok(false) => return found.add(ProblemKind::Missing, Some(path), "the file does not exist"),
            Err(error) => return found.add(ProblemKind::Unreadable, Some(path), error.to_string()),
        }
        let layer = match self.files.look_layer(&record.file) {
            Ok(layer) => layer,
            Err(error) => return found.add(ProblemKind::Unreadable, Some(path), error.to_string()),
        };
        let links = if model.merging().is_some() { Links::MaySkip } else { Links::Exact };
        if let Err(error) = self.files.check_link(&layer, &record.file, below, links) {
            found.add(ProblemKind::Link, Some(path.clone()), error.to_string());
        }
        let size = layer.node.virtual_size();
        if !is_active && size != record.virtual_size && model.merging().is_none() {
            let what = format!("the virtual size is {size} bytes, recorded are {}", record.virtual_size);
            found.add(ProblemKind::Size, Some(path.clone()), what);
        }
        let corrupt = layer
            .node
            .as_qcow2()
            .is_some_and(|image| image.header().header.incompatible_features.has(IncompatibleFeatures::CORRUPT));
        if corrupt {
            let what = format!("the image is marked corrupt; repair it: qcow2-chain check -r all {}", path.display());
            found.add(ProblemKind::Corrupt, Some(path), what);
        }
    }

    /// Reports a frozen file that another program writes, unless the hypervisor does so with the
    /// merge of a running VM.
    fn verify_writer(
        &self,
        model: &Model,
        volume: &Volume,
        record: &FileRecord,
        domain: Option<&Domain>,
        found: &mut Verification,
    ) {
        let path = &record.file.path;
        if domain.is_some_and(|domain| domain.disk_with(&self.files, path).is_some()) {
            return;
        }
        if let Err(Error::Refused(Refusal::InUse { .. })) = self.files.refuse_writer(path) {
            let active = model.volume(&volume.name).map(|volume| self.files.shown(&volume.active.file.path));
            let active = active.unwrap_or_else(|| "none".to_owned());
            let what =
                format!("another program writes this file; the active file of volume {} is {active}", volume.name);
            found.add(ProblemKind::WrongFile, Some(self.files.path(path)), what);
        }
    }

    fn verify_bases(&self, model: &Model, found: &mut Verification) {
        for base in model.all_volumes().flat_map(|volume| &volume.bases) {
            let path = self.files.path(&base.file.path);
            match self.files.check_base(base) {
                Ok(()) => {}
                Err(Error::Refused(refusal @ Refusal::BaseChanged { .. })) => {
                    found.add(ProblemKind::BaseChanged, Some(path), refusal.to_string());
                }
                Err(error) => found.add(ProblemKind::Unreadable, Some(path), error.to_string()),
            }
        }
    }

    fn verify_clusters(&self, record: &FileRecord, found: &mut Verification) {
        let path = self.files.path(&record.file.path);
        let access = Access::read().with_lock(LockMode::None);
        let checked = self.files.storage(&record.file.path, &access);
        let checked = checked.and_then(|storage| Ok(check(&*storage, &CheckOptions::default())?));
        match checked {
            Ok(report) if report.corruptions + report.check_errors > 0 => {
                let what = format!("{} corruptions, {} errors", report.corruptions, report.check_errors);
                found.add(ProblemKind::Corrupt, Some(path), what);
            }
            Ok(report) if report.leaks > 0 => {
                let what = format!("{} clusters are allocated and unused", report.leaks);
                found.add(ProblemKind::Leaks, Some(path), what);
            }
            // A missing or unreadable file is reported with its record.
            Ok(_) | Err(_) => {}
        }
    }

    /// Finds files beside the recorded ones that are named like overlays of this VM and depend on
    /// its files. An overlay of another VM with the same name depends on other files.
    fn find_orphans(&self, model: &Model, found: &mut Verification) {
        let mut recorded: BTreeSet<PathBuf> =
            model.records().map(|(_, _, record)| self.files.path(&record.file.path)).collect();
        // The released file of a detached volume is the caller's.
        recorded.extend(model.detached.iter().map(|volume| self.files.path(&volume.active.file.path)));
        let mut directories: BTreeSet<PathBuf> = recorded.iter().map(|path| directory_of(path).to_owned()).collect();
        let named = model.all_volumes().filter_map(|volume| volume.overlay_dir.as_ref());
        directories.extend(named.map(|directory| self.files.path(directory)));
        for directory in directories {
            let paths = match self.files.file_system().list(&directory) {
                Ok(paths) => paths,
                Err(error) => {
                    found.add(ProblemKind::Unreadable, Some(directory), error.to_string());
                    continue;
                }
            };
            for path in paths {
                let is_recorded = || recorded.iter().any(|known| self.files.leads_to(known, &path));
                if is_overlay_name(model, &path)
                    && !recorded.contains(&path)
                    && !is_recorded()
                    && self.is_of_set(model, &path)
                {
                    found.add(ProblemKind::Orphan, Some(path), "no record names this file");
                }
            }
        }
    }

    /// Returns true if an image is backed by a file of the set, or cannot be read.
    fn is_of_set(&self, model: &Model, path: &Path) -> bool {
        let Ok(recorded) = self.files.record(path) else { return false };
        let Ok(layer) = self.files.look_layer(&FileRef { path: recorded, format: Format::Qcow2 }) else { return true };
        let header = layer.node.as_qcow2().map(crate::image::Image::header);
        let Some(name) = header.and_then(|header| header.backing_file.clone()) else { return false };
        let backing = directory_of(path).join(String::from_utf8_lossy(&name).as_ref());
        let mut files = model.records().map(|(_, _, record)| self.files.path(&record.file.path));
        files.any(|file| self.files.leads_to(&file, &backing))
    }

    fn digest(&self, model: &Model, found: &mut Verification, progress: &dyn Progress) -> Result<()> {
        let ready = model.snapshots.values().filter(|snapshot| snapshot.state == State::Ready);
        let points: Vec<_> = ready.map(Some).chain([None]).collect();
        for snapshot in points {
            for volume in model.all_volumes() {
                let files = match snapshot {
                    Some(snapshot) if !snapshot.files.contains_key(&volume.name) => continue,
                    Some(snapshot) => model.files_from(Some(snapshot.id), volume),
                    None if model.volume(&volume.name).is_none() => continue,
                    None => model.active_chain(volume),
                };
                let path = files.first().map(|file| self.files.path(&file.path));
                let digested = self
                    .files
                    .disk(model, volume, &files)
                    .and_then(|chain| Ok((chain.virtual_size(), chain.digest(progress)?)));
                match digested {
                    Ok((size, crc32)) => found.digests.push(ContentDigest {
                        snapshot: snapshot.map(|snapshot| snapshot.name.clone()),
                        volume: volume.name.clone(),
                        size,
                        crc32,
                    }),
                    Err(error) if error.is_cancelled() => return Err(Error::Cancelled),
                    Err(error) => found.add(ProblemKind::Unreadable, path, error.to_string()),
                }
            }
        }
        Ok(())
    }

    /// Recovers, then verifies. `domain` is the caller's description of the VM, which overrules
    /// that of the executor. A dry run changes nothing.
    ///
    /// # Errors
    /// See [`SnapshotSet::recover`] and [`SnapshotSet::verify`].
    pub fn reconcile(&self, domain: Option<&Domain>, dry_run: bool, progress: &dyn Progress) -> Result<Reconciliation> {
        let pending = self.pending()?;
        let recovery = if dry_run { None } else { Some(self.recover_stated(domain, progress)?) };
        let asked = match domain {
            Some(domain) => Some(domain.clone()),
            None => self.executor.domain(&self.store.load()?.vm)?,
        };
        let found = self.verify_with(asked.as_ref(), VerifyOptions::default(), progress)?;
        Ok(Reconciliation { pending, recovery, problems: found.problems })
    }

    /// Compares the files that the VM writes with the active files. A disk belongs to a volume by
    /// its files, or by its name.
    fn compare_with_domain(&self, model: &Model, domain: &Domain, found: &mut Verification) {
        for volume in &model.volumes {
            if domain.disk_writing(&self.files, &volume.active.file.path).is_some() {
                continue;
            }
            let frozen = model.snapshots.values().filter_map(|snapshot| snapshot.files.get(&volume.name));
            let frozen = frozen.map(|record| &record.file.path);
            let wrong = frozen.filter(|path| domain.disk_writing(&self.files, path).is_some());
            let wrong = wrong.map(|path| self.files.path(path)).next();
            let of_name = || domain.disks.get(&volume.name).and_then(|files| files.first()).cloned();
            if let Some(written) = wrong.or_else(of_name) {
                let active = self.files.shown(&volume.active.file.path);
                let what =
                    format!("the hypervisor writes this file; the active file of volume {} is {active}", volume.name);
                found.add(ProblemKind::Domain, Some(written), what);
            }
        }
    }
}

/// Returns true for a path whose file name is that of an overlay of this VM:
/// `VM-VOLUME.NUMBER-TOKEN.qcow2`.
fn is_overlay_name(model: &Model, path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    model.all_volumes().any(|volume| {
        let stem = overlay_stem(&model.vm, &volume.name);
        let rest = name.strip_prefix(stem.as_str()).and_then(|rest| rest.strip_prefix('.'));
        let rest = rest.and_then(|rest| rest.strip_suffix(".qcow2"));
        let Some((number, token)) = rest.and_then(|rest| rest.split_once('-')) else { return false };
        let digits = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
        digits && !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_hexdigit())
    })
}
