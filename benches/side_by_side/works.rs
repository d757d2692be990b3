//! What is measured: on which images, and what each side is told.

use crate::images::{GIB, Images, MIB, TIB};

/// Which program a side is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Program {
    QemuImg,
    QemuIo,
    /// The program of this package.
    Ours,
    /// The harness itself: our library, or a floor; see [`crate::jobs::run`].
    Job,
    /// The harness itself, running QEMU's tools as an agent does.
    Agent,
    /// What `--peers` names.
    Peer,
}

/// One of those that do a work in turns.
pub(crate) struct Side {
    pub(crate) name: &'static str,
    pub(crate) program: Program,
    pub(crate) args: Vec<String>,
}

/// What a target compares.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Target {
    /// The first side's time by ours is at least this.
    Qemu(f64),
    /// The best peer's time by ours is at least 1.
    Peers,
}

/// One line of the table of targets.
pub(crate) struct Work {
    pub(crate) name: String,
    pub(crate) images: Images,
    /// The files that the work changes, the beginning of each name: each run gets fresh copies.
    pub(crate) changes: &'static [&'static str],
    pub(crate) sides: Vec<Side>,
    pub(crate) target: Option<Target>,
    /// The bytes that it moves: then its system calls are counted.
    pub(crate) moves: Option<u64>,
}

/// The file that works make anew, removed after each run.
pub(crate) const MADE: [&str; 2] = ["made", "floor"];

impl Work {
    pub(crate) fn new(name: impl Into<String>, images: Images, target: Option<Target>) -> Self {
        Self { name: name.into(), images, changes: &[], sides: Vec::new(), target, moves: None }
    }

    pub(crate) fn changing(mut self, files: &'static [&'static str]) -> Self {
        self.changes = files;
        self
    }

    pub(crate) fn moving(mut self, mib: u64) -> Self {
        self.moves = Some(mib * MIB);
        self
    }

    pub(crate) fn side(mut self, name: &'static str, program: Program, args: &[&str]) -> Self {
        self.sides.push(Side { name, program, args: args.iter().map(|&arg| arg.to_owned()).collect() });
        self
    }

    /// Both are told the same.
    fn both(self, args: &[&str]) -> Self {
        self.side("qemu-img", Program::QemuImg, args).side("ours", Program::Ours, args)
    }

    pub(crate) fn floor(self, job: &[&str]) -> Self {
        self.side("floor", Program::Job, job)
    }

    /// Reads or writes the same requests: `qemu-img bench` with the depth that it has by default, ours in so many threads,
    /// peers in one.
    fn requests(
        self,
        write: bool,
        image: &str,
        [len, count, step]: [u64; 3],
        threads: u64,
        peers: &[&'static str],
    ) -> Self {
        let [len, count, step] = [len, count, step].map(|number| number.to_string());
        let mut bench = vec!["bench", "-q", "-f", "qcow2", "-t", "writeback", "-s", &len, "-c", &count, "-S", &step];
        bench.extend(write.then_some("-w").into_iter().chain([image]));
        let direction = if write { "write" } else { "read" };
        let threads = threads.to_string();
        let mut work = self.side("qemu-img bench", Program::QemuImg, &bench).side(
            "ours",
            Program::Job,
            &[direction, image, &len, &count, &step, &threads],
        );
        for &peer in peers {
            work = work.side(peer, Program::Peer, &[peer, direction, image, &len, &count, &step]);
        }
        work
    }
}

const PEERS: &[&str] = &["imago", "qcow2-rs"];

/// All works, for so many megabytes of data; those with the same images stand together.
pub(crate) fn all(mib: u64, quick: bool) -> Vec<Work> {
    let mut works = merges(mib);
    works.extend(sparse(quick));
    works.extend(metadata(mib, quick));
    works.extend(conversions(mib));
    works.extend(requests(mib));
    works.extend(crate::vm::works(mib));
    works
}

