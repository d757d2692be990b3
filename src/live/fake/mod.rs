//! A hypervisor for tests: one VM whose disks are real images, and which plays the ugly turns that it is told to.
//!
//! Feature `test-utils`. The images are those that the snapshots are of, in the same [`FileSystem`]; what the VM's jobs copy is really
//! copied, by this crate's merges. Time is the number of waits, so that nothing sleeps.
//!
//! ```
//! use std::sync::Arc;
//! use qcow2_chain::image::{CreateOptions, Image};
//! use qcow2_chain::live::LiveExecutor;
//! use qcow2_chain::live::fake::{Call, FakeHypervisor, Turn};
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
//! // The VM is switched over, and nobody hears of it.
//! fake.play(Turn::LosesAnswer { to: Call::Pivot, done: true });
//! set.delete("s1", &Default::default(), &())?;
//! assert_eq!(fake.files("vda")[0], set.active_path("vda")?);
//! assert_eq!(fake.read("vda", 0, 5)?, b"newer");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod answers;
mod disk;
mod turn;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::hypervisor::{Event, FailureKind, HypervisorError, JobEvent, Result};
use crate::storage::FileSystem;
use crate::vm::VolumeFiles;
use disk::FakeDisk;
use turn::Turns;

pub use turn::{Call, Turn};

/// A VM and its hypervisor. See the [module](self).
#[derive(Debug)]
pub struct FakeHypervisor {
    place: VolumeFiles,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    running: bool,
    disks: Vec<FakeDisk>,
    now: Duration,
    turns: Turns,
    connected: bool,
    agent: Agent,
}

/// The guest agent and what it has done.
#[derive(Debug, Default)]
struct Agent {
    timeout: Option<Duration>,
    frozen: bool,
    /// Until when it answers something else than what it was asked.
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

    /// A disk of a VM that runs.
    fn running_disk(&mut self, name: &str) -> Result<&mut FakeDisk> {
        if self.running { self.disk(name) } else { Err(gone()) }
    }

    /// The VM ends. Its jobs end without a word, unless that is asked for.
    fn power_off(&mut self, cancelled: bool) {
        if !self.running {
            return;
        }
        self.running = false;
        self.agent = Agent { timeout: None, frozen: false, ..std::mem::take(&mut self.agent) };
        for disk in &mut self.disks {
            if disk.job.take().is_some() && cancelled {
                disk.tell(JobEvent::Cancelled);
            }
            disk.switching = None;
            disk.held.clear();
            disk.events.push_back(Event::Stopped);
        }
    }
}

