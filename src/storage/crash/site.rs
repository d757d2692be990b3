//! Who calls for a sync.

use std::backtrace::Backtrace;
use std::fmt;

/// A function on the way to a sync, as the debug information has it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub struct Frame {
    /// The function with its module.
    pub function: String,
    /// The source file, as it was given to the compiler; empty where it is not known.
    pub file: String,
    /// The line in it; 0 where it is not known.
    pub line: u32,
}

/// The way that led to a sync, the caller first; storages that only pass the call on are left out,
/// and so is the standard library. Without debug information (at least line tables) it is empty.
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
    /// Whether it only hands a call down, or belongs to the language.
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
