//! Images that are damaged on purpose.

use super::rng::Rng;

/// An image as bytes, with just enough sense of its structure to damage it.
pub struct Victim {
    pub bytes: Vec<u8>,
}

/// What is done to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    Leak,
    RefcountZero,
    RefcountOther,
    DataPastEnd,
    DataOverlap,
    DataUnaligned,
    ZeroUnaligned,
    L2Copied,
    L2Reserved,
    L1Copied,
    L1Reserved,
    L1Unaligned,
    L1PastEnd,
    Dirty,
    Corrupt,
    BlockUnaligned,
    BlockOverlap,
    BlockReserved,
    BlockGone,
    BlockPastEnd,
    Truncated,
}

pub const DAMAGES: [Damage; 21] = [
    Damage::Leak,
    Damage::RefcountZero,
    Damage::RefcountOther,
    Damage::DataPastEnd,
    Damage::DataOverlap,
    Damage::DataUnaligned,
    Damage::ZeroUnaligned,
    Damage::L2Copied,
    Damage::L2Reserved,
    Damage::L1Copied,
    Damage::L1Reserved,
    Damage::L1Unaligned,
    Damage::L1PastEnd,
    Damage::Dirty,
    Damage::Corrupt,
    Damage::BlockUnaligned,
    Damage::BlockOverlap,
    Damage::BlockReserved,
    Damage::BlockGone,
    Damage::BlockPastEnd,
    Damage::Truncated,
];

pub fn at(offset: u64) -> usize {
    usize::try_from(offset).expect("an offset in memory")
}

impl Victim {
    pub fn u32(&self, offset: u64) -> u64 {
        self.bytes
            .get(at(offset)..at(offset.saturating_add(4)))
            .map_or(0, |raw| u32::from_be_bytes(raw.try_into().unwrap()).into())
    }

    pub fn u64(&self, offset: u64) -> u64 {
        self.bytes
            .get(at(offset)..at(offset.saturating_add(8)))
            .map_or(0, |raw| u64::from_be_bytes(raw.try_into().unwrap()))
    }

    pub fn set_u64(&mut self, offset: u64, value: u64) {
        if let Some(raw) = self.bytes.get_mut(at(offset)..at(offset.saturating_add(8))) {
            raw.copy_from_slice(&value.to_be_bytes());
        }
    }

    pub fn cluster_size(&self) -> u64 {
        1 << self.u32(20).clamp(9, 21)
    }

    pub fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    pub fn v3(&self) -> bool {
        self.u32(4) == 3
    }

    pub fn refcount_order(&self) -> u64 {
        if self.v3() { self.u32(96) } else { 4 }
    }

    /// Where a cluster's refcount stands, if it has a block; widths under 8 bits share a byte.
    pub fn refcount_byte(&self, cluster: u64) -> Option<(usize, u64)> {
        let per_block = (self.cluster_size() * 8) >> self.refcount_order();
        let block = self.u64(self.u64(48) + cluster / per_block * 8);
        let bit = (cluster % per_block) << self.refcount_order();
        (block != 0).then_some((at(block + bit / 8), bit % 8)).filter(|(byte, _)| *byte < self.bytes.len())
    }

    /// Sets a refcount to 0 or 1.
    pub fn set_refcount(&mut self, cluster: u64, one: bool) {
        let width = 1_usize << self.refcount_order();
        let Some((byte, bit)) = self.refcount_byte(cluster) else { return };
        if width < 8 {
            let mask = u8::try_from((1_u32 << width) - 1).unwrap();
            self.bytes[byte] = self.bytes[byte] & !(mask << bit) | u8::from(one) << bit;
        } else {
            let len = width / 8;
            if byte + len <= self.bytes.len() {
                self.bytes[byte..byte + len].fill(0);
                self.bytes[byte + len - 1] = u8::from(one);
            }
        }
    }

    /// The offsets of the L1 entries in use.
    pub fn l1_entries(&self) -> Vec<u64> {
        let (table, size) = (self.u64(40), self.u32(36));
        (0..size).map(|number| table + number * 8).filter(|entry| self.u64(*entry) != 0).collect()
    }

