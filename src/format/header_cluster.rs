//! The first cluster: header, extensions, and the backing file's name. Specification: "Header extensions".

use std::collections::HashSet;
use std::ops::Range;

use super::cursor::Cursor;
use super::header::there;
use super::limits::{MAX_BACKING_FILE_SIZE, SECTOR_SIZE};
use super::{
    AutoclearFeatures, BitmapsExtension, CryptMethod, CryptoHeader, Extension, FeatureNameTable, FormatError, Header,
    Limits,
};

/// What errors call it.
const STRUCTURE: &str = "first cluster";
/// The length of an extension's type and length, and of the end marker.
const EXTENSION_HEADER: usize = 8;

/// The first cluster: header, extensions, and the backing file's name.
///
/// ```
/// use qcow2_chain::format::{ClusterBits, Extension, Header, HeaderCluster, HostOffset, Limits, Version};
///
/// let mut header = Header::new(Version::V3, ClusterBits::default(), 1 << 20);
/// (header.refcount_table_offset, header.refcount_table_clusters) = (HostOffset::new(0x10000), 1);
/// (header.l1_table_offset, header.l1_size) = (HostOffset::new(0x30000), 1);
/// let extensions = Extension::for_new_image(&header, Some(b"qcow2"), None, None);
/// let bytes = HeaderCluster::new(header, extensions, Some(b"base.qcow2".to_vec())).encode()?;
///
/// let decoded = HeaderCluster::decode(&bytes, 0x40000, &Limits::default())?;
/// assert_eq!(decoded.backing_file.as_deref(), Some(&b"base.qcow2"[..]));
/// assert_eq!(decoded.backing_format(), Some(&b"qcow2"[..]));
/// assert_eq!(decoded.encode()?, bytes);
/// # Ok::<(), qcow2_chain::format::FormatError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderCluster {
    /// The header.
    pub header: Header,
    /// The extensions in the order of the file, without the end marker.
    pub extensions: Vec<Extension>,
    /// The backing file's name as it stands in the file; never empty.
    pub backing_file: Option<Vec<u8>>,
    /// What has no meaning, but comes back as it was.
    pub residue: Residue,
}

/// Bytes between the extensions that mean nothing, kept so that a rewrite changes only what it should. A new image has
/// none: `Residue::default()`.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Residue {
    /// Padding that is not zero, by the type of the extension before it.
    paddings: Vec<(u32, Vec<u8>)>,
    /// The length field of the end marker.
    end_length: u32,
}

impl HeaderCluster {
    /// The first cluster of a new image, or of one that a caller puts together.
    #[must_use]
    pub fn new(header: Header, extensions: Vec<Extension>, backing_file: Option<Vec<u8>>) -> Self {
        Self { header, extensions, backing_file, residue: Residue::default() }
    }

    /// Decodes and validates the first cluster. `bytes` is the first cluster or more, or the whole file where that is
    /// shorter; a file may end anywhere behind what is needed.
    ///
    /// # Errors
    /// As [`Header::decode`]; [`FormatError::Corrupt`] for extensions and names that do not fit or contradict the
    /// header, and for types that appear twice; [`FormatError::Limit`] for more bitmaps than `limits` allow.
    pub fn decode(bytes: &[u8], file_len: u64, limits: &Limits) -> Result<Self, FormatError> {
        let header = Header::decode(bytes, file_len, limits)?;
        let bytes = there(there(bytes, file_len), header.cluster_size());
        let cursor = Cursor::new(bytes, STRUCTURE, 0);
        let end = extension_limit(&header)?;
        let mut residue = Residue::default();
        let extensions = decode_extensions(&cursor, bytes.len(), &header, end, &mut residue)?;
        let backing_file = if header.names_backing_file() {
            validate_name(&header, header.backing_file_size.into())?;
            let len = usize::try_from(header.backing_file_size).unwrap_or(usize::MAX);
            Some(cursor.bytes(end, len, "backing file name")?.to_vec())
        } else {
            None
        };
        let cluster = Self { header, extensions, backing_file, residue };
        cluster.validate_extensions()?;
        if let Some(bitmaps) = cluster.bitmaps().filter(|_| cluster.bitmaps_consistent()) {
            let (count, most) = (u64::from(bitmaps.nb_bitmaps), u64::from(limits.max_bitmaps));
            let (size, largest) = (bitmaps.bitmap_directory_size, limits.max_bitmap_directory_bytes);
            if count > most {
                return Err(FormatError::limit("bitmaps extension", "nb_bitmaps", count, most));
            }
            if size > largest {
                return Err(FormatError::limit("bitmaps extension", "bitmap_directory_size", size, largest));
            }
        }
        Ok(cluster)
    }

