//! What libvirt tells by itself, kept until somebody waits for it; and the loop that receives it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use virt::event::{event_register_default_impl, event_run_default_impl};
use virt::sys;

use crate::live::{Event, JobEvent};

/// How much is kept of a disk that nobody waits for.
const KEPT: usize = 16;

/// The events of one domain.
#[derive(Debug)]
pub(super) struct Mailbox {
    domain: String,
    inside: Mutex<Inside>,
    arrived: Condvar,
}

#[derive(Debug, Default)]
struct Inside {
    jobs: BTreeMap<String, VecDeque<JobEvent>>,
    /// How often the domain stopped, and how many of these each disk's waiter has heard of.
    stops: u64,
    heard: BTreeMap<String, u64>,
}

impl Mailbox {
    pub(super) fn new(domain: &str) -> Self {
        Self { domain: domain.to_owned(), inside: Mutex::default(), arrived: Condvar::new() }
    }

    pub(super) fn domain(&self) -> &str {
        &self.domain
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A block job came to something (`virConnectDomainEventBlockJobStatus`).
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

    /// The domain started, stopped, or something else (`virDomainEventType`).
    pub(super) fn lifecycle(&self, event: i32) {
        if matches!(u32::try_from(event), Ok(sys::VIR_DOMAIN_EVENT_STOPPED | sys::VIR_DOMAIN_EVENT_CRASHED)) {
            self.lock().stops += 1;
            self.arrived.notify_all();
        }
    }

    /// Forgets what an earlier job on a disk came to.
    pub(super) fn forget(&self, disk: &str) {
        self.lock().jobs.remove(disk);
    }

    /// Waits for something about a disk, or for the domain to stop.
    pub(super) fn wait(&self, disk: &str, at_most: Duration) -> Option<Event> {
        let end = Instant::now() + at_most;
        let mut inside = self.lock();
        loop {
            if let Some(event) = inside.jobs.get_mut(disk).and_then(VecDeque::pop_front) {
                return Some(Event::Job { disk: disk.to_owned(), event });
            }
            // Each hears of a stop once: it is for a look, and the domain may be running again.
            let stops = inside.stops;
            if inside.heard.insert(disk.to_owned(), stops).unwrap_or(0) < stops {
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

/// Starts libvirt's own event loop on a thread of its own, once in a process. Must be called before connections are opened.
pub(super) fn run_loop() -> Result<(), virt::error::Error> {
    static RUNNING: OnceLock<Result<(), virt::error::Error>> = OnceLock::new();
    let start = || {
        event_register_default_impl()?;
        // Ends with the process: libvirt's registration does too.
        let run = || {
            loop {
                if event_run_default_impl().is_err() {
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        };
        // Without a thread events do not come, and what waits for them looks by itself.
        let _ = std::thread::Builder::new().name("libvirt events".to_owned()).spawn(run);
        Ok(())
    };
    RUNNING.get_or_init(start).clone()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(status: u32) -> i32 {
        i32::try_from(status).unwrap()
    }

    #[test]
    fn each_disk_hears_of_its_own_jobs_in_order_and_all_hear_of_a_stop() {
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
        assert_eq!(of("vda"), None, "a domain that is undefined may be running");
    }

    #[test]
    fn what_nobody_waits_for_is_not_kept_for_ever() {
        let mailbox = Mailbox::new("vm");
        for _ in 0..3 * KEPT {
            mailbox.job("vda", status(sys::VIR_DOMAIN_BLOCK_JOB_FAILED));
        }
        assert_eq!(mailbox.lock().jobs["vda"].len(), KEPT);
        mailbox.forget("vda");
        assert_eq!(mailbox.wait("vda", Duration::ZERO), None);
    }
}
