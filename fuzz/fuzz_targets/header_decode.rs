//! Any bytes as the first cluster of an image.
//!
//! Invariants: decoding never panics and never asks for more memory than the input is long (within a factor). What is
//! accepted encodes, and decoding that gives the same value again: no field is lost on the way, unknown extensions and
//! unknown additional fields included. A second encoding gives the same bytes as the first.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qcow2_chain::format::{HeaderCluster, Limits};
use qcow2_chain_fuzz::inputs::Header;

fuzz_target!(|input: Header<'_>| {
    let (file_len, bytes) = input;
    // Both an honest length and a claimed one: checks against it must hold for either.
    for len in [bytes.len() as u64, file_len] {
        let Ok(decoded) = HeaderCluster::decode(bytes, len, &Limits::default()) else { continue };
        let geometry = decoded.header.geometry();
        assert_eq!(geometry.cluster_bits(), decoded.header.cluster_bits);
        let Ok(encoded) = decoded.encode() else { continue };
        assert!(encoded.len() as u64 <= geometry.cluster_size());
        // Whoever writes it makes the file as long at least.
        let len = len.max(encoded.len() as u64);
        let again = HeaderCluster::decode(&encoded, len, &Limits::default()).expect("what was encoded decodes");
        assert_eq!(again.extensions, decoded.extensions);
        assert_eq!(again.backing_file, decoded.backing_file);
        assert_eq!(again.encode().expect("what was encoded once encodes"), encoded);
    }
});
