//! `vm changed`: the ranges that an incremental backup copies.

use std::fmt::Write as _;
use std::path::PathBuf;

use qcow2_chain::vm::{ChangedRange, Point, SnapshotSet};
use serde::Serialize;

use super::outcome::{explain, json};
use crate::failure::Outcome;
use crate::output::emit;

/// List the ranges of a volume that may differ between two snapshots
///
/// Only metadata is read; a byte outside all ranges is the same in both. Each line is a range: its
/// offset and its length in bytes, and `zero` if TO reads as zeroes there.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The VM's catalogue
    catalogue: PathBuf,
    /// The earlier snapshot; - for none: all data of TO
    from: String,
    /// The later snapshot; - for the present
    to: String,
    /// The volume
    volume: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The JSON form of the output.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Output<'a> {
    volume: &'a str,
    from: Option<&'a str>,
    to: Option<&'a str>,
    virtual_size: u64,
    ranges: Vec<ChangedRange>,
}

/// Runs the verb.
pub(crate) fn run(args: &Args) -> Outcome {
    let set = SnapshotSet::load(&args.catalogue).map_err(explain)?;
    let named = |name: &'_ String| (name != "-").then_some(name.clone());
    let (from, to) = (named(&args.from), named(&args.to));
    let earlier = from.as_deref().map_or(Point::Nothing, Point::Snapshot);
    let later = to.as_deref().map_or(Point::Active, Point::Snapshot);
    let changes = set.changed_ranges(earlier, later, &args.volume).map_err(explain)?;
    if args.json {
        let ranges = changes.ranges().collect::<Result<Vec<_>, _>>().map_err(explain)?;
        let virtual_size = changes.to().virtual_size();
        return json(&Output { volume: &args.volume, from: from.as_deref(), to: to.as_deref(), virtual_size, ranges });
    }
    let mut text = String::new();
    for range in changes.ranges() {
        let range = range.map_err(explain)?;
        let _ = writeln!(text, "{} {}{}", range.offset, range.len, if range.zero { " zero" } else { "" });
        // Bounds the memory, as a large disk may have many ranges.
        if text.len() > 1 << 16 {
            emit(&std::mem::take(&mut text))?;
        }
    }
    emit(&text)?;
    Ok(0)
}
