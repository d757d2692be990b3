//! Progress and cancellation: one trait for every operation that takes long.

/// The phase of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Phase {
    /// The tables are walked to estimate the work.
    Planning,
    /// Data is read and compared.
    Comparing,
    /// Data and zeroes are copied.
    Copying,
    /// Mappings are made durable.
    Publishing,
    /// The layer that was merged is emptied.
    Emptying,
    /// The files of the layers that were merged are removed.
    Removing,
}

/// The progress of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Step<'a> {
    /// The phase.
    pub phase: Phase,
    /// The guest bytes that are done.
    pub done: u64,
    /// The guest bytes to do; 0 while not known.
    pub total: u64,
    /// The image that is written; empty if none is.
    pub file: &'a str,
    /// The volume that progressed; empty outside of a snapshot set.
    pub volume: &'a str,
    /// The guest bytes of all volumes that are done.
    pub all_done: u64,
    /// The guest bytes of all volumes to do, as far as known.
    pub all_total: u64,
}

impl<'a> Step<'a> {
    /// Creates the progress of an operation on one image, outside of a snapshot set.
    #[must_use]
    pub fn new(phase: Phase, done: u64, total: u64, file: &'a str) -> Self {
        Self { phase, done, total, file, volume: "", all_done: done, all_total: total }
    }
}

/// Receives the progress of an operation, and can cancel it.
///
/// An operation calls it some times a second, an operation over several volumes from several
/// threads. The unit type `()` ignores progress and never cancels.
///
/// ```
/// use qcow2_chain::progress::{Progress, Step};
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
    /// Called when the operation progressed.
    fn step(&self, step: &Step<'_>);

    /// Returns true to cancel the operation. The chain reads as before then. In a snapshot set,
    /// nothing has changed before the first durable record, and later the operation can be resumed.
    /// Default: false.
    fn is_cancelled(&self) -> bool {
        false
    }
}

impl Progress for () {
    fn step(&self, _step: &Step<'_>) {}
}

/// A function that returns true to cancel the operation, and ignores progress.
impl<F: Fn() -> bool + Sync> Progress for F {
    fn step(&self, _step: &Step<'_>) {}

    fn is_cancelled(&self) -> bool {
        self()
    }
}
