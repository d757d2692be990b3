//! `map`: which file of a chain holds what.

use std::fmt::Write as _;
use std::path::PathBuf;

use qcow2_chain::chain::Chain;

use crate::failure::{Failure, Outcome};
use crate::layout::{Entry, Layout};
use crate::options::{PolicyArgs, Unserved, looking};
use crate::output::{Form, emit};
use crate::{open, size};

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
    for entry in Layout::of(&chain)?.entries(start..end) {
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
