//! What the floor says when something went wrong.

use std::io;
use std::time::Duration;

use thiserror::Error as ThisError;

use super::Refusal;
use crate::{chain, image, merge, storage};

/// The result of an operation on a VM's snapshots.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operation on a VM's snapshots did not happen, or was not completed.
#[derive(Debug, ThisError)]
#[non_exhaustive]
pub enum Error {
    /// It is not done; nothing was changed.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// There is not enough room; nothing was changed.
    #[error("{file}: {need} bytes are needed, {have} are free")]
    NoSpace {
        /// A file that would grow.
        file: String,
        /// What is needed where it lies, in bytes.
        need: u64,
        /// What is free there, in bytes.
        have: u64,
    },
    /// The catalogue is damaged or contradicts itself.
    #[error("{file}: {why}")]
    Catalogue {
        /// The catalogue.
        file: String,
        /// What is wrong.
        why: String,
    },
    /// The journal is damaged beyond what a crash explains.
    #[error("{file}: {why}")]
    Journal {
        /// The journal.
        file: String,
        /// What is wrong.
        why: String,
    },
    /// Some volumes could not be merged. Those that could are recorded, the VM can be started, and the operation can be
    /// resumed.
    #[error("volume {volume} failed; done: {done:?}, left: {left:?}")]
    Incomplete {
        /// The first volume that failed.
        volume: String,
        /// The volumes that are done.
        done: Vec<String>,
        /// The volumes that are not.
        left: Vec<String>,
        /// Why it failed.
        source: Box<Error>,
    },
    /// A file or name failed.
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
        /// What it was to do.
        what: String,
        /// Its own word, if there is one.
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// The hypervisor was asked for something, and nobody knows whether it did it. Nothing was taken back: recovery decides
    /// when the hypervisor can be asked.
    #[error("{what}: whether it happened is not known; recovery asks the hypervisor")]
    Uncertain {
        /// What it was to do.
        what: String,
        /// Why there was no answer.
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// A running VM's merge took longer than the caller allows. The operation can be resumed.
    #[error("the merge on disk {disk} was not done after {after:?}; {}", if *running { "its job goes on" } else { "its job was ended" })]
    TimedOut {
        /// The hypervisor's name of the disk.
        disk: String,
        /// How long it took so far.
        after: Duration,
        /// Whether its job goes on.
        running: bool,
    },
    /// The caller asked to stop. What has begun can be resumed.
    #[error("cancelled")]
    Cancelled,
}

impl Error {
    /// The refusal, if it is one.
    #[must_use]
    pub fn refusal(&self) -> Option<&Refusal> {
        match self {
            Self::Refused(refusal) => Some(refusal),
            _ => None,
        }
    }

    /// Whether a timeout is behind it.
    #[must_use]
    pub fn is_timed_out(&self) -> bool {
        match self {
            Self::TimedOut { .. } => true,
            Self::Incomplete { source, .. } => source.is_timed_out(),
            _ => false,
        }
    }

    /// Whether the caller's wish to stop is behind it.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        match self {
            Self::Cancelled
            | Self::Merge(merge::Error::Cancelled)
            | Self::Chain(chain::Error::Cancelled)
            | Self::Image(image::Error::Cancelled) => true,
            Self::Incomplete { source, .. } => source.is_cancelled(),
            _ => false,
        }
    }
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
