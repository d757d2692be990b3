//! The house rules that the compiler does not know: which floor may use which, where unsafe code may stand, and that the
//! library neither starts programs nor prints.

use std::path::{Path, PathBuf};

/// Every floor with those it may use. Floors of one height know nothing of each other.
const FLOORS: &[(&str, &[&str])] = &[
    ("format", &[]),
    ("storage", &[]),
    ("progress", &[]),
    ("image", &["format", "storage"]),
    ("chain", &["progress", "format", "storage", "image"]),
    ("merge", &["progress", "format", "storage", "image", "chain"]),
    ("vm", &["progress", "format", "storage", "image", "chain", "merge"]),
    ("live", &["progress", "format", "storage", "image", "chain", "merge", "vm"]),
    ("libvirt", &["progress", "format", "storage", "image", "chain", "merge", "vm", "live"]),
];

/// The files that may hold unsafe code.
const UNSAFE_ALLOWED: &[&str] = &["storage/map.rs", "libvirt/raw.rs"];

/// A source file.
struct Source {
    /// Its path below `src`, with `/`.
    path: String,
    /// Its text without comments and literals, line by line as in the file.
    code: String,
}

impl Source {
    /// The modules it stands in: `image/check/mod.rs` is `image`, `check`.
    fn modules(&self) -> Vec<&str> {
        let path = self.path.strip_suffix("/mod.rs").or_else(|| self.path.strip_suffix(".rs"));
        path.unwrap_or(&self.path).split('/').collect()
    }

    /// Whether it belongs to the program rather than to the library.
    fn is_program(&self) -> bool {
        self.path.starts_with("bin/")
    }

    /// The code without its unit tests, which by custom close a file.
    fn shipped(&self) -> &str {
        if self.modules().contains(&"tests") {
            return "";
        }
        self.code.split("#[cfg(test)]\nmod ").next().unwrap_or("")
    }

    /// The line that a position in `code` stands in.
    fn at(&self, position: usize) -> String {
        format!("src/{}:{}", self.path, self.code[..position].lines().count().max(1))
    }
}

/// All sources below `src`.
fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut sources = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("a folder of sources") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).expect("a source");
                sources.push(Source { path: below(&root, &path), code: code_only(&text) });
            }
        }
    }
    assert!(sources.len() > 20, "the sources were found");
    sources
}

fn below(root: &Path, path: &Path) -> String {
    let path: PathBuf = path.strip_prefix(root).expect("below src").components().collect();
    path.to_string_lossy().replace('\\', "/")
}

/// The text with comments, strings and characters blanked out; positions and lines stay.
fn code_only(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut code = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let end = literal_end(bytes, at);
        for byte in &mut code[at..end] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
        at = end.max(at + 1);
    }
    String::from_utf8_lossy(&code).into_owned()
}

/// Where the comment or literal that starts at `at` ends; `at` where none starts there.
fn literal_end(bytes: &[u8], at: usize) -> usize {
    let rest = &bytes[at..];
    let find = |needle: &[u8], from: usize| {
        let found = rest[from..].windows(needle.len()).position(|window| window == needle);
        found.map_or(bytes.len(), |found| at + from + found + needle.len())
    };
    let in_name = at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_');
    match rest {
        [b'/', b'/', ..] => find(b"\n", 2).saturating_sub(1),
        [b'/', b'*', ..] => find(b"*/", 2),
        [b'"', ..] => {
            let mut end = at + 1;
            while end < bytes.len() && bytes[end] != b'"' {
                end += if bytes[end] == b'\\' { 2 } else { 1 };
            }
            (end + 1).min(bytes.len())
        }
        [b'r', b'"' | b'#', ..] if !in_name => {
            let hashes = rest[1..].iter().take_while(|byte| **byte == b'#').count();
            let raw = rest.get(1 + hashes) == Some(&b'"');
            let close = [b"\"".to_vec(), vec![b'#'; hashes]].concat();
            if raw { find(&close, 2 + hashes) } else { at }
        }
        [b'\'', b'\\', _, ..] => find(b"'", 3),
        // A lifetime has no closing quote behind its first letter.
        [b'\'', _, b'\'', ..] => at + 3,
        _ => at,
    }
}

/// Where `word` stands in `code` as a word of its own.
fn words<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let in_name = |byte: Option<&u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric() || *byte == b'_');
    code.match_indices(word).map(|(at, _)| at).filter(move |at| {
        !in_name(at.checked_sub(1).and_then(|before| code.as_bytes().get(before)))
            && !in_name(code.as_bytes().get(at + word.len()))
    })
}

/// The first names of what follows a path's `::`: one, or those of a group.
fn heads(rest: &str) -> Vec<&str> {
    let name = |text: &str| text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    let Some(group) = rest.strip_prefix('{') else { return vec![&rest[..name(rest)]] };
    let mut heads = Vec::new();
    let (mut depth, mut start) = (0, 0);
    for (at, byte) in group.bytes().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' if depth > 0 => depth -= 1,
            b',' | b'}' if depth == 0 => {
                let head = group[start..at].trim_start();
                heads.push(&head[..name(head)]);
                start = at + 1;
                if byte == b'}' {
                    break;
                }
            }
            _ => {}
        }
    }
    heads.retain(|head| !head.is_empty());
    heads
}

