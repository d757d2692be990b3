//! Calls that differ between operating systems, behind functions of the same names.
//!
//! `unix` and `windows` have the calls that every platform has in some form. `linux` has the calls
//! that only Linux has. `portable` replaces it elsewhere and returns
//! [`std::io::ErrorKind::Unsupported`].

#[cfg(unix)]
mod unix;
#[cfg(unix)]
pub(super) use unix::*;

#[cfg(windows)]
mod windows;
#[cfg(windows)]
pub(super) use windows::*;

#[cfg(target_os = "linux")]
mod linux;
#[cfg(target_os = "linux")]
pub(super) use linux::*;

#[cfg(not(target_os = "linux"))]
mod portable;
#[cfg(not(target_os = "linux"))]
pub(super) use portable::*;

/// The kind of an open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A regular file.
    Regular,
    /// A block device.
    #[cfg_attr(not(unix), expect(dead_code, reason = "only unix distinguishes block devices"))]
    BlockDevice,
    /// Any other kind, by its name.
    Other(&'static str),
}

/// Repeats a call that a signal interrupted.
pub(super) fn retry<T>(mut call: impl FnMut() -> std::io::Result<T>) -> std::io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}
