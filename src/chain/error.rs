//! What a chain says when it cannot. OWNER: chain helper

use thiserror::Error as ThisError;

use crate::image;

/// The result of an operation on a chain.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a chain could not be opened or used.
#[derive(Debug, ThisError)]
#[non_exhaustive]
pub enum Error {
    /// One image of it failed.
    #[error(transparent)]
    Image(#[from] image::Error),
}
