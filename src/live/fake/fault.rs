//! The faults that the fake hypervisor can inject.

use std::time::Duration;

/// A method of the hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Call {
    /// [`crate::live::Hypervisor::describe`].
    Describe,
    /// [`crate::live::Hypervisor::snapshot`].
    Snapshot,
    /// [`crate::live::Hypervisor::set_agent_timeout`].
    SetAgentTimeout,
    /// [`crate::live::Hypervisor::thaw`].
    Thaw,
    /// [`crate::live::Hypervisor::commit`].
    Commit,
    /// [`crate::live::Hypervisor::job`].
    Job,
    /// [`crate::live::Hypervisor::set_rate_limit`].
    SetRateLimit,
    /// [`crate::live::Hypervisor::abort`].
    Abort,
    /// [`crate::live::Hypervisor::pivot`].
    Pivot,
    /// [`crate::live::Hypervisor::resize`].
    Resize,
    /// [`crate::live::Hypervisor::wait`].
    Wait,
}

/// A fault, which occurs once unless stated otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// The next event is lost.
    LosesEvent,
    /// No more events are delivered, until [`super::FakeHypervisor::clear_faults`].
    NoEvents,
    /// The next event about a job names another disk.
    NamesWrongDisk,
    /// The next job ends early and with a failure event; what it copied stays in the base.
    JobVanishes,
    /// The next job is done, or ready, at once.
    JobIsSwift,
    /// The next job copies nothing for this number of polls, and reports 0 of 0.
    JobStalls(u32),
    /// The next job never becomes ready or done.
    JobNeverEnds,
    /// This number of switches is refused, as if the job was not ready.
    RefusesPivot(u32),
    /// The next switch is answered at once and takes effect after this number of polls.
    PivotsLate(u32),
    /// The VM stops instead of answering, after this number of further calls.
    Dies(u32),
    /// The next call of this method takes effect, then the VM stops; the answer is that the VM is
    /// gone.
    DiesIn(Call),
    /// The answer to the next call of this method is lost.
    LosesAnswer {
        /// The method.
        to: Call,
        /// True if the call takes effect.
        done: bool,
    },
    /// The connection breaks after this number of further calls. All calls fail until
    /// [`super::FakeHypervisor::reconnect`]; the VM and its jobs continue.
    Disconnects(u32),
    /// The next switch to other files does not change the VM's definition.
    ForgetsFiles,
    /// The guest agent is not connected at the next freeze.
    HasNoAgent,
    /// The agent executes the next freeze but exceeds the time limit, and answers nothing else for
    /// this time.
    FreezesLate(Duration),
}

impl Fault {
    /// Converts a random number to a fault.
    #[must_use]
    pub fn from_random(random: u64) -> Self {
        let few = u32::try_from(random >> 8 & 15).unwrap_or_default();
        let done = random >> 16 & 1 == 1;
        let calls = [Call::Commit, Call::Pivot, Call::Snapshot, Call::Resize, Call::Abort];
        let to = calls[usize::try_from(random >> 20 & 0xff).unwrap_or_default() % calls.len()];
        match random % 20 {
            0 => Self::LosesEvent,
            1 => Self::NoEvents,
            2 => Self::NamesWrongDisk,
            3 => Self::JobVanishes,
            4 => Self::JobIsSwift,
            5 => Self::JobStalls(few * 8),
            6 => Self::JobNeverEnds,
            7 => Self::RefusesPivot(few),
            8 => Self::PivotsLate(few),
            9..12 => Self::Dies(few * 2),
            12 => Self::DiesIn(to),
            13..16 => Self::LosesAnswer { to, done },
            16 | 17 => Self::Disconnects(few * 2),
            18 => Self::HasNoAgent,
            _ => Self::FreezesLate(Duration::from_secs(u64::from(few))),
        }
    }
}

/// The faults that have not occurred yet.
#[derive(Debug, Default)]
pub(super) struct Faults {
    left: Vec<Fault>,
    pub(super) silent: bool,
}

/// The treatment of a call on its arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Goes,
    Dies,
    Disconnects,
}

impl Faults {
    pub(super) fn add(&mut self, fault: Fault) {
        if fault == Fault::NoEvents {
            self.silent = true;
        } else {
            self.left.push(fault);
        }
    }

    pub(super) fn left(&self) -> Vec<Fault> {
        self.left.clone()
    }

    /// Removes the first fault that fits, and refaults its value.
    pub(super) fn take<T>(&mut self, fits: impl Fn(&Fault) -> Option<T>) -> Option<T> {
        let (at, found) = self.left.iter().enumerate().find_map(|(at, fault)| Some((at, fits(fault)?)))?;
        self.left.remove(at);
        Some(found)
    }

    /// Removes a fault. Refaults false if there is none.
    pub(super) fn takes(&mut self, wanted: Fault) -> bool {
        self.take(|fault| (*fault == wanted).then_some(())).is_some()
    }

    /// Counts one refusal of a switch. Refaults false if none is left.
    pub(super) fn refuses_pivot(&mut self) -> bool {
        let left = self.take(|fault| if let Fault::RefusesPivot(times) = fault { Some(*times) } else { None });
        let Some(left) = left.filter(|times| *times > 0) else { return false };
        self.left.push(Fault::RefusesPivot(left - 1));
        true
    }

    /// Counts one call for the faults that wait for a number of calls.
    pub(super) fn count_call(&mut self) -> Fate {
        let mut fate = Fate::Goes;
        self.left.retain_mut(|fault| match fault {
            Fault::Dies(0) => {
                fate = Fate::Dies;
                false
            }
            Fault::Disconnects(0) => {
                fate = Fate::Disconnects;
                false
            }
            Fault::Dies(calls) | Fault::Disconnects(calls) => {
                *calls -= 1;
                true
            }
            _ => true,
        });
        fate
    }
}
