//! Several images as one disk.
//!
//! A chain is opened from its top ([`Chain::open`]) by a [`Policy`] that says which of the backing files that images
//! name are followed, and by formats that are told, never guessed. It is then read and written like one image
//! ([`Chain::read_at`], [`Chain::write_at`], [`ChainReader`]), asked which layer decides what ([`Chain::extents`]),
//! described ([`Chain::describe`]) and compared ([`compare`](compare()), [`differences`](differences())).
//! [`find_dependents`] finds other images that are backed by some files.
//!
//! A layer that is shorter than the one above it reads as zeroes beyond its end: what deeper layers hold there stays
//! hidden. A longer one is cut.

use std::sync::Arc;

use crate::storage::FileSystem;

mod compare;
mod dependents;
mod describe;
mod differences;
mod digest;
mod error;
mod extents;
pub(crate) mod in_order;
mod node;
mod open;
mod policy;
mod read;
mod reader;

pub use compare::{CompareOptions, Comparison, compare};
pub use dependents::{DependentSearch, ExternalDependent, find_dependents};
pub(crate) use dependents::{Identity, Sought, search_directories};
pub(crate) use describe::Bytes;
pub use describe::{BackingDescription, Description, Flags, Held, LayerDescription};
pub use differences::differences;
pub use error::{Error, Remedy, Result};
pub(crate) use extents::Walk;
pub use extents::{ChainExtent, ChainExtents};
pub use node::{Format, Layer, Node};
pub use open::ChainOptions;
pub use policy::{Policy, has_protocol};
pub use read::Below;
pub use reader::ChainReader;

/// Several images as one disk, the top first. All methods take `&self`: a chain serves many threads.
#[derive(Debug)]
pub struct Chain {
    /// Never empty.
    layers: Vec<Layer>,
    /// Whether any layer's data cannot be understood: then nothing is read or written.
    data_denied: bool,
    /// What the layers' paths are names in; none where somebody else opened them.
    names: Option<Arc<dyn FileSystem>>,
}

impl Chain {
    /// A chain of images that are open already, `top` first, then what it is over.
    #[must_use]
    pub fn from_layers(top: Layer, below: impl IntoIterator<Item = Layer>) -> Self {
        let mut layers = vec![top];
        layers.extend(below);
        let data_denied = layers.iter().any(|layer| layer.node.data_access().is_err());
        Self { layers, data_denied, names: None }
    }

    /// What the layers' paths are names in, where the chain was opened by name.
    pub(crate) fn names(&self) -> Option<&Arc<dyn FileSystem>> {
        self.names.as_ref()
    }

    /// The layers, the top first; never empty.
    #[must_use]
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The layers for uses of their own, the top first.
    #[must_use]
    pub fn into_layers(self) -> Vec<Layer> {
        self.layers
    }

    /// The layer that the guest writes to.
    #[must_use]
    pub fn top(&self) -> &Layer {
        &self.layers[0]
    }

    /// The virtual size in bytes: the top's.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.top().node.virtual_size()
    }

    /// Returns when everything written before is durable.
    ///
    /// # Errors
    /// As [`crate::image::Image::flush`].
    pub fn flush(&self) -> Result<()> {
        Ok(self.top().node.flush()?)
    }

    /// Makes durable what was written and ends the use of all layers.
    ///
    /// # Errors
    /// As [`crate::image::Image::close`]. All layers are closed; the first error is returned.
    pub fn close(self) -> Result<()> {
        let mut first = Ok(());
        for layer in self.layers {
            first = first.and(layer.node.close());
        }
        Ok(first?)
    }
}
