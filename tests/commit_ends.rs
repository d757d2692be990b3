//! What a commit leaves: the base in the size that was asked for, and of the merged layers what was asked for.

use std::path::Path;
use std::sync::{Arc, Mutex};

use qcow2_chain::chain::{Chain, ChainOptions, Layer, Node};
use qcow2_chain::format::GuestOffset;
use qcow2_chain::image::{CreateOptions, Image, OpenOptions};
use qcow2_chain::merge::{AfterCommit, CommitOptions, Error, Phase, Progress, Step, commit};
use qcow2_chain::storage::{FileSystem, MemoryFileSystem, MemoryStorage};

const MIB: u64 = 1 << 20;

/// `top` over `middle` over `base`, of these sizes in MiB; each holds its number at every third cluster from its number on.
fn chain(sizes: [u64; 3]) -> Arc<MemoryFileSystem> {
    let names = Arc::new(MemoryFileSystem::new());
    let mut beneath = None;
    for (number, (name, size)) in ["base", "middle", "top"].into_iter().zip(sizes).enumerate() {
        let storage = Arc::new(MemoryStorage::new(name));
        names.insert(Path::new("/images").join(name), Arc::clone(&storage));
        let mut options = CreateOptions::new(size * MIB);
        if let Some(beneath) = beneath.replace(name) {
            options = options.with_backing(beneath, "qcow2");
        }
        let image = Image::create(storage, &options).unwrap();
        let byte = u8::try_from(number + 1).unwrap();
        for cluster in (number as u64..size * 16).step_by(3) {
            image.write_at(&[byte; 65536], GuestOffset::new(cluster << 16)).unwrap();
        }
        image.close().unwrap();
    }
    names
}

fn open(names: &Arc<MemoryFileSystem>, name: &str, writable: usize) -> Chain {
    let seam: Arc<dyn FileSystem> = Arc::clone(names) as _;
    let options = ChainOptions::default().beneath("/images").with_writable(writable);
    Chain::open_in(&seam, &Path::new("/images").join(name), &options).unwrap()
}

fn content(names: &Arc<MemoryFileSystem>, name: &str) -> Vec<u8> {
    let chain = open(names, name, 0);
    let mut bytes = vec![0xee; usize::try_from(chain.virtual_size()).unwrap()];
    chain.read_at(&mut bytes, GuestOffset::ZERO).unwrap();
    bytes
}

#[test]
fn merged_layers_are_removed_where_that_is_asked_for() {
    let names = chain([2, 3, 2]);
    let before = content(&names, "top");
    let options = CommitOptions::default().with_base(2).with_after(AfterCommit::Remove);
    commit(&open(&names, "top", 3), &options, &()).unwrap();
    assert_eq!(names.list(Path::new("/images")).unwrap(), [Path::new("/images/base")]);
    assert_eq!(content(&names, "base"), before);
}

#[test]
fn layers_that_were_not_opened_by_name_are_not_removed() {
    let names = chain([2, 2, 2]);
    let layer = |name: &str| {
        let storage = names.get(Path::new("/images").join(name)).unwrap();
        let image = Image::open(storage, &OpenOptions::default().with_write(true)).unwrap();
        Layer { node: Node::Qcow2(image), path: name.into() }
    };
    let nameless = Chain::from_layers(layer("top"), [layer("middle"), layer("base")]);
    let refused = commit(&nameless, &CommitOptions::default().with_after(AfterCommit::Remove), &());
    assert!(matches!(refused, Err(Error::Refused { .. })), "{refused:?}");
    assert_eq!(names.list(Path::new("/images")).unwrap().len(), 3);
}

#[test]
fn a_larger_base_is_cut_only_where_that_is_asked_for() {
    for (shrink, base, expected) in [(false, 3, 3), (true, 3, 2), (true, 1, 2)] {
        let names = chain([base, 2, 2]);
        let (before, beneath) = (content(&names, "top"), content(&names, "base"));
        let options = CommitOptions::default().with_base(2).with_shrink_base(shrink);
        commit(&open(&names, "top", 3), &options, &()).unwrap();
        let after = content(&names, "base");
        assert_eq!(after.len() as u64, expected * MIB, "{shrink}");
        assert_eq!(after[..before.len()], before, "{shrink}");
        assert_eq!(after[before.len()..], *beneath.get(before.len()..after.len()).unwrap_or_default(), "{shrink}");
        assert_eq!(content(&names, "top"), before, "{shrink}");
    }
}

/// Writes to a layer of the chain that is merged, from another thread, as soon as the merge tells that it copies.
struct Meddler<'a> {
    chain: &'a Chain,
    layer: usize,
    heard: Mutex<Vec<String>>,
}

impl Progress for Meddler<'_> {
    fn step(&self, step: &Step<'_>) {
        if step.phase == Phase::Copying {
            let image = self.chain.layers()[self.layer].node.as_qcow2().unwrap();
            let write = || image.write_zeroes_at(GuestOffset::ZERO, 65536);
            let refused = std::thread::scope(|scope| scope.spawn(write).join().unwrap());
            self.heard.lock().unwrap().push(refused.unwrap_err().to_string());
        }
    }
}

#[test]
fn nobody_else_writes_an_image_that_is_being_merged() {
    for layer in [0, 2] {
        let names = chain([2, 2, 2]);
        let before = content(&names, "top");
        let chain = open(&names, "top", 3);
        let meddler = Meddler { chain: &chain, layer, heard: Mutex::default() };
        commit(&chain, &CommitOptions::default().with_base(2), &meddler).unwrap();
        let heard = meddler.heard.into_inner().unwrap();
        assert!(!heard.is_empty() && heard.iter().all(|why| why.contains("it is being merged")), "{heard:?}");
        // Afterwards it is as before.
        chain.write_at(&[9; 512], GuestOffset::ZERO).unwrap();
        chain.close().unwrap();
        assert_eq!(content(&names, "base"), before);
        assert_eq!(content(&names, "top")[512..], before[512..]);
    }
}
