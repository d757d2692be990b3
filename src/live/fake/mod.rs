//! A hypervisor for tests: one VM whose disks are real images, with faults on request.
//!
//! Feature `test-utils`. The images are in the same [`FileSystem`] as the snapshot set; the VM's
//! jobs copy their data with this crate's merges. Each wait advances the clock, and nothing sleeps.
//!
//! ```
//! use std::sync::Arc;
//! use qcow2_chain::image::{CreateOptions, Image};
//! use qcow2_chain::live::LiveExecutor;
//! use qcow2_chain::live::fake::{Call, FakeHypervisor, Fault};
//! use qcow2_chain::storage::{MemoryFileSystem, FileSystem};
//! use qcow2_chain::vm::{AdoptOptions, SnapshotSet, VolumeSpec};
//!
//! let names: Arc<dyn FileSystem> = Arc::new(MemoryFileSystem::new());
//! Image::create(names.create_new("/vm/vda.qcow2".as_ref())?, &CreateOptions::new(1 << 20))?.close()?;
//! let fake = Arc::new(FakeHypervisor::new(Arc::clone(&names), [("vda", "/vm/vda.qcow2")]));
//! fake.start()?;
//!
//! let volumes = [VolumeSpec::new("vda", "/vm/vda.qcow2")];
//! let set = SnapshotSet::adopt_in(names, "/vm/catalogue.json", &volumes, &AdoptOptions::default())?;
//! let set = set.with_executor(Arc::new(LiveExecutor::new(fake.clone())));
//! set.create("s1", &Default::default())?;
//! fake.write("vda", 0, b"newer than s1")?;
//!
//! // The VM is switched to its base, and the answer is lost.
//! fake.inject(Fault::LosesAnswer { to: Call::Pivot, done: true });
//! set.delete("s1", &Default::default(), &())?;
//! assert_eq!(fake.files("vda")[0], set.active_path("vda")?);
//! assert_eq!(fake.read("vda", 0, 5)?, b"newer");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod answers;
mod disk;
mod fault;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::hypervisor::{Event, FailureKind, HypervisorError, JobEvent, Result};
use crate::storage::FileSystem;
use crate::vm::VolumeFiles;
use disk::FakeDisk;
use fault::Faults;

pub use fault::{Call, Fault};

/// A VM and its hypervisor. See the [module](self).
#[derive(Debug)]
pub struct FakeHypervisor {
    files: VolumeFiles,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    running: bool,
    disks: Vec<FakeDisk>,
    now: Duration,
    faults: Faults,
    connected: bool,
    agent: Agent,
}

/// The guest agent.
#[derive(Debug, Default)]
struct Agent {
    /// The time limit for an answer; `None` for no limit, as initially.
    timeout: Option<Duration>,
    frozen: bool,
    /// The time until which its answers belong to an earlier command.
    confused_until: Duration,
    freezes: u32,
    thaws: u32,
}

fn failed(message: impl Into<String>) -> HypervisorError {
    HypervisorError::new(FailureKind::Failed, message)
}

fn gone() -> HypervisorError {
    HypervisorError::new(FailureKind::Gone, "the domain is not running")
}

impl State {
    fn disk(&mut self, name: &str) -> Result<&mut FakeDisk> {
        self.disks.iter_mut().find(|disk| disk.name == name).ok_or_else(|| failed(format!("there is no disk {name}")))
    }

    /// Refaults a disk of the running VM.
    fn running_disk(&mut self, name: &str) -> Result<&mut FakeDisk> {
        if self.running { self.disk(name) } else { Err(gone()) }
    }

    /// Stops the VM. `cancelled`: events report the end of its jobs.
    fn power_off(&mut self, cancelled: bool) {
        if !self.running {
            return;
        }
        self.running = false;
        self.agent = Agent { timeout: None, frozen: false, ..std::mem::take(&mut self.agent) };
        for disk in &mut self.disks {
            if disk.job.take().is_some() && cancelled {
                disk.notify(JobEvent::Cancelled);
            }
            disk.switching = None;
            disk.held.clear();
            disk.events.push_back(Event::Stopped);
        }
    }
}

impl FakeHypervisor {
    /// Creates a VM that is off, with these disks: the hypervisor's name of each, and its active
    /// file.
    #[must_use]
    pub fn new<N: Into<String>, P: Into<PathBuf>>(
        names: Arc<dyn FileSystem>,
        disks: impl IntoIterator<Item = (N, P)>,
    ) -> Self {
        let disks = disks.into_iter().map(|(name, path)| FakeDisk::new(name.into(), path.into())).collect();
        let state = State { disks, connected: true, ..State::default() };
        Self { files: VolumeFiles::new(names, ""), state: Mutex::new(state) }
    }

