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
use crate::vm::{Error, Place, Result, Watch};

/// The longest time without a look at the job.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// The shortest: the first jobs of a chain are done at once.
const FIRST_LOOK: Duration = Duration::from_millis(10);
/// How often a refused switch is tried again, as the job may not be quite ready.
const PIVOTS: u32 = 10;
/// How often a job that vanished without effect may be waited for: its end shows in the description a little later.
const LOOKS_AFTER_END: u32 = 40;

/// A commit that is watched.
pub(super) struct Watcher<'a> {
    pub(super) hypervisor: &'a dyn Hypervisor,
    pub(super) place: &'a Place,
    pub(super) commit: &'a Commit,
    /// The base's recorded name, for progress.
    pub(super) file: &'a str,
    pub(super) timeout: Option<Duration>,
    pub(super) on_timeout: OnTimeout,
    pub(super) watch: &'a dyn Watch,
}

/// What a look at the disk tells.
enum Seen {
    /// The top is not among its files.
    Done(Box<Disk>),
    /// The top is there; whether the VM can be switched over.
    Pending { ready: bool },
    /// The VM, or its disk, is not there.
    Gone,
}

impl Watcher<'_> {
    /// Starts the commit, unless it is running or done, and sees it through. Returns the disk as it is then, and how
    /// many bytes the job has moved as far as it was seen.
    pub(super) fn run(&self) -> Result<(Box<Disk>, u64)> {
        let start = self.hypervisor.now();
        self.begin()?;
        let mut pause = FIRST_LOOK;
        let mut pivots = 0;
        let mut last_word = None;
        let mut moved = 0;
        loop {
            let job = match self.hypervisor.job(&self.commit.disk) {
                Ok(Some(job)) => job,
                Ok(None) => return Ok((self.ended(last_word)?, moved)),
                Err(error) if error.kind == FailureKind::Gone => return Err(self.lost()),
                Err(error) => return Err(failed(&self.what(), error)),
            };
            self.tell(job);
            moved = job.done;
            if self.commit.active && self.is_ready()? {
                if self.pivot(&mut pivots)? {
                    return Ok((self.ended(None)?, moved));
                }
                pause = FIRST_LOOK;
            }
            self.stop_if_wanted(start)?;
            match self.hypervisor.wait(&self.commit.disk, pause) {
                Some(Event::Stopped) => return Ok((self.gone()?, moved)),
                Some(Event::Job { disk, event }) if disk == self.commit.disk => last_word = Some(event),
                _ => {}
            }
            pause = (pause * 2).min(LOOK_EVERY);
        }
    }

    fn what(&self) -> String {
        let Commit { disk, top, base, .. } = self.commit;
        format!("committing {} into {} on disk {disk}", top.display(), base.display())
    }

    /// Starts the job, or takes over the one that is running. After an answer that said nothing, the job tells.
    fn begin(&self) -> Result<()> {
        if let Some(job) = self.running_job()? {
            return self.adopt(job);
        }
        self.watch.before_start()?;
        let Err(error) = self.hypervisor.commit(self.commit) else { return Ok(()) };
        match self.running_job()? {
            Some(job) => self.adopt(job),
            // A small one may be done already.
            None if matches!(self.look(), Ok(Seen::Done(_))) => Ok(()),
            None if error.kind == FailureKind::Gone => Err(self.lost()),
            None => Err(failed(&self.what(), error)),
        }
    }

    fn running_job(&self) -> Result<Option<Job>> {
        match self.hypervisor.job(&self.commit.disk) {
            Err(error) if error.kind == FailureKind::Gone => Err(self.lost()),
            asked => asked.map_err(|error| failed(&self.what(), error)),
        }
    }

    /// Takes over a job that somebody else started, if it is this one.
    fn adopt(&self, job: Job) -> Result<()> {
        let kind = if self.commit.active { JobKind::ActiveCommit } else { JobKind::Commit };
        let same_base = match self.description_of_disk().map_err(|error| failed(&self.what(), error))? {
            Some(disk) => disk.mirror.is_none_or(|mirror| self.place.leads_to(&mirror.path, &self.commit.base)),
            None => true,
        };
        if job.kind == kind && same_base {
            return Ok(());
        }
        let why = format!("another job is running on the disk ({:?})", job.kind);
        Err(failed(&self.what(), HypervisorError::new(FailureKind::Failed, why)))
    }

    fn description_of_disk(&self) -> Answer<Option<Disk>> {
        let description = self.hypervisor.describe()?;
        let mut disks = description.disks.into_iter();
        Ok(disks.find(|disk| disk.name == self.commit.disk).filter(|_| description.running))
    }

    fn look(&self) -> Answer<Seen> {
        let Some(disk) = self.description_of_disk()? else { return Ok(Seen::Gone) };
        if position(&disk, &self.commit.top, self.place).is_none() {
            return Ok(Seen::Done(Box::new(disk)));
        }
        let base = &self.commit.base;
        let ready = disk.mirror.is_some_and(|mirror| mirror.ready && self.place.leads_to(&mirror.path, base));
        Ok(Seen::Pending { ready })
    }

    fn tell(&self, job: Job) {
        let step = Step { phase: Phase::Copying, done: job.done, total: job.total, file: self.file };
        self.watch.step(&step);
    }

    /// Whether the VM can be switched over: only the description says so. Of a guest that writes all the time the job is never
    /// quite done, and is ready all the same.
    fn is_ready(&self) -> Result<bool> {
        match self.look().map_err(|error| failed(&self.what(), error))? {
            Seen::Pending { ready } => Ok(ready),
            Seen::Done(_) => Ok(false),
            Seen::Gone => Err(self.lost()),
        }
    }

    /// Switches the VM over. Whatever is answered, the description tells whether it was done.
    fn pivot(&self, tried: &mut u32) -> Result<bool> {
        self.watch.before_switch()?;
        let Err(error) = self.hypervisor.pivot(&self.commit.disk) else { return Ok(true) };
        let uncertain = |error| Error::Uncertain { what: self.what(), source: Some(Box::new(error)) };
        match self.look() {
            Ok(Seen::Done(_)) => Ok(true),
            Ok(Seen::Gone) => Err(self.lost()),
            Ok(Seen::Pending { .. }) => {
                *tried += 1;
                if *tried < PIVOTS { Ok(false) } else { Err(failed(&self.what(), error)) }
            }
            Err(_) => Err(uncertain(error)),
        }
    }

    /// The job is not there any more: whether it was done, the description tells, perhaps a little later.
    fn ended(&self, last_word: Option<JobEvent>) -> Result<Box<Disk>> {
        for _ in 0..LOOKS_AFTER_END {
            match self.look().map_err(|error| failed(&self.what(), error))? {
                Seen::Done(disk) => return Ok(disk),
                Seen::Gone => return self.gone(),
                Seen::Pending { .. } => {}
            }
            if matches!(last_word, Some(JobEvent::Failed | JobEvent::Cancelled)) {
                break;
            }
            if self.hypervisor.wait(&self.commit.disk, FIRST_LOOK * 5) == Some(Event::Stopped) {
                return self.gone();
            }
        }
        let why = match last_word {
            Some(JobEvent::Cancelled) => "the job was ended by somebody else",
            Some(JobEvent::Failed) => "the job failed",
            _ => "the job vanished, and the disk has the files that it had",
        };
        Err(failed(&self.what(), HypervisorError::new(FailureKind::Failed, why)))
    }

    /// The VM is said to be gone; it may have been started again.
    fn gone(&self) -> Result<Box<Disk>> {
        match self.look() {
            Ok(Seen::Done(disk)) => Ok(disk),
            _ => Err(self.lost()),
        }
    }

    fn lost(&self) -> Error {
        let why = "the VM was stopped; the merge can be resumed";
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
        match self.hypervisor.abort(&self.commit.disk) {
            Ok(()) => Ok(()),
            // It may be over by itself.
            Err(error) => match self.hypervisor.job(&self.commit.disk) {
                Ok(None) => Ok(()),
                Err(gone) if gone.kind == FailureKind::Gone => Err(self.lost()),
                _ => Err(failed(&self.what(), error)),
            },
        }
    }
}
