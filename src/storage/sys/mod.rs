//! What the operating systems do differently, behind plain functions of the same names.
//!
//! `unix` and `windows` hold what every platform has in some form; `linux` is the only file with calls that Linux
//! alone has, and `portable` answers in its place elsewhere: [`std::io::ErrorKind::Unsupported`], never a pretence.

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

/// What an open file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A regular file.
    Regular,
    /// A block device.
    #[cfg_attr(not(unix), expect(dead_code, reason = "only unix tells block devices apart"))]
    BlockDevice,
    /// Anything else, by its name.
    Other(&'static str),
}

/// Calls until no signal came in between.
pub(super) fn retry<T>(mut call: impl FnMut() -> std::io::Result<T>) -> std::io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}
