//! A chain as the standard library reads files.

use std::borrow::Borrow;
use std::io::{self, Read, Seek, SeekFrom};

use crate::format::GuestOffset;

use super::Chain;

/// The guest's disk as [`Read`] and [`Seek`], for what expects a file. Several readers may share a chain, each with a
/// position of its own: `C` is a `&Chain`, an `Arc<Chain>`, or a `Chain`.
#[derive(Clone, Debug)]
pub struct ChainReader<C> {
    chain: C,
    position: u64,
}

impl<C: Borrow<Chain>> ChainReader<C> {
    /// A reader at the start of the disk.
    #[must_use]
    pub const fn new(chain: C) -> Self {
        Self { chain, position: 0 }
    }

    /// The chain.
    pub fn into_inner(self) -> C {
        self.chain
    }
}

impl<C: Borrow<Chain>> Read for ChainReader<C> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let chain = self.chain.borrow();
        let left = usize::try_from(chain.virtual_size().saturating_sub(self.position)).unwrap_or(usize::MAX);
        let len = left.min(buf.len());
        if len > 0 {
            chain.read_at(&mut buf[..len], GuestOffset::new(self.position))?;
            self.position += len as u64;
        }
        Ok(len)
    }
}

impl<C: Borrow<Chain>> Seek for ChainReader<C> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
            SeekFrom::End(offset) => self.chain.borrow().virtual_size().checked_add_signed(offset),
        };
        self.position = position.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(self.position)
    }
}
