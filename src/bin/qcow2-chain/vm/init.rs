//! `vm init`: adopts existing images as the volumes of a VM.

use std::path::{Path, PathBuf};

use qcow2_chain::chain::Policy;
use qcow2_chain::format::ClusterBits;
use qcow2_chain::vm::{AdoptOptions, OverlayShape, SnapshotSet, VolumeSpec};

use super::outcome::explain;
use super::safety::DependentArgs;
use crate::failure::{Failure, Outcome};
use crate::options::PolicyArgs;
use crate::output::say;
use crate::settings::split;
use crate::{open, size};

/// Take existing images in as the volumes of a VM
///
/// The backing files become snapshots of the names given by --snapshot, from the oldest to the
/// youngest. Deeper files, or all if none is named, are bases, which are never written or removed.
/// An image that another image is backed by is refused, unless it is a base or protected.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The catalogue to create
    catalogue: PathBuf,
    /// A volume and its active image. A raw image requires `format=raw`. `protected=on`: the image
    /// is shared, and never written or removed once a snapshot froze it. `overlay_dir=DIR`: the
    /// directory for overlays, required for a block device. `cluster_size=SIZE` and
    /// `extended_l2=on|off`: the geometry of overlays (default: that of the image). A comma in a
    /// name is doubled
    #[arg(long, required = true, value_name = "NAME=FILE[,KEY=VALUE]...")]
    volume: Vec<String>,
    /// Make a snapshot of this name of the backing files (repeatable, the oldest first)
    #[arg(long, value_name = "NAME")]
    snapshot: Vec<String>,
    /// The VM's name, a part of its overlays' names (default: the catalogue's name without its
    /// extension)
    #[arg(long, value_name = "NAME")]
    vm: Option<String>,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    dependents: DependentArgs,
    #[command(flatten)]
    policy: PolicyArgs,
}

/// Runs the verb.
pub(crate) fn run(args: &Args) -> Outcome {
    args.policy.refuse_probe()?;
    let specs = args.volume.iter().map(|text| parse(text)).collect::<Result<Vec<_>, Failure>>()?;
    let options = AdoptOptions::default().with_snapshots(args.snapshot.clone());
    let mut options = options.with_dependents(args.dependents.search());
    options.vm.clone_from(&args.vm);
    options.policy = policy(&args.policy, &specs);
    // From absolute paths, files beneath the catalogue's directory are recorded by relative ones.
    SnapshotSet::adopt(absolute(&args.catalogue)?, &specs, &options).map_err(explain)?;
    say(args.quiet, &format!("{}: {}", args.catalogue.display(), super::table::counted(specs.len(), "volume")))?;
    Ok(0)
}

fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path).map_err(Failure::from)
}

/// Returns the policy that allows the directory of each volume's image, and those that the user
/// named.
pub(super) fn policy(args: &PolicyArgs, specs: &[VolumeSpec]) -> Policy {
    let mut directories = Vec::new();
    for spec in specs {
        match args.policy(&spec.path) {
            Policy::Beneath(more) => directories.extend(more),
            other => return other,
        }
    }
    Policy::Beneath(directories)
}

/// Parses `NAME=FILE,key=value`.
pub(super) fn parse(text: &str) -> Result<VolumeSpec, Failure> {
    let wrong = |why: &str| Failure::new(format!("--volume {text}: {why}"));
    let mut parts = split(text).into_iter();
    let Some((name, Some(file))) = parts.next() else { return Err(wrong("NAME=FILE is expected")) };
    let file = absolute(Path::new(&file))?;
    let mut spec = VolumeSpec::new(name, &file);
    let (mut format, mut shape) = (None, None);
    for (key, value) in parts {
        let value = value.unwrap_or_else(|| "on".to_owned());
        let switch = || match value.as_str() {
            "on" => Ok(true),
            "off" => Ok(false),
            _ => Err(wrong(&format!("{key} must be on or off, got {value}"))),
        };
        match key.as_str() {
            "format" => format = Some(value),
            "overlay_dir" => spec.overlay_dir = Some(absolute(Path::new(&value))?),
            "protected" => spec.protected = switch()?,
            "extended_l2" => shape.get_or_insert_with(OverlayShape::default).extended_l2 = switch()?,
            "cluster_size" => {
                let bits = size::parse(&value).filter(|size| size.is_power_of_two()).map(u64::trailing_zeros);
                let bits = bits.and_then(ClusterBits::new);
                let bits = bits.ok_or_else(|| wrong("cluster_size must be a power of two from 512 to 2M"))?;
                shape.get_or_insert_with(OverlayShape::default).cluster_bits = bits.get();
            }
            _ => return Err(wrong(&format!("the option {key} is unknown"))),
        }
    }
    spec.format = match format.as_deref() {
        Some(name) => open::named_format(name)?,
        None => open::format(&file, None).map_err(|failure| failure.with_hint("For a volume: format=raw"))?,
    };
    spec.overlay = shape;
    Ok(spec)
}
