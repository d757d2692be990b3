//! All ranges in which two chains differ.

use std::ops::Range;

use crate::format::GuestOffset;
use crate::progress::Progress;

use super::in_order::{in_order, threads};
use super::{Chain, Error, Result, Walk};

/// What is read at once from each side.
const CHUNK: u64 = 1 << 20;

/// Tells `found` of every range in which a guest would read other bytes of `a` than of `b`, in order, by whole `unit`s (a
/// power of two of at least 512 bytes; the last one may be cut by the end). Behind the end of the shorter one, what is not
/// zero differs. What both are known to read as zeroes is not read; the rest is, by several threads.
///
/// # Errors
/// [`Error::Cancelled`] where `cancelled` says so, which is asked before every read; what reading either chain comes to;
/// that of `found`.
///
/// ```
/// use std::sync::Arc;
///
/// use qcow2_chain::chain::{Chain, Layer, Node, differences};
/// use qcow2_chain::format::GuestOffset;
/// use qcow2_chain::image::{CreateOptions, Image};
/// use qcow2_chain::storage::MemoryStorage;
///
/// let disk = |place| {
///     let image = Image::create(Arc::new(MemoryStorage::new("disk")), &CreateOptions::new(1 << 30))?;
///     image.write_at(b"written", GuestOffset::new(place))?;
///     Ok::<Chain, Box<dyn std::error::Error>>(Chain::from_layers(Layer { node: Node::Qcow2(image), path: "disk".into() }, []))
/// };
/// let mut ranges = Vec::new();
/// differences(&disk(5000)?, &disk(500 << 20)?, 512, &|| false, &mut |range| Ok(ranges.push(range)))?;
/// assert_eq!(ranges, [4608..5120, 500 << 20..(500 << 20) + 512]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn differences(
    a: &Chain,
    b: &Chain,
    unit: u64,
    progress: &dyn Progress,
    found: &mut dyn FnMut(Range<u64>) -> Result<()>,
) -> Result<()> {
    let unit = unit.next_power_of_two().max(512);
    let size = a.virtual_size().max(b.virtual_size());
    let mut walks = [a, b].map(|chain| Walk::new(Some(chain.extents(0..chain.virtual_size()))));
    let mut at = 0;
    // The next range of which at least one side may hold data; ranges end at a unit's end, so that no unit is looked at twice.
    let mut next = || {
        while at < size {
            let [left, right] = [walks[0].at(at)?, walks[1].at(at)?];
            let end = left.end().min(right.end()).min(size);
            if left.is_zero() && right.is_zero() {
                at = end;
                continue;
            }
            let start = at - at % unit;
            let most = (start - start % CHUNK).saturating_add(CHUNK.max(unit));
            at = end.checked_next_multiple_of(unit).unwrap_or(size).min(most).min(size);
            return Ok(Some(start..at));
        }
        Ok(None)
    };
    let look = |range: Range<u64>| {
        if progress.is_cancelled() {
            return Err(Error::Cancelled);
        }
        let len = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
        let (left, right) = (read(a, range.start, len)?, read(b, range.start, len)?);
        let step = usize::try_from(unit).unwrap_or(usize::MAX);
        let units = left.chunks(step).zip(right.chunks(step)).enumerate();
        let differing = units.filter(|(_, (left, right))| left != right).map(|(number, _)| {
            let start = range.start + number as u64 * unit;
            start..(start + unit).min(range.end)
        });
        Ok(differing.collect::<Vec<_>>())
    };
    let mut run: Option<Range<u64>> = None;
    in_order(threads(), &mut next, &look, &mut |ranges| {
        for range in ranges {
            match &mut run {
                Some(run) if run.end == range.start => run.end = range.end,
                run => run.replace(range).map_or(Ok(()), &mut *found)?,
            }
        }
        Ok(())
    })?;
    run.map_or(Ok(()), found)
}

