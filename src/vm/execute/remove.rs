//! Removal of files that left the set.
//!
//! A file is removed only if, at that moment, no record names it, it is locked, its directory entry
//! is a regular file, and its identity is the one of the preflight. Otherwise it is reported as
//! released.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::sleep;
use std::time::Duration;

use super::executor::Created;
use super::{Run, lock};
use crate::storage::{self, Access, EntryKind, LockMode, Storage};
use crate::vm::Result;
use crate::vm::files::in_use;
use crate::vm::model::catalogue::directory_of;
use crate::vm::plan::{Leaving, Removal};
use crate::vm::trace::event;

/// The number of attempts to lock a file that a hypervisor closes at present, and the pause between
/// them.
const LOCK_ATTEMPTS: u32 = 50;
const LOCK_PAUSE: Duration = Duration::from_millis(100);

/// The fate of one file.
enum Fate {
    Removed,
    Absent,
    Kept(String),
}

impl Run<'_> {
    /// Removes and releases the files that left the set.
    pub(super) fn leave(&self, leaving: &Leaving) -> Result<()> {
        self.release(leaving);
        let files = self.tools.files();
        let mut directories = BTreeSet::<PathBuf>::new();
        for removal in &leaving.remove {
            let path = files.path(&removal.path);
            match self.remove(removal, &path)? {
                Fate::Removed => {
                    event!("removed", path = %path.display());
                    lock(&self.report).removed.push(path.clone());
                }
                Fate::Absent => {}
                Fate::Kept(reason) => self.report_release(path.clone(), reason),
            }
            if !removal.provided {
                directories.insert(directory_of(&path).to_owned());
            }
        }
        for directory in directories {
            // barrier: names are gone before the journal that lists them
            match files.file_system().sync_dir(&directory) {
                // The directory of a lost file is missing too, and has no names.
                Err(storage::Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
                done => done?,
            }
        }
        Ok(())
    }

    fn remove(&self, removal: &Removal, path: &Path) -> Result<Fate> {
        let files = self.tools.files();
        if lock(&self.model).names(&removal.path) {
            return Ok(Fate::Kept("the catalogue names it".to_owned()));
        }
        match files.file_system().entry(path)? {
            // A container may exist without its path: a logical volume that is not active.
            EntryKind::Missing if removal.provided => {
                self.tools.context.provider.map_or(Ok(()), |provider| provider.release(path))?;
                return Ok(Fate::Absent);
            }
            EntryKind::Missing => return Ok(Fate::Absent),
            EntryKind::File => {}
            EntryKind::BlockDevice | EntryKind::Link if removal.provided => {}
            EntryKind::BlockDevice => return Ok(Fate::Kept("it is a block device".to_owned())),
            EntryKind::Link => return Ok(Fate::Kept("its path is a symbolic link now".to_owned())),
            _ => return Ok(Fate::Kept("it is not a regular file".to_owned())),
        }
        let held = self.lock_for_removal(path)?;
        // The handle may be that of another file by now: the name decides what would be removed.
        let named = files.file_system().resolve(path)?.file;
        // The name of a provided file is unique, and the number of its device differs after a
        // restart.
        let recorded = removal.identity.filter(|_| !removal.provided);
        if named != held.file_id() || (recorded.is_some() && named != recorded) {
            return Ok(Fate::Kept("it is not the file that was recorded: it was replaced".to_owned()));
        }
        if removal.provided {
            let Some(provider) = self.tools.context.provider else {
                return Ok(Fate::Kept("its overlay provider is not given".to_owned()));
            };
            drop(held);
            files.held().release(path);
            provider.release(path)?;
        } else {
            files.file_system().unlink(path)?;
            files.held().release(path);
        }
        Ok(Fate::Removed)
    }

    /// Locks a file that is about to be removed, unless the operation holds it already. A
    /// hypervisor closes the top of a merge a moment after the merge is complete.
    fn lock_for_removal(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        let files = self.tools.files();
        if let Some(held) = files.held().storage(path) {
            return Ok(held);
        }
        let access = Access::read().with_lock(LockMode::Write);
        let attempts = if self.tools.domain.is_some_and(|domain| domain.running) { LOCK_ATTEMPTS } else { 1 };
        for _ in 1..attempts {
            match files.file_system().open(path, &access) {
                Err(storage::Error::Busy { .. }) => sleep(LOCK_PAUSE),
                done => return done.map_err(in_use),
            }
        }
        files.file_system().open(path, &access).map_err(in_use)
    }

    /// Removes overlays that an operation created, when it is undone.
    pub(super) fn remove_created(&self, created: &[Created]) -> Result<()> {
        let remove = created.iter().map(|created| Removal {
            path: created.path.clone(),
            identity: created.identity,
            provided: created.provided,
        });
        self.leave(&Leaving { remove: remove.collect(), release: Vec::new() })
    }
}
