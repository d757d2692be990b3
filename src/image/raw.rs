//! A raw image: guest offsets are host offsets.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::format::limits::{MAX_OFFSET, SECTOR_SIZE};
use crate::format::{GuestOffset, HostOffset};
use crate::storage::{self, Storage, zero_range};

use super::{Error, Extent, ExtentKind, Result};

/// A raw image. Its virtual size is the storage's length, rounded up to a sector as QEMU does.
#[derive(Debug)]
pub struct RawImage {
    storage: Arc<dyn Storage>,
    /// The virtual size; a multiple of 512.
    size: AtomicU64,
}

impl RawImage {
    /// The raw image that is all of `storage`.
    ///
    /// # Errors
    /// As [`Storage::len`]; [`Error::Limit`] where the length is over 2^63.
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self> {
        let size = checked_size(&*storage, storage.len()?.checked_next_multiple_of(SECTOR_SIZE))?;
        Ok(Self { storage, size: AtomicU64::new(size) })
    }

    /// The storage it lies on.
    #[must_use]
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// The virtual size in bytes.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Reads guest data; zeroes past the end.
    ///
    /// # Errors
    /// As [`Storage::read_at`].
    pub fn read_at(&self, buf: &mut [u8], offset: GuestOffset) -> Result<()> {
        // Not every storage reads beyond the virtual size as zeroes: a volume may be larger than what `resize` made of it.
        let inside = self.virtual_size().saturating_sub(offset.get());
        let inside = usize::try_from(inside).unwrap_or(usize::MAX).min(buf.len());
        let (inside, outside) = buf.split_at_mut(inside);
        outside.fill(0);
        if !inside.is_empty() {
            self.storage.read_at(inside, offset.get())?;
        }
        Ok(())
    }

    /// Writes guest data within the virtual size.
    ///
    /// # Errors
    /// As [`Storage::write_at`]; [`Error::Refused`] past the virtual size.
    pub fn write_at(&self, buf: &[u8], offset: GuestOffset) -> Result<()> {
        self.range_within(offset, buf.len() as u64)?;
        if !buf.is_empty() {
            self.storage.write_at(buf, offset.get())?;
        }
        Ok(())
    }

    /// Makes a range read as zeroes, by a hole where the storage can.
    ///
    /// # Errors
    /// As [`RawImage::write_at`].
    pub fn write_zeroes_at(&self, offset: GuestOffset, len: u64) -> Result<()> {
        let range = self.range_within(offset, len)?;
        // The last sector may lie in part behind the storage's end, where zeroes are read anyway.
        let range = range.start..range.end.min(self.storage.len()?);
        if range.is_empty() {
            return Ok(());
        }
        match self.storage.punch_range(range.clone()) {
            Err(storage::Error::Unsupported { .. }) => Ok(zero_range(&*self.storage, range)?),
            done => Ok(done?),
        }
    }

