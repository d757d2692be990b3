//! The calls of libvirt's C library that `virt` has no safe function for. This file and
//! `storage/map.rs` have the crate's only unsafe code.

#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int, c_ulong, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::Error;
use virt::sys;

use super::events::Mailbox;

/// The result of a call. The error `None` is an argument that has a zero byte.
pub(super) type Result<T> = std::result::Result<T, Option<Error>>;

fn text(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| None)
}

/// Converts the return value of a call, of which -1 is an error.
fn checked(answer: c_int) -> Result<c_int> {
    if answer == -1 { Err(Some(Error::last_error())) } else { Ok(answer) }
}

/// The arguments of [`block_commit`].
#[derive(Clone, Copy, Debug)]
pub(super) struct BlockCommit<'a> {
    pub(super) disk: &'a str,
    pub(super) base: &'a str,
    pub(super) top: &'a str,
    /// In bytes per second; 0 for no limit.
    pub(super) bandwidth: u64,
    /// The VM writes `top`.
    pub(super) active: bool,
    /// The file above `top` gets a relative backing name. libvirt refuses this where a name on the
    /// way is absolute.
    pub(super) relative: bool,
}

/// Calls `virDomainBlockCommit`.
pub(super) fn block_commit(domain: &Domain, commit: BlockCommit<'_>) -> Result<()> {
    let (disk, base, top) = (text(commit.disk)?, text(commit.base)?, text(commit.top)?);
    let mut flags = sys::VIR_DOMAIN_BLOCK_COMMIT_BANDWIDTH_BYTES;
    if commit.active {
        flags |= sys::VIR_DOMAIN_BLOCK_COMMIT_ACTIVE;
    }
    if commit.relative {
        flags |= sys::VIR_DOMAIN_BLOCK_COMMIT_RELATIVE;
    }
    let bandwidth = long(commit.bandwidth);
    // SAFETY: the domain is held by `domain`, the strings live until the call returns, and libvirt
    // keeps none of them.
    checked(unsafe {
        sys::virDomainBlockCommit(domain.as_ptr(), disk.as_ptr(), base.as_ptr(), top.as_ptr(), bandwidth, flags)
    })?;
    Ok(())
}

/// Calls `virDomainBlockJobSetSpeed` with a bandwidth in bytes per second; 0 for no limit.
pub(super) fn block_job_set_speed(domain: &Domain, disk: &str, bandwidth: u64) -> Result<()> {
    let disk = text(disk)?;
    let flags = sys::VIR_DOMAIN_BLOCK_JOB_SPEED_BANDWIDTH_BYTES;
    // SAFETY: the domain is held by `domain`, and the string lives until the call returns.
    checked(unsafe { sys::virDomainBlockJobSetSpeed(domain.as_ptr(), disk.as_ptr(), long(bandwidth), flags) })?;
    Ok(())
}

/// Converts a number to C's `long`; one that does not fit becomes the largest.
#[allow(clippy::useless_conversion, reason = "C's long has 32 bits on some platforms")]
fn long(number: u64) -> c_ulong {
    number.try_into().unwrap_or(c_ulong::MAX)
}

/// The state of a job (`virDomainBlockJobInfo`).
#[derive(Clone, Copy, Debug)]
pub(super) struct BlockJob {
    /// `virDomainBlockJobType`.
    pub(super) kind: u32,
    pub(super) cur: u64,
    pub(super) end: u64,
}

/// Calls `virDomainGetBlockJobInfo`. Returns `None` if there is no job.
pub(super) fn block_job(domain: &Domain, disk: &str) -> Result<Option<BlockJob>> {
    let disk = text(disk)?;
    let mut info = sys::virDomainBlockJobInfo { type_: 0, bandwidth: 0, cur: 0, end: 0 };
    // SAFETY: the domain is held by `domain`; string and record live until the call returns; the
    // record has the type that libvirt fills.
    let found = checked(unsafe { sys::virDomainGetBlockJobInfo(domain.as_ptr(), disk.as_ptr(), &raw mut info, 0) })?;
    let kind = u32::try_from(info.type_).unwrap_or_default();
    Ok((found > 0).then_some(BlockJob { kind, cur: info.cur, end: info.end }))
}

/// Calls `virDomainBlockJobAbort`; with `pivot` the domain is switched to the file that the job
/// copied to.
pub(super) fn block_job_abort(domain: &Domain, disk: &str, pivot: bool) -> Result<()> {
    let disk = text(disk)?;
    let flags = if pivot { sys::VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT } else { 0 };
    // SAFETY: the domain is held by `domain`, and the string lives until the call returns.
    checked(unsafe { sys::virDomainBlockJobAbort(domain.as_ptr(), disk.as_ptr(), flags) })?;
    Ok(())
}

/// Calls `virDomainAgentSetResponseTimeout` with a time in seconds, or with the limit that a new
/// domain has: none.
///
/// libvirt has no call that returns the present limit. A domain starts with
/// `VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_BLOCK` (-2), which waits without a limit.
/// `VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_DEFAULT` (-1) is another one: 5 seconds.
pub(super) fn agent_set_response_timeout(domain: &Domain, seconds: Option<i32>) -> Result<()> {
    let seconds = seconds.unwrap_or(sys::VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_BLOCK);
    // SAFETY: the domain is held by `domain`.
    checked(unsafe { sys::virDomainAgentSetResponseTimeout(domain.as_ptr(), seconds, 0) })?;
    Ok(())
}

