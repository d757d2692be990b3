//! A file system of a chosen kind in a file.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Unmounted when this is dropped; its file goes with the directory that it was made in.
pub(crate) struct Mount(PathBuf);

impl Mount {
    /// Makes it and mounts it, or says why not. Root is needed.
    pub(crate) fn new(kind: &str, dir: &Path, size: u64) -> Result<Self, String> {
        let (file, point) = (dir.join("file-system"), dir.join("mounted"));
        let made = std::fs::File::create_new(&file).and_then(|file| file.set_len(size));
        made.and_then(|()| std::fs::create_dir(&point)).map_err(|error| error.to_string())?;
        let quiet = |command: &mut Command| {
            let run = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
            run.is_ok_and(|status| status.success())
        };
        let mkfs = format!("mkfs.{kind}");
        if !quiet(Command::new(&mkfs).arg("-q").arg(&file)) {
            return Err(format!("{mkfs} is missing or fails"));
        }
        if !quiet(Command::new("mount").args(["-o", "loop"]).arg(&file).arg(&point)) {
            return Err(format!("{kind} cannot be mounted (root is needed)"));
        }
        Ok(Self(point))
    }

    pub(crate) fn point(&self) -> &Path {
        &self.0
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}
