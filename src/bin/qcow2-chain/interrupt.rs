//! What a user asks of a verb at work. Ctrl-C: the first asks it to stop where the chain is whole, the second ends the
//! program at once. SIGUSR1: how far it is.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

#[cfg(unix)]
use crate::progress::line;
use crate::progress::part;

/// Whether the user asked to stop, and what to answer the question how far it is.
#[derive(Clone, Debug, Default)]
pub(crate) struct Interrupt(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    asked: AtomicBool,
    /// In hundredths of a percent.
    part: AtomicU64,
}

impl Interrupt {
    /// Listens from here on. To be called before any other thread is started: the signals are taken by one that waits for
    /// them. Where that cannot be had, they end the program as ever, which a chain survives too.
    pub(crate) fn listen() -> Self {
        let interrupt = Self::default();
        #[cfg(unix)]
        interrupt.wait_in_a_thread();
        interrupt
    }

    #[cfg(unix)]
    fn wait_in_a_thread(&self) {
        use nix::sys::signal::{SigSet, Signal};
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGINT);
        signals.add(Signal::SIGTERM);
        signals.add(Signal::SIGUSR1);
        if signals.thread_block().is_err() {
            return;
        }
        let shared = Arc::clone(&self.0);
        let waiting = std::thread::Builder::new().spawn(move || {
            while let Ok(signal) = signals.wait() {
                if signal == Signal::SIGUSR1 {
                    eprintln!("{}", line(shared.part.load(Ordering::Relaxed)));
                } else if shared.asked.swap(true, Ordering::SeqCst) {
                    std::process::exit(128 + signal as i32);
                }
            }
        });
        if waiting.is_err() {
            // Nobody would hear them.
            let _ = signals.thread_unblock();
        }
    }

    /// Whether the user asked by now.
    pub(crate) fn asked(&self) -> bool {
        self.0.asked.load(Ordering::SeqCst)
    }

    /// Notes that `done` of `total` is done.
    pub(crate) fn note(&self, done: u64, total: u64) {
        self.0.part.store(part(done, total), Ordering::Relaxed);
    }
}
