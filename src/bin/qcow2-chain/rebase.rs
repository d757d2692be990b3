//! `rebase`: an image gets another backing file.

use std::path::{Path, PathBuf};

use qcow2_chain::chain::{Chain, Format};
use qcow2_chain::image::{Image, OpenOptions};
use qcow2_chain::merge::{self, Onto, RebaseOptions};
use qcow2_chain::storage::LockMode;

use crate::commit::{find, with_progress};
use crate::create::refuse_protocol;
use crate::failure::{Failure, Outcome};
use crate::open;
use crate::options::{PolicyArgs, Unserved, cache_mode, directory};
use crate::planning::{MergeArgs, cancelled, explain};
use crate::progress::Progress;

/// Change the backing file of an image
///
/// The image reads as before: where old and new backing file differ, the old content is written to it first. With -u only
/// the name is changed, whatever the files hold.
#[expect(clippy::struct_excessive_bools, reason = "the command line has as many switches")]
#[derive(clap::Args, Debug)]
#[command(args_override_self = true)]
pub(crate) struct Args {
    /// The image's format (qcow2)
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// The new backing file, as the image will name it; "" for none
    #[arg(short, long, value_name = "NAME")]
    backing: Option<String>,
    /// The new backing file's format
    #[arg(short = 'F', long, value_name = "FMT")]
    backing_format: Option<String>,
    /// Change the name only: for a backing file that was moved or replaced by an equal one
    #[arg(short = 'u', long)]
    backing_unsafe: bool,
    /// Give up the clusters that equal the new backing file
    #[arg(long)]
    drop_equal: bool,
    /// Let internal snapshots show the new backing file where they hold nothing themselves
    #[arg(long)]
    ignore_snapshots: bool,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    /// Show how far it is
    #[arg(short, long)]
    progress: bool,
    /// Accepted and without effect
    #[arg(short = 't', long, value_name = "CACHE")]
    cache: Option<String>,
    /// Accepted and without effect
    #[arg(short = 'T', long, value_name = "CACHE")]
    backing_cache: Option<String>,
    #[arg(short, long, hide = true)]
    compress: bool,
    #[arg(short = 'U', long, hide = true)]
    force_share: bool,
    #[command(flatten)]
    merge: MergeArgs,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    unserved: Unserved,
    /// The image
    file: PathBuf,
}

/// The formats that a header may record without anybody opening the file: QEMU's.
const RECORDABLE: &[&str] =
    &["qcow2", "raw", "qcow", "qed", "vdi", "vhdx", "vmdk", "vpc", "parallels", "bochs", "cloop", "dmg"];

/// Does it.
pub(crate) fn run(args: &Args) -> Outcome {
    args.unserved.refuse()?;
    cache_mode(args.cache.as_deref())?;
    if cache_mode(args.backing_cache.as_deref()).is_err() {
        let mode = args.backing_cache.as_deref().unwrap_or_default();
        return Err(Failure::new(format!("Invalid source cache option: {mode}")));
    }
    if args.compress {
        return Err(Failure::unserved("--compress", "qemu-img rebase -c"));
    }
    if args.force_share {
        return Err(Failure::unserved("--force-share", "the image when nobody else does"));
    }
    if args.backing.is_none() && !args.backing_unsafe {
        return Err(Failure::new("Must specify backing file (-b) or use unsafe mode (-u)"));
    }
    let name = args.backing.as_deref().filter(|name| !name.is_empty());
    if let Some(format) = args.backing_format.as_deref().filter(|format| !RECORDABLE.contains(format)) {
        return Err(Failure::new(format!("Invalid format name: '{format}'")));
    }
    let format = open::format(&args.file, args.format.as_deref())?;
    let cannot = |why: &dyn std::fmt::Display| {
        Failure::new(format!("Could not change the backing file to '{}': {why}", name.unwrap_or_default()))
    };
    if format == Format::Raw {
        return Err(cannot(&"a raw image has no backing file"));
    }
    if name.is_some() && args.backing_format.is_none() {
        return Err(cannot(&"backing format must be specified"));
    }
    if args.backing_unsafe && args.merge.dry_run {
        return Err(Failure::unserved("--dry-run with -u", "info: only the name changes"));
    }
    if args.backing_unsafe {
        let progress = Progress::new(args.progress && !args.quiet);
        let image = Image::open_path(&args.file, &OpenOptions::default().with_write(true))?;
        let format = args.backing_format.as_deref().filter(|_| name.is_some());
        let changed = merge::rebase_unsafe(&image, name.map(str::as_bytes), format.map(str::as_bytes));
        changed.map_err(|error| cannot(&Failure::from(error)))?;
        image.close()?;
        progress.set(1, 1);
        progress.end();
        return Ok(0);
    }
    rebase(args, name)
}