/// What a source names of the crate's root, by `crate::` or by enough `super::`s: (position, name).
fn root_names(source: &Source) -> Vec<(usize, &str)> {
    let code = &source.code;
    let mut names = Vec::new();
    for at in words(code, "crate") {
        if let Some(rest) = code[at..].strip_prefix("crate::") {
            names.extend(heads(rest).into_iter().map(|head| (at, head)));
        }
    }
    let depth = source.modules().len();
    for at in words(code, "super") {
        let rest = code[at..].trim_start_matches("super::");
        let climbed = (code.len() - at - rest.len()) / "super::".len();
        // An inline module stands one lower than its file, so one more step is needed there.
        if !code[..at].ends_with("super::") && climbed >= depth {
            names.extend(heads(rest).into_iter().filter(|head| is_floor(head)).map(|head| (at, head)));
        }
    }
    names
}

fn is_floor(name: &str) -> bool {
    FLOORS.iter().any(|(floor, _)| *floor == name)
}

/// What one source imports although it must not.
fn wrong_imports(source: &Source) -> Vec<String> {
    let floor = source.modules()[0];
    let Some((_, allowed)) = FLOORS.iter().find(|(name, _)| *name == floor) else { return Vec::new() };
    let wrong = root_names(source).into_iter().filter(|(_, name)| *name != floor && !allowed.contains(name));
    wrong.map(|(at, name)| format!("{}: {floor} uses {name}", source.at(at))).collect()
}

#[test]
fn no_floor_uses_one_above_it() {
    let wrong: Vec<String> = sources().iter().filter(|source| !source.is_program()).flat_map(wrong_imports).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_folder_of_the_library_is_a_floor() {
    for source in sources().iter().filter(|source| !source.is_program() && source.path != "lib.rs") {
        assert!(is_floor(source.modules()[0]), "src/{} stands on no floor", source.path);
    }
}

#[test]
fn the_program_uses_the_public_interface_only() {
    for source in sources().iter().filter(|source| source.is_program()) {
        let included = source.code.contains("#[path") || source.code.contains("include!");
        assert!(!included, "src/{} reaches into the library's files", source.path);
    }
}

#[test]
fn unsafe_code_stands_in_one_file() {
    for source in sources().iter().filter(|source| !UNSAFE_ALLOWED.contains(&source.path.as_str())) {
        if let Some(at) = words(&source.code, "unsafe").next() {
            panic!("{}: unsafe code", source.at(at));
        }
    }
}

#[test]
fn nothing_starts_a_program() {
    for source in sources() {
        // A program's exit code and a process's own id start nothing.
        let allowed: &[&str] = if source.is_program() { &["ExitCode", "exit", "id"] } else { &["id"] };
        for at in words(source.shipped(), "process") {
            let Some(rest) = source.code[at..].strip_prefix("process::") else { continue };
            for head in heads(rest) {
                assert!(allowed.contains(&head), "{}: process::{head}", source.at(at));
            }
        }
        for word in ["Command::new", "execve", "execvp", "fork", "posix_spawn"] {
            if let Some(at) = words(source.shipped(), word).next() {
                assert!(source.is_program() && word == "Command::new", "{}: {word}", source.at(at));
            }
        }
    }
}

#[test]
fn the_library_prints_nothing() {
    for source in sources().iter().filter(|source| !source.is_program()) {
        for word in ["println", "print", "eprintln", "eprint", "dbg"] {
            for at in words(source.shipped(), word) {
                assert!(!source.code[at + word.len()..].starts_with('!'), "{}: {word}!", source.at(at));
            }
        }
    }
}

/// The rules above find what they look for: each of these sources breaks one.
#[test]
fn broken_rules_are_found() {
    let source = |path: &str, text: &str| Source { path: path.to_owned(), code: code_only(text) };
    let imports = |path: &str, text: &str| wrong_imports(&source(path, text)).len();
    assert_eq!(imports("format/l2.rs", "use crate::image::Image;"), 1);
    assert_eq!(imports("format/l2.rs", "fn f(s: &dyn crate::storage::Storage) {}"), 1);
    assert_eq!(imports("image/open.rs", "use crate::{format::{Header, merge}, chain::Chain, merge};"), 2);
    assert_eq!(imports("image/check/mod.rs", "use super::super::chain::Chain;"), 1);
    assert_eq!(imports("storage/mod.rs", "use super::format;"), 1);
    assert_eq!(imports("chain/mod.rs", "use crate::{image::Image, format::Header}; use super::storage;"), 0);
    assert_eq!(imports("format/l2.rs", "// use crate::image;\nconst A: &str = \"crate::image\"; /* crate::vm */"), 0);
    assert_eq!(imports("format/l2.rs", "const Q: char = '\"'; use crate::chain::Chain; const R: char = '\\'';"), 1);
    assert_eq!(imports("format/l2.rs", "const R: &str = r#\"a \" crate::chain \"#; fn f<'a>(x: &'a str) {}"), 0);
    assert_eq!(words("unsafe_code, not_unsafe, unsafe {", "unsafe").count(), 1);
    assert_eq!(source("image/open.rs", "a\nb\n  crate::x").at(6), "src/image/open.rs:3");
    assert_eq!(source("image/open.rs", "a\n#[cfg(test)]\nmod tests { println!() }").shipped(), "a\n");
}
