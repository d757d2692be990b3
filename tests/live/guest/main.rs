//! The program in the guest: mounts the data disks, writes records to them in turn, and executes
//! commands of the host.
//!
//! `live-guest CONTROL RECORDS`: two virtio serial ports. Each line from the host on CONTROL is
//! answered with one line, `ok ...` or `error ...`. RECORDS goes to a file on the host: the lines
//! `!` and `ready`, then `SERIAL NUMBER` for each fsynced record.
//!
//! - `mount`: mounts the disks that are not mounted yet, each under `/data/SERIAL`; answers with
//!   all serials
//! - `start NUMBER`: writes records from this number on, over all mounted disks in turn
//! - `stop`: answers with the number of the next record
//! - `verify`: reads every record back; answers with `SERIAL=COUNT` for each disk
//! - `fill SERIAL MIB`: replaces the file `fill` by one of that number of MiB of random data,
//!   fsynced
//! - `size SERIAL`: answers with the disk's size in bytes, as the guest sees it
//! - `agent STOP` or `agent CONT`: sends this signal to the guest agent
//! - `poweroff`: unmounts the disks and powers off

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

#[path = "../record.rs"]
mod record;

type Answer = Result<String, String>;

struct Writer {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<std::io::Result<u64>>,
}

struct Guest {
    /// Serial numbers of the mounted disks, in order.
    disks: BTreeMap<String, PathBuf>,
    /// Their directories below `/sys/block`.
    devices: BTreeMap<String, PathBuf>,
    records: Arc<Mutex<File>>,
    writer: Option<Writer>,
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let mut control = OpenOptions::new().read(true).write(true).open(&arguments[1]).expect("the control port");
    let records = OpenOptions::new().write(true).open(&arguments[2]).expect("the record port");
    let mut guest = Guest {
        disks: BTreeMap::new(),
        devices: BTreeMap::new(),
        records: Arc::new(Mutex::new(records)),
        writer: None,
    };
    if let Err(error) = guest.mount() {
        println!("mount: {error}");
    }
    // A power cut may have left an incomplete line: it must not become a record, or a part of this
    // line.
    write!(guest.records.lock().unwrap(), "!\nready\n").expect("the record port");
    loop {
        let line = read_line(&mut control);
        let answer = match guest.execute(&line) {
            Ok(text) => format!("ok {text}\n"),
            Err(text) => format!("error {}\n", text.replace('\n', " ")),
        };
        control.write_all(answer.as_bytes()).expect("the control port");
    }
}

/// Reads a line from the host. A read returns 0 bytes until the host has connected.
fn read_line(control: &mut File) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        match control.read(&mut byte) {
            Ok(1) if byte[0] == b'\n' => return String::from_utf8_lossy(&line).into_owned(),
            Ok(1) => line.push(byte[0]),
            _ => thread::sleep(Duration::from_millis(10)),
        }
    }
}

