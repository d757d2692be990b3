//! How a merge tells where it is, and is told to stop.

/// What a merge is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Phase {
    /// Walking the metadata to learn what must move.
    Planning,
    /// Copying data and zeroes.
    Copying,
    /// Making mappings durable.
    Publishing,
    /// Emptying the layer that was merged.
    Emptying,
    /// Removing the files of the layers that were merged.
    Removing,
}

/// Where a merge is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Step<'a> {
    /// What it is doing.
    pub phase: Phase,
    /// Guest bytes that are merged.
    pub done: u64,
    /// Guest bytes to merge, 0 while planning.
    pub total: u64,
    /// The image that is written.
    pub file: &'a str,
}

/// Hears of a merge's progress, and can stop it.
///
/// Called some times a second from the thread that merges. The unit type `()` hears nothing and never stops.
///
/// ```
/// use qcow2_chain::merge::{Progress, Step};
///
/// struct Bar;
///
/// impl Progress for Bar {
///     fn step(&self, step: &Step<'_>) {
///         println!("{}: {} of {} bytes", step.file, step.done, step.total);
///     }
/// }
/// assert!(!Bar.is_cancelled());
/// ```
pub trait Progress: Sync {
    /// The merge is here now.
    fn step(&self, step: &Step<'_>);

    /// Whether the merge shall stop. It leaves a chain that reads as before.
    fn is_cancelled(&self) -> bool {
        false
    }

    /// Called once, before the first change of the guest-visible content of the image that a merge writes. Until then the
    /// merge can be abandoned without a trace in the content. Does nothing by default.
    ///
    /// # Errors
    /// Any. The merge stops before the change and returns [`super::Error::Refused`] or the error itself.
    fn before_change(&self) -> super::Result<()> {
        Ok(())
    }
}

impl Progress for () {
    fn step(&self, _step: &Step<'_>) {}
}