    /// The offsets of the L2 entries in use.
    pub fn l2_entries(&self) -> Vec<u64> {
        let extended = self.v3() && self.u64(72) & 16 != 0;
        let step = if extended { 16 } else { 8 };
        let tables = self.l1_entries().into_iter().map(|entry| self.u64(entry) & 0x00ff_ffff_ffff_fe00);
        let entries = tables.flat_map(|table| (table..table + self.cluster_size()).step_by(step));
        entries
            .filter(|entry| self.u64(*entry) & 0x00ff_ffff_ffff_fe00 != 0 && self.u64(*entry) & 1 << 62 == 0)
            .collect()
    }

    /// Does it; where the image has nothing to do it to, nothing.
    pub fn damage(&mut self, damage: Damage, rng: &mut Rng) {
        let (size, clusters) = (self.cluster_size(), self.len().div_ceil(self.cluster_size()));
        let reftable = self.u64(48);
        let pick = |entries: Vec<u64>, rng: &mut Rng| if entries.is_empty() { None } else { Some(rng.pick(&entries)) };
        let l1 = pick(self.l1_entries(), rng);
        let l2 = pick(self.l2_entries(), rng);
        let change = |victim: &mut Self, entry: Option<u64>, change: &dyn Fn(u64) -> u64| {
            if let Some(entry) = entry {
                victim.set_u64(entry, change(victim.u64(entry)));
            }
        };
        match damage {
            Damage::Leak => {
                self.bytes.resize(at((clusters + 1) * size), 0);
                self.set_refcount(clusters, true);
            }
            Damage::RefcountZero => self.set_refcount(rng.within(0..clusters), false),
            Damage::RefcountOther => {
                if let Some((byte, bit)) = self.refcount_byte(rng.within(0..clusters)) {
                    let last = (byte + (1 << self.refcount_order()) / 8).saturating_sub(1).max(byte);
                    if let Some(byte) = self.bytes.get_mut(last) {
                        *byte ^= 1 << bit;
                    }
                }
            }
            Damage::DataPastEnd => {
                let there = (clusters + rng.within(0..4)) * size;
                change(self, l2, &|entry| entry & !0x00ff_ffff_ffff_fe00 | there);
            }
            Damage::DataOverlap => {
                let there = rng.within(0..clusters) * size;
                change(self, l2, &|entry| entry & !0x00ff_ffff_ffff_fe00 | there);
            }
            Damage::DataUnaligned => change(self, l2, &|entry| entry + 512),
            Damage::ZeroUnaligned if self.v3() => change(self, l2, &|entry| (entry + 512) | 1),
            Damage::ZeroUnaligned => {}
            Damage::L2Copied => change(self, l2, &|entry| entry ^ 1 << 63),
            Damage::L2Reserved => change(self, l2, &|entry| entry | 1 << 58),
            Damage::L1Copied => change(self, l1, &|entry| entry ^ 1 << 63),
            Damage::L1Reserved => change(self, l1, &|entry| entry | 1 << 3),
            Damage::L1Unaligned => change(self, l1, &|entry| entry + 512),
            Damage::L1PastEnd => change(self, l1, &|entry| (entry & (1 << 63)) | ((clusters + 3) * size)),
            Damage::Dirty if self.v3() => self.bytes[79] |= 1,
            Damage::Corrupt if self.v3() => self.bytes[79] |= 2,
            Damage::Dirty | Damage::Corrupt => {}
            Damage::BlockUnaligned => self.set_u64(reftable, self.u64(reftable) + 512),
            Damage::BlockOverlap => {
                let there = rng.within(0..clusters) * size;
                self.set_u64(reftable, there);
            }
            Damage::BlockReserved => self.set_u64(reftable, self.u64(reftable) | 4),
            Damage::BlockGone => self.set_u64(reftable, 0),
            Damage::BlockPastEnd => self.set_u64(reftable + 8, (clusters + 2) * size),
            Damage::Truncated => self.bytes.truncate(at(self.len() - self.len() / 8)),
        }
    }
}
