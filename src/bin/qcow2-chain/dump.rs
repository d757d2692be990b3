//! `dump`: the structures of one image, each field with its place in the file.

use std::fmt::Write as _;
use std::path::PathBuf;

use qcow2_chain::format::{BitmapDirectoryEntry, Extension, HeaderCluster, Limits, SnapshotEntry};
use qcow2_chain::image::{Image, OpenOptions};
use qcow2_chain::storage::{Access, Storage};

use crate::failure::{Failure, Outcome};
use crate::json::Json;
use crate::options::looking;
use crate::output::{Form, emit};
use crate::{dump_tables, open, size};

/// Print an image's structures: header, extensions, tables
///
/// Opens nothing but the one file. Also for images that are damaged: what cannot be read is said and left out.
#[derive(clap::Args, Debug)]
#[command(args_override_self = true)]
pub(crate) struct Args {
    /// Take no locks: look at an image that another program holds
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The form of the output
    #[arg(long, value_enum, default_value = "human")]
    output: Form,
    /// The image (qcow2)
    file: PathBuf,
}

/// One structure of the file.
#[derive(Debug)]
pub(crate) struct Section {
    pub name: String,
    /// Where it starts.
    pub offset: Option<u64>,
    pub rows: Vec<Row>,
}

/// One field, entry, or run of equal entries.
#[derive(Debug)]
pub(crate) struct Row {
    /// Where it starts in the file, if it has one place.
    pub offset: Option<u64>,
    pub name: String,
    pub value: String,
}

impl Section {
    /// A structure without rows so far.
    pub(crate) fn new(name: impl Into<String>, offset: Option<u64>) -> Self {
        Self { name: name.into(), offset, rows: Vec::new() }
    }

    /// Adds a row.
    pub(crate) fn row(&mut self, offset: impl Into<Option<u64>>, name: impl Into<String>, value: impl Into<String>) {
        self.rows.push(Row { offset: offset.into(), name: name.into(), value: value.into() });
    }
}

/// Does it.
pub(crate) fn run(args: &Args) -> Outcome {
    let storage = open::file(&args.file, &Access::read().with_lock(looking(args.force_share)))?;
    let file_len = storage.len()?;
    let mut sections = vec![header(&*storage)?];
    let decoded = first_cluster(&*storage, file_len);
    if let Ok(cluster) = &decoded {
        sections.push(extensions(cluster));
        dump_tables::push(&mut sections, &*storage, file_len, &cluster.header)?;
        match Image::open(storage, &OpenOptions::default()) {
            Ok(image) => {
                sections.extend(snapshots(&image, cluster));
                sections.extend(bitmaps(&image, cluster));
            }
            Err(error) => sections.push(failed("snapshots and bitmaps", &Failure::from(error))),
        }
    }
    match args.output {
        Form::Human => emit(&text(&sections))?,
        Form::Json => emit(&(Json::List(sections.iter().map(json).collect()).pretty() + "\n"))?,
    }
    decoded.map(|_| 0)
}

/// A structure that cannot be read, and why.
pub(crate) fn failed(name: &str, why: &Failure) -> Section {
    let mut section = Section::new(name, None);
    section.row(None, "error", why.to_string());
    section
}

fn first_cluster(storage: &dyn Storage, file_len: u64) -> Result<HeaderCluster, Failure> {
    // As much as the largest cluster; the decoder takes what belongs to the first one.
    let len = usize::try_from(file_len.min(2 << 20)).unwrap_or(usize::MAX);
    let mut bytes = vec![0; len];
    storage.read_at(&mut bytes, 0)?;
    let cluster_bits = bytes.get(20..24).and_then(|bits| bits.try_into().ok()).map_or(0, u32::from_be_bytes);
    let cluster = 1_usize.checked_shl(cluster_bits.clamp(9, 21)).unwrap_or(len);
    bytes.truncate(cluster);
    Ok(HeaderCluster::decode(&bytes, file_len, &Limits::default())?)
}

