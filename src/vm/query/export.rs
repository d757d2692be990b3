//! The export of changes between two points in time to a new file.

use std::path::Path;
use std::sync::Arc;

use crate::chain::Format;
use crate::format::{ClusterBits, GuestOffset};
use crate::image::{Backing, CreateOptions, Image, RawImage, Space};
use crate::progress::{Phase, Progress, Step};
use crate::storage::{Attributes, Storage};
use crate::vm::query::changed::{ChangedRange, Changes};
use crate::vm::set::SnapshotSet;
use crate::vm::{Error, Result};

/// The bytes copied at once: a multiple of every cluster size.
const BUFFER: u64 = 2 << 20;

/// Options of [`SnapshotSet::export`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExportOptions {
    /// The format of the delta. A qcow2 file allocates the changed ranges only, with zeroes as zero
    /// clusters: over an image of the earlier point it reads as the later one. A raw file has the
    /// size of the later point, with holes; [`Exported::ranges`] has the valid ranges. Default:
    /// qcow2.
    pub format: Format,
    /// The cluster size of a qcow2 delta, to which ranges are rounded. Default: 64 KiB.
    pub cluster_bits: ClusterBits,
    /// The backing file of a qcow2 delta: name and format. The file is not opened. Default: none.
    pub backing: Option<(String, Format)>,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self { format: Format::Qcow2, cluster_bits: ClusterBits::default(), backing: None }
    }
}

impl ExportOptions {
    /// Sets the format. Default: qcow2.
    #[must_use]
    pub fn with_format(mut self, format: Format) -> Self {
        self.format = format;
        self
    }

    /// Sets the cluster size of a qcow2 delta. Default: 64 KiB.
    #[must_use]
    pub fn with_cluster_bits(mut self, cluster_bits: ClusterBits) -> Self {
        self.cluster_bits = cluster_bits;
        self
    }

    /// Sets the backing file of a qcow2 delta, an image of the earlier point. Default: none.
    #[must_use]
    pub fn with_backing(mut self, name: impl Into<String>, format: Format) -> Self {
        self.backing = Some((name.into(), format));
        self
    }
}

/// The result of an export.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Exported {
    /// The virtual size in bytes.
    pub size: u64,
    /// The bytes of data copied.
    pub data: u64,
    /// The bytes that are zero.
    pub zeroes: u64,
    /// The valid ranges. All others are as at the earlier point.
    pub ranges: Vec<ChangedRange>,
}

/// The backing of the delta: whole clusters are written, so that it is read only past the end.
struct Zeroes;

impl Backing for Zeroes {
    fn read_at(&self, buf: &mut [u8], _offset: GuestOffset) -> crate::image::Result<()> {
        buf.fill(0);
        Ok(())
    }
}

enum Target {
    Qcow2(Image),
    Raw(RawImage),
}

impl Target {
    fn create(storage: Arc<dyn Storage>, size: u64, options: &ExportOptions) -> Result<Self> {
        if options.format == Format::Raw {
            storage.set_len(size)?;
            return Ok(Self::Raw(RawImage::open(storage)?));
        }
        let mut create = CreateOptions::new(size).with_cluster_bits(options.cluster_bits);
        if let Some((name, format)) = &options.backing {
            create = create.with_backing(name.as_bytes(), format.name());
        }
        Ok(Self::Qcow2(Image::create(storage, &create)?))
    }

    /// Returns the unit in bytes to which ranges are rounded.
    fn unit(&self) -> u64 {
        match self {
            Self::Qcow2(image) => image.geometry().cluster_size(),
            Self::Raw(_) => 512,
        }
    }

    fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        let offset = GuestOffset::new(offset);
        match self {
            Self::Qcow2(image) => image.write_at_over(buf, offset, &Zeroes)?,
            Self::Raw(raw) => raw.write_at(buf, offset)?,
        }
        Ok(())
    }

    /// Makes whole units zero. A new raw file is zero already.
    fn zero(&self, offset: u64, len: u64) -> Result<()> {
        if let Self::Qcow2(image) = self {
            // Also without a backing file: a range that is not allocated counts as unchanged.
            image.zero_range(GuestOffset::new(offset), len, Space::Hide, &Zeroes)?;
        }
        Ok(())
    }

    fn close(self) -> Result<()> {
        match self {
            Self::Qcow2(image) => image.close()?,
            Self::Raw(raw) => raw.flush()?,
        }
        Ok(())
    }
}

