//! Whether two chains hold the same.

use crate::format::GuestOffset;
use crate::image::ExtentKind;

use super::{Chain, ChainExtent, ChainExtents, Error, Result};

/// How [`compare`] goes about it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CompareOptions {
    /// Whether unequal sizes are a difference, and unequal allocation too, as for `qemu-img compare -s`.
    pub strict: bool,
}

impl CompareOptions {
    /// The same, strict or not.
    #[must_use]
    pub fn with_strict(mut self, strict: bool) -> Self {
        self.strict = strict;
        self
    }
}

/// What [`compare`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Comparison {
    /// The same content; where not strict, what one is longer reads as zeroes.
    Same,
    /// Strict only: the virtual sizes differ. Nothing was read.
    SizeDiffers,
    /// Strict only: from this offset on, one holds what the other does not, or in another way. The content before is the
    /// same.
    AllocationDiffersAt(u64),
    /// The first byte that differs.
    DiffersAt(u64),
}

/// The bytes read at once from each side.
const CHUNK: usize = 2 << 20;

static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Compares what the guest would see of two chains. What both are known to read as zeroes is not read.
///
/// `cancelled` is asked before every read.
///
/// # Errors
/// [`Error::Cancelled`]; what reading either chain comes to.
pub fn compare(a: &Chain, b: &Chain, options: &CompareOptions, cancelled: &dyn Fn() -> bool) -> Result<Comparison> {
    let (longer, common) =
        if a.virtual_size() < b.virtual_size() { (b, a.virtual_size()) } else { (a, b.virtual_size()) };
    if options.strict && longer.virtual_size() != common {
        return Ok(Comparison::SizeDiffers);
    }
    let mut work = Work { left: Vec::new(), right: Vec::new(), cancelled };
    let mut extents = (Pieces::new(a, common), Pieces::new(b, common));
    let mut at = 0;
    while at < common {
        let (left, right) = (extents.0.at(at)?, extents.1.at(at)?);
        if options.strict && allocation(a, &left) != allocation(b, &right) {
            return Ok(Comparison::AllocationDiffersAt(at));
        }
        let end = left.end().min(right.end());
        let sides = [(a, &left), (b, &right)].map(|(chain, extent)| (!extent.is_zero()).then_some(chain));
        if let Some(offset) = work.first_difference(sides, at, end)? {
            return Ok(Comparison::DiffersAt(offset));
        }
        at = end;
    }
    for extent in longer.extents(common..longer.virtual_size()) {
        let extent = extent?;
        let side = (!extent.is_zero()).then_some(longer);
        if let Some(offset) = work.first_difference([side, None], extent.guest.get(), extent.end())? {
            return Ok(Comparison::DiffersAt(offset));
        }
    }
    Ok(Comparison::Same)
}

/// How a chain holds an extent, as far as that can be compared between two chains.
fn allocation(chain: &Chain, extent: &ChainExtent) -> (bool, std::mem::Discriminant<ExtentKind>) {
    // Past the end of a layer that is too short, that layer counts as holding the zeroes.
    let present = extent.layer.is_some() || extent.depth + 1 < chain.layers().len();
    (present, std::mem::discriminant(&extent.kind))
}

/// The extents of a chain, by position.
struct Pieces<'a> {
    extents: ChainExtents<'a>,
    current: Option<ChainExtent>,
}

impl<'a> Pieces<'a> {
    fn new(chain: &'a Chain, end: u64) -> Self {
        Self { extents: chain.extents(0..end), current: None }
    }

    /// The extent that holds a position. Positions never go back.
    fn at(&mut self, position: u64) -> Result<ChainExtent> {
        loop {
            if let Some(current) = self.current.filter(|current| position < current.end()) {
                return Ok(current);
            }
            // A chain that somebody is just shrinking may end early.
            let rest = ChainExtent {
                guest: GuestOffset::new(position),
                len: u64::MAX - position,
                layer: None,
                depth: 0,
                kind: ExtentKind::Zero { host: None },
            };
            self.current = Some(self.extents.next().transpose()?.unwrap_or(rest));
        }
    }
}

/// The buffers of a comparison.
struct Work<'a> {
    left: Vec<u8>,
    right: Vec<u8>,
    cancelled: &'a dyn Fn() -> bool,
}

impl Work<'_> {
    /// The first address in a range at which two chains differ; `None` stands for zeroes.
    fn first_difference(&mut self, sides: [Option<&Chain>; 2], mut at: u64, end: u64) -> Result<Option<u64>> {
        if let [None, None] = sides {
            return Ok(None);
        }
        while at < end {
            if (self.cancelled)() {
                return Err(Error::Cancelled);
            }
            let len = usize::try_from(end - at).unwrap_or(usize::MAX).min(CHUNK);
            let difference = match sides {
                [Some(a), Some(b)] => {
                    let left = read(a, &mut self.left, at, len)?;
                    first_difference(left, read(b, &mut self.right, at, len)?)
                }
                [Some(side), None] | [None, Some(side)] => first_nonzero(read(side, &mut self.left, at, len)?),
                [None, None] => None,
            };
            if let Some(offset) = difference {
                return Ok(Some(at + offset as u64));
            }
            at += len as u64;
        }
        Ok(None)
    }
}

fn read<'b>(chain: &Chain, buf: &'b mut Vec<u8>, at: u64, len: usize) -> Result<&'b [u8]> {
    if buf.len() < len {
        buf.resize(len, 0);
    }
    chain.read_at(&mut buf[..len], GuestOffset::new(at))?;
    Ok(&buf[..len])
}

/// Where two slices of one length first differ. Whole pieces are compared at memory's speed.
fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    let pieces = a.chunks(ZEROES.len()).zip(b.chunks(ZEROES.len()));
    let (index, (a, b)) = pieces.enumerate().find(|(_, (a, b))| a != b)?;
    let offset = a.iter().zip(b).position(|(a, b)| a != b)?;
    Some(index * ZEROES.len() + offset)
}

fn first_nonzero(bytes: &[u8]) -> Option<usize> {
    let (index, piece) = bytes.chunks(ZEROES.len()).enumerate().find(|(_, piece)| **piece != ZEROES[..piece.len()])?;
    Some(index * ZEROES.len() + piece.iter().position(|byte| *byte != 0)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_difference_is_found_behind_whole_pieces() {
        let mut bytes = vec![7; 3 * ZEROES.len() + 5];
        let same = bytes.clone();
        assert_eq!(first_difference(&bytes, &same), None);
        let at = bytes.len() - 1;
        bytes[at] = 8;
        assert_eq!(first_difference(&bytes, &same), Some(at));
        bytes[0] = 8;
        assert_eq!(first_difference(&bytes, &same), Some(0));
    }

    #[test]
    fn the_first_nonzero_byte_is_found() {
        let mut bytes = vec![0; 2 * ZEROES.len() + 1];
        assert_eq!(first_nonzero(&bytes), None);
        bytes[2 * ZEROES.len()] = 1;
        assert_eq!(first_nonzero(&bytes), Some(2 * ZEROES.len()));
        assert_eq!(first_nonzero(&[]), None);
    }
}
