//! Running VMs under libvirt (feature `libvirt`, which links libvirt's C library).
//!
//! [`Libvirt`] implements [`Hypervisor`] for one domain. Each method is one call of libvirt; states
//! are read from the domain's XML. docs/live.md lists the versions and permissions that it needs.
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

mod connection;
mod events;
mod raw;
mod xml;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use virt::domain::Domain;
use virt::domain_snapshot::DomainSnapshot;
use virt::error::{Error, ErrorNumber};
use virt::sys;

use self::connection::{Connection, unreachable};
use self::events::Mailbox;
use crate::live::{Commit, Description, Event, FailureKind, Hypervisor, HypervisorError, Job, JobKind, NewTop, Result};

/// The source of events, and the event loop that a connection uses.
///
/// Every connection needs a running event loop, because libvirt sends and checks keep-alives from
/// it. Without keep-alives a call to a daemon that hangs never returns. libvirt has one event loop
/// in a process, and keeps the one that was registered first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Listening {
    /// Events through libvirt's default event loop, which runs on a thread of this library from the
    /// first connection on.
    #[default]
    OwnLoop,
    /// Events through an event loop that the program has registered with libvirt, and runs, before
    /// it connects.
    CallersLoop,
    /// No events: the state of a job is read several times per second. The thread of
    /// [`Listening::OwnLoop`] runs for the keep-alives. A program with an event loop of its own
    /// must use [`Listening::CallersLoop`].
    Poll,
}

/// A domain of a libvirt.
///
/// It holds one connection, which is closed when the last use ends after the drop. A connection
/// that broke is replaced by the next call.
#[derive(Debug)]
pub struct Libvirt {
    uri: String,
    domain: String,
    listening: Listening,
    mailbox: Arc<Mailbox>,
    connection: Mutex<Arc<Connection>>,
}

impl Libvirt {
    /// Connects to a libvirt, such as `qemu:///system`, for the domain of this name or UUID. The
    /// domain need not exist yet.
    ///
    /// # Errors
    /// - [`FailureKind::Failed`]: the URI or the name has a zero byte.
    /// - [`FailureKind::Unreachable`]: the connection was refused, or not established within 30
    ///   seconds.
    pub fn connect(uri: impl Into<String>, domain: impl Into<String>, listening: Listening) -> Result<Self> {
        let (uri, domain) = (uri.into(), domain.into());
        if uri.contains('\0') || domain.contains('\0') {
            return Err(HypervisorError::new(FailureKind::Failed, "a URI or a domain's name has a zero byte"));
        }
        let mailbox = Arc::new(Mailbox::new(&domain));
        let connection = Mutex::new(Arc::new(Connection::open(&uri, listening, &mailbox)?));
        Ok(Self { uri, domain, listening, mailbox, connection })
    }

    /// Returns the connection, or a new one if the last one broke. The broken one is closed with
    /// its last user.
    fn connection(&self) -> Result<Arc<Connection>> {
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        if !connection.is_alive() {
            *connection = Arc::new(Connection::open(&self.uri, self.listening, &self.mailbox)?);
        }
        Ok(Arc::clone(&connection))
    }

    /// Looks the domain up, by name first and then by UUID.
    fn find(&self, connection: &Connection) -> Result<Option<Domain>> {
        let connect = connection.handle();
        let found = Domain::lookup_by_name(connect, &self.domain)
            .or_else(|error| Domain::lookup_by_uuid_string(connect, &self.domain).map_err(|_| error));
        match found {
            Ok(domain) => Ok(Some(domain)),
            Err(error) if error.code() == ErrorNumber::NoDomain => Ok(None),
            Err(error) => Err(unreachable(&error)),
        }
    }

    /// Makes a call for the domain. The kind of an error depends on the state of the connection and
    /// of the domain afterwards.
    fn ask<T>(&self, call: impl FnOnce(&Domain) -> raw::Result<T>) -> Result<T> {
        let connection = self.connection()?;
        let gone = |message: String| HypervisorError::new(FailureKind::Gone, message);
        let found = self.find(&connection)?;
        let domain = found.ok_or_else(|| gone(format!("there is no domain {}", self.domain)))?;
        let error = match call(&domain) {
            Ok(answer) => return Ok(answer),
            Err(Some(error)) => error,
            Err(None) => return Err(HypervisorError::new(FailureKind::Failed, "a name or a path has a zero byte")),
        };
        if !connection.is_alive() {
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

/// Classifies an error of a daemon that answers and of a domain that runs.
fn kind(error: &Error) -> FailureKind {
    let has = |words: &str| error.message().contains(words);
    match error.code() {
        ErrorNumber::ArgumentUnsupported if has("agent") => FailureKind::NoAgent,
        ErrorNumber::AgentUnresponsive if has("not connected") || has("not configured") => FailureKind::NoAgent,
        ErrorNumber::AgentUnresponsive | ErrorNumber::AgentUnsynced | ErrorNumber::AgentCommandTimeout => {
            FailureKind::AgentTimeout
        }
        _ => FailureKind::Failed,
    }
}

fn text(path: &std::path::Path) -> Result<&str> {
    let refused = || format!("{}: libvirt requires UTF-8 paths", path.display());
    path.to_str().ok_or_else(|| HypervisorError::new(FailureKind::Failed, refused()))
}

/// Returns the flags of `virDomainSnapshotCreateXML` for a snapshot of disks alone, into files that
/// exist.
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

    fn set_agent_timeout(&self, at_most: Option<Duration>) -> Result<()> {
        let seconds = at_most.map(|time| i32::try_from(time.as_secs().max(1)).unwrap_or(i32::MAX));
        self.ask(|domain| raw::agent_set_response_timeout(domain, seconds))
    }

    fn thaw(&self) -> Result<()> {
        self.ask(raw::fs_thaw)
    }

    fn commit(&self, commit: &Commit) -> Result<()> {
        let (base, top) = (text(&commit.base)?, text(&commit.top)?);
        self.mailbox.forget(&commit.disk);
        let arguments = raw::BlockCommit {
            disk: &commit.disk,
            base,
            top,
            bandwidth: commit.rate_limit.unwrap_or(0),
            active: commit.active,
            // The header of the file above gets a new name, relative as the present one. With an
            // absolute name, a directory that is copied or moved would read the old directory's
            // base. A commit of the active file changes no header.
            relative: !commit.active,
        };
        self.ask(|domain| match raw::block_commit(domain, arguments) {
            // libvirt refuses the flag, before anything starts, where a name between the file above
            // and the base is absolute: the chain has no relative path, and the new name is
            // absolute as well. An error with another cause comes again.
            Err(Some(error)) if arguments.relative && error.code() == ErrorNumber::OperationInvalid => {
                raw::block_commit(domain, raw::BlockCommit { relative: false, ..arguments })
            }
            answer => answer,
        })
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
            return Err(HypervisorError::new(FailureKind::Failed, "a disk's name has a zero byte"));
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
