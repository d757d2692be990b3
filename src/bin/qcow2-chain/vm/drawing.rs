//! The tree of snapshots as a drawing. The line on the left is the chain that the VM reads, from
//! the oldest file to the active ones, so that a long chain is not indented further and further;
//! other branches are to the right of it.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use qcow2_chain::storage::{Access, LockMode};
use qcow2_chain::vm::{Dependent, FileRecord, Model, Snapshot, SnapshotId, State, VolumeFiles};

use super::table::{Table, counted, one_line};
use crate::size;
use crate::zone::local_time;

/// Draws the bases, snapshots and active files of a model.
pub(super) fn draw(model: &Model, files: &VolumeFiles) -> String {
    let mut drawing = Drawing { model, files, trunk: BTreeSet::new(), out: String::new() };
    let mut next = model.current;
    while let Some(snapshot) = next.and_then(|id| model.snapshot(id)) {
        if !drawing.trunk.insert(snapshot.id) {
            break;
        }
        next = snapshot.parent;
    }
    drawing.title();
    drawing.bases();
    drawing.branch(drawing.on(None), "");
    drawing.out
}

struct Drawing<'a> {
    model: &'a Model,
    files: &'a VolumeFiles,
    /// The snapshots whose files back the active files, directly or through others.
    trunk: BTreeSet<SnapshotId>,
    out: String,
}

impl<'a> Drawing<'a> {
    fn title(&mut self) {
        let snapshots = self.model.snapshots.values();
        let hidden = snapshots.clone().filter(|snapshot| snapshot.state == State::Hidden).count();
        let listed = counted(snapshots.count() - hidden, "snapshot");
        let volumes = counted(self.model.volumes.len(), "volume");
        let hidden = if hidden == 0 { String::new() } else { format!(", {hidden} hidden") };
        let _ = writeln!(self.out, "{}: {volumes}, {listed}{hidden}\n", self.model.vm);
    }

    fn bases(&mut self) {
        let mut table = Table::new(&[]);
        for volume in &self.model.volumes {
            for base in volume.bases.iter().rev() {
                table.row([volume.name.clone(), base.file.path.clone(), self.on_disk(&base.file.path)]);
            }
        }
        let lines = table.lines();
        if !lines.is_empty() {
            let _ = writeln!(self.out, "◇ bases");
            for line in lines {
                let _ = writeln!(self.out, "│   {line}");
            }
            let _ = writeln!(self.out, "│");
        }
    }

    /// Returns the dependents of a snapshot, or of the bases: those that lead to the active files
    /// last, else the youngest last.
    fn on(&self, parent: Option<SnapshotId>) -> Vec<Dependent> {
        let children = self.model.snapshots.values().filter(|snapshot| snapshot.parent == parent);
        let volumes = (self.model.current == parent).then_some(Dependent::Volumes);
        let mut all: Vec<_> = children.map(|child| Dependent::Snapshot(child.id)).chain(volumes).collect();
        all.sort_by_key(|dependent| match dependent {
            Dependent::Snapshot(id) => (self.trunk.contains(id), *id),
            Dependent::Volumes => (true, SnapshotId(u64::MAX)),
        });
        all
    }

    /// Draws the dependents of one item: the last one straight below, the others to the right.
    fn branch(&mut self, mut items: Vec<Dependent>, prefix: &str) {
        while let Some(last) = items.pop() {
            for item in items {
                let within = format!("{prefix}│ ");
                let above = self.node(item, &format!("{prefix}├─"), &within);
                self.branch(above, &within);
                let _ = writeln!(self.out, "{prefix}│");
            }
            items = self.node(last, prefix, prefix);
        }
    }

    /// Draws one item and returns its dependents. `first` is the prefix of its first line, `prefix`
    /// that of the others.
    fn node(&mut self, item: Dependent, first: &str, prefix: &str) -> Vec<Dependent> {
        let snapshot = match item {
            Dependent::Snapshot(id) => self.model.snapshot(id),
            Dependent::Volumes => None,
        };
        let Some(snapshot) = snapshot else {
            let _ = writeln!(self.out, "{first}▶ the VM writes");
            let files = self.model.volumes.iter().map(|volume| (volume.name.as_str(), &volume.active));
            self.files(files.collect(), &format!("{prefix}    "));
            return Vec::new();
        };
        let above = self.on(Some(snapshot.id));
        let _ = writeln!(self.out, "{first}{}", self.headline(snapshot, &above));
        let stem = if above.is_empty() { format!("{prefix}    ") } else { format!("{prefix}│   ") };
        let files = snapshot.files.iter().map(|(volume, record)| (volume.as_str(), record));
        self.files(files.collect(), &stem);
        if !above.is_empty() {
            let _ = writeln!(self.out, "{prefix}│");
        }
        above
    }

    fn headline(&self, snapshot: &Snapshot, above: &[Dependent]) -> String {
        let current = self.model.current == Some(snapshot.id);
        let mark = match snapshot.state {
            State::Hidden => '◌',
            State::Merging => '◐',
            State::Ready if current => '●',
            State::Ready => '○',
        };
        let mut line = format!("{mark} {}", one_line(&snapshot.name));
        if current {
            line += "  current";
        }
        match snapshot.state {
            State::Ready => {
                let _ = write!(line, "  {}", local_time(i64::try_from(snapshot.created).unwrap_or_default()));
            }
            State::Hidden => {
                let _ = write!(line, "  deleted, kept for {}", self.names(above));
            }
            State::Merging => line += "  being deleted: vm recover completes it",
        }
        if !snapshot.description.is_empty() && snapshot.state == State::Ready {
            let _ = write!(line, "  {}", one_line(&snapshot.description));
        }
        line
    }

    fn names(&self, dependents: &[Dependent]) -> String {
        let name = |dependent: &Dependent| match dependent {
            Dependent::Snapshot(id) => {
                self.model.snapshot(*id).map_or_else(String::new, |snapshot| one_line(&snapshot.name))
            }
            Dependent::Volumes => "the VM".to_owned(),
        };
        let names: Vec<String> = dependents.iter().map(name).collect();
        match names.split_last() {
            Some((last, others)) if !others.is_empty() => format!("{} and {last}", others.join(", ")),
            _ => names.concat(),
        }
    }

    fn files(&mut self, files: Vec<(&'a str, &'a FileRecord)>, stem: &str) {
        let mut table = Table::new(&[]);
        for (volume, record) in files {
            let size = size::human(record.virtual_size);
            let protected = if record.protected { "protected" } else { "" }.to_owned();
            table.row([volume.to_owned(), record.file.path.clone(), size, self.on_disk(&record.file.path), protected]);
        }
        for line in table.lines() {
            let _ = writeln!(self.out, "{stem}{line}");
        }
    }

    /// Returns the space that a file occupies at present.
    fn on_disk(&self, path: &str) -> String {
        let opened = self.files.file_system().open(&self.files.path(path), &Access::read().with_lock(LockMode::None));
        match opened.and_then(|file| file.allocated_len()) {
            Ok(Some(bytes)) => format!("{} on disk", size::human(bytes)),
            Ok(None) => String::new(),
            Err(_) => "CANNOT BE OPENED".to_owned(),
        }
    }
}
