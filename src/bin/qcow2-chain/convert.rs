//! `convert`: an image and all beneath it become one that needs no other.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use qcow2_chain::chain::{Chain, Format};
use qcow2_chain::image::{CreateOptions, Image, Preallocation};
use qcow2_chain::merge::{self, ConvertOptions, ConvertTarget};
use qcow2_chain::storage::{Access, FileStorage, LockMode, MemoryStorage, Storage};

use crate::commit::with_progress;
use crate::create::{create_options, durable_name, empty_file};
use crate::failure::{Failure, Outcome};
use crate::options::{PolicyArgs, Unserved, cache_mode, looking};
use crate::output::emit;
use crate::settings::Settings;
use crate::{open, settings, size, snapshot, thin};

/// Copy an image with all beneath it into one new image that needs no other, or only a backing file of its own (-B)
#[expect(clippy::struct_excessive_bools, reason = "the command line has as many switches")]
#[derive(clap::Args, Debug)]
#[command(args_override_self = true)]
pub(crate) struct Args {
    /// The source's format (qcow2 or raw)
    #[arg(short = 'f', long, value_name = "FMT")]
    source_format: Option<String>,
    /// The new image's format (qcow2 or raw)
    #[arg(short = 'O', long, value_name = "FMT", default_value = "raw")]
    target_format: String,
    /// Settings of the new image as KEY=VALUE,...; `-o help` lists them
    #[arg(short = 'o', long, value_name = "KEY=VALUE", action = clap::ArgAction::Append)]
    target_options: Vec<String>,
    /// Compress (qcow2 only)
    #[arg(short, long)]
    compress: bool,
    /// Leave out zeroes from this length on; 0 writes everything
    #[arg(short = 'S', long, value_name = "SIZE")]
    sparse_size: Option<String>,
    /// Leave the data to the kernel unseen: shares blocks where the file system can
    #[arg(short = 'C', long)]
    copy_range_offloading: bool,
    /// Overwrite an image that is there
    #[arg(short, long)]
    no_create: bool,
    /// Accepted and without effect
    #[arg(long)]
    target_is_zero: bool,
    /// The number of threads that read and compress, 1 to 16
    #[arg(short = 'm', long, value_name = "N", allow_hyphen_values = true)]
    parallel: Option<String>,
    /// Accepted and without effect: the result does not depend on it
    #[arg(short = 'W', long)]
    oob_writes: bool,
    /// Show how far it is
    #[arg(short, long)]
    progress: bool,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    /// Take no locks on the source: copy an image that another program holds
    #[arg(short = 'U', long)]
    force_share: bool,
    /// Accepted and without effect
    #[arg(short = 't', long, value_name = "CACHE")]
    target_cache: Option<String>,
    /// Accepted and without effect
    #[arg(short = 'T', long, value_name = "CACHE")]
    source_cache: Option<String>,
    /// Give the new image (qcow2) this backing file, as it will name it: it then holds only what differs from that
    #[arg(short = 'B', long, value_name = "FILE")]
    backing: Option<String>,
    /// The backing file's format
    #[arg(short = 'F', long, value_name = "FMT")]
    backing_format: Option<String>,
    /// Copy an internal snapshot instead of the present content: its ID or name, or snapshot.id=ID,snapshot.name=NAME
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    source_snapshot: Option<String>,
    #[command(flatten)]
    refused: Refused,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    unserved: Unserved,
    /// The source, then the new image
    #[arg(value_name = "FILE")]
    files: Vec<PathBuf>,
}

/// Options of qemu-img that are known but not served.
#[expect(clippy::struct_excessive_bools, reason = "the command line has as many switches")]
#[derive(clap::Args, Debug)]
struct Refused {
    #[arg(short, long, hide = true, value_name = "RATE")]
    rate: Option<String>,
    #[arg(long, hide = true)]
    bitmaps: bool,
    #[arg(long, hide = true)]
    skip_broken_bitmaps: bool,
    #[arg(long, hide = true)]
    target_image_opts: bool,
    #[arg(long, hide = true)]
    salvage: bool,
}

