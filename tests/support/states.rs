//! The records of a volume in the notation of the acceptance table: `s1(R*)=f0; f1<-f0`.

use std::fmt::Write as _;

use qcow2_chain::vm::{FileRef, Model, State, Volume};

/// Returns the state of a volume whose files have these paths, in the order of their creation: f0, f1, ...
pub fn state(model: &Model, volume: &Volume, files: &[String]) -> String {
    let number = |path: &str| {
        let known = files.iter().position(|known| known == path);
        known.map_or_else(|| path.to_owned(), |number| format!("f{number}"))
    };
    let chain = |own: &str, below: Vec<FileRef>| match below.first() {
        Some(below) => format!("{}<-{}", number(own), number(&below.path)),
        None => number(own),
    };
    let mut text = String::new();
    for snapshot in model.snapshots.values() {
        let state = match snapshot.state {
            State::Ready => "R",
            State::Hidden => "H",
            State::Merging => "M",
        };
        let current = if model.current == Some(snapshot.id) { "*" } else { "" };
        let file = snapshot
            .files
            .get(&volume.name)
            .map_or_else(String::new, |record| chain(&record.file.path, model.files_from(snapshot.parent, volume)));
        let comma = if text.is_empty() { "" } else { ", " };
        let _ = write!(text, "{comma}{}({state}{current})={file}", snapshot.name);
    }
    let active = chain(&volume.active.file.path, model.files_from(model.current, volume));
    if text.is_empty() { active } else { format!("{text}; {active}") }
}
