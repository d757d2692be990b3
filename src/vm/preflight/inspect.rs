//! Inspection and locking of the files that an operation concerns.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use super::Checks;
use crate::chain::find_dependents;
use crate::storage::{self, EntryKind, FileId};
use crate::vm::files::{Hold, Links, facts};
use crate::vm::model::Volume;
use crate::vm::plan::request::{FileFacts, Request};
use crate::vm::plan::{Plan, Step};
use crate::vm::{Error, Refusal, Result};

impl Checks<'_> {
    /// Refuses if the running VM writes a file other than the active one, by its hypervisor.
    pub(super) fn refuse_wrong_disks(&self) -> Result<()> {
        if !self.running {
            return Ok(());
        }
        for (volume, _, record) in self.model.records() {
            let path = &record.file.path;
            if !self.is_active(path) && self.disk_with(path).is_some_and(|(_, index)| index == 0) {
                return Err(self.wrong_file(&volume.name, path).into());
            }
        }
        Ok(())
    }

    /// Refuses if another program writes a file other than the active one: probably the VM, on the
    /// wrong file. Files that were opened with a lock before are not opened again.
    pub(super) fn refuse_writers(&self, examined: &BTreeSet<String>) -> Result<()> {
        for (volume, _, record) in self.model.records() {
            let path = &record.file.path;
            if self.is_active(path) || examined.contains(path) || self.is_open_in_vm(path) {
                continue;
            }
            // A file that is not concerned may be missing or unreadable: `verify` reports it.
            if let Err(Error::Refused(Refusal::InUse { .. })) = self.files.refuse_writer(path) {
                return Err(self.wrong_file(&volume.name, path).into());
            }
        }
        Ok(())
    }

    fn is_active(&self, path: &str) -> bool {
        self.model.volumes.iter().any(|volume| volume.active.file.path == path)
    }

    fn wrong_file(&self, volume: &str, path: &str) -> Refusal {
        let active = self.model.volume(volume).map(|volume| self.files.shown(&volume.active.file.path));
        Refusal::WrongFile {
            volume: volume.to_owned(),
            path: self.files.shown(path),
            active: active.unwrap_or_else(|| "none".to_owned()),
        }
    }

    /// Turns the refusal of a frozen file that another program writes into one that names the
    /// probable cause.
    pub(super) fn explain_writer(&self, error: Error) -> Error {
        let Error::Refused(Refusal::InUse { path, .. }) = &error else { return error };
        let mut records = self.model.records();
        match records.find(|(_, _, record)| self.files.shown(&record.file.path) == *path) {
            Some((volume, _, record)) if !self.is_active(&record.file.path) => {
                self.wrong_file(&volume.name, &record.file.path).into()
            }
            _ => error,
        }
    }

    /// Refuses a new merge on a disk that has a block job: the hypervisor runs one at a time.
    pub(super) fn refuse_jobs(&self, plan: &Plan) -> Result<()> {
        for path in plan.merges().map(|(_, step)| &step.base.path) {
            let Some((disk, _)) = self.disk_with(path) else { continue };
            if let Some(job) = self.set.executor.job_on(disk)? {
                return Err(Refusal::Obstacle {
                    path: self.files.shown(path),
                    problem: format!("a block job ({job}) runs on disk {disk} of the VM"),
                    remedy: "wait until it has ended, or abort it".to_owned(),
                }
                .into());
            }
        }
        Ok(())
    }

    /// Reads the sizes of the active files, and locks those that the operation freezes or discards.
    pub(super) fn inspect_active_files(&mut self) -> Result<()> {
        let concerned = match self.request {
            Request::Create { .. } | Request::Revert { .. } => None,
            Request::Resize { volume, .. } => Some(volume.clone()),
            _ => Some(String::new()),
        };
        for index in 0..self.model.volumes.len() {
            let volume = self.model.volumes[index].clone();
            let holds = concerned.as_ref().is_none_or(|name| *name == volume.name);
            match self.inspect_active(&volume, holds) {
                Ok((size, bytes)) => {
                    let active = &mut self.model.volumes[index].active;
                    (active.virtual_size, active.bytes_on_disk) = (size, bytes);
                }
                Err(error) if matches!(self.request, Request::Revert { .. }) => {
                    self.pass_over(&volume.active.file.path, error)?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn inspect_active(&self, volume: &Volume, hold: bool) -> Result<(u64, Option<u64>)> {
        let file = &volume.active.file;
        if hold
            && !self.is_open_in_vm(&file.path)
            && let Hold::Shared(held) = self.files.hold(&file.path)?
        {
            return Err(Refusal::InUse { path: self.files.shown(&file.path), held }.into());
        }
        let layer = self.files.look_layer(file)?;
        self.files.check_link(&layer, file, &self.model.files_from(self.model.current, volume), Links::Exact)?;
        let found = facts(&layer)?;
        Ok((found.virtual_size, found.bytes_on_disk))
    }

    /// Notes a file as lost that the operation discards and that cannot be read, if the caller
    /// confirmed that.
    fn pass_over(&mut self, path: &str, error: Error) -> Result<()> {
        match error {
            Error::Refused(_) => Err(error),
            _ if self.options.discard_lost => {
                self.lost.push(path.to_owned());
                Ok(())
            }
            error => {
                let problem = crate::vm::error::with_causes(&error);
                Err(Refusal::Lost { path: self.files.shown(path), problem }.into())
            }
        }
    }

    /// Locks all files that the plan writes, relinks or removes, and gathers the facts that decide
    /// on their fate.
    pub(super) fn inspect_files(&mut self, plan: &Plan) -> Result<()> {
        let concerned = concerned(plan);
        Self::check_descriptors(plan, concerned.len())?;
        let mut identities: BTreeMap<FileId, String> = BTreeMap::new();
        for path in concerned {
            // A base is in no removal yet, but is removed after a pull.
            let provided = self.model.records().any(|(_, _, record)| record.provided && record.file.path == path);
            let facts = match self.inspect_file(&path, provided) {
                Ok(facts) => facts,
                Err(error) if is_discarded(plan, &path) => {
                    self.pass_over(&path, error)?;
                    FileFacts::default()
                }
                Err(error) => return Err(error),
            };
            if let Some(identity) = facts.identity
                && let Some(first) = identities.insert(identity, path.clone())
            {
                let (first, second) = (self.files.shown(&first), self.files.shown(&path));
                return Err(Refusal::SameFile { first, second }.into());
            }
            self.facts.insert(path, facts);
        }
        Ok(())
    }

    fn inspect_file(&self, path: &str, provided: bool) -> Result<FileFacts> {
        let mut facts = FileFacts::default();
        let file_system = self.files.file_system();
        let file = self.files.path(path);
        let mut entry = file_system.entry(&file)?;
        if entry == EntryKind::Link && file_system.entry(&file_system.resolve(&file)?.path)? == EntryKind::BlockDevice {
            entry = EntryKind::BlockDevice;
        }
        match entry {
            EntryKind::Link if !provided => facts.unremovable = Some("its path is a symbolic link now".to_owned()),
            EntryKind::BlockDevice if !provided => facts.unremovable = Some("it is a block device".to_owned()),
            EntryKind::Other => facts.unremovable = Some("it is not a regular file".to_owned()),
            _ if provided && self.set.provider.is_none() => {
                facts.unremovable = Some("its overlay provider is not given".to_owned());
            }
            _ => {}
        }
        if self.is_open_in_vm(path) {
            facts.identity = self.files.identity(path)?;
            facts.unwritable = self.files.unwritable(path)?;
            return Ok(facts);
        }
        match self.files.hold(path).map_err(|error| self.explain_writer(error))? {
            Hold::Writable => {}
            Hold::ReadOnly(reason) => facts.unwritable = Some(reason),
            Hold::Shared(held) => facts.in_use = Some(held),
        }
        facts.identity = self.files.held().storage(&self.files.path(path)).and_then(|storage| storage.file_id());
        Ok(facts)
    }

    /// Searches for images outside the set that depend on files which the plan writes or removes.
    pub(super) fn find_dependents(&mut self, plan: &Plan) -> Result<()> {
        let mut files: BTreeMap<PathBuf, String> = BTreeMap::new();
        let merged = plan.merges().flat_map(|(_, step)| [&step.top.path, &step.base.path]);
        let leaving = plan.removals().map(|removal| &removal.path);
        for path in merged.chain(leaving).filter(|path| !self.lost.contains(path)) {
            files.insert(self.files.path(path), path.clone());
        }
        if files.is_empty() || !self.options.dependents.enabled {
            return Ok(());
        }
        let own: Vec<PathBuf> = self.model.records().map(|(_, _, record)| self.files.path(&record.file.path)).collect();
        let searched: Vec<PathBuf> = files.keys().cloned().collect();
        let found = find_dependents(self.files.file_system(), &searched, &own, &self.options.dependents)?;
        for dependent in found {
            if let Some(path) = files.get(&dependent.file) {
                let facts = self.facts.entry(path.clone()).or_default();
                facts.dependents.push(dependent.image.display().to_string());
            }
        }
        Ok(())
    }

    /// Refuses to remove or relink a file that the running VM has open, other than the top of a
    /// merge that its hypervisor does.
    pub(super) fn refuse_open_in_vm(&self, plan: &Plan) -> Result<()> {
        let tops: BTreeSet<&str> = plan
            .merges()
            .filter(|(_, step)| self.is_open_in_vm(&step.base.path))
            .map(|(_, step)| step.top.path.as_str())
            .collect();
        for removal in plan.removals().filter(|removal| !tops.contains(removal.path.as_str())) {
            if let Some((disk, _)) = self.disk_with(&removal.path) {
                let (path, disk) = (self.files.shown(&removal.path), disk.to_owned());
                return Err(Refusal::OpenInVm { path, disk, action: "remove" }.into());
            }
        }
        Ok(())
    }

    /// Refuses a plan with a file that this process may not remove from its directory.
    pub(super) fn check_removals(&self, plan: &Plan) -> Result<()> {
        for removal in plan.removals().filter(|removal| !removal.provided && !self.lost.contains(&removal.path)) {
            let checked = self.files.file_system().check_unlink(&self.files.path(&removal.path));
            if let Err(error) = checked {
                return Err(Refusal::Obstacle {
                    path: self.files.shown(&removal.path),
                    problem: format!("this process may not remove it: {}", reason(error)),
                    remedy: "use a user that may write its directory, or clear the attribute (chattr -i -a)".to_owned(),
                }
                .into());
            }
        }
        Ok(())
    }
}

/// Returns the reason of the operating system for an error of a file.
fn reason(error: storage::Error) -> String {
    match error {
        storage::Error::Io { source, .. } => source.to_string(),
        error => error.to_string(),
    }
}

/// Returns the files that a plan writes, relinks or removes, without the overlays that it creates.
fn concerned(plan: &Plan) -> BTreeSet<String> {
    let mut files = BTreeSet::new();
    for step in plan.works().flat_map(|work| &work.steps) {
        match step {
            Step::Merge(merge) => files.extend([&merge.top, &merge.base].map(|file| file.path.clone())),
            Step::Relink { file, .. } | Step::Resize { file, .. } => files.extend([file.path.clone()]),
        }
    }
    files.extend(plan.removals().map(|removal| removal.path.clone()));
    for overlay in plan.created() {
        files.remove(&overlay.file.path);
    }
    files
}

/// Returns true if a stage of a plan discards a file, other than as the leftover of a merge.
fn is_discarded(plan: &Plan, path: &str) -> bool {
    plan.stages.iter().any(|stage| stage.leaving.remove.iter().any(|removal| removal.path == path))
}
