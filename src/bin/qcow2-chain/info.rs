//! `info`: what an image says of itself. Opens nothing but the one file, unless asked for the chain.

use std::path::PathBuf;

use qcow2_chain::chain::{Chain, Format, Node};
use qcow2_chain::format::{
    AutoclearFeatures, BitmapDirectoryEntry, CompatibleFeatures, CompressionType, CryptMethod, Extension,
    HeaderCluster, IncompatibleFeatures, SnapshotEntry, Version,
};
use qcow2_chain::image::{Image, OpenOptions, RawImage};
use qcow2_chain::storage::{Access, Storage};

use crate::failure::{Failure, Outcome};
use crate::json::Json;
use crate::options::{PolicyArgs, Unserved, looking};
use crate::output::{Form, emit};
use crate::{info_text, luks, open};

/// Display information about an image
#[derive(clap::Args, Debug)]
#[command(args_override_self = true)]
pub(crate) struct Args {
    /// The image's format (qcow2 or raw)
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Take no locks: look at an image that another program holds
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The image and all its backing files
    #[arg(short, long)]
    backing_chain: bool,
    /// The form of the output
    #[arg(long, value_enum, default_value = "human")]
    output: Form,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    unserved: Unserved,
    /// The image
    file: PathBuf,
}

/// What is told of one image.
#[derive(Debug)]
pub(crate) struct ImageInfo {
    pub filename: String,
    pub virtual_size: u64,
    /// The length of the file and the bytes that it occupies.
    pub file_length: u64,
    pub actual_size: Option<u64>,
    /// How the file is reached: `file` or `host_device`.
    pub protocol: &'static str,
    /// What only a qcow2 image has.
    pub qcow2: Option<Qcow2Info>,
}

