//! What an image says when it cannot.

use std::io;

use thiserror::Error as ThisError;

use crate::format::FormatError;
use crate::storage;

/// The result of an operation on one image.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operation on an image did not happen.
#[derive(Debug, ThisError)]
#[non_exhaustive]
pub enum Error {
    /// The storage failed, is locked by another, full, or read-only.
    #[error(transparent)]
    Storage(#[from] storage::Error),
    /// The file breaks a rule of the format.
    #[error("{file}: corrupt image")]
    Corrupt {
        /// The image.
        file: String,
        /// Which structure, where, what was found and expected.
        source: FormatError,
    },
    /// The image is marked corrupt: it may be read, and repaired, but not written.
    #[error("{file}: marked corrupt; repair it before it is written")]
    MarkedCorrupt {
        /// The image.
        file: String,
    },
    /// The image, or the request, uses something that this library does not serve.
    #[error("{file}: {what} is not supported")]
    Unsupported {
        /// The image.
        file: String,
        /// The feature.
        what: String,
    },
    /// A number in the file, or a result of the request, is over a limit.
    #[error("{file}: over a limit: {what}")]
    Limit {
        /// The image.
        file: String,
        /// Which limit, found and allowed.
        what: String,
    },
    /// The request would do harm or makes no sense for this image.
    #[error("{file}: {why}")]
    Refused {
        /// The image.
        file: String,
        /// Why.
        why: String,
    },
    /// A write was about to hit the image's own metadata; the image is now marked corrupt.
    #[error("{file}: a write to cluster {cluster:#x} would overwrite {structure}; the image is marked corrupt")]
    Overlap {
        /// The image.
        file: String,
        /// The host offset of the cluster.
        cluster: u64,
        /// What lies there.
        structure: &'static str,
    },
    /// An earlier write to metadata failed half-way: the handle no longer knows what the file holds.
    #[error("{file}: an earlier write failed, open the image again")]
    Poisoned {
        /// The image.
        file: String,
    },
    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,
}

impl Error {
    /// A [`FormatError`] of this file, in the family it belongs to.
    pub(crate) fn format(file: &str, error: FormatError) -> Self {
        match error {
            FormatError::Unsupported { what } => Self::Unsupported { file: file.to_owned(), what },
            FormatError::Limit { .. } => Self::Limit { file: file.to_owned(), what: error.to_string() },
            corrupt => Self::Corrupt { file: file.to_owned(), source: corrupt },
        }
    }

    /// An [`Error::Refused`].
    pub(crate) fn refused(file: &str, why: impl Into<String>) -> Self {
        Self::Refused { file: file.to_owned(), why: why.into() }
    }

    /// An [`Error::Unsupported`].
    pub(crate) fn unsupported(file: &str, what: impl Into<String>) -> Self {
        Self::Unsupported { file: file.to_owned(), what: what.into() }
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::Storage(_) => {
                let Error::Storage(storage) = error else { unreachable!("matched above") };
                return storage.into();
            }
            Error::Corrupt { .. } | Error::MarkedCorrupt { .. } | Error::Overlap { .. } => io::ErrorKind::InvalidData,
            Error::Unsupported { .. } => io::ErrorKind::Unsupported,
            Error::Limit { .. } | Error::Refused { .. } => io::ErrorKind::InvalidInput,
            Error::Cancelled => io::ErrorKind::Interrupted,
            Error::Poisoned { .. } => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}
