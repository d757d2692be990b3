//! What a check says of single places in the image.

use std::fmt;

use super::CheckReport;

/// How many findings a report keeps; the numbers in the report count all.
pub(super) const MAX_FINDINGS: usize = 1000;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Severity {
    /// Data may be lost, or will be by the next write.
    Corruption,
    /// Space is counted as used but nobody refers to it.
    Leak,
    /// Something could not be checked.
    CheckError,
}

/// One thing that is wrong at one place.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// Which structure: "L1 entry", "refcount", ...
    pub structure: &'static str,
    /// Where it lies in the file, in bytes; for a refcount, where the counted cluster starts.
    pub offset: u64,
    /// Whether it was repaired.
    pub repaired: bool,
    /// What was found and what was expected, in one line.
    pub text: String,
}

/// The line that `qemu-img check` would print, where it has one for this.
impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self.severity {
            _ if self.repaired => "Repairing",
            Severity::Leak => "Leaked",
            Severity::Corruption | Severity::CheckError => "ERROR",
        };
        write!(f, "{word} {}", self.text)
    }
}

impl CheckReport {
    /// Notes a finding; the text is only made where there is room for it.
    fn note(
        &mut self,
        severity: Severity,
        repaired: bool,
        structure: &'static str,
        offset: u64,
        text: impl FnOnce() -> String,
    ) {
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(Finding { severity, structure, offset, repaired, text: text() });
        } else {
            self.findings_omitted += 1;
        }
    }

    /// Counts a corruption that `times` references run into.
    pub(super) fn corrupt(&mut self, times: u64, structure: &'static str, offset: u64, text: impl FnOnce() -> String) {
        self.corruptions = self.corruptions.saturating_add(times);
        self.note(Severity::Corruption, false, structure, offset, text);
    }

    /// Counts a corruption that was repaired at once.
    pub(super) fn corrupt_repaired(
        &mut self,
        times: u64,
        structure: &'static str,
        offset: u64,
        text: impl FnOnce() -> String,
    ) {
        self.corruptions_fixed = self.corruptions_fixed.saturating_add(times);
        self.note(Severity::Corruption, true, structure, offset, text);
    }

    /// Counts a leak, repaired or not.
    pub(super) fn leak(&mut self, repaired: bool, offset: u64, text: impl FnOnce() -> String) {
        if repaired {
            self.leaks_fixed += 1;
        } else {
            self.leaks += 1;
        }
        self.note(Severity::Leak, repaired, "refcount", offset, text);
    }

    /// Counts `times` places that could not be checked.
    pub(super) fn unchecked(
        &mut self,
        times: u64,
        structure: &'static str,
        offset: u64,
        text: impl FnOnce() -> String,
    ) {
        self.check_errors = self.check_errors.saturating_add(times);
        self.note(Severity::CheckError, false, structure, offset, text);
    }
}
