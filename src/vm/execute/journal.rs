//! The journal: the plan of the operation that is under way, and which of its steps are done.
//!
//! One record a line: its CRC-32 in eight hexadecimal digits, a space, the record as JSON. The first is the plan, which is
//! durable before anything else happens. Records are appended one by one, each durable before the next, so that a crash can
//! only tear the last one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::storage::{Access, FileSystem, LockMode, Storage};
use crate::vm::model::catalogue::{directory_of, read_all, unlink_if_there};
use crate::vm::plan::Plan;
use crate::vm::{Error, Result};

/// The version of journals.
const VERSION: u32 = 1;
/// No journal is longer.
const MAX_LEN: u64 = 256 << 20;

/// One record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", rename_all_fields = "kebab-case")]
pub enum Record {
    /// What is to be done; the first record.
    Plan {
        /// The version of the journal.
        version: u32,
        /// The plan.
        plan: Plan,
    },
    /// A step is done and durable.
    Done {
        /// The number of its stage.
        stage: usize,
        /// Its volume.
        volume: String,
        /// Its number among the volume's steps.
        step: usize,
        /// Whether a running VM was switched over by it.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        switched: bool,
    },
    /// A running VM's hypervisor is about to be told to do a merge. Should the VM write the base later, it was switched over.
    Started {
        /// The number of its stage.
        stage: usize,
        /// Its volume.
        volume: String,
        /// Its number among the volume's steps.
        step: usize,
    },
    /// A running VM is about to be switched over to the base of a merge. Whether it was, only its hypervisor knows.
    Switching {
        /// The number of its stage.
        stage: usize,
        /// Its volume.
        volume: String,
        /// Its number among the volume's steps.
        step: usize,
    },
}

/// How far a step is, by the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Progressed {
    /// Nothing is noted.
    No,
    /// A running VM's hypervisor was about to do it.
    Started,
    /// A running VM was about to be switched over.
    Switching,
    /// It is done.
    Done {
        /// Whether a running VM was switched over by it.
        switched: bool,
    },
}

/// The journal of an operation that is under way.
#[derive(Debug)]
pub struct Journal {
    names: Arc<dyn FileSystem>,
    path: PathBuf,
    storage: Arc<dyn Storage>,
    end: u64,
    done: Vec<Record>,
}

/// What the name of a journal leads to.
#[derive(Debug)]
pub enum Found {
    /// Nothing: no operation is under way.
    Nothing,
    /// A journal whose plan was never durable: nothing has happened yet.
    Torn,
    /// An operation that is under way.
    Journal(Box<Journal>, Box<Plan>),
}

fn encode(record: &Record, path: &Path) -> Result<Vec<u8>> {
    let json = serde_json::to_vec(record).map_err(|error| wrong(path, error.to_string()))?;
    let mut line = format!("{:08x} ", crc32fast::hash(&json)).into_bytes();
    line.extend(json);
    line.push(b'\n');
    Ok(line)
}

/// The record of a line without its end; `None` where it is torn.
fn decode(line: &[u8]) -> Option<Record> {
    let (sum, json) = (line.get(..8)?, line.get(9..)?);
    let sum = u32::from_str_radix(std::str::from_utf8(sum).ok()?, 16).ok()?;
    if line.get(8) != Some(&b' ') || crc32fast::hash(json) != sum {
        return None;
    }
    serde_json::from_slice(json).ok()
}

fn wrong(path: &Path, why: impl Into<String>) -> Error {
    Error::Journal { file: path.display().to_string(), why: why.into() }
}

/// The records of a journal's bytes, and where the last whole one ends.
fn records(bytes: &[u8], path: &Path) -> Result<(Vec<Record>, usize)> {
    let mut records = Vec::new();
    let (mut at, mut end) = (0, 0);
    let mut torn = false;
    for line in bytes.split_inclusive(|&byte| byte == b'\n') {
        at += line.len();
        match line.strip_suffix(b"\n").and_then(decode) {
            Some(_) if torn => {
                return Err(wrong(path, format!("a damaged record lies before the one at {}", at - line.len())));
            }
            Some(record) => {
                records.push(record);
                end = at;
            }
            None => torn = true,
        }
    }
    Ok((records, end))
}

