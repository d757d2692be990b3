//! `create`: a new image.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qcow2_chain::chain::{Format, has_protocol};
use qcow2_chain::format::{ClusterBits, CompressionType, RefcountOrder, Version};
use qcow2_chain::image::{CreateOptions, Image, OpenOptions, Preallocation, RawImage};
use qcow2_chain::storage::{Access, FileSystem as _, HostFileSystem, MemoryStorage, Storage, zero_range};

use crate::failure::{Failure, Outcome};
use crate::options::{Unserved, directory};
use crate::output::{emit, say};
use crate::settings::Settings;
use crate::{open, settings, size};

/// Create a new image; a file of that name is replaced
#[derive(clap::Args, Debug)]
#[command(args_override_self = true)]
pub(crate) struct Args {
    /// The new image's format (qcow2 or raw)
    #[arg(short, long, value_name = "FMT", default_value = "raw")]
    format: String,
    /// The backing file, as it is written into the image: relative to the image's directory
    #[arg(short, long, value_name = "FILE")]
    backing: Option<String>,
    /// The backing file's format (qcow2 or raw); needed with -b
    #[arg(short = 'F', long, value_name = "FMT")]
    backing_format: Option<String>,
    /// Settings as KEY=VALUE,...; `-o help` lists them
    #[arg(short, long, value_name = "KEY=VALUE", action = clap::ArgAction::Append)]
    options: Vec<String>,
    /// Do not look at the backing file; SIZE is needed then
    #[arg(short = 'u', long)]
    backing_unsafe: bool,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    unserved: Unserved,
    /// The image
    file: PathBuf,
    /// The virtual size (suffixes k M G T P E, powers of 1024); with a backing file, its size by default
    #[arg(allow_hyphen_values = true)]
    size: Option<String>,
}

/// Does it.
pub(crate) fn run(args: &Args) -> Outcome {
    args.unserved.refuse()?;
    let format = open::named_format(&args.format)?;
    if let Some(help) = settings::help(format, &args.options) {
        emit(&help)?;
        return Ok(0);
    }
    let named = |failure: Failure| Failure::new(format!("{}: {failure}", args.file.display())).with_code(failure.code);
    let size = args.size.as_deref().map(parse_size).transpose()?;
    let mut settings = Settings::parse(format, &args.options).map_err(named)?;
    settings.set_backing(args.backing.as_deref(), args.backing_format.as_deref());
    settings.set_size(size).map_err(named)?;
    match format {
        Format::Raw => create_raw(args, &settings).map_err(named),
        Format::Qcow2 => create_qcow2(args, &settings).map_err(named),
    }
}

/// The size that a command line gives, in qemu-img's bounds.
pub(crate) fn parse_size(text: &str) -> Result<u64, Failure> {
    let size = match text.strip_prefix('-') {
        Some(digits) => size::parse(digits).map(|_| u64::MAX),
        None => size::parse(text),
    };
    match size {
        None => Err(Failure::new(format!("Invalid image size specified: '{text}'."))),
        Some(size) if i64::try_from(size).is_err() => {
            Err(Failure::new(format!("Invalid image size specified. Must be between 0 and {}.", i64::MAX)))
        }
        Some(size) => Ok(size),
    }
}

fn create_raw(args: &Args, settings: &Settings) -> Outcome {
    if settings.get("backing_file").is_some() {
        return Err(Failure::new("Backing file not supported for file format 'raw'"));
    }
    let size = settings.size.ok_or_else(|| Failure::new("Image creation needs a size parameter"))?;
    let mut line = format!("Formatting '{}', fmt=raw size={size}", args.file.display());
    if let Some(mode) = settings.get("preallocation") {
        let _ = write!(line, " preallocation={mode}");
    }
    say(args.quiet, &line)?;
    let preallocation = match settings.get("preallocation") {
        Some(mode @ "metadata") => return Err(Failure::new(format!("Unsupported preallocation mode: {mode}"))),
        mode => crate::resize::preallocation(mode)?,
    };
    let size = whole_sectors(size)?;
    let storage = empty_file(&args.file)?;
    if !storage.is_fixed_size() {
        storage.set_len(size)?;
    }
    match preallocation {
        Preallocation::Off | Preallocation::Metadata => {}
        Preallocation::Falloc => storage.allocate_range(0..size)?,
        Preallocation::Full => crate::resize::write_zeroes(&*storage, 0..size)?,
    }
    storage.sync()?;
    durable_name(&args.file)
}

fn create_qcow2(args: &Args, settings: &Settings) -> Outcome {
    let backing = settings.get("backing_file");
    let size = virtual_size(args, settings)?;
    say(args.quiet, &settings.formatting(&args.file, size))?;
    let options = create_options(settings, whole_sectors(size)?)?;
    if backing.is_some() && options.preallocation != Preallocation::Off && !options.extended_l2 {
        let why = "Backing file and preallocation can only be used at the same time if extended_l2 is on";
        return Err(Failure::new(why));
    }
    // A file that is there is lost only for options that give an image.
    let mut rehearsal = options.clone();
    rehearsal.preallocation = Preallocation::Off;
    Image::create(Arc::new(MemoryStorage::new(args.file.to_string_lossy())), &rehearsal)?.close()?;
    Image::create(empty_file(&args.file)?, &options)?.close()?;
    durable_name(&args.file)
}

