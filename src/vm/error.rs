//! The error type of the tier.

use std::io;
use std::time::Duration;

use thiserror::Error as ThisError;

use super::Refusal;
use crate::{chain, image, merge, storage};

/// The result of an operation on a snapshot set.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The error of an operation on a snapshot set.
#[derive(Debug, ThisError)]
#[non_exhaustive]
pub enum Error {
    /// The operation was refused. Nothing was changed.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The space is not sufficient. Nothing was changed.
    #[error("{file}: {need} bytes of free space are needed, {have} are available")]
    NoSpace {
        /// A file that would grow.
        file: String,
        /// The bytes needed on its file system.
        need: u64,
        /// The bytes available there.
        have: u64,
    },
    /// The catalogue is damaged or contradicts itself.
    #[error("{file}: {why}")]
    Catalogue {
        /// The catalogue.
        file: String,
        /// The damage.
        why: String,
    },
    /// The journal is damaged in a way that no crash explains.
    #[error("{file}: {why}")]
    Journal {
        /// The journal.
        file: String,
        /// The damage.
        why: String,
    },
    /// Some volumes failed. The others are done and recorded. The operation can be resumed.
    #[error("volume {volume} failed; done: [{}], left: [{}]", done.join(", "), left.join(", "))]
    Incomplete {
        /// The first volume that failed.
        volume: String,
        /// The volumes that are done.
        done: Vec<String>,
        /// The volumes that are not done.
        left: Vec<String>,
        /// The error of the first volume.
        source: Box<Error>,
    },
    /// A file or directory failed.
    #[error(transparent)]
    Storage(#[from] storage::Error),
    /// An image failed.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// A chain failed.
    #[error(transparent)]
    Chain(#[from] chain::Error),
    /// A merge failed.
    #[error(transparent)]
    Merge(#[from] merge::Error),
    /// The hypervisor failed.
    #[error("{what}")]
    Hypervisor {
        /// The action and the failure.
        what: String,
        /// The hypervisor's error, if there is one.
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// It is not known if the hypervisor did what it was asked for, or which file the VM wrote
    /// last. Nothing was taken back. Recovery needs the hypervisor's answer or the caller's
    /// statement.
    #[error("{what}: the outcome is uncertain; recover with the hypervisor, or state the file that the VM runs on")]
    Uncertain {
        /// The action in question.
        what: String,
        /// The reason why there was no answer.
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// The merge of a running VM took longer than allowed. The operation can be resumed.
    #[error(
        "disk {disk}: the merge timed out after {} s; {}",
        after.as_secs(),
        if *running {
            "its block job continues, and the same deletion takes it over"
        } else {
            "its block job was aborted, and the VM keeps its files"
        }
    )]
    TimedOut {
        /// The hypervisor's name of the disk.
        disk: String,
        /// The elapsed time.
        after: Duration,
        /// If set, the job goes on.
        running: bool,
    },
    /// The caller cancelled the operation. If it had begun, it can be resumed.
    #[error("cancelled")]
    Cancelled,
}

impl Error {
    /// Returns the refusal, if this is one.
    #[must_use]
    pub fn refusal(&self) -> Option<&Refusal> {
        match self {
            Self::Refused(refusal) => Some(refusal),
            _ => None,
        }
    }

    /// Returns the error that caused this one to fail: of [`Error::Incomplete`], that of the first
    /// volume.
    #[must_use]
    pub fn root(&self) -> &Self {
        match self {
            Self::Incomplete { source, .. } => source.root(),
            error => error,
        }
    }

    /// Returns true if the cause is a timeout.
    #[must_use]
    pub fn is_timed_out(&self) -> bool {
        matches!(self.root(), Self::TimedOut { .. })
    }

    /// Returns true if the outcome is uncertain.
    #[must_use]
    pub fn is_uncertain(&self) -> bool {
        matches!(self.root(), Self::Uncertain { .. })
    }

    /// Returns true if the caller cancelled the operation.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        matches!(
            self.root(),
            Self::Cancelled
                | Self::Merge(merge::Error::Cancelled)
                | Self::Chain(chain::Error::Cancelled)
                | Self::Image(image::Error::Cancelled)
        )
    }
}

/// Returns the text of an error and its causes.
pub(super) fn with_causes(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::Refused(Refusal::Locked { .. } | Refusal::InUse { .. }) => io::ErrorKind::ResourceBusy,
            Error::Refused(_) => io::ErrorKind::InvalidInput,
            Error::NoSpace { .. } => io::ErrorKind::StorageFull,
            Error::Catalogue { .. } | Error::Journal { .. } => io::ErrorKind::InvalidData,
            Error::Cancelled => io::ErrorKind::Interrupted,
            Error::TimedOut { .. } => io::ErrorKind::TimedOut,
            _ => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}