impl FakeHypervisor {
    /// A VM that is off, with these disks: the hypervisor's name of each, and the file that it would write.
    #[must_use]
    pub fn new<N: Into<String>, P: Into<PathBuf>>(
        names: Arc<dyn FileSystem>,
        disks: impl IntoIterator<Item = (N, P)>,
    ) -> Self {
        let disks = disks.into_iter().map(|(name, path)| FakeDisk::new(name.into(), path.into())).collect();
        let state = State { disks, connected: true, ..State::default() };
        Self { place: VolumeFiles::new(names, ""), state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the VM on the files that it is defined with, and on what their headers name beneath them.
    ///
    /// # Errors
    /// [`FailureKind::Failed`] where it is running, or a file cannot be opened and locked.
    pub fn start(&self) -> Result<()> {
        let mut state = self.state();
        if state.running {
            return Err(failed("the domain is running already"));
        }
        state.disks.iter_mut().try_for_each(|disk| disk.open(&self.place))?;
        state.running = true;
        Ok(())
    }

    /// The guest shuts down. Its jobs are cancelled, which is told.
    pub fn stop(&self) {
        self.state().power_off(true);
    }

    /// The VM is killed. Of its jobs nothing is heard any more.
    pub fn destroy(&self) {
        self.state().power_off(false);
    }

    /// Gives a disk of a VM that is off another file to write, as a manager does after a change made while it is off.
    ///
    /// # Errors
    /// [`FailureKind::Failed`] where it is running, or has no such disk.
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

    /// Somebody gives a disk of the running VM another file, as a drive gets another medium. Its job ends without a word.
    ///
    /// # Errors
    /// [`FailureKind::Failed`] where there is no such disk, or the file cannot be opened and locked.
    pub fn replace(&self, disk: &str, path: impl Into<PathBuf>) -> Result<()> {
        let mut state = self.state();
        let disk = state.disk(disk)?;
        (disk.job, disk.switching, disk.defined) = (None, None, path.into());
        disk.files.clear();
        disk.open(&self.place)
    }

    /// Whether the VM is running.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.state().running
    }

    /// A disk's files: what it writes and what lies beneath it, while it runs; then the file that it is defined with.
    #[must_use]
    pub fn files(&self, disk: &str) -> Vec<PathBuf> {
        let mut state = self.state();
        let running = state.running;
        let Ok(disk) = state.disk(disk) else { return Vec::new() };
        if running { disk.files.iter().map(|file| file.path.clone()).collect() } else { vec![disk.defined.clone()] }
    }

    /// Whether each disk would be started on the file that it wrote last.
    #[must_use]
    pub fn is_defined_as_written(&self) -> bool {
        self.state().disks.iter().all(|disk| disk.files.first().is_none_or(|file| file.path == disk.defined))
    }

    /// Whether a job is running on a disk.
    #[must_use]
    pub fn has_job(&self, disk: &str) -> bool {
        self.state().disk(disk).is_ok_and(|disk| disk.job.is_some())
    }

    /// The most bytes in a second that the job on a disk was told to copy, if one is running and was told.
    #[must_use]
    pub fn rate_limit(&self, disk: &str) -> Option<u64> {
        self.state().disk(disk).ok()?.job.as_ref()?.rate_limit
    }

    /// The guest writes to a disk.
    ///
    /// # Errors
    /// [`FailureKind::Gone`] while it is off; [`FailureKind::Failed`] while its file systems are frozen, behind the disk's end,
    /// and what the images give.
    pub fn write(&self, disk: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        let mut state = self.state();
        if state.agent.frozen {
            return Err(failed("the guest's file systems are frozen"));
        }
        state.running_disk(disk)?.write(&self.place, offset, bytes)
    }

    /// The guest reads from a disk.
    ///
    /// # Errors
    /// [`FailureKind::Gone`] while it is off; [`FailureKind::Failed`] behind the disk's end, and what the images give.
    pub fn read(&self, disk: &str, offset: u64, len: usize) -> Result<Vec<u8>> {
        self.state().running_disk(disk)?.read(&self.place, offset, len)
    }

    /// The size in bytes of a disk as the guest sees it.
    ///
    /// # Errors
    /// As [`FakeHypervisor::read`].
    pub fn size(&self, disk: &str) -> Result<u64> {
        Ok(self.state().running_disk(disk)?.chain(&self.place, 0)?.virtual_size())
    }

    /// Whether the guest's file systems are frozen.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        self.state().agent.frozen
    }

    /// How often the guest's file systems were frozen, and how often they were let go.
    #[must_use]
    pub fn freezes_and_thaws(&self) -> (u32, u32) {
        let state = self.state();
        (state.agent.freezes, state.agent.thaws)
    }

    /// Plays a turn when it fits, once.
    pub fn play(&self, turn: Turn) {
        self.state().turns.add(turn);
    }

    /// The turns that were told and did not fit anything yet.
    #[must_use]
    pub fn unplayed(&self) -> Vec<Turn> {
        self.state().turns.left()
    }

    /// From here on all goes well: no turn is left, jobs that are stuck go on, the connection is there.
    pub fn behave(&self) {
        let mut state = self.state();
        state.turns = Turns::default();
        state.connected = true;
        for job in state.disks.iter_mut().filter_map(|disk| disk.job.as_mut()) {
            job.behave();
        }
    }

    /// Whoever lost the connection has it again.
    pub fn reconnect(&self) {
        self.state().connected = true;
    }
}
