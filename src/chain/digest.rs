//! A digest of what the guest sees, from the extents: zeroes are counted, not read.

use crate::format::GuestOffset;
use crate::progress::Progress;

use super::{Chain, Error, Result};

/// How much is read at once.
const BUFFER: u64 = 1 << 20;

impl Chain {
    /// The CRC-32 of every byte of the disk, from the first to the virtual size. Two chains with equal content have equal
    /// digests, whatever layers hold it and however it is mapped. Cost follows the data: a run of zeroes costs the same
    /// whatever its length. `progress` is asked between reads.
    ///
    /// A CRC finds accidents, not forgeries.
    ///
    /// # Errors
    /// As [`Chain::read_at`]; [`Error::Cancelled`].
    pub fn digest(&self, progress: &dyn Progress) -> Result<u32> {
        let mut digest = crc32fast::Hasher::new();
        let mut buf = Vec::new();
        for extent in self.extents(0..self.virtual_size()) {
            let extent = extent?;
            if extent.is_zero() {
                digest.combine(&zeroes(extent.len));
                continue;
            }
            let mut at = extent.guest.get();
            while at < extent.end() {
                if progress.is_cancelled() {
                    return Err(Error::Cancelled);
                }
                let len = (extent.end() - at).min(BUFFER);
                buf.resize(usize::try_from(len).unwrap_or_default(), 0);
                self.read_at(&mut buf, GuestOffset::new(at))?;
                digest.update(&buf);
                at += len;
            }
        }
        Ok(digest.finalize())
    }
}

/// The digest of `len` zeroes, by doubling.
fn zeroes(len: u64) -> crc32fast::Hasher {
    let mut run = crc32fast::Hasher::new();
    run.update(&[0]);
    let mut total = crc32fast::Hasher::new();
    let mut left = len;
    while left > 0 {
        if left & 1 == 1 {
            total.combine(&run);
        }
        let twice = run.clone();
        run.combine(&twice);
        left >>= 1;
    }
    total
}

#[cfg(test)]
mod tests {
    use super::zeroes;

    #[test]
    fn a_run_of_zeroes_is_digested_as_if_it_were_read() {
        for len in [0_usize, 1, 2, 511, 512, 65_537] {
            assert_eq!(zeroes(len as u64).finalize(), crc32fast::hash(&vec![0; len]), "{len}");
        }
        let mut both = crc32fast::Hasher::new();
        both.update(b"data");
        both.combine(&zeroes(1000));
        let mut bytes = b"data".to_vec();
        bytes.resize(1004, 0);
        assert_eq!(both.finalize(), crc32fast::hash(&bytes));
    }
}
