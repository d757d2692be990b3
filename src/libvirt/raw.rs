//! The calls of libvirt's C library that `virt` has no safe function for, and no others. With the mapping of files the only
//! place of unsafe code.

#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int, c_ulong, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::Error;
use virt::sys;

use super::events::Mailbox;

/// The result of a call: `None` is an argument with a zero byte in it.
pub(super) type Result<T> = std::result::Result<T, Option<Error>>;

fn text(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| None)
}

/// What a call says: -1 is an error.
fn checked(answer: c_int) -> Result<c_int> {
    if answer == -1 { Err(Some(Error::last_error())) } else { Ok(answer) }
}

/// `virDomainBlockCommit`; `bandwidth` in bytes a second, 0 for no limit.
pub(super) fn block_commit(
    domain: &Domain,
    disk: &str,
    base: &str,
    top: &str,
    bandwidth: u64,
    active: bool,
) -> Result<()> {
    let (disk, base, top) = (text(disk)?, text(base)?, text(top)?);
    let mut flags = sys::VIR_DOMAIN_BLOCK_COMMIT_BANDWIDTH_BYTES;
    if active {
        flags |= sys::VIR_DOMAIN_BLOCK_COMMIT_ACTIVE;
    }
    let bandwidth = long(bandwidth);
    // SAFETY: the domain is held by `domain`, the strings live until the call is over, and libvirt keeps none of them.
    checked(unsafe {
        sys::virDomainBlockCommit(domain.as_ptr(), disk.as_ptr(), base.as_ptr(), top.as_ptr(), bandwidth, flags)
    })?;
    Ok(())
}

/// `virDomainBlockJobSetSpeed`; `bandwidth` in bytes a second, 0 for no limit.
pub(super) fn block_job_set_speed(domain: &Domain, disk: &str, bandwidth: u64) -> Result<()> {
    let disk = text(disk)?;
    let flags = sys::VIR_DOMAIN_BLOCK_JOB_SPEED_BANDWIDTH_BYTES;
    // SAFETY: the domain is held by `domain`, and the string lives until the call is over.
    checked(unsafe { sys::virDomainBlockJobSetSpeed(domain.as_ptr(), disk.as_ptr(), long(bandwidth), flags) })?;
    Ok(())
}

/// A number as C's long, the largest where that is too short.
#[allow(clippy::useless_conversion, reason = "a long of C's has 32 bits on some platforms")]
fn long(number: u64) -> c_ulong {
    number.try_into().unwrap_or(c_ulong::MAX)
}

/// A job as libvirt counts it.
#[derive(Clone, Copy, Debug)]
pub(super) struct BlockJob {
    /// `virDomainBlockJobType`.
    pub(super) kind: u32,
    pub(super) cur: u64,
    pub(super) end: u64,
}

/// `virDomainGetBlockJobInfo`.
pub(super) fn block_job(domain: &Domain, disk: &str) -> Result<Option<BlockJob>> {
    let disk = text(disk)?;
    let mut info = sys::virDomainBlockJobInfo { type_: 0, bandwidth: 0, cur: 0, end: 0 };
    // SAFETY: the domain is held by `domain`; string and record live until the call is over; the record is of the type that
    // libvirt fills.
    let found = checked(unsafe { sys::virDomainGetBlockJobInfo(domain.as_ptr(), disk.as_ptr(), &raw mut info, 0) })?;
    let kind = u32::try_from(info.type_).unwrap_or_default();
    Ok((found > 0).then_some(BlockJob { kind, cur: info.cur, end: info.end }))
}

/// `virDomainBlockJobAbort`, switching the domain over or not.
pub(super) fn block_job_abort(domain: &Domain, disk: &str, pivot: bool) -> Result<()> {
    let disk = text(disk)?;
    let flags = if pivot { sys::VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT } else { 0 };
    // SAFETY: the domain is held by `domain`, and the string lives until the call is over.
    checked(unsafe { sys::virDomainBlockJobAbort(domain.as_ptr(), disk.as_ptr(), flags) })?;
    Ok(())
}

/// `virDomainAgentSetResponseTimeout`, in seconds.
pub(super) fn agent_set_response_timeout(domain: &Domain, seconds: i32) -> Result<()> {
    // SAFETY: the domain is held by `domain`.
    checked(unsafe { sys::virDomainAgentSetResponseTimeout(domain.as_ptr(), seconds, 0) })?;
    Ok(())
}