/// Refuses a backing file name that QEMU reads as a protocol, although a file of this name is meant.
pub(crate) fn refuse_protocol(name: &str) -> Result<(), Failure> {
    if !has_protocol(name.as_bytes()) {
        return Ok(());
    }
    let why =
        format!("QEMU reads the backing file name '{name}' as a protocol; for a file of this name use './{name}'");
    Err(Failure::new(why))
}

/// The size asked for, else the backing file's. The backing file is looked at even where its size is not needed, so that
/// a wrong name is noticed now.
fn virtual_size(args: &Args, settings: &Settings) -> Result<u64, Failure> {
    let missing = || Failure::new("Image creation needs a size parameter");
    let Some(name) = settings.get("backing_file").filter(|name| !name.is_empty()) else {
        return settings.size.ok_or_else(missing);
    };
    if Path::new(name) == args.file {
        return Err(Failure::new("Error: Trying to create an image with the same filename as the backing file"));
    }
    let format = settings
        .get("backing_fmt")
        .ok_or_else(|| Failure::new("Backing file specified without backing format: say -F qcow2 or -F raw"))?;
    let format = open::named_format(format)?;
    if args.backing_unsafe {
        return settings.size.ok_or_else(missing);
    }
    refuse_protocol(name)?;
    let path = directory(&args.file).join(name);
    let path = path.strip_prefix(".").unwrap_or(&path);
    let backing = backing_size(path, format);
    let backing = backing.map_err(|failure| failure.with_hint("Could not open backing image."))?;
    Ok(settings.size.unwrap_or(backing))
}

fn backing_size(path: &Path, format: Format) -> Result<u64, Failure> {
    let storage = open::file(path, &Access::read())?;
    Ok(match format {
        Format::Qcow2 => Image::open(storage, &OpenOptions::default())?.virtual_size(),
        Format::Raw => RawImage::open(storage)?.virtual_size(),
    })
}

/// What the new image looks like.
pub(crate) fn create_options(settings: &Settings, size: u64) -> Result<CreateOptions, Failure> {
    let mut options = CreateOptions::default();
    options.size = size;
    options.version = match settings.get("compat") {
        None | Some("1.1" | "v3") => Version::V3,
        Some("0.10" | "v2") => Version::V2,
        Some(other) => return Err(Failure::new(format!("Parameter 'version' does not accept value '{other}'"))),
    };
    let v2 = options.version == Version::V2;
    options.cluster_bits = ClusterBits::from_size(settings.number("cluster_size", 64 << 10)?)
        .ok_or_else(|| Failure::new("Cluster size must be a power of two between 512 and 2048k"))?;
    let bits = u32::try_from(settings.number("refcount_bits", 16)?).unwrap_or(0);
    options.refcount_order = RefcountOrder::from_bits(bits)
        .ok_or_else(|| Failure::new("Refcount width must be a power of two and may not exceed 64 bits"))?;
    options.extended_l2 = settings.flag("extended_l2")?;
    options.lazy_refcounts = settings.flag("lazy_refcounts")?;
    options.compression_type = match settings.get("compression_type") {
        None | Some("zlib") => CompressionType::Deflate,
        Some("zstd") => CompressionType::Zstd,
        Some(other) => {
            return Err(Failure::new(format!("Parameter 'compression-type' does not accept value '{other}'")));
        }
    };
    options.preallocation = crate::resize::preallocation(settings.get("preallocation"))?;
    let backing = settings.get("backing_file").filter(|name| !name.is_empty());
    options.backing = match (backing, settings.get("backing_fmt")) {
        (Some(name), Some(format)) => Some((name.into(), format.into())),
        (None, Some(_)) => return Err(Failure::new("Backing format cannot be used without backing file")),
        _ => None,
    };
    if v2 && options.lazy_refcounts {
        let why = "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)";
        return Err(Failure::new(why));
    }
    Ok(options)
}

fn whole_sectors(size: u64) -> Result<u64, Failure> {
    size::round_up(size, 512).ok_or_else(|| Failure::new("The image size is too large"))
}

/// The file at `path`, made anew or emptied under a writer's locks. A block device cannot be emptied: its beginning is.
pub(crate) fn empty_file(path: &Path) -> Result<Arc<dyn Storage>, Failure> {
    if !HostFileSystem.exists(path)? {
        return Ok(HostFileSystem.create_new(path)?);
    }
    let storage = open::file(path, &Access::write())?;
    if storage.is_fixed_size() {
        let end = storage.len()?.min(1 << 20);
        zero_range(&*storage, 0..end)?;
    } else {
        storage.set_len(0)?;
    }
    Ok(storage)
}

/// Makes the name of a new file durable.
pub(crate) fn durable_name(path: &Path) -> Outcome {
    HostFileSystem.sync_dir(directory(path))?;
    Ok(0)
}
