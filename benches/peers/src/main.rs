//! Other qcow2 crates, each as a process that serves the requests which the side-by-side harness gives to ours.
//!
//! ```text
//! cargo build --release --manifest-path benches/peers/Cargo.toml
//! qcow2-chain-peers CRATE read|write IMAGE BYTES COUNT STEP
//! ```
//! Request number `i` lies at `i * STEP` modulo the disk's size, as in `qemu-img bench`; what is written is durable at the
//! end. Both crates do their I/O by plain system calls here, in one thread.

use std::error::Error;
use std::path::Path;

use futures::executor::block_on;
use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};
use qcow2_rs::dev::Qcow2DevParams;
use qcow2_rs::helpers::Qcow2IoBuf;
use qcow2_rs::qcow2_default_params;
use qcow2_rs::utils::qcow2_setup_dev_sync;

type Done = Result<(), Box<dyn Error>>;

/// The requests of one run.
struct Requests {
    write: bool,
    len: usize,
    count: u64,
    step: u64,
}

impl Requests {
    fn offsets(&self, size: u64) -> impl Iterator<Item = u64> {
        let step = self.step;
        (0..self.count).scan(0, move |next, _| {
            let offset = *next;
            *next = (offset + step) % size;
            Some(offset)
        })
    }
}

fn main() -> Done {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [peer, direction, image, len, count, step] = args.as_slice() else {
        return Err("usage: qcow2-chain-peers imago|qcow2-rs read|write IMAGE BYTES COUNT STEP".into());
    };
    let write = match direction.as_str() {
        "read" => false,
        "write" => true,
        other => return Err(format!("neither read nor write: {other}").into()),
    };
    let requests = Requests { write, len: len.parse()?, count: count.parse()?, step: step.parse()? };
    match peer.as_str() {
        "imago" => with_imago(Path::new(image), &requests),
        "qcow2-rs" => with_qcow2_rs(Path::new(image), &requests),
        other => Err(format!("no peer {other}").into()),
    }
}

fn with_imago(image: &Path, requests: &Requests) -> Done {
    let image = Qcow2::<File>::builder_path(image).write(requests.write).open(PermissiveImplicitOpenGate::default())?;
    let disk = FormatAccess::new(image);
    // Memory that begins with a page, as in the harness.
    let mut memory = vec![0x5a; requests.len + 4096];
    let skip = memory.as_ptr().align_offset(4096).min(4096);
    let buf = &mut memory[skip..skip + requests.len];
    for offset in requests.offsets(disk.size()) {
        if requests.write {
            disk.write(&*buf, offset)?;
        } else {
            disk.read(&mut *buf, offset)?;
        }
    }
    if requests.write {
        disk.flush()?;
        disk.sync()?;
    }
    Ok(())
}

fn with_qcow2_rs(image: &Path, requests: &Requests) -> Done {
    let params = qcow2_default_params!(!requests.write, false);
    let disk = qcow2_setup_dev_sync(image, &params).map_err(text)?;
    let mut buf = Qcow2IoBuf::<u8>::new(requests.len);
    buf.fill(0x5a);
    block_on(async {
        disk.qcow2_prep_io().await?;
        for offset in requests.offsets(disk.info.virtual_size()) {
            if requests.write {
                disk.write_at(&buf, offset).await?;
            } else {
                disk.read_at(&mut buf, offset).await?;
            }
        }
        if requests.write {
            disk.flush_meta().await?;
        }
        qcow2_rs::error::Qcow2Result::Ok(())
    })
    .map_err(text)?;
    if requests.write {
        // Its own `fsync_range` is not a part of `flush_meta`.
        std::fs::File::open(image)?.sync_data()?;
    }
    Ok(())
}

/// Its errors are not all `std::error::Error`.
fn text(error: impl std::fmt::Debug) -> String {
    format!("{error:?}")
}