/// The state of an export.
struct Export<'a> {
    changes: &'a Changes,
    target: &'a Target,
    progress: &'a dyn Progress,
    exported: Exported,
    /// The guest offset up to which the export is complete.
    done: u64,
    buffer: Vec<u8>,
}

impl Export<'_> {
    fn take(&mut self, range: &ChangedRange) -> Result<()> {
        let (unit, size) = (self.target.unit(), self.exported.size);
        let start = (range.offset - range.offset % unit).max(self.done);
        let end = range.end().next_multiple_of(unit).min(size);
        if start >= end {
            return Ok(());
        }
        if !range.zero {
            return self.copy(start, end);
        }
        // Units that are zero as a whole become zero; units at the edges have other data too and
        // are copied.
        let first = range.offset.next_multiple_of(unit).clamp(start, end);
        let last = if range.end() == size { size } else { range.end() - range.end() % unit };
        let last = last.max(first);
        self.copy(start, first)?;
        if first < last {
            self.target.zero(first, last - first)?;
            self.note(first, last, true);
        }
        self.copy(last, end)
    }

    fn copy(&mut self, start: u64, end: u64) -> Result<()> {
        let mut at = start;
        while at < end {
            if self.progress.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let len = (end - at).min(BUFFER);
            self.buffer.resize(usize::try_from(len).unwrap_or_default(), 0);
            self.changes.to().read_at(&mut self.buffer, GuestOffset::new(at))?;
            self.target.write(&self.buffer, at)?;
            self.note(at, at + len, false);
            at += len;
        }
        Ok(())
    }

    fn note(&mut self, start: u64, end: u64, zero: bool) {
        self.done = end;
        let len = end - start;
        if zero {
            self.exported.zeroes += len;
        } else {
            self.exported.data += len;
        }
        match self.exported.ranges.last_mut() {
            Some(last) if last.end() == start && last.zero == zero => last.len += len,
            _ => self.exported.ranges.push(ChangedRange { offset: start, len, zero }),
        }
        self.progress.step(&Step::new(Phase::Copying, end, self.exported.size, ""));
    }
}

impl SnapshotSet {
    /// Writes the changed ranges to a new file, durable on return.
    ///
    /// # Errors
    /// After an error the file is removed.
    /// - [`Error::Storage`]: the file exists, or cannot be written.
    /// - [`Error::Cancelled`].
    /// - Any error of reading the changes.
    pub fn export(
        &self,
        changes: &Changes,
        path: impl AsRef<Path>,
        options: &ExportOptions,
        progress: &dyn Progress,
    ) -> Result<Exported> {
        let (file_system, path) = (self.files.file_system(), path.as_ref());
        // The export is not more readable than the image that it comes from.
        let model = changes.to().top().node.storage();
        let storage = file_system.create_new_like(path, &**model, Attributes::BestEffort)?;
        let done = write(changes, storage, options, progress).and_then(|exported| {
            file_system.sync_dir(crate::vm::model::catalogue::directory_of(path))?;
            Ok(exported)
        });
        if done.is_err() {
            // The first error is the one to report.
            let _ = file_system.unlink(path);
        }
        done
    }
}

fn write(
    changes: &Changes,
    storage: Arc<dyn Storage>,
    options: &ExportOptions,
    progress: &dyn Progress,
) -> Result<Exported> {
    let size = changes.to().virtual_size();
    let target = Target::create(storage, size, options)?;
    let exported = Exported { size, ..Exported::default() };
    let mut export = Export { changes, target: &target, progress, exported, done: 0, buffer: Vec::new() };
    for range in changes.ranges() {
        export.take(&range?)?;
    }
    let exported = export.exported;
    target.close()?;
    Ok(exported)
}
