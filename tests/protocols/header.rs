//! Another backing file.

use std::sync::Arc;

use qcow2_chain::format::{Extension, Header, HeaderCluster, Limits};
use qcow2_chain::storage::FileSystem;
use qcow2_chain::storage::crash::{Recorder, Tree};

use crate::support::images::{BackingName, backing_of, random_backing, random_header};
use crate::support::protocol::{Protocol, Verdict, memory, open, wrong};
use crate::support::rng::Rng;

const PATH: &str = "/disk";

/// The extension that covers what is in use while a header changes.
const GAP: u32 = 0x5143_4750;

/// One change of a header that is possible.
pub struct HeaderChange {
    start: Tree,
    old: BackingName,
    new: BackingName,
    after: Tree,
    others: (Header, Vec<Extension>),
}

/// All of a header but the backing file.
fn others(mut header: HeaderCluster) -> (Header, Vec<Extension>) {
    header.set_backing(None, None);
    header.remove_extension(GAP);
    (header.header.backing_file_offset, header.header.backing_file_size) = (0, 0);
    (header.header, header.extensions)
}

fn decode(tree: &Tree) -> Result<HeaderCluster, String> {
    let bytes = memory(tree, PATH)?.to_vec();
    HeaderCluster::decode(&bytes, bytes.len() as u64, &Limits::default()).map_err(wrong)
}

impl HeaderChange {
    pub fn random(rng: &mut Rng) -> Self {
        loop {
            let Some((image, old)) = random_header(rng) else { continue };
            let start: Tree = [(PATH.into(), image)].into();
            let others = others(decode(&start).expect("decodes"));
            let mut change = Self { start, old, new: random_backing(rng), after: Tree::new(), others };
            let recorder = Recorder::new();
            let names: Arc<dyn FileSystem> = Arc::new(recorder.names(&change.start));
            // Some names do not fit: they are refused before anything is written.
            if change.run(&names, &|| ()).is_ok() {
                change.after = recorder.log().last().tree();
                return change;
            }
        }
    }
}

impl Protocol for HeaderChange {
    fn what(&self) -> String {
        format!("from {:x?} to {:x?}", self.old, self.new)
    }

    fn start(&self) -> &Tree {
        &self.start
    }

    fn run(&self, names: &Arc<dyn FileSystem>, _promised: &dyn Fn()) -> Verdict {
        let image = open(&**names, PATH, true)?;
        let name = self.new.as_ref().map(|(name, _)| name.as_slice());
        let format = self.new.as_ref().and_then(|(_, format)| format.as_deref());
        image.set_backing_file(name, format).map_err(wrong)
    }

    fn judge(&self, tree: &Tree, promises: usize) -> Verdict {
        let header = decode(tree)?;
        let now = backing_of(&header);
        if now != self.new && (promises > 0 || now != self.old) {
            return Err(format!("neither the old backing file nor the new: {now:?}"));
        }
        if others(header) != self.others {
            return Err("something else has changed".to_owned());
        }
        Ok(())
    }

    fn judge_kept(&self, tree: &Tree, promises: usize) -> Verdict {
        self.judge(tree, promises)?;
        if *tree != self.after {
            return Err("something of the old header is left, or of the way to the new one".to_owned());
        }
        Ok(())
    }

    fn recover(&self, names: &Arc<dyn FileSystem>) -> Verdict {
        self.run(names, &|| ())
    }

    fn judge_recovered(&self, tree: &Tree) -> Verdict {
        self.judge(tree, 1)
    }
}
