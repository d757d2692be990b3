//! One commit in the hypervisor, from its start, or from where it is found, to its end.
//!
//! ```text
//! Started -> Ready -> Pivoting -> done         the VM writes the top
//! Started -> done                              the VM only reads it
//!    any of them -> ended by us, vanished, or the VM is gone
//! ```
//! Only the VM's description tells that it is done: the top is not among the disk's files any more.

use std::time::Duration;

use super::executor::{OnTimeout, failed, position};
use super::hypervisor::{
    Commit, Disk, Event, FailureKind, Hypervisor, HypervisorError, Job, JobEvent, JobKind, Result as Answer,
};
use crate::merge::{Phase, Step};
use crate::vm::{Error, Result, VolumeFiles, Watch};

/// The longest time without a look at the job.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// The shortest: the first jobs of a chain are done at once.
const FIRST_LOOK: Duration = Duration::from_millis(10);
/// How often a refused switch is tried again, as the job may not be quite ready.
const PIVOTS: u32 = 10;
/// How often a job that vanished without effect may be waited for, and how long each time: its end shows in the description a
/// little later.
const LOOKS_AFTER_END: u32 = 40;
const LOOK_AFTER_END: Duration = Duration::from_millis(50);

/// A commit that is watched.
pub(super) struct Watcher<'a> {
    pub(super) hypervisor: &'a dyn Hypervisor,
    pub(super) place: &'a VolumeFiles,
    pub(super) commit: &'a Commit,
    /// The base's recorded name, for progress.
    pub(super) file: &'a str,
    pub(super) timeout: Option<Duration>,
    pub(super) on_timeout: OnTimeout,
    pub(super) watch: &'a dyn Watch,
}

/// A commit that was seen through.
pub(super) struct Done {
    /// The disk as it is now.
    pub(super) disk: Disk,
    /// The base's place among its files.
    pub(super) base: usize,
    /// How many bytes the job has moved, as far as it was seen.
    pub(super) moved: u64,
}

/// What a look at the disk tells.
enum Seen {
    /// The base is among its files, at this place, and the top is not.
    Done(Box<Disk>, usize),
    /// The top is there; whether the VM can be switched over.
    Pending { ready: bool },
    /// The VM or its disk is not there, or the disk has other files.
    Gone,
}

