//! Ctrl-C: the first asks the merge to stop where the chain is whole, the second ends the program at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether the user asked to stop.
#[derive(Clone, Debug, Default)]
pub(crate) struct Interrupt(Arc<AtomicBool>);

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
        if signals.thread_block().is_err() {
            return;
        }
        let asked = Arc::clone(&self.0);
        let waiting = std::thread::Builder::new().spawn(move || {
            while let Ok(signal) = signals.wait() {
                if asked.swap(true, Ordering::SeqCst) {
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
        self.0.load(Ordering::SeqCst)
    }
}
