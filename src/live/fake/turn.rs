//! The turns that a hypervisor can take.

use std::time::Duration;

/// A call of the hypervisor.
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

/// Something ugly that a hypervisor does, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Turn {
    /// The next event is lost.
    LosesEvent,
    /// No event is told any more: whoever wants to know must ask.
    TellsNothing,
    /// The next event about a job names another disk.
    NamesWrongDisk,
    /// The next job is gone before it is done, without effect but for what it has copied.
    JobVanishes,
    /// The next job is done, or ready, as soon as it is started.
    JobIsSwift,
    /// The next job does nothing for so many looks, and says 0 of 0.
    JobStalls(u32),
    /// The next job never becomes ready, or done.
    JobNeverEnds,
    /// So many switches are refused, as if the job was not ready.
    RefusesPivot(u32),
    /// The next switch is answered at once and seen only after so many looks.
    PivotsLate(u32),
    /// The VM dies instead of answering, after so many calls from now on.
    Dies(u32),
    /// The VM dies while it is doing the next such call: it is done, and the answer is that the VM is gone.
    DiesIn(Call),
    /// An answer is lost: after it was done, or before.
    LosesAnswer {
        /// Which call's.
        to: Call,
        /// Whether it was done.
        done: bool,
    },
    /// After so many calls the connection is gone: nothing is answered until [`super::FakeHypervisor::reconnect`]. The VM and
    /// its jobs go on.
    Disconnects(u32),
    /// The next switch to other files is not recorded for the VM's next start.
    ForgetsFiles,
    /// There is no guest agent at the next freeze.
    HasNoAgent,
    /// The agent does not answer the next freeze in time, but obeys; for so long it answers nothing else.
    FreezesLate(Duration),
}

impl Turn {
    /// The turn for a random number.
    #[must_use]
    pub fn drawn(random: u64) -> Self {
        let few = u32::try_from(random >> 8 & 15).unwrap_or_default();
        let done = random >> 16 & 1 == 1;
        let calls = [Call::Commit, Call::Pivot, Call::Snapshot, Call::Resize, Call::Abort];
        let to = calls[usize::try_from(random >> 20 & 0xff).unwrap_or_default() % calls.len()];
        match random % 20 {
            0 => Self::LosesEvent,
            1 => Self::TellsNothing,
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

/// The turns that are still to be taken.
#[derive(Debug, Default)]
pub(super) struct Turns {
    left: Vec<Turn>,
    pub(super) silent: bool,
}

/// What becomes of a call before it is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Goes,
    Dies,
    Disconnects,
}

impl Turns {
    pub(super) fn add(&mut self, turn: Turn) {
        if turn == Turn::TellsNothing {
            self.silent = true;
        } else {
            self.left.push(turn);
        }
    }

    pub(super) fn left(&self) -> Vec<Turn> {
        self.left.clone()
    }

    /// Takes the first turn that fits, and what it says.
    pub(super) fn take<T>(&mut self, fits: impl Fn(&Turn) -> Option<T>) -> Option<T> {
        let (at, found) = self.left.iter().enumerate().find_map(|(at, turn)| Some((at, fits(turn)?)))?;
        self.left.remove(at);
        Some(found)
    }

    /// Takes a turn, if it is to be taken.
    pub(super) fn takes(&mut self, wanted: Turn) -> bool {
        self.take(|turn| (*turn == wanted).then_some(())).is_some()
    }

    /// One more refusal, if one is left.
    pub(super) fn refuses_pivot(&mut self) -> bool {
        let left = self.take(|turn| if let Turn::RefusesPivot(times) = turn { Some(*times) } else { None });
        let Some(left) = left.filter(|times| *times > 0) else { return false };
        self.left.push(Turn::RefusesPivot(left - 1));
        true
    }

    /// One more call: those that are counted are nearer.
    pub(super) fn count_call(&mut self) -> Fate {
        let mut fate = Fate::Goes;
        self.left.retain_mut(|turn| match turn {
            Turn::Dies(0) => {
                fate = Fate::Dies;
                false
            }
            Turn::Disconnects(0) => {
                fate = Fate::Disconnects;
                false
            }
            Turn::Dies(calls) | Turn::Disconnects(calls) => {
                *calls -= 1;
                true
            }
            _ => true,
        });
        fate
    }
}
