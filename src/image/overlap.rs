//! Which clusters hold the image's own metadata, so that no data is ever written over them.
//!
//! Built once, before the first write. Specification: "Data clusters" say nothing of it; QEMU's `overlap-check=cached`
//! is the model.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use crate::format::{Geometry, HostCluster};

use super::refcounts::ClusterRun;
use super::{Error, Result};

/// What a cluster of metadata holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Structure {
    Header,
    L1Table,
    RefcountTable,
    SnapshotTable,
    SnapshotL1,
    BitmapDirectory,
    /// An L2 table or a refcount block of the open image.
    Table,
}

impl Structure {
    const fn name(self) -> &'static str {
        match self {
            Self::Header => "the header",
            Self::L1Table => "the active L1 table",
            Self::RefcountTable => "the refcount table",
            Self::SnapshotTable => "the snapshot table",
            Self::SnapshotL1 => "a snapshot's L1 table",
            Self::BitmapDirectory => "the bitmap directory",
            Self::Table => "an L2 table or a refcount block",
        }
    }
}

/// The clusters of metadata. Single clusters (L2 tables, refcount blocks) are many and kept sorted; runs are few.
#[derive(Debug, Default)]
pub(super) struct Metadata {
    runs: BTreeMap<u64, (u64, Structure)>,
    singles: Vec<u64>,
    added: BTreeSet<u64>,
    removed: HashSet<u64>,
}

impl Metadata {
    /// Takes in the clusters of L2 tables and refcount blocks found at open.
    pub(super) fn set_singles(&mut self, mut singles: Vec<u64>) {
        singles.sort_unstable();
        singles.dedup();
        self.singles = singles;
    }

    /// A new structure.
    pub(super) fn add(&mut self, start: HostCluster, count: u64, structure: Structure) {
        if structure == Structure::Table {
            for cluster in start.get()..start.get().saturating_add(count) {
                self.added.insert(cluster);
                self.removed.remove(&cluster);
            }
        } else if count > 0 {
            self.runs.insert(start.get(), (count, structure));
        }
    }

    /// A structure that is gone from its place.
    pub(super) fn remove(&mut self, start: HostCluster, count: u64) {
        if self.runs.remove(&start.get()).is_none() {
            for cluster in start.get()..start.get().saturating_add(count) {
                self.added.remove(&cluster);
                self.removed.insert(cluster);
            }
        }
    }

    /// The structure that a run of clusters touches, and where.
    pub(super) fn hit(&self, run: ClusterRun) -> Option<(HostCluster, Structure)> {
        let (start, end) = (run.start.get(), run.start.get().saturating_add(run.count));
        if let Some((&at, &(count, structure))) = self.runs.range(..end).next_back()
            && at.saturating_add(count) > start
        {
            return Some((HostCluster::new(at.max(start)), structure));
        }
        let single = self.added.range(start..end).next().copied().or_else(|| {
            let from = self.singles.partition_point(|&cluster| cluster < start);
            let near = self.singles.get(from..).unwrap_or_default().iter().take_while(|&&cluster| cluster < end);
            near.copied().find(|cluster| !self.removed.contains(cluster))
        });
        single.map(|cluster| (HostCluster::new(cluster), Structure::Table))
    }

    /// Refuses a run of clusters for data, or for new metadata, in which metadata lies: where the allocator found it free, the
    /// refcounts are wrong.
    pub(super) fn check(&self, run: ClusterRun, file: &str, geometry: Geometry) -> Result<()> {
        match self.hit(run) {
            None => Ok(()),
            Some((cluster, structure)) => Err(Error::Overlap {
                file: file.to_owned(),
                cluster: cluster.get() << geometry.cluster_bits().get(),
                structure: structure.name(),
            }),
        }
    }
}
