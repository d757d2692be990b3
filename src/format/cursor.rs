//! A view of bytes whose reads cannot panic: what is not there is an error that says where and how much.

use byteorder::{BigEndian, ByteOrder};

use super::FormatError;

/// Bytes of one structure, and where they lie in the file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    structure: &'static str,
    start: u64,
}

impl<'a> Cursor<'a> {
    /// The bytes of `structure`, the first of which lies at `start` in the file.
    pub(super) const fn new(bytes: &'a [u8], structure: &'static str, start: u64) -> Self {
        Self { bytes, structure, start }
    }

    /// An error about a field of this structure.
    pub(super) fn corrupt(
        &self,
        at: usize,
        field: &'static str,
        found: impl std::fmt::Display,
        expected: impl std::fmt::Display,
    ) -> FormatError {
        let at = u64::try_from(at).unwrap_or(u64::MAX);
        FormatError::corrupt(self.structure, self.start.saturating_add(at), field, found, expected)
    }

    /// `len` bytes from `at` on.
    pub(super) fn bytes(&self, at: usize, len: usize, field: &'static str) -> Result<&'a [u8], FormatError> {
        let end = at.checked_add(len);
        end.and_then(|end| self.bytes.get(at..end)).ok_or_else(|| {
            let there = self.bytes.len().saturating_sub(at);
            self.corrupt(at, field, format_args!("cut off after {there} bytes"), format_args!("{len} bytes"))
        })
    }

    /// The 32-bit number at `at`.
    pub(super) fn u32(&self, at: usize, field: &'static str) -> Result<u32, FormatError> {
        Ok(BigEndian::read_u32(self.bytes(at, 4, field)?))
    }

    /// The 64-bit number at `at`.
    pub(super) fn u64(&self, at: usize, field: &'static str) -> Result<u64, FormatError> {
        Ok(BigEndian::read_u64(self.bytes(at, 8, field)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_are_big_endian_and_end_where_the_bytes_end() {
        let cursor = Cursor::new(&[1, 2, 3, 4, 5, 6, 7, 8, 9], "thing", 0x100);
        assert_eq!(cursor.u32(1, "a"), Ok(0x0203_0405));
        assert_eq!(cursor.u64(1, "a"), Ok(0x0203_0405_0607_0809));
        assert_eq!(
            cursor.u64(2, "b").expect_err("one byte short").to_string(),
            "thing at 0x102: b is cut off after 7 bytes, expected 8 bytes"
        );
        assert!(cursor.bytes(usize::MAX, 2, "c").is_err());
        assert!(cursor.bytes(10, 0, "c").is_err());
        assert_eq!(cursor.bytes(9, 0, "c"), Ok(&[][..]));
    }
}
