//! The seam for the medium that keeps the model.

use std::fmt;

use crate::vm::{Model, Result};

/// Keeps a VM's model: in a file ([`crate::vm::Catalogue`]), or in the database of the program that
/// uses this library.
pub trait Store: Send + Sync + fmt::Debug {
    /// Returns the model that was saved last.
    ///
    /// # Errors
    /// Any: the model cannot be read, or is damaged.
    fn load(&self) -> Result<Model>;

    /// Replaces the model atomically, durable on return: after a crash, [`Store::load`] returns the
    /// old or the new one. After an error it may return either.
    ///
    /// # Errors
    /// Any: the new model is not durable.
    fn save(&self, model: &Model) -> Result<()>;

    /// Makes the model that [`Store::load`] returns durable, also after a [`Store::save`] that
    /// failed or was interrupted.
    ///
    /// # Errors
    /// Any: the model is not durable.
    fn settle(&self) -> Result<()>;
}
