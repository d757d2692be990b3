//! An internal snapshot in the place of an image's present content.

use qcow2_chain::chain::{Chain, Layer, Node};
use qcow2_chain::format::SnapshotEntry;

use crate::failure::Failure;

/// The chain of the internal snapshot that a command line names, in the place of its image.
pub(crate) fn of(chain: Chain, named: &str) -> Result<Chain, Failure> {
    let wanted = Wanted::parse(named)?;
    let mut layers = chain.into_layers().into_iter();
    let missing = || Failure::new("Failed to load snapshot: Can't find snapshot");
    let Some(Layer { node: Node::Qcow2(image), path }) = layers.next() else { return Err(missing()) };
    let snapshots = image.snapshots()?;
    let snapshot = wanted.find(&snapshots).ok_or_else(missing)?;
    let node = Node::Qcow2(image.open_snapshot(snapshot)?);
    Ok(Chain::from_layers(Layer { node, path }, layers))
}

/// What `-l` says.
enum Wanted<'a> {
    /// An ID, or else a name.
    Either(&'a str),
    /// As `snapshot.id=...,snapshot.name=...`.
    Both { id: Option<&'a str>, name: Option<&'a str> },
}

impl<'a> Wanted<'a> {
    fn parse(text: &'a str) -> Result<Self, Failure> {
        if !text.starts_with("snapshot.") {
            return Ok(Self::Either(text));
        }
        let (mut id, mut name) = (None, None);
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("snapshot.id", value)) => id = Some(value),
                Some(("snapshot.name", value)) => name = Some(value),
                _ => return Err(Failure::new(format!("Failed in parsing snapshot param '{text}'"))),
            }
        }
        Ok(Self::Both { id, name })
    }

    fn find<'s>(&self, snapshots: &'s [SnapshotEntry]) -> Option<&'s SnapshotEntry> {
        let is = |bytes: &[u8], text: &str| bytes == text.as_bytes();
        match *self {
            Self::Either(text) => {
                let by_id = snapshots.iter().find(|snapshot| is(&snapshot.id, text));
                by_id.or_else(|| snapshots.iter().find(|snapshot| is(&snapshot.name, text)))
            }
            Self::Both { id, name } => snapshots.iter().find(|snapshot| {
                id.is_none_or(|id| is(&snapshot.id, id)) && name.is_none_or(|name| is(&snapshot.name, name))
            }),
        }
    }
}
