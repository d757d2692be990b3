//! Checking an image and repairing it. OWNER: check helper

use crate::format::Limits;
use crate::storage::Storage;

use super::Result;

/// What a check may repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Fix {
    /// Nothing: only look.
    #[default]
    Nothing,
    /// Leaked clusters only (`-r leaks`).
    Leaks,
    /// Everything that can be (`-r all`).
    All,
}

/// How to check.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct CheckOptions {
    /// What to repair.
    pub fix: Fix,
    /// What the image may claim.
    pub limits: Limits,
}

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckReport {
    /// Errors that may lose data, still there.
    pub corruptions: u64,
    /// Clusters that are counted but not used, still there.
    pub leaks: u64,
    /// Structures that could not be checked.
    pub check_errors: u64,
    /// Errors repaired.
    pub corruptions_fixed: u64,
    /// Leaks repaired.
    pub leaks_fixed: u64,
    /// Guest clusters that are allocated.
    pub allocated_clusters: u64,
    /// Guest clusters of the virtual disk.
    pub total_clusters: u64,
    /// Allocated clusters that do not follow the one before.
    pub fragmented_clusters: u64,
    /// Compressed clusters.
    pub compressed_clusters: u64,
    /// Where the last used cluster ends, in bytes.
    pub image_end_offset: u64,
}

/// Checks the image on `storage`, and repairs what `options` ask for. The storage need not hold an image that opens for
/// writing: dirty and corrupt ones are what this is for.
///
/// # Errors
/// Where the header cannot be decoded or the storage fails. What is wrong in the image is in the report.
pub fn check(_storage: &dyn Storage, _options: &CheckOptions) -> Result<CheckReport> {
    todo!()
}
