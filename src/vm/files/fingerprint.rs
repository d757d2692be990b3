//! Fingerprints of bases.

use super::VolumeFiles;
use crate::image::Image;
use crate::storage::Storage;
use crate::vm::model::{Base, FileRef, Fingerprint};
use crate::vm::{Refusal, Result};

/// The length of a base's beginning that the fingerprint covers.
const HEADER_BYTES: u64 = 64 << 10;

impl VolumeFiles {
    /// Computes the fingerprint of a file.
    pub(in crate::vm) fn fingerprint(&self, file: &FileRef) -> Result<Fingerprint> {
        let layer = self.look_layer(file)?;
        let storage = layer.node.storage();
        let len = storage.len()?;
        let header = digest(&**storage, 0, len.min(HEADER_BYTES))?;
        let l1 = match layer.node.as_qcow2().map(Image::header) {
            Some(header) => {
                let at = header.header.l1_table_offset.get();
                digest(&**storage, at, 8 * u64::from(header.header.l1_size))?
            }
            None => 0,
        };
        Ok(Fingerprint { len, header, l1, stamp: storage.stamp()? })
    }

    /// Refuses a base that was changed or replaced.
    ///
    /// The change time alone does not decide: libvirt sets owner and label of a backing file
    /// whenever a VM starts or stops. A write in place changes the modification time too.
    pub(in crate::vm) fn check_base(&self, base: &Base) -> Result<()> {
        let found = self.fingerprint(&base.file)?;
        let what = match (base.fingerprint.stamp, found.stamp) {
            _ if found.len != base.fingerprint.len => {
                format!("its length is {} bytes, recorded are {}", found.len, base.fingerprint.len)
            }
            (Some(recorded), Some(stamp)) if stamp.inode != recorded.inode => {
                "it was replaced by another file (the inode differs)".to_owned()
            }
            (Some(recorded), Some(stamp)) if stamp.modified != recorded.modified => {
                "it was written since it was recorded (the modification time differs)".to_owned()
            }
            _ if (found.header, found.l1) != (base.fingerprint.header, base.fingerprint.l1) => {
                "its header or its L1 table differs".to_owned()
            }
            _ => return Ok(()),
        };
        Err(Refusal::BaseChanged { path: self.shown(&base.file.path), what }.into())
    }
}

/// Computes the CRC-32 of a range of a file.
fn digest(storage: &dyn Storage, from: u64, len: u64) -> Result<u32> {
    let mut digest = crc32fast::Hasher::new();
    let mut buf = vec![0; 64 << 10];
    let mut done = 0;
    while done < len {
        let part = usize::try_from(len - done).unwrap_or(usize::MAX).min(buf.len());
        storage.read_at(&mut buf[..part], from + done)?;
        digest.update(&buf[..part]);
        done += part as u64;
    }
    Ok(digest.finalize())
}
