//! The records that the guest writes and the tests verify. Compiled into both.

/// Bytes of a record.
pub const SIZE: usize = 4096;
/// Slots of the file that is written in place: record n goes to slot n modulo this.
pub const SLOTS: u64 = 256;

/// Returns record `number` of the disk with this serial.
pub fn record(serial: &str, number: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(SIZE);
    bytes.extend_from_slice(&number.to_le_bytes());
    let mut state = hash(serial.as_bytes()) ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    while bytes.len() < SIZE {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes
}

/// Returns the number of an undamaged record of the disk with this serial.
pub fn number(serial: &str, bytes: &[u8]) -> Option<u64> {
    let number = u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?);
    (bytes == record(serial, number)).then_some(number)
}

/// FNV-1a.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}
