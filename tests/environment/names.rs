//! File names that programs get wrong, and the ways to name a catalogue.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Component, Path, PathBuf};

/// The kind of the image names of a world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Naming {
    Plain,
    Space,
    /// QEMU takes text before a colon for a protocol.
    Colon,
    /// A comma ends a value of `--volume`, and is doubled there.
    Comma,
    Percent,
    Quotes,
    /// A leading dash looks like an option.
    Dash,
    Unicode,
    /// 220 bytes and more.
    Long,
    /// A directory whose name is not UTF-8.
    ByteDirectory,
    /// An image whose name is not UTF-8.
    Bytes,
}

pub const NAMINGS: [Naming; 11] = [
    Naming::Plain,
    Naming::Space,
    Naming::Colon,
    Naming::Comma,
    Naming::Percent,
    Naming::Quotes,
    Naming::Dash,
    Naming::Unicode,
    Naming::Long,
    Naming::ByteDirectory,
    Naming::Bytes,
];

impl Naming {
    /// The name in the table of results.
    pub fn label(self) -> &'static str {
        match self {
            Self::Plain => "names: plain",
            Self::Space => "names: spaces",
            Self::Colon => "names: colon",
            Self::Comma => "names: comma",
            Self::Percent => "names: percent",
            Self::Quotes => "names: quotes",
            Self::Dash => "names: leading dash",
            Self::Unicode => "names: unicode",
            Self::Long => "names: long",
            Self::ByteDirectory => "names: directory not UTF-8",
            Self::Bytes => "names: image not UTF-8",
        }
    }

    /// The file name of an image.
    pub fn image(self, stem: &str, extension: &str) -> OsString {
        let name = match self {
            Self::Plain | Self::ByteDirectory => format!("{stem}.{extension}"),
            Self::Space => format!(" the {stem}  disk .{extension}"),
            Self::Colon => format!("{stem}:2026-11-29T10:00.{extension}"),
            Self::Comma => format!("{stem},format=raw,,x.{extension}"),
            Self::Percent => format!("100%{stem}%s%20.{extension}"),
            Self::Quotes => format!("\"{stem}\"'s \\ $HOME `x`.{extension}"),
            Self::Dash => format!("-{stem}.{extension}"),
            Self::Unicode => format!("диск-{stem}-磁盘-e\u{301}.{extension}"),
            Self::Long => format!("{}{stem}.{extension}", "l".repeat(220)),
            Self::Bytes => return OsString::from_vec([stem.as_bytes(), b"-\xff\xfe.", extension.as_bytes()].concat()),
        };
        name.into()
    }

    /// The name of a directory of the world.
    pub fn directory(self, stem: &str) -> OsString {
        match self {
            Self::Plain | Self::Bytes | Self::Long => stem.into(),
            Self::ByteDirectory => OsString::from_vec([stem.as_bytes(), b"-\xfe\xff"].concat()),
            Self::Dash => format!("-{stem}").into(),
            Self::Comma => format!("{stem},b=c").into(),
            _ => self.image(stem, "d"),
        }
    }
}

/// A value of `--volume`: `NAME=FILE,more`, with the commas of the file's name doubled.
pub fn volume_argument(name: &str, file: &Path, more: &[(&str, &OsStr)]) -> OsString {
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(b'=');
    bytes.extend(doubled(file.as_os_str()));
    for (key, value) in more {
        bytes.extend_from_slice(format!(",{key}=").as_bytes());
        bytes.extend(doubled(value));
    }
    OsString::from_vec(bytes)
}

fn doubled(text: &OsStr) -> Vec<u8> {
    text.as_bytes().iter().flat_map(|&byte| if byte == b',' { vec![byte; 2] } else { vec![byte] }).collect()
}

/// The path of `to` as seen from the directory `from`; both are absolute, without links and `..`.
pub fn relative(from: &Path, to: &Path) -> PathBuf {
    let (from, to): (Vec<_>, Vec<_>) = (from.components().collect(), to.components().collect());
    let common = from.iter().zip(&to).take_while(|(a, b)| a == b).count();
    let up = from[common..].iter().map(|_| Component::ParentDir);
    let path: PathBuf = up.chain(to[common..].iter().copied()).collect();
    // A leading dash or a colon would be taken for something else.
    if path.starts_with("..") { path } else { Path::new(".").join(path) }
}

/// The name to write into the header of an image in `directory` for its backing file.
pub fn backing_name(directory: &Path, backing: &Path, absolute: bool) -> Vec<u8> {
    if absolute {
        return backing.as_os_str().as_bytes().to_vec();
    }
    if backing.parent() == Some(directory) {
        let name = backing.file_name().expect("an image has a name").as_bytes();
        return if name.contains(&b':') { [b"./", name].concat() } else { name.to_vec() };
    }
    relative(directory, backing).as_os_str().as_bytes().to_vec()
}
