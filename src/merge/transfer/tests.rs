use super::super::Error;
use super::*;
use crate::storage::MemoryStorage;

/// Lets everything through, in steps, until it is told to stop.
struct Open {
    step: u64,
    stop_after: u64,
    passed: u64,
}

impl Gate for Open {
    fn step(&self, most: u64) -> u64 {
        self.step.min(most)
    }
    fn pass(&mut self, len: u64, _carried: &Carried) -> Result<()> {
        self.passed += len;
        if self.passed > self.stop_after { Err(Error::Cancelled) } else { Ok(()) }
    }
}

fn open() -> Open {
    Open { step: u64::MAX, stop_after: u64::MAX, passed: 0 }
}

/// Memory that copies by itself, and fails where it is told to.
#[derive(Debug)]
struct Sharing {
    inner: MemoryStorage,
    copies: bool,
    fails_at: u64,
}

impl Storage for Sharing {
    fn name(&self) -> &'static str {
        "sharing"
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> storage::Result<()> {
        self.inner.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> storage::Result<()> {
        if (offset..offset + buf.len() as u64).contains(&self.fails_at) {
            return Err(storage::Error::unsupported("sharing", "this write"));
        }
        self.inner.write_at(buf, offset)
    }
    fn len(&self) -> storage::Result<u64> {
        self.inner.len()
    }
    fn set_len(&self, len: u64) -> storage::Result<()> {
        self.inner.set_len(len)
    }
    fn sync(&self) -> storage::Result<()> {
        self.inner.sync()
    }
    fn prefers_copy_from(&self, _source: &dyn Storage) -> bool {
        true
    }
    fn copy_from(&self, source: &dyn Storage, from: u64, to: u64, len: u64) -> storage::Result<u64> {
        if !self.copies {
            return Err(storage::Error::unsupported("sharing", "copying"));
        }
        // By parts, as a kernel may.
        let len = len.min(100_000);
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        source.read_at(&mut bytes, from)?;
        self.inner.write_at(&bytes, to).map(|()| len)
    }
}

fn source() -> MemoryStorage {
    let bytes: Vec<u8> = (0..8_u32 << 20).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect();
    MemoryStorage::with_bytes("source", bytes)
}

/// All of the source, cluster by cluster, in another order, with gaps in the target.
fn scattered(len: u64) -> Vec<Run> {
    let count = len >> 16;
    let run = |number: u64| {
        let to = ((number * 5) % count) * 65536 + (number % 3) * (len + 65536);
        Run { layer: 0, from: number << 16, to, len: 65536, fresh: number.is_multiple_of(2) }
    };
    (0..count).map(run).collect()
}

fn assert_carried(source: &MemoryStorage, target: &MemoryStorage, runs: &[Run]) {
    let (source, target) = (source.to_vec(), target.to_vec());
    let part = |bytes: &[u8], at: u64, len: u64| {
        bytes[usize::try_from(at).unwrap()..usize::try_from(at + len).unwrap()].to_vec()
    };
    for run in runs {
        assert_eq!(part(&source, run.from, run.len), part(&target, run.to, run.len), "{run:?}");
    }
}

#[test]
fn runs_arrive_by_one_thread_and_by_several() {
    let source = source();
    for len in [1 << 20, 8 << 20] {
        let target = MemoryStorage::new("target");
        let runs = scattered(len);
        let carried = Carried::default();
        Transfer::new(vec![&source], &target).carry(&runs, &mut open(), &carried).unwrap();
        assert_carried(&source, &target, &runs);
        assert_eq!(carried.bytes(), (len, 0));
        let cached: u64 = carried.take_cached().iter().map(|cached| cached.end - cached.start).sum();
        assert_eq!((cached, carried.take_cached().len()), (len / 2, 0), "every other run is fresh");
    }
}

/// Notes its calls.
#[derive(Debug, Default)]
struct Noting(Mutex<Vec<(&'static str, u64, usize)>>);

impl Noting {
    fn note(&self, call: &'static str, at: u64, len: usize) {
        self.0.lock().unwrap().push((call, at, len));
    }
}

impl Storage for Noting {
    fn name(&self) -> &'static str {
        "noting"
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> storage::Result<()> {
        self.note("read", offset, buf.len());
        Ok(())
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> storage::Result<()> {
        self.note("write", offset, buf.len());
        Ok(())
    }
    fn write_bulk_at(&self, buf: &[u8], offset: u64) -> storage::Result<()> {
        assert_eq!(buf.as_ptr().align_offset(ALIGNMENT), 0, "the start of a piece is aligned");
        self.note("bulk", offset, buf.len());
        Ok(())
    }
    fn len(&self) -> storage::Result<u64> {
        Ok(0)
    }
    fn set_len(&self, _len: u64) -> storage::Result<()> {
        Ok(())
    }
    fn sync(&self) -> storage::Result<()> {
        Ok(())
    }
}

#[test]
fn what_is_adjacent_is_read_and_written_at_once() {
    let (source, target) = (Noting::default(), Noting::default());
    let run = |from, to, len, fresh| Run { layer: 0, from, to, len, fresh };
    let runs = [
        run(0, 9000, 1000, true),
        run(1000, 10_000, 100, true),
        run(1100, 20_000, 900, false),
        run(5000, 20_900, 50, false),
        run(5050, 40_000, 4000, false),
    ];
    let carried = Carried::default();
    let mut transfer = Transfer::new(vec![&source], &target);
    transfer.spent = 0..1;
    transfer.carry(&runs, &mut Open { step: 4050, ..open() }, &carried).unwrap();
    let reads = source.0.into_inner().unwrap();
    assert_eq!(reads, [("read", 0, 2000), ("read", 5000, 2050), ("read", 7050, 2000)]);
    let writes = target.0.into_inner().unwrap();
    let expected = [("bulk", 9000, 1100), ("write", 20_000, 950), ("write", 40_000, 2000), ("write", 42_000, 2000)];
    assert_eq!(writes, expected);
    let cached = carried.take_cached();
    let sum = |layer| cached.iter().filter(|c| c.layer == layer).map(|c| c.end - c.start).sum::<u64>();
    assert_eq!((sum(None), sum(Some(0))), (1100, 6050), "what is overwritten stays with the cache");
}

#[test]
fn the_kernel_copies_what_it_can() {
    let source = source();
    for (copies, in_kernel) in [(true, 8 << 20), (false, 0)] {
        let target = Sharing { inner: MemoryStorage::new("target"), copies, fails_at: u64::MAX };
        let runs = scattered(8 << 20);
        let carried = Carried::default();
        Transfer::new(vec![&source], &target).carry(&runs, &mut open(), &carried).unwrap();
        assert_carried(&source, &target.inner, &runs);
        assert_eq!(carried.bytes(), ((8 << 20) - in_kernel, in_kernel));
    }
}

#[test]
fn a_failure_of_one_thread_ends_all() {
    let source = source();
    for len in [1 << 20, 8 << 20] {
        let runs = scattered(len);
        let target = Sharing { inner: MemoryStorage::new("target"), copies: false, fails_at: runs[9].to + 1 };
        let failed = Transfer::new(vec![&source], &target).carry(&runs, &mut open(), &Carried::default());
        assert!(matches!(failed, Err(Error::Image(_))), "{failed:?}");
    }
}

#[test]
fn a_wish_to_stop_is_heard_between_pieces() {
    let source = source();
    for len in [1 << 20, 8 << 20] {
        let target = MemoryStorage::new("target");
        let mut gate = Open { step: 65536, stop_after: 300_000, passed: 0 };
        let carried = Carried::default();
        let stopped = Transfer::new(vec![&source], &target).carry(&scattered(len), &mut gate, &carried);
        assert!(matches!(stopped, Err(Error::Cancelled)), "{stopped:?}");
        assert!(carried.bytes().0 <= 300_000);
    }
}