    /// Whether the extensions agree with the header and with each other.
    fn validate_extensions(&self) -> Result<(), FormatError> {
        let mut seen = HashSet::new();
        let mut at = self.header.encoded_len();
        for extension in &self.extensions {
            let offset = u64::try_from(at).unwrap_or(u64::MAX);
            extension.validate(offset, &self.header)?;
            if !seen.insert(extension.kind()) {
                let found = format!("{:#010x} again", extension.kind());
                return Err(FormatError::corrupt("header extension", offset, "type", found, "each type once"));
            }
            at = at.saturating_add(EXTENSION_HEADER).saturating_add(extension.data().len().next_multiple_of(8));
        }
        let luks = self.header.crypt_method == CryptMethod::Luks;
        if luks != self.crypto().is_some() {
            let found = if luks { "2 without an encryption header" } else { "not 2, with an encryption header" };
            return Err(FormatError::corrupt(
                "header",
                32,
                "crypt_method",
                found,
                "2 with an encryption header, or neither",
            ));
        }
        // A bitmaps extension that is kept but not believed counts as one: the bit is clear, then.
        if self.header.autoclear_features.has(AutoclearFeatures::BITMAPS) && self.bitmaps().is_none() {
            let found = format!("{:#x}", self.header.autoclear_features.0);
            let expected = "no bitmaps bit without the bitmaps extension";
            return Err(FormatError::corrupt("header", 88, "autoclear_features", found, expected));
        }
        Ok(())
    }

