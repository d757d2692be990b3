//! A commit after which the merged layers are gone.

use std::path::Path;
use std::sync::Arc;

use qcow2_chain::chain::{Chain, ChainOptions};
use qcow2_chain::format::GuestOffset;
use qcow2_chain::image::Fix;
use qcow2_chain::merge::{AfterCommit, CommitOptions, commit};
use qcow2_chain::storage::crash::Tree;
use qcow2_chain::storage::{FileSystem, MemoryFileSystem};

use crate::support::images::random_image;
use crate::support::protocol::{Protocol, Verdict, assert_sound, memory, repair, wrong};
use crate::support::rng::Rng;

const DIRECTORY: &str = "/s";
const LAYERS: [&str; 3] = ["/s/top", "/s/middle", "/s/base"];

/// A chain of three images that becomes one.
pub struct Remove {
    start: Tree,
    model: Vec<u8>,
}

impl Remove {
    pub fn random(rng: &mut Rng) -> Self {
        let mut size = || 512 * rng.within(8..48);
        let sizes = [size(), size(), size()];
        let (base, below) = random_image(rng, sizes[0], None);
        let (middle, above) = random_image(rng, sizes[1], Some(("base", &below)));
        let (top, model) = random_image(rng, sizes[2], Some(("middle", &above)));
        let start = LAYERS.into_iter().map(Into::into).zip([top, middle, base]).collect();
        Self { start, model }
    }

    /// What a guest of this layer reads; nothing where the layer is gone.
    fn shown(tree: &Tree, path: &str) -> Result<Option<Vec<u8>>, String> {
        if !tree.contains_key(Path::new(path)) {
            return Ok(None);
        }
        let names = MemoryFileSystem::new();
        for layer in LAYERS.into_iter().filter(|layer| tree.contains_key(Path::new(layer))) {
            names.insert(layer, memory(tree, layer)?);
        }
        let names: Arc<dyn FileSystem> = Arc::new(names);
        let chain = Chain::open_in(&names, Path::new(path), &ChainOptions::default().beneath(DIRECTORY));
        let chain = chain.map_err(|error| format!("{path} does not open: {error}"))?;
        let mut bytes = vec![0xee; usize::try_from(chain.virtual_size()).map_err(wrong)?];
        chain.read_at(&mut bytes, GuestOffset::ZERO).map_err(wrong)?;
        Ok(Some(bytes))
    }
}

impl Protocol for Remove {
    fn what(&self) -> String {
        format!("{} bytes of three layers into one", self.model.len())
    }

    fn start(&self) -> &Tree {
        &self.start
    }

    fn run(&self, names: &Arc<dyn FileSystem>, _promised: &dyn Fn()) -> Verdict {
        let options = ChainOptions::default().beneath(DIRECTORY).with_writable(3);
        let chain = Chain::open_in(names, Path::new(LAYERS[0]), &options).map_err(wrong)?;
        let options = CommitOptions::default().with_base(2).with_after(AfterCommit::Remove).with_shrink_base(true);
        commit(&chain, &options, &()).map_err(wrong).map(|_| ())
    }

    /// The top reads as it did, or it is gone and the base does. No layer stands on one that is gone.
    fn judge(&self, tree: &Tree, promises: usize) -> Verdict {
        let [top, middle, base] = LAYERS.map(|layer| Self::shown(tree, layer));
        let (top, middle) = (top?, middle?);
        let base = base?.ok_or("the base is gone")?;
        let disk = top.as_ref().unwrap_or(&base);
        if *disk != self.model {
            return Err("the guest's disk is another".to_owned());
        }
        for layer in LAYERS.into_iter().filter(|layer| tree.contains_key(Path::new(layer))) {
            assert_sound(tree, layer, true)?;
        }
        if promises > 0 && (top.is_some() || middle.is_some()) {
            return Err("a merged layer is still there".to_owned());
        }
        Ok(())
    }

    fn judge_kept(&self, tree: &Tree, promises: usize) -> Verdict {
        self.judge(tree, promises)?;
        assert_sound(tree, LAYERS[2], false)
    }

    fn recover(&self, names: &Arc<dyn FileSystem>) -> Verdict {
        let exists = |layer: &str| names.exists(Path::new(layer)).map_err(wrong);
        if exists(LAYERS[0])? {
            self.run(names, &|| ())?;
        } else if exists(LAYERS[1])? {
            // Whoever asked for the merge has the top's name no more, and removes what is left.
            names.unlink(Path::new(LAYERS[1])).map_err(wrong)?;
            names.sync_dir(Path::new(DIRECTORY)).map_err(wrong)?;
        }
        repair(&**names, LAYERS[2], Fix::Leaks)
    }

    fn judge_recovered(&self, tree: &Tree) -> Verdict {
        self.judge_kept(tree, 1)
    }
}
