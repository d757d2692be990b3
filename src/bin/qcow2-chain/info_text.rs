//! What `info` prints for people, in qemu-img's layout.

use std::fmt::Write as _;

use qcow2_chain::format::SnapshotEntry;

use crate::info::{ImageInfo, Qcow2Info};
use crate::json::Json;
use crate::{size, zone};

/// The lines that tell of one image.
pub(crate) fn of(info: &ImageInfo) -> String {
    let mut out = String::new();
    write(&mut out, info).unwrap_or_else(|_| unreachable!("a string takes everything"));
    out
}

fn write(out: &mut String, info: &ImageInfo) -> std::fmt::Result {
    writeln!(out, "image: {}", info.filename)?;
    writeln!(out, "file format: {}", if info.qcow2.is_some() { "qcow2" } else { "raw" })?;
    writeln!(out, "virtual size: {} ({} bytes)", size::human(info.virtual_size), info.virtual_size)?;
    let disk_size = info.actual_size.map_or_else(|| "unavailable".to_owned(), size::human);
    writeln!(out, "disk size: {disk_size}")?;
    if let Some(qcow2) = &info.qcow2 {
        write_qcow2(out, qcow2)?;
    }
    writeln!(out, "Child node '/file':")?;
    writeln!(out, "    filename: {}", info.filename)?;
    writeln!(out, "    protocol type: {}", info.protocol)?;
    writeln!(out, "    file length: {} ({} bytes)", size::human(info.file_length), info.file_length)?;
    writeln!(out, "    disk size: {disk_size}")
}

fn write_qcow2(out: &mut String, info: &Qcow2Info) -> std::fmt::Result {
    if info.encrypted {
        writeln!(out, "encrypted: yes")?;
    }
    writeln!(out, "cluster_size: {}", info.cluster_size)?;
    if info.dirty {
        writeln!(out, "cleanly shut down: no")?;
    }
    if let Some(backing) = &info.backing {
        write!(out, "backing file: {}", backing.name)?;
        if backing.full != backing.name {
            write!(out, " (actual path: {})", backing.full)?;
        }
        writeln!(out)?;
        if let Some(format) = &backing.format {
            writeln!(out, "backing file format: {format}")?;
        }
    }
    if !info.snapshots.is_empty() {
        writeln!(out, "Snapshot list:")?;
        row(out, ["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"])?;
        for entry in &info.snapshots {
            write_snapshot(out, entry)?;
        }
    }
    writeln!(out, "Format specific information:")?;
    members(out, &info.specific, 1)
}

fn write_snapshot(out: &mut String, entry: &SnapshotEntry) -> std::fmt::Result {
    let milliseconds = entry.vm_clock_nsec / 1_000_000;
    let (seconds, minutes, hours) = (milliseconds / 1000, milliseconds / 60_000, milliseconds / 3_600_000);
    row(
        out,
        [
            &String::from_utf8_lossy(&entry.id),
            &String::from_utf8_lossy(&entry.name),
            &size::human(entry.vm_state()),
            &zone::local_time(entry.date_sec.into()),
            &format!("{hours:04}:{:02}:{:02}.{:03}", minutes % 60, seconds % 60, milliseconds % 1000),
            &entry.icount().map_or_else(|| "--".to_owned(), |icount| icount.to_string()),
        ],
    )
}

/// One line of the snapshot list. Columns are as wide in bytes, not in characters, as QEMU makes them.
fn row(out: &mut String, [id, tag, size, date, clock, icount]: [&str; 6]) -> std::fmt::Result {
    let pad = |text: &str, width: usize| " ".repeat(width.saturating_sub(text.len()));
    let (id_pad, tag_pad) = (pad(id, 7), pad(tag, 16));
    writeln!(out, "{id}{id_pad} {tag}{tag_pad} {size:>8} {date:>19} {clock:>15} {icount:>10}")
}

/// The members of an object, one a line, with blanks for the dashes of their names.
fn members(out: &mut String, members: &[(&'static str, Json)], depth: usize) -> std::fmt::Result {
    for (name, value) in members {
        entry(out, &name.replace('-', " "), value, depth)?;
    }
    Ok(())
}

fn entry(out: &mut String, name: &str, value: &Json, depth: usize) -> std::fmt::Result {
    let indent = "    ".repeat(depth);
    match value {
        Json::Bool(value) => writeln!(out, "{indent}{name}: {value}"),
        Json::Number(value) => writeln!(out, "{indent}{name}: {value}"),
        Json::Text(value) => writeln!(out, "{indent}{name}: {value}"),
        Json::Object(inner) => {
            writeln!(out, "{indent}{name}:")?;
            members(out, inner, depth + 1)
        }
        Json::List(values) => {
            writeln!(out, "{indent}{name}:")?;
            values.iter().enumerate().try_for_each(|(index, value)| entry(out, &format!("[{index}]"), value, depth + 1))
        }
    }
}