    /// Encodes header, extensions, end marker and backing name, as long as they are; sets `backing_file_offset` and
    /// `backing_file_size` in the encoded header. A name that still fits behind the extensions stays where it was.
    ///
    /// What was decoded encodes to the same bytes, but for bytes without meaning between the end marker and the name:
    /// [`HeaderCluster::encode_over`] keeps those too.
    ///
    /// # Errors
    /// [`FormatError::Limit`] where they do not fit the first cluster, [`FormatError::Corrupt`] for anything that
    /// decoding would refuse.
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        Ok(self.encode_parts()?.0)
    }

    /// As [`HeaderCluster::encode`]; also tells where the extensions end, end marker included.
    fn encode_parts(&self) -> Result<(Vec<u8>, usize), FormatError> {
        let name = self.backing_file.as_deref();
        if name.is_some_and(<[u8]>::is_empty) {
            return Err(FormatError::corrupt("header", 16, "backing_file_size", 0, "a name that is not empty"));
        }
        let mut header = self.header.clone();
        if header.version == super::Version::V3 {
            header.header_length = u32::try_from(header.encoded_len()).unwrap_or(u32::MAX);
            header.validate_length()?;
        }
        let extensions = self.encode_extensions();
        let end = header.encoded_len().saturating_add(extensions.len());
        let marked = self.place_name(&mut header, end)?;
        header.validate()?;
        self.validate_extensions()?;

        let mut bytes = header.encode();
        bytes.extend(extensions);
        if marked {
            bytes.extend(Extension::END.to_be_bytes());
            // A length that means nothing is kept while it fits: readers refuse one that reaches into the name.
            let limit =
                if header.backing_file_offset == 0 { header.cluster_size() } else { header.backing_file_offset };
            let space = limit.saturating_sub(u64::try_from(end).unwrap_or(u64::MAX)).saturating_sub(8);
            let kept = self.residue.end_length;
            bytes.extend(if u64::from(kept) <= space { kept } else { 0 }.to_be_bytes());
        }
        let end = bytes.len();
        if let Some(name) = name {
            bytes.resize(usize::try_from(header.backing_file_offset).unwrap_or(end).max(end), 0);
            bytes.extend(name);
        }
        Ok((bytes, end))
    }

    fn encode_extensions(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for extension in &self.extensions {
            let data = extension.data();
            bytes.extend(extension.kind().to_be_bytes());
            bytes.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
            bytes.extend(&data);
            let padding = data.len().next_multiple_of(8).saturating_sub(data.len());
            let kept =
                self.residue.paddings.iter().find(|(kind, kept)| *kind == extension.kind() && kept.len() == padding);
            match kept {
                Some((_, kept)) => bytes.extend(kept),
                None => bytes.resize(bytes.len().saturating_add(padding), 0),
            }
        }
        bytes
    }

    /// Decides where the name goes behind the extensions, which end at `end`, and whether an end marker comes between.
    ///
    /// The marker is left out only where there is no room for it: at the end of the cluster, or before a name that was
    /// there already. A reader stops there by itself.
    fn place_name(&self, header: &mut Header, end: usize) -> Result<bool, FormatError> {
        let cluster = header.cluster_size();
        let end = u64::try_from(end).unwrap_or(u64::MAX);
        let marked_end = end.saturating_add(8);
        let len = self.backing_file.as_ref().map_or(0, |name| u64::try_from(name.len()).unwrap_or(u64::MAX));
        let too_long = |need| FormatError::limit(STRUCTURE, "header, extensions and backing file name", need, cluster);

        let was = header.backing_file_offset;
        if len == 0 && header.names_backing_file() {
            (header.backing_file_offset, header.backing_file_size) = (0, 0);
        } else if was != 0 || len != 0 {
            let stays = was != 0 && (was == end || was >= marked_end) && was.saturating_add(len) <= cluster;
            header.backing_file_offset = if stays { was } else { marked_end };
            header.backing_file_size = u32::try_from(len).unwrap_or(u32::MAX);
            if len == 0 && !stays {
                header.backing_file_offset = 0;
            } else {
                validate_name(header, len)?;
            }
        }
        let marked = match header.backing_file_offset {
            0 => end != cluster,
            offset => offset != end,
        };
        let need = if marked { marked_end } else { end };
        if need > cluster {
            return Err(too_long(need));
        }
        Ok(marked)
    }

    /// Encodes over the bytes that the file holds now: `old` is the first cluster, or the file where that is shorter. The
    /// result is at least as long; bytes that belong to nobody stay, and what the old extensions and the old name left
    /// behind becomes zero.
    ///
    /// # Errors
    /// As [`HeaderCluster::encode`].
    pub fn encode_over(&self, old: &[u8]) -> Result<Vec<u8>, FormatError> {
        let (new, end) = self.encode_parts()?;
        let mut bytes = there(old, self.header.cluster_size()).to_vec();
        let any = Limits::default().with_max_l1_bytes(u64::MAX).with_max_reftable_bytes(u64::MAX);
        if let Ok(before) = Self::decode(&bytes, u64::MAX, &any) {
            let (old_bytes, old_end) = before.encode_parts()?;
            let name = before.backing_file.as_ref().map_or(0, Vec::len);
            let name = old_bytes.len().saturating_sub(name)..old_bytes.len();
            for stale in [0..old_end, name] {
                let last = stale.end.min(bytes.len());
                bytes.get_mut(stale.start.min(last)..last).unwrap_or_default().fill(0);
            }
        }
        if bytes.len() < new.len() {
            bytes.resize(new.len(), 0);
        }
        // Between the end marker and the name the new bytes mean nothing: what is there stays.
        let name = new.len().saturating_sub(self.backing_file.as_ref().map_or(0, Vec::len));
        for part in [0..end, name..new.len()] {
            if let (Some(to), Some(from)) = (bytes.get_mut(part.clone()), new.get(part)) {
                to.copy_from_slice(from);
            }
        }
        Ok(bytes)
    }

    /// The bytes of the encoded first cluster that a reader looks at: the header and the extensions with their end marker,
    /// then the name. The data of a gap is none of them.
    ///
    /// # Errors
    /// As [`HeaderCluster::encode`].
    pub(crate) fn meaningful(&self) -> Result<Vec<Range<usize>>, FormatError> {
        let (bytes, end) = self.encode_parts()?;
        let mut ranges = Vec::new();
        let (mut start, mut at) = (0, self.header.encoded_len());
        for extension in &self.extensions {
            let data_at = at.saturating_add(EXTENSION_HEADER);
            let next = data_at.saturating_add(extension.data().len().next_multiple_of(8));
            if extension.kind() == Extension::GAP {
                ranges.push(start..data_at);
                start = next;
            }
            at = next;
        }
        ranges.push(start..end);
        let name = self.backing_file.as_ref().map_or(0, Vec::len);
        ranges.push(bytes.len().saturating_sub(name)..bytes.len());
        Ok(ranges)
    }

    /// Which bytes of `new` must be written over `old` at the start of the file: whole sectors of 512 bytes (the last one
    /// perhaps shorter) in which they differ, neighbours joined, in order. Writing only these keeps a rewrite small: a
    /// sector is what a disk writes at once.
    #[must_use]
    pub fn changed_sectors(old: &[u8], new: &[u8]) -> Vec<Range<usize>> {
        let sector = usize::try_from(SECTOR_SIZE).unwrap_or(usize::MAX);
        let mut ranges: Vec<Range<usize>> = Vec::new();
        let mut start = 0_usize;
        for part in new.chunks(sector) {
            let end = start.saturating_add(part.len());
            if old.get(start..end) != Some(part) {
                match ranges.last_mut() {
                    Some(last) if last.end == start => last.end = end,
                    _ => ranges.push(start..end),
                }
            }
            start = end;
        }
        ranges
    }

    /// The extension of this type.
    #[must_use]
    pub fn extension(&self, kind: u32) -> Option<&Extension> {
        self.extensions.iter().find(|extension| extension.kind() == kind)
    }

    /// Puts an extension in the place of the one of its type, or where QEMU would put it.
    pub fn set_extension(&mut self, extension: Extension) {
        if let Some(there) = self.extensions.iter_mut().find(|there| there.kind() == extension.kind()) {
            *there = extension;
            return;
        }
        let behind = self.extensions.iter().position(|there| there.rank() > extension.rank());
        self.extensions.insert(behind.unwrap_or(self.extensions.len()), extension);
    }

    /// Takes the extension of this type away.
    pub fn remove_extension(&mut self, kind: u32) {
        self.extensions.retain(|extension| extension.kind() != kind);
    }

    /// Names another backing file and its format, or none. An empty name is none.
    pub fn set_backing(&mut self, name: Option<&[u8]>, format: Option<&[u8]>) {
        self.backing_file = name.filter(|name| !name.is_empty()).map(<[u8]>::to_vec);
        match format.filter(|_| self.backing_file.is_some()) {
            Some(format) => self.set_extension(Extension::BackingFormat(format.to_vec())),
            None => self.remove_extension(Extension::BACKING_FORMAT),
        }
    }

    /// The backing format extension's value, if there is one.
    #[must_use]
    pub fn backing_format(&self) -> Option<&[u8]> {
        self.extensions.iter().find_map(|extension| match extension {
            Extension::BackingFormat(format) => Some(format.as_slice()),
            _ => None,
        })
    }

    /// The external data file's name, if there is one. Only the data file feature bit says whether it is used.
    #[must_use]
    pub fn data_file(&self) -> Option<&[u8]> {
        self.extensions.iter().find_map(|extension| match extension {
            Extension::DataFile(name) => Some(name.as_slice()),
            _ => None,
        })
    }

    /// What the image calls its features, if it says so.
    #[must_use]
    pub fn feature_names(&self) -> Option<FeatureNameTable> {
        self.extensions.iter().find_map(|extension| match extension {
            Extension::FeatureNames(table) => Some(FeatureNameTable::decode(table)),
            _ => None,
        })
    }

    /// The bitmaps extension, if there is one. It may be relied upon only where [`HeaderCluster::bitmaps_consistent`].
    #[must_use]
    pub fn bitmaps(&self) -> Option<BitmapsExtension> {
        self.extensions.iter().find_map(|extension| match extension {
            Extension::Bitmaps(bitmaps) => Some(*bitmaps),
            _ => None,
        })
    }

    /// Whether the bitmaps autoclear bit says that every writer since has known of the bitmaps.
    #[must_use]
    pub fn bitmaps_consistent(&self) -> bool {
        self.header.autoclear_features.has(AutoclearFeatures::BITMAPS) && self.bitmaps().is_some()
    }

    /// Where the encryption header lies; there exactly with [`CryptMethod::Luks`].
    #[must_use]
    pub fn crypto(&self) -> Option<CryptoHeader> {
        self.extensions.iter().find_map(|extension| match extension {
            Extension::Crypto(crypto) => Some(*crypto),
            _ => None,
        })
    }
}

