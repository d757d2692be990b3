//! The settings behind `create -o`.

use std::fmt::Write as _;
use std::path::Path;

use qcow2_chain::chain::Format;

use crate::failure::Failure;
use crate::size;

/// A setting: name, kind, what it says, and what a new image has without it.
struct Setting {
    name: &'static str,
    kind: Kind,
    help: &'static str,
    default: Option<&'static str>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    Size,
    Number,
    Switch,
    /// Known, and refused.
    Unserved,
}

const fn setting(name: &'static str, kind: Kind, help: &'static str, default: Option<&'static str>) -> Setting {
    Setting { name, kind, help, default }
}

/// Those of qcow2, in the order of QEMU's "Formatting" line.
const QCOW2: &[Setting] = &[
    setting("encryption", Kind::Unserved, "", None),
    setting("cluster_size", Kind::Size, "cluster size, a power of two from 512 to 2M", Some("65536")),
    setting("extended_l2", Kind::Switch, "32 subclusters a cluster (clusters of at least 16k)", Some("off")),
    setting("preallocation", Kind::Text, "off, metadata, falloc or full", None),
    setting("compression_type", Kind::Text, "zlib or zstd", Some("zlib")),
    setting("size", Kind::Size, "virtual size", None),
    setting("compat", Kind::Text, "0.10 (or v2) or 1.1 (or v3)", None),
    setting("backing_file", Kind::Text, "name of the backing file", None),
    setting("backing_fmt", Kind::Text, "format of the backing file (qcow2 or raw)", None),
    setting("data_file", Kind::Unserved, "", None),
    setting("data_file_raw", Kind::Unserved, "", None),
    setting("lazy_refcounts", Kind::Switch, "postpone refcount updates", Some("off")),
    setting("refcount_bits", Kind::Number, "width of a refcount, a power of two from 1 to 64", Some("16")),
];

/// Those of raw.
const RAW: &[Setting] = &[
    setting("size", Kind::Size, "virtual size", None),
    setting("preallocation", Kind::Text, "off, falloc or full", None),
    setting("backing_file", Kind::Text, "", None),
    setting("backing_fmt", Kind::Text, "", None),
    setting("nocow", Kind::Unserved, "", None),
    setting("extent_size_hint", Kind::Unserved, "", None),
];

fn of(format: Format) -> &'static [Setting] {
    match format {
        Format::Qcow2 => QCOW2,
        Format::Raw => RAW,
    }
}

/// The settings given, by name; the last of a name counts.
#[derive(Debug)]
pub(crate) struct Settings {
    given: Vec<(&'static str, String)>,
    /// The virtual size in bytes as asked for.
    pub size: Option<u64>,
}

/// What `-o help` prints, if it is asked for.
pub(crate) fn help(format: Format, options: &[String]) -> Option<String> {
    let asked = options.iter().any(|option| split(option).iter().any(|(key, _)| key == "help" || key == "?"));
    asked.then(|| {
        let mut out = String::from(if format == Format::Qcow2 {
            "Supported qcow2 options:\n"
        } else {
            "Supported raw options:\n"
        });
        for Setting { name, help, .. } in of(format).iter().filter(|setting| !setting.help.is_empty()) {
            let _ = writeln!(out, "  {name:<21}- {help}");
        }
        out
    })
}

/// The parts of `key=value,key=value`; a doubled comma stands for one.
pub(crate) fn split(options: &str) -> Vec<(String, Option<String>)> {
    let mut parts = vec![String::new()];
    let mut chars = options.chars().peekable();
    while let Some(c) = chars.next() {
        match (c, parts.last_mut()) {
            (',', _) if chars.peek() != Some(&',') => parts.push(String::new()),
            (c, Some(part)) => {
                part.push(c);
                if c == ',' {
                    chars.next();
                }
            }
            (_, None) => {}
        }
    }
    let pair = |part: String| match part.split_once('=') {
        Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
        None => (part, None),
    };
    parts.into_iter().filter(|part| !part.is_empty()).map(pair).collect()
}

impl Settings {
    /// Reads all `-o` of a command line.
    pub(crate) fn parse(format: Format, options: &[String]) -> Result<Self, Failure> {
        let mut settings = Self { given: Vec::new(), size: None };
        for (key, value) in options.iter().flat_map(|option| split(option)) {
            if key.starts_with("encrypt.") {
                return Err(Failure::unserved("encryption", "qemu-img for encrypted images"));
            }
            let known = of(format).iter().find(|setting| setting.name == key);
            let known = known.ok_or_else(|| Failure::new(format!("Invalid parameter '{key}'")))?;
            match known.kind {
                Kind::Unserved => return Err(Failure::unserved(&format!("-o {key}"), "qemu-img for such images")),
                Kind::Switch => settings.put(known.name, value.as_deref().unwrap_or("on")),
                _ => settings.put(known.name, value.as_deref().unwrap_or_default()),
            }
            settings.verify(known)?;
        }
        Ok(settings)
    }

