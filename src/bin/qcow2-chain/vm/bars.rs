//! The progress of several volumes at once: one bar per volume on a terminal, otherwise one line
//! for all.

use std::collections::BTreeMap;
use std::io::{IsTerminal as _, stdout};
use std::sync::Mutex;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use qcow2_chain::vm::{self};

use crate::interrupt::Interrupt;
use crate::progress::Progress;

/// Runs an operation and, if `wanted`, shows its progress. Ctrl-C stops it where it can be resumed.
pub(super) fn with_bars<T>(wanted: bool, operation: impl FnOnce(&dyn vm::Progress) -> vm::Result<T>) -> vm::Result<T> {
    let interrupt = Interrupt::listen();
    let bars = wanted && stdout().is_terminal();
    let drawing = if bars { Drawing::Bars(Bars::default()) } else { Drawing::Line(Progress::new(wanted)) };
    let face = Face { interrupt, drawing: Mutex::new(drawing) };
    let done = operation(&face);
    face.end(done.is_ok());
    done
}

struct Face {
    interrupt: Interrupt,
    drawing: Mutex<Drawing>,
}

enum Drawing {
    Line(Progress),
    Bars(Bars),
}

#[derive(Default)]
struct Bars {
    all: MultiProgress,
    volumes: BTreeMap<String, ProgressBar>,
}

impl Bars {
    fn step(&mut self, step: &qcow2_chain::progress::Step<'_>) {
        let all = &self.all;
        let bar = self.volumes.entry(step.volume.to_owned()).or_insert_with(|| {
            let style =
                ProgressStyle::with_template("{prefix:<12} {wide_bar} {percent_precise:>7}% {msg:<10} {elapsed}");
            let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
            all.add(ProgressBar::new(0)).with_style(style).with_prefix(step.volume.to_owned())
        });
        bar.set_length(step.total.max(1));
        bar.set_position(step.done);
        bar.set_message(format!("{:?}", step.phase).to_lowercase());
    }
}

impl Face {
    fn end(&self, done: bool) {
        let Ok(drawing) = self.drawing.lock() else { return };
        match &*drawing {
            Drawing::Line(line) => {
                if done {
                    line.set(1, 1);
                }
                line.end();
            }
            Drawing::Bars(bars) => {
                for bar in bars.volumes.values() {
                    if done { bar.finish() } else { bar.abandon() }
                }
            }
        }
    }
}

impl qcow2_chain::progress::Progress for Face {
    fn step(&self, step: &qcow2_chain::progress::Step<'_>) {
        if step.total == 0 {
            return;
        }
        self.interrupt.note(step.all_done, step.all_total);
        let Ok(mut drawing) = self.drawing.lock() else { return };
        match &mut *drawing {
            Drawing::Line(line) => line.set(step.all_done, step.all_total),
            Drawing::Bars(bars) => bars.step(step),
        }
    }

    fn is_cancelled(&self) -> bool {
        self.interrupt.asked()
    }
}
