//! What a merge would do, told without reading or writing data.

use std::fmt;
use std::path::PathBuf;

use crate::chain::{Bytes, Chain, Layer};
use crate::format::IncompatibleFeatures;

use super::absorb::{Work, examine, weigh};
use super::pull::wanted;
use super::refuse::{snapshots_of, valid_bitmaps};
use super::target::Target;
use super::{Error, Result};

/// The direction of a merge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[cfg_attr(feature = "json", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "lowercase"))]
pub enum Direction {
    /// Writes the data of the layers above into the base.
    #[default]
    Commit,
    /// Writes the data of the layers beneath the top, down to the base, into the top. The layer beneath the base then
    /// backs the top.
    Pull,
}

/// One way to merge the same layers.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[cfg_attr(feature = "json", derive(serde::Serialize), serde(rename_all = "kebab-case"))]
pub struct Way {
    /// Which way: [`Direction::Commit`] or [`Direction::Pull`].
    pub direction: Direction,
    /// The image that is written, and the only one that grows.
    #[cfg_attr(feature = "json", serde(serialize_with = "path_as_text"))]
    pub receiver: PathBuf,
    /// Guest bytes of data to move.
    pub data: u64,
    /// Guest bytes that become zeroes.
    pub zeroes: u64,
    /// The clusters of the receiver that data and zeroes would fill.
    pub clusters: u64,
    /// Of the data, bytes that are overwritten where they lie.
    pub overwritten: u64,
    /// Bytes of new clusters that the receiver needs for the rest. Its tables grow a little besides.
    pub space_needed: u64,
    /// Bytes that there are for that, in the container or on its file system, where that can be told.
    pub space_free: Option<u64>,
    /// The layers that no longer read by themselves as they did.
    #[cfg_attr(feature = "json", serde(serialize_with = "paths_as_text"))]
    pub invalidated: Vec<PathBuf>,
    /// The layers that nothing of this chain needs any more.
    #[cfg_attr(feature = "json", serde(serialize_with = "paths_as_text"))]
    pub unreachable: Vec<PathBuf>,
    /// The bitmaps of the receiver that would be marked inconsistent.
    pub bitmaps_invalidated: Vec<String>,
    /// What stands in the way; empty where nothing does.
    pub obstacles: Vec<String>,
}

/// What a merge of a chain's layers from the top to a base would do, both ways. `Display` tells people; with feature `json`
/// it serializes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[cfg_attr(feature = "json", derive(serde::Serialize), serde(rename_all = "kebab-case"))]
pub struct MergePlan {
    /// The base: 1 is the top's backing file, 2 the one beneath, ...
    pub base: usize,
    /// The base takes in what is above it.
    pub commit: Way,
    /// The top takes in what is beneath it, the base included.
    pub pull: Way,
    /// The way that moves less data, of those that nothing stands in the way of.
    pub cheapest: Direction,
}

impl MergePlan {
    /// The way of this direction.
    #[must_use]
    pub fn way(&self, direction: Direction) -> &Way {
        if direction == Direction::Pull { &self.pull } else { &self.commit }
    }
}

/// Works out what a merge of the layers from the top down to and with `base` would do. Walks the mapping tables; reads no
/// data and writes nothing. The chain need not be open for writing.
///
/// # Errors
/// [`Error::Refused`] where the chain has no such layer, and what reading the tables gives.
///
/// ```no_run
/// use qcow2_chain::chain::{Chain, ChainOptions};
/// use qcow2_chain::merge::plan;
///
/// let chain = Chain::open("/images/vm.qcow2", &ChainOptions::default().beneath("/images"))?;
/// let plan = plan(&chain, 1)?;
/// print!("{plan}");
/// println!("{} bytes at least", plan.way(plan.cheapest).data);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn plan(chain: &Chain, base: usize) -> Result<MergePlan> {
    let layers = chain.layers();
    let Some(upper) = layers.get(..=base).filter(|_| base > 0) else {
        let why = "there is no such layer to merge".to_owned();
        return Err(Error::Refused { file: chain.top().path.display().to_string(), why });
    };
    for layer in upper {
        layer.node.data_access()?;
    }
    // Also what an upper layer hides: the merge meets it when it replaces the mapping.
    examine(chain, base + 1)?;
    let commit = commit_way(chain, base)?;
    let pull = pull_way(chain, base)?;
    let weight = |way: &Way| (!way.obstacles.is_empty(), way.data, way.zeroes);
    let cheapest = if weight(&pull) < weight(&commit) { Direction::Pull } else { Direction::Commit };
    Ok(MergePlan { base, commit, pull, cheapest })
}

