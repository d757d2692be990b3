//! Opening what the user names. The format of a file named by the user is looked at only where `-f` does not tell it,
//! and only to find qcow2: a raw image whose guest wrote a header into it is never taken for qcow2 by way of a chain.

use std::path::Path;
use std::sync::Arc;

use qcow2_chain::chain::{self, Chain, Format, Remedy};
use qcow2_chain::storage::{Access, FileStorage, LockMode, Storage};

use crate::failure::Failure;
use crate::options::PolicyArgs;

/// The format that the user gave, or qcow2 if the file says so.
pub(crate) fn format(path: &Path, given: Option<&str>) -> Result<Format, Failure> {
    match given {
        Some(name) => named_format(name).map_err(|failure| cannot_open(path, &failure)),
        None => probe(path),
    }
}

/// The format of this name.
pub(crate) fn named_format(name: &str) -> Result<Format, Failure> {
    match name {
        "qcow2" => Ok(Format::Qcow2),
        "raw" => Ok(Format::Raw),
        other => Err(Failure::new(format!("Unknown driver '{other}' (qcow2 and raw are served)"))),
    }
}

fn probe(path: &Path) -> Result<Format, Failure> {
    let storage = FileStorage::open(path, &Access::read().with_lock(LockMode::None))?;
    let mut magic = [0; 4];
    storage.read_at(&mut magic, 0)?;
    if &magic == b"QFI\xfb" {
        return Ok(Format::Qcow2);
    }
    let why = "not a qcow2 image; formats are not guessed: if it is a raw image, say -f raw";
    Err(cannot_open(path, &Failure::new(why)))
}

/// A failure to open, in qemu-img's form.
pub(crate) fn cannot_open(path: &Path, why: &Failure) -> Failure {
    Failure::new(format!("Could not open '{}': {why}", path.display()))
}

/// The file at `path`, with the locks that `access` says.
pub(crate) fn file(path: &Path, access: &Access) -> Result<Arc<dyn Storage>, Failure> {
    Ok(Arc::new(FileStorage::open(path, access)?))
}

/// The chain that begins at `path`.
pub(crate) fn chain(path: &Path, given: Option<&str>, lock: LockMode, policy: &PolicyArgs) -> Result<Chain, Failure> {
    let format = format(path, given)?;
    Chain::open(path, &policy.chain_options(path, format, lock)).map_err(explain)
}

/// The failure, and which option would have allowed what was refused.
pub(crate) fn explain(error: chain::Error) -> Failure {
    let hint = match &error {
        chain::Error::Refused { remedy: Remedy::Beneath(directory), .. } => {
            format!("Use --allow {} to follow it, or --allow-any", directory.display())
        }
        chain::Error::Refused { remedy: Remedy::List(_), .. } => "Use --allow-any to follow it".to_owned(),
        chain::Error::UnknownFormat { .. } => {
            "Record the format first, with rebase -u -F FMT -b NAME, or use --probe to take what the content says"
                .to_owned()
        }
        _ => return Failure::from(error),
    };
    Failure::from(error).with_hint(&hint)
}
