//! Overlays on media that the library does not manage, such as logical volumes.

use std::fmt;
use std::path::{Path, PathBuf};

use super::Result;

/// A request for a new overlay.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct OverlayRequest<'a> {
    /// The VM's name.
    pub vm: &'a str,
    /// The volume's name.
    pub volume: &'a str,
    /// A name for the overlay, unique by its random part: `vm-vda.3-0123456789abcdef`.
    pub name: &'a str,
    /// The virtual size in bytes.
    pub virtual_size: u64,
    /// The size in bytes that suffices for an overlay of which every cluster is written, its
    /// metadata included.
    pub full_size: u64,
}

/// Creates and releases the containers of overlays, such as logical volumes.
///
/// The plan of an operation names every file before the first one is created, and recovery finds
/// the files by these names. The path is therefore a function of the request, and a call of its
/// own; `create` and `release` do the work. Both can be called again after an interruption.
///
/// The path must contain [`OverlayRequest::name`], which is unique. The provider sets owner, group
/// and mode of the device node or file; the library does not change them.
///
/// The example `lvm_overlays` has an implementation over LVM.
pub trait OverlayProvider: Send + Sync + fmt::Debug {
    /// Returns the absolute path that the overlay of this request will have. Creates nothing.
    ///
    /// # Errors
    /// The reason why the volume can have no overlay.
    fn path(&self, request: &OverlayRequest<'_>) -> Result<PathBuf>;

    /// Creates the container, of which the library then writes the content. Fails if it exists. A
    /// failed call leaves nothing behind.
    ///
    /// # Errors
    /// Any. The operation is undone then.
    fn create(&self, request: &OverlayRequest<'_>) -> Result<()>;

    /// Removes the container. It is not in use, and no record names it. A missing container is no
    /// error.
    ///
    /// # Errors
    /// Any. The operation stays unfinished then, and recovery calls this again.
    fn release(&self, path: &Path) -> Result<()>;
}
