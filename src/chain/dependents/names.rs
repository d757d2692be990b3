//! The files that a name in a header may mean, by QEMU's rules for names.

/// Prefixes of names that QEMU opens as the file behind the prefix.
const FILE_PROTOCOLS: [&[u8]; 3] = [b"file:", b"host_device:", b"host_cdrom:"];
/// Prefixes of names with several file names that are separated by `:`.
const LIST_PROTOCOLS: [&[u8]; 2] = [b"blkdebug:", b"blkverify:"];
/// The deepest `json:` name inside a `json:` name that is read.
const MAX_NESTING: usize = 8;

/// A file that a name may mean.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FileName {
    /// The path of the file.
    pub(super) path: Vec<u8>,
    /// QEMU resolves a relative path from its working directory, not from the image's directory.
    pub(super) anywhere: bool,
}

/// Returns the files that a name may mean: at least those that QEMU would open.
///
/// The name of a backing file is relative to the image's directory, unless it has a protocol. The
/// name of a data file is relative to QEMU's working directory.
pub(super) fn parse(name: &[u8], is_data_file: bool) -> Vec<FileName> {
    let mut files = Vec::new();
    add(&mut files, name, is_data_file, MAX_NESTING);
    files
}

fn add(files: &mut Vec<FileName>, name: &[u8], anywhere: bool, nesting: usize) {
    if let Some(json) = name.strip_prefix(b"json:") {
        if let Some(nesting) = nesting.checked_sub(1) {
            for string in strings(json) {
                add(files, &string, true, nesting);
            }
        }
        return;
    }
    // The name as it is, even if QEMU would take its start for a protocol.
    files.push(FileName { path: name.to_vec(), anywhere });
    for path in FILE_PROTOCOLS.iter().filter_map(|protocol| name.strip_prefix(*protocol)) {
        files.push(FileName { path: path.to_vec(), anywhere: true });
    }
    for list in LIST_PROTOCOLS.iter().filter_map(|protocol| name.strip_prefix(*protocol)) {
        // File names may contain the separator, so each end of the list may be one.
        let starts = (0..list.len()).filter(|at| at.checked_sub(1).is_none_or(|before| list[before] == b':'));
        for rest in starts.map(|at| &list[at..]) {
            files.push(FileName { path: rest.to_vec(), anywhere: true });
            let first = rest.split(|byte| *byte == b':').next().unwrap_or_default();
            files.push(FileName { path: first.to_vec(), anywhere: true });
        }
    }
}

/// Returns the strings in a JSON text that are not keys, in either of the quotes that QEMU accepts.
fn strings(json: &[u8]) -> Vec<Vec<u8>> {
    let mut strings = Vec::new();
    let mut rest = json;
    while let Some(start) = rest.iter().position(|byte| matches!(byte, b'"' | b'\'')) {
        let (string, behind) = string(rest[start], &rest[start + 1..]);
        rest = behind;
        if rest.trim_ascii_start().first() != Some(&b':') {
            strings.push(string);
        }
    }
    strings
}

/// Decodes a JSON string up to its closing quote. Returns it and the text behind the quote.
fn string(quote: u8, mut text: &[u8]) -> (Vec<u8>, &[u8]) {
    let mut string = Vec::new();
    loop {
        text = match text {
            [] => return (string, text),
            [byte, rest @ ..] if *byte == quote => return (string, rest),
            [b'\\', b'u', rest @ ..] => {
                let (letter, rest) = unicode(rest);
                string.extend(letter.encode_utf8(&mut [0; 4]).as_bytes());
                rest
            }
            [b'\\', escaped, rest @ ..] => {
                string.push(match escaped {
                    b'b' => 8,
                    b'f' => 12,
                    b'n' => b'\n',
                    b'r' => b'\r',
                    b't' => b'\t',
                    other => *other,
                });
                rest
            }
            [byte, rest @ ..] => {
                string.push(*byte);
                rest
            }
        };
    }
}

/// Decodes the digits behind `\u`, with a second escape for a surrogate pair.
fn unicode(text: &[u8]) -> (char, &[u8]) {
    let unit = |text: &[u8]| {
        let digits = text.get(..4).and_then(|digits| std::str::from_utf8(digits).ok())?;
        u16::from_str_radix(digits, 16).ok()
    };
    let Some(first) = unit(text) else { return (char::REPLACEMENT_CHARACTER, text) };
    let rest = &text[4..];
    let second = rest.strip_prefix(b"\\u").and_then(unit);
    let pair = char::decode_utf16([first].into_iter().chain(second)).next();
    match pair {
        Some(Ok(letter)) if letter.len_utf16() == 2 => (letter, &rest[6..]),
        Some(Ok(letter)) => (letter, rest),
        _ => (char::REPLACEMENT_CHARACTER, rest),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(name: &str) -> Vec<String> {
        parse(name.as_bytes(), false).into_iter().map(|file| String::from_utf8(file.path).unwrap()).collect()
    }

    #[test]
    fn name_without_protocol_is_relative_to_the_image() {
        for name in ["base", "./a:b", "/x/base", "../base", "a:b"] {
            assert_eq!(parse(name.as_bytes(), false), [FileName { path: name.into(), anywhere: false }]);
        }
        assert_eq!(parse(b"\xff\xfe", true), [FileName { path: b"\xff\xfe".to_vec(), anywhere: true }]);
    }

    #[test]
    fn protocols_of_files_are_removed() {
        assert_eq!(paths("file:/x/base"), ["file:/x/base", "/x/base"]);
        assert_eq!(paths("host_device:/dev/vg/lv"), ["host_device:/dev/vg/lv", "/dev/vg/lv"]);
        assert!(paths("blkdebug:conf:/x/a:b").contains(&"/x/a:b".to_owned()));
        assert!(paths("blkdebug::base").contains(&"base".to_owned()));
        assert!(paths("blkverify:/x/raw:/x/image").contains(&"/x/raw".to_owned()));
        assert_eq!(paths("nbd://host/base"), ["nbd://host/base"]);
    }

    #[test]
    fn json_strings_are_decoded_and_keys_left_out() {
        let json = r#"json:{"file":{"driver":"file", "filename" : "\/x\/b\"\u0061\ud83d\ude00\n"}}"#;
        assert_eq!(paths(json), ["file", "/x/b\"a\u{1f600}\n"]);
        assert_eq!(paths("json:{'file.filename':'it\\'s'}"), ["it's"]);
        assert_eq!(paths(r#"json:{"a":["file:b",{"c":"json:{'d':'e'}"}]}"#), ["file:b", "b", "e"]);
        assert!(parse(b"json:{\"a\":\"b\"}", false).iter().all(|file| file.anywhere));
    }

    #[test]
    fn broken_json_is_read_to_its_end() {
        assert_eq!(paths("json:{\"a\":\"b"), ["b"]);
        assert_eq!(paths("json:\"\\"), ["\\"]);
        assert_eq!(paths("json:\"\\u12"), ["\u{fffd}12"]);
        assert_eq!(paths("json:\"\\ud800x\\ud800\\u0041"), ["\u{fffd}x\u{fffd}A"]);
        assert_eq!(paths(&"json:'".repeat(100)), Vec::<String>::new());
    }
}