/// Calls `virDomainFSThaw` for all file systems.
pub(super) fn fs_thaw(domain: &Domain) -> Result<()> {
    // SAFETY: the domain is held by `domain`; no mount points, and their number is 0.
    checked(unsafe { sys::virDomainFSThaw(domain.as_ptr(), std::ptr::null_mut(), 0, 0) })?;
    Ok(())
}

/// Stops libvirt from writing a connection's errors to standard error. Calls return them as before.
pub(super) fn print_no_errors(connection: &Connect) {
    // SAFETY: the connection is held by `connection`; the function uses none of its arguments.
    unsafe { sys::virConnSetErrorFunc(connection.as_ptr(), std::ptr::null_mut(), Some(ignore)) };
}

unsafe extern "C" fn ignore(_opaque: *mut c_void, _error: sys::virErrorPtr) {}

/// Registers for the events of block jobs and of starts and stops, which go to a mailbox. Returns
/// the callbacks' numbers for [`deregister_event`]; each callback holds a reference to the
/// connection. Needs an event loop that is older than the connection.
pub(super) fn register_events(connection: &Connect, mailbox: &Arc<Mailbox>) -> Result<Vec<c_int>> {
    // SAFETY: libvirt calls a callback through the type that belongs to the event's number; these
    // are the types of the two numbers below.
    let (job, lifecycle) = unsafe {
        type Generic = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *mut c_void);
        type Job =
            unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *const c_char, c_int, c_int, *mut c_void);
        type Life = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, c_int, c_int, *mut c_void) -> c_int;
        (std::mem::transmute::<Job, Generic>(on_block_job), std::mem::transmute::<Life, Generic>(on_lifecycle))
    };
    let events = [(sys::VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2, job), (sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle)];
    let mut registered = Vec::new();
    for (event, callback) in events {
        let opaque = Arc::into_raw(Arc::clone(mailbox)).cast_mut().cast::<c_void>();
        // SAFETY: the connection is held by `connection`. `opaque` is a count of an `Arc` that
        // `release` frees; libvirt calls it once, when the callback is removed.
        let answer = checked(unsafe {
            sys::virConnectDomainEventRegisterAny(
                connection.as_ptr(),
                std::ptr::null_mut(),
                c_int::try_from(event).unwrap_or_default(),
                Some(callback),
                opaque,
                Some(release),
            )
        });
        match answer {
            Ok(number) => registered.push(number),
            Err(error) => {
                // SAFETY: libvirt did not take the count, and does not call `release` for it.
                unsafe { release(opaque) };
                for number in registered {
                    deregister_event(connection, number);
                }
                return Err(error);
            }
        }
    }
    Ok(registered)
}

/// Removes a callback and its reference to the connection. On a connection that broke libvirt
/// removes it too, and reports an error because it cannot inform the daemon; that error is ignored.
pub(super) fn deregister_event(connection: &Connect, number: c_int) {
    // SAFETY: the connection is held by `connection`; libvirt checks the number.
    let _ = unsafe { sys::virConnectDomainEventDeregisterAny(connection.as_ptr(), number) };
}

/// Releases one count of a mailbox.
unsafe extern "C" fn release(opaque: *mut c_void) {
    // SAFETY: `opaque` is from `Arc::into_raw` in `register_events`, and this is called once for
    // it.
    drop(unsafe { Arc::from_raw(opaque.cast_const().cast::<Mailbox>()) });
}

unsafe extern "C" fn on_block_job(
    _connection: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    disk: *const c_char,
    _kind: c_int,
    status: c_int,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt passes a domain, a string or null, and the mailbox that was registered; all
    // live during the call.
    let (mailbox, is_ours, disk) = unsafe {
        let mailbox = &*opaque.cast_const().cast::<Mailbox>();
        let disk = if disk.is_null() { return } else { CStr::from_ptr(disk) };
        (mailbox, is_of(mailbox, domain), disk)
    };
    if is_ours {
        // A panic must not cross into C.
        let _ = catch_unwind(AssertUnwindSafe(|| mailbox.job(&disk.to_string_lossy(), status)));
    }
}

unsafe extern "C" fn on_lifecycle(
    _connection: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    event: c_int,
    _detail: c_int,
    opaque: *mut c_void,
) -> c_int {
    // SAFETY: libvirt passes a domain and the mailbox that was registered; both live during the
    // call.
    let (mailbox, is_ours) = unsafe {
        let mailbox = &*opaque.cast_const().cast::<Mailbox>();
        (mailbox, is_of(mailbox, domain))
    };
    if is_ours {
        let _ = catch_unwind(AssertUnwindSafe(|| mailbox.lifecycle(event)));
    }
    0
}

/// Returns true if a domain is the mailbox's, by its name or UUID.
///
/// # Safety
/// `domain` must be a domain that lives during the call.
unsafe fn is_of(mailbox: &Mailbox, domain: sys::virDomainPtr) -> bool {
    let mut uuid: [c_char; sys::VIR_UUID_STRING_BUFLEN as usize] = [0; sys::VIR_UUID_STRING_BUFLEN as usize];
    // SAFETY: the domain lives; the name belongs to it; the buffer has the size that the UUID
    // needs, with the zero at its end.
    let (name, uuid) = unsafe {
        let name = sys::virDomainGetName(domain);
        let found = sys::virDomainGetUUIDString(domain, uuid.as_mut_ptr()) == 0;
        let name = if name.is_null() { None } else { CStr::from_ptr(name).to_str().ok() };
        (name, if found { CStr::from_ptr(uuid.as_ptr()).to_str().ok() } else { None })
    };
    [name, uuid].contains(&Some(mailbox.domain()))
}
