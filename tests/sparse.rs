//! What an operation costs follows from what the images hold, not from how large the disk claims to be. Counted, not timed:
//! calls of the storage and bytes that pass it.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use qcow2_chain::chain::{Chain, Layer, Node};
use qcow2_chain::format::{ClusterBits, GuestOffset};
use qcow2_chain::image::{CheckOptions, CreateOptions, ExtentKind, Image, OpenOptions, check};
use qcow2_chain::merge::{AfterCommit, CommitOptions, Onto, PullOptions, RebaseOptions, commit, plan, pull, rebase};
use qcow2_chain::storage::{MemoryStorage, Result, Storage};

const GIB: u64 = 1 << 30;
const SMALL: u64 = GIB;
const LARGE: u64 = 64 << 40;

/// What passed a storage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Work {
    reads: u64,
    read_bytes: u64,
    writes: u64,
    written_bytes: u64,
    /// Syncs, new lengths, ranges zeroed and punched.
    others: u64,
}

impl Work {
    fn plus(self, more: Self) -> Self {
        Self {
            reads: self.reads + more.reads,
            read_bytes: self.read_bytes + more.read_bytes,
            writes: self.writes + more.writes,
            written_bytes: self.written_bytes + more.written_bytes,
            others: self.others + more.others,
        }
    }

    fn calls(self) -> [u64; 3] {
        [self.reads, self.writes, self.others]
    }
}

/// A storage in memory that counts.
#[derive(Debug)]
struct Counting(MemoryStorage, Mutex<Work>);

impl Counting {
    fn new(name: &str, bytes: &MemoryStorage) -> Self {
        let copy = MemoryStorage::new(name);
        let mut at = 0;
        while let Some(range) = bytes.next_data(at).unwrap() {
            let mut buf = vec![0; usize::try_from(range.end - range.start).unwrap()];
            bytes.read_at(&mut buf, range.start).unwrap();
            copy.write_at(&buf, range.start).unwrap();
            at = range.end;
        }
        copy.set_len(bytes.len().unwrap()).unwrap();
        Self(copy, Mutex::default())
    }

    fn count(&self, more: Work) {
        let mut work = self.1.lock().unwrap();
        *work = work.plus(more);
    }
}

impl Storage for Counting {
    fn name(&self) -> &str {
        self.0.name()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.count(Work { reads: 1, read_bytes: buf.len() as u64, ..Work::default() });
        self.0.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.count(Work { writes: 1, written_bytes: buf.len() as u64, ..Work::default() });
        self.0.write_at(buf, offset)
    }
    fn len(&self) -> Result<u64> {
        self.0.len()
    }
    fn set_len(&self, len: u64) -> Result<()> {
        self.count(Work { others: 1, ..Work::default() });
        self.0.set_len(len)
    }
    fn sync(&self) -> Result<()> {
        self.count(Work { others: 1, ..Work::default() });
        self.0.sync()
    }
    fn zero_range(&self, range: Range<u64>) -> Result<()> {
        self.count(Work { others: 1, ..Work::default() });
        self.0.zero_range(range)
    }
    fn punch_range(&self, range: Range<u64>) -> Result<()> {
        self.count(Work { others: 1, ..Work::default() });
        self.0.punch_range(range)
    }
    fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>> {
        self.0.next_data(offset)
    }
    fn allocated_len(&self) -> Result<Option<u64>> {
        self.0.allocated_len()
    }
}

/// Names, the top first; the last one is a base for others.
const NAMES: [&str; 4] = ["top", "middle", "base", "other"];

/// The images of a disk: three layers and another base, each with the same few pieces of data and zeroes.
struct Disk {
    images: Vec<Arc<MemoryStorage>>,
    size: u64,
}

/// Where on a disk of this size the pieces lie: as many L2 tables whatever the size.
fn places(size: u64, cluster_bits: u32) -> [u64; 3] {
    // With large clusters one L2 table maps more than the small disk: there, all lie at the beginning.
    let end = if cluster_bits == 21 { SMALL } else { size };
    [0, 100 << 20, end - (20 << 20)]
}

