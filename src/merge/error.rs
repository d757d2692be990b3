//! What a merge says when it cannot.

use std::io;
use std::path::PathBuf;

use thiserror::Error as ThisError;

use crate::{chain, image, storage};

/// The result of a merge.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a merge did not happen, or stopped. The chain reads as before in every case.
#[derive(Debug, ThisError)]
#[non_exhaustive]
pub enum Error {
    /// Reading the chain failed.
    #[error(transparent)]
    Chain(#[from] chain::Error),
    /// Reading or writing one image failed.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// The merge would do harm or makes no sense for this chain.
    #[error("{file}: {why}")]
    Refused {
        /// The image that stands in the way.
        file: String,
        /// Why.
        why: String,
    },
    /// Other images stand on a layer whose content the merge would change; nothing was written.
    #[error("{file}: other images are over it and would change: {}", paths(dependents))]
    Dependents {
        /// The layer that would change.
        file: String,
        /// The images over it that are not part of this chain.
        dependents: Vec<PathBuf>,
    },
    /// An image has internal snapshots that show what is beneath it where they hold nothing themselves, and that would
    /// change; nothing was written.
    #[error("{file}: internal snapshots would show other content than they do now: {}", snapshots.join(", "))]
    StaleSnapshots {
        /// The image with the snapshots.
        file: String,
        /// Their names.
        snapshots: Vec<String>,
    },
    /// There is not enough room for what the merge would write; nothing was written.
    #[error("{file}: the merge needs {need} bytes, {have} are free")]
    NoSpace {
        /// The image that would grow.
        file: String,
        /// What the merge needs, in bytes.
        need: u64,
        /// What is free, in bytes.
        have: u64,
    },
    /// The caller asked to stop. What was merged by then is merged again by the next run.
    #[error("cancelled")]
    Cancelled,
}

/// Paths, joined by commas.
fn paths(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

impl From<storage::Error> for Error {
    fn from(error: storage::Error) -> Self {
        Self::Image(error.into())
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Chain(error) => error.into(),
            Error::Image(error) => error.into(),
            Error::Refused { .. } | Error::Dependents { .. } | Error::StaleSnapshots { .. } => {
                Self::new(io::ErrorKind::InvalidInput, error)
            }
            Error::NoSpace { .. } => Self::new(io::ErrorKind::StorageFull, error),
            Error::Cancelled => Self::new(io::ErrorKind::Interrupted, error),
        }
    }
}
