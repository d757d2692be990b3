//! The ranges of a volume that differ between two points in time, from metadata alone: the input of
//! an incremental backup.

use crate::chain::{self, Chain, ChainExtent, ChainExtents};
use crate::image::ExtentKind;
use crate::vm::Result;
use crate::vm::model::{FileRef, Model, Volume};
use crate::vm::set::{SnapshotSet, file_of, find_attached, find_ready, find_volume};

/// A point in time of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Point<'a> {
    /// The time before the volume existed: every range that is not zero has changed since.
    Nothing,
    /// A snapshot.
    Snapshot(&'a str),
    /// The present. A VM that writes the volume must be stopped.
    Active,
}

impl<'a> From<&'a str> for Point<'a> {
    fn from(name: &'a str) -> Self {
        Self::Snapshot(name)
    }
}

/// A range that may differ. A byte outside all ranges is the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ChangedRange {
    /// The guest offset in bytes.
    pub offset: u64,
    /// The length in bytes.
    pub len: u64,
    /// If set, the range is known to read as zeroes at the later point.
    pub zero: bool,
}

impl ChangedRange {
    /// Returns the guest offset of the end, exclusive.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }
}

/// Two points in time of a volume, held open and locked for reading.
#[derive(Debug)]
pub struct Changes {
    /// The earlier point, and the number of its layers that the later one lacks.
    from: Option<(Chain, usize)>,
    /// The later point.
    to: Chain,
    /// The number of its layers that the earlier one lacks.
    to_layers: usize,
}

impl Changes {
    /// Returns the later point, to read the changes from.
    #[must_use]
    pub fn to(&self) -> &Chain {
        &self.to
    }

    /// Returns the earlier point; `None` for [`Point::Nothing`].
    #[must_use]
    pub fn from(&self) -> Option<&Chain> {
        self.from.as_ref().map(|(chain, _)| chain)
    }

    /// Returns the ranges that may differ: in order, disjoint, within the size of the later point.
    /// They are computed lazily and without reading data. The cost follows the metadata of the
    /// layers that the two points do not share.
    pub fn ranges(&self) -> impl Iterator<Item = Result<ChangedRange>> + '_ {
        let whole = 0..self.to.virtual_size();
        let from = self.from.as_ref();
        let walks = Walks {
            since_nothing: from.is_none(),
            size_before: from.map_or(0, |(chain, _)| chain.virtual_size()),
            size: whole.end,
            at: 0,
            to_own: Walk::new(Some(self.to.extents_of(0..self.to_layers, whole.clone()))),
            to: Walk::new(Some(self.to.extents(whole.clone()))),
            from_own: Walk::new(from.map(|(chain, layers)| chain.extents_of(0..*layers, whole.clone()))),
            from: Walk::new(from.map(|(chain, _)| chain.extents(whole))),
            pending: None,
        };
        walks.map(|range| Ok(range?))
    }
}

/// A walk over extents in order of their offsets.
struct Walk<'a> {
    extents: Option<ChainExtents<'a>>,
    current: Option<ChainExtent>,
}

impl<'a> Walk<'a> {
    fn new(extents: Option<ChainExtents<'a>>) -> Self {
        Self { extents, current: None }
    }

    /// Returns the kind of the extent at an offset, and the end of that extent. Past the last
    /// extent the kind is `None`. Offsets must not decrease.
    fn at(&mut self, position: u64) -> chain::Result<(Option<ExtentKind>, u64)> {
        while self.current.is_none_or(|current| current.end() <= position) {
            match self.extents.as_mut().and_then(Iterator::next).transpose()? {
                Some(next) => self.current = Some(next),
                None => return Ok((None, u64::MAX)),
            }
        }
        Ok(self.current.map_or((None, u64::MAX), |current| (Some(current.kind), current.end())))
    }
}

/// The walks over both points, in lockstep: their own layers, and all layers.
struct Walks<'a> {
    /// If set, the earlier point is [`Point::Nothing`]: a range that reads as zeroes is no change.
    since_nothing: bool,
    size_before: u64,
    size: u64,
    at: u64,
    to_own: Walk<'a>,
    to: Walk<'a>,
    from_own: Walk<'a>,
    from: Walk<'a>,
    pending: Option<ChangedRange>,
}

