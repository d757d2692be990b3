//! `map`: which file of a chain holds what.

use std::fmt::Write as _;
use std::path::PathBuf;

use qcow2_chain::chain::{Chain, ChainExtent, Node};
use qcow2_chain::format::HostOffset;
use qcow2_chain::image::ExtentKind;
use qcow2_chain::storage::Storage;

use crate::failure::{Failure, Outcome};
use crate::options::{PolicyArgs, Unserved, looking};
use crate::output::{Form, emit};
use crate::{open, preallocated, size};

/// Show which file of a chain holds what
#[derive(clap::Args, Debug)]
#[command(args_override_self = true)]
pub(crate) struct Args {
    /// The image's format (qcow2 or raw)
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Take no locks: look at an image that another program holds
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The form of the output
    #[arg(long, value_enum, default_value = "human")]
    output: Form,
    /// Begin here
    #[arg(short, long, value_name = "OFFSET")]
    start_offset: Option<String>,
    /// Look at no more than this
    #[arg(short = 'l', long, value_name = "LENGTH")]
    max_length: Option<String>,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    unserved: Unserved,
    /// The image
    file: PathBuf,
}

/// A line of the output.
#[expect(clippy::struct_excessive_bools, reason = "the output has as many flags")]
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Entry {
    start: u64,
    length: u64,
    depth: usize,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    offset: Option<u64>,
}

impl Entry {
    /// Takes in what follows, if it is more of the same.
    fn merge(&mut self, next: &Self) -> bool {
        let offset = self.offset.map(|offset| offset.saturating_add(self.length));
        let more = Self { start: next.start, length: next.length, offset, ..self.clone() };
        if more != *next {
            return false;
        }
        self.length += next.length;
        true
    }
}

/// Does it.
pub(crate) fn run(args: &Args) -> Outcome {
    args.unserved.refuse()?;
    let start = number(args.start_offset.as_deref(), "start offset")?.unwrap_or(0);
    let length = number(args.max_length.as_deref(), "max length")?.unwrap_or(u64::MAX);
    let lock = looking(args.force_share);
    let chain = open::chain(&args.file, args.format.as_deref(), lock, &args.policy)?;
    let mut printer = Printer::new(&chain, args.output);
    let end = chain.virtual_size().min(start.saturating_add(length));
    let mut current = Entry { start, ..Entry::default() };
    for entry in Entries::of(&chain)?.range(start..end) {
        let entry = entry?;
        if current.length == 0 {
            current = entry;
        } else if !current.merge(&entry) {
            printer.print(&current)?;
            current = entry;
        }
    }
    if current.length > 0 || args.output == Form::Json {
        printer.print(&current)?;
    }
    printer.finish()?;
    Ok(0)
}

fn number(text: Option<&str>, what: &str) -> Result<Option<u64>, Failure> {
    let Some(text) = text else { return Ok(None) };
    let number = size::parse(text).filter(|number| i64::try_from(*number).is_ok());
    number.map(Some).ok_or_else(|| Failure::new(format!("Invalid {what} specified: '{text}'")))
}

/// The extents of a chain as QEMU tells them.
struct Entries<'a> {
    chain: &'a Chain,
    /// For each layer, the storage to ask for holes beneath allocated clusters, where QEMU would ask.
    holes: Vec<Option<&'a dyn Storage>>,
    /// The virtual sizes of the layers.
    sizes: Vec<u64>,
}

impl<'a> Entries<'a> {
    fn of(chain: &'a Chain) -> Result<Self, Failure> {
        let mut entries = Self { chain, holes: Vec::new(), sizes: Vec::new() };
        for layer in chain.layers() {
            let (hole, size): (Option<&dyn Storage>, u64) = match &layer.node {
                Node::Qcow2(image) if preallocated::seems(image)? => (Some(&**image.storage()), image.virtual_size()),
                Node::Qcow2(image) => (None, image.virtual_size()),
                Node::Raw(raw) => (None, raw.virtual_size()),
            };
            entries.holes.push(hole);
            entries.sizes.push(size);
        }
        Ok(entries)
    }