impl Disk {
    fn new(size: u64, cluster_bits: u32) -> Self {
        let image = |(number, name): (usize, &&str)| {
            let storage = Arc::new(MemoryStorage::new(*name));
            let bits = ClusterBits::new(cluster_bits).unwrap();
            let mut options = CreateOptions::new(size).with_cluster_bits(bits);
            if number < 2 {
                options = options.with_backing(NAMES[number + 1], "qcow2");
            }
            let image = Image::create(storage.clone(), &options).unwrap();
            for place in places(size, cluster_bits) {
                let shift = u64::try_from(number % 3).unwrap() * (4 << 20);
                let at = GuestOffset::new(place + shift);
                image.write_at(&vec![7; 2 << 20], at).unwrap();
                image.write_zeroes_at(at.saturating_add(2 << 20), 2 << 20).unwrap();
            }
            image.close().unwrap();
            storage
        };
        Self { images: NAMES.iter().enumerate().map(image).collect(), size }
    }

    /// Does something to the chain, and to the other base, in copies that count. Returns what it cost, opening included.
    fn measure(&self, writable: usize, act: impl FnOnce(&Chain, &Chain)) -> Work {
        let storages: Vec<_> =
            NAMES.iter().zip(&self.images).map(|(name, image)| Arc::new(Counting::new(name, image))).collect();
        let open = |number: usize| {
            let options = OpenOptions::default().with_write(number < writable);
            let image = Image::open(storages[number].clone(), &options).unwrap();
            Layer { node: Node::Qcow2(image), path: PathBuf::from(NAMES[number]) }
        };
        let chain = Chain::from_layers(open(0), [open(1), open(2)]);
        let other = Chain::from_layers(open(3), []);
        assert_eq!(chain.virtual_size(), self.size);
        act(&chain, &other);
        chain.close().unwrap();
        storages.iter().map(|storage| *storage.1.lock().unwrap()).fold(Work::default(), Work::plus)
    }

    fn check(&self) -> Work {
        let storage = Counting::new("top", &self.images[0]);
        assert!(check(&storage, &CheckOptions::default()).unwrap().is_clean());
        storage.1.into_inner().unwrap()
    }
}

/// Everything that is to be cheap, by name.
fn costs(disk: &Disk) -> Vec<(&'static str, Work)> {
    let copied = |report: qcow2_chain::merge::Report, pieces: u64| {
        assert_eq!(report.copied + report.copied_in_kernel, pieces * (2 << 20), "{report:?}");
    };
    let commit_to = |base: usize, after: AfterCommit| {
        disk.measure(base + 1, |chain, _| {
            let report = commit(chain, &CommitOptions::default().with_base(base).with_after(after), &()).unwrap();
            copied(report, 3 * base as u64);
        })
    };
    let rebase_onto = |onto: fn(&Chain) -> Onto<'_>, drop_equal: bool| {
        disk.measure(1, |chain, other| {
            rebase(chain, onto(other), &RebaseOptions::default().with_drop_equal(drop_equal), &()).unwrap();
        })
    };
    vec![
        ("flatten", disk.measure(1, |chain, _| copied(pull(chain, &PullOptions::default(), &()).unwrap(), 6))),
        (
            "pull",
            disk.measure(1, |chain, _| {
                copied(pull(chain, &PullOptions::default().with_base(Some(2)), &()).unwrap(), 3)
            }),
        ),
        ("commit", commit_to(1, AfterCommit::Keep)),
        ("commit, emptied", commit_to(1, AfterCommit::Empty)),
        ("commit into the deepest", commit_to(2, AfterCommit::Keep)),
        ("rebase onto nothing", rebase_onto(|_| Onto::Nothing, false)),
        ("rebase onto a layer", rebase_onto(|_| Onto::Layer(2), false)),
        ("rebase onto another chain", rebase_onto(|other| Onto::Chain(other), false)),
        ("rebase, dropping", rebase_onto(|other| Onto::Chain(other), true)),
        ("plan", disk.measure(0, |chain, _| assert_eq!(plan(chain, 1).unwrap().commit.data, 3 * (2 << 20)))),
        (
            "map",
            disk.measure(0, |chain, _| {
                let extents = chain.extents(0..disk.size).map(|extent| extent.unwrap());
                let data = extents.filter(|extent| matches!(extent.kind, ExtentKind::Data { .. }));
                assert_eq!(data.map(|extent| extent.len).sum::<u64>(), 9 * (2 << 20));
            }),
        ),
        ("check", disk.check()),
    ]
}

