//! The methods of the fake hypervisor.

use std::sync::MutexGuard;
use std::time::Duration;

use super::super::hypervisor::{
    Commit, Description, Disk, DiskFile, Event, FailureKind, Hypervisor, HypervisorError, Job, JobKind, Mirror, NewTop,
    Result,
};
use super::fault::{Call, Fate, Fault};
use super::{FakeHypervisor, State, failed, gone};
use crate::chain::Format;

/// The wait for a guest agent without a time limit.
const NO_LIMIT: Duration = Duration::from_secs(1 << 30);

fn unreachable() -> HypervisorError {
    HypervisorError::new(FailureKind::Unreachable, "the connection to the hypervisor is lost")
}

fn no_agent() -> HypervisorError {
    HypervisorError::new(FailureKind::NoAgent, "the guest agent is not connected")
}

fn agent_timeout(what: &str) -> HypervisorError {
    HypervisorError::new(FailureKind::AgentTimeout, format!("the guest agent did not answer: {what}"))
}

impl FakeHypervisor {
    /// Receives a call, unless a fault prevents it.
    fn arrive(&self, call: Call) -> Result<MutexGuard<'_, State>> {
        let mut state = self.state();
        match state.faults.count_call() {
            Fate::Goes => {}
            Fate::Dies => state.power_off(false),
            Fate::Disconnects => state.connected = false,
        }
        if !state.connected || state.faults.takes(Fault::LosesAnswer { to: call, done: false }) {
            return Err(unreachable());
        }
        Ok(state)
    }

    /// Receives a call, executes it and refaults its answer, unless a fault prevents it.
    fn answer<T>(&self, call: Call, work: impl FnOnce(&mut State) -> Result<T>) -> Result<T> {
        let mut state = self.arrive(call)?;
        let done = work(&mut state)?;
        if state.faults.takes(Fault::DiesIn(call)) && state.running {
            state.power_off(false);
            return Err(gone());
        }
        if state.faults.takes(Fault::LosesAnswer { to: call, done: true }) {
            return Err(unreachable());
        }
        Ok(done)
    }

    /// Switches all disks to their new files, or none.
    fn switch_all(&self, state: &mut State, tops: &[NewTop]) -> Result<()> {
        for top in tops {
            let disk = state.running_disk(&top.disk)?;
            if disk.job.is_some() || disk.switching.is_some() {
                return Err(failed(format!("disk {} has an active block job", disk.name)));
            }
            let mut alone = super::FakeDisk::new(top.disk.clone(), top.file.clone());
            alone.open(&self.files)?;
            let below = alone.files.get(1).map(|file| file.path.clone()).unwrap_or_default();
            if disk.position(&self.files, &below)? != 0 {
                return Err(failed(format!(
                    "{} is not backed by the active file of disk {}",
                    top.file.display(),
                    disk.name
                )));
            }
        }
        let forgets = state.faults.takes(Fault::ForgetsFiles);
        for top in tops {
            let disk = state.disk(&top.disk)?;
            disk.files.insert(0, DiskFile { path: top.file.clone(), format: Some(Format::Qcow2) });
            if !forgets {
                disk.defined.clone_from(&top.file);
            }
            disk.hold(&self.files)?;
        }
        Ok(())
    }

    /// Freezes the guest. A slow agent executes the command as well.
    fn freeze(state: &mut State) -> Result<()> {
        if state.faults.takes(Fault::HasNoAgent) {
            return Err(no_agent());
        }
        state.agent.freezes += 1;
        state.agent.frozen = true;
        let late = state.faults.take(|fault| if let Fault::FreezesLate(time) = fault { Some(*time) } else { None });
        let Some(late) = late else { return Ok(()) };
        state.now += state.agent.timeout.unwrap_or(NO_LIMIT);
        state.agent.confused_until = state.now + late;
        Err(agent_timeout("freeze"))
    }

    fn describe_disk(disk: &super::FakeDisk, running: bool) -> Disk {
        let off = || vec![DiskFile { path: disk.defined.clone(), format: None }];
        let files = if running { disk.files.clone() } else { off() };
        let mirrors = disk.job.as_ref().filter(|job| job.kind == JobKind::ActiveCommit);
        let mirror = mirrors.map(|job| Mirror { path: disk.files[job.base].path.clone(), ready: job.ready });
        Disk { name: disk.name.clone(), files, mirror }
    }

    /// Switches the VM to the base of its job, or starts to.
    fn pivot_disk(&self, state: &mut State, name: &str) -> Result<()> {
        let refused = state.faults.refuses_pivot();
        let disk = state.running_disk(name)?;
        let Some(job) = disk.job.as_ref() else { return Err(failed(format!("disk {name} has no block job"))) };
        if refused || !job.ready || job.kind != JobKind::ActiveCommit {
            return Err(failed(format!("the block job on disk {name} is not ready for pivot yet")));
        }
        let base = job.base;
        let late = state.faults.take(|fault| if let Fault::PivotsLate(polls) = fault { Some(*polls) } else { None });
        let forgets = state.faults.takes(Fault::ForgetsFiles);
        let disk = state.disk(name)?;
        let path = disk.files[base].path.clone();
        if let Some(polls) = late {
            (disk.job, disk.switching) = (None, Some((polls, base)));
            return Ok(());
        }
        disk.switch(&self.files, base)?;
        if !forgets {
            disk.defined = path;
        }
        Ok(())
    }

    /// Advances a disk by one poll.
    fn poll(&self, state: &mut State, name: &str) {
        let running = state.running;
        let Ok(disk) = state.disk(name) else { return };
        if !running {
            return;
        }
        let switching = disk.switching.is_some();
        if disk.advance(&self.files).is_err() {
            // An image failed.
            disk.job = None;
            disk.switching = None;
            disk.notify(super::JobEvent::Failed);
        }
        if switching && disk.switching.is_none() && !disk.files.is_empty() {
            disk.defined.clone_from(&disk.files[0].path);
        }
    }
}

