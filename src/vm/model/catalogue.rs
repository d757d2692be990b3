//! The catalogue: the model of a VM as a JSON file.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::storage::{Access, FileSystem, LockMode, Storage};
use crate::vm::execute::journal::create_like;
use crate::vm::model::identity::random_token;
use crate::vm::model::store::Store;
use crate::vm::{Error, Model, Result};

/// The suffix of a new catalogue before it is renamed; a random token follows.
const NEW: &str = ".new-";
/// The longest file name of a catalogue in bytes, so that the names beside it stay below 255 bytes.
pub(in crate::vm) const MAX_FILE_NAME: usize = 255 - NEW.len() - 16;
/// The identification in the file.
const FORMAT: &str = "qcow2-chain vm catalogue";
/// The version that is written, and the only one that is read.
const VERSION: u32 = 2;
/// The limit of a catalogue's length, in bytes: a hundred thousand snapshots fit.
const MAX_LEN: u64 = 256 << 20;

/// The document: identification, model, and a checksum of the model.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Document<M> {
    format: String,
    version: u32,
    /// The CRC-32 of the model as JSON without white space, with the keys in the order of this
    /// version.
    crc32: String,
    model: M,
}

/// The part that identifies a catalogue of any version.
#[derive(Debug, Deserialize)]
struct Preface {
    format: String,
    version: u32,
}

/// A model in a JSON file. A save writes a new file beside it, makes it durable, and renames it
/// over the old one.
#[derive(Clone, Debug)]
pub struct Catalogue {
    file_system: Arc<dyn FileSystem>,
    path: PathBuf,
}

/// Adds a suffix to the file name of a path.
pub(in crate::vm) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(suffix);
    path.with_file_name(name)
}

/// Returns the directory of a file.
pub(in crate::vm) fn directory_of(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new(""))
}

/// Reads all bytes of a file, at most `max`.
pub(in crate::vm) fn read_all(storage: &dyn Storage, max: u64) -> Result<Vec<u8>> {
    let len = storage.len()?;
    if len > max {
        return Err(Error::Catalogue {
            file: storage.name().to_owned(),
            why: format!("the file has {len} bytes, the limit is {max}"),
        });
    }
    let mut bytes = vec![0; usize::try_from(len).unwrap_or_default()];
    storage.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

fn sum(model: &Model) -> serde_json::Result<String> {
    Ok(format!("{:08x}", crc32fast::hash(&serde_json::to_vec(model)?)))
}

impl Catalogue {
    /// Creates the store for the catalogue at this path. Opens nothing.
    #[must_use]
    pub fn new(file_system: Arc<dyn FileSystem>, path: impl Into<PathBuf>) -> Self {
        Self { file_system, path: path.into() }
    }

    /// Returns the path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns true if the catalogue exists.
    ///
    /// # Errors
    /// [`Error::Storage`]: the path cannot be examined.
    pub fn exists(&self) -> Result<bool> {
        Ok(self.file_system.exists(&self.path)?)
    }

    /// Encodes a model as the text of a catalogue.
    ///
    /// # Errors
    /// [`Error::Catalogue`]: the model contradicts itself, or cannot be written as JSON.
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

    /// Decodes the text of a catalogue.
    ///
    /// # Errors
    /// [`Error::Catalogue`]: it is not a catalogue, has another version, is damaged, or contradicts itself.
    pub fn decode(text: &[u8], file: &Path) -> Result<Model> {
        let preface: Preface = serde_json::from_slice(text).map_err(|error| wrong(file, error.to_string()))?;
        if preface.format != FORMAT {
            return Err(wrong(file, format!("the file is not a catalogue, its format is '{}'", preface.format)));
        }
        if preface.version != VERSION {
            return Err(wrong(
                file,
                format!("the version of the catalogue is {}, supported is {VERSION}", preface.version),
            ));
        }
        let document: Document<Model> = serde_json::from_slice(text).map_err(|error| wrong(file, error.to_string()))?;
        let model = document.model;
        let found = sum(&model).map_err(|error| wrong(file, error.to_string()))?;
        if found != document.crc32 {
            return Err(wrong(
                file,
                format!("the checksum is {found}, recorded is {}: the file was damaged or edited", document.crc32),
            ));
        }
        let wrongs = model.contradictions();
        if wrongs.is_empty() { Ok(model) } else { Err(wrong(file, wrongs.join("; "))) }
    }
}

fn wrong(file: &Path, why: String) -> Error {
    Error::Catalogue { file: file.display().to_string(), why }
}

/// Removes a name that may be gone already. Returns true if it existed.
pub(in crate::vm) fn unlink_if_there(file_system: &dyn FileSystem, path: &Path) -> Result<bool> {
    if !file_system.exists(path)? {
        return Ok(false);
    }
    file_system.unlink(path)?;
    Ok(true)
}

impl Catalogue {
    /// Writes a catalogue under a name of its own, durable on return.
    fn write_new(&self, new: &Path, text: &[u8]) -> Result<()> {
        let storage = create_like(&self.file_system, new, &self.path)?;
        storage.write_at(text, 0)?;
        storage.sync()?; // barrier: the content of the new catalogue before its name
        Ok(())
    }

    /// Returns true for the path of a new catalogue that an interrupted save left behind.
    fn is_leftover(&self, path: &Path) -> bool {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let stem = self.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let token = name.strip_prefix(&stem).and_then(|rest| rest.strip_prefix(NEW));
        token.is_some_and(|token| token.len() == 16 && token.bytes().all(|byte| byte.is_ascii_hexdigit()))
    }
}

impl Store for Catalogue {
    fn load(&self) -> Result<Model> {
        let storage = self.file_system.open(&self.path, &Access::read().with_lock(LockMode::None))?;
        Self::decode(&read_all(&*storage, MAX_LEN)?, &self.path)
    }

    fn save(&self, model: &Model) -> Result<()> {
        let text = Self::encode(model)?;
        // A random name, so that no file of anybody else is in the way.
        let new = with_suffix(&self.path, &format!("{NEW}{}", random_token()));
        let done = self.write_new(&new, &text).and_then(|()| Ok(self.file_system.rename(&new, &self.path)?));
        if done.is_err() {
            // If this fails too, recovery removes it.
            let _ = unlink_if_there(&*self.file_system, &new);
        }
        done?;
        // barrier: the new catalogue before any change that relies on it
        self.file_system.sync_dir(directory_of(&self.path))?;
        Ok(())
    }

    fn settle(&self) -> Result<()> {
        let directory = directory_of(&self.path);
        for path in self.file_system.list(directory)?.into_iter().filter(|path| self.is_leftover(path)) {
            self.file_system.unlink(&path)?;
        }
        // The content was synced before it got the name; the name itself may not be durable.
        self.file_system.sync_dir(directory)?;
        Ok(())
    }
}
