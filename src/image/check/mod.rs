//! Checking an image and repairing it.
//!
//! The order is QEMU's: snapshot table, references, comparison with the refcounts, COPIED flags, and after a repair all
//! of it once more. It works on the file alone and needs no image that opens: dirty and corrupt ones are what it is for.

mod compare;
mod copied;
mod counts;
mod findings;
mod mappings;
mod rebuild;
mod references;
mod snapshots;
mod subject;

use std::collections::HashSet;

use crate::format::Limits;
use crate::storage::{self, Storage};

use super::Result;
use copied::{Contested, Ones, Repair};
use findings::MAX_FINDINGS;
use rebuild::Rebuilt;
use references::{Metadata, References};
use subject::Subject;

pub use findings::{Finding, Severity};

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
    ///
    /// Beyond what a check finds, a repair clears refcounts behind the end of the file, which an interrupted shrink leaves:
    /// no check counts them, as QEMU's does not, but they become leaks as the file grows. The report has them among
    /// [`CheckReport::leaks_fixed`]. A repair of an image that a repair left clean finds nothing and writes nothing.
    pub fix: Fix,
    /// What the image may claim.
    pub limits: Limits,
}

impl CheckOptions {
    /// The same, with another repair.
    #[must_use]
    pub fn with_fix(mut self, fix: Fix) -> Self {
        self.fix = fix;
        self
    }

    /// The same with other limits.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }
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
    /// Leaks repaired, with refcounts behind the end of the file that were cleared.
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
    /// The first thousand single findings, those that were repaired included.
    pub findings: Vec<Finding>,
    /// How many findings there were beyond these.
    pub findings_omitted: u64,
}

impl CheckReport {
    /// Whether nothing is wrong (any more).
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == 0 && self.check_errors == 0
    }

    fn has_errors(&self) -> bool {
        self.corruptions > 0 || self.check_errors > 0
    }
}

/// The most host clusters that QEMU checks.
const MAX_CLUSTERS: u64 = i32::MAX.unsigned_abs() as u64;

/// Checks the image on `storage`, and repairs what `options` ask for. The storage need not hold an image that opens for
/// writing: dirty and corrupt ones are what this is for.
///
/// # Errors
/// Where the header cannot be decoded or the storage fails. What is wrong in the image is in the report.
pub fn check(storage: &dyn Storage, options: &CheckOptions) -> Result<CheckReport> {
    if options.fix == Fix::Nothing {
        return Ok(examine(&mut Subject::read(storage, &options.limits)?, Fix::Nothing)?.report);
    }
    if storage.is_read_only() {
        return Err(storage::Error::ReadOnly { name: storage.name().to_owned() }.into());
    }
    let mut subject = Subject::read(storage, &options.limits)?;
    subject.clear_unknown_autoclear()?;
    let mut examined = examine(&mut subject, options.fix)?;
    while let Some(len) = examined.needs_length {
        storage.set_len(len)?;
        subject = Subject::read(storage, &options.limits)?;
        examined = examined.again(examine(&mut subject, options.fix)?);
    }
    if examined.wrote {
        storage.sync()?; // barrier: the repairs before they are looked at, and before the caller hears of them
        subject = Subject::read(storage, &options.limits)?;
        examined = examined.again(examine(&mut subject, Fix::Nothing)?);
    }
    if !examined.report.has_errors() {
        subject.clear_dirty_and_corrupt()?;
    }
    Ok(examined.report)
}

/// One pass over the image.
#[derive(Debug)]
struct Examined {
    report: CheckReport,
    /// Whether it wrote anything.
    wrote: bool,
    /// The corruptions and leaks before the refcount structure was built anew.
    rebuilt: Option<(u64, u64)>,
    /// How long the file must be before that can be done.
    needs_length: Option<u64>,
}

impl Examined {
    /// A pass that found nothing to write, or went no further.
    fn ended(report: CheckReport, wrote: bool) -> Self {
        Self { report, wrote, rebuilt: None, needs_length: None }
    }

