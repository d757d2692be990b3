//! Decompression of clusters. OWNER: create helper

use crate::format::CompressionType;

/// Decompresses the stream at the start of `input` into exactly one cluster. What follows the stream is ignored.
/// The error is a short reason.
#[expect(dead_code, reason = "until read.rs is here")]
pub(super) fn decompress(_kind: CompressionType, _input: &[u8], _cluster: &mut [u8]) -> Result<(), String> {
    todo!()
}
