//! One commit in the hypervisor, from its start or its takeover to its end.
//!
//! ```text
//! Started -> Ready -> Pivoting -> done         the top is the active file
//! Started -> done                              the VM only reads the top
//!    each of them -> ended by this program, vanished, or the VM stopped
//! ```
//! Only the VM's description decides that the commit is done: the top is no longer among the disk's
//! files.

use std::time::Duration;

use super::executor::{OnTimeout, failed, position};
use super::hypervisor::{
    Commit, Disk, Event, FailureKind, Hypervisor, HypervisorError, Job, JobEvent, JobKind, Result as Answer,
};
use crate::merge::{Phase, Step};
use crate::vm::{Error, Result, VolumeFiles, Watch};

/// The longest pause between two polls of the job.
const POLL_EVERY: Duration = Duration::from_millis(200);
/// The first pause. Small jobs are done at once.
const FIRST_POLL: Duration = Duration::from_millis(10);
/// The number of attempts to switch the VM. libvirt may refuse the first ones although the job is
/// ready.
const PIVOTS: u32 = 10;
/// The number of polls after the end of a job, and the pause between them. The description shows
/// the result a little later.
const POLLS_AFTER_END: u32 = 40;
const POLL_AFTER_END: Duration = Duration::from_millis(50);

/// Runs one commit.
pub(super) struct Watcher<'a> {
    pub(super) hypervisor: &'a dyn Hypervisor,
    pub(super) files: &'a VolumeFiles,
    pub(super) commit: &'a Commit,
    /// The base's recorded path, for progress reports.
    pub(super) file: &'a str,
    pub(super) timeout: Option<Duration>,
    pub(super) on_timeout: OnTimeout,
    pub(super) watch: &'a dyn Watch,
}

/// The result of a commit.
pub(super) struct Done {
    /// The disk after the commit.
    pub(super) disk: Disk,
    /// The base's index among the disk's files.
    pub(super) base: usize,
    /// The number of bytes that the job reported last.
    pub(super) moved: u64,
}

/// The state of the commit, by the description of the VM.
enum Seen {
    /// The disk has the base, at this index, and no longer the top.
    Done(Box<Disk>, usize),
    /// The disk has the top. `ready`: the VM can be switched to the base.
    Pending { ready: bool },
    /// The VM is off, or the disk has neither file.
    Gone,
}

