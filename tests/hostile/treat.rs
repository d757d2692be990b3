//! All that can be done with an image, done to one that may be damaged, within bounds of time and memory.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use qcow2_chain::chain::{Chain, Layer, Node};
use qcow2_chain::format::GuestOffset;
use qcow2_chain::image::{CheckOptions, CheckReport, CreateOptions, Fix, Image, OpenOptions, ResizeOptions, check};
use qcow2_chain::merge::{AfterCommit, CommitOptions, Onto, PullOptions, RebaseOptions, commit, pull, rebase};
use qcow2_chain::storage::{MemoryStorage, Storage};

use crate::support::memory::{peak, worked};

/// What one kind of use said: the error's text with its causes, or nothing.
pub type Outcome = Result<(), String>;

/// How long one use may keep a processor busy, in a debug build.
pub const TIME: Duration = Duration::from_secs(8);
/// The most that an image is read of.
const READ: u64 = 1 << 18;

/// An error with all its causes. None may be without words.
pub fn text(error: impl std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    assert!(!text.trim().is_empty() && !text.contains("panicked"), "no words for {error:?}");
    text
}

/// The file in memory, with a name for messages.
pub fn file(bytes: &[u8]) -> Arc<MemoryStorage> {
    Arc::new(MemoryStorage::with_bytes("hostile", bytes))
}

pub fn open(storage: &Arc<MemoryStorage>, write: bool) -> Result<Image, String> {
    let storage: Arc<dyn Storage> = storage.clone();
    Image::open(storage, &OpenOptions::default().with_write(write)).map_err(text)
}

/// Whether a file still holds these bytes. It may have become sparse and longer than any memory.
pub fn holds(storage: &Arc<MemoryStorage>, bytes: &[u8]) -> bool {
    storage.len().is_ok_and(|len| len == bytes.len() as u64) && storage.to_vec() == bytes
}

fn layer(image: Image) -> Layer {
    Layer { path: PathBuf::from("layer"), node: Node::Qcow2(image) }
}

/// The image alone, as a chain. Where it names a backing file, that is not there.
fn alone(storage: &Arc<MemoryStorage>, write: bool) -> Result<Chain, String> {
    Ok(Chain::from_layers(layer(open(storage, write)?), []))
}

/// What a guest reads at the start of the disk, cluster by cluster; nothing where it gets an error.
pub fn clusters(storage: &Arc<MemoryStorage>) -> Vec<Option<Vec<u8>>> {
    let Ok(image) = open(storage, false) else { return Vec::new() };
    let size = image.geometry().cluster_size();
    let read = |number: u64| {
        let len = size.min(image.virtual_size() - number * size);
        let mut buf = vec![0; usize::try_from(len).unwrap()];
        image.read_present(&mut buf, GuestOffset::new(number * size), &mut Vec::new()).ok().map(|()| buf)
    };
    (0..image.virtual_size().min(READ).div_ceil(size)).map(read).collect()
}

pub fn checked(storage: &Arc<MemoryStorage>, fix: Fix) -> Result<CheckReport, String> {
    check(&**storage, &CheckOptions::default().with_fix(fix)).map_err(text)
}

fn look(storage: &Arc<MemoryStorage>) -> Outcome {
    let image = open(storage, false)?;
    let _ = (image.snapshots().map_err(text), image.bitmaps().map_err(text), image.data_access().map_err(text));
    let mut at = 0;
    let mut failed = Ok(());
    for extent in image.extents(0..u64::MAX) {
        match extent {
            Ok(extent) => {
                assert_eq!((extent.guest.get(), extent.len > 0), (at, true), "extents follow one another");
                at = extent.end();
            }
            Err(error) => failed = Err(text(error)),
        }
    }
    assert!(failed.is_err() || at == image.virtual_size(), "the extents end at {at}");
    failed.and(alone(storage, false)?.describe().map(drop).map_err(text))
}

fn read(storage: &Arc<MemoryStorage>) -> Outcome {
    let cluster = clusters(storage);
    if cluster.iter().all(Option::is_some) { Ok(()) } else { Err("some clusters cannot be read".to_owned()) }
}

fn write(storage: &Arc<MemoryStorage>) -> Outcome {
    let image = open(storage, true)?;
    let size = image.virtual_size();
    let ranges = [(0, 4096), (size / 2, 70_000), (size.saturating_sub(100), 100), (0, READ)];
    let mut failed = Ok(());
    for (number, (at, len)) in ranges.into_iter().enumerate() {
        let (at, len) = (GuestOffset::new(at), u64::min(len, size.saturating_sub(at)));
        let done = match number {
            0 | 3 => image.write_at(&vec![0x5a; usize::try_from(len).unwrap()], at),
            1 => image.write_zeroes_at(at, len),
            _ => image.discard_at(at, len),
        };
        if number == 3 && done.is_ok() {
            let mut buf = vec![0; usize::try_from(len).unwrap()];
            image.read_at(&mut buf, at).expect("what was written reads");
        }
        failed = failed.and(done.map_err(text));
    }
    failed.and(image.close().map_err(text))
}

fn resize(storage: &Arc<MemoryStorage>) -> Outcome {
    let image = open(storage, true)?;
    let shrink = ResizeOptions::default().with_shrink(true);
    let grown = image.resize(image.virtual_size().saturating_add(1 << 20), &shrink).map_err(text);
    let shrunk = image.resize(512, &shrink).map_err(text);
    grown.and(shrunk).and(image.close().map_err(text))
}

