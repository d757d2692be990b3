//! The event loop that libvirt needs, and a queue of the events of one domain.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use virt::event::{event_register_default_impl, event_run_default_impl};
use virt::sys;

use crate::live::{Event, FailureKind, HypervisorError, JobEvent, Result};

/// The largest number of events that are kept for one disk. The oldest ones are discarded first.
const KEPT: usize = 16;

/// The events of one domain that [`Mailbox::wait`] has not returned yet.
#[derive(Debug)]
pub(super) struct Mailbox {
    domain: String,
    inside: Mutex<Inside>,
    arrived: Condvar,
}

#[derive(Debug, Default)]
struct Inside {
    jobs: BTreeMap<String, VecDeque<JobEvent>>,
    /// The number of stops of the domain, and the number that was reported to the waiter of each
    /// disk.
    stops: u64,
    reported: BTreeMap<String, u64>,
}

impl Mailbox {
    /// Creates an empty queue for the domain of this name or UUID.
    pub(super) fn new(domain: &str) -> Self {
        Self { domain: domain.to_owned(), inside: Mutex::default(), arrived: Condvar::new() }
    }

    /// Returns the name or UUID of the domain.
    pub(super) fn domain(&self) -> &str {
        &self.domain
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a change of a block job (`virConnectDomainEventBlockJobStatus`). Unknown values are
    /// ignored.
    pub(super) fn job(&self, disk: &str, status: i32) {
        let event = match u32::try_from(status) {
            Ok(sys::VIR_DOMAIN_BLOCK_JOB_COMPLETED) => JobEvent::Completed,
            Ok(sys::VIR_DOMAIN_BLOCK_JOB_FAILED) => JobEvent::Failed,
            Ok(sys::VIR_DOMAIN_BLOCK_JOB_CANCELED) => JobEvent::Cancelled,
            Ok(sys::VIR_DOMAIN_BLOCK_JOB_READY) => JobEvent::Ready,
            _ => return,
        };
        let mut inside = self.lock();
        let kept = inside.jobs.entry(disk.to_owned()).or_default();
        kept.push_back(event);
        if kept.len() > KEPT {
            kept.pop_front();
        }
        self.arrived.notify_all();
    }

    /// Counts a stop or crash of the domain. Other events of its life cycle (`virDomainEventType`)
    /// are ignored.
    pub(super) fn lifecycle(&self, event: i32) {
        if matches!(u32::try_from(event), Ok(sys::VIR_DOMAIN_EVENT_STOPPED | sys::VIR_DOMAIN_EVENT_CRASHED)) {
            self.lock().stops += 1;
            self.arrived.notify_all();
        }
    }

    /// Discards the events of earlier jobs on a disk.
    pub(super) fn forget(&self, disk: &str) {
        self.lock().jobs.remove(disk);
    }

    /// Waits for an event of a job on a disk, or for a stop of the domain. Returns `None` when the
    /// time is over.
    pub(super) fn wait(&self, disk: &str, at_most: Duration) -> Option<Event> {
        let end = Instant::now() + at_most;
        let mut inside = self.lock();
        loop {
            if let Some(event) = inside.jobs.get_mut(disk).and_then(VecDeque::pop_front) {
                return Some(Event::Job { disk: disk.to_owned(), event });
            }
            // Each waiter receives a stop once: it then reads the domain's state, and the domain
            // may run again by then.
            let stops = inside.stops;
            if inside.reported.insert(disk.to_owned(), stops).unwrap_or(0) < stops {
                return Some(Event::Stopped);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            inside = self.arrived.wait_timeout(inside, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Starts libvirt's event loop on a thread of this library, once in a process. Call this before
/// opening a connection.
///
/// # Errors
/// [`FailureKind::Unreachable`]: libvirt refused the registration, or the thread cannot be started.
/// The next call tries again.
pub(super) fn run_loop() -> Result<()> {
    static RUNNING: Mutex<bool> = Mutex::new(false);
    let mut running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
    if *running {
        return Ok(());
    }
    let failed = |why: String| HypervisorError::new(FailureKind::Unreachable, format!("libvirt's event loop: {why}"));
    event_register_default_impl().map_err(|error| failed(error.message().to_owned()))?;
    // The thread ends with the process, as libvirt's registration does.
    let run = || {
        loop {
            if event_run_default_impl().is_err() {
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    };
    without_signals(|| std::thread::Builder::new().name("libvirt events".to_owned()).spawn(run))
        .map_err(|error| failed(error.to_string()))?;
    *running = true;
    Ok(())
}

/// Runs `start` with all signals blocked in this thread, so that a thread that it starts receives
/// none. The signals of the process belong to the program: a thread of a library that has them
/// unblocked would run their default action.
pub(super) fn without_signals<T>(start: impl FnOnce() -> T) -> T {
    #[cfg(unix)]
    {
        use nix::sys::signal::{SigSet, SigmaskHow};
        let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK);
        let started = start();
        if let Ok(before) = before {
            // Cannot fail: the mask was valid before.
            let _ = before.thread_set_mask();
        }
        started
    }
    #[cfg(not(unix))]
    start()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(status: u32) -> i32 {
        i32::try_from(status).unwrap()
    }

    #[test]
    fn events_are_queued_per_disk_and_stops_for_all() {
        let mailbox = Mailbox::new("vm");
        mailbox.job("vda", status(sys::VIR_DOMAIN_BLOCK_JOB_READY));
        mailbox.job("vda", status(sys::VIR_DOMAIN_BLOCK_JOB_COMPLETED));
        mailbox.job("vda", 99);
        let of = |disk: &str| mailbox.wait(disk, Duration::ZERO);
        assert_eq!(of("vdb"), None);
        assert_eq!(of("vda"), Some(Event::Job { disk: "vda".into(), event: JobEvent::Ready }));
        assert_eq!(of("vda"), Some(Event::Job { disk: "vda".into(), event: JobEvent::Completed }));
        assert_eq!(of("vda"), None);
        mailbox.lifecycle(status(sys::VIR_DOMAIN_EVENT_STOPPED));
        assert_eq!((of("vda"), of("vdb")), (Some(Event::Stopped), Some(Event::Stopped)));
        assert_eq!((of("vda"), of("vdb")), (None, None), "once");
        mailbox.lifecycle(status(sys::VIR_DOMAIN_EVENT_UNDEFINED));
        assert_eq!(of("vda"), None, "an undefined domain may be running");
    }

    #[test]
    fn unread_events_are_limited() {
        let mailbox = Mailbox::new("vm");
        for _ in 0..3 * KEPT {
            mailbox.job("vda", status(sys::VIR_DOMAIN_BLOCK_JOB_FAILED));
        }
        assert_eq!(mailbox.lock().jobs["vda"].len(), KEPT);
        mailbox.forget("vda");
        assert_eq!(mailbox.wait("vda", Duration::ZERO), None);
    }

    #[cfg(unix)]
    #[test]
    fn library_threads_block_signals() {
        use nix::sys::signal::{SigSet, Signal};
        let mask = || SigSet::thread_get_mask().unwrap();
        let before = mask();
        let thread = without_signals(|| std::thread::spawn(mask));
        assert!(thread.join().unwrap().contains(Signal::SIGINT));
        assert_eq!(mask().contains(Signal::SIGINT), before.contains(Signal::SIGINT), "the caller's mask is restored");
    }
}
