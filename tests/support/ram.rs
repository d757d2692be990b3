//! Directories in memory where the system has them: the tests' images are thrown away, and nothing need wait for a disk.

/// A new directory that goes with its guard.
pub fn dir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a directory for the test")
}
