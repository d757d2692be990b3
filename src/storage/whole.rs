//! Complete transfers by system calls that may be partial or interrupted by a signal.

use std::io;

use super::MAX_LEN;
use super::sys::retry;

/// Fills a buffer. `call` reads some bytes at an offset, 0 at the end. The rest of the buffer is
/// zeroed.
pub(super) fn read(
    buf: &mut [u8],
    offset: u64,
    mut call: impl FnMut(&mut [u8], u64) -> io::Result<usize>,
) -> io::Result<()> {
    let mut done = 0;
    while done < buf.len() {
        let at = offset.saturating_add(done as u64);
        let most = usize::try_from(MAX_LEN.saturating_sub(at)).unwrap_or(usize::MAX).min(buf.len() - done);
        let read = if most == 0 { 0 } else { retry(|| call(&mut buf[done..done + most], at))? };
        if read == 0 {
            buf[done..].fill(0);
            break;
        }
        done += read;
    }
    Ok(())
}

/// Writes all of a buffer. `call` writes some bytes at an offset.
pub(super) fn write(buf: &[u8], offset: u64, mut call: impl FnMut(&[u8], u64) -> io::Result<usize>) -> io::Result<()> {
    let mut done = 0;
    while done < buf.len() {
        match retry(|| call(&buf[done..], offset + done as u64))? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            written => done += written,
        }
    }
    Ok(())
}

/// Writes whole units until a call fails, and returns the bytes written. The error is discarded:
/// the caller writes the rest in another way, which reports the error if it occurs again.
pub(super) fn write_units(
    buf: &[u8],
    offset: u64,
    unit: usize,
    mut call: impl FnMut(&[u8], u64) -> io::Result<usize>,
) -> usize {
    let mut done = 0;
    while done < buf.len() {
        match retry(|| call(&buf[done..], offset + done as u64)) {
            Ok(written) if written > 0 && written.is_multiple_of(unit) => done += written,
            _ => break,
        }
    }
    done
}

/// Copies `len` bytes, or fewer where the source ends, and returns the bytes copied. `call` copies
/// some, given the bytes done and left, and returns 0 at the end.
pub(super) fn copy(len: u64, mut call: impl FnMut(u64, u64) -> io::Result<u64>) -> io::Result<u64> {
    let mut done = 0;
    while done < len {
        match retry(|| call(done, len - done))? {
            0 => break,
            copied => done += copied,
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests;