/// The fixed fields of the header: offset, length, name.
const FIELDS: [(usize, usize, &str); 20] = [
    (0, 4, "magic"),
    (4, 4, "version"),
    (8, 8, "backing_file_offset"),
    (16, 4, "backing_file_size"),
    (20, 4, "cluster_bits"),
    (24, 8, "size"),
    (32, 4, "crypt_method"),
    (36, 4, "l1_size"),
    (40, 8, "l1_table_offset"),
    (48, 8, "refcount_table_offset"),
    (56, 4, "refcount_table_clusters"),
    (60, 4, "nb_snapshots"),
    (64, 8, "snapshots_offset"),
    (72, 8, "incompatible_features"),
    (80, 8, "compatible_features"),
    (88, 8, "autoclear_features"),
    (96, 4, "refcount_order"),
    (100, 4, "header_length"),
    (104, 1, "compression_type"),
    (105, 7, "padding"),
];

/// The header as it lies in the file, without judging it.
fn header(storage: &dyn Storage) -> Result<Section, Failure> {
    let mut bytes = [0; 112];
    storage.read_at(&mut bytes, 0)?;
    let number = |at: usize, len: usize| bytes[at..at + len].iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
    if number(0, 4) != 0x5146_49fb {
        return Err(Failure::new(format!("{}: not a qcow2 image", storage.name())));
    }
    let end = if number(4, 4) < 3 { 72 } else { usize::try_from(number(100, 4)).unwrap_or(112).clamp(104, 112) };
    let mut section = Section::new("header", Some(0));
    for (at, len, name) in FIELDS.into_iter().filter(|(at, ..)| *at < end) {
        let value = number(at, len);
        let value = match name {
            "magic" | "padding" => format!("{value:#x}"),
            "cluster_bits" => format!("{value} ({})", size::human(1_u64.checked_shl(low(value)).unwrap_or(0))),
            "size" => format!("{value} ({})", size::human(value)),
            "refcount_order" => format!("{value} ({} bits)", 1_u64.checked_shl(low(value)).unwrap_or(0)),
            "incompatible_features" => {
                bits(value, &["dirty", "corrupt", "data file", "compression type", "extended L2"])
            }
            "compatible_features" => bits(value, &["lazy refcounts"]),
            "autoclear_features" => bits(value, &["bitmaps", "raw external data"]),
            name if name.ends_with("_offset") => format!("{value:#x}"),
            _ => value.to_string(),
        };
        section.row(at as u64, name, value);
    }
    Ok(section)
}

