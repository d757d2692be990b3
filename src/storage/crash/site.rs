//! The call sites of syncs.

use std::backtrace::Backtrace;
use std::fmt;

/// A function in the call stack of a sync, from the debug information.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub struct Frame {
    /// The function with its module.
    pub function: String,
    /// The source file, as it was given to the compiler. Empty if unknown.
    pub file: String,
    /// The line in the file. 0 if unknown.
    pub line: u32,
}

/// The call stack of a sync, without storages that only forward the call and without the standard
/// library. It is empty without debug information (at least line tables).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub struct Site {
    /// The functions, the innermost first.
    pub frames: Vec<Frame>,
}

impl Site {
    pub(super) fn of(trace: &Backtrace) -> Self {
        let text = trace.to_string();
        let mut frames: Vec<Frame> = Vec::new();
        for line in text.lines() {
            let line = line.trim();
            if let Some(place) = line.strip_prefix("at ") {
                let mut parts = place.rsplitn(3, ':').skip(1);
                let number = parts.next().and_then(|line| line.parse().ok());
                if let (Some(last), Some(line), Some(file)) = (frames.last_mut(), number, parts.next()) {
                    (last.line, last.file) = (line, file.trim_start_matches("./").to_owned());
                }
            } else if let Some((number, function)) = line.split_once(": ")
                && number.bytes().all(|byte| byte.is_ascii_digit())
            {
                frames.push(Frame { function: function.to_owned(), file: String::new(), line: 0 });
            }
        }
        frames.retain(|frame| !frame.passes_on());
        Self { frames }
    }
}

impl Frame {
    /// Returns `true` for functions that only forward a call, and for the standard library.
    fn passes_on(&self) -> bool {
        let function = &*self.function;
        let language = ["std::", "core::", "alloc::", "<std::", "<core::", "<alloc::", "__", "_start", "main"];
        language.iter().any(|start| function.starts_with(start))
            || (function.contains("storage::crash::") && !function.contains("storage::crash::tests::"))
            || function.ends_with("Storage>::sync")
            || function.ends_with("FileSystem>::sync_dir")
    }
}

impl fmt::Display for Site {
    /// `file:line function`, of the caller alone.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.frames.first() {
            Some(Frame { function, file, line }) => write!(f, "{file}:{line} {function}"),
            None => write!(f, "unknown"),
        }
    }
}