    fn verify(&self, setting: &Setting) -> Result<(), Failure> {
        match setting.kind {
            Kind::Size | Kind::Number => self.number(setting.name, 0).map(drop),
            Kind::Switch => self.flag(setting.name).map(drop),
            Kind::Text | Kind::Unserved => Ok(()),
        }
    }

    fn put(&mut self, name: &'static str, value: &str) {
        self.given.retain(|(given, _)| *given != name);
        self.given.push((name, value.to_owned()));
    }

    /// Takes `-b` and `-F`, which count more than `-o`.
    pub(crate) fn set_backing(&mut self, file: Option<&str>, format: Option<&str>) {
        for (name, value) in [("backing_file", file), ("backing_fmt", format)] {
            if let Some(value) = value {
                self.put(name, value);
            }
        }
    }

    /// Takes the size from the end of the command line.
    pub(crate) fn set_size(&mut self, size: Option<u64>) -> Result<(), Failure> {
        let option = self.get("size").map(|_| self.number("size", 0)).transpose()?;
        if size.is_some() && option.is_some() {
            return Err(Failure::new("The image size must be specified only once"));
        }
        self.size = size.or(option);
        Ok(())
    }

    /// The value of this name as it was given.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.given.iter().find(|(given, _)| *given == name).map(|(_, value)| value.as_str())
    }

    /// The value of this name as a number.
    pub(crate) fn number(&self, name: &str, default: u64) -> Result<u64, Failure> {
        let Some(text) = self.get(name) else { return Ok(default) };
        size::parse(text).ok_or_else(|| Failure::new(format!("Parameter '{name}' expects a number, not '{text}'")))
    }

    /// The value of this name as a switch, off by default.
    pub(crate) fn flag(&self, name: &str) -> Result<bool, Failure> {
        match self.get(name) {
            Some("on" | "yes" | "true" | "y") => Ok(true),
            None | Some("off" | "no" | "false" | "n") => Ok(false),
            Some(_) => Err(Failure::new(format!("Parameter '{name}' expects 'on' or 'off'"))),
        }
    }

    /// QEMU's line that says what is created.
    pub(crate) fn formatting(&self, file: &Path, size: u64) -> String {
        let mut line = format!("Formatting '{}', fmt=qcow2", file.display());
        for Setting { name, kind, default, .. } in QCOW2 {
            let value = match (*name, kind) {
                ("size", _) => Some(size.to_string()),
                (_, Kind::Size | Kind::Number) => {
                    let given = self.get(name).and_then(size::parse).map(|number| number.to_string());
                    given.or_else(|| default.map(str::to_owned))
                }
                _ => self.get(name).or(*default).map(|value| value.replace(',', ",,")),
            };
            if let Some(value) = value {
                let _ = write!(line, " {name}={value}");
            }
        }
        line
    }
}
