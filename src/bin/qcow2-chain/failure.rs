//! What a verb says when it cannot: a line of text and an exit code.

use std::error::Error;
use std::fmt;

/// A message for standard error and the program's exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    /// The exit code.
    pub code: u8,
    text: String,
}

/// What a verb returns: the exit code when it did what was asked.
pub(crate) type Outcome = Result<u8, Failure>;

impl Failure {
    /// A failure with exit code 1, as almost all of qemu-img's.
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self { code: 1, text: text.into() }
    }

    /// The same with another exit code.
    pub(crate) fn with_code(mut self, code: u8) -> Self {
        self.code = code;
        self
    }

    /// The same with a hint on a line of its own.
    pub(crate) fn with_hint(mut self, hint: &str) -> Self {
        self.text.push('\n');
        self.text.push_str(hint);
        self
    }

    /// An option that is known but not served, and what to do instead.
    pub(crate) fn unserved(option: &str, instead: &str) -> Self {
        Self::new(format!("{option} is not supported, use {instead}"))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl<E: Error> From<E> for Failure {
    /// The error and its causes, joined by ": ".
    fn from(error: E) -> Self {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        Self::new(text)
    }
}