    fn range(&self, range: std::ops::Range<u64>) -> impl Iterator<Item = Result<Entry, Failure>> + '_ {
        let extents = if range.is_empty() { None } else { Some(self.chain.extents(range)) };
        extents.into_iter().flatten().flat_map(|extent| match extent.map_err(Failure::from) {
            Ok(extent) => self.entries(&extent).map_or_else(|failure| vec![Err(failure)], wrap),
            Err(failure) => vec![Err(failure)],
        })
    }

    fn entries(&self, extent: &ChainExtent) -> Result<Vec<Entry>, Failure> {
        let plain = Entry { start: extent.guest.get(), length: extent.len, ..Entry::default() };
        let Some(depth) = extent.layer else { return Ok(self.nobody(&plain)) };
        let held = Entry { depth, present: true, ..plain };
        Ok(match extent.kind {
            ExtentKind::Data { host } => {
                let data = Entry { data: true, offset: Some(host.get()), ..held };
                match self.holes.get(depth).copied().flatten() {
                    Some(storage) => with_holes(storage, &data)?,
                    None => vec![data],
                }
            }
            ExtentKind::Zero { host } => vec![Entry { zero: true, offset: host.map(HostOffset::get), ..held }],
            ExtentKind::Compressed => vec![Entry { data: true, compressed: true, ..held }],
            ExtentKind::Unallocated => self.nobody(&Entry { present: false, ..held }),
        })
    }

    /// What no layer holds is told of the layer above the first that is too short, else of the last.
    fn nobody(&self, entry: &Entry) -> Vec<Entry> {
        let mut parts = Vec::new();
        let (mut at, end) = (entry.start, entry.start + entry.length);
        while at < end {
            let below = self.sizes.iter().skip(1).take_while(|size| at < **size);
            let reach = below.clone().min().copied().unwrap_or(end).min(end);
            let (start, length) = (at, reach - at);
            parts.push(Entry { start, length, depth: below.count(), zero: true, ..entry.clone() });
            at = reach;
        }
        parts
    }
}

fn wrap(entries: Vec<Entry>) -> Vec<Result<Entry, Failure>> {
    entries.into_iter().map(Ok).collect()
}

/// Splits allocated data where the file has holes: there it reads as zeroes.
fn with_holes(storage: &dyn Storage, data: &Entry) -> Result<Vec<Entry>, Failure> {
    let base = data.offset.unwrap_or(0);
    let (mut at, end) = (base, base + data.length);
    let mut parts = Vec::new();
    let mut part = |from: u64, to: u64, zero: bool| {
        if from < to {
            let start = data.start + (from - base);
            parts.push(Entry { start, length: to - from, zero, offset: Some(from), ..data.clone() });
        }
    };
    while at < end {
        let run = storage.next_data(at)?.unwrap_or(end..end);
        let (from, to) = (run.start.clamp(at, end), run.end.clamp(at, end));
        part(at, from, true);
        part(from, to, false);
        at = if to > at { to } else { end };
    }
    Ok(parts)
}

/// Writes entries as they come.
struct Printer<'a> {
    chain: &'a Chain,
    form: Form,
    out: String,
    first: bool,
}

impl<'a> Printer<'a> {
    fn new(chain: &'a Chain, form: Form) -> Self {
        let out = match form {
            Form::Human => format!("{:<16}{:<16}{:<16}{}\n", "Offset", "Length", "Mapped to", "File"),
            Form::Json => "[".to_owned(),
        };
        Self { chain, form, out, first: true }
    }

    fn print(&mut self, entry: &Entry) -> Result<(), Failure> {
        match self.form {
            Form::Human => self.human(entry)?,
            Form::Json => self.json(entry),
        }
        if self.out.len() > 64 << 10 {
            emit(&std::mem::take(&mut self.out))?;
        }
        Ok(())
    }

    fn human(&mut self, entry: &Entry) -> Result<(), Failure> {
        let Entry { start, length, depth, data, zero, offset, .. } = entry;
        match (data, zero, offset) {
            (true, _, None) => {
                emit(&std::mem::take(&mut self.out))?;
                return Err(Failure::new("File contains external, encrypted or compressed clusters."));
            }
            (true, false, Some(offset)) => {
                let file = self.chain.layers()[*depth].path.display();
                let [start, length, offset] = [start, length, offset].map(|number| c_hex(*number));
                let _ = writeln!(self.out, "{start:<16}{length:<16}{offset:<16}{file}");
            }
            _ => {}
        }
        Ok(())
    }

    fn json(&mut self, entry: &Entry) {
        let Entry { start, length, depth, present, zero, data, compressed, offset } = entry;
        if !self.first {
            self.out.push_str(",\n");
        }
        self.first = false;
        let _ = write!(
            self.out,
            "{{ \"start\": {start}, \"length\": {length}, \"depth\": {depth}, \"present\": {present}, \
             \"zero\": {zero}, \"data\": {data}, \"compressed\": {compressed}"
        );
        if let Some(offset) = offset {
            let _ = write!(self.out, ", \"offset\": {offset}");
        }
        self.out.push('}');
    }

    fn finish(mut self) -> Result<(), Failure> {
        if self.form == Form::Json {
            self.out.push_str("]\n");
        }
        emit(&self.out)
    }
}

/// A number as C's `%#x` prints it: zero has no prefix.
fn c_hex(number: u64) -> String {
    if number == 0 { "0".to_owned() } else { format!("{number:#x}") }
}
