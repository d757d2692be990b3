//! Images that other people's programs made. They are no part of the project: the tests look for them in
//! `$QCOW2_CHAIN_IMAGES`, else beside the project in `../shared/images`, and say so where there are none.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::say;

/// One xz-compressed file.
#[derive(Clone, Debug)]
pub struct Foreign {
    /// The unpacked file's name, without the prefix that tells where it comes from.
    pub name: String,
    /// Where it comes from: the part of the file's name before `__`.
    pub origin: String,
    packed: PathBuf,
}

impl Foreign {
    /// Unpacks into a directory and returns the path. Images of one origin unpacked into one directory find each other.
    pub fn unpack(&self, dir: &Path) -> PathBuf {
        let path = dir.join(&self.name);
        let file = std::fs::File::create(&path).expect("the image is created");
        let status = Command::new("xz").arg("-dc").arg(&self.packed).stdout(file).status();
        assert!(status.is_ok_and(|status| status.success()), "xz -dc {}", self.packed.display());
        path
    }
}

/// All of them in the order of their names; none, with a loud word, where there are none or where `xz` is missing.
pub fn images() -> Vec<Foreign> {
    let dir = std::env::var_os("QCOW2_CHAIN_IMAGES")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/images"), PathBuf::from);
    let mut images: Vec<Foreign> =
        std::fs::read_dir(&dir).into_iter().flatten().flatten().filter_map(foreign).collect();
    images.sort_by(|a, b| a.packed.cmp(&b.packed));
    let xz = Command::new("xz").arg("--version").stdout(Stdio::null()).status();
    if images.is_empty() || !xz.is_ok_and(|status| status.success()) {
        say(&format!("SKIPPED: no foreign images in {}, or no xz", dir.display()));
        return Vec::new();
    }
    images
}

fn foreign(entry: std::fs::DirEntry) -> Option<Foreign> {
    let file_name = entry.file_name().into_string().ok()?;
    let (origin, name) = file_name.strip_suffix(".xz")?.split_once("__")?;
    Some(Foreign { name: name.to_owned(), origin: origin.to_owned(), packed: entry.path() })
}

#[test]
fn foreign_images_unpack() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    for image in images().iter().take(3) {
        let path = image.unpack(dir.path());
        assert_ne!(std::fs::metadata(path).expect("it is there").len(), 0, "{} of {}", image.name, image.origin);
    }
}
