//! One member of a chain, whatever its format.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use crate::format::GuestOffset;
use crate::image::{Backing, Extent, Extents, Image, RawImage, Result};
use crate::storage::{self, Storage};

/// The format of a chain's member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "json", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "lowercase"))]
pub enum Format {
    /// qcow2.
    Qcow2,
    /// Raw.
    Raw,
}

impl Format {
    /// The format that a backing format extension or an option names, if it is one of ours.
    #[must_use]
    pub fn from_name(name: &[u8]) -> Option<Self> {
        match name {
            b"qcow2" => Some(Self::Qcow2),
            b"raw" => Some(Self::Raw),
            _ => None,
        }
    }

    /// QEMU's name of the format.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// One layer of a chain: the image and how it was reached.
#[derive(Debug)]
pub struct Layer {
    /// The image.
    pub node: Node,
    /// The path it was opened by: the caller's for the top, else the backing file's name as seen from the directory of
    /// the image that names it.
    pub path: PathBuf,
}

impl Layer {
    /// The format of the image.
    #[must_use]
    pub const fn format(&self) -> Format {
        self.node.format()
    }
}

/// One image of a chain.
#[derive(Debug)]
pub enum Node {
    /// A qcow2 image.
    Qcow2(Image),
    /// A raw image.
    Raw(RawImage),
}

impl Node {
    /// The format.
    #[must_use]
    pub const fn format(&self) -> Format {
        match self {
            Self::Qcow2(_) => Format::Qcow2,
            Self::Raw(_) => Format::Raw,
        }
    }

    /// The qcow2 image, if it is one.
    #[must_use]
    pub const fn as_qcow2(&self) -> Option<&Image> {
        match self {
            Self::Qcow2(image) => Some(image),
            Self::Raw(_) => None,
        }
    }

    /// The storage it lies on.
    #[must_use]
    pub fn storage(&self) -> &Arc<dyn Storage> {
        match self {
            Self::Qcow2(image) => image.storage(),
            Self::Raw(image) => image.storage(),
        }
    }

    /// What messages call it.
    #[must_use]
    pub fn name(&self) -> &str {
        self.storage().name()
    }

    /// The virtual size in bytes.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        match self {
            Self::Qcow2(image) => image.virtual_size(),
            Self::Raw(image) => image.virtual_size(),
        }
    }

    /// Whether writes are refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        match self {
            Self::Qcow2(image) => image.is_read_only(),
            Self::Raw(image) => image.storage().is_read_only(),
        }
    }

    /// Whether guest data can be read and written at all.
    ///
    /// # Errors
    /// As [`Image::data_access`].
    pub fn data_access(&self) -> Result<()> {
        match self {
            Self::Qcow2(image) => image.data_access(),
            Self::Raw(_) => Ok(()),
        }
    }

    /// Reads what this image itself holds, as [`Image::read_present`]; a raw image holds everything.
    ///
    /// # Errors
    /// As [`Image::read_present`].
    pub fn read_present(&self, buf: &mut [u8], offset: GuestOffset, holes: &mut Vec<(usize, usize)>) -> Result<()> {
        match self {
            Self::Qcow2(image) => image.read_present(buf, offset, holes),
            Self::Raw(image) => image.read_at(buf, offset),
        }
    }

    /// What this image itself holds of a guest range, coalesced and lazily; nothing past its virtual size.
    pub fn extents(&self, range: Range<u64>) -> impl Iterator<Item = Result<Extent>> + '_ {
        match self {
            Self::Qcow2(image) => NodeExtents::Qcow2(image.extents(range)),
            Self::Raw(image) => NodeExtents::Raw(image.extents(range)),
        }
    }

    /// Returns when what was written is durable. There is nothing to do for an image that cannot be written.
    ///
    /// # Errors
    /// As [`Image::flush`].
    pub fn flush(&self) -> Result<()> {
        if self.is_read_only() {
            return Ok(());
        }
        match self {
            Self::Qcow2(image) => image.flush(),
            Self::Raw(image) => image.flush(),
        }
    }

    pub(super) fn close(self) -> Result<()> {
        if self.is_read_only() {
            return Ok(());
        }
        match self {
            Self::Qcow2(image) => image.close(),
            Self::Raw(image) => image.flush(),
        }
    }

    pub(super) fn write_over(&self, buf: &[u8], offset: GuestOffset, below: &dyn Backing) -> Result<()> {
        match self {
            Self::Qcow2(image) => image.write_at_over(buf, offset, below),
            Self::Raw(image) => image.write_at(buf, offset),
        }
    }

    pub(super) fn write_zeroes_over(&self, offset: GuestOffset, len: u64, below: &dyn Backing) -> Result<()> {
        match self {
            Self::Qcow2(image) => image.write_zeroes_at_over(offset, len, below),
            Self::Raw(image) => image.write_zeroes_at(offset, len),
        }
    }

    pub(super) fn discard(&self, offset: GuestOffset, len: u64) -> Result<()> {
        match self {
            Self::Qcow2(image) => image.discard_at(offset, len),
            Self::Raw(image) => {
                let end = offset.get().saturating_add(len).min(image.storage().len()?);
                if offset.get() >= end {
                    return Ok(());
                }
                match image.storage().punch_range(offset.get()..end) {
                    // A discard is only a hint.
                    Err(storage::Error::Unsupported { .. }) => Ok(()),
                    done => Ok(done?),
                }
            }
        }
    }
}

/// The extents of either format.
enum NodeExtents<'a, R> {
    Qcow2(Extents<'a>),
    Raw(R),
}

impl<R: Iterator<Item = Result<Extent>>> Iterator for NodeExtents<'_, R> {
    type Item = Result<Extent>;

    fn next(&mut self) -> Option<Self::Item> {
        match self {
            Self::Qcow2(extents) => extents.next(),
            Self::Raw(extents) => extents.next(),
        }
    }
}
