//! Opening an image.

use crate::format::Limits;

/// How an image is opened.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct OpenOptions {
    /// Whether it will be written. An image with the dirty bit set is repaired first, as QEMU does.
    pub write: bool,
    /// What the image may claim.
    pub limits: Limits,
}

impl OpenOptions {
    /// The same, for writing or not.
    #[must_use]
    pub fn with_write(mut self, write: bool) -> Self {
        self.write = write;
        self
    }

    /// The same with other limits.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }
}
