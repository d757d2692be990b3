//! What the LUKS header of an encrypted image says, without any key. LUKS On-Disk Format Specification 1.2.

use qcow2_chain::format::{Extension, HeaderCluster};
use qcow2_chain::storage::Storage;

use crate::failure::Failure;
use crate::json::Json;

/// The length of a LUKS version 1 header.
const HEADER_LEN: usize = 592;
/// Where the eight key slots start, and their length.
const SLOTS: usize = 208;
const SLOT_LEN: usize = 48;
/// What an active slot starts with.
const ACTIVE: u32 = 0x00ac_71f3;

/// The members of `encrypt` in QEMU's order.
pub(crate) fn describe(storage: &dyn Storage, cluster: &HeaderCluster) -> Result<Json, Failure> {
    let pointer = cluster.extensions.iter().find_map(|extension| match extension {
        Extension::Crypto(pointer) => Some(pointer),
        _ => None,
    });
    let pointer = pointer.ok_or_else(|| Failure::new("the encryption header is missing"))?;
    let mut bytes = [0; HEADER_LEN];
    storage.read_at(&mut bytes, pointer.offset.get())?;
    if &bytes[..8] != b"LUKS\xba\xbe\0\x01" {
        return Err(Failure::new(format!("no LUKS header at {}", pointer.offset)));
    }
    let mode = text(&bytes[40..72]);
    // `xts-plain64`, `cbc-essiv:sha256`: mode, IV generator, and the hash of the latter.
    let (mode, generator) = mode.split_once('-').unwrap_or((&mode, ""));
    let (generator, generator_hash) = generator.split_once(':').unwrap_or((generator, ""));
    let mut members = vec![("ivgen-alg", Json::from(generator)), ("detached-header", false.into())];
    members.extend([
        ("hash-alg", text(&bytes[72..104]).into()),
        ("cipher-alg", cipher(&text(&bytes[8..40]), word(&bytes, 108), mode).into()),
        ("uuid", text(&bytes[168..208]).into()),
    ]);
    if !generator_hash.is_empty() {
        members.push(("ivgen-hash-alg", generator_hash.into()));
    }
    members.extend([
        ("format", "luks".into()),
        ("cipher-mode", mode.into()),
        ("slots", Json::List((0..8).map(|index| slot(&bytes, SLOTS + index * SLOT_LEN)).collect())),
        ("payload-offset", (u64::from(word(&bytes, 104)) * 512).into()),
        ("master-key-iters", word(&bytes, 164).into()),
    ]);
    Ok(Json::Object(members))
}

fn slot(bytes: &[u8], at: usize) -> Json {
    let active = word(bytes, at) == ACTIVE;
    let mut members = vec![("active", active.into())];
    if active {
        members.push(("iters", word(bytes, at + 4).into()));
    }
    members.push(("key-offset", (u64::from(word(bytes, at + 40)) * 512).into()));
    if active {
        members.push(("stripes", word(bytes, at + 44).into()));
    }
    Json::Object(members)
}

/// QEMU's name of a cipher, which holds the length of the key; XTS uses two keys.
fn cipher(name: &str, key_bytes: u32, mode: &str) -> String {
    let bits = u64::from(key_bytes) * 8 / if mode == "xts" { 2 } else { 1 };
    match name {
        "cast5" => "cast5-128".to_owned(),
        name => format!("{name}-{bits}"),
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let word = bytes.get(at..at + 4).and_then(|word| word.try_into().ok());
    u32::from_be_bytes(word.unwrap_or_default())
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}