/// The L1 table is what grows with the disk: 8 bytes for each 512 GiB with clusters of 2 MiB, for each 512 MiB with those of
/// 64 KiB. It is read, and where a table is emptied written, as a whole.
fn l1_bytes(size: u64, cluster_bits: u32) -> u64 {
    size.div_ceil(1 << (2 * cluster_bits - 3)) * 8
}

#[test]
fn the_size_of_a_disk_costs_nothing_but_its_l1_tables() {
    for cluster_bits in [21, 16] {
        let [small, large] = [SMALL, LARGE].map(|size| costs(&Disk::new(size, cluster_bits)));
        let tables = l1_bytes(LARGE, cluster_bits) - l1_bytes(SMALL, cluster_bits);
        for ((what, small), (_, large)) in small.into_iter().zip(large) {
            println!("clusters of 2^{cluster_bits}: {what}: {small:?}, {large:?}");
            // The entries of an L1 table that an emptied image gives up lie in one sector of it, or in two.
            let sectors = u64::from(what == "commit, emptied" && cluster_bits == 16);
            let expected = [small.reads, small.writes + sectors, small.others];
            assert_eq!(large.calls(), expected, "clusters of 2^{cluster_bits}: {what}: {small:?}, {large:?}");
            // Four images, each table once or twice.
            let (read, written) = (large.read_bytes - small.read_bytes, large.written_bytes - small.written_bytes);
            assert!(
                read <= 8 * tables && written <= 2 * tables,
                "{what}: {read} and {written} bytes more, L1 {tables}"
            );
        }
    }
}

/// The program does all of it in an address space of 64 MiB, its own code and stacks included.
#[cfg(all(feature = "cli", target_os = "linux"))]
#[test]
fn an_enormous_disk_fits_into_64_mib_of_memory() {
    use qcow2_chain::storage::{Access, FileSystem as _, HostFileSystem};
    let disk = Disk::new(LARGE, 16);
    let dir = tempfile::tempdir().unwrap();
    let write = || {
        for (name, image) in NAMES.iter().zip(&disk.images) {
            let file = HostFileSystem
                .open(&dir.path().join(name), &Access::write())
                .or_else(|_| HostFileSystem.create_new(&dir.path().join(name)));
            let file = file.unwrap();
            file.set_len(0).unwrap();
            file.write_at(&image.to_vec(), 0).unwrap();
        }
    };
    for args in [
        &["check", "top"][..],
        &["map", "--output=json", "top"],
        &["map", "top"],
        &["chain", "top"],
        &["measure", "-O", "qcow2", "top"],
        &["compare", "top", "other"],
        &["commit", "--dry-run", "top"],
        &["commit", "top"],
        &["commit", "-b", "base", "top"],
        &["pull", "-b", "base", "top"],
        &["pull", "top"],
        &["rebase", "-b", "", "top"],
        &["rebase", "-b", "other", "-F", "qcow2", "top"],
        &["rebase", "--drop-equal", "-b", "base", "-F", "qcow2", "top"],
        &["convert", "-O", "qcow2", "-m", "2", "top", "copy"],
        &["convert", "-O", "qcow2", "-C", "top", "copy"],
        &["resize", "--shrink", "top", "60T"],
    ] {
        write();
        let mut shell = std::process::Command::new("sh");
        shell.args(["-c", "ulimit -v 65536; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_qcow2-chain")]);
        let out = shell.args(args).current_dir(dir.path()).output().unwrap();
        let code = i32::from(args[0] == "compare");
        assert_eq!(out.status.code(), Some(code), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    }
}
