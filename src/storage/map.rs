//! A read-only memory map of a file: the one place of the default library where unsafe code is allowed.

/// A file mapped for reading.
#[derive(Debug)]
pub struct MappedStorage;
