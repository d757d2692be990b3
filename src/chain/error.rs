//! What a chain says when it cannot.

use std::fmt;
use std::io;
use std::path::PathBuf;

use thiserror::Error as ThisError;

use crate::{image, storage};

/// The result of an operation on a chain.
pub type Result<T> = std::result::Result<T, Error>;

/// Which policy would allow a backing file that was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Remedy {
    /// None would: such a name is never opened.
    Never,
    /// [`super::Policy::Beneath`] with this directory.
    Beneath(PathBuf),
    /// [`super::Policy::List`] with this file.
    List(PathBuf),
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Never => write!(f, "no policy allows it"),
            Self::Beneath(directory) => write!(f, "allowing files beneath {} would open it", directory.display()),
            Self::List(file) => write!(f, "allowing the file {} would open it", file.display()),
        }
    }
}

/// Why a chain could not be opened or used.
#[derive(Debug, ThisError)]
#[non_exhaustive]
pub enum Error {
    /// One image of it failed.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// A file could not be opened, is locked by another, or failed.
    #[error(transparent)]
    Storage(#[from] storage::Error),
    /// The policy, or a rule that no policy lifts, forbids the backing file that an image names.
    #[error("{file}: backing file '{backing}' is refused: {why}; {remedy}")]
    Refused {
        /// The image that names it.
        file: String,
        /// The name as it stands in the image.
        backing: String,
        /// Which rule.
        why: String,
        /// Which policy would allow it.
        remedy: Remedy,
    },
    /// A backing file is already in the chain above.
    #[error("{file}: backing file '{backing}' is in the chain already: a loop")]
    Loop {
        /// The image that names it.
        file: String,
        /// The name as it stands in the image.
        backing: String,
    },
    /// The chain has more layers than allowed.
    #[error("{file}: the chain has more than {limit} layers")]
    Depth {
        /// The last image that was opened.
        file: String,
        /// The most layers allowed.
        limit: usize,
    },
    /// An image names a backing file without its format, and formats are not guessed unless
    /// [`super::ChainOptions::probe`] says so.
    #[error("{file}: backing file '{backing}' has no recorded format, and formats are not guessed")]
    UnknownFormat {
        /// The image that names it.
        file: String,
        /// The name as it stands in the image.
        backing: String,
    },
    /// A backing file's recorded format is neither `qcow2` nor `raw`.
    #[error("{file}: backing file '{backing}' has format '{format}', which is not supported")]
    UnsupportedFormat {
        /// The image that names it.
        file: String,
        /// The name as it stands in the image.
        backing: String,
        /// The recorded format.
        format: String,
    },
    /// A read or write reaches past the end of the virtual disk.
    #[error("{file}: {len} bytes at {offset:#x} reach past the end of the disk at {size:#x}")]
    PastEnd {
        /// The top image.
        file: String,
        /// Where the range starts.
        offset: u64,
        /// Its length in bytes.
        len: u64,
        /// The virtual size.
        size: u64,
    },
    /// A file or directory cannot be examined in the search for dependents.
    #[error(
        "{file}: cannot be examined, so it is not known if it depends on a file of this operation; make it readable, \
         or switch the search for dependents off (commit: no --dependents-in; vm: --no-dependents)"
    )]
    DependentsUnknown {
        /// The file or directory: one in a searched directory, or one that an image there names.
        file: String,
        /// Why it cannot be examined.
        source: storage::Error,
    },
    /// The search for dependents would read more files than allowed; it has read none.
    #[error(
        "{directory}: the search for dependents would read {found} files, the limit is {limit}; raise the limit, \
         search fewer directories, or switch the search off (commit: no --dependents-in; vm: --no-dependents)"
    )]
    DependentsLimit {
        /// The directory whose files exceed the limit.
        directory: String,
        /// The number of files in this directory and in those before it.
        found: usize,
        /// The largest number allowed.
        limit: usize,
    },
    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match error {
            Error::Image(image) => return image.into(),
            Error::Storage(storage) => return storage.into(),
            Error::Refused { .. } => io::ErrorKind::PermissionDenied,
            Error::Loop { .. } | Error::Depth { .. } => io::ErrorKind::InvalidData,
            Error::UnknownFormat { .. } | Error::PastEnd { .. } => io::ErrorKind::InvalidInput,
            Error::UnsupportedFormat { .. } => io::ErrorKind::Unsupported,
            Error::DependentsUnknown { source: storage::Error::Io { ref source, .. }, .. } => source.kind(),
            Error::DependentsUnknown { .. } => io::ErrorKind::Other,
            Error::DependentsLimit { .. } => io::ErrorKind::QuotaExceeded,
            Error::Cancelled => io::ErrorKind::Interrupted,
        };
        Self::new(kind, error)
    }
}
