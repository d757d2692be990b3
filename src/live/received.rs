//! Proof that a base has received a top that is not open in the hypervisor.

use super::executor::disagreement;
use crate::chain::{Chain, Layer};
use crate::format::GuestOffset;
use crate::image::ExtentKind;
use crate::vm::{Error, MergeStep, Result, VolumeFiles, Watch};

/// Bytes to compare at once.
const PIECE: u64 = 1 << 20;

/// Checks that the base of a commit has all data of the top. A top that a disk no longer has proves
/// nothing: the VM may have been started on another file above the same base.
///
/// # Errors
/// - [`Error::Hypervisor`]: the base differs from the top, so that the top is still needed.
/// - [`Error::Cancelled`]: the caller asked to stop.
/// - Others: a file cannot be read.
pub(super) fn check_received(files: &VolumeFiles, step: &MergeStep, watch: &dyn Watch) -> Result<()> {
    let lower = || -> Result<Vec<Layer>> {
        std::iter::once(&step.base).chain(&step.below).map(|file| files.look_layer(file)).collect()
    };
    let with_top = Chain::from_layers(files.look_layer(&step.top)?, lower()?);
    let mut layers = lower()?.into_iter();
    let Some(base) = layers.next() else { return Ok(()) };
    let without = Chain::from_layers(base, layers);
    let differs = || disagreement(files, &step.top, "it is not in use, and its base does not have its data");
    let size = with_top.virtual_size();
    if without.virtual_size() < size {
        return Err(differs());
    }
    let (mut expected, mut found) = (Vec::new(), Vec::new());
    for extent in with_top.extents_of(0..1, 0..size) {
        let extent = extent?;
        if extent.kind == ExtentKind::Unallocated {
            continue;
        }
        let mut at = extent.guest.get();
        while at < extent.end() {
            if watch.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let len = (extent.end() - at).min(PIECE);
            let bytes = usize::try_from(len).unwrap_or_default();
            expected.resize(bytes, 0);
            found.resize(bytes, 0);
            with_top.read_at(&mut expected, GuestOffset::new(at))?;
            without.read_at(&mut found, GuestOffset::new(at))?;
            if expected != found {
                return Err(differs());
            }
            at += len;
        }
    }
    Ok(())
}
