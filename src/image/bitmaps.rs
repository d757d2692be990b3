//! Persistent bitmaps of an image that is written. This library does not record writes in them; it says so in the image.
//! Specification: "Bitmaps", flag `in_use`.

use crate::format::{AutoclearFeatures, BitmapDirectoryEntry, encode_bitmap_directory};

use super::Result;
use super::state::State;
use super::tables;

impl State {
    /// Marks the bitmaps that the coming writes would falsify as inconsistent: those that record every write, or, where
    /// the size changes, all. Durable on return.
    pub(super) fn invalidate_bitmaps(&mut self, all: bool) -> Result<()> {
        if !self.header.header.autoclear_features.has(AutoclearFeatures::BITMAPS) {
            return Ok(());
        }
        let Some(extension) = self.header.bitmaps() else { return Ok(()) };
        let before = tables::read_bitmap_directory(&*self.storage, &self.header)?;
        let mut after = before.clone();
        for entry in &mut after {
            if all || entry.flags & BitmapDirectoryEntry::AUTO != 0 {
                entry.flags |= BitmapDirectoryEntry::IN_USE;
            }
        }
        if after == before {
            return Ok(());
        }
        // Only single flag words differ: each lies in one sector, and any mixture of them is a valid directory.
        let (old, new) = (encode_bitmap_directory(&before), encode_bitmap_directory(&after));
        for (number, (old, new)) in old.chunks(512).zip(new.chunks(512)).enumerate() {
            if old != new {
                self.storage.write_at(new, extension.bitmap_directory_offset.get() + 512 * number as u64)?;
            }
        }
        self.storage.sync()?; // barrier: no bitmap vouches for what is written from here on
        Ok(())
    }
}