impl Watcher<'_> {
    /// Starts the commit, unless it is running or done, and sees it through.
    pub(super) fn run(&self) -> Result<Done> {
        let start = self.hypervisor.now();
        self.begin()?;
        let mut pause = FIRST_LOOK;
        let mut pivots = 0;
        let mut last_word = None;
        let mut moved = 0;
        while let Some(job) = self.job()? {
            self.tell(job);
            moved = job.done;
            if self.commit.active && self.is_ready()? {
                if self.pivot(&mut pivots)? {
                    break;
                }
                pause = FIRST_LOOK;
            }
            self.stop_if_wanted(start)?;
            self.wait(pause, &mut last_word);
            pause = (pause * 2).min(LOOK_EVERY);
        }
        let (disk, base) = self.ended(last_word)?;
        Ok(Done { disk, base, moved })
    }

    /// Waits for something to happen to the job, and keeps what was heard of it last. Of whatever else is heard, and of a stop,
    /// the next look tells.
    fn wait(&self, at_most: Duration, last_word: &mut Option<JobEvent>) {
        if let Some(Event::Job { disk, event }) = self.hypervisor.wait(&self.commit.disk, at_most)
            && disk == self.commit.disk
        {
            *last_word = Some(event);
        }
    }

    fn what(&self) -> String {
        let Commit { disk, top, base, .. } = self.commit;
        format!("committing {} into {} on disk {disk}", top.display(), base.display())
    }

    /// What the hypervisor could not do, or say.
    fn failed(&self, error: HypervisorError) -> Error {
        if error.kind == FailureKind::Gone { self.lost() } else { failed(&self.what(), error) }
    }

    fn job(&self) -> Result<Option<Job>> {
        self.hypervisor.job(&self.commit.disk).map_err(|error| self.failed(error))
    }

    /// Starts the job, or takes over the one that is running. After an answer that said nothing, the job tells.
    fn begin(&self) -> Result<()> {
        if let Some(job) = self.job()? {
            return self.adopt(job);
        }
        self.watch.before_start()?;
        let Err(error) = self.hypervisor.commit(self.commit) else { return Ok(()) };
        match self.job()? {
            Some(job) => self.adopt(job),
            // A small one may be done already.
            None if matches!(self.look(), Ok(Seen::Done(..))) => Ok(()),
            None => Err(self.failed(error)),
        }
    }

    /// Takes over a job that somebody else started, if it is this one, at the rate that is wanted now: one whose limit is
    /// below what the guest writes would never be ready.
    fn adopt(&self, job: Job) -> Result<()> {
        let kind = if self.commit.active { JobKind::ActiveCommit } else { JobKind::Commit };
        let disk = self.description_of_disk().map_err(|error| self.failed(error))?;
        let mirror = disk.and_then(|disk| disk.mirror);
        let same_base = mirror.is_none_or(|mirror| self.place.leads_to(&mirror.path, &self.commit.base));
        if job.kind == kind && same_base {
            return self.unless_over(self.hypervisor.set_rate_limit(&self.commit.disk, self.commit.rate_limit));
        }
        let why = format!("another job is running on the disk ({:?})", job.kind);
        Err(self.failed(HypervisorError::new(FailureKind::Failed, why)))
    }

    fn description_of_disk(&self) -> Answer<Option<Disk>> {
        let description = self.hypervisor.describe()?;
        let mut disks = description.disks.into_iter();
        Ok(disks.find(|disk| disk.name == self.commit.disk).filter(|_| description.running))
    }

    fn look(&self) -> Answer<Seen> {
        let Some(disk) = self.description_of_disk()? else { return Ok(Seen::Gone) };
        let Commit { top, base, .. } = self.commit;
        Ok(match (position(&disk, top, self.place), position(&disk, base, self.place)) {
            (Some(_), _) => {
                let ready = disk.mirror.is_some_and(|mirror| mirror.ready && self.place.leads_to(&mirror.path, base));
                Seen::Pending { ready }
            }
            (None, Some(base)) => Seen::Done(Box::new(disk), base),
            (None, None) => Seen::Gone,
        })
    }

    fn tell(&self, job: Job) {
        let step = Step { phase: Phase::Copying, done: job.done, total: job.total, file: self.file };
        self.watch.step(&step);
    }

    /// Whether the VM can be switched over: only the description says so. Of a guest that writes all the time the job is never
    /// quite done, and is ready all the same.
    fn is_ready(&self) -> Result<bool> {
        match self.look().map_err(|error| self.failed(error))? {
            Seen::Pending { ready } => Ok(ready),
            Seen::Done(..) => Ok(false),
            Seen::Gone => Err(self.lost()),
        }
    }

    /// Switches the VM over. Whatever is answered, the description tells whether it was done.
    fn pivot(&self, tried: &mut u32) -> Result<bool> {
        self.watch.before_switch()?;
        let Err(error) = self.hypervisor.pivot(&self.commit.disk) else { return Ok(true) };
        match self.look() {
            Ok(Seen::Done(..)) => Ok(true),
            Ok(Seen::Gone) => Err(self.lost()),
            Ok(Seen::Pending { .. }) => {
                *tried += 1;
                if *tried < PIVOTS { Ok(false) } else { Err(self.failed(error)) }
            }
            Err(_) => Err(Error::Uncertain { what: self.what(), source: Some(Box::new(error)) }),
        }
    }

    /// The job is not there any more: whether it was done, the description tells, perhaps a little later.
    fn ended(&self, mut last_word: Option<JobEvent>) -> Result<(Disk, usize)> {
        for _ in 0..LOOKS_AFTER_END {
            match self.look().map_err(|error| self.failed(error))? {
                Seen::Done(disk, base) => return Ok((*disk, base)),
                Seen::Gone => return Err(self.lost()),
                Seen::Pending { .. } if matches!(last_word, Some(JobEvent::Failed | JobEvent::Cancelled)) => break,
                Seen::Pending { .. } => self.wait(LOOK_AFTER_END, &mut last_word),
            }
        }
        let why = match last_word {
            Some(JobEvent::Cancelled) => "the job was ended by somebody else",
            Some(JobEvent::Failed) => "the job failed",
            _ => "the job vanished, and the disk has the files that it had",
        };
        Err(self.failed(HypervisorError::new(FailureKind::Failed, why)))
    }

    fn lost(&self) -> Error {
        let why = "the VM was stopped, or its disk has other files; the merge can be resumed";
        failed(&self.what(), HypervisorError::new(FailureKind::Gone, why))
    }

    /// Stops where the caller wants that, or after the time that it allows.
    fn stop_if_wanted(&self, start: Duration) -> Result<()> {
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

    /// What was answered about the job, which may be over by itself.
    fn unless_over(&self, answer: Answer<()>) -> Result<()> {
        let Err(error) = answer else { return Ok(()) };
        if self.job()?.is_none() { Ok(()) } else { Err(self.failed(error)) }
    }
}