/// A sound image of the same size in memory.
fn sound(size: u64) -> Image {
    Image::create(Arc::new(MemoryStorage::new("sound")), &CreateOptions::new(size.min(1 << 40))).expect("created")
}

fn commit_from(storage: &Arc<MemoryStorage>) -> Outcome {
    let top = open(storage, true)?;
    let base = sound(top.virtual_size());
    let chain = Chain::from_layers(layer(top), [layer(base)]);
    commit(&chain, &CommitOptions::default().with_after(AfterCommit::Empty), &()).map(drop).map_err(text)
}

fn commit_into(storage: &Arc<MemoryStorage>) -> Outcome {
    let base = open(storage, true)?;
    let top = sound(base.virtual_size());
    let len = usize::try_from(top.virtual_size().min(512)).unwrap();
    top.write_at(&[7; 512][..len], GuestOffset::ZERO).expect("a sound image is written");
    let chain = Chain::from_layers(layer(top), [layer(base)]);
    commit(&chain, &CommitOptions::default(), &()).map(drop).map_err(text)
}

fn pull_and_rebase(storage: &Arc<MemoryStorage>) -> Outcome {
    let chain = |size: u64, base: Image| {
        let options = CreateOptions::new(size.min(8 << 20)).with_backing("layer", "qcow2");
        let top = Image::create(Arc::new(MemoryStorage::new("overlay")), &options).expect("created");
        Chain::from_layers(layer(top), [layer(base)])
    };
    let base = open(storage, false)?;
    let pulled = pull(&chain(base.virtual_size(), base), &PullOptions::default(), &()).map(drop).map_err(text);
    let base = open(storage, false)?;
    let over = chain(base.virtual_size(), base);
    let rebased = rebase(&over, Onto::Nothing, &RebaseOptions::default(), &()).map(drop).map_err(text);
    pulled.and(rebased)
}

/// Repairs, and tells whether nothing is wrong any more. Nothing that could be read before is lost by it.
pub fn repair(storage: &Arc<MemoryStorage>, fix: Fix, model: &[Option<Vec<u8>>]) -> Outcome {
    let before = clusters(storage);
    let repaired = checked(storage, fix);
    let after = clusters(storage);
    for (number, wanted) in model.iter().enumerate().filter(|(_, data)| data.is_some()) {
        if before.get(number) == Some(wanted) {
            assert!(after.get(number) == Some(wanted), "repairing loses cluster {number}: {repaired:?}");
        }
    }
    let repaired = repaired?;
    let again = checked(storage, Fix::Nothing).expect("what was repaired is checked");
    assert_eq!(again.is_clean(), repaired.is_clean(), "{repaired:?}, and then {again:?}");
    if repaired.is_clean() { Ok(()) } else { Err(format!("{} corruptions are left", repaired.corruptions)) }
}

/// A use of an image.
type Use = (&'static str, fn(&Arc<MemoryStorage>) -> Outcome);

const USES: [Use; 8] = [
    ("look", look),
    ("read", read),
    ("check", |storage| checked(storage, Fix::Nothing).map(drop)),
    ("write", write),
    ("resize", resize),
    ("commit from", commit_from),
    ("commit into", commit_into),
    ("pull and rebase", pull_and_rebase),
];

/// How many of the uses only look.
const LOOKS: usize = 3;

/// As [`treat`], with the uses that look and one of the others, in turn by `number`; with all where
/// `QCOW2_CHAIN_HOSTILE_ALL` is set.
pub fn treat_by_turns(what: &str, bytes: &[u8], memory: usize, number: usize) -> Vec<(&'static str, Outcome)> {
    if std::env::var_os("QCOW2_CHAIN_HOSTILE_ALL").is_some() {
        return treat(what, bytes, memory);
    }
    let turn = LOOKS + number % (USES.len() - LOOKS);
    let uses = USES[..LOOKS].iter().chain(&USES[turn..=turn]);
    uses.map(|one| treat_once(*one, what, bytes, memory)).collect()
}

/// Does all of it to an image, each on a copy of its own, and returns what each use said. Fails where one panics, takes
/// longer than it may, or holds more than `memory` bytes beside the file, what it writes to it included.
pub fn treat(what: &str, bytes: &[u8], memory: usize) -> Vec<(&'static str, Outcome)> {
    USES.into_iter().map(|one| treat_once(one, what, bytes, memory)).collect()
}

fn treat_once((name, act): Use, what: &str, bytes: &[u8], memory: usize) -> (&'static str, Outcome) {
    let storage = file(bytes);
    let start = worked();
    let (outcome, most) = peak(|| act(&storage));
    let took = worked() - start;
    assert!(took < TIME, "{what}: {name} takes {took:?}");
    assert!(most < memory, "{what}: {name} holds {most} bytes: {outcome:?}");
    if matches!(name, "look" | "read" | "check") {
        assert!(holds(&storage, bytes), "{what}: {name} writes");
    }
    (name, outcome)
}

/// What one of the uses said.
pub fn said<'a>(outcomes: &'a [(&'static str, Outcome)], name: &str) -> &'a Outcome {
    &outcomes.iter().find(|(use_name, _)| *use_name == name).expect("a use of this name").1
}