fn merges(mib: u64) -> Vec<Work> {
    let floor = mib.to_string();
    let twice = Some(Target::Qemu(2.0));
    vec![
        Work::new("commit into an empty base", Images::OverEmpty(mib), twice)
            .changing(&["base.qcow2", "top.qcow2"])
            .moving(mib)
            .both(&["commit", "-q", "-f", "qcow2", "top.qcow2"])
            .floor(&["write-and-sync", &floor]),
        Work::new("commit into a full base", Images::TwoLayers(mib), twice)
            .changing(&["base.qcow2", "one.qcow2"])
            .moving(mib)
            .both(&["commit", "-q", "-f", "qcow2", "one.qcow2"])
            .floor(&["write-and-sync", &floor]),
        Work::new("commit -b over two layers", Images::TwoLayers(mib), twice)
            .changing(&["base.qcow2", "mid.qcow2", "top.qcow2"])
            .moving(2 * mib - mib / 4)
            .both(&["commit", "-q", "-f", "qcow2", "-b", "base.qcow2", "top.qcow2"])
            .floor(&["write-and-sync", &(2 * mib - mib / 4).to_string()]),
        Work::new("flatten in place (rebase -b \"\")", Images::TwoLayers(mib), twice)
            .changing(&["one.qcow2"])
            .moving(mib + mib / 2)
            .both(&["rebase", "-q", "-f", "qcow2", "-b", "", "one.qcow2"])
            .floor(&["write-and-sync", &(mib + mib / 2).to_string()]),
        Work::new("safe rebase past one of two layers", Images::TwoLayers(mib), Some(Target::Qemu(4.0)))
            .changing(&["top.qcow2"])
            .moving(mib - mib / 4)
            .both(&["rebase", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"])
            .floor(&["write-and-sync", &(mib - mib / 4).to_string()]),
    ]
}

/// Cost follows the data, not the virtual size. `qemu-img rebase` takes a minute for 1 TiB, so that it is not asked for more.
fn sparse(quick: bool) -> Vec<Work> {
    let large = if quick { 16 * GIB } else { TIB };
    let mut works = Vec::new();
    for (size, what) in
        [(GIB, "1 GiB".to_owned()), (large, format!("{} GiB", large / GIB)), (64 * TIB, "64 TiB".to_owned())]
    {
        let target = (size == TIB).then_some(Target::Qemu(1000.0));
        let on = |name: &str, target, changes, args: &[&str]| {
            let work =
                Work::new(format!("{name}, 2 clusters in {what}"), Images::Sparse(size), target).changing(changes);
            if size > TIB { work.side("ours", Program::Ours, args) } else { work.both(args) }
        };
        works.push(on("flatten", target, &["top.qcow2"], &["rebase", "-q", "-f", "qcow2", "-b", "", "top.qcow2"]));
        works.push(on("commit", None, &["base.qcow2", "mid.qcow2"], &["commit", "-q", "-f", "qcow2", "mid.qcow2"]));
        let rebase = ["rebase", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"];
        works.push(on("safe rebase", None, &["top.qcow2"], &rebase));
    }
    works
}

fn metadata(mib: u64, quick: bool) -> Vec<Work> {
    let size = if quick { TIB / 8 } else { 2 * TIB };
    let what = format!("all metadata of {} GiB", size / GIB);
    let tables = (size / (64 << 10) * 8 / MIB).to_string();
    let requests = [&(1 << 20).to_string(), tables.as_str(), &(1 << 20).to_string(), "1"];
    let floor: Vec<&str> = ["pread", "top.qcow2"].into_iter().chain(requests.iter().copied()).collect();
    vec![
        Work::new(format!("check, {what}"), Images::Metadata(size), Some(Target::Qemu(5.0)))
            .both(&["check", "-q", "-f", "qcow2", "top.qcow2"])
            .floor(&floor),
        Work::new(format!("map, {what}"), Images::Metadata(size), Some(Target::Qemu(5.0)))
            .both(&["map", "-f", "qcow2", "--output=json", "top.qcow2"])
            .floor(&floor),
        Work::new("compare, equal data", Images::Twins(2 * mib), Some(Target::Qemu(2.0)))
            .both(&["compare", "-q", "-f", "qcow2", "-F", "qcow2", "top.qcow2", "twin.qcow2"])
            .floor(&["pread-all", "top.qcow2", "twin.qcow2"]),
    ]
}

/// `qemu-img convert` does not sync what it made unless it is told to: `-t writeback`.
fn conversions(mib: u64) -> Vec<Work> {
    let data = 3 * mib - mib / 8;
    let plain = ["convert", "-q", "-t", "writeback", "-f", "qcow2", "-O", "qcow2"];
    let convert = |more: &[&str], from| -> Vec<String> {
        plain.iter().chain(more).chain([&from, &MADE[0]]).map(|&arg| arg.to_owned()).collect()
    };
    let work = |name: &str, images, more: &[&str], from| {
        let args = convert(more, from);
        Work::new(name, images, None).both(&args.iter().map(String::as_str).collect::<Vec<_>>())
    };
    vec![
        work("convert a chain of 3", Images::TwoLayers(mib), &[], "top.qcow2")
            .moving(data)
            .floor(&["write-and-sync", &data.to_string()]),
        work("convert -C, a chain of 3", Images::TwoLayers(mib), &["-C"], "top.qcow2")
            .moving(data)
            .floor(&["write-and-sync", &data.to_string()]),
        work("convert -c, deflate", Images::Text(mib / 2), &["-c"], "text.qcow2"),
        work("convert -c, zstd", Images::Text(mib / 2), &["-c", "-o", "compression_type=zstd"], "text.qcow2"),
    ]
}

/// An odd number of blocks near the golden section of a disk whose blocks are a power of two: visits each once, far apart.
fn scattering(size: u64, block: u64) -> u64 {
    // `qemu-img bench` takes a step below 2 GiB.
    (((size.min(2 * GIB) as f64 * 0.618) as u64 / block) | 1) * block
}

fn requests(mib: u64) -> Vec<Work> {
    const K4: u64 = 4 << 10;
    const K64: u64 = 64 << 10;
    let qemu = |ratio| Some(Target::Qemu(ratio));
    let scattered = |size, count| [K4, count, scattering(size, K4)];
    let mut works = vec![
        one_read("open a sole image and read 4 KiB", Images::Full(mib)),
        one_read("open a chain of 100 layers and read 4 KiB", Images::Deep(100, mib / 4)),
        Work::new("random 4 KiB reads over 20 layers", Images::Deep(20, mib / 2), qemu(1.0)).requests(
            false,
            "top.qcow2",
            scattered(mib / 2 * MIB, 64 * mib),
            1,
            PEERS,
        ),
        Work::new("sequential read, 1 MiB", Images::Full(mib), Some(Target::Peers))
            .requests(false, "base.qcow2", [MIB, 4 * mib, MIB], 1, PEERS)
            .floor(&["pread", "base.qcow2", &MIB.to_string(), &(4 * mib).to_string(), &MIB.to_string(), "1"]),
    ];
    let [len, count, step] = scattered(mib * MIB, 256 * mib);
    let floor = ["pread", "base.qcow2", &len.to_string(), &count.to_string(), &step.to_string(), "1"];
    works.extend([
        Work::new("random 4 KiB reads", Images::Full(mib), Some(Target::Peers))
            .requests(false, "base.qcow2", [len, count, step], 1, PEERS)
            .floor(&floor),
        Work::new("64 KiB sequential writes into a fresh overlay", Images::Full(mib), Some(Target::Peers))
            .changing(&["top.qcow2"])
            .requests(true, "top.qcow2", [K64, mib * 16, K64], 1, PEERS)
            .floor(&["write-and-sync", &mib.to_string()]),
        Work::new("4 KiB random writes into a fresh overlay", Images::Full(mib), Some(Target::Peers))
            .changing(&["top.qcow2"])
            .requests(true, "top.qcow2", scattered(mib * MIB, mib * 8), 1, PEERS)
            .floor(&["write-and-sync", &(mib / 2).to_string()]),
        Work::new("read of a deflate image, two threads", Images::Text(mib / 2), qemu(1.5)).requests(
            false,
            "deflate.qcow2",
            [MIB, mib / 2, MIB],
            2,
            PEERS,
        ),
        Work::new("read of a zstd image, two threads", Images::Text(mib / 2), qemu(1.5)).requests(
            false,
            "zstd.qcow2",
            [MIB, mib / 2, MIB],
            2,
            &[],
        ),
    ]);
    works
}

/// What opening costs: one read of the guest's first block, by whole processes.
fn one_read(name: &str, images: Images) -> Work {
    Work::new(name, images, Some(Target::Qemu(1.0)))
        .side("qemu-io", Program::QemuIo, &["-r", "-f", "qcow2", "-c", "read -q 0 4k", "top.qcow2"])
        .side("ours", Program::Job, &["read", "top.qcow2", "4096", "1", "4096", "1"])
}

/// The works for a file system that shares blocks between files.
pub(crate) fn sharing(mib: u64) -> Vec<Work> {
    let floor = |file| ["copy-in-kernel", file];
    let work = |name: &str, images, target| Work::new(name, images, Some(Target::Qemu(target)));
    vec![
        work("shared: commit into an empty base", Images::OverEmpty(mib), 100.0)
            .changing(&["base.qcow2", "top.qcow2"])
            .moving(mib)
            .both(&["commit", "-q", "-f", "qcow2", "top.qcow2"])
            .floor(&floor("top.qcow2")),
        work("shared: commit into a full base", Images::TwoLayers(mib), 20.0)
            .changing(&["base.qcow2", "one.qcow2"])
            .moving(mib)
            .both(&["commit", "-q", "-f", "qcow2", "one.qcow2"])
            .floor(&floor("one.qcow2")),
        work("shared: flatten in place (rebase -b \"\")", Images::TwoLayers(mib), 100.0)
            .changing(&["one.qcow2"])
            .moving(mib + mib / 2)
            .both(&["rebase", "-q", "-f", "qcow2", "-b", "", "one.qcow2"])
            .floor(&floor("base.qcow2")),
        work("shared: convert -C, a chain of 3", Images::TwoLayers(mib), 5.0)
            .moving(3 * mib - mib / 8)
            .both(&["convert", "-q", "-C", "-t", "writeback", "-f", "qcow2", "-O", "qcow2", "top.qcow2", MADE[0]])
            .floor(&floor("base.qcow2")),
    ]
}