impl Record {
    /// The step that it is of (stage, volume, number), and what it tells of it.
    fn tells(&self) -> Option<((usize, &str, usize), Progressed)> {
        let (stage, volume, step, progressed) = match self {
            Self::Plan { .. } => return None,
            Self::Started { stage, volume, step } => (stage, volume, step, Progressed::Started),
            Self::Switching { stage, volume, step } => (stage, volume, step, Progressed::Switching),
            Self::Done { stage, volume, step, switched } => {
                (stage, volume, step, Progressed::Done { switched: *switched })
            }
        };
        Some(((*stage, volume.as_str(), *step), progressed))
    }
}

impl Journal {
    /// Begins a journal with its plan, durable on return.
    ///
    /// # Errors
    /// What writing it gives; then there is at most a torn one.
    pub fn begin(names: &Arc<dyn FileSystem>, path: &Path, plan: &Plan) -> Result<Self> {
        let line = encode(&Record::Plan { version: VERSION, plan: plan.clone() }, path)?;
        let storage = names.create_new(path)?;
        storage.write_at(&line, 0)?;
        storage.sync()?; // barrier: the plan before its name
        names.sync_dir(directory_of(path))?; // barrier: the journal before the first thing that it tells of
        let (names, path, end) = (Arc::clone(names), path.to_owned(), line.len() as u64);
        Ok(Self { names, path, storage, end, done: Vec::new() })
    }

    /// Looks for a journal, without changing anything.
    ///
    /// # Errors
    /// [`Error::Journal`] where it is damaged in a way that no crash explains.
    pub fn find(names: &Arc<dyn FileSystem>, path: &Path) -> Result<Found> {
        if !names.exists(path)? {
            return Ok(Found::Nothing);
        }
        let storage = names.open(path, &Access::write().with_lock(LockMode::None))?;
        let (records, end) = records(&read_all(&*storage, MAX_LEN)?, path)?;
        let mut records = records.into_iter();
        match records.next() {
            None => Ok(Found::Torn),
            Some(Record::Plan { version: VERSION, plan }) if plan.stages.is_empty() => {
                Err(wrong(path, format!("its plan ({}) has no stages", plan.purpose)))
            }
            Some(Record::Plan { version: VERSION, plan }) => {
                let (names, path) = (Arc::clone(names), path.to_owned());
                let journal = Self { names, path, storage, end: end as u64, done: records.collect() };
                Ok(Found::Journal(Box::new(journal), Box::new(plan)))
            }
            Some(Record::Plan { version, .. }) => {
                Err(wrong(path, format!("version {version} of journals is not known")))
            }
            Some(_) => Err(wrong(path, "its first record is no plan")),
        }
    }

    /// Makes what was found durable, and cuts off what a crash has torn.
    ///
    /// # Errors
    /// What writing it gives.
    pub fn settle(&self) -> Result<()> {
        if self.storage.len()? > self.end {
            self.storage.set_len(self.end)?;
        }
        self.storage.sync()?;
        Ok(self.names.sync_dir(directory_of(&self.path))?)
    }

    /// Notes that a step is done, durable on return.
    ///
    /// # Errors
    /// What writing it gives.
    pub fn append(&mut self, record: Record) -> Result<()> {
        let line = encode(&record, &self.path)?;
        self.storage.write_at(&line, self.end)?;
        self.storage.sync()?; // barrier: each record before the next
        self.end += line.len() as u64;
        self.done.push(record);
        Ok(())
    }

    /// How far a step is noted to be.
    #[must_use]
    pub fn progressed(&self, stage: usize, volume: &str, step: usize) -> Progressed {
        let noted = self.done.iter().rev().filter_map(Record::tells);
        let mut of_step = noted.filter(|(of, _)| *of == (stage, volume, step)).map(|(_, progressed)| progressed);
        of_step.next().unwrap_or(Progressed::No)
    }

    /// Ends the journal: the operation is done, or undone.
    ///
    /// # Errors
    /// What taking its name away gives.
    pub fn clear(self) -> Result<()> {
        clear(&*self.names, &self.path)
    }
}

/// Takes the journal's name away, if it is there.
pub(in crate::vm) fn clear(names: &dyn FileSystem, path: &Path) -> Result<()> {
    if unlink_if_there(names, path)? {
        names.sync_dir(directory_of(path))?; // barrier: the end of one operation before the next begins
    }
    Ok(())
}