impl Hypervisor for FakeHypervisor {
    fn describe(&self) -> Result<Description> {
        self.answer(Call::Describe, |state| {
            let running = state.running;
            let disks = state.disks.iter().map(|disk| Self::describe_disk(disk, running)).collect();
            Ok(Description { running, disks })
        })
    }

    fn snapshot(&self, disks: &[NewTop], quiesce: bool) -> Result<()> {
        self.answer(Call::Snapshot, |state| {
            if !state.running {
                return Err(gone());
            }
            if quiesce {
                Self::freeze(state)?;
            }
            let done = self.switch_all(state, disks);
            if quiesce {
                state.agent.frozen = false;
                state.agent.thaws += 1;
            }
            done
        })
    }

    fn set_agent_timeout(&self, at_most: Option<Duration>) -> Result<()> {
        self.answer(Call::SetAgentTimeout, |state| {
            if !state.running {
                return Err(gone());
            }
            state.agent.timeout = at_most;
            Ok(())
        })
    }

    fn thaw(&self) -> Result<()> {
        self.answer(Call::Thaw, |state| {
            if !state.running {
                return Err(gone());
            }
            if state.now < state.agent.confused_until {
                return Err(agent_timeout("thaw"));
            }
            state.agent.frozen = false;
            state.agent.thaws += 1;
            Ok(())
        })
    }

    fn commit(&self, commit: &Commit) -> Result<()> {
        self.answer(Call::Commit, |state| {
            state.running_disk(&commit.disk)?.start_job(&self.files, commit)?;
            let vanishes = state.faults.takes(Fault::JobVanishes);
            let never_ends = state.faults.takes(Fault::JobNeverEnds);
            let stalls =
                state.faults.take(|fault| if let Fault::JobStalls(polls) = fault { Some(*polls) } else { None });
            let swift = state.faults.takes(Fault::JobIsSwift);
            let disk = state.disk(&commit.disk)?;
            if let Some(job) = disk.job.as_mut() {
                (job.vanishes, job.never_ends, job.stalls) = (vanishes, never_ends, stalls.unwrap_or_default());
            }
            if swift { disk.complete(&self.files) } else { Ok(()) }
        })
    }

    fn job(&self, disk: &str) -> Result<Option<Job>> {
        self.answer(Call::Job, |state| {
            state.running_disk(disk)?;
            self.poll(state, disk);
            let job = state.disk(disk)?.job.as_ref().map(|job| {
                let (done, total) = job.progress();
                Job { kind: job.kind, done, total }
            });
            Ok(job)
        })
    }

    fn set_rate_limit(&self, disk: &str, rate_limit: Option<u64>) -> Result<()> {
        self.answer(Call::SetRateLimit, |state| {
            let found = state.running_disk(disk)?.job.as_mut();
            found.ok_or_else(|| failed(format!("disk {disk} has no block job")))?.rate_limit = rate_limit;
            Ok(())
        })
    }

    fn abort(&self, disk: &str) -> Result<()> {
        self.answer(Call::Abort, |state| {
            let found = state.running_disk(disk)?;
            if found.job.take().is_none() {
                return Err(failed(format!("disk {disk} has no block job")));
            }
            found.notify(super::JobEvent::Cancelled);
            Ok(())
        })
    }

    fn pivot(&self, disk: &str) -> Result<()> {
        self.answer(Call::Pivot, |state| self.pivot_disk(state, disk))
    }

    fn resize(&self, disk: &str, size: u64) -> Result<()> {
        self.answer(Call::Resize, |state| state.running_disk(disk)?.resize(&self.files, size))
    }

    fn wait(&self, disk: &str, at_most: Duration) -> Option<Event> {
        let Ok(mut state) = self.arrive(Call::Wait) else {
            self.state().now += at_most;
            return None;
        };
        self.poll(&mut state, disk);
        let event = state.disk(disk).ok().and_then(|disk| disk.events.pop_front());
        if event.is_none() || state.faults.silent {
            state.now += at_most;
            return None;
        }
        if state.faults.takes(Fault::LosesEvent) {
            return None;
        }
        match event {
            Some(Event::Job { event, .. }) if state.faults.takes(Fault::NamesWrongDisk) => {
                Some(Event::Job { disk: format!("not {disk}"), event })
            }
            event => event,
        }
    }

    fn now(&self) -> Duration {
        self.state().now
    }
}