fn low(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// A word of bits, and the names of those that are set.
fn bits(value: u64, names: &[&str]) -> String {
    let set = (0..64).filter(|bit| value >> bit & 1 == 1);
    let set: Vec<String> = set
        .map(|bit: usize| names.get(bit).map_or_else(|| format!("unknown bit {bit}"), |name| (*name).to_owned()))
        .collect();
    if set.is_empty() { format!("{value:#x}") } else { format!("{value:#x} ({})", set.join(", ")) }
}

fn extensions(cluster: &HeaderCluster) -> Section {
    let mut at = u64::from(cluster.header.header_length);
    let mut section = Section::new("header extensions", Some(at));
    for extension in &cluster.extensions {
        let (kind, len, value) = match extension {
            Extension::BackingFormat(name) => (0xe279_2aca, name.len(), format!("backing format {:?}", lossy(name))),
            Extension::DataFile(name) => (0x4441_5441, name.len(), format!("data file {:?}", lossy(name))),
            Extension::FeatureNames(data) => (0x6803_f857, data.len(), format!("{} feature names", data.len() / 48)),
            Extension::Bitmaps(bitmaps) => {
                let (count, directory) = (bitmaps.nb_bitmaps, bitmaps.bitmap_directory_offset);
                let size = bitmaps.bitmap_directory_size;
                (0x2385_2875, 24, format!("{count} bitmaps, directory at {directory}, {size} bytes"))
            }
            Extension::Crypto(header) => {
                (0x0537_be77, 16, format!("encryption header at {}, {} bytes", header.offset, header.length))
            }
            Extension::Unknown { kind, data } => (*kind, data.len(), format!("unknown, {} bytes", data.len())),
            other => (0, 0, format!("{other:?}")),
        };
        section.row(at, format!("{kind:#010x}"), value);
        at += 8 + (len as u64).next_multiple_of(8);
    }
    if let Some(name) = &cluster.backing_file {
        section.row(cluster.header.backing_file_offset, "backing file", format!("{:?}", lossy(name)));
    }
    section
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn snapshots(image: &Image, cluster: &HeaderCluster) -> Option<Section> {
    if cluster.header.nb_snapshots == 0 {
        return None;
    }
    let mut section = Section::new("snapshot table", Some(cluster.header.snapshots_offset.get()));
    match image.snapshots() {
        Err(error) => return Some(failed("snapshot table", &Failure::from(error))),
        Ok(entries) => entries.iter().for_each(|entry| section.row(None, lossy(&entry.id), snapshot(entry))),
    }
    Some(section)
}

fn snapshot(entry: &SnapshotEntry) -> String {
    let mut out = format!("{:?}, L1 at {}, {} entries", lossy(&entry.name), entry.l1_table_offset, entry.l1_size);
    if let Some(size) = entry.disk_size() {
        let _ = write!(out, ", disk {size} bytes");
    }
    let _ = write!(out, ", VM state {} bytes, {} bytes of extra data", entry.vm_state(), entry.extra_data.len());
    out
}

fn bitmaps(image: &Image, cluster: &HeaderCluster) -> Option<Section> {
    let directory = cluster.extensions.iter().find_map(|extension| match extension {
        Extension::Bitmaps(bitmaps) => Some(bitmaps.bitmap_directory_offset.get()),
        _ => None,
    });
    let directory = directory?;
    let mut section = Section::new("bitmap directory", Some(directory));
    match image.bitmaps() {
        Err(error) => return Some(failed("bitmap directory", &Failure::from(error))),
        Ok(entries) => entries.iter().for_each(|entry| section.row(None, lossy(&entry.name), bitmap(entry))),
    }
    Some(section)
}

fn bitmap(entry: &BitmapDirectoryEntry) -> String {
    format!(
        "table at {}, {} entries, flags {}, granularity {} bytes",
        entry.bitmap_table_offset,
        entry.bitmap_table_size,
        bits(entry.flags.into(), &["in use", "auto", "extra data compatible"]),
        1_u64.checked_shl(entry.granularity_bits.into()).unwrap_or(0),
    )
}

fn text(sections: &[Section]) -> String {
    let mut out = String::new();
    for (index, section) in sections.iter().enumerate() {
        let gap = if index > 0 { "\n" } else { "" };
        let place = section.offset.map(|offset| format!(" at {offset:#x}")).unwrap_or_default();
        let _ = writeln!(out, "{gap}{}{place}", section.name);
        let width = section.rows.iter().map(|row| row.name.chars().count()).max().unwrap_or(0);
        for Row { offset, name, value } in &section.rows {
            let offset = offset.map(|offset| format!("{offset:#x}")).unwrap_or_default();
            let _ = writeln!(out, "  {offset:>12}  {name:<width$}  {value}");
        }
    }
    out
}

fn json(section: &Section) -> Json {
    let row = |row: &Row| {
        let offset = row.offset.map(|offset| ("offset", offset.into()));
        let named = [("name", row.name.as_str().into()), ("value", row.value.as_str().into())];
        Json::Object(offset.into_iter().chain(named).collect())
    };
    let offset = section.offset.map(|offset| ("offset", offset.into()));
    let rows = ("entries", Json::List(section.rows.iter().map(row).collect()));
    let members = [("structure", section.name.as_str().into())].into_iter().chain(offset).chain([rows]);
    Json::Object(members.collect())
}
