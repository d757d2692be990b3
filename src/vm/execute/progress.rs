//! The progress of an operation over all of its volumes.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use crate::merge::{self, Phase};

/// The progress of an operation: that of one volume, and of all volumes together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct VolumeStep<'a> {
    /// The volume that progressed.
    pub volume: &'a str,
    /// The phase of its merge.
    pub phase: Phase,
    /// The bytes of this volume that are merged.
    pub done: u64,
    /// The bytes of this volume to merge, 0 while not known.
    pub total: u64,
    /// The bytes of all volumes that are merged.
    pub all_done: u64,
    /// The bytes of all volumes to merge, as far as known.
    pub all_total: u64,
}

/// Receives the progress of an operation, and can cancel it. Called from several threads. The unit
/// type `()` ignores progress and never cancels.
pub trait Progress: Sync {
    /// Called when a volume progressed.
    fn step(&self, step: &VolumeStep<'_>);

    /// Returns true to cancel the operation. Before its first durable record nothing has changed
    /// then; later it can be resumed. Default: false.
    fn is_cancelled(&self) -> bool {
        false
    }
}

impl Progress for () {
    fn step(&self, _step: &VolumeStep<'_>) {}
}

/// Adds up the progress of several merges.
pub(in crate::vm) struct Relay<'a> {
    to: &'a dyn Progress,
    /// The bytes done and the bytes in total, by volume.
    volumes: Mutex<BTreeMap<String, (u64, u64)>>,
}

impl<'a> Relay<'a> {
    pub(in crate::vm) fn new(to: &'a dyn Progress) -> Self {
        Self { to, volumes: Mutex::default() }
    }

    pub(in crate::vm) fn is_cancelled(&self) -> bool {
        self.to.is_cancelled()
    }

    /// Returns the receiver for the progress of one volume's merge.
    pub(in crate::vm) fn of<'r>(&'r self, volume: &'r str) -> OfVolume<'r> {
        OfVolume { relay: self, volume }
    }
}

/// The receiver for the progress of one volume's merge.
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
