//! `vm changed`: what an incremental backup has to copy.

use std::fmt::Write as _;
use std::path::PathBuf;

use qcow2_chain::vm::{ChangedRange, Point, SnapshotSet};
use serde::Serialize;

use super::outcome::{explain, json};
use crate::failure::Outcome;
use crate::output::emit;

/// Tell in which ranges a volume may differ between two snapshots
///
/// From metadata alone: what is not told does not differ. Each line is a range: where it starts and its length in bytes, and
/// `zero` where TO reads as zeroes.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The VM's catalogue
    catalogue: PathBuf,
    /// The earlier snapshot; - for none: all that TO holds
    from: String,
    /// The later snapshot; - for the volume as it is now
    to: String,
    /// The volume
    volume: String,
    /// Tell it as JSON
    #[arg(long)]
    json: bool,
}

/// What is told as JSON.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Told<'a> {
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
        return json(&Told { volume: &args.volume, from: from.as_deref(), to: to.as_deref(), virtual_size, ranges });
    }
    let mut text = String::new();
    for range in changes.ranges() {
        let range = range.map_err(explain)?;
        let _ = writeln!(text, "{} {}{}", range.offset, range.len, if range.zero { " zero" } else { "" });
        // A large disk may have many.
        if text.len() > 1 << 16 {
            emit(&std::mem::take(&mut text))?;
        }
    }
    emit(&text)?;
    Ok(0)
}
