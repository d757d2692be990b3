//! Bytes and names in memory.

use std::sync::{PoisonError, RwLock};

use super::{Result, Storage};

/// Bytes in memory.
#[derive(Debug, Default)]
pub struct MemoryStorage {
    name: String,
    bytes: RwLock<Vec<u8>>,
}

/// OWNER: a directory tree in memory.
#[derive(Debug)]
pub struct MemoryNames;

impl MemoryStorage {
    /// An empty storage of this name.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), bytes: RwLock::default() }
    }

    /// A storage of this name and content.
    #[must_use]
    pub fn with_bytes(name: impl Into<String>, bytes: Vec<u8>) -> Self {
        Self { name: name.into(), bytes: RwLock::new(bytes) }
    }

    /// A copy of the content.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        self.bytes.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Storage for MemoryStorage {
    fn name(&self) -> &str {
        &self.name
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let bytes = self.bytes.read().unwrap_or_else(PoisonError::into_inner);
        let at = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
        let have = (bytes.len() - at).min(buf.len());
        buf[..have].copy_from_slice(&bytes[at..at + have]);
        buf[have..].fill(0);
        Ok(())
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let mut bytes = self.bytes.write().unwrap_or_else(PoisonError::into_inner);
        let at = usize::try_from(offset)
            .map_err(|_| super::Error::NoSpace { name: self.name.clone(), need: buf.len() as u64 })?;
        if bytes.len() < at + buf.len() {
            bytes.resize(at + buf.len(), 0);
        }
        bytes[at..at + buf.len()].copy_from_slice(buf);
        Ok(())
    }
    fn len(&self) -> Result<u64> {
        Ok(self.bytes.read().unwrap_or_else(PoisonError::into_inner).len() as u64)
    }
    fn set_len(&self, len: u64) -> Result<()> {
        let len = usize::try_from(len).map_err(|_| super::Error::NoSpace { name: self.name.clone(), need: len })?;
        self.bytes.write().unwrap_or_else(PoisonError::into_inner).resize(len, 0);
        Ok(())
    }
    fn sync(&self) -> Result<()> {
        Ok(())
    }
}