    /// The extents of a range, as far as it lies within the virtual size, lazily and in order: `Data` and
    /// `Zero { host: Some }` by the storage's holes; never `Unallocated`.
    ///
    /// Each item may be an error of [`Storage::next_data`]; it is the last one.
    pub fn extents(&self, range: Range<u64>) -> impl Iterator<Item = Result<Extent>> + '_ {
        let end = range.end.min(self.virtual_size());
        let mut at = range.start;
        // The run of data at or behind `at`, where it is known already.
        let mut ahead: Option<Range<u64>> = None;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let data = match ahead.take() {
                Some(data) => data,
                None => match self.next_data(at, end) {
                    Ok(data) => data,
                    Err(error) => {
                        at = end;
                        return Some(Err(error));
                    }
                },
            };
            let host = HostOffset::new(at);
            let (until, kind) = if data.start > at {
                (data.start, ExtentKind::Zero { host: Some(host) })
            } else {
                (data.end, ExtentKind::Data { host })
            };
            let extent = Extent { guest: GuestOffset::new(at), len: until - at, kind };
            at = until;
            ahead = (data.start >= until && !data.is_empty()).then_some(data);
            Some(Ok(extent))
        })
    }

    /// The run of data at or behind `at`, cut to `end`; empty at `end` where there is none.
    fn next_data(&self, at: u64, end: u64) -> Result<Range<u64>> {
        let Some(mut data) = self.storage.next_data(at)? else { return Ok(end..end) };
        // Runs that touch are one.
        while data.end < end {
            match self.storage.next_data(data.end)? {
                Some(next) if next.start <= data.end && next.end > data.end => data.end = next.end,
                _ => break,
            }
        }
        // A storage that ends within a sector still has all of the sector; a run that started earlier starts here.
        let data = data.start.clamp(at, end)..data.end.clamp(at, end);
        Ok(if data.is_empty() { end..end } else { data })
    }

    /// Changes the size, which must be a multiple of 512.
    ///
    /// # Errors
    /// As [`Storage::set_len`]; [`Error::Refused`] for a size that is not a multiple of 512, [`Error::Limit`] over 2^63.
    pub fn resize(&self, size: u64) -> Result<()> {
        if !size.is_multiple_of(SECTOR_SIZE) {
            return Err(Error::refused(self.storage.name(), "the size is not a multiple of 512"));
        }
        let size = checked_size(&*self.storage, Some(size))?;
        self.storage.set_len(size)?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// Returns when what was written is durable.
    ///
    /// # Errors
    /// As [`Storage::sync`].
    pub fn flush(&self) -> Result<()> {
        Ok(self.storage.sync()?)
    }

    /// The range, if it lies within the virtual size.
    fn range_within(&self, offset: GuestOffset, len: u64) -> Result<Range<u64>> {
        let size = self.virtual_size();
        match offset.checked_add(len) {
            Some(end) if end.get() <= size => Ok(offset.get()..end.get()),
            _ => {
                let why = format!("{len} bytes at {offset} reach past the end of the disk at {size:#x}");
                Err(Error::refused(self.storage.name(), why))
            }
        }
    }
}

