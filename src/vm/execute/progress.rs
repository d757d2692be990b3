//! The progress of an operation over all of its volumes.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use crate::progress::{Progress, Step};

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

impl Progress for OfVolume<'_> {
    fn step(&self, step: &Step<'_>) {
        let (all_done, all_total) = {
            let mut volumes = self.relay.volumes.lock().unwrap_or_else(PoisonError::into_inner);
            volumes.insert(self.volume.to_owned(), (step.done, step.total));
            volumes.values().fold((0, 0), |(done, total), volume| (done + volume.0, total + volume.1))
        };
        self.relay.to.step(&Step { volume: self.volume, all_done, all_total, ..*step });
    }

    fn is_cancelled(&self) -> bool {
        self.relay.is_cancelled()
    }
}