impl Refused {
    fn refuse(&self) -> Result<(), Failure> {
        let given = [
            (self.rate.is_some(), "--rate", "the I/O limits of a control group"),
            (self.bitmaps, "--bitmaps", "qemu-img to copy bitmaps"),
            (self.skip_broken_bitmaps, "--skip-broken-bitmaps", "qemu-img to copy bitmaps"),
            (self.target_image_opts, "--target-image-opts", "a file name with -O FMT"),
            (self.salvage, "--salvage", "qemu-img for a medium that cannot be read"),
        ];
        let refused = given.iter().find(|(given, ..)| *given);
        refused.map_or(Ok(()), |(_, option, instead)| Err(Failure::unserved(option, instead)))
    }
}

/// Does it.
pub(crate) fn run(args: &Args) -> Outcome {
    args.unserved.refuse()?;
    args.refused.refuse()?;
    let format = named_target(&args.target_format)?;
    if let Some(help) = settings::help(format, &args.target_options) {
        emit(&help)?;
        return Ok(0);
    }
    let options = convert_options(args)?;
    let [source, target] = &args.files[..] else {
        return Err(match args.files.len() {
            0 | 1 => Failure::new("Must specify image file name"),
            _ => Failure::unserved("more than one source", "one image at a time"),
        });
    };
    refuse_unfit(args, format)?;
    let mut settings = Settings::parse(format, &args.target_options)?;
    settings.set_backing(args.backing.as_deref(), args.backing_format.as_deref());
    let base = thin::base(&settings, format)?;
    if base.is_some() {
        thin::refuse_unfit(args.compress, args.no_create, args.source_snapshot.is_some())?;
    }
    let compressing = args.compress.then(|| settings.get("preallocation")).flatten();
    if compressing.is_some_and(|mode| mode != "off") {
        return Err(Failure::new("Compression and preallocation not supported at the same time"));
    }
    let mut source = open::chain(source, args.source_format.as_deref(), looking(args.force_share), &args.policy)?;
    if let Some(snapshot) = &args.source_snapshot {
        source = snapshot::of(source, snapshot)?;
    }
    let converting = |why: Failure| {
        Failure::new(format!("{}: error while converting {format}: {why}", target.display())).with_code(why.code)
    };
    if let Some(base) = base {
        let below = base.open(target, &args.policy)?;
        refuse_own_file(&source, target).and_then(|()| refuse_own_file(&below, target)).map_err(converting)?;
        let progress = args.progress && !args.quiet;
        return base.convert(&below, source, target, &settings, progress).map_err(converting);
    }
    if args.no_create {
        overwrite(args, &source, target, format, &options)
    } else {
        create(args, &source, target, &settings, format, &options).map_err(converting)
    }
}

/// The format of this name, for a new image.
pub(crate) fn named_target(name: &str) -> Result<Format, Failure> {
    Format::from_name(name.as_bytes())
        .ok_or_else(|| Failure::new(format!("Unknown file format '{name}' (qcow2 and raw are served)")))
}

fn convert_options(args: &Args) -> Result<ConvertOptions, Failure> {
    let mut options = ConvertOptions::default().with_compress(args.compress).with_offload(args.copy_range_offloading);
    if let Some(text) = &args.sparse_size {
        let wrong = "Invalid buffer size for sparse output specified";
        let sparse = size::parse(text).ok_or_else(|| Failure::new(format!("{wrong}: '{text}'.")))?;
        if !sparse.is_multiple_of(512) || sparse > MAX_SPARSE {
            let rule =
                format!("Valid sizes are multiples of 512 up to {MAX_SPARSE}. Select 0 to disable sparse detection");
            return Err(Failure::new(format!("{wrong}. {rule} (fully allocates output).")));
        }
        options = options.with_sparse(sparse);
    }
    if let Some(text) = &args.parallel {
        let wrong = "Invalid number of coroutines specified";
        let threads: i64 = text.parse().map_err(|_| Failure::new(format!("{wrong}: '{text}'.")))?;
        let threads = usize::try_from(threads).ok().filter(|threads| (1..=MAX_PARALLEL).contains(threads));
        let rule = || Failure::new(format!("{wrong}. Must be between 1 and {MAX_PARALLEL}."));
        options = options.with_threads(threads.ok_or_else(rule)?);
    }
    Ok(options)
}

/// QEMU's limits of `-S` and `-m`.
const MAX_SPARSE: u64 = 16 << 20;
const MAX_PARALLEL: usize = 16;

