//! Signals of long verbs. The first SIGINT or SIGTERM asks the verb to stop at a point where the
//! chain is whole; the second one ends the program at once. SIGUSR1 prints the progress.
//!
//! ```text
//! main:  block()      before any thread starts, so that every thread has the signals blocked
//! cli:   receive()    verbs that can be stopped: one thread receives the signals
//!        unblock()    all other verbs: the signals have their default actions
//! verb:  listen()     until here SIGINT and SIGTERM end the program at once, as in a connect
//! ```
//!
//! A signal that was ignored when the program started stays ignored, as in background jobs of
//! scripts.

use std::io::Write as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

#[cfg(unix)]
use nix::sys::signal::{SigSet, Signal};

#[cfg(unix)]
use crate::progress::line;
use crate::progress::part;

/// The state that the receiving thread shares with the verb. A process runs one verb.
static SHARED: Shared =
    Shared { listening: AtomicBool::new(false), asked: AtomicBool::new(false), part: AtomicU64::new(0) };

#[derive(Debug)]
struct Shared {
    /// A verb reads `asked`.
    listening: AtomicBool,
    asked: AtomicBool,
    /// In hundredths of a percent.
    part: AtomicU64,
}

/// The request to stop, and the progress that SIGUSR1 prints.
#[derive(Clone, Debug)]
pub(crate) struct Interrupt(&'static Shared);

impl Interrupt {
    /// Starts to convert SIGINT and SIGTERM to requests. Without the thread of [`receive`] the
    /// signals keep their default actions, which a chain survives too.
    pub(crate) fn listen() -> Self {
        SHARED.listening.store(true, Ordering::SeqCst);
        Self(&SHARED)
    }

    /// Returns true once the user asked to stop.
    pub(crate) fn asked(&self) -> bool {
        self.0.asked.load(Ordering::SeqCst)
    }

    /// Records that `done` of `total` is done.
    pub(crate) fn note(&self, done: u64, total: u64) {
        self.0.part.store(part(done, total), Ordering::Relaxed);
    }
}

/// Writes a line to standard error. A standard error that cannot be written changes neither the
/// exit code nor the work.
pub(crate) fn report(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Blocks the signals. To be called before any thread starts.
#[cfg(unix)]
pub(crate) fn block() {
    let _ = signals().thread_block();
}

/// Gives the signals their default actions again.
#[cfg(unix)]
pub(crate) fn unblock() {
    let _ = signals().thread_unblock();
}

/// Starts the thread that receives the signals. If it cannot be started, the signals have their
/// default actions.
#[cfg(unix)]
pub(crate) fn receive() {
    let signals = signals();
    let wait = move || {
        while let Ok(signal) = signals.wait() {
            handle(signals, signal);
        }
    };
    if std::thread::Builder::new().name("signals".to_owned()).spawn(wait).is_err() {
        unblock();
    }
}

#[cfg(not(unix))]
pub(crate) fn block() {}

#[cfg(not(unix))]
pub(crate) fn unblock() {}

#[cfg(not(unix))]
pub(crate) fn receive() {}

#[cfg(unix)]
fn handle(signals: SigSet, signal: Signal) {
    if signal == Signal::SIGUSR1 {
        report(&line(SHARED.part.load(Ordering::Relaxed)));
    } else if !SHARED.listening.load(Ordering::SeqCst) {
        // The signal is pending for this thread. Once it is unblocked here, its default action ends
        // the program.
        let _ = nix::sys::signal::raise(signal);
        let _ = signals.thread_unblock();
    } else if SHARED.asked.swap(true, Ordering::SeqCst) {
        std::process::exit(128 + signal as i32);
    }
}

/// Returns the signals that this program handles, without those that were ignored at its start. The
/// kernel keeps a signal that is both blocked and ignored for a thread that waits for it.
#[cfg(unix)]
fn signals() -> SigSet {
    let ignored = ignored();
    let handled = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGUSR1].into_iter();
    handled.filter(|signal| ignored >> (*signal as u32 - 1) & 1 == 0).collect()
}

/// Returns the ignored signals, the lowest bit for signal 1. The action of a signal can be read
/// without unsafe code on Linux only, from the process's status; elsewhere no signal counts as
/// ignored.
#[cfg(unix)]
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default()
}
