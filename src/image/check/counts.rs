//! How often each host cluster is referenced, in half a byte per cluster of an ordinary image.

/// log2 of the number of clusters in one chunk.
const CHUNK_BITS: u32 = 14;
/// The number of clusters in one chunk.
const CHUNK: usize = 1 << CHUNK_BITS;

/// The counts of [`CHUNK`] neighbouring clusters, as narrow as their largest allows.
#[derive(Debug)]
pub(super) enum Chunk {
    /// All the same; what a file's holes cost.
    Uniform(u64),
    /// Up to 15 each, the cluster with the even index in the low half.
    Nibbles(Box<[u8]>),
    /// Up to 65,535 each.
    Shorts(Box<[u16]>),
    /// Any count.
    Words(Box<[u64]>),
}

/// The references to every host cluster of a file.
#[derive(Debug)]
pub(super) struct ReferenceCounts {
    chunks: Vec<Chunk>,
    clusters: u64,
}

/// A number as an index; what does not fit an index is larger than any table.
pub(super) fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

/// Where a cluster's count lies.
fn place(cluster: u64) -> (usize, usize) {
    (index(cluster >> CHUNK_BITS), index(cluster) & (CHUNK - 1))
}

impl ReferenceCounts {
    /// No references at all to `clusters` clusters.
    pub(super) fn new(clusters: u64) -> Self {
        let mut counts = Self { chunks: Vec::new(), clusters: 0 };
        counts.cover(clusters);
        counts
    }

    /// The number of clusters that are looked at.
    pub(super) fn clusters(&self) -> u64 {
        self.clusters
    }

    /// Takes clusters up to (not including) `end` in.
    fn cover(&mut self, end: u64) {
        if end > self.clusters {
            self.clusters = end;
            self.chunks.resize_with(index(end.div_ceil(CHUNK as u64)), || Chunk::Uniform(0));
        }
    }

    /// How often a cluster is referenced.
    pub(super) fn get(&self, cluster: u64) -> u64 {
        let (chunk, at) = place(cluster);
        self.chunks.get(chunk).map_or(0, |chunk| chunk.get(at))
    }

    /// Adds `weight` references to a cluster and returns how many there are now.
    #[inline]
    pub(super) fn add(&mut self, cluster: u64, weight: u64) -> u64 {
        self.cover(cluster + 1);
        let (chunk, at) = place(cluster);
        let chunk = &mut self.chunks[chunk];
        if let Chunk::Nibbles(nibbles) = chunk {
            let (byte, shift) = (&mut nibbles[at / 2], (at & 1) * 4);
            let sum = u64::from(*byte >> shift & 15).saturating_add(weight);
            if let Ok(low @ 0..=15) = u8::try_from(sum) {
                *byte = *byte & !(15 << shift) | low << shift;
                return sum;
            }
        }
        chunk.add_slowly(at, weight)
    }

    /// Takes back one reference to a cluster that was added before.
    pub(super) fn release(&mut self, cluster: u64) {
        let (chunk, at) = place(cluster);
        let count = self.get(cluster);
        assert!(count > 0, "cluster {cluster} is released more often than it was counted");
        self.chunks[chunk].set(at, count - 1);
    }

    /// Adds `weight` references to the clusters of a range that fill whole chunks nobody referred to before, up to the
    /// first that do not; returns where the rest starts. A header's claim of a huge range costs nothing that way.
    pub(super) fn add_whole_chunks(&mut self, from: u64, end: u64, weight: u64) -> u64 {
        self.cover(end);
        let mut at = from;
        while at.is_multiple_of(CHUNK as u64) && end - at >= CHUNK as u64 {
            match &mut self.chunks[place(at).0] {
                Chunk::Uniform(count @ 0) => *count = weight,
                _ => break,
            }
            at += CHUNK as u64;
        }
        at
    }

    /// The first `count` neighbouring clusters at or behind `from` that nobody refers to, perhaps past the end.
    pub(super) fn find_free(&self, from: u64, count: u64) -> u64 {
        let (mut start, mut at) = (from, from);
        while at - start < count && at < self.clusters {
            let (chunk, within) = place(at);
            match &self.chunks[chunk] {
                Chunk::Uniform(0) => at += (CHUNK - within) as u64,
                Chunk::Uniform(_) => {
                    at += (CHUNK - within) as u64;
                    start = at;
                }
                counted => {
                    if counted.get(within) != 0 {
                        start = at + 1;
                    }
                    at += 1;
                }
            }
        }
        start
    }

    /// The first cluster at or behind `from` that anything refers to.
    pub(super) fn next_used(&self, from: u64) -> Option<u64> {
        let mut at = from;
        while at < self.clusters {
            let (chunk, within) = place(at);
            match &self.chunks[chunk] {
                Chunk::Uniform(0) => at += (CHUNK - within) as u64,
                counted if counted.get(within) != 0 => return Some(at),
                _ => at += 1,
            }
        }
        None
    }

