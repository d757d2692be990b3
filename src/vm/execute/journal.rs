//! The journal: the plan of the operation that is under way, and its progress.
//!
//! One record per line: its CRC-32 in eight hexadecimal digits, a space, the record as JSON. The
//! first record is the plan, which is durable before any other change. Records are appended one by
//! one, each durable before the next, so that a crash can tear the last one only.
#![allow(unreachable_pub, reason = "Journal and Record are public with the feature test-utils")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::storage::{Access, Attributes, FileSystem, LockMode, Storage};
use crate::vm::model::catalogue::{directory_of, read_all, unlink_if_there};
use crate::vm::plan::Plan;
use crate::vm::{Error, Result};

/// The version that is written, and the only one that is read.
const VERSION: u32 = 2;
/// The limit of a journal's length, in bytes.
const MAX_LEN: u64 = 256 << 20;

/// One record of the journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", rename_all_fields = "kebab-case")]
pub enum Record {
    /// The plan. It is the first record, and has the identity of the set and the number of the
    /// operation.
    Plan {
        /// The version of the journal.
        version: u32,
        /// The plan.
        plan: Plan,
    },
    /// All overlays of a stage are complete and durable. Before this record no VM can have written
    /// to them.
    Created {
        /// The stage.
        stage: usize,
    },
    /// A merge is about to change the guest-visible content of the base. Before this record it can
    /// be called off.
    Changing {
        /// The stage.
        stage: usize,
        /// The volume.
        volume: String,
        /// The step of the volume.
        step: usize,
    },
    /// A step is complete and durable.
    Done {
        /// The stage.
        stage: usize,
        /// The volume.
        volume: String,
        /// The step of the volume.
        step: usize,
        /// If set, a running VM was switched to the base by the step.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        switched: bool,
    },
    /// A hypervisor is about to start a merge, or its running job is about to be taken over. If the
    /// VM writes the base later, it was switched.
    Started {
        /// The stage.
        stage: usize,
        /// The volume.
        volume: String,
        /// The step of the volume.
        step: usize,
    },
    /// A running VM is about to be switched to the base of a merge. Only its hypervisor can say if
    /// it was.
    Switching {
        /// The stage.
        stage: usize,
        /// The volume.
        volume: String,
        /// The step of the volume.
        step: usize,
    },
}

/// The progress of a step by the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::vm) enum Progressed {
    /// No record exists.
    No,
    /// The library was about to change the base.
    Changing,
    /// A hypervisor was about to start, or did start, the merge.
    Started,
    /// A running VM was about to be switched.
    Switching,
    /// The step is complete.
    Done {
        /// If set, a running VM was switched by it.
        switched: bool,
    },
}

/// The journal of an operation that is under way.
#[derive(Debug)]
pub struct Journal {
    file_system: Arc<dyn FileSystem>,
    path: PathBuf,
    storage: Arc<dyn Storage>,
    /// If not set, the file is open for reading.
    writable: bool,
    end: u64,
    records: Vec<Record>,
}

/// The result of a look for the journal.
#[derive(Debug)]
pub(in crate::vm) enum Found {
    /// No journal exists: no operation is under way.
    Nothing,
    /// The plan of the journal was never durable: nothing has happened yet.
    Torn,
    /// An operation is under way.
    Journal(Box<Journal>, Box<Plan>),
}

fn encode(record: &Record, path: &Path) -> Result<Vec<u8>> {
    let json = serde_json::to_vec(record).map_err(|error| wrong(path, error.to_string()))?;
    let mut line = format!("{:08x} ", crc32fast::hash(&json)).into_bytes();
    line.extend(json);
    line.push(b'\n');
    Ok(line)
}

/// Decodes the record of a line without its newline. Returns `None` if it is torn.
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

