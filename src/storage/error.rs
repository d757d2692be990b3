//! The errors of storages and file systems.

use std::io;

use thiserror::Error;

/// The result of a storage operation.
pub type Result<T> = std::result::Result<T, Error>;

/// The error of a storage or file system operation.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system returned an error.
    #[error("{name}: cannot {action}")]
    Io {
        /// The storage's name.
        name: String,
        /// The attempted action, with its offset.
        action: String,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The medium is full. The operation can be repeated when there is space.
    #[error("{name}: no space left for {need} bytes")]
    NoSpace {
        /// The storage's name.
        name: String,
        /// The bytes that the operation needs.
        need: u64,
    },
    /// Another program, or another handle of this one, holds a lock on the image.
    #[error("{name}: {held} (is another process using the image?)")]
    Busy {
        /// The storage's name.
        name: String,
        /// The lock that is held, in QEMU's words: `failed to get "write" lock`.
        held: String,
    },
    /// The storage was opened for reading only.
    #[error("{name}: opened read-only")]
    ReadOnly {
        /// The storage's name.
        name: String,
    },
    /// The storage or the platform does not support the operation.
    #[error("{name}: {what} is not supported here")]
    Unsupported {
        /// The storage's name.
        name: String,
        /// The operation.
        what: String,
    },
    /// A name was refused: it leads out of its directory, or is neither a regular file nor a block
    /// device.
    #[error("{name}: refused: {why}")]
    Refused {
        /// The name.
        name: String,
        /// The reason.
        why: String,
    },
    /// An attribute of a model cannot be set on a new file, see
    /// [`super::FileSystem::create_new_like`].
    #[error("{name}: cannot set {attribute} on a new file")]
    Attribute {
        /// The new file, or the directory that it would be created in.
        name: String,
        /// The attribute with its value: `owner 64055`, `mode 0640`, `extended attribute
        /// user.note`.
        attribute: String,
        /// The error of the operating system.
        source: io::Error,
    },
    /// An earlier `sync` failed. Data that was written before it may be lost.
    #[error("{name}: an earlier sync failed, the handle is no longer used")]
    Poisoned {
        /// The storage's name.
        name: String,
    },
}

impl Error {
    /// Converts an error of the operating system: to [`Error::NoSpace`] for `len` bytes where it
    /// reports a full medium, quota or file, to [`Error::Io`] otherwise.
    pub fn io(name: &str, action: impl Into<String>, len: u64, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                Self::NoSpace { name: name.to_owned(), need: len }
            }
            _ => Self::Io { name: name.to_owned(), action: action.into(), source },
        }
    }

    /// Returns an [`Error::Unsupported`].
    pub fn unsupported(name: &str, what: impl Into<String>) -> Self {
        Self::Unsupported { name: name.to_owned(), what: what.into() }
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::Io { source, .. } | Error::Attribute { source, .. } => source.kind(),
            Error::NoSpace { .. } => io::ErrorKind::StorageFull,
            Error::Busy { .. } => io::ErrorKind::ResourceBusy,
            Error::ReadOnly { .. } => io::ErrorKind::ReadOnlyFilesystem,
            Error::Unsupported { .. } => io::ErrorKind::Unsupported,
            Error::Refused { .. } => io::ErrorKind::PermissionDenied,
            Error::Poisoned { .. } => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}
