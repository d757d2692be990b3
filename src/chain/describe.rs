//! A chain described, for people and as JSON.

use std::fmt;
use std::path::PathBuf;

use crate::format::IncompatibleFeatures;
use crate::image::{ExtentKind, Image};

use super::{Chain, Format, Layer, Node, Result};

/// Guest bytes by how an image holds them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "json", derive(serde::Serialize))]
pub struct Held {
    /// As plain data.
    pub data: u64,
    /// As zeroes that the image itself decides, with or without space for them.
    pub zero: u64,
    /// As compressed data, counted uncompressed.
    pub compressed: u64,
}

impl Held {
    /// All of it.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.data.saturating_add(self.zero).saturating_add(self.compressed)
    }

    fn add(&mut self, kind: ExtentKind, len: u64) {
        match kind {
            ExtentKind::Data { .. } => self.data += len,
            ExtentKind::Zero { .. } => self.zero += len,
            ExtentKind::Compressed => self.compressed += len,
            ExtentKind::Unallocated => {}
        }
    }
}

/// What is remarkable about an image.
#[expect(clippy::struct_excessive_bools, reason = "they are independent of each other, as in the file")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "json", derive(serde::Serialize))]
#[cfg_attr(feature = "json", serde(rename_all = "kebab-case"))]
pub struct Flags {
    /// Its refcounts may be wrong.
    pub dirty: bool,
    /// It is marked corrupt.
    pub corrupt: bool,
    /// Its data are encrypted.
    pub encrypted: bool,
    /// Its data lie in another file.
    pub data_file: bool,
}

impl Flags {
    fn of(image: &Image) -> Self {
        let header = image.header().header;
        let features = header.incompatible_features;
        Self {
            dirty: features.has(IncompatibleFeatures::DIRTY),
            corrupt: features.has(IncompatibleFeatures::CORRUPT),
            encrypted: header.crypt_method != crate::format::CryptMethod::None,
            data_file: features.has(IncompatibleFeatures::DATA_FILE),
        }
    }

    /// Their names, those that are set.
    fn names(self) -> impl Iterator<Item = &'static str> {
        let names = [
            (self.dirty, "dirty"),
            (self.corrupt, "corrupt"),
            (self.encrypted, "encrypted"),
            (self.data_file, "external data file"),
        ];
        names.into_iter().filter_map(|(set, name)| set.then_some(name))
    }
}

/// What an image says it is over.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "json", derive(serde::Serialize))]
pub struct BackingDescription {
    /// The backing file's name as it stands in the image.
    pub name: String,
    /// The recorded format.
    pub format: Option<String>,
    /// The path that it was opened by.
    #[cfg_attr(feature = "json", serde(serialize_with = "path_as_text"))]
    pub path: PathBuf,
}

/// One layer described.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[cfg_attr(feature = "json", derive(serde::Serialize))]
#[cfg_attr(feature = "json", serde(rename_all = "kebab-case"))]
pub struct LayerDescription {
    /// The path that it was opened by.
    #[cfg_attr(feature = "json", serde(serialize_with = "path_as_text"))]
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Its virtual size in bytes.
    pub virtual_size: u64,
    /// The bytes that its file occupies on the disk, where that is known.
    pub actual_size: Option<u64>,
    /// Its cluster size in bytes; none for raw.
    pub cluster_size: Option<u64>,
    /// What it holds itself.
    pub held: Held,
    /// What it decides for who reads the chain from the top: what it holds less what layers above cover.
    pub visible: Held,
    /// What it says it is over.
    pub backing: Option<BackingDescription>,
    /// What is remarkable about it.
    pub flags: Flags,
    /// The number of internal snapshots.
    pub snapshots: u32,
}

/// A chain described. `Display` draws it, the top first; with feature `json` it serializes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[cfg_attr(feature = "json", derive(serde::Serialize))]
#[cfg_attr(feature = "json", serde(rename_all = "kebab-case"))]
pub struct Description {
    /// The size of the disk in bytes: the top's.
    pub virtual_size: u64,
    /// The layers, the top first.
    pub layers: Vec<LayerDescription>,
}