/// What is told of a qcow2 image.
#[derive(Debug)]
pub(crate) struct Qcow2Info {
    pub cluster_size: u64,
    pub encrypted: bool,
    pub dirty: bool,
    pub backing: Option<Backing>,
    pub snapshots: Vec<SnapshotEntry>,
    /// `format-specific`, in QEMU's order.
    pub specific: Vec<(&'static str, Json)>,
}

/// The backing file as the image names it.
#[derive(Debug)]
pub(crate) struct Backing {
    pub name: String,
    /// The name as seen from here.
    pub full: String,
    pub format: Option<String>,
}

/// Does it.
pub(crate) fn run(args: &Args) -> Outcome {
    args.unserved.refuse()?;
    let lock = looking(args.force_share);
    let infos = if args.backing_chain {
        let chain = open::chain(&args.file, args.format.as_deref(), lock, &args.policy)?;
        of_chain(&chain)?
    } else {
        let format = open::format(&args.file, args.format.as_deref())?;
        let storage = open::file(&args.file, &Access::read().with_lock(lock))?;
        let name = args.file.to_string_lossy().into_owned();
        vec![match format {
            Format::Qcow2 => of_qcow2(&Image::open(storage, &OpenOptions::default())?, name)?,
            Format::Raw => of_raw(&RawImage::open(storage)?, name)?,
        }]
    };
    match args.output {
        Form::Human => {
            let texts: Vec<String> = infos.iter().map(info_text::of).collect();
            emit(&texts.join("\n"))?;
        }
        Form::Json => {
            let mut values: Vec<Json> = infos.iter().map(ImageInfo::json).collect();
            let value = if args.backing_chain { Json::List(values) } else { values.swap_remove(0) };
            emit(&(value.pretty() + "\n"))?;
        }
    }
    Ok(0)
}

fn of_chain(chain: &Chain) -> Result<Vec<ImageInfo>, Failure> {
    let told = |layer: &qcow2_chain::chain::Layer| {
        let name = layer.path.to_string_lossy().into_owned();
        match &layer.node {
            Node::Qcow2(image) => of_qcow2(image, name),
            Node::Raw(raw) => of_raw(raw, name),
        }
    };
    chain.layers().iter().map(told).collect()
}

fn of_raw(raw: &RawImage, filename: String) -> Result<ImageInfo, Failure> {
    of_storage(&**raw.storage(), filename, raw.virtual_size(), None)
}

fn of_storage(
    storage: &dyn Storage,
    filename: String,
    virtual_size: u64,
    qcow2: Option<Qcow2Info>,
) -> Result<ImageInfo, Failure> {
    let protocol = if storage.is_fixed_size() { "host_device" } else { "file" };
    // QEMU counts whole sectors.
    let file_length = storage.len()?.next_multiple_of(512);
    let actual_size = storage.allocated_len()?.or(storage.is_fixed_size().then_some(0));
    Ok(ImageInfo { filename, virtual_size, file_length, actual_size, protocol, qcow2 })
}

fn of_qcow2(image: &Image, filename: String) -> Result<ImageInfo, Failure> {
    let cluster = image.header();
    let header = &cluster.header;
    let backing = cluster.backing_file.as_ref().map(|name| {
        let name = String::from_utf8_lossy(name).into_owned();
        let full = full_name(&filename, &name);
        let format = cluster.backing_format().map(|format| String::from_utf8_lossy(format).into_owned());
        Backing { name, full, format }
    });
    // Without the autoclear bit the bitmaps are not there for anyone.
    let bitmaps = if header.autoclear_features.has(AutoclearFeatures::BITMAPS) { image.bitmaps()? } else { Vec::new() };
    let qcow2 = Qcow2Info {
        cluster_size: image.geometry().cluster_size(),
        encrypted: header.crypt_method != CryptMethod::None,
        dirty: header.incompatible_features.has(IncompatibleFeatures::DIRTY),
        backing,
        snapshots: image.snapshots()?,
        specific: specific(image, &cluster, &bitmaps)?,
    };
    of_storage(&**image.storage(), filename, image.virtual_size(), Some(qcow2))
}

/// Where a backing file's name leads, seen from where the image's own name is seen.
fn full_name(image: &str, backing: &str) -> String {
    let colon = backing.find([':', '/']).is_some_and(|at| backing[at..].starts_with(':'));
    match image.rfind('/') {
        Some(slash) if !colon && !backing.starts_with('/') => format!("{}{backing}", &image[..=slash]),
        _ => backing.to_owned(),
    }
}

fn specific(
    image: &Image,
    cluster: &HeaderCluster,
    bitmaps: &[BitmapDirectoryEntry],
) -> Result<Vec<(&'static str, Json)>, Failure> {
    let header = &cluster.header;
    let v3 = header.version == Version::V3;
    let compression = match header.compression_type {
        CompressionType::Deflate => "zlib",
        CompressionType::Zstd => "zstd",
    };
    let mut data = vec![("compat", if v3 { "1.1" } else { "0.10" }.into()), ("compression-type", compression.into())];
    if v3 {
        data.push(("lazy-refcounts", header.compatible_features.has(CompatibleFeatures::LAZY_REFCOUNTS).into()));
    }
    if !bitmaps.is_empty() {
        data.push(("bitmaps", Json::List(bitmaps.iter().map(bitmap).collect())));
    }
    data.push(("refcount-bits", header.refcount_order.bits().into()));
    match header.crypt_method {
        CryptMethod::None => {}
        CryptMethod::Aes => data.push(("encrypt", Json::Object(vec![("format", "aes".into())]))),
        CryptMethod::Luks => data.push(("encrypt", luks::describe(&**image.storage(), cluster)?)),
    }
    if header.incompatible_features.has(IncompatibleFeatures::DATA_FILE) {
        for extension in &cluster.extensions {
            if let Extension::DataFile(name) = extension {
                data.push(("data-file", String::from_utf8_lossy(name).as_ref().into()));
            }
        }
        let raw = header.autoclear_features.has(AutoclearFeatures::RAW_EXTERNAL_DATA);
        data.push(("data-file-raw", raw.into()));
    }
    if v3 {
        data.push(("corrupt", header.incompatible_features.has(IncompatibleFeatures::CORRUPT).into()));
        data.push(("extended-l2", image.geometry().extended_l2().into()));
    }
    Ok(data)
}

fn bitmap(entry: &BitmapDirectoryEntry) -> Json {
    let flags = [(BitmapDirectoryEntry::IN_USE, "in-use"), (BitmapDirectoryEntry::AUTO, "auto")];
    let set = flags.iter().filter(|(bit, _)| entry.flags & bit != 0);
    Json::Object(vec![
        ("flags", Json::List(set.map(|(_, name)| (*name).into()).collect())),
        ("name", String::from_utf8_lossy(&entry.name).as_ref().into()),
        ("granularity", 1_u64.checked_shl(entry.granularity_bits.into()).unwrap_or(0).into()),
    ])
}

impl ImageInfo {
    /// The members in the order in which QEMU prints them.
    fn json(&self) -> Json {
        let file = vec![
            ("children", Json::List(Vec::new())),
            ("virtual-size", self.file_length.into()),
            ("filename", self.filename.as_str().into()),
            ("format", self.protocol.into()),
        ];
        // QEMU calls what it knows of a block device "file" too.
        let specific = Json::Object(vec![("type", "file".into()), ("data", Json::Object(Vec::new()))]);
        let file = self.with_actual_size(file).into_iter().chain([("format-specific", specific)]);
        let file = file.chain([("dirty-flag", false.into())]).collect();
        let child = Json::Object(vec![("name", "file".into()), ("info", Json::Object(file))]);
        let mut members = vec![("children", Json::List(vec![child]))];
        let backing = self.qcow2.as_ref().and_then(|qcow2| qcow2.backing.as_ref());
        if let Some(format) = backing.and_then(|backing| backing.format.as_deref()) {
            members.push(("backing-filename-format", format.into()));
        }
        if let Some(qcow2) = self.qcow2.as_ref().filter(|qcow2| !qcow2.snapshots.is_empty()) {
            members.push(("snapshots", Json::List(qcow2.snapshots.iter().map(snapshot).collect())));
        }
        members.push(("virtual-size", self.virtual_size.into()));
        members.push(("filename", self.filename.as_str().into()));
        if let Some(qcow2) = &self.qcow2 {
            members.push(("cluster-size", qcow2.cluster_size.into()));
        }
        members.push(("format", if self.qcow2.is_some() { "qcow2" } else { "raw" }.into()));
        members = self.with_actual_size(members);
        if let Some(qcow2) = &self.qcow2 {
            let data = Json::Object(qcow2.specific.clone());
            members.push(("format-specific", Json::Object(vec![("type", "qcow2".into()), ("data", data)])));
            if qcow2.encrypted {
                members.push(("encrypted", true.into()));
            }
        }
        if let Some(backing) = backing {
            members.push(("full-backing-filename", backing.full.as_str().into()));
            members.push(("backing-filename", backing.name.as_str().into()));
        }
        members.push(("dirty-flag", self.qcow2.as_ref().is_some_and(|qcow2| qcow2.dirty).into()));
        Json::Object(members)
    }

    fn with_actual_size(&self, mut members: Vec<(&'static str, Json)>) -> Vec<(&'static str, Json)> {
        if let Some(size) = self.actual_size {
            members.push(("actual-size", size.into()));
        }
        members
    }
}

fn snapshot(entry: &SnapshotEntry) -> Json {
    let mut members = Vec::new();
    if let Some(icount) = entry.icount() {
        members.push(("icount", icount.into()));
    }
    members.extend([
        ("vm-clock-nsec", Json::from(entry.vm_clock_nsec % 1_000_000_000)),
        ("name", String::from_utf8_lossy(&entry.name).as_ref().into()),
        ("date-sec", entry.date_sec.into()),
        ("date-nsec", entry.date_nsec.into()),
        ("vm-clock-sec", (entry.vm_clock_nsec / 1_000_000_000).into()),
        ("id", String::from_utf8_lossy(&entry.id).as_ref().into()),
        ("vm-state-size", entry.vm_state().into()),
    ]);
    Json::Object(members)
}
