//! `vm list`: lists volumes and snapshots.

use std::collections::BTreeMap;
use std::path::PathBuf;

use qcow2_chain::vm::{ListedSnapshot, ListedVolume, Listing, SnapshotSet, State};
use serde::Serialize;

use super::outcome::{explain, json};
use super::table::{Table, one_line};
use crate::failure::Outcome;
use crate::output::{Form, emit};
use crate::size;
use crate::zone::local_time;

/// List volumes and snapshots
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The VM's catalogue
    catalogue: PathBuf,
    /// List hidden snapshots too: deleted ones whose files are still needed
    #[arg(long)]
    all: bool,
    /// The form of the output
    #[arg(long, value_enum, default_value = "human")]
    output: Form,
    /// The same as --output json
    #[arg(long)]
    json: bool,
}

/// The JSON form of the listing. Its members are a stable interface.
#[derive(Serialize)]
struct Output<'a> {
    vm: &'a str,
    current: Option<&'a str>,
    volumes: &'a [ListedVolume],
    snapshots: Vec<OutputSnapshot<'a>>,
}

#[derive(Serialize)]
struct OutputSnapshot<'a> {
    name: &'a str,
    state: State,
    parent: Option<&'a str>,
    current: bool,
    files: &'a BTreeMap<String, String>,
}

impl<'a> OutputSnapshot<'a> {
    fn of(listed: &'a ListedSnapshot) -> Self {
        let ListedSnapshot { name, state, current, files, .. } = listed;
        Self { name, state: *state, parent: listed.parent.as_deref(), current: *current, files }
    }
}

/// Runs the verb.
pub(crate) fn run(args: &Args) -> Outcome {
    let set = SnapshotSet::load(&args.catalogue).map_err(explain)?;
    let listing = set.list(args.all).map_err(explain)?;
    if args.json || args.output == Form::Json {
        let Listing { vm, volumes, .. } = &listing;
        let snapshots = listing.snapshots.iter().map(OutputSnapshot::of).collect();
        return json(&Output { vm, current: listing.current.as_deref(), volumes, snapshots });
    }
    emit(&text(&listing))?;
    Ok(0)
}

fn text(listing: &Listing) -> String {
    let mut volumes = Table::new(&["volume", "size", "file"]);
    for volume in &listing.volumes {
        volumes.row([volume.name.clone(), size::human(volume.virtual_size), volume.active.clone()]);
    }
    if listing.snapshots.is_empty() {
        return format!("{volumes}\nno snapshots\n");
    }
    let mut snapshots = Table::new(&["", "snapshot", "state", "parent", "taken", "description"]);
    for snapshot in &listing.snapshots {
        snapshots.row([
            if snapshot.current { "*" } else { "" }.to_owned(),
            snapshot.name.clone(),
            snapshot.state.to_string(),
            snapshot.parent.clone().unwrap_or_else(|| "-".to_owned()),
            local_time(i64::try_from(snapshot.created).unwrap_or_default()),
            one_line(&snapshot.description),
        ]);
    }
    format!("{volumes}\n{snapshots}")
}