/// Where the extensions must have ended: before the backing file's name, or at the end of the cluster.
fn extension_limit(header: &Header) -> Result<usize, FormatError> {
    let end = match header.backing_file_offset {
        0 => header.cluster_size(),
        offset if (u64::from(header.header_length)..=header.cluster_size()).contains(&offset) => offset,
        offset => {
            let expected = format!("{:#x} to {:#x}, in the first cluster", header.header_length, header.cluster_size());
            let found = format!("{offset:#x}");
            return Err(FormatError::corrupt("header", 8, "backing_file_offset", found, expected));
        }
    };
    Ok(usize::try_from(end).unwrap_or(usize::MAX))
}

/// Whether a name of `len` bytes fits at the header's `backing_file_offset`.
fn validate_name(header: &Header, len: u64) -> Result<(), FormatError> {
    if len > MAX_BACKING_FILE_SIZE {
        return Err(FormatError::limit("header", "backing_file_size", len, MAX_BACKING_FILE_SIZE));
    }
    let end = header.backing_file_offset.saturating_add(len);
    if end > header.cluster_size() {
        let field = "header, extensions and backing file name";
        return Err(FormatError::limit(STRUCTURE, field, end, header.cluster_size()));
    }
    Ok(())
}

/// Walks the extensions from the end of the header to `end`; the file holds the cluster up to `file_end`.
fn decode_extensions(
    cursor: &Cursor<'_>,
    file_end: usize,
    header: &Header,
    end: usize,
    residue: &mut Residue,
) -> Result<Vec<Extension>, FormatError> {
    let mut extensions = Vec::new();
    let mut at = usize::try_from(header.header_length).unwrap_or(usize::MAX);
    // A file may end where its extensions end: what is not there reads as zeroes, and zeroes are an end marker.
    while at < end && at < file_end {
        if end.saturating_sub(at) < EXTENSION_HEADER {
            return Err(cursor.corrupt(
                at,
                "header extension",
                "cut off",
                "8 bytes or none before the backing file name",
            ));
        }
        let kind = cursor.u32(at, "extension type")?;
        let length = cursor.u32(at.saturating_add(4), "extension length")?;
        let data_at = at.saturating_add(EXTENSION_HEADER);
        let space = end.saturating_sub(data_at);
        let len = usize::try_from(length).unwrap_or(usize::MAX);
        let padded = len.checked_next_multiple_of(8).unwrap_or(usize::MAX);
        if kind == Extension::END && len <= space {
            residue.end_length = length;
            break;
        }
        if padded > space {
            return Err(cursor.corrupt(at, "extension length", length, format_args!("at most {space} with padding")));
        }
        let data = cursor.bytes(data_at, len, "extension data")?;
        let offset = u64::try_from(at).unwrap_or(u64::MAX);
        extensions.push(Extension::decode(kind, data, offset, header)?);
        let padding = cursor.bytes(data_at.saturating_add(len), padded.saturating_sub(len), "extension padding")?;
        if padding.iter().any(|&byte| byte != 0) {
            residue.paddings.push((kind, padding.to_vec()));
        }
        at = data_at.saturating_add(padded);
    }
    Ok(extensions)
}

#[cfg(test)]
mod tests;
