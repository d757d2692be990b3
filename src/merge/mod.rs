//! Deltas become one.
//!
//! [`commit`] moves what upper layers hold into a layer beneath them; [`pull`] moves what the layers beneath hold into the
//! top; [`rebase`] moves into the top what another backing file would show otherwise. [`convert`](convert()) writes a chain
//! into a new image, [`measure`](measure()) tells how large that becomes. All that moves data works on coalesced extents:
//! data that fills whole clusters of the target goes from file to file in long runs, in the
//! order in which it lies in the source; the rest goes through the target's write path.

mod commit;
mod convert;
mod copy;
mod error;
mod measure;
mod progress;
mod pull;
mod rebase;
mod target;
mod writeback;

pub use commit::{AfterCommit, CommitOptions, commit};
pub use convert::{ConvertOptions, ConvertTarget, convert};
pub use copy::Report;
pub use error::{Error, Result};
pub use measure::{Measurement, measure};
pub use progress::{Phase, Progress, Step};
pub use pull::{PullOptions, pull};
pub use rebase::{Onto, RebaseOptions, rebase, rebase_unsafe};

use crate::chain::{Chain, ChainExtent};
use crate::image::ExtentKind;

/// What a merge has to move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Work {
    /// Guest bytes that the source layers decide.
    total: u64,
    /// Of these, bytes of data.
    data: u64,
}

/// Walks the metadata of the layers above `base`; counts what is `wanted`.
fn survey(chain: &Chain, base: usize, wanted: impl Fn(&ChainExtent) -> bool) -> Result<Work> {
    let mut work = Work::default();
    for extent in chain.extents_of(0..base, 0..chain.virtual_size()) {
        let extent = extent?;
        match extent.kind {
            _ if !wanted(&extent) => {}
            ExtentKind::Unallocated => {}
            ExtentKind::Zero { .. } => work.total += extent.len,
            ExtentKind::Data { .. } | ExtentKind::Compressed => {
                work.total += extent.len;
                work.data += extent.len;
            }
        }
    }
    Ok(work)
}