/// The safe way: all files are opened.
fn rebase(args: &Args, name: Option<&str>) -> Outcome {
    let mut options = args.policy.chain_options(&args.file, Format::Qcow2, LockMode::Read);
    options.writable = usize::from(!args.merge.dry_run);
    let chain = Chain::open(&args.file, &options).map_err(open::explain)?;
    let mut rebase =
        RebaseOptions::default().with_drop_equal(args.drop_equal).with_ignore_snapshots(args.ignore_snapshots);
    rebase.rate_limit = args.merge.rate()?;
    let other = match name {
        None => None,
        Some(name) => {
            refuse_protocol(name)?;
            rebase = rebase.with_backing_file(name.as_bytes());
            let format = open::named_format(args.backing_format.as_deref().unwrap_or_default())
                .map_err(|failure| not_new(name, &failure))?;
            // Relative to the image, as its readers will take it.
            let path = directory(&args.file).join(name);
            match find(chain.layers(), &path, &args.file) {
                Ok(index) if chain.layers().get(index).is_some_and(|layer| layer.format() == format) => {
                    Some(Base::Layer(index))
                }
                _ => Some(Base::Chain(open_new(args, name, &path, format)?)),
            }
        }
    };
    let onto = match &other {
        None => Onto::Nothing,
        Some(Base::Layer(index)) => Onto::Layer(*index),
        Some(Base::Chain(other)) => Onto::Chain(other),
    };
    if args.merge.dry_run {
        args.merge.show(&merge::plan_rebase(&chain, onto, &rebase)?)?;
        return Ok(0);
    }
    let before = backing_name(&chain);
    let done = with_progress(args.progress && !args.quiet, |face| merge::rebase(&chain, onto, &rebase, face));
    let done = done.map_err(|error| match &error {
        merge::Error::Refused { why, .. } if why.contains("snapshots") => {
            Failure::from(error).with_hint("Use --ignore-snapshots to let them")
        }
        merge::Error::Cancelled if backing_name(&chain) != before => {
            let file = args.file.display();
            cancelled(&format!(
                "{file} reads as before and stands on its new backing file; not all that equals it is dropped"
            ))
        }
        _ => explain(error, &chain, 0),
    });
    chain.close()?;
    args.merge.tell(args.quiet, "", "rebase", &done?)
}

/// What the top's header says that it stands on.
fn backing_name(chain: &Chain) -> Option<Vec<u8>> {
    chain.top().node.as_qcow2().and_then(|image| image.header().backing_file)
}

/// What the image sits on afterwards.
enum Base {
    Layer(usize),
    Chain(Chain),
}

fn open_new(args: &Args, name: &str, path: &Path, format: Format) -> Result<Chain, Failure> {
    let options = args.policy.chain_options(path, format, LockMode::Read);
    Chain::open(path, &options).map_err(|error| not_new(name, &open::explain(error)))
}

fn not_new(name: &str, why: &Failure) -> Failure {
    Failure::new(format!("Could not open new backing file '{name}': {why}"))
}
