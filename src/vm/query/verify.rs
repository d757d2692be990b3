//! Whether catalogue, headers and directories agree, and whether the images are sound.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

use crate::chain::Format;
use crate::format::IncompatibleFeatures;
use crate::image::{CheckOptions, check};
use crate::storage::{Access, LockMode};
use crate::vm::execute::executor::Domain;
use crate::vm::execute::progress::Progress;
use crate::vm::files::Links;
use crate::vm::model::catalogue::directory_of;
use crate::vm::model::{FileRecord, Model, State, Volume};
use crate::vm::plan::planner::overlay_stem;
use crate::vm::set::{Recovery, SnapshotSet};
use crate::vm::{Error, Pending, Refusal, Result};

/// What kind of thing is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ProblemKind {
    /// An operation was interrupted: recovery deals with it.
    Unfinished,
    /// A hidden snapshot should be gone.
    Overdue,
    /// A recorded file does not exist.
    Missing,
    /// A recorded file cannot be opened in its recorded format.
    Unreadable,
    /// A header names another backing file or format than is recorded.
    Link,
    /// A frozen file's virtual size is not the recorded one.
    Size,
    /// A base is not what it was.
    BaseChanged,
    /// A file looks like an overlay of this VM and is not recorded.
    Orphan,
    /// An image is marked corrupt, or a check found corruption.
    Corrupt,
    /// A check found clusters that are allocated and not used.
    Leaks,
    /// The hypervisor writes another file than the recorded one.
    Domain,
}

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Problem {
    /// What kind of thing.
    pub kind: ProblemKind,
    /// The file, if it is about one.
    pub file: Option<PathBuf>,
    /// In words.
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

/// What a guest reads of a volume at a moment, as one number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct ContentDigest {
    /// The snapshot; none for the present.
    pub snapshot: Option<String>,
    /// The volume.
    pub volume: String,
    /// Its virtual size in bytes.
    pub size: u64,
    /// The CRC-32 of all of it.
    pub crc32: u32,
}

/// How much is verified.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct VerifyOptions {
    /// Whether every cluster of every image is checked.
    pub deep: bool,
    /// Whether all content is read and digested.
    pub digests: bool,
}

impl VerifyOptions {
    /// The same, checking every cluster or not.
    #[must_use]
    pub fn with_deep(mut self, deep: bool) -> Self {
        self.deep = deep;
        self
    }

    /// The same, digesting all content or not.
    #[must_use]
    pub fn with_digests(mut self, digests: bool) -> Self {
        self.digests = digests;
        self
    }
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Verification {
    /// What is wrong; empty where nothing is.
    pub problems: Vec<Problem>,
    /// The digests that were asked for, of every ready snapshot and of the present.
    pub digests: Vec<ContentDigest>,
    /// How many images were looked at.
    pub images: usize,
}

impl Verification {
    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.problems.is_empty()
    }

    fn add(&mut self, kind: ProblemKind, file: Option<PathBuf>, what: impl Into<String>) {
        self.problems.push(Problem { kind, file, what: what.into() });
    }
}

/// What [`SnapshotSet::reconcile`] found and did.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Reconciliation {
    /// What was under way.
    pub pending: Option<Pending>,
    /// What became of it; none in a dry run.
    pub recovery: Option<Recovery>,
    /// What is wrong and is for people to decide.
    pub problems: Vec<Problem>,
}

impl SnapshotSet {
    /// Compares records, headers, directories and what the hypervisor says, and looks deeper where asked to. Images in use are
    /// looked at without locks; what a running VM writes meanwhile may show as leaks.
    ///
    /// # Errors
    /// What reading the catalogue gives; [`Error::Cancelled`]. What is wrong with images is no error but a
    /// [`Problem`].
    pub fn verify(&self, options: &VerifyOptions, progress: &dyn Progress) -> Result<Verification> {
        let domain = self.executor.domain(&self.store.load()?.vm)?;
        self.verify_with(&domain, *options, progress)
    }

    fn verify_with(&self, domain: &Domain, options: VerifyOptions, progress: &dyn Progress) -> Result<Verification> {
        let model = self.store.load()?;
        let mut found = Verification::default();
        if let Some(pending) = self.pending()? {
            found.add(ProblemKind::Unfinished, None, Error::from(pending).to_string());
        }
        for snapshot in model.overdue() {
            found.add(ProblemKind::Overdue, None, format!("snapshot {} is hidden and not needed", snapshot.name));
        }
        for (volume, on, record) in model.records() {
            if progress.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let is_active = *record == volume.active;
            self.verify_record(&model, volume, &model.files_from(on, volume), record, is_active, &mut found)?;
            if options.deep && record.file.format == Format::Qcow2 {
                self.verify_clusters(record, &mut found);
            }
        }
        for base in model.volumes.iter().flat_map(|volume| &volume.bases) {
            match self.place.check_base(base) {
                Ok(()) => {}
                Err(Error::Refused(refusal @ Refusal::BaseChanged { .. })) => {
                    found.add(ProblemKind::BaseChanged, Some(self.place.path(&base.file.path)), refusal.to_string());
                }
                Err(error) => {
                    found.add(ProblemKind::Unreadable, Some(self.place.path(&base.file.path)), error.to_string());
                }
            }
        }
        self.find_orphans(&model, &mut found)?;
        self.compare_with_domain(&model, domain, &mut found);
        if options.digests {
            self.digest(&model, &mut found, progress)?;
        }
        Ok(found)
    }

