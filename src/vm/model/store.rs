//! Where the model is kept.

use std::fmt;

use crate::vm::{Model, Result};

/// Keeps a VM's model: a file ([`crate::vm::Catalogue`]), or the database of the program that uses this library.
pub trait Store: Send + Sync + fmt::Debug {
    /// The model as it was last saved.
    ///
    /// # Errors
    /// Whatever keeps it from being read, damage among it.
    fn load(&self) -> Result<Model>;

    /// Replaces the model in one step: after a crash the old or the new one is loaded. Durable on return. After an error
    /// either may be loaded.
    ///
    /// # Errors
    /// Whatever keeps it from being durable.
    fn save(&self, model: &Model) -> Result<()>;

    /// Sees to it that what [`Store::load`] gives is durable, whatever became of the last [`Store::save`].
    ///
    /// # Errors
    /// Whatever keeps it from being durable.
    fn settle(&self) -> Result<()>;
}
