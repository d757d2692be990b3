//! One stream of progress for all volumes of an operation.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use crate::merge::{self, Phase};

/// Where an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct VolumeStep<'a> {
    /// The volume that got further.
    pub volume: &'a str,
    /// What is being done to it.
    pub phase: Phase,
    /// Its bytes that are merged.
    pub done: u64,
    /// Its bytes to merge, 0 while that is not known.
    pub total: u64,
    /// The bytes of all volumes that are merged.
    pub all_done: u64,
    /// The bytes of all volumes to merge, as far as that is known.
    pub all_total: u64,
}

/// Hears of an operation's progress, and can stop it. Called from several threads. The unit type `()` hears nothing and never
/// stops.
pub trait Progress: Sync {
    /// A volume is here now.
    fn step(&self, step: &VolumeStep<'_>);

    /// Whether the operation shall stop. What it has begun can be resumed.
    fn is_cancelled(&self) -> bool {
        false
    }
}

impl Progress for () {
    fn step(&self, _step: &VolumeStep<'_>) {}
}

/// Brings the streams of several merges together.
pub(in crate::vm) struct Relay<'a> {
    to: &'a dyn Progress,
    /// Done and total of each volume.
    volumes: Mutex<BTreeMap<String, (u64, u64)>>,
}

impl<'a> Relay<'a> {
    pub(in crate::vm) fn new(to: &'a dyn Progress) -> Self {
        Self { to, volumes: Mutex::default() }
    }

    pub(in crate::vm) fn is_cancelled(&self) -> bool {
        self.to.is_cancelled()
    }

    /// The part of one volume.
    pub(in crate::vm) fn of<'r>(&'r self, volume: &'r str) -> OfVolume<'r> {
        OfVolume { relay: self, volume }
    }
}

/// One volume's part of the stream.
pub(in crate::vm) struct OfVolume<'a> {
    relay: &'a Relay<'a>,
    volume: &'a str,
}

impl OfVolume<'_> {
    pub(in crate::vm) fn volume(&self) -> &str {
        self.volume
    }
}

impl merge::Progress for OfVolume<'_> {
    fn step(&self, step: &merge::Step<'_>) {
        let (all_done, all_total) = {
            let mut volumes = self.relay.volumes.lock().unwrap_or_else(PoisonError::into_inner);
            volumes.insert(self.volume.to_owned(), (step.done, step.total));
            volumes.values().fold((0, 0), |(done, total), volume| (done + volume.0, total + volume.1))
        };
        let (volume, phase, done, total) = (self.volume, step.phase, step.done, step.total);
        self.relay.to.step(&VolumeStep { volume, phase, done, total, all_done, all_total });
    }

    fn is_cancelled(&self) -> bool {
        self.relay.is_cancelled()
    }
}
