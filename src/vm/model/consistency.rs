//! The consistency of a model.

use std::collections::BTreeSet;

use super::{MAX_NAME, Model, Snapshot, State};

/// The exclusive upper limit of snapshot, overlay and operation numbers, so that a next one always
/// exists.
const END_OF_NUMBERS: u64 = 1 << 62;

impl Model {
    /// Returns the contradictions between records, as messages; none if the model is consistent.
    #[must_use]
    pub fn contradictions(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut names = BTreeSet::new();
        for volume in self.all_volumes() {
            if !names.insert(&volume.name) {
                wrong.push(format!("volume {} is recorded twice", volume.name));
            }
        }
        let mut visible = BTreeSet::new();
        for snapshot in self.snapshots.values() {
            self.find_wrong_in(snapshot, &mut wrong);
            if snapshot.state == State::Ready && !visible.insert(&snapshot.name) {
                wrong.push(format!("two ready snapshots have the name {}", snapshot.name));
            }
        }
        if self.snapshots.values().filter(|snapshot| snapshot.state == State::Merging).count() > 1 {
            wrong.push("two snapshots are in the state merging".to_owned());
        }
        for (what, number) in [
            ("next snapshot", self.next_snapshot),
            ("next overlay", self.next_file),
            ("last operation", self.last_operation.id),
        ] {
            if number >= END_OF_NUMBERS {
                wrong.push(format!("the number of the {what} is {number}, the limit is {END_OF_NUMBERS}"));
            }
        }
        match self.current {
            Some(id) if self.snapshot(id).is_none() => wrong.push(format!("the current snapshot {id} does not exist")),
            None if !self.snapshots.is_empty() => wrong.push("no snapshot is current".to_owned()),
            _ => {}
        }
        self.find_wrong_paths(&mut wrong);
        wrong
    }

    /// Finds files that are recorded twice, and paths that cannot be printed safely.
    fn find_wrong_paths(&self, wrong: &mut Vec<String>) {
        let mut paths = BTreeSet::new();
        for (_, _, record) in self.records() {
            if !paths.insert(&record.file.path) {
                wrong.push(format!("{} is recorded twice", record.file.path));
            }
        }
        for base in self.all_volumes().flat_map(|volume| &volume.bases) {
            if paths.contains(&base.file.path) {
                wrong.push(format!("{} is recorded as a base and as a file of the set", base.file.path));
            }
            paths.remove(&base.file.path);
        }
        let bases = self.all_volumes().flat_map(|volume| &volume.bases).map(|base| &base.file.path);
        for path in bases.chain(self.records().map(|(_, _, record)| &record.file.path)) {
            if path.chars().any(char::is_control) {
                wrong.push(format!("the path {path:?} has control characters"));
            }
        }
    }

    fn find_wrong_in(&self, snapshot: &Snapshot, wrong: &mut Vec<String>) {
        let name = &snapshot.name;
        if snapshot.id.0 >= self.next_snapshot {
            wrong.push(format!("the number of snapshot {name} is {}, which is not assigned yet", snapshot.id));
        }
        if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
            wrong.push(format!("a snapshot has the name {name:?}, which is not allowed"));
        }
        // A parent is older than its children, so that there are no loops. (A merge hands a child
        // to its grandparent.)
        match snapshot.parent {
            Some(parent) if parent >= snapshot.id => {
                wrong.push(format!("snapshot {name} is older than its parent {parent}"));
            }
            Some(parent) if self.snapshot(parent).is_none() => {
                wrong.push(format!("the parent {parent} of snapshot {name} does not exist"));
            }
            _ => {}
        }
        for volume in snapshot.files.keys().filter(|volume| self.any_volume(volume).is_none()) {
            wrong.push(format!("snapshot {name} has a file of volume {volume}, which does not exist"));
        }
    }
}
