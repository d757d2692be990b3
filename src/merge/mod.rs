//! Deltas become one.
//!
//! [`commit()`] moves what upper layers hold into a layer beneath them; [`pull()`] moves what the layers beneath hold into the
//! top; [`rebase()`] moves into the top what another backing file would show otherwise. [`convert`](convert()) writes a chain
//! into a new image, [`measure`](measure()) tells how large that becomes. All that moves data works on coalesced extents:
//! data that fills whole clusters of the target goes from file to file in long runs, in the
//! order in which it lies in the source; the rest goes through the target's write path.
//!
//! [`plan`](plan()) tells beforehand, without reading data, what a commit and a pull that merge the same layers would move,
//! what either makes invalid, and which is cheaper.

mod commit;
mod convert;
mod copy;
mod error;
mod measure;
mod plan;
mod progress;
mod pull;
mod rate;
mod rebase;
mod refuse;
mod target;
mod writeback;

pub use commit::{AfterCommit, CommitOptions, commit};
pub use convert::{ConvertOptions, ConvertTarget, convert};
pub use copy::Report;
pub use error::{Error, Result};
pub use measure::{Measurement, measure};
pub use plan::{Direction, MergePlan, Way, plan};
pub use progress::{Phase, Progress, Step};
pub use pull::{PullOptions, pull};
pub use rebase::{Onto, RebaseOptions, RebasePlan, plan_rebase, rebase, rebase_unsafe};

use crate::chain::{Chain, ChainExtent};
use crate::image::{ExtentKind, Needs};
use target::Target;

/// What a merge has to move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Work {
    /// Guest bytes that the source layers decide.
    total: u64,
    /// Of these, bytes of data.
    data: u64,
    /// Of the data, bytes that are overwritten where they lie.
    in_place: u64,
    /// The space that the rest of the data needs in the target.
    new_bytes: u64,
}

/// Walks the metadata of the layers above `base`; weighs what is `wanted` in the target.
fn weigh(chain: &Chain, target: &Target<'_>, base: usize, wanted: impl Fn(&ChainExtent) -> bool) -> Result<Work> {
    let mut work = Work::default();
    // Several extents may lie in one cluster of the target.
    let mut counted = 0;
    let zeroes_are_data = target.zeroes_are_data();
    for extent in chain.extents_of(0..base, 0..chain.virtual_size()) {
        let extent = extent?;
        let data = match extent.kind {
            ExtentKind::Unallocated => continue,
            _ if !wanted(&extent) => continue,
            ExtentKind::Zero { .. } => zeroes_are_data,
            ExtentKind::Data { .. } | ExtentKind::Compressed => {
                work.data += extent.len;
                true
            }
        };
        work.total += extent.len;
        if data {
            let (start, end) = (extent.guest.get(), extent.end());
            let mut needs = target.needs(start..end)?;
            work.in_place += needs.in_place;
            if start < counted {
                needs = if counted < end { target.needs(counted..end)? } else { Needs::default() };
            }
            work.new_bytes += needs.clusters * target.granularity();
            counted = counted.max(end.next_multiple_of(target.granularity()));
        }
    }
    Ok(work)
}
