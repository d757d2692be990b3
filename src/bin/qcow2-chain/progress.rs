//! Progress of long verbs: a bar on a terminal, otherwise qemu-img's lines on standard output.

use std::cell::Cell;
use std::io::{IsTerminal as _, Write as _, stdout};

use indicatif::{ProgressBar, ProgressStyle};

/// Returns the ratio of `done` to `total` in hundredths of a percent.
pub(crate) fn part(done: u64, total: u64) -> u64 {
    let part = if total == 0 { 10_000 } else { u128::from(done) * 10_000 / u128::from(total) };
    u64::try_from(part).unwrap_or(10_000).min(10_000)
}

/// Formats qemu-img's line for a part in hundredths of a percent.
pub(crate) fn line(part: u64) -> String {
    format!("    ({}.{:02}/100%)", part / 100, part % 100)
}

/// The display of one operation's progress.
#[derive(Debug)]
pub(crate) struct Progress {
    face: Face,
    /// The last printed part in hundredths of a percent.
    last: Cell<Option<u64>>,
}

#[derive(Debug)]
enum Face {
    Nothing,
    Lines,
    Bar(ProgressBar),
}

impl Progress {
    /// Creates a display. It shows nothing unless `wanted`.
    pub(crate) fn new(wanted: bool) -> Self {
        let face = match (wanted, stdout().is_terminal()) {
            (false, _) => Face::Nothing,
            (true, false) => Face::Lines,
            (true, true) => {
                let style = ProgressStyle::with_template("{wide_bar} {percent_precise:>7}% {elapsed} (eta {eta})");
                Face::Bar(ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())))
            }
        };
        let progress = Self { face, last: Cell::new(None) };
        progress.set(0, 1);
        progress
    }

    /// Shows that `done` of `total` is done. As in qemu-img, a step of less than a percent is
    /// omitted.
    pub(crate) fn set(&self, done: u64, total: u64) {
        let part = part(done, total);
        match &self.face {
            Face::Nothing => {}
            Face::Bar(bar) => {
                bar.set_length(total);
                bar.set_position(done);
            }
            Face::Lines => {
                let worth = self.last.get().is_none_or(|last| part >= last + 100 || (part == 10_000 && last < part));
                if worth {
                    self.last.set(Some(part));
                    // The work continues if standard output was closed.
                    let mut out = stdout().lock();
                    let _ = write!(out, "{}\r", line(part));
                    let _ = out.flush();
                }
            }
        }
    }

    /// Ends the line or bar.
    pub(crate) fn end(&self) {
        match &self.face {
            Face::Nothing => {}
            Face::Bar(bar) => bar.finish(),
            Face::Lines => {
                let _ = writeln!(stdout());
            }
        }
    }
}