impl Walks<'_> {
    /// Returns the next range of uniform extents, and true if it may differ.
    fn piece(&mut self) -> chain::Result<(ChangedRange, bool)> {
        let (to_own, a) = self.to_own.at(self.at)?;
        let (to, b) = self.to.at(self.at)?;
        let (from_own, c) = self.from_own.at(self.at)?;
        let (from, d) = self.from.at(self.at)?;
        let mut end = self.size.min(a).min(b).min(c).min(d);
        let is_new = self.at >= self.size_before;
        if !is_new {
            end = end.min(self.size_before);
        }
        let holds = |kind| !matches!(kind, None | Some(ExtentKind::Unallocated));
        let reads_zero = |kind| matches!(kind, Some(ExtentKind::Zero { .. }));
        let zero = reads_zero(to);
        let changed = if self.since_nothing {
            !zero
        } else {
            is_new || ((holds(to_own) || holds(from_own)) && !(zero && reads_zero(from)))
        };
        let range = ChangedRange { offset: self.at, len: end - self.at, zero };
        self.at = end;
        Ok((range, changed))
    }
}

impl Iterator for Walks<'_> {
    type Item = chain::Result<ChangedRange>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.at < self.size {
            let (range, changed) = match self.piece() {
                Ok(piece) => piece,
                Err(error) => {
                    self.at = self.size;
                    self.pending = None;
                    return Some(Err(error));
                }
            };
            match &mut self.pending {
                Some(pending) if changed && pending.end() == range.offset && pending.zero == range.zero => {
                    pending.len += range.len;
                }
                pending => {
                    let whole = if changed { pending.replace(range) } else { pending.take() };
                    if let Some(whole) = whole {
                        return Some(Ok(whole));
                    }
                }
            }
        }
        self.pending.take().map(Ok)
    }
}

impl SnapshotSet {
    /// Returns the files of a point; `None` for [`Point::Nothing`].
    fn files_at(model: &Model, volume: &Volume, point: Point<'_>) -> Result<Option<Vec<FileRef>>> {
        Ok(match point {
            Point::Nothing => None,
            Point::Snapshot(name) => {
                let snapshot = find_ready(model, name)?;
                file_of(snapshot, volume)?;
                Some(model.files_from(Some(snapshot.id), volume))
            }
            Point::Active => Some(model.active_chain(find_attached(model, &volume.name)?)),
        })
    }

    /// Compares two points in time of a volume. Neither must be an ancestor of the other.
    ///
    /// # Errors
    /// - [`Refusal::UnknownSnapshot`](crate::vm::Refusal::UnknownSnapshot): a snapshot does not
    ///   exist, or `to` is [`Point::Nothing`].
    /// - Those of [`SnapshotSet::open`].
    ///
    /// ```no_run
    /// use qcow2_chain::vm::{Point, SnapshotSet};
    ///
    /// let set = SnapshotSet::load("/vm/catalogue.json")?;
    /// for range in set.changed_ranges("monday", "tuesday", "vda")?.ranges() {
    ///     let range = range?;
    ///     println!("{} bytes at {}", range.len, range.offset);
    /// }
    /// let all = set.changed_ranges(Point::Nothing, Point::Active, "vda")?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn changed_ranges<'a>(
        &self,
        from: impl Into<Point<'a>>,
        to: impl Into<Point<'a>>,
        volume: &str,
    ) -> Result<Changes> {
        let model = self.store.load()?;
        let volume = find_volume(&model, volume)?;
        let from = Self::files_at(&model, volume, from.into())?;
        let to = Self::files_at(&model, volume, to.into())?;
        let to = to.ok_or_else(|| crate::vm::Refusal::UnknownSnapshot { name: String::new() })?;
        let shared = from.as_ref().map_or(0, |from| {
            let pairs = from.iter().rev().zip(to.iter().rev());
            pairs.take_while(|(a, b)| a == b).count()
        });
        let to_chain = self.files.disk(&model, volume, &to)?;
        let from = match from {
            Some(files) => Some((self.files.disk(&model, volume, &files)?, files.len() - shared)),
            None => None,
        };
        Ok(Changes { from, to: to_chain, to_layers: to.len() - shared })
    }
}
