//! Random values: the identity of a set, and the random part of overlay names.

use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::BuildHasher as _;

use serde::{Deserialize, Serialize};

/// The random identity of a snapshot set: 128 bits as 32 hexadecimal digits.
///
/// Catalogue and journal carry it, so that a journal is never applied to another catalogue.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SetId(String);

impl SetId {
    /// Returns a new random identity.
    #[must_use]
    pub fn random() -> Self {
        Self(format!("{:016x}{:016x}", random_bits(), random_bits()))
    }
}

impl fmt::Display for SetId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Returns 64 random bits. The standard library seeds its hashers from the operating system, and
/// each call gets keys of its own; a keyed hash of constant input is unpredictable without the key.
fn random_bits() -> u64 {
    RandomState::new().hash_one(0_u64)
}

/// Returns the random part of the overlay names of one operation: 64 bits as hexadecimal digits.
pub(in crate::vm) fn random_token() -> String {
    format!("{:016x}", random_bits())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_values_differ() {
        let tokens: std::collections::HashSet<String> = (0..1000).map(|_| random_token()).collect();
        assert_eq!(tokens.len(), 1000);
        assert_ne!(SetId::random(), SetId::random());
        assert_eq!(SetId::random().to_string().len(), 32);
    }
}