/// A virtual size, if QEMU can have one so large.
fn checked_size(storage: &dyn Storage, size: Option<u64>) -> Result<u64> {
    size.filter(|&size| size <= MAX_OFFSET).ok_or_else(|| Error::Limit {
        file: storage.name().to_owned(),
        what: format!("a raw image's size, at most {MAX_OFFSET}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;

    /// Memory that knows where its holes are: every whole sector of zeroes is one.
    #[derive(Debug)]
    struct Holes(MemoryStorage);

    impl Storage for Holes {
        fn name(&self) -> &str {
            self.0.name()
        }
        fn read_at(&self, buf: &mut [u8], offset: u64) -> storage::Result<()> {
            self.0.read_at(buf, offset)
        }
        fn write_at(&self, buf: &[u8], offset: u64) -> storage::Result<()> {
            self.0.write_at(buf, offset)
        }
        fn len(&self) -> storage::Result<u64> {
            self.0.len()
        }
        fn set_len(&self, len: u64) -> storage::Result<()> {
            self.0.set_len(len)
        }
        fn sync(&self) -> storage::Result<()> {
            self.0.sync()
        }
        fn next_data(&self, offset: u64) -> storage::Result<Option<Range<u64>>> {
            let bytes = self.0.to_vec();
            let len = bytes.len() as u64;
            // One sector at a time: the caller joins them.
            Ok(bytes.chunks(512).enumerate().find_map(|(sector, content)| {
                let range = sector as u64 * 512..(sector as u64 * 512 + 512).min(len);
                (range.end > offset && content.iter().any(|&byte| byte != 0))
                    .then_some(range.start.max(offset)..range.end)
            }))
        }
    }

    fn raw(bytes: Vec<u8>) -> RawImage {
        RawImage::open(Arc::new(Holes(MemoryStorage::with_bytes("raw", bytes)))).expect("any bytes are raw")
    }

    fn kinds(image: &RawImage, range: Range<u64>) -> Vec<(u64, u64, bool)> {
        let extents = image.extents(range).map(|extent| extent.expect("memory does not fail"));
        extents
            .map(|extent| match extent.kind {
                ExtentKind::Data { host } | ExtentKind::Zero { host: Some(host) } => {
                    assert_eq!(host.get(), extent.guest.get());
                    (extent.guest.get(), extent.len, matches!(extent.kind, ExtentKind::Data { .. }))
                }
                kind => panic!("{kind:?} in a raw image"),
            })
            .collect()
    }

    #[test]
    fn the_size_is_rounded_up_to_a_sector() {
        for (len, size) in [(0, 0), (1, 512), (511, 512), (512, 512), (513, 1024)] {
            assert_eq!(raw(vec![7; len]).virtual_size(), size);
        }
    }

    #[test]
    fn reads_past_the_end_are_zeroes_and_writes_are_refused() {
        let image = raw(vec![7; 700]);
        let mut buf = [1; 2000];
        image.read_at(&mut buf, GuestOffset::new(600)).expect("reads anywhere");
        assert!(buf[..100].iter().all(|&byte| byte == 7) && buf[100..].iter().all(|&byte| byte == 0));
        image.read_at(&mut buf, GuestOffset::new(u64::MAX)).expect("reads anywhere");
        assert!(buf.iter().all(|&byte| byte == 0));

        image.write_at(&[8; 24], GuestOffset::new(1000)).expect("the last sector is all there");
        assert!(matches!(image.write_at(&[8; 25], GuestOffset::new(1000)), Err(Error::Refused { .. })));
        assert!(matches!(image.write_at(&[8], GuestOffset::new(u64::MAX)), Err(Error::Refused { .. })));
        assert!(matches!(image.write_zeroes_at(GuestOffset::new(512), u64::MAX), Err(Error::Refused { .. })));
        assert_eq!(image.storage().len().expect("memory"), 1024);
    }

    #[test]
    fn zeroes_do_not_make_the_file_longer() {
        let image = raw(vec![7; 700]);
        image.write_zeroes_at(GuestOffset::new(512), 512).expect("within");
        assert_eq!(image.storage().len().expect("memory"), 700);
        assert_eq!(kinds(&image, 0..u64::MAX), [(0, 512, true), (512, 512, false)]);
    }

    #[test]
    fn extents_follow_the_holes() {
        let mut bytes = vec![0; 512 * 10 + 3];
        for sector in [1, 2, 5] {
            bytes[sector * 512 + 9] = 1;
        }
        bytes[512 * 10 + 2] = 1;
        let image = raw(bytes);
        assert_eq!(
            kinds(&image, 0..u64::MAX),
            [
                (0, 512, false),
                (512, 1024, true),
                (1536, 1024, false),
                (2560, 512, true),
                (3072, 2048, false),
                (5120, 3, true),
                (5123, 509, false)
            ]
        );
        assert_eq!(kinds(&image, 600..2600), [(600, 936, true), (1536, 1024, false), (2560, 40, true)]);
        assert_eq!(kinds(&image, 4000..4001), [(4000, 1, false)]);
        assert_eq!(kinds(&image, 9000..u64::MAX), []);
        assert_eq!(kinds(&raw(Vec::new()), 0..u64::MAX), []);
    }

    #[test]
    fn resizing() {
        let image = raw(vec![7; 1024]);
        image.resize(512).expect("smaller");
        image.resize(2048).expect("larger");
        assert_eq!(image.virtual_size(), 2048);
        assert_eq!(kinds(&image, 0..u64::MAX), [(0, 512, true), (512, 1536, false)]);
        assert!(matches!(image.resize(1000), Err(Error::Refused { .. })));
        assert!(matches!(image.resize(1 << 63), Err(Error::Limit { .. })));
        assert_eq!(image.virtual_size(), 2048);
    }
}