    /// Adds a disk to a VM that is off.
    ///
    /// # Errors
    /// [`FailureKind::Failed`]: the VM is running, or has a disk of this name.
    pub fn add_disk(&self, disk: impl Into<String>, path: impl Into<PathBuf>) -> Result<()> {
        let (mut state, disk) = (self.state(), disk.into());
        if state.running || state.disk(&disk).is_ok() {
            return Err(failed("the domain is running, or has this disk"));
        }
        state.disks.push(FakeDisk::new(disk, path.into()));
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the VM on the files of its definition and their backing files.
    ///
    /// # Errors
    /// [`FailureKind::Failed`]: the VM is running, or a file cannot be opened and locked.
    pub fn start(&self) -> Result<()> {
        let mut state = self.state();
        if state.running {
            return Err(failed("the domain is running already"));
        }
        state.disks.iter_mut().try_for_each(|disk| disk.open(&self.files))?;
        state.running = true;
        Ok(())
    }

    /// Shuts the guest down. Events report that its jobs were cancelled.
    pub fn stop(&self) {
        self.state().power_off(true);
    }

    /// Kills the VM. No events report the end of its jobs.
    pub fn destroy(&self) {
        self.state().power_off(false);
    }

    /// Changes the active file of a disk in the definition, as a manager does after an operation on
    /// a VM that is off.
    ///
    /// # Errors
    /// [`FailureKind::Failed`]: the VM is running, or has no such disk.
    pub fn define(&self, disk: &str, path: impl Into<PathBuf>) -> Result<()> {
        let mut state = self.state();
        if state.running {
            return Err(failed("the domain is running"));
        }
        let disk = state.disk(disk)?;
        disk.defined = path.into();
        disk.files.clear();
        Ok(())
    }

    /// Replaces the file of a disk of the running VM, as a change of the medium does. Its job ends
    /// without an event.
    ///
    /// # Errors
    /// [`FailureKind::Failed`]: there is no such disk, or the file cannot be opened and locked.
    pub fn replace(&self, disk: &str, path: impl Into<PathBuf>) -> Result<()> {
        let mut state = self.state();
        let disk = state.disk(disk)?;
        (disk.job, disk.switching, disk.defined) = (None, None, path.into());
        disk.files.clear();
        disk.open(&self.files)
    }

    /// Refaults true if the VM is running.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.state().running
    }

    /// Refaults a disk's files, from the active file down. A VM that is off has only the file of
    /// its definition.
    #[must_use]
    pub fn files(&self, disk: &str) -> Vec<PathBuf> {
        let mut state = self.state();
        let running = state.running;
        let Ok(disk) = state.disk(disk) else { return Vec::new() };
        if running { disk.files.iter().map(|file| file.path.clone()).collect() } else { vec![disk.defined.clone()] }
    }

    /// Refaults true if the definition names the last active file of each disk.
    #[must_use]
    pub fn is_defined_as_written(&self) -> bool {
        self.state().disks.iter().all(|disk| disk.files.first().is_none_or(|file| file.path == disk.defined))
    }

    /// Refaults true if a job is running on a disk.
    #[must_use]
    pub fn has_job(&self, disk: &str) -> bool {
        self.state().disk(disk).is_ok_and(|disk| disk.job.is_some())
    }

    /// Refaults the rate limit of the job on a disk, in bytes per second.
    #[must_use]
    pub fn rate_limit(&self, disk: &str) -> Option<u64> {
        self.state().disk(disk).ok()?.job.as_ref()?.rate_limit
    }

    /// Writes to a disk as the guest does.
    ///
    /// # Errors
    /// - [`FailureKind::Gone`]: the VM is off.
    /// - [`FailureKind::Failed`]: the file systems are frozen, the range exceeds the disk, or an
    ///   image failed.
    pub fn write(&self, disk: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        let mut state = self.state();
        if state.agent.frozen {
            return Err(failed("the guest's file systems are frozen"));
        }
        state.running_disk(disk)?.write(&self.files, offset, bytes)
    }

    /// Reads from a disk as the guest does.
    ///
    /// # Errors
    /// - [`FailureKind::Gone`]: the VM is off.
    /// - [`FailureKind::Failed`]: the range exceeds the disk, or an image failed.
    pub fn read(&self, disk: &str, offset: u64, len: usize) -> Result<Vec<u8>> {
        self.state().running_disk(disk)?.read(&self.files, offset, len)
    }

    /// Refaults the size of a disk as the guest sees it, in bytes.
    ///
    /// # Errors
    /// As [`FakeHypervisor::read`].
    pub fn size(&self, disk: &str) -> Result<u64> {
        Ok(self.state().running_disk(disk)?.chain(&self.files, 0)?.virtual_size())
    }

    /// Refaults true if the guest's file systems are frozen.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        self.state().agent.frozen
    }

    /// Refaults the number of freezes and thaws of the guest's file systems.
    #[must_use]
    pub fn freezes_and_thaws(&self) -> (u32, u32) {
        let state = self.state();
        (state.agent.freezes, state.agent.thaws)
    }

    /// Refaults the time limit for answers of the guest agent; `None` is the initial state, without
    /// a limit.
    #[must_use]
    pub fn agent_timeout(&self) -> Option<Duration> {
        self.state().agent.timeout
    }

    /// Adds a fault, which occurs at the next call that it fits.
    pub fn inject(&self, fault: Fault) {
        self.state().faults.add(fault);
    }

    /// Refaults the faults that have not occurred yet.
    #[must_use]
    pub fn pending_faults(&self) -> Vec<Fault> {
        self.state().faults.left()
    }

    /// Removes all faults: jobs continue, and the connection works.
    pub fn clear_faults(&self) {
        let mut state = self.state();
        state.faults = Faults::default();
        state.connected = true;
        for job in state.disks.iter_mut().filter_map(|disk| disk.job.as_mut()) {
            job.clear_faults();
        }
    }

    /// Restores a connection that broke.
    pub fn reconnect(&self) {
        self.state().connected = true;
    }
}