fn busybox(arguments: &[&str]) -> Result<(), String> {
    let output = Command::new("/bin/busybox").args(arguments).output().map_err(|error| error.to_string())?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

impl Guest {
    fn execute(&mut self, line: &str) -> Answer {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["mount"] => self.mount(),
            ["start", first] => self.start(first.parse().map_err(|_| "not a number")?),
            ["stop"] => self.stop(),
            ["verify"] => self.verify(),
            ["fill", serial, mib] => self.fill(serial, mib.parse().map_err(|_| "not a number")?),
            ["size", serial] => self.size(serial),
            ["agent", signal] => {
                let pid = fs::read_to_string("/run/agent.pid").map_err(|error| error.to_string())?;
                busybox(&["kill", &format!("-{signal}"), pid.trim()]).map(|()| String::new())
            }
            ["poweroff"] => self.power_off(),
            _ => Err(format!("unknown: {line}")),
        }
    }

    fn mount(&mut self) -> Answer {
        let mut names: Vec<PathBuf> =
            fs::read_dir("/sys/block").map_err(text)?.flatten().map(|entry| entry.path()).collect();
        names.sort();
        for name in names {
            let Ok(serial) = fs::read_to_string(name.join("serial")) else { continue };
            let serial = serial.trim().to_owned();
            if serial.is_empty() || self.disks.contains_key(&serial) {
                continue;
            }
            let device = Path::new("/dev").join(name.file_name().unwrap_or_default());
            let at = Path::new("/data").join(&serial);
            fs::create_dir_all(&at).map_err(text)?;
            busybox(&["mount", "-t", "ext4", &device.to_string_lossy(), &at.to_string_lossy()])?;
            self.devices.insert(serial.clone(), name);
            self.disks.insert(serial, at);
        }
        Ok(self.disks.keys().cloned().collect::<Vec<_>>().join(" "))
    }

    fn start(&mut self, first: u64) -> Answer {
        if self.writer.is_some() {
            return Err("writing already".into());
        }
        if self.disks.is_empty() {
            return Err("no disks".into());
        }
        let disks = self.disks.clone().into_iter().collect();
        let records = Arc::clone(&self.records);
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stop);
        self.writer = Some(Writer { stop, thread: thread::spawn(move || write(disks, &records, first, &flag)) });
        Ok(String::new())
    }

    fn stop(&mut self) -> Answer {
        let writer = self.writer.take().ok_or("not writing")?;
        writer.stop.store(true, Ordering::SeqCst);
        let next = writer.thread.join().map_err(|_| "the writer panicked")?;
        next.map(|next| next.to_string()).map_err(text)
    }

    fn verify(&self) -> Answer {
        let mut counts = Vec::new();
        for (serial, at) in &self.disks {
            let bytes = fs::read(at.join("records")).unwrap_or_default();
            for (index, bytes) in bytes.chunks(record::SIZE).enumerate() {
                record::number(serial, bytes).ok_or_else(|| format!("{serial}: record at {index} is damaged"))?;
            }
            counts.push(format!("{serial}={}", bytes.len() / record::SIZE));
        }
        Ok(counts.join(" "))
    }

    fn fill(&self, serial: &str, mib: u64) -> Answer {
        let at = self.disks.get(serial).ok_or("no such disk")?;
        let mut file = File::create(at.join("fill")).map_err(text)?;
        // All blocks differ, in their first bytes only: computing new records would take most of
        // the time.
        let mut block: Vec<u8> = (0..256).flat_map(|number| record::record(serial, number)).collect();
        for number in 0..mib {
            block[..8].copy_from_slice(&number.to_le_bytes());
            file.write_all(&block).map_err(text)?;
        }
        file.sync_all().map_err(text)?;
        Ok(String::new())
    }

    fn size(&self, serial: &str) -> Answer {
        let device = self.devices.get(serial).ok_or("no such disk")?;
        let sectors = fs::read_to_string(device.join("size")).map_err(text)?;
        let sectors: u64 = sectors.trim().parse().map_err(|_| "not a number")?;
        Ok((sectors * 512).to_string())
    }

    fn power_off(&mut self) -> Answer {
        if self.writer.is_some() {
            self.stop()?;
        }
        for at in self.disks.values() {
            busybox(&["umount", &at.to_string_lossy()])?;
        }
        busybox(&["poweroff", "-f"]).map(|()| String::new())
    }
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn text(error: std::io::Error) -> String {
    error.to_string()
}

/// Writes records to the disks in turn until `stop` is set: appends each to `records`, and replaces
/// an older one in `slots`.
fn write(disks: Vec<(String, PathBuf)>, records: &Mutex<File>, first: u64, stop: &AtomicBool) -> std::io::Result<u64> {
    let mut files = Vec::new();
    for (serial, at) in disks {
        let appended = OpenOptions::new().create(true).append(true).open(at.join("records"))?;
        let slots = OpenOptions::new().create(true).truncate(false).write(true).open(at.join("slots"))?;
        files.push((serial, appended, slots));
    }
    let count = files.len() as u64;
    let mut number = first;
    while !stop.load(Ordering::SeqCst) {
        let index = usize::try_from(number % count).unwrap_or_default();
        let (serial, appended, slots) = &mut files[index];
        let bytes = record::record(serial, number);
        slots.seek(SeekFrom::Start(number % record::SLOTS * record::SIZE as u64))?;
        slots.write_all(&bytes)?;
        slots.sync_data()?;
        appended.write_all(&bytes)?;
        appended.sync_data()?;
        writeln!(records.lock().unwrap(), "{serial} {number}")?;
        number += 1;
    }
    Ok(number)
}