/// Refuses what does not go together, in qemu-img's words.
fn refuse_unfit(args: &Args, format: Format) -> Result<(), Failure> {
    cache_mode(args.target_cache.as_deref())?;
    cache_mode(args.source_cache.as_deref()).map_err(|_| {
        Failure::new(format!("Invalid source cache option: {}", args.source_cache.as_deref().unwrap_or("")))
    })?;
    let why = if args.no_create && !args.target_options.is_empty() {
        "-o has no effect when skipping image creation"
    } else if args.target_is_zero && !args.no_create {
        "--target-is-zero requires use of -n flag"
    } else if args.copy_range_offloading && args.sparse_size.is_some() {
        "Cannot enable copy offloading when -S is used"
    } else if args.copy_range_offloading && args.compress {
        "Cannot enable copy offloading when -c is used"
    } else if args.compress && format == Format::Raw {
        "Compression not supported for this file format"
    } else if args.compress && args.no_create {
        "-c is not supported with -n, use it for a new image"
    } else {
        return Ok(());
    };
    Err(Failure::new(why))
}

/// Converts to a new image. A file that is there is lost only for options that give one.
fn create(
    args: &Args,
    source: &Chain,
    target: &Path,
    settings: &Settings,
    format: Format,
    options: &ConvertOptions,
) -> Outcome {
    let size = source.virtual_size();
    let create = new_image(settings, size, format)?;
    refuse_own_file(source, target)?;
    let storage = empty_file(target)?;
    let (storage, reserve) = (Arc::clone(&storage), (format == Format::Raw).then_some(storage));
    let new = match format {
        Format::Qcow2 => ConvertTarget::Qcow2(storage, create.clone()),
        Format::Raw => ConvertTarget::Raw(storage),
    };
    let unfinished = match format {
        Format::Qcow2 => "is no image yet",
        Format::Raw => "holds only a part of the source",
    };
    carry_out(args, source, new, options, &format!("{} {unfinished}", target.display()))?;
    if let Some(storage) = reserve.filter(|_| create.preallocation != Preallocation::Off) {
        storage.allocate_range(0..size)?;
        storage.sync()?;
    }
    durable_name(target)
}

/// What the new image looks like, tried out in memory.
fn new_image(settings: &Settings, size: u64, format: Format) -> Result<CreateOptions, Failure> {
    if format == Format::Raw {
        let preallocation = match settings.get("preallocation") {
            Some(mode @ "metadata") => return Err(Failure::new(format!("Unsupported preallocation mode: {mode}"))),
            mode => crate::resize::preallocation(mode)?,
        };
        return Ok(CreateOptions::new(size).with_preallocation(preallocation));
    }
    let create = create_options(settings, size)?;
    let rehearsal = create.clone().with_preallocation(Preallocation::Off);
    Image::create(Arc::new(MemoryStorage::new("new image")), &rehearsal)?.close()?;
    Ok(create)
}

/// Refuses a target that is a file of the source, before it is emptied.
fn refuse_own_file(source: &Chain, target: &Path) -> Result<(), Failure> {
    let Ok(there) = FileStorage::open(target, &Access::read().with_lock(LockMode::None)) else { return Ok(()) };
    let is_it = |storage: &Arc<dyn Storage>| there.file_id().is_some() && storage.file_id() == there.file_id();
    if source.layers().iter().any(|layer| is_it(layer.node.storage())) {
        return Err(Failure::new("the target is a file of the source"));
    }
    Ok(())
}

/// Converts into an image that is there.
fn overwrite(args: &Args, source: &Chain, target: &Path, format: Format, options: &ConvertOptions) -> Outcome {
    let mut chain_options = args.policy.chain_options(target, format, LockMode::Read);
    chain_options.writable = 1;
    let chain = Chain::open(target, &chain_options).map_err(open::explain)?;
    if chain.virtual_size() < source.virtual_size() {
        return Err(Failure::new("output file is smaller than input file"));
    }
    let unfinished = format!("{} has lost what it held, and holds only a part of the source", target.display());
    carry_out(args, source, ConvertTarget::Existing(chain), options, &unfinished)?;
    Ok(0)
}

/// Converts; `unfinished` is what the target is where that is cancelled.
fn carry_out(
    args: &Args,
    source: &Chain,
    target: ConvertTarget,
    options: &ConvertOptions,
    unfinished: &str,
) -> Result<(), Failure> {
    let done = with_progress(args.progress && !args.quiet, |face| merge::convert(source, target, options, face));
    done.map(drop).map_err(|error| match error {
        merge::Error::Cancelled => Failure::new(format!("cancelled: {unfinished}")).with_code(130),
        error => error.into(),
    })
}
