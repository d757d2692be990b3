//! Options that several verbs share.

use std::path::{Path, PathBuf};

use clap::Args;
use qcow2_chain::chain::{ChainOptions, Format, Policy};
use qcow2_chain::storage::LockMode;

use crate::failure::Failure;

/// Options of qemu-img that are known but not served: they are refused before anything is done.
#[derive(Args, Debug)]
pub(crate) struct Unserved {
    #[arg(long, hide = true)]
    image_opts: bool,
    #[arg(long, hide = true, value_name = "OBJDEF")]
    object: Option<String>,
}

impl Unserved {
    /// Fails if one of them was given.
    pub(crate) fn refuse(&self) -> Result<(), Failure> {
        if self.image_opts {
            return Err(Failure::unserved("--image-opts", "a file name with -f FMT"));
        }
        match &self.object {
            Some(_) => Err(Failure::unserved("--object", "qemu-img for encrypted images")),
            None => Ok(()),
        }
    }
}

/// Which backing files may be opened.
#[derive(Args, Debug)]
pub(crate) struct PolicyArgs {
    /// Follow backing files beneath DIR too, not only beneath the image's own directory (repeatable)
    #[arg(long, value_name = "DIR")]
    allow: Vec<PathBuf>,
    /// Follow backing files wherever an image says they are; only for images that nobody hostile could have written
    #[arg(long)]
    allow_any: bool,
    /// Where an image does not record its backing file's format, take what that file's content says; only for images that
    /// nobody hostile could have written
    #[arg(long)]
    probe: bool,
}

impl PolicyArgs {
    /// Refuses `--probe` for a verb that records formats and guesses none.
    pub(crate) fn refuse_probe(&self) -> Result<(), Failure> {
        if self.probe {
            return Err(Failure::unserved("--probe", "rebase -u -F FMT -b NAME to record the format first"));
        }
        Ok(())
    }

    /// The policy for the chain of this image.
    pub(crate) fn policy(&self, image: &Path) -> Policy {
        if self.allow_any {
            return Policy::Any;
        }
        let own = directory(image).to_path_buf();
        Policy::Beneath(std::iter::once(own).chain(self.allow.iter().cloned()).collect())
    }

    /// What to open this chain with.
    pub(crate) fn chain_options(&self, image: &Path, format: Format, lock: LockMode) -> ChainOptions {
        let mut options = ChainOptions::default();
        options.policy = self.policy(image);
        options.format = format;
        options.lock = lock;
        options.probe = self.probe;
        options
    }
}

/// The directory that a relative backing name of this image is relative to.
pub(crate) fn directory(image: &Path) -> &Path {
    match image.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// The lock for looking, as `-U` says.
pub(crate) fn looking(force_share: bool) -> LockMode {
    if force_share { LockMode::None } else { LockMode::Read }
}

/// Refuses a cache mode that qemu-img would refuse. The others are harmless: data is durable when a verb returns.
pub(crate) fn cache_mode(mode: Option<&str>) -> Result<(), Failure> {
    match mode {
        None | Some("none" | "off" | "writeback" | "unsafe" | "writethrough" | "directsync") => Ok(()),
        Some(other) => Err(Failure::new(format!("Invalid cache option: {other}"))),
    }
}