/// Decodes the records of a journal. Returns them and the offset of the end of the last complete
/// one.
fn records(bytes: &[u8], path: &Path) -> Result<(Vec<Record>, usize)> {
    let mut records = Vec::new();
    let (mut at, mut end) = (0, 0);
    let mut torn = false;
    for line in bytes.split_inclusive(|&byte| byte == b'\n') {
        at += line.len();
        match line.strip_suffix(b"\n").and_then(decode) {
            Some(_) if torn => {
                return Err(wrong(path, format!("the record before byte {} is damaged", at - line.len())));
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
    /// Returns the step that the record concerns (stage, volume, step), and the progress that it
    /// records.
    fn progress(&self) -> Option<((usize, &str, usize), Progressed)> {
        let (stage, volume, step, progressed) = match self {
            Self::Plan { .. } | Self::Created { .. } => return None,
            Self::Changing { stage, volume, step } => (stage, volume, step, Progressed::Changing),
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
    /// Begins a journal with its plan, durable on return. If a catalogue exists at `model`, the
    /// journal gets its owner, mode and further attributes.
    ///
    /// # Errors
    /// Any error of writing it. At most a torn journal exists then.
    pub fn begin(file_system: &Arc<dyn FileSystem>, path: &Path, model: &Path, plan: &Plan) -> Result<Self> {
        let line = encode(&Record::Plan { version: VERSION, plan: plan.clone() }, path)?;
        let storage = create_like(file_system, path, model)?;
        storage.write_at(&line, 0)?;
        storage.sync()?; // barrier: the plan before its name
        file_system.sync_dir(directory_of(path))?; // barrier: the journal before the first change that it describes
        let (file_system, path, end) = (Arc::clone(file_system), path.to_owned(), line.len() as u64);
        Ok(Self { file_system, path, storage, writable: true, end, records: Vec::new() })
    }

    /// Looks for a journal, without a change. A journal that may not be written is found too.
    ///
    /// # Errors
    /// [`Error::Journal`]: it is damaged in a way that no crash explains.
    pub(in crate::vm) fn find(file_system: &Arc<dyn FileSystem>, path: &Path) -> Result<Found> {
        if !file_system.exists(path)? {
            return Ok(Found::Nothing);
        }
        let storage = file_system.open(path, &Access::read().with_lock(LockMode::None))?;
        let (records, end) = records(&read_all(&*storage, MAX_LEN)?, path)?;
        let mut records = records.into_iter();
        match records.next() {
            None => Ok(Found::Torn),
            Some(Record::Plan { version: VERSION, plan }) if plan.stages.is_empty() => {
                Err(wrong(path, format!("its plan ({}) has no stages", plan.purpose)))
            }
            Some(Record::Plan { version: VERSION, plan }) => {
                let (file_system, path) = (Arc::clone(file_system), path.to_owned());
                let (end, records) = (end as u64, records.collect());
                let journal = Self { file_system, path, storage, writable: false, end, records };
                Ok(Found::Journal(Box::new(journal), Box::new(plan)))
            }
            Some(Record::Plan { version, .. }) => {
                Err(wrong(path, format!("the version of the journal is {version}, supported is {VERSION}")))
            }
            Some(_) => Err(wrong(path, "its first record is not a plan")),
        }
    }

    /// Opens a found journal for writing, makes its records durable, and cuts off a torn tail.
    ///
    /// # Errors
    /// Any error of writing it.
    pub(in crate::vm) fn settle(&mut self) -> Result<()> {
        if !self.writable {
            self.storage = self.file_system.open(&self.path, &Access::write().with_lock(LockMode::None))?;
            self.writable = true;
        }
        if self.storage.len()? > self.end {
            self.storage.set_len(self.end)?;
        }
        self.storage.sync()?;
        Ok(self.file_system.sync_dir(directory_of(&self.path))?)
    }

    /// Appends a record, durable on return.
    ///
    /// # Errors
    /// Any error of writing it.
    pub fn append(&mut self, record: Record) -> Result<()> {
        let line = encode(&record, &self.path)?;
        self.storage.write_at(&line, self.end)?;
        self.storage.sync()?; // barrier: each record before the next
        self.end += line.len() as u64;
        self.records.push(record);
        Ok(())
    }

    /// Returns the recorded progress of a step.
    pub(in crate::vm) fn progressed(&self, stage: usize, volume: &str, step: usize) -> Progressed {
        let noted = self.records.iter().rev().filter_map(Record::progress);
        let mut of_step = noted.filter(|(of, _)| *of == (stage, volume, step)).map(|(_, progressed)| progressed);
        of_step.next().unwrap_or(Progressed::No)
    }

    /// Returns true if the overlays of a stage are recorded as complete.
    pub(in crate::vm) fn has_created(&self, stage: usize) -> bool {
        self.records.iter().any(|record| matches!(record, Record::Created { stage: of } if *of == stage))
    }

    /// Returns true if a hypervisor was asked for a merge whose end is not recorded.
    pub(in crate::vm) fn needs_hypervisor(&self) -> bool {
        self.records.iter().filter_map(Record::progress).any(|((stage, volume, step), _)| {
            matches!(self.progressed(stage, volume, step), Progressed::Started | Progressed::Switching)
        })
    }

    /// Returns true if a hypervisor was asked for a merge.
    pub(in crate::vm) fn used_hypervisor(&self) -> bool {
        self.records.iter().any(|record| match record {
            Record::Started { .. } | Record::Switching { .. } => true,
            Record::Done { switched, .. } => *switched,
            _ => false,
        })
    }

    /// Returns the first volume whose merge changed content, or completed.
    pub(in crate::vm) fn first_change(&self) -> Option<&str> {
        self.records.iter().filter_map(Record::progress).map(|((_, volume, _), _)| volume).next()
    }

    /// Removes the journal: the operation is complete, or undone.
    ///
    /// # Errors
    /// Any error of removing it.
    pub(in crate::vm) fn clear(self) -> Result<()> {
        clear(&*self.file_system, &self.path)
    }
}

/// Creates a file with the attributes of the catalogue, if that exists.
pub(in crate::vm) fn create_like(
    file_system: &Arc<dyn FileSystem>,
    path: &Path,
    like: &Path,
) -> Result<Arc<dyn Storage>> {
    if !file_system.exists(like)? {
        return Ok(file_system.create_new(path)?);
    }
    let model = file_system.open(like, &Access::read().with_lock(LockMode::None))?;
    Ok(file_system.create_new_like(path, &*model, Attributes::BestEffort)?)
}

/// Removes the journal's name, if it exists.
pub(in crate::vm) fn clear(file_system: &dyn FileSystem, path: &Path) -> Result<()> {
    if unlink_if_there(file_system, path)? {
        file_system.sync_dir(directory_of(path))?; // barrier: the end of one operation before the next begins
    }
    Ok(())
}
