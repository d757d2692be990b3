//! `measure`: how large a new image would be.

use std::fmt::Write as _;
use std::path::PathBuf;

use qcow2_chain::chain::{Chain, Format};
use qcow2_chain::format::Version;
use qcow2_chain::image::CreateOptions;
use qcow2_chain::merge::{self, Measurement};

use crate::convert::named_target;
use crate::create::{create_options, parse_size};
use crate::failure::{Failure, Outcome};
use crate::json::Json;
use crate::layout::Layout;
use crate::options::{PolicyArgs, Unserved, looking};
use crate::output::{Form, emit};
use crate::settings::Settings;
use crate::{open, settings, size};

/// Tell how large a new image would be
#[derive(clap::Args, Debug)]
#[command(args_override_self = true)]
pub(crate) struct Args {
    /// The source's format (qcow2 or raw)
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// The new image's format (qcow2 or raw)
    #[arg(short = 'O', long, value_name = "FMT", default_value = "raw")]
    target_format: String,
    /// Settings of the new image as KEY=VALUE,...; `-o help` lists them
    #[arg(short = 'o', long, value_name = "KEY=VALUE", action = clap::ArgAction::Append)]
    options: Vec<String>,
    /// The size of a new disk that is empty
    #[arg(short, long, value_name = "SIZE", allow_hyphen_values = true)]
    size: Option<String>,
    /// The form of the output
    #[arg(long, value_enum, default_value = "human")]
    output: Form,
    /// Take no locks: look at an image that another program holds
    #[arg(short = 'U', long)]
    force_share: bool,
    #[arg(short = 'l', long, hide = true, value_name = "SNAPSHOT")]
    snapshot: Option<String>,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    unserved: Unserved,
    /// The image that would be converted
    files: Vec<PathBuf>,
}

/// Does it.
pub(crate) fn run(args: &Args) -> Outcome {
    args.unserved.refuse()?;
    let size = args.size.as_deref().map(parse_size).transpose()?;
    if args.files.len() > 1 {
        return Err(Failure::new("At most one filename argument is allowed."));
    }
    let file = args.files.first();
    if file.is_none() && (args.format.is_some() || args.snapshot.is_some()) {
        return Err(Failure::new("--image-opts, -f, and -l require a filename argument."));
    }
    let format = named_target(&args.target_format)?;
    if let Some(help) = settings::help(format, &args.options) {
        emit(&help)?;
        return Ok(0);
    }
    if args.snapshot.is_some() {
        return Err(Failure::unserved("-l", "qemu-img to measure an internal snapshot"));
    }
    match (size, file) {
        (None, None) => return Err(Failure::new("Either --size N or one filename must be specified.")),
        (Some(_), Some(_)) => return Err(Failure::new("--size N cannot be used together with a filename.")),
        _ => {}
    }
    let lock = looking(args.force_share);
    let source = file.map(|file| open::chain(file, args.format.as_deref(), lock, &args.policy)).transpose()?;
    let size = source.as_ref().map_or(size, |source| Some(source.virtual_size())).unwrap_or_default();
    let settings = Settings::parse(format, &args.options)?;
    let measured = match format {
        Format::Raw => Measurement::of_raw(size::round_up(size, 512).ok_or_else(too_large)?),
        Format::Qcow2 => measure_qcow2(source.as_ref(), &image_options(&settings, size)?)?,
    };
    print(&measured, args.output)?;
    Ok(0)
}

fn too_large() -> Failure {
    Failure::new("The image size is too large (try using a larger cluster size)")
}

/// What the new image looks like. Only what matters for its size is looked at.
fn image_options(settings: &Settings, size: u64) -> Result<CreateOptions, Failure> {
    let mut options = create_options(settings, size)?;
    if options.version == Version::V2 && options.refcount_order.bits() != 16 {
        let why = "Different refcount widths than 16 bits require compatibility level 1.1 or above";
        return Err(Failure::new(format!("{why} (use compat=1.1 or greater)")));
    }
    if options.extended_l2 && options.cluster_bits.get() < 14 {
        return Err(Failure::new("Extended L2 entries are only supported with cluster sizes of at least 16384 bytes"));
    }
    // Whichever it is: how much of the source it shares is not known.
    options.backing = settings.get("backing_file").map(|name| (name.into(), b"raw".to_vec()));
    Ok(options)
}

fn measure_qcow2(source: Option<&Chain>, options: &CreateOptions) -> Result<Measurement, Failure> {
    let explain = |error: merge::Error| match error {
        merge::Error::Image(qcow2_chain::image::Error::Limit { .. }) => too_large(),
        error => error.into(),
    };
    let Some(source) = source else { return merge::measure(None, options).map_err(explain) };
    let mut measured = merge::measure(Some(source), options).map_err(explain)?;
    // Of an image that seems preallocated, QEMU also looks for holes in the file.
    let mut data = Vec::new();
    for entry in Layout::of(source)?.entries(0..options.size) {
        let entry = entry?;
        if entry.data && !entry.zero {
            data.push(Ok(entry.start..entry.end()));
        }
    }
    measured.required = Measurement::of_qcow2(options, data).map_err(explain)?.required;
    Ok(measured)
}

fn print(measured: &Measurement, form: Form) -> Result<(), Failure> {
    let Measurement { required, fully_allocated, bitmaps, .. } = *measured;
    match form {
        Form::Human => {
            let mut text = format!("required size: {required}\nfully allocated size: {fully_allocated}\n");
            if let Some(bitmaps) = bitmaps {
                let _ = writeln!(text, "bitmaps size: {bitmaps}");
            }
            emit(&text)
        }
        Form::Json => {
            let mut members: Vec<_> = bitmaps.map(|bitmaps| ("bitmaps", bitmaps.into())).into_iter().collect();
            members.extend([("required", required.into()), ("fully-allocated", fully_allocated.into())]);
            emit(&format!("{}\n", Json::Object(members).pretty()))
        }
    }
}