    /// The clusters from `from` that lie in one chunk and before `end`: how many, and the chunk with the first one's index.
    pub(super) fn run(&self, from: u64, end: u64) -> (u64, &Chunk, usize) {
        static NONE: Chunk = Chunk::Uniform(0);
        let (chunk, within) = place(from);
        let count = ((CHUNK - within) as u64).min(end - from);
        (count, self.chunks.get(chunk).unwrap_or(&NONE), within)
    }
}

impl Chunk {
    /// The count at an index.
    #[inline]
    pub(super) fn get(&self, at: usize) -> u64 {
        match self {
            Self::Uniform(count) => *count,
            Self::Nibbles(nibbles) => u64::from(nibbles[at / 2] >> ((at & 1) * 4) & 15),
            Self::Shorts(shorts) => u64::from(shorts[at]),
            Self::Words(words) => words[at],
        }
    }

    #[cold]
    #[inline(never)]
    fn add_slowly(&mut self, at: usize, weight: u64) -> u64 {
        let sum = self.get(at).saturating_add(weight);
        self.set(at, sum);
        sum
    }

    /// Replaces the count at an index, in a wider form where it needs one.
    fn set(&mut self, at: usize, value: u64) {
        loop {
            match self {
                Self::Nibbles(nibbles) if value <= 15 => {
                    let (byte, shift) = (&mut nibbles[at / 2], (at & 1) * 4);
                    *byte = *byte & !(15 << shift) | u8::try_from(value).unwrap_or(15) << shift;
                    return;
                }
                Self::Shorts(shorts) if u16::try_from(value).is_ok() => {
                    shorts[at] = u16::try_from(value).unwrap_or(u16::MAX);
                    return;
                }
                Self::Words(words) => {
                    words[at] = value;
                    return;
                }
                _ => self.widen(),
            }
        }
    }

    /// The same counts in the next wider form.
    fn widen(&mut self) {
        *self = match self {
            Self::Uniform(count @ 0..=15) => {
                let both = u8::try_from(*count * 17).unwrap_or(u8::MAX);
                Self::Nibbles(vec![both; CHUNK / 2].into_boxed_slice())
            }
            Self::Uniform(count) => Self::Words(vec![*count; CHUNK].into_boxed_slice()),
            Self::Nibbles(nibbles) => {
                Self::Shorts(nibbles.iter().flat_map(|&byte| [u16::from(byte & 15), u16::from(byte >> 4)]).collect())
            }
            Self::Shorts(shorts) => Self::Words(shorts.iter().map(|&count| u64::from(count)).collect()),
            Self::Words(_) => return,
        };
    }
}

/// Half-open ranges laid over one another: the stretches that the same number of them cover, in order.
pub(super) fn overlay(ranges: impl Iterator<Item = (u64, u64)>) -> Vec<(u64, u64, u64)> {
    let mut edges: Vec<(u64, bool)> =
        ranges.filter(|(start, end)| start < end).flat_map(|(start, end)| [(start, true), (end, false)]).collect();
    edges.sort_unstable();
    let (mut stretches, mut weight, mut from) = (Vec::new(), 0_u64, 0);
    for (at, opens) in edges {
        if weight > 0 && from < at {
            stretches.push((from, at, weight));
        }
        from = at;
        weight = if opens { weight + 1 } else { weight - 1 };
    }
    stretches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_widen_and_narrow_nothing() {
        let mut counts = ReferenceCounts::new(3);
        for round in 1..=100_000 {
            assert_eq!(counts.add(2, 1), round);
        }
        assert_eq!((counts.get(1), counts.get(2), counts.get(3)), (0, 100_000, 0));
        assert_eq!(counts.add(1, 1 << 40), 1 << 40);
        counts.release(1);
        assert_eq!(counts.get(1), (1 << 40) - 1);
        assert_eq!(counts.clusters(), 3);
        assert_eq!(counts.add(5, 1), 1);
        assert_eq!(counts.clusters(), 6);
    }

    #[test]
    fn whole_chunks_cost_nothing_until_one_cluster_differs() {
        let chunk = CHUNK as u64;
        let mut counts = ReferenceCounts::new(1 << 31);
        assert_eq!(counts.add_whole_chunks(0, (1 << 31) - 1, 2), (1 << 31) - chunk);
        assert_eq!(counts.add(chunk + 1, 14), 16);
        assert_eq!((counts.get(chunk), counts.get(chunk + 1), counts.get(chunk + 2)), (2, 16, 2));
        assert_eq!(counts.get((1 << 31) - 1), 0);
    }

    #[test]
    fn free_runs_are_found_or_lie_at_the_end() {
        let mut counts = ReferenceCounts::new(10);
        for used in [0, 1, 3, 7] {
            counts.add(used, 1);
        }
        assert_eq!(counts.find_free(0, 1), 2);
        assert_eq!(counts.find_free(0, 3), 4);
        assert_eq!(counts.find_free(0, 4), 8);
        assert_eq!(counts.find_free(9, 4), 9);
    }

    #[test]
    fn ranges_are_overlaid() {
        let ranges = [(10, 20), (10, 12), (15, 30), (5, 5), (40, 41)];
        let stretches = overlay(ranges.into_iter());
        assert_eq!(stretches, [(10, 12, 2), (12, 15, 1), (15, 20, 2), (20, 30, 1), (40, 41, 1)]);
    }
}
