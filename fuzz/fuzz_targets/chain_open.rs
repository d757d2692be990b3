//! A few hostile images that name each other, opened under a policy.
//!
//! Invariants: no panic. Nothing is opened but what the policy allows, judged by the letters of the path: these names have
//! no links. `Refuse` opens the top alone, `Beneath` what lies beneath its directory, `List` what is listed. No file comes
//! twice in a chain, a chain has no more layers than allowed, and nothing is written, created or renamed.
#![no_main]

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use qcow2_chain::chain::{Chain, ChainOptions, Policy};
use qcow2_chain::format::GuestOffset;
use qcow2_chain::storage::{FileSystem, MemoryStorage};
use qcow2_chain_fuzz::inputs::{Files as Input, Link, Name};
use qcow2_chain_fuzz::{WatchedFileSystem, limits};

/// Where files lie; the first is the top.
const PLACES: [&str; 5] = ["/d/top", "/d/base", "/d/sub/deep", "/secret", "/dx/near"];
/// How images call them, and what is no file at all.
const CALLED: [&str; 16] = [
    "base",
    "./base",
    "sub/deep",
    "../d/base",
    "/d/base",
    "/secret",
    "../secret",
    "sub/../../secret",
    "../dx/near",
    "/dx/near",
    "top",
    "../top",
    "json:{}",
    "nbd:x",
    "file:base",
    "",
];
const MAX_DEPTH: usize = 4;

fn backing(link: &Link<'_>) -> (Vec<u8>, Vec<u8>) {
    let name = match link.name {
        Name::Called(index) => CALLED[usize::from(index) % CALLED.len()].as_bytes().to_vec(),
        Name::Any(bytes) => bytes.iter().copied().take(300).collect(),
    };
    (name, if link.raw { b"raw".to_vec() } else { b"qcow2".to_vec() })
}

/// A path from the root without `.` and `..`.
fn by_letters(path: &Path) -> PathBuf {
    let mut plain = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::ParentDir => drop(plain.pop()),
            Component::Normal(name) => plain.push(name),
            _ => {}
        }
    }
    plain
}

fuzz_target!(|input: Input<'_>| {
    let names = Arc::new(WatchedFileSystem::default());
    let places = [0, 1 + input.places[0] % 4, 1 + input.places[1] % 4];
    for ((hostile, link), place) in input.files.into_iter().zip(places) {
        // A name that does not fit a cluster of 512 bytes cannot be made.
        let backing = link.map(|link| backing(&link)).filter(|(name, _)| !name.is_empty() && name.len() < 200);
        let place = PLACES[usize::from(place)];
        names.files.insert(place, Arc::new(MemoryStorage::with_bytes(place, hostile.over(backing).bytes())));
    }
    let (policy, allowed): (Policy, fn(&Path) -> bool) = match input.policy % 4 {
        0 => (Policy::Refuse, |_| false),
        1 => (Policy::Beneath(vec!["/d".into()]), |path| path.starts_with("/d")),
        2 => (Policy::List(vec!["/d/base".into(), "/dx/near".into()]), |path| {
            path == Path::new("/d/base") || path == Path::new("/dx/near")
        }),
        _ => (Policy::Any, |_| true),
    };
    let before: Vec<_> = PLACES.map(|place| names.files.get(place).map(|storage| storage.to_vec())).to_vec();
    let options = ChainOptions::default()
        .with_policy(policy)
        .with_limits(limits())
        .with_max_depth(MAX_DEPTH)
        .with_probe(input.probe)
        .with_writable(usize::from(input.writable));
    let shared: Arc<dyn FileSystem> = names.clone();
    if let Ok(chain) = Chain::open_in(&shared, Path::new(PLACES[0]), &options) {
        assert!(chain.layers().len() <= MAX_DEPTH);
        let mut paths: Vec<_> = chain.layers().iter().map(|layer| by_letters(&layer.path)).collect();
        paths.sort();
        paths.dedup();
        assert_eq!(paths.len(), chain.layers().len(), "a file comes twice");
        let _ = chain.read_at(&mut [0; 4096], GuestOffset::ZERO);
        let _ = chain.extents(0..1 << 20).take(1000).count();
        drop(chain);
    }
    for path in names.opened().iter().map(|path| by_letters(path)) {
        assert!(path == Path::new(PLACES[0]) || allowed(&path), "{} is opened", path.display());
    }
    if !input.writable {
        let after: Vec<_> = PLACES.map(|place| names.files.get(place).map(|storage| storage.to_vec())).to_vec();
        assert!(before == after, "opening for reading wrote");
    }
});
