//! `vm init`: existing images become the volumes of a VM.

use std::path::{Path, PathBuf};

use qcow2_chain::chain::Policy;
use qcow2_chain::format::ClusterBits;
use qcow2_chain::vm::{AdoptOptions, OverlayShape, SnapshotSet, VolumeSpec};

use super::telling::explain;
use crate::failure::{Failure, Outcome};
use crate::options::PolicyArgs;
use crate::output::say;
use crate::settings::split;
use crate::{open, size};

/// Take existing images in as the volumes of a VM
///
/// What an image stands on becomes snapshots of the names given by --snapshot, from the oldest to the youngest; what lies
/// deeper, or all where none are named, is a base, which is neither written nor removed.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The catalogue to make
    catalogue: PathBuf,
    /// A volume and the image that the VM writes. A raw image needs format=raw; protected=on keeps the image as it is once a
    /// snapshot froze it; cluster_size=SIZE and extended_l2=on|off say how overlays are made (as the image is). A comma in a
    /// name is doubled
    #[arg(long, required = true, value_name = "NAME=FILE[,format=raw][,protected=on]")]
    volume: Vec<String>,
    /// Make a snapshot of this name of what the images stand on (repeatable, the oldest first)
    #[arg(long, value_name = "NAME")]
    snapshot: Vec<String>,
    /// The VM's name, part of its overlays' names (the catalogue's name without its extension)
    #[arg(long, value_name = "NAME")]
    vm: Option<String>,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    policy: PolicyArgs,
}

/// Does it.
pub(crate) fn run(args: &Args) -> Outcome {
    let specs = args.volume.iter().map(|text| parse(text)).collect::<Result<Vec<_>, Failure>>()?;
    let mut options = AdoptOptions::default().with_snapshots(args.snapshot.clone());
    options.vm.clone_from(&args.vm);
    options.policy = policy(&args.policy, &specs);
    // By whole paths, what lies beneath the catalogue's directory is recorded by relative ones.
    SnapshotSet::adopt(absolute(&args.catalogue)?, &specs, &options).map_err(explain)?;
    say(args.quiet, &format!("{}: {}", args.catalogue.display(), super::table::counted(specs.len(), "volume")))?;
    Ok(0)
}

fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path).map_err(Failure::from)
}

/// Beneath the directory of each volume's image, and what the user allows.
fn policy(args: &PolicyArgs, specs: &[VolumeSpec]) -> Policy {
    let mut directories = Vec::new();
    for spec in specs {
        match args.policy(&spec.path) {
            Policy::Beneath(more) => directories.extend(more),
            other => return other,
        }
    }
    Policy::Beneath(directories)
}

/// Reads `NAME=FILE,key=value`.
fn parse(text: &str) -> Result<VolumeSpec, Failure> {
    let wrong = |why: &str| Failure::new(format!("--volume {text}: {why}"));
    let mut parts = split(text).into_iter();
    let Some((name, Some(file))) = parts.next() else { return Err(wrong("NAME=FILE is wanted")) };
    let file = absolute(Path::new(&file))?;
    let mut spec = VolumeSpec::new(name, &file);
    let (mut format, mut shape) = (None, None);
    for (key, value) in parts {
        let value = value.unwrap_or_else(|| "on".to_owned());
        let switch = || match value.as_str() {
            "on" => Ok(true),
            "off" => Ok(false),
            _ => Err(wrong(&format!("{key} is on or off"))),
        };
        match key.as_str() {
            "format" => format = Some(value),
            "protected" => spec.protected = switch()?,
            "extended_l2" => shape.get_or_insert_with(OverlayShape::default).extended_l2 = switch()?,
            "cluster_size" => {
                let bits = size::parse(&value).filter(|size| size.is_power_of_two()).map(u64::trailing_zeros);
                let bits = bits.and_then(ClusterBits::new);
                let bits = bits.ok_or_else(|| wrong("no size of clusters"))?;
                shape.get_or_insert_with(OverlayShape::default).cluster_bits = bits.get();
            }
            _ => return Err(wrong(&format!("there is no {key}"))),
        }
    }
    spec.format = match format.as_deref() {
        Some(name) => open::named_format(name)?,
        None => open::format(&file, None).map_err(|failure| failure.with_hint("Of a volume: format=raw"))?,
    };
    spec.overlay = shape;
    Ok(spec)
}