    fn verify_record(
        &self,
        model: &Model,
        _volume: &Volume,
        below: &[crate::vm::FileRef],
        record: &FileRecord,
        is_active: bool,
        found: &mut Verification,
    ) -> Result<()> {
        let path = self.place.path(&record.file.path);
        found.images += 1;
        if !self.place.exists(&record.file.path)? {
            found.add(ProblemKind::Missing, Some(path), "it does not exist");
            return Ok(());
        }
        let layer = match self.place.look_layer(&record.file) {
            Ok(layer) => layer,
            Err(error) => {
                found.add(ProblemKind::Unreadable, Some(path), error.to_string());
                return Ok(());
            }
        };
        let links = if model.merging().is_some() { Links::MaySkip } else { Links::Exact };
        if let Err(error) = self.place.check_link(&layer, &record.file, below, links) {
            found.add(ProblemKind::Link, Some(path.clone()), error.to_string());
        }
        let size = layer.node.virtual_size();
        if !is_active && size != record.virtual_size && model.merging().is_none() {
            let what = format!("its size is {size} bytes, recorded are {}", record.virtual_size);
            found.add(ProblemKind::Size, Some(path.clone()), what);
        }
        let corrupt = layer
            .node
            .as_qcow2()
            .is_some_and(|image| image.header().header.incompatible_features.has(IncompatibleFeatures::CORRUPT));
        if corrupt {
            found.add(ProblemKind::Corrupt, Some(path), "it is marked corrupt");
        }
        Ok(())
    }

    fn verify_clusters(&self, record: &FileRecord, found: &mut Verification) {
        let path = self.place.path(&record.file.path);
        let access = Access::read().with_lock(LockMode::None);
        let checked = self.place.storage(&record.file.path, &access);
        let checked = checked.and_then(|storage| Ok(check(&*storage, &CheckOptions::default())?));
        match checked {
            Ok(report) if report.corruptions + report.check_errors > 0 => {
                let what = format!("{} corruptions, {} errors", report.corruptions, report.check_errors);
                found.add(ProblemKind::Corrupt, Some(path), what);
            }
            Ok(report) if report.leaks > 0 => {
                found.add(ProblemKind::Leaks, Some(path), format!("{} clusters are not used", report.leaks));
            }
            Ok(_) => {}
            Err(error) => found.add(ProblemKind::Unreadable, Some(path), error.to_string()),
        }
    }

    /// Files beside the recorded ones that are called like this VM's overlays.
    fn find_orphans(&self, model: &Model, found: &mut Verification) -> Result<()> {
        let recorded: BTreeSet<PathBuf> =
            model.records().map(|(_, _, record)| self.place.path(&record.file.path)).collect();
        let directories: BTreeSet<PathBuf> = recorded.iter().map(|path| directory_of(path).to_owned()).collect();
        let stems: Vec<String> = model.volumes.iter().map(|volume| overlay_stem(&model.vm, &volume.name)).collect();
        let is_overlay = |name: &str| {
            let number = stems.iter().find_map(|stem| name.strip_prefix(stem.as_str())?.strip_prefix('.'));
            let number = number.and_then(|rest| rest.strip_suffix(".qcow2"));
            number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
        };
        for directory in directories {
            for path in self.place.names().list(&directory)? {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                if is_overlay(&name) && !recorded.contains(&path) {
                    found.add(ProblemKind::Orphan, Some(path), "no record names it");
                }
            }
        }
        Ok(())
    }

    fn digest(&self, model: &Model, found: &mut Verification, progress: &dyn Progress) -> Result<()> {
        let ready = model.snapshots.values().filter(|snapshot| snapshot.state == State::Ready);
        let points: Vec<_> = ready.map(Some).chain([None]).collect();
        for snapshot in points {
            for volume in &model.volumes {
                let files = match snapshot {
                    Some(snapshot) => model.files_from(Some(snapshot.id), volume),
                    None => model.active_chain(volume),
                };
                let path = files.first().map(|file| self.place.path(&file.path));
                let digested = self
                    .place
                    .disk(model, volume, &files)
                    .and_then(|chain| Ok((chain.virtual_size(), chain.digest(&|| progress.is_cancelled())?)));
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

    /// Brings the catalogue and the world together: completes or undoes what was interrupted, then tells what else does not
    /// agree, the hypervisor's view among it, if that is given: it decides where recovery would have to ask the hypervisor. A dry run only
    /// tells.
    ///
    /// # Errors
    /// As [`SnapshotSet::recover`] and [`SnapshotSet::verify`].
    pub fn reconcile(&self, domain: Option<&Domain>, dry_run: bool, progress: &dyn Progress) -> Result<Reconciliation> {
        let pending = self.pending()?;
        let recovery = if dry_run { None } else { Some(self.recover_told(domain, progress)?) };
        let asked = || self.executor.domain(&self.store.load()?.vm);
        let domain = domain.map_or_else(asked, |told| Ok(told.clone()))?;
        let found = self.verify_with(&domain, VerifyOptions::default(), progress)?;
        Ok(Reconciliation { pending, recovery, problems: found.problems })
    }

    /// Whether the VM's disk of a volume's name writes another file than the volume's. A volume may be the file of a disk of
    /// another name.
    fn compare_with_domain(&self, model: &Model, domain: &Domain, found: &mut Verification) {
        for volume in &model.volumes {
            if domain.disk_writing(&self.place, &volume.active.file.path).is_some() {
                continue;
            }
            if let Some(written) = domain.disks.get(&volume.name).and_then(|files| files.first()) {
                let recorded = self.place.path(&volume.active.file.path);
                let what = format!("the hypervisor writes it; volume {} is {}", volume.name, recorded.display());
                found.add(ProblemKind::Domain, Some(written.clone()), what);
            }
        }
    }
}
