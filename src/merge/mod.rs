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

mod absorb;
mod commit;
mod convert;
mod copy;
mod error;
mod measure;
mod plan;
mod pull;
mod rate;
mod rebase;
mod refuse;
mod target;
mod transfer;
mod writeback;

pub use crate::progress::{Phase, Progress, Step};
#[cfg(feature = "vm")]
pub(crate) use commit::commit_watched;
pub use commit::{AfterCommit, CommitOptions, commit};
pub use convert::{ConvertOptions, ConvertTarget, convert};
pub use copy::Report;
pub use error::{Error, Result};
pub use measure::{Measurement, measure};
pub use plan::{Direction, MergePlan, Way, plan};
pub use pull::{PullOptions, pull};
pub use rebase::{Onto, RebaseOptions, RebasePlan, plan_rebase, rebase, rebase_unsafe};

use crate::chain::Layer;
use crate::image::{self, Image, Reservation};

/// Keeps layers for this merge: while it reads and fills clusters, no other thread of this program may free them.
fn reserve(layers: &[Layer]) -> image::Result<Vec<Reservation<'_>>> {
    let images = layers.iter().filter_map(|layer| layer.node.as_qcow2());
    images.filter(|image| !image.is_read_only()).map(Image::reserve).collect()
}

/// Whether all bytes are zero.
fn is_zero(bytes: &[u8]) -> bool {
    static ZEROES: [u8; 4096] = [0; 4096];
    bytes.chunks(ZEROES.len()).all(|part| *part == ZEROES[..part.len()])
}