/// `virDomainFSThaw` of all file systems.
pub(super) fn fs_thaw(domain: &Domain) -> Result<()> {
    // SAFETY: the domain is held by `domain`; no mount points, and their number is 0.
    checked(unsafe { sys::virDomainFSThaw(domain.as_ptr(), std::ptr::null_mut(), 0, 0) })?;
    Ok(())
}

/// Keeps a connection's errors from being printed: libvirt writes each to standard error unless it is told not to, and they are
/// returned all the same.
pub(super) fn print_no_errors(connection: &Connect) {
    // SAFETY: the connection is held by `connection`; the function uses none of what it is given.
    unsafe { sys::virConnSetErrorFunc(connection.as_ptr(), std::ptr::null_mut(), Some(ignore)) };
}

unsafe extern "C" fn ignore(_opaque: *mut c_void, _error: sys::virErrorPtr) {}

/// Lets events about block jobs and about starts and stops go to a mailbox, as long as the connection lives. Needs an event
/// loop that was there before the connection.
pub(super) fn register_events(connection: &Connect, mailbox: &Arc<Mailbox>) -> Result<()> {
    // SAFETY: libvirt calls a callback through its true type, which the event's number tells; these are those of the two
    // numbers below.
    let (job, lifecycle) = unsafe {
        type Generic = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *mut c_void);
        type Job =
            unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *const c_char, c_int, c_int, *mut c_void);
        type Life = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, c_int, c_int, *mut c_void) -> c_int;
        (std::mem::transmute::<Job, Generic>(on_block_job), std::mem::transmute::<Life, Generic>(on_lifecycle))
    };
    let events = [(sys::VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2, job), (sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle)];
    for (event, callback) in events {
        let opaque = Arc::into_raw(Arc::clone(mailbox)).cast_mut().cast::<c_void>();
        // SAFETY: the connection is held by `connection`. `opaque` is a count of an `Arc` that `release` gives back; libvirt
        // calls it once, when the callback is taken away or the connection ends.
        let registered = checked(unsafe {
            sys::virConnectDomainEventRegisterAny(
                connection.as_ptr(),
                std::ptr::null_mut(),
                c_int::try_from(event).unwrap_or_default(),
                Some(callback),
                opaque,
                Some(release),
            )
        });
        if let Err(error) = registered {
            // SAFETY: libvirt did not take it: the count is ours again.
            unsafe { release(opaque) };
            return Err(error);
        }
    }
    Ok(())
}

/// Gives back the count of a mailbox.
unsafe extern "C" fn release(opaque: *mut c_void) {
    // SAFETY: `opaque` is what `Arc::into_raw` gave in `register_events`, and this is called once for it.
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
    // SAFETY: libvirt passes a domain, a string or null, and the mailbox that was registered; all live during the call.
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
    // SAFETY: libvirt passes a domain and the mailbox that was registered; both live during the call.
    let (mailbox, is_ours) = unsafe {
        let mailbox = &*opaque.cast_const().cast::<Mailbox>();
        (mailbox, is_of(mailbox, domain))
    };
    if is_ours {
        let _ = catch_unwind(AssertUnwindSafe(|| mailbox.lifecycle(event)));
    }
    0
}

/// Whether an event is about the mailbox's domain, by its name or UUID.
///
/// # Safety
/// `domain` must be a domain that lives during the call.
unsafe fn is_of(mailbox: &Mailbox, domain: sys::virDomainPtr) -> bool {
    let mut uuid: [c_char; sys::VIR_UUID_STRING_BUFLEN as usize] = [0; sys::VIR_UUID_STRING_BUFLEN as usize];
    // SAFETY: the domain lives; the name belongs to it; the buffer has the size that the UUID needs, with the zero at its end.
    let (name, uuid) = unsafe {
        let name = sys::virDomainGetName(domain);
        let found = sys::virDomainGetUUIDString(domain, uuid.as_mut_ptr()) == 0;
        let name = if name.is_null() { None } else { CStr::from_ptr(name).to_str().ok() };
        (name, if found { CStr::from_ptr(uuid.as_ptr()).to_str().ok() } else { None })
    };
    [name, uuid].contains(&Some(mailbox.domain()))
}