/// What a chain reads, zeroes behind its end.
fn read(chain: &Chain, at: u64, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    let inside = usize::try_from(chain.virtual_size().saturating_sub(at)).unwrap_or(usize::MAX).min(len);
    if inside > 0 {
        chain.read_at(&mut bytes[..inside], GuestOffset::new(at))?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::chain::{Format, Layer, Node};
    use crate::image::{CreateOptions, Image, RawImage};
    use crate::storage::MemoryStorage;

    /// A disk that holds these bytes, as this format.
    fn disk(bytes: &[u8], format: Format) -> Chain {
        let node = match format {
            Format::Raw => Node::Raw(RawImage::open(Arc::new(MemoryStorage::with_bytes("raw", bytes))).unwrap()),
            Format::Qcow2 => {
                let options = CreateOptions::new(bytes.len() as u64);
                let image = Image::create(Arc::new(MemoryStorage::new("qcow2")), &options).unwrap();
                for (number, cluster) in bytes.chunks(65536).enumerate() {
                    if cluster.iter().any(|&byte| byte != 0) {
                        image.write_at(cluster, GuestOffset::new(number as u64 * 65536)).unwrap();
                    }
                }
                Node::Qcow2(image)
            }
        };
        Chain::from_layers(Layer { node, path: "disk".into() }, [])
    }

    /// What should be found, byte by byte.
    fn expected(a: &[u8], b: &[u8], unit: usize) -> Vec<Range<u64>> {
        let size = a.len().max(b.len());
        let byte = |bytes: &[u8], at: usize| bytes.get(at).copied().unwrap_or(0);
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for start in (0..size).step_by(unit) {
            let end = (start + unit).min(size);
            if (start..end).all(|at| byte(a, at) == byte(b, at)) {
                continue;
            }
            match ranges.last_mut() {
                Some(last) if last.end == start as u64 => last.end = end as u64,
                _ => ranges.push(start as u64..end as u64),
            }
        }
        ranges
    }

    #[test]
    fn every_differing_unit_is_told_once_and_in_order() {
        let mut seed = 1_u64;
        let mut random = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % below
        };
        for case in 0..8_usize {
            let size = 512 * (1 + usize::try_from(random(8000)).unwrap());
            let mut a = vec![0; size];
            for _ in 0..random(30) {
                let start = usize::try_from(random(size as u64)).unwrap();
                let end = (start + usize::try_from(random(200_000)).unwrap()).min(size);
                a[start..end].fill(u8::try_from(random(3)).unwrap());
            }
            let mut b = a.clone();
            b.resize(512 * (1 + usize::try_from(random(8000)).unwrap()), 0);
            for _ in 0..random(12) {
                let start = usize::try_from(random(b.len() as u64)).unwrap();
                let end = (start + usize::try_from(random(3000)).unwrap()).min(b.len());
                b[start..end].fill(u8::try_from(random(3)).unwrap());
            }
            let formats = [Format::Raw, Format::Qcow2];
            let (left, right) = (disk(&a, formats[case % 2]), disk(&b, formats[case / 2 % 2]));
            for unit in [512, 4096, 65536, 4 << 20] {
                let mut found = Vec::new();
                let done = differences(&left, &right, unit as u64, &|| false, &mut |range| {
                    found.push(range);
                    Ok(())
                });
                done.unwrap();
                assert_eq!(found, expected(&a, &b, unit), "case {case}, unit {unit}");
            }
        }
    }

    #[test]
    fn it_stops_where_it_is_told_to() {
        let (a, b) = (disk(&[1; 8192], Format::Raw), disk(&[2; 8192], Format::Raw));
        let cancelled = differences(&a, &b, 512, &|| true, &mut |_| Ok(()));
        assert!(matches!(cancelled, Err(Error::Cancelled)), "{cancelled:?}");
        let stopped = differences(&a, &b, 512, &|| false, &mut |_| Err(Error::Cancelled));
        assert!(matches!(stopped, Err(Error::Cancelled)), "{stopped:?}");
    }
}