#[cfg(feature = "json")]
fn path_as_text<S: serde::Serializer>(path: &std::path::Path, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

impl Chain {
    /// Describes the chain: its layers, what each holds, and what of it is seen from the top. Reads all mapping tables,
    /// no data.
    ///
    /// # Errors
    /// [`super::Error::Image`] where a layer's tables cannot be read.
    pub fn describe(&self) -> Result<Description> {
        let below = self.layers.iter().skip(1).map(Some).chain([None]);
        let layers: Result<Vec<_>> =
            self.layers.iter().zip(below).map(|(layer, below)| layer.describe(below)).collect();
        let mut layers = layers?;
        for extent in self.extents(0..self.virtual_size()) {
            let extent = extent?;
            if let Some(layer) = extent.layer.and_then(|index| layers.get_mut(index)) {
                layer.visible.add(extent.kind, extent.len);
            }
        }
        Ok(Description { virtual_size: self.virtual_size(), layers })
    }
}

impl Layer {
    fn describe(&self, below: Option<&Self>) -> Result<LayerDescription> {
        let mut held = Held::default();
        for extent in self.node.extents(0..self.node.virtual_size()) {
            let extent = extent?;
            held.add(extent.kind, extent.len);
        }
        let mut description = LayerDescription {
            path: self.path.clone(),
            format: self.node.format(),
            virtual_size: self.node.virtual_size(),
            actual_size: self.node.storage().allocated_len()?,
            cluster_size: None,
            held,
            visible: Held::default(),
            backing: None,
            flags: Flags::default(),
            snapshots: 0,
        };
        if let Node::Qcow2(image) = &self.node {
            let header = image.header();
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            description.cluster_size = Some(image.geometry().cluster_size());
            description.flags = Flags::of(image);
            description.snapshots = header.header.nb_snapshots;
            description.backing = header.backing_file.as_deref().zip(below).map(|(name, below)| BackingDescription {
                name: text(name),
                format: header.backing_format().map(text),
                path: below.path.clone(),
            });
        }
        Ok(description)
    }
}

/// A number of bytes for people, exact where it is a whole number of units.
pub(crate) struct Bytes(pub(crate) u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        if self.0 < 1024 {
            return write!(f, "{} bytes", self.0);
        }
        let unit = (self.0.ilog2() / 10) as usize;
        let size = 1_u64 << (10 * unit);
        let (whole, tenths) = (self.0 / size, self.0 % size * 10 / size);
        let name = UNITS[unit - 1];
        if tenths == 0 { write!(f, "{whole} {name}") } else { write!(f, "{whole}.{tenths} {name}") }
    }
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [(self.data, "data"), (self.compressed, "compressed"), (self.zero, "zero")];
        let mut first = true;
        for (bytes, what) in parts.into_iter().filter(|part| part.0 > 0) {
            write!(f, "{}{} {what}", if first { "" } else { ", " }, Bytes(bytes))?;
            first = false;
        }
        if first { f.write_str("nothing") } else { Ok(()) }
    }
}

impl fmt::Display for LayerDescription {
    /// Two lines, without the end of the second.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}  {}, {}", self.path.display(), self.format, Bytes(self.virtual_size))?;
        if let Some(size) = self.cluster_size {
            write!(f, ", clusters of {}", Bytes(size))?;
        }
        if let Some(size) = self.actual_size {
            write!(f, ", {} on disk", Bytes(size))?;
        }
        if self.snapshots > 0 {
            write!(f, ", {} internal snapshots", self.snapshots)?;
        }
        for flag in self.flags.names() {
            write!(f, ", {}", flag.to_uppercase())?;
        }
        Ok(())
    }
}

impl LayerDescription {
    /// What it holds, and how much of that is seen from the top.
    fn holding(&self) -> String {
        let covered = self.held.total().saturating_sub(self.visible.total());
        match (self.held.total(), covered) {
            (0, _) => "holds nothing".to_owned(),
            (_, 0) => format!("holds {}", self.held),
            (_, covered) => format!("holds {}; {} of it hidden from the top", self.held, Bytes(covered)),
        }
    }
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (depth, layer) in self.layers.iter().enumerate() {
            let last = depth + 1 == self.layers.len();
            let indent = depth.saturating_sub(1) * 3;
            if depth == 0 {
                writeln!(f, "{layer}")?;
            } else {
                writeln!(f, "{:indent$}└─ {layer}", "")?;
            }
            let indent = depth * 3;
            writeln!(f, "{:indent$}{}  {}", "", if last { " " } else { "│" }, layer.holding())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_for_people() {
        let text = |bytes| Bytes(bytes).to_string();
        assert_eq!(text(0), "0 bytes");
        assert_eq!(text(1023), "1023 bytes");
        assert_eq!(text(1024), "1 KiB");
        assert_eq!(text(1536 << 20), "1.5 GiB");
        assert_eq!(text(u64::MAX), "15.9 EiB");
    }

    #[test]
    fn a_chain_is_drawn() {
        let layer = |path: &str, format, held, visible| LayerDescription {
            path: path.into(),
            format,
            virtual_size: 1 << 30,
            actual_size: Some(200 << 10),
            cluster_size: (format == Format::Qcow2).then_some(65536),
            held,
            visible,
            backing: None,
            flags: Flags::default(),
            snapshots: 0,
        };
        let held = Held { data: 128 << 10, zero: 64 << 10, compressed: 0 };
        let mut middle = layer("b.qcow2", Format::Qcow2, held, Held { zero: 0, ..held });
        middle.flags.dirty = true;
        let layers = vec![
            layer("c.qcow2", Format::Qcow2, Held::default(), Held::default()),
            middle,
            layer("a.raw", Format::Raw, held, held),
        ];
        let drawn = Description { virtual_size: 1 << 30, layers }.to_string();
        let expected = "\
c.qcow2  qcow2, 1 GiB, clusters of 64 KiB, 200 KiB on disk
│  holds nothing
└─ b.qcow2  qcow2, 1 GiB, clusters of 64 KiB, 200 KiB on disk, DIRTY
   │  holds 128 KiB data, 64 KiB zero; 64 KiB of it hidden from the top
   └─ a.raw  raw, 1 GiB, 200 KiB on disk
         holds 128 KiB data, 64 KiB zero
";
        assert_eq!(drawn, expected);
    }
}
