//! What a rebase would do, told without reading or writing data.

use std::fmt;
use std::path::PathBuf;

use crate::chain::{Bytes, Chain};

use super::super::Result;
use super::super::target::Target;
use super::sides::{Action, Sides};
use super::{Onto, RebaseOptions};

/// What a rebase would do. `Display` tells people; with feature `json` it serializes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[cfg_attr(feature = "json", derive(serde::Serialize), serde(rename_all = "kebab-case"))]
pub struct RebasePlan {
    /// The image that is written.
    #[cfg_attr(feature = "json", serde(serialize_with = "super::super::plan::path_as_text"))]
    pub receiver: PathBuf,
    /// Guest bytes of the old side that certainly go to the image.
    pub data: u64,
    /// Guest bytes that become zeroes.
    pub zeroes: u64,
    /// Guest bytes that both sides hold: they are read and compared, and go to the image where they differ.
    pub compared: u64,
    /// Bytes that the image can still grow by, where that can be told.
    pub space_free: Option<u64>,
}

/// Works out what [`super::rebase`] would do. Walks the mapping tables; reads no data and writes nothing. The chain need not
/// be open for writing.
///
/// # Errors
/// [`super::Error::Refused`] as for the rebase itself, and what reading the tables gives.
///
/// ```no_run
/// use qcow2_chain::chain::{Chain, ChainOptions};
/// use qcow2_chain::merge::{Onto, RebaseOptions, plan_rebase};
///
/// let chain = Chain::open("/images/vm.qcow2", &ChainOptions::default().beneath("/images"))?;
/// print!("{}", plan_rebase(&chain, Onto::Nothing, &RebaseOptions::default())?);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn plan_rebase(chain: &Chain, onto: Onto<'_>, options: &RebaseOptions) -> Result<RebasePlan> {
    let sides = Sides::new(chain, onto, options)?;
    let space_free = Target::look(chain, 0)?.room()?;
    let receiver = chain.top().path.clone();
    let mut plan = RebasePlan { receiver, data: 0, zeroes: 0, compared: 0, space_free };
    for piece in sides.pieces() {
        let piece = piece?;
        match piece.action {
            Action::Skip => {}
            Action::Move => plan.data += piece.old.len,
            Action::Zero => plan.zeroes += piece.old.len,
            Action::Compare => plan.compared += piece.old.len,
        }
    }
    Ok(plan)
}

impl fmt::Display for RebasePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "rebase of {}", self.receiver.display())?;
        writeln!(f, "  moves      {} of data and {} of zeroes", Bytes(self.data), Bytes(self.zeroes))?;
        write!(f, "  compares   {}, and moves what differs", Bytes(self.compared))?;
        match self.space_free {
            Some(free) => writeln!(f, "; {} are free", Bytes(free)),
            None => writeln!(f),
        }
    }
}
