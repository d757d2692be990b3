//! Running VMs under libvirt (feature `libvirt`, which links libvirt's C library).
//!
//! [`Libvirt`] is the [`Hypervisor`] of one domain. What it is asked for becomes one call of libvirt's; what it answers is read from the
//! domain's XML. It decides nothing. docs/live.md says which versions and permissions it needs.
//!
//! ```no_run
//! use std::sync::Arc;
//! use qcow2_chain::libvirt::{Libvirt, Listening};
//! use qcow2_chain::live::LiveExecutor;
//! use qcow2_chain::vm::{SnapshotOptions, SnapshotSet};
//!
//! let domain = Libvirt::connect("qemu:///system", "web1", Listening::OwnLoop)?;
//! let set = SnapshotSet::load("/vm/web1.json")?.with_executor(Arc::new(LiveExecutor::new(Arc::new(domain))));
//! set.create("before the upgrade", &SnapshotOptions::default().with_quiesce(true))?;
//! set.delete("before the upgrade", &Default::default(), &())?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod events;
mod raw;
mod xml;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use virt::connect::Connect;
use virt::domain::Domain;
use virt::domain_snapshot::DomainSnapshot;
use virt::error::{Error, ErrorNumber};
use virt::sys;

use self::events::Mailbox;
use crate::live::{Commit, Description, Event, FailureKind, Hypervisor, HypervisorError, Job, JobKind, NewTop, Result};

/// How a libvirtd that died is noticed: asked every so many seconds, given up after so many questions.
const KEEP_ALIVE: (i32, u32) = (5, 5);

/// How events come in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Listening {
    /// Through libvirt's own event loop, which runs on a thread of this library from the first connection on.
    #[default]
    OwnLoop,
    /// Through an event loop that the program has registered with libvirt and runs itself.
    CallersLoop,
    /// Not at all: the state of jobs is asked for some times a second.
    Poll,
}

/// A domain of a libvirt.
#[derive(Debug)]
pub struct Libvirt {
    uri: String,
    domain: String,
    listening: Listening,
    mailbox: Arc<Mailbox>,
    connection: Mutex<Connect>,
}

impl Libvirt {
    /// Connects to a libvirt (such as `qemu:///system`) for the domain of this name or UUID. The domain need not exist yet.
    ///
    /// # Errors
    /// What connecting gives.
    pub fn connect(uri: impl Into<String>, domain: impl Into<String>, listening: Listening) -> Result<Self> {
        let (uri, domain) = (uri.into(), domain.into());
        if uri.contains('\0') || domain.contains('\0') {
            return Err(HypervisorError::new(FailureKind::Failed, "a URI or a domain's name has no zero bytes"));
        }
        let mailbox = Arc::new(Mailbox::new(&domain));
        let connection = Mutex::new(open(&uri, listening, &mailbox)?);
        Ok(Self { uri, domain, listening, mailbox, connection })
    }

    /// The connection; a new one where the last one broke.
    fn connection(&self) -> Result<Connect> {
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        if !connection.is_alive().unwrap_or(false) {
            *connection = open(&self.uri, self.listening, &self.mailbox)?;
        }
        Ok(connection.clone())
    }

    /// The domain, where there is one.
    fn find(&self, connection: &Connect) -> Result<Option<Domain>> {
        // A name goes before a UUID.
        let found = Domain::lookup_by_name(connection, &self.domain)
            .or_else(|error| Domain::lookup_by_uuid_string(connection, &self.domain).map_err(|_| error));
        match found {
            Ok(domain) => Ok(Some(domain)),
            Err(error) if error.code() == ErrorNumber::NoDomain => Ok(None),
            Err(error) => Err(unreachable(&error)),
        }
    }

    /// Asks the domain something. An error is told apart by what has become of the connection and the domain.
    fn ask<T>(&self, call: impl FnOnce(&Domain) -> raw::Result<T>) -> Result<T> {
        let connection = self.connection()?;
        let gone = |message: String| HypervisorError::new(FailureKind::Gone, message);
        let found = self.find(&connection)?;
        let domain = found.ok_or_else(|| gone(format!("there is no domain {}", self.domain)))?;
        let error = match call(&domain) {
            Ok(answer) => return Ok(answer),
            Err(Some(error)) => error,
            Err(None) => return Err(HypervisorError::new(FailureKind::Failed, "a name or path has a zero byte")),
        };
        if !connection.is_alive().unwrap_or(false) {
            return Err(unreachable(&error));
        }
        match self.find(&connection) {
            Err(error) => Err(error),
            Ok(None) => Err(gone(error.message().to_owned())),
            Ok(Some(domain)) => match domain.is_active() {
                Ok(false) => Err(gone(error.message().to_owned())),
                _ => Err(HypervisorError::new(kind(&error), error.message())),
            },
        }
    }

    fn xml(&self) -> Result<Option<(bool, String)>> {
        let connection = self.connection()?;
        let Some(domain) = self.find(&connection)? else { return Ok(None) };
        let read = || {
            let running = domain.is_active()?;
            let flags = if running { 0 } else { sys::VIR_DOMAIN_XML_INACTIVE };
            Ok((running, domain.get_xml_desc(flags)?))
        };
        match read() {
            Ok(found) => Ok(Some(found)),
            Err(error) if Error::code(&error) == ErrorNumber::NoDomain => Ok(None),
            Err(error) => Err(unreachable(&error)),
        }
    }
}

