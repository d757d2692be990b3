//! What the guest writes and the tests look for: records that describe themselves. Compiled into both.

/// Bytes of a record.
pub const SIZE: usize = 4096;
/// Places in the file that is written in place: record n goes to place n modulo this.
pub const SLOTS: u64 = 256;

/// Record `number` as it is written to the disk with this serial.
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

/// The number of a record that holds on the disk with this serial exactly what it must.
pub fn number(serial: &str, bytes: &[u8]) -> Option<u64> {
    let number = u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?);
    (bytes == record(serial, number)).then_some(number)
}

/// FNV-1a.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}