    /// The state that `after` found after this repair, with what the repairs did.
    fn again(self, after: Self) -> Self {
        let Self { report: mut before, rebuilt, .. } = self;
        let mut report = after.report;
        report.corruptions_fixed += before.corruptions_fixed;
        report.leaks_fixed += before.leaks_fixed;
        if let Some((corruptions, leaks)) = rebuilt {
            report.corruptions_fixed += corruptions.saturating_sub(report.corruptions);
            report.leaks_fixed += leaks.saturating_sub(report.leaks);
            let left: HashSet<(u64, &str)> = report.findings.iter().map(|left| (left.offset, &*left.text)).collect();
            for finding in &mut before.findings {
                finding.repaired |= !left.contains(&(finding.offset, &*finding.text));
            }
        }
        let mut findings: Vec<Finding> = before.findings.into_iter().filter(|finding| finding.repaired).collect();
        findings.append(&mut report.findings);
        report.findings_omitted += before.findings_omitted + findings.len().saturating_sub(MAX_FINDINGS) as u64;
        findings.truncate(MAX_FINDINGS);
        report.findings = findings;
        Self { report, wrote: true, rebuilt: after.rebuilt, needs_length: after.needs_length }
    }
}

/// Checks once, repairing on the way what `fix` asks for.
fn examine(subject: &mut Subject<'_>, fix: Fix) -> Result<Examined> {
    let mut report = CheckReport::default();
    let clusters = subject.geometry.clusters_for(subject.file_len);
    report.total_clusters = subject.geometry.clusters_for(subject.head.header.size / 512 * 512);
    let Some(snapshots) = snapshots::read(subject, fix, &mut report)? else {
        return Ok(Examined::ended(report, false));
    };
    if clusters > MAX_CLUSTERS {
        report.unchecked(1, "file", 0, || {
            format!("{clusters} clusters are more than the {MAX_CLUSTERS} that are checked")
        });
        return Ok(Examined::ended(report, false));
    }
    let (references, stopped) = References::count(subject, &snapshots, fix, &mut report)?;
    let References { mut counts, tables, refcount_structures, mut rebuild, all_copied, past_end, mut wrote, .. } =
        references;
    if stopped.is_some() {
        return Ok(Examined::ended(report, wrote));
    }

    let mut rebuilt = None;
    let before_comparison = report.clone();
    let mut comparison = compare::compare(subject, &counts, Fix::Nothing, &mut report)?;
    rebuild |= comparison.rebuild;
    if rebuild && fix == Fix::Leaks {
        report.unchecked(1, "refcount", 0, || "need to rebuild refcount structures".to_owned());
        return Ok(Examined::ended(report, wrote));
    }
    if wrote {
        subject.storage.sync()?; // barrier: entries that refer to less before anything is freed
    }
    if fix == Fix::All && (rebuild || snapshots.defects > 0) {
        let broken = (snapshots.defects > 0).then_some(&snapshots);
        let done = rebuild::rebuild(subject, &mut counts, &refcount_structures, broken, past_end)?;
        if let Rebuilt::NeedsLength(len) = done {
            return Ok(Examined { report, wrote, rebuilt: None, needs_length: Some(len) });
        }
        // What of this is gone, the check that follows will tell.
        rebuilt = Some((report.corruptions, report.leaks));
        comparison.equal = false;
        wrote = true;
    } else if fix != Fix::Nothing && !comparison.equal {
        report = before_comparison;
        comparison = compare::compare(subject, &counts, fix, &mut report)?;
        // No barrier before the flags either: a flag or a refcount that is ahead of the other is no worse than both were.
        wrote |= comparison.wrote;
    }
    if fix != Fix::Nothing && rebuilt.is_none() && comparison.equal && report.is_clean() {
        wrote |= compare::clear_behind(subject, &counts, &mut report)?;
    }
    report.image_end_offset = comparison.end;

    // Where every flag is set and every count is one there is no need to look at each entry again.
    if all_copied && comparison.equal && comparison.single && report.is_clean() {
        return Ok(Examined { report, wrote, rebuilt, needs_length: None });
    }
    let repairs = fix == Fix::All || fix == Fix::Leaks && report.is_clean();
    let repair = repairs.then(|| Repair {
        beside_l1: Metadata::of(subject, &snapshots, false),
        beside_l2: Metadata::of(subject, &snapshots, true),
        contested: Contested::among(subject, &counts, &tables),
    });
    drop(counts);
    wrote |= copied::check(&Ones::read(subject)?, &tables, repair.as_ref(), &mut report)?;
    Ok(Examined { report, wrote, rebuilt, needs_length: None })
}
