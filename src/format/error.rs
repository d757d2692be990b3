//! What a codec says of bytes it does not accept.

use thiserror::Error;

/// Why bytes were not accepted. The caller knows which file they came from and adds its name.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The bytes break a rule of the specification.
    #[error("{structure} at {offset:#x}: {field} is {found}, expected {expected}")]
    Corrupt {
        /// Which structure: "header", "L2 table", ...
        structure: &'static str,
        /// Where it (or the field) starts in the file.
        offset: u64,
        /// The field's name in the specification.
        field: &'static str,
        /// What was found.
        found: String,
        /// What would have been accepted.
        expected: String,
    },
    /// The bytes are valid but use something that this library does not serve.
    #[error("{what} is not supported")]
    Unsupported {
        /// The feature, in the words of the specification.
        what: String,
    },
    /// A number in the file is larger than the limit allows.
    #[error("{structure}: {field} is {found}, the limit is {limit}")]
    Limit {
        /// Which structure.
        structure: &'static str,
        /// The field's name in the specification.
        field: &'static str,
        /// What was found.
        found: u64,
        /// The limit in force.
        limit: u64,
    },
}

impl FormatError {
    /// A [`FormatError::Corrupt`] in the fewest words.
    pub fn corrupt(
        structure: &'static str,
        offset: u64,
        field: &'static str,
        found: impl std::fmt::Display,
        expected: impl std::fmt::Display,
    ) -> Self {
        Self::Corrupt { structure, offset, field, found: found.to_string(), expected: expected.to_string() }
    }

    /// A [`FormatError::Limit`].
    #[must_use]
    pub fn limit(structure: &'static str, field: &'static str, found: u64, limit: u64) -> Self {
        Self::Limit { structure, field, found, limit }
    }

    /// A [`FormatError::Unsupported`].
    pub fn unsupported(what: impl Into<String>) -> Self {
        Self::Unsupported { what: what.into() }
    }
}