impl Watcher<'_> {
    /// Starts the commit, unless it is running or done, and waits for its end.
    pub(super) fn run(&self) -> Result<Done> {
        let start = self.hypervisor.now();
        self.begin()?;
        let mut pause = FIRST_POLL;
        let mut pivots = 0;
        let mut last_event = None;
        let mut moved = 0;
        while let Some(job) = self.job()? {
            self.report(job);
            moved = job.done;
            if self.commit.active && self.is_ready()? {
                if self.pivot(&mut pivots)? {
                    break;
                }
                pause = FIRST_POLL;
            }
            self.stop_if_requested(start)?;
            self.wait(pause, &mut last_event);
            pause = (pause * 2).min(POLL_EVERY);
        }
        let (disk, base) = self.ended(last_event)?;
        Ok(Done { disk, base, moved })
    }

    /// Waits for an event and keeps the latest one of this disk. Other events, including a stop of
    /// the VM, are picked up by the next poll.
    fn wait(&self, at_most: Duration, last_event: &mut Option<JobEvent>) {
        if let Some(Event::Job { disk, event }) = self.hypervisor.wait(&self.commit.disk, at_most)
            && disk == self.commit.disk
        {
            *last_event = Some(event);
        }
    }

    /// Names the commit in errors.
    fn what(&self) -> String {
        let Commit { disk, top, base, .. } = self.commit;
        format!("committing {} into {} on disk {disk}", top.display(), base.display())
    }

    /// Converts a failure of the hypervisor.
    fn failed(&self, error: HypervisorError) -> Error {
        if error.kind == FailureKind::Gone { self.lost() } else { failed(&self.what(), error) }
    }

    fn job(&self) -> Result<Option<Job>> {
        self.hypervisor.job(&self.commit.disk).map_err(|error| self.failed(error))
    }

    /// Starts the job, or takes over the one that is running. If the answer is an error, the job's
    /// state decides.
    fn begin(&self) -> Result<()> {
        if let Some(job) = self.job()? {
            return self.adopt(job);
        }
        self.watch.before_start()?;
        let Err(error) = self.hypervisor.commit(self.commit) else { return Ok(()) };
        match self.job()? {
            Some(job) => self.adopt(job),
            // A small job may be done already.
            None if matches!(self.state(), Ok(Seen::Done(..))) => Ok(()),
            None => Err(self.failed(error)),
        }
    }

    /// Takes over a running job of another process, if it is the same commit. The job is journalled
    /// first: its owner may switch the VM at any time, and a recovery must then not merge again.
    /// The job gets the rate limit of this request, since a job whose limit is below the guest's
    /// write rate never becomes ready.
    fn adopt(&self, job: Job) -> Result<()> {
        let kind = if self.commit.active { JobKind::ActiveCommit } else { JobKind::Commit };
        let disk = self.description_of_disk().map_err(|error| self.failed(error))?;
        let mirror = disk.and_then(|disk| disk.mirror);
        let same_base = mirror.is_none_or(|mirror| self.files.leads_to(&mirror.path, &self.commit.base));
        if job.kind == kind && same_base {
            self.watch.before_start()?;
            return self.unless_over(self.hypervisor.set_rate_limit(&self.commit.disk, self.commit.rate_limit));
        }
        let why = format!("another job is running on the disk ({:?}); wait for it or end it", job.kind);
        Err(self.failed(HypervisorError::new(FailureKind::Failed, why)))
    }

    fn description_of_disk(&self) -> Answer<Option<Disk>> {
        let description = self.hypervisor.describe()?;
        let mut disks = description.disks.into_iter();
        Ok(disks.find(|disk| disk.name == self.commit.disk).filter(|_| description.running))
    }

    fn state(&self) -> Answer<Seen> {
        let Some(disk) = self.description_of_disk()? else { return Ok(Seen::Gone) };
        let Commit { top, base, .. } = self.commit;
        Ok(match (position(&disk, top, self.files), position(&disk, base, self.files)) {
            (Some(_), _) => {
                let ready = disk.mirror.is_some_and(|mirror| mirror.ready && self.files.leads_to(&mirror.path, base));
                Seen::Pending { ready }
            }
            (None, Some(base)) => Seen::Done(Box::new(disk), base),
            (None, None) => Seen::Gone,
        })
    }

    fn report(&self, job: Job) {
        let step = Step::new(Phase::Copying, job.done, job.total, self.file);
        self.watch.step(&step);
    }

    /// Returns true if the VM can be switched to the base. Only the description states that: while
    /// the guest writes, the job's numbers never become equal, although it is ready.
    fn is_ready(&self) -> Result<bool> {
        match self.state().map_err(|error| self.failed(error))? {
            Seen::Pending { ready } => Ok(ready),
            Seen::Done(..) => Ok(false),
            Seen::Gone => Err(self.lost()),
        }
    }

    /// Switches the VM to the base. Returns false if it was refused and can be tried again. If the
    /// answer is an error, the description decides.
    fn pivot(&self, tried: &mut u32) -> Result<bool> {
        self.watch.before_switch()?;
        let Err(error) = self.hypervisor.pivot(&self.commit.disk) else { return Ok(true) };
        match self.state() {
            Ok(Seen::Done(..)) => Ok(true),
            Ok(Seen::Gone) => Err(self.lost()),
            Ok(Seen::Pending { .. }) => {
                *tried += 1;
                if *tried < PIVOTS { Ok(false) } else { Err(self.failed(error)) }
            }
            Err(_) => Err(Error::Uncertain { what: self.what(), source: Some(Box::new(error)) }),
        }
    }

    /// Determines the result of a job that is gone. The description shows it, perhaps a little
    /// later.
    fn ended(&self, mut last_event: Option<JobEvent>) -> Result<(Disk, usize)> {
        for _ in 0..POLLS_AFTER_END {
            match self.state().map_err(|error| self.failed(error))? {
                Seen::Done(disk, base) => return Ok((*disk, base)),
                Seen::Gone => return Err(self.lost()),
                Seen::Pending { .. } if matches!(last_event, Some(JobEvent::Failed | JobEvent::Cancelled)) => break,
                Seen::Pending { .. } => self.wait(POLL_AFTER_END, &mut last_event),
            }
        }
        let why = match last_event {
            Some(JobEvent::Cancelled) => "the job was ended by another program",
            Some(JobEvent::Failed) => "the job failed",
            _ => "the job vanished, and the disk kept its files",
        };
        Err(self.failed(HypervisorError::new(FailureKind::Failed, why)))
    }

    fn lost(&self) -> Error {
        let why = "the VM stopped, or its disk has other files; the merge can be resumed";
        failed(&self.what(), HypervisorError::new(FailureKind::Gone, why))
    }

    /// Stops if the caller requested it, or if the time limit passed.
    fn stop_if_requested(&self, start: Duration) -> Result<()> {
        if self.watch.is_cancelled() {
            self.abort()?;
            return Err(Error::Cancelled);
        }
        let after = self.hypervisor.now().saturating_sub(start);
        if self.timeout.is_none_or(|timeout| after < timeout) {
            return Ok(());
        }
        let running = self.on_timeout == OnTimeout::Keep;
        if !running {
            self.abort()?;
        }
        Err(Error::TimedOut { disk: self.commit.disk.clone(), after, running })
    }

    fn abort(&self) -> Result<()> {
        self.unless_over(self.hypervisor.abort(&self.commit.disk))
    }

    /// Ignores an error if the job ended by itself.
    fn unless_over(&self, answer: Answer<()>) -> Result<()> {
        let Err(error) = answer else { return Ok(()) };
        if self.job()?.is_none() { Ok(()) } else { Err(self.failed(error)) }
    }
}