fn open(uri: &str, listening: Listening, mailbox: &Arc<Mailbox>) -> Result<Connect> {
    if listening == Listening::OwnLoop {
        events::run_loop().map_err(|error| unreachable(&error))?;
    }
    let connection = Connect::open(Some(uri)).map_err(|error| unreachable(&error))?;
    raw::print_no_errors(&connection);
    if listening != Listening::Poll {
        let (interval, count) = KEEP_ALIVE;
        // Some drivers have no such thing, those in this process among them.
        let _ = connection.set_keep_alive(interval, count);
        raw::register_events(&connection, mailbox).map_err(|error| {
            let message = error.map_or_else(String::new, |error| error.message().to_owned());
            HypervisorError::new(FailureKind::Unreachable, message)
        })?;
    }
    Ok(connection)
}

fn unreachable(error: &Error) -> HypervisorError {
    HypervisorError::new(FailureKind::Unreachable, error.message())
}

/// What kind of failure an error of a libvirt that answers and of a domain that runs is.
fn kind(error: &Error) -> FailureKind {
    let says = |words: &str| error.message().contains(words);
    match error.code() {
        ErrorNumber::ArgumentUnsupported if says("agent") => FailureKind::NoAgent,
        ErrorNumber::AgentUnresponsive if says("not connected") || says("not configured") => FailureKind::NoAgent,
        ErrorNumber::AgentUnresponsive | ErrorNumber::AgentUnsynced | ErrorNumber::AgentCommandTimeout => {
            FailureKind::AgentTimeout
        }
        _ => FailureKind::Failed,
    }
}

fn text(path: &std::path::Path) -> Result<&str> {
    let refused = || format!("{}: libvirt takes UTF-8 paths only", path.display());
    path.to_str().ok_or_else(|| HypervisorError::new(FailureKind::Failed, refused()))
}

/// The flags of `virDomainSnapshotCreateXML` for a snapshot of disks alone, into files that exist.
fn snapshot_flags(quiesce: bool) -> u32 {
    let mut flags = sys::VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
        | sys::VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
        | sys::VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
        | sys::VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT;
    if quiesce {
        flags |= sys::VIR_DOMAIN_SNAPSHOT_CREATE_QUIESCE;
    }
    flags
}

impl Hypervisor for Libvirt {
    fn describe(&self) -> Result<Description> {
        let Some((running, xml)) = self.xml()? else { return Ok(Description::default()) };
        let disks = xml::disks(&xml).map_err(|why| HypervisorError::new(FailureKind::Failed, why))?;
        Ok(Description { running, disks: disks.known })
    }

    fn snapshot(&self, tops: &[NewTop], quiesce: bool) -> Result<()> {
        let failed = |why| HypervisorError::new(FailureKind::Failed, why);
        let gone = || HypervisorError::new(FailureKind::Gone, format!("there is no domain {}", self.domain));
        let (_, xml) = self.xml()?.ok_or_else(gone)?;
        let all = xml::disks(&xml).map_err(failed)?.names;
        let xml = xml::snapshot(tops, &all).map_err(failed)?;
        self.ask(|domain| DomainSnapshot::create_xml(domain, &xml, snapshot_flags(quiesce)).map_err(Some))?;
        Ok(())
    }

    fn set_agent_timeout(&self, at_most: Duration) -> Result<()> {
        let seconds = i32::try_from(at_most.as_secs().max(1)).unwrap_or(i32::MAX);
        self.ask(|domain| raw::agent_set_response_timeout(domain, seconds))
    }

    fn thaw(&self) -> Result<()> {
        self.ask(raw::fs_thaw)
    }

    fn commit(&self, commit: &Commit) -> Result<()> {
        let (base, top) = (text(&commit.base)?, text(&commit.top)?);
        self.mailbox.forget(&commit.disk);
        let limit = commit.rate_limit.unwrap_or(0);
        self.ask(|domain| raw::block_commit(domain, &commit.disk, base, top, limit, commit.active))
    }

    fn job(&self, disk: &str) -> Result<Option<Job>> {
        let job = self.ask(|domain| raw::block_job(domain, disk))?;
        Ok(job.map(|job| {
            let kind = match job.kind {
                sys::VIR_DOMAIN_BLOCK_JOB_TYPE_COMMIT => JobKind::Commit,
                sys::VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT => JobKind::ActiveCommit,
                _ => JobKind::Other,
            };
            Job { kind, done: job.cur, total: job.end }
        }))
    }

    fn set_rate_limit(&self, disk: &str, rate_limit: Option<u64>) -> Result<()> {
        self.ask(|domain| raw::block_job_set_speed(domain, disk, rate_limit.unwrap_or(0)))
    }

    fn abort(&self, disk: &str) -> Result<()> {
        self.ask(|domain| raw::block_job_abort(domain, disk, false))
    }

    fn pivot(&self, disk: &str) -> Result<()> {
        self.ask(|domain| raw::block_job_abort(domain, disk, true))
    }

    fn resize(&self, disk: &str, size: u64) -> Result<()> {
        if disk.contains('\0') {
            return Err(HypervisorError::new(FailureKind::Failed, "a disk's name has no zero bytes"));
        }
        self.ask(|domain| domain.block_resize(disk, size, sys::VIR_DOMAIN_BLOCK_RESIZE_BYTES).map_err(Some))?;
        Ok(())
    }

    fn wait(&self, disk: &str, at_most: Duration) -> Option<Event> {
        if self.listening == Listening::Poll {
            std::thread::sleep(at_most);
            return None;
        }
        self.mailbox.wait(disk, at_most)
    }
}
