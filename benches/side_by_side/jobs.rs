//! What our side and the floors do as processes of their own, where it is nothing that the program does.

use std::error::Error;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::Path;

use qcow2_chain::chain::Chain;
use qcow2_chain::format::GuestOffset;

use qcow2_chain::storage::{Access, FileStorage, Storage};

use crate::images::{MIB, open};

const PAGE: usize = 4096;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Does one job. Files are in the current directory.
pub(crate) fn run(args: &[&str]) -> Result<()> {
    match args {
        ["read", image, requests @ ..] => {
            let disk = open(Path::new(image), 0)?;
            let size = disk.virtual_size();
            read(&|buf, offset| Ok(disk.read_at(buf, GuestOffset::new(offset))?), size, &Requests::parse(requests)?)
        }
        ["write", image, requests @ ..] => {
            let disk = open(Path::new(image), 1)?;
            write(&disk, &Requests::parse(requests)?)?;
            Ok(disk.close()?)
        }
        ["pread", file, requests @ ..] => {
            let file = FileStorage::open(file, &Access::read())?;
            let size = file.len()? / MIB * MIB;
            read(&|buf, offset| Ok(file.read_at(buf, offset)?), size, &Requests::parse(requests)?)
        }
        ["agent", shape] => crate::vm::agent(shape),
        ["pread-all", files @ ..] => files.iter().try_for_each(|file| pread_all(file)),
        ["write-and-sync", mib] => {
            let mut file = File::create_new("floor")?;
            let mut memory = vec![0x5a; MIB as usize + PAGE];
            let chunk = aligned(&mut memory, MIB as usize);
            for _ in 0..mib.parse()? {
                file.write_all(chunk)?;
            }
            Ok(file.sync_data()?)
        }
        ["copy-in-kernel", from] => {
            let mut file = File::create_new("floor")?;
            std::io::copy(&mut File::open(from)?, &mut file)?;
            Ok(file.sync_data()?)
        }
        other => Err(format!("no job {other:?}").into()),
    }
}

/// Memory as a guest's is: the kernel copies half as fast again to where pages begin.
fn aligned(memory: &mut [u8], len: usize) -> &mut [u8] {
    let skip = memory.as_ptr().align_offset(PAGE).min(PAGE);
    &mut memory[skip..skip + len]
}

/// Requests as `qemu-img bench` makes them: number `i` lies at `i * step`, modulo the disk's size.
struct Requests {
    len: usize,
    count: u64,
    step: u64,
    threads: u64,
}

impl Requests {
    fn parse(args: &[&str]) -> Result<Self> {
        let [len, count, step, threads] = args else { return Err("BYTES COUNT STEP THREADS are wanted".into()) };
        Ok(Self { len: len.parse()?, count: count.parse()?, step: step.parse()?, threads: threads.parse()? })
    }

    /// Where the requests of one thread lie: every so manieth of all.
    fn offsets(&self, thread: u64, size: u64) -> impl Iterator<Item = u64> {
        let at = |number: u64| (u128::from(number) * u128::from(self.step) % u128::from(size)) as u64;
        let (count, step) = (self.count.saturating_sub(thread).div_ceil(self.threads), at(self.threads));
        std::iter::successors(Some(at(thread)), move |offset| Some((offset + step) % size)).take(count as usize)
    }
}

fn read(read: &(dyn Fn(&mut [u8], u64) -> Result<()> + Sync), size: u64, requests: &Requests) -> Result<()> {
    let one = |thread| {
        let mut memory = vec![0; requests.len + PAGE];
        let buf = aligned(&mut memory, requests.len);
        requests.offsets(thread, size).try_for_each(|offset| read(buf, offset)).map_err(|error| error.to_string())
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..requests.threads).map(|thread| scope.spawn(move || one(thread))).collect();
        one(0)?;
        others.into_iter().try_for_each(|other| other.join().map_err(|_| "a thread failed")?.map_err(Into::into))
    })
}

fn write(disk: &Chain, requests: &Requests) -> Result<()> {
    let mut memory = vec![0x5a; requests.len + PAGE];
    let buf = aligned(&mut memory, requests.len);
    for offset in requests.offsets(0, disk.virtual_size()) {
        disk.write_at(buf, GuestOffset::new(offset))?;
    }
    Ok(())
}

fn pread_all(file: &str) -> Result<()> {
    let mut file = File::open(file)?;
    let mut memory = vec![0; MIB as usize + PAGE];
    let buf = aligned(&mut memory, MIB as usize);
    while file.read(buf)? > 0 {}
    Ok(())
}
