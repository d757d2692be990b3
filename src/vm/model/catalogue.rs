//! The catalogue: a VM's model as a file that people can read.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::storage::{Access, FileSystem, LockMode, Storage};
use crate::vm::model::store::Store;
use crate::vm::{Error, Model, Result};

/// What the file says of itself.
const FORMAT: &str = "qcow2-chain vm catalogue";
/// The version that is written, and the only one that is read.
const VERSION: u32 = 1;
/// No catalogue is longer: a hundred thousand snapshots fit.
const MAX_LEN: u64 = 256 << 20;

/// The file: what it is, the model, and a sum over the model.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Document<M> {
    format: String,
    version: u32,
    /// The CRC-32 of the model as JSON without white space, its keys in the order of this version.
    crc32: String,
    model: M,
}

/// Only what tells whether the rest can be read.
#[derive(Debug, Deserialize)]
struct Preface {
    format: String,
    version: u32,
}

/// A VM's model in a JSON file, which is replaced as a whole: written beside it, made durable, renamed.
#[derive(Clone, Debug)]
pub struct Catalogue {
    names: Arc<dyn FileSystem>,
    path: PathBuf,
}

/// A path with something added to its last name.
pub(in crate::vm) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(suffix);
    path.with_file_name(name)
}

/// The directory of a file.
pub(in crate::vm) fn directory_of(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new(""))
}

/// All bytes of a file of ours.
pub(in crate::vm) fn read_all(storage: &dyn Storage, max: u64) -> Result<Vec<u8>> {
    let len = storage.len()?;
    if len > max {
        return Err(Error::Catalogue { file: storage.name().to_owned(), why: format!("{len} bytes are too many") });
    }
    let mut bytes = vec![0; usize::try_from(len).unwrap_or_default()];
    storage.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

fn sum(model: &Model) -> serde_json::Result<String> {
    Ok(format!("{:08x}", crc32fast::hash(&serde_json::to_vec(model)?)))
}

impl Catalogue {
    /// The catalogue of this path.
    #[must_use]
    pub fn new(names: Arc<dyn FileSystem>, path: impl Into<PathBuf>) -> Self {
        Self { names, path: path.into() }
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it exists.
    ///
    /// # Errors
    /// As [`FileSystem::exists`].
    pub fn exists(&self) -> Result<bool> {
        Ok(self.names.exists(&self.path)?)
    }

    /// The text of a model's catalogue.
    ///
    /// # Errors
    /// [`Error::Catalogue`] where it contradicts itself, so that it could not be read again, or cannot be written as JSON.
    pub fn encode(model: &Model) -> Result<Vec<u8>> {
        let wrongs = model.contradictions();
        if !wrongs.is_empty() {
            return Err(wrong(Path::new("catalogue"), wrongs.join("; ")));
        }
        let encode = || {
            let document = Document { format: FORMAT.to_owned(), version: VERSION, crc32: sum(model)?, model };
            let mut text = serde_json::to_vec_pretty(&document)?;
            text.push(b'\n');
            Ok(text)
        };
        encode().map_err(|error: serde_json::Error| wrong(Path::new("catalogue"), error.to_string()))
    }

    /// The model of a catalogue's text.
    ///
    /// # Errors
    /// [`Error::Catalogue`] where it is none, is of another version, damaged, or contradicts itself.
    pub fn decode(text: &[u8], file: &Path) -> Result<Model> {
        let preface: Preface = serde_json::from_slice(text).map_err(|error| wrong(file, error.to_string()))?;
        if preface.format != FORMAT {
            return Err(wrong(file, format!("it is no catalogue but '{}'", preface.format)));
        }
        if preface.version != VERSION {
            return Err(wrong(file, format!("version {} of catalogues is not known", preface.version)));
        }
        let document: Document<Model> = serde_json::from_slice(text).map_err(|error| wrong(file, error.to_string()))?;
        let model = document.model;
        let found = sum(&model).map_err(|error| wrong(file, error.to_string()))?;
        if found != document.crc32 {
            return Err(wrong(file, format!("its sum is {found}, not {}: it was damaged or edited", document.crc32)));
        }
        let wrongs = model.contradictions();
        if wrongs.is_empty() { Ok(model) } else { Err(wrong(file, wrongs.join("; "))) }
    }
}

fn wrong(file: &Path, why: String) -> Error {
    Error::Catalogue { file: file.display().to_string(), why }
}

/// Takes a name away that may be gone already. Tells whether it was there.
pub(in crate::vm) fn unlink_if_there(names: &dyn FileSystem, path: &Path) -> Result<bool> {
    if !names.exists(path)? {
        return Ok(false);
    }
    names.unlink(path)?;
    Ok(true)
}

impl Store for Catalogue {
    fn load(&self) -> Result<Model> {
        let storage = self.names.open(&self.path, &Access::read().with_lock(LockMode::None))?;
        Self::decode(&read_all(&*storage, MAX_LEN)?, &self.path)
    }

    fn save(&self, model: &Model) -> Result<()> {
        let text = Self::encode(model)?;
        let new = with_suffix(&self.path, ".new");
        unlink_if_there(&*self.names, &new)?;
        let storage = self.names.create_new(&new)?;
        storage.write_at(&text, 0)?;
        storage.sync()?; // barrier: all of the new catalogue before it has the name
        drop(storage);
        self.names.rename(&new, &self.path)?;
        self.names.sync_dir(directory_of(&self.path))?; // barrier: the new catalogue before anything that relies on it
        Ok(())
    }

    fn settle(&self) -> Result<()> {
        // What has the name was synced before it got it; the name itself may not be durable.
        self.names.sync_dir(directory_of(&self.path))?;
        Ok(())
    }
}
