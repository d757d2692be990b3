//! Our own writes to images that QEMU made, against a model and against QEMU.

use std::path::Path;
use std::sync::Arc;

use qcow2_chain::format::GuestOffset;
use qcow2_chain::image::{Backing, CreateOptions, ExtentKind, Image, OpenOptions, ResizeOptions, Result};
use qcow2_chain::storage::MemoryStorage;

use crate::support::qemu::Qemu;
use crate::support::recipe::{RandomImage, Shape};
use crate::support::rng::{Rng, cases, trace};

/// A backing file that is a slice; zeroes behind it.
struct Bytes<'a>(&'a [u8]);

impl Backing for Bytes<'_> {
    fn read_at(&self, buf: &mut [u8], offset: GuestOffset) -> Result<()> {
        buf.fill(0);
        let rest = self.0.get(usize::try_from(offset.get()).unwrap()..).unwrap_or_default();
        let len = rest.len().min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
        Ok(())
    }
}

/// An image in memory, its model, and what lies beneath it.
struct Subject<'a> {
    image: Image,
    storage: Arc<MemoryStorage>,
    model: Vec<u8>,
    backing: Option<&'a [u8]>,
    v2: bool,
    log: Vec<String>,
}

impl Subject<'_> {
    fn write(&mut self, rng: &mut Rng) {
        let range = rng.range(self.model.len() as u64, 512);
        let (at, end) = (usize::try_from(range.start).unwrap(), usize::try_from(range.end).unwrap());
        let (pattern, offset) = (rng.pattern(), GuestOffset::new(range.start));
        self.log.push(format!("write {range:x?} {pattern:#x}"));
        self.model[at..end].fill(pattern);
        let data = vec![pattern; end - at];
        match self.backing {
            Some(backing) => self.image.write_at_over(&data, offset, &Bytes(backing)),
            None => self.image.write_at(&data, offset),
        }
        .expect("write");
    }

    fn zero(&mut self, rng: &mut Rng) {
        let range = rng.range(self.model.len() as u64, 512);
        let (at, end) = (usize::try_from(range.start).unwrap(), usize::try_from(range.end).unwrap());
        self.log.push(format!("zero {range:x?}"));
        self.model[at..end].fill(0);
        let (offset, len) = (GuestOffset::new(range.start), range.end - range.start);
        match self.backing {
            Some(backing) => self.image.write_zeroes_at_over(offset, len, &Bytes(backing)),
            None => self.image.write_zeroes_at(offset, len),
        }
        .expect("zero");
    }

    fn discard(&mut self, rng: &mut Rng) {
        let size = self.image.geometry().cluster_size();
        let end_of_disk = self.model.len() as u64;
        let range = rng.range(end_of_disk, size);
        self.log.push(format!("discard {range:x?}"));
        self.image.discard_at(GuestOffset::new(range.start), range.end - range.start).expect("discard");
        let start = range.start.next_multiple_of(size);
        let end = if range.end == end_of_disk { end_of_disk } else { range.end / size * size };
        if start < end && !(self.v2 && self.backing.is_some()) {
            self.model[usize::try_from(start).unwrap()..usize::try_from(end).unwrap()].fill(0);
        }
    }

    fn resize(&mut self, rng: &mut Rng) {
        if self.v2 && self.image.header().header.nb_snapshots > 0 {
            return;
        }
        let size = rng.within(1..2 * self.model.len() as u64 / 512 + 2) * 512;
        self.log.push(format!("resize {size:#x}"));
        let options = ResizeOptions::default().with_shrink(true);
        let backing = self.backing.unwrap_or_default();
        self.image.resize_over(size, &options, &Bytes(backing), backing.len() as u64).expect("resize");
        self.model.resize(usize::try_from(size).unwrap(), 0);
    }

    fn read(&self) -> Vec<u8> {
        let mut buf = vec![0xee; self.model.len()];
        let mut holes = Vec::new();
        self.image.read_present(&mut buf, GuestOffset::ZERO, &mut holes).expect("read");
        for (at, len) in holes {
            Bytes(self.backing.unwrap_or_default())
                .read_at(&mut buf[at..at + len], GuestOffset::new(at as u64))
                .expect("backing");
        }
        buf
    }

    fn reopen(&mut self) {
        self.log.push("reopen".to_owned());
        self.image.flush().expect("flush");
        self.image =
            Image::open(self.storage.clone(), &OpenOptions::default().with_write(true)).expect("the image opens again");
    }

    /// The extents are in order, disjoint, and cover the disk.
    fn check_extents(&self) {
        let mut at = 0;
        let mut last = None;
        for extent in self.image.extents(0..u64::MAX) {
            let extent = extent.expect("extents");
            assert_eq!(extent.guest.get(), at);
            assert!(extent.len > 0);
            if matches!(extent.kind, ExtentKind::Unallocated | ExtentKind::Compressed) {
                assert_ne!(last, Some(extent.kind), "not coalesced at {at:#x}");
            }
            last = Some(extent.kind);
            at += extent.len;
        }
        assert_eq!(at, self.model.len() as u64);
    }
}