fn commit_way(chain: &Chain, base: usize) -> Result<Way> {
    let (target, layers) = (Target::look(chain, base)?, chain.layers());
    let work = weigh(chain, &target, base, |_| true)?;
    let mut way = Way::new(Direction::Commit, &layers[base], &target, work)?;
    way.invalidated = paths(&layers[1..=base]);
    way.unreachable = paths(&layers[..base]);
    let grows = chain.virtual_size() > layers[base].node.virtual_size();
    way.expect_bitmaps(&layers[base], grows, work.total > 0)?;
    way.find_obstacles(&layers[base], &layers[..base])?;
    Ok(way)
}

fn pull_way(chain: &Chain, base: usize) -> Result<Way> {
    let (target, layers) = (Target::look(chain, 0)?, chain.layers());
    let on_something = base + 1 < layers.len();
    let work = weigh(chain, &target, base + 1, |extent| wanted(extent, on_something))?;
    let mut way = Way::new(Direction::Pull, &layers[0], &target, work)?;
    way.unreachable = paths(&layers[1..=base]);
    way.expect_bitmaps(&layers[0], false, true)?; // the header changes in any case
    way.find_obstacles(&layers[0], &layers[..1])?;
    Ok(way)
}

impl Way {
    fn new(direction: Direction, receiver: &Layer, target: &Target<'_>, work: Work) -> Result<Self> {
        Ok(Self {
            direction,
            receiver: receiver.path.clone(),
            data: work.data,
            zeroes: work.total - work.data,
            clusters: work.total.div_ceil(target.granularity()),
            overwritten: work.in_place,
            space_needed: work.new_bytes,
            space_free: target.room()?,
            invalidated: Vec::new(),
            unreachable: Vec::new(),
            bitmaps_invalidated: Vec::new(),
            obstacles: Vec::new(),
        })
    }

    fn expect_bitmaps(&mut self, receiver: &Layer, resized: bool, written: bool) -> Result<()> {
        if let Some(image) = receiver.node.as_qcow2()
            && (resized || written)
        {
            self.bitmaps_invalidated = valid_bitmaps(image, resized)?;
        }
        Ok(())
    }

    /// What keeps the receiver from being written, and the layers that would have snapshots falsified.
    fn find_obstacles(&mut self, receiver: &Layer, shown_through: &[Layer]) -> Result<()> {
        let corrupt = receiver
            .node
            .as_qcow2()
            .is_some_and(|image| image.header().header.incompatible_features.has(IncompatibleFeatures::CORRUPT));
        if corrupt {
            self.obstacles.push(format!("{} is marked corrupt", receiver.path.display()));
        }
        if let Some(free) = self.space_free.filter(|&free| self.space_needed > free) {
            self.obstacles.push(format!("{} bytes are missing", self.space_needed - free));
        }
        for layer in shown_through {
            let names = snapshots_of(layer)?;
            if !names.is_empty() {
                let names = names.join(", ");
                self.obstacles.push(format!("internal snapshots of {} would change: {names}", layer.path.display()));
            }
        }
        Ok(())
    }
}

fn paths(layers: &[Layer]) -> Vec<PathBuf> {
    layers.iter().map(|layer| layer.path.clone()).collect()
}

#[cfg(feature = "json")]
pub(super) fn path_as_text<S: serde::Serializer>(
    path: &std::path::Path,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

#[cfg(feature = "json")]
fn paths_as_text<S: serde::Serializer>(paths: &[PathBuf], serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_seq(paths.iter().map(|path| path.to_string_lossy()))
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Commit => "commit",
            Self::Pull => "pull",
        })
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list =
            |paths: &[PathBuf]| paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ");
        writeln!(f, "{} into {}", self.direction, self.receiver.display())?;
        let (data, zeroes, over) = (Bytes(self.data), Bytes(self.zeroes), Bytes(self.overwritten));
        writeln!(f, "  moves      {data} of data and {zeroes} of zeroes; {over} are overwritten in place")?;
        write!(f, "  needs      {} of new space", Bytes(self.space_needed))?;
        match self.space_free {
            Some(free) => writeln!(f, ", {} are free", Bytes(free))?,
            None => writeln!(f)?,
        }
        for (what, paths) in [("changes   ", &self.invalidated), ("leaves over", &self.unreachable)] {
            if !paths.is_empty() {
                writeln!(f, "  {what} {}", list(paths))?;
            }
        }
        if !self.bitmaps_invalidated.is_empty() {
            writeln!(f, "  invalidates the bitmaps {}", self.bitmaps_invalidated.join(", "))?;
        }
        self.obstacles.iter().try_for_each(|obstacle| writeln!(f, "  but        {obstacle}"))
    }
}

impl fmt::Display for MergePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.commit, self.pull)?;
        writeln!(f, "cheapest: {}", self.cheapest)
    }
}
