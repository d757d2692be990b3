//! Counts of what was done and refused in which kind of world. A run that only ever saw refusals
//! would prove nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::Mutex;

use crate::support::say;

/// The numbers of operations that were done and refused.
type Count = (usize, usize);

/// Counts by row (kind of world) and column (operation).
#[derive(Debug, Default)]
pub struct Table(Mutex<BTreeMap<(String, &'static str), Count>>);

/// The row of all worlds.
const ALL: &str = "all worlds";

/// The operations that must have succeeded in every kind of world.
const EVERYWHERE: [&str; 5] = ["init", "snapshot", "revert", "delete commit", "verify"];

impl Table {
    /// Counts an outcome for all kinds that a world belongs to.
    pub fn count(&self, labels: &[String], column: &'static str, done: bool) {
        let mut counts = self.0.lock().expect("no test fails within this lock");
        for label in labels.iter().map(String::as_str).chain([ALL]) {
            let count = counts.entry((label.to_owned(), column)).or_default();
            if done { count.0 += 1 } else { count.1 += 1 }
        }
    }

    /// Prints `done/refused` for each kind of world and operation.
    pub fn print(&self) {
        let counts = self.0.lock().expect("no test fails within this lock");
        let rows: BTreeSet<_> = counts.keys().map(|(row, _)| row).collect();
        let columns: BTreeSet<_> = counts.keys().map(|(_, column)| *column).collect();
        let mut text = format!("{:28}", "done/refused");
        for column in &columns {
            let _ = write!(text, "{column:>15}");
        }
        for row in rows {
            let _ = write!(text, "\n{row:28}");
            for column in &columns {
                let cell = counts.get(&(row.clone(), *column)).map(|(done, refused)| format!("{done}/{refused}"));
                let _ = write!(text, "{:>15}", cell.unwrap_or_default());
            }
        }
        say(&text);
    }

    /// Fails the test unless every operation succeeded in every kind of world that does not exclude
    /// it.
    pub fn assert_covered(&self) {
        let counts = self.0.lock().expect("no test fails within this lock");
        let done = |row: &str, column| counts.get(&(row.to_owned(), column)).is_some_and(|(done, _)| *done > 0);
        let mut missing = Vec::new();
        // These worlds may be refused as a whole.
        let excused = ["names: colon", "names: directory not UTF-8", "names: image not UTF-8", "link: Hard"];
        let rows: BTreeSet<_> = counts.keys().map(|(row, _)| row.as_str()).collect();
        for row in rows.iter().filter(|row| !excused.contains(row)) {
            // Files that look like overlays of the VM may be reported as orphans.
            let orphans = ["VM of the same name", "bystanders", "clones"].contains(row);
            let columns = EVERYWHERE.iter().filter(|column| !done(row, column) && (**column != "verify" || !orphans));
            missing.extend(columns.map(|column| format!("{column} in {row}")));
        }
        let columns = [
            "delete pull",
            "delete auto",
            "resize",
            "recover",
            "recover killed",
            "kill snapshot",
            "kill revert",
            "kill delete",
            "kill resize",
            "plan",
            "move",
            "copy",
            "other VM",
            "clone",
            // A cancellation succeeds only if the kill before it came at the right moment: `vm_faults::cancel` has one for certain.
            "attach",
            "detach",
            "discard lost",
        ];
        let nowhere = columns.into_iter().filter(|column| !done(ALL, column));
        missing.extend(nowhere.map(|column| format!("{column} anywhere")));
        let refused = |column| counts.get(&(ALL.to_owned(), column)).is_some_and(|(_, refused)| *refused > 0);
        missing.extend(
            ["held", "damaged"]
                .into_iter()
                .filter(|column| !refused(column))
                .map(|column| format!("{column}: nothing was refused")),
        );
        assert!(missing.is_empty(), "never done: {}", missing.join(", "));
    }
}