fn check_writes(qemu: Qemu, rng: &mut Rng, dir: &Path, original: &RandomImage, backing: Option<&[u8]>) {
    let storage = Arc::new(MemoryStorage::with_bytes("image", std::fs::read(&original.path).unwrap()));
    let image = Image::open(storage.clone(), &OpenOptions::default().with_write(true)).expect("the image opens");
    let v2 = original.shape.compat == "0.10";
    let mut subject = Subject { image, storage, model: original.model.clone(), backing, v2, log: Vec::new() };
    assert!(subject.read() == subject.model, "what QEMU wrote: {original}");
    for _ in 0..rng.within(1..40) {
        match rng.within(0..20) {
            0..9 => subject.write(rng),
            9..13 => subject.zero(rng),
            13..16 => subject.discard(rng),
            16 => subject.resize(rng),
            17 => subject.reopen(),
            18 => subject.image.flush().expect("flush"),
            _ => assert!(subject.read() == subject.model, "{original}{:#?}", subject.log),
        }
    }
    subject.check_extents();
    assert!(subject.read() == subject.model, "{original}{:#?}", subject.log);
    subject.image.flush().expect("flush");
    let path = dir.join("result.qcow2");
    std::fs::write(&path, subject.storage.to_vec()).unwrap();
    let check = qemu.check(&path, None);
    assert_eq!(check.code, 0, "{check:?} {original}{:#?}", subject.log);
    assert!(qemu.content(&path, None) == subject.model, "QEMU reads otherwise: {original}{:#?}", subject.log);
    for (name, model) in &original.snapshots {
        // QEMU shows a snapshot in the image's present size.
        let shown = qemu.content(&path, Some(name));
        let len = shown.len().min(model.len());
        assert!(shown[..len] == model[..len], "snapshot {name}: {original}{:#?}", subject.log);
    }
}

#[test]
fn what_we_write_qemu_reads() {
    let Some(qemu) = Qemu::find() else { return };
    cases("own writes", 120, |rng| {
        let dir = tempfile::tempdir().unwrap();
        let mut base = RandomImage::create(qemu, dir.path().join("base.qcow2"), Shape::random(rng));
        base.apply_random(qemu, rng, 8);
        trace(&base);
        if rng.chance(1, 2) {
            check_writes(qemu, rng, dir.path(), &base, None);
            return;
        }
        let mut top = RandomImage::create_over(qemu, dir.path().join("top.qcow2"), Shape::random(rng), &base);
        top.apply_random(qemu, rng, 8);
        trace(&top);
        check_writes(qemu, rng, dir.path(), &top, Some(&base.model));
    });
}

/// Counts what is asked of a backing file of zeroes.
#[derive(Default)]
struct Counted(std::sync::Mutex<Vec<(u64, usize)>>);

impl Backing for Counted {
    fn read_at(&self, buf: &mut [u8], offset: GuestOffset) -> Result<()> {
        self.0.lock().unwrap().push((offset.get(), buf.len()));
        buf.fill(0xbb);
        Ok(())
    }
}

#[test]
fn a_small_write_into_an_overlay_reads_its_backing_file_once() {
    let options = CreateOptions::new(1 << 20).with_backing("base", "qcow2");
    let image = Image::create(Arc::new(MemoryStorage::new("overlay")), &options).unwrap();
    let backing = Counted::default();
    image.write_at_over(&[0x11; 4096], GuestOffset::new(0x1_2000), &backing).unwrap();
    assert_eq!(std::mem::take(&mut *backing.0.lock().unwrap()), [(0x1_0000, 0x1_0000)]);
    // At the cluster's edge only the rest is needed.
    image.write_at_over(&[0x22; 4096], GuestOffset::new(0x2_0000), &backing).unwrap();
    assert_eq!(std::mem::take(&mut *backing.0.lock().unwrap()), [(0x2_1000, 0xf000)]);
    let mut found = vec![0; 0x2_0000];
    image.read_at(&mut found, GuestOffset::new(0x1_0000)).unwrap();
    let mut expected = vec![0xbb; 0x2_0000];
    expected[0x2000..0x3000].fill(0x11);
    expected[0x1_0000..0x1_1000].fill(0x22);
    assert!(found == expected);
}
