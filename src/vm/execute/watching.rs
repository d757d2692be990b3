//! The progress of one merge step, and the records of its points of no return.

use std::sync::Mutex;

use super::executor::Watch;
use super::journal::Record;
use super::progress::OfVolume;
use super::{Run, lock};
use crate::merge::{self, Direction};
use crate::progress::{Progress, Step};
use crate::vm::plan::MergeStep;
use crate::vm::{Error, Result};

/// Passes progress on, and appends to the journal before a merge changes content.
pub(super) struct Watching<'a> {
    run: &'a Run<'a>,
    stage: usize,
    step: usize,
    direction: Direction,
    progress: OfVolume<'a>,
    /// Set once the change is recorded.
    changing: Mutex<bool>,
}

impl<'a> Watching<'a> {
    pub(super) fn new(run: &'a Run<'a>, stage: usize, step: usize, merge: &MergeStep, progress: OfVolume<'a>) -> Self {
        Self { run, stage, step, direction: merge.direction, progress, changing: Mutex::default() }
    }

    /// Returns the stage, the volume and the step.
    fn position(&self) -> (usize, String, usize) {
        (self.stage, self.progress.volume().to_owned(), self.step)
    }
}

impl Progress for Watching<'_> {
    fn step(&self, step: &Step<'_>) {
        self.progress.step(step);
    }

    fn is_cancelled(&self) -> bool {
        self.progress.is_cancelled()
    }
}

impl Watch for Watching<'_> {
    /// A pull leaves the content of both files unchanged until its last header write, so that only
    /// a commit is recorded.
    fn before_change(&self) -> merge::Result<()> {
        let mut changing = lock(&self.changing);
        if *changing || self.direction == Direction::Pull {
            return Ok(());
        }
        let (stage, volume, step) = self.position();
        self.run.note(Record::Changing { stage, volume, step }).map_err(|error| match error {
            Error::Storage(error) => merge::Error::from(error),
            error => merge::Error::Refused { file: "the journal".to_owned(), why: error.to_string() },
        })?;
        *changing = true;
        Ok(())
    }

    fn before_start(&self) -> Result<()> {
        let (stage, volume, step) = self.position();
        self.run.note(Record::Started { stage, volume, step })
    }

    fn before_switch(&self) -> Result<()> {
        let (stage, volume, step) = self.position();
        self.run.note(Record::Switching { stage, volume, step })
    }
}
