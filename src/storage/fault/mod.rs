//! Storages and file systems that fail at a chosen call.
//!
//! Feature `test-utils`. Run an operation on [`FaultyStorage`]s or a [`FaultyFileSystem`] of one
//! [`Faults`], first without a fault to count its calls, then once for each call with that call
//! failing. The remaining state must be as good as after a crash.
//!
//! ```
//! use std::sync::Arc;
//! use qcow2_chain::storage::fault::{Fault, Faults, FaultyStorage};
//! use qcow2_chain::storage::{Error, MemoryStorage, Storage};
//!
//! let faults = Faults::new(Fault::NoSpace.at(1));
//! let disk = FaultyStorage::new(Arc::new(MemoryStorage::new("disk")), &faults);
//! disk.write_at(b"first", 0)?;
//! assert!(matches!(disk.write_at(b"second", 5), Err(Error::NoSpace { .. })));
//! disk.write_at(b"there is room again", 5)?;
//! assert_eq!(faults.calls(), 3);
//! # Ok::<(), Error>(())
//! ```

mod file_system;

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::{Error, FileId, FileStamp, LockMode, Result, Storage};

pub use file_system::FaultyFileSystem;

/// The kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// Any call fails as on a broken medium. A failed sync poisons the storage.
    Io,
    /// A call that may need space finds none. Only such calls are counted.
    NoSpace,
    /// Any call except a sync is interrupted by a signal and not repeated.
    Interrupted,
    /// A sync of a file or directory fails. Only syncs are counted.
    Sync,
}

/// The kind of a call, which decides which faults apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    /// A call that may need space on the medium.
    TakesRoom,
    Sync,
    Other,
}

impl Fault {
    fn concerns(self, call: Call) -> bool {
        match self {
            Self::Io => true,
            Self::NoSpace => call == Call::TakesRoom,
            Self::Interrupted => call != Call::Sync,
            Self::Sync => call == Call::Sync,
        }
    }

    fn kind(self) -> io::ErrorKind {
        match self {
            Self::Io | Self::Sync => io::ErrorKind::Other,
            Self::NoSpace => io::ErrorKind::StorageFull,
            Self::Interrupted => io::ErrorKind::Interrupted,
        }
    }

    /// Returns the plan of this fault at the call with this number, counted from 0, once.
    #[must_use]
    pub fn at(self, call: u64) -> Plan {
        Plan { fault: self, from: call, ever_after: false, reach: Reach::Nothing }
    }
}

/// The part of a failing write that reaches the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Reach {
    /// Nothing.
    #[default]
    Nothing,
    /// The first half, by whole sectors of 512 bytes.
    Half,
    /// All of it: only the result is lost.
    All,
}

/// The plan of a fault: its kind, its time and its effect.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    fault: Fault,
    from: u64,
    ever_after: bool,
    reach: Reach,
}

impl Plan {
    /// Lets all later calls fail too. Default: one call.
    #[must_use]
    pub fn ever_after(mut self) -> Self {
        self.ever_after = true;
        self
    }

    /// Sets the part of a failing write that reaches the file. Default: nothing.
    #[must_use]
    pub fn with_reach(mut self, reach: Reach) -> Self {
        self.reach = reach;
        self
    }
}

/// The calls to a group of storages and file systems, and the plan of their faults.
#[derive(Debug)]
pub struct Faults {
    plan: Plan,
    calls: AtomicU64,
    healed: AtomicBool,
}

impl Faults {
    /// Returns a group with this plan.
    #[must_use]
    pub fn new(plan: Plan) -> Arc<Self> {
        Arc::new(Self { plan, calls: AtomicU64::new(0), healed: AtomicBool::new(false) })
    }

    /// Returns the number of calls to which the fault applies.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::SeqCst)
    }

    /// Ends the fault: no later call fails, except on a storage whose sync has failed.
    pub fn heal(&self) {
        self.healed.store(true, Ordering::SeqCst);
    }

    /// Counts a call and returns `true` if it fails.
    fn strikes(&self, call: Call) -> bool {
        if !self.plan.fault.concerns(call) {
            return false;
        }
        let number = self.calls.fetch_add(1, Ordering::SeqCst);
        let planned = if self.plan.ever_after { number >= self.plan.from } else { number == self.plan.from };
        planned && !self.healed.load(Ordering::SeqCst)
    }

    fn error(&self, name: &str, action: &str, len: u64) -> Error {
        Error::io(name, action, len, io::Error::new(self.plan.fault.kind(), "injected"))
    }
}

/// A storage that fails as the plan of its group requires.
#[derive(Debug)]
pub struct FaultyStorage {
    inner: Arc<dyn Storage>,
    faults: Arc<Faults>,
    poisoned: AtomicBool,
}

impl FaultyStorage {
    /// Wraps a storage as a member of a group.
    #[must_use]
    pub fn new(inner: Arc<dyn Storage>, faults: &Arc<Faults>) -> Self {
        Self { inner, faults: Arc::clone(faults), poisoned: AtomicBool::new(false) }
    }

    fn check(&self, action: &str, call: Call, len: u64) -> Result<()> {
        if self.faults.strikes(call) { Err(self.faults.error(self.inner.name(), action, len)) } else { Ok(()) }
    }

    /// Refuses changes after a failed sync.
    fn check_poison(&self) -> Result<()> {
        if self.poisoned.load(Ordering::SeqCst) {
            return Err(Error::Poisoned { name: self.inner.name().to_owned() });
        }
        Ok(())
    }
}

impl Storage for FaultyStorage {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.check("read", Call::Other, 0)?;
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.check_poison()?;
        if !self.faults.strikes(Call::TakesRoom) {
            return self.inner.write_at(buf, offset);
        }
        let reached = match self.faults.plan.reach {
            Reach::Nothing => 0,
            Reach::Half => buf.len() / 1024 * 512,
            Reach::All => buf.len(),
        };
        self.inner.write_at(&buf[..reached], offset)?;
        Err(self.faults.error(self.name(), "write", buf.len() as u64))
    }

    fn len(&self) -> Result<u64> {
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.check_poison()?;
        self.check("set the length", Call::TakesRoom, len)?;
        self.inner.set_len(len)
    }

    fn sync(&self) -> Result<()> {
        self.check_poison()?;
        let done = self.check("sync", Call::Sync, 0).and_then(|()| self.inner.sync());
        if done.is_err() {
            self.poisoned.store(true, Ordering::SeqCst);
        }
        done
    }

    fn is_read_only(&self) -> bool {
        self.inner.is_read_only()
    }

    fn is_fixed_size(&self) -> bool {
        self.inner.is_fixed_size()
    }

    fn file_id(&self) -> Option<FileId> {
        self.inner.file_id()
    }

    fn stamp(&self) -> Result<Option<FileStamp>> {
        self.inner.stamp()
    }

    fn zero_range(&self, range: Range<u64>) -> Result<()> {
        self.check_poison()?;
        self.check("zero", Call::TakesRoom, range.end.saturating_sub(range.start))?;
        self.inner.zero_range(range)
    }

    fn punch_range(&self, range: Range<u64>) -> Result<()> {
        self.check_poison()?;
        self.check("punch", Call::Other, 0)?;
        self.inner.punch_range(range)
    }

    fn allocate_range(&self, range: Range<u64>) -> Result<()> {
        self.check_poison()?;
        self.check("allocate", Call::TakesRoom, range.end.saturating_sub(range.start))?;
        self.inner.allocate_range(range)
    }

    fn copy_from(&self, source: &dyn Storage, from: u64, to: u64, len: u64) -> Result<u64> {
        self.check_poison()?;
        self.check("copy", Call::TakesRoom, len)?;
        self.inner.copy_from(source, from, to, len)
    }

    fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>> {
        self.check("look for data", Call::Other, 0)?;
        self.inner.next_data(offset)
    }

    fn allocated_len(&self) -> Result<Option<u64>> {
        self.inner.allocated_len()
    }

    fn free_space(&self) -> Result<Option<u64>> {
        self.inner.free_space()
    }

    fn set_lock(&self, wanted: LockMode) -> Result<()> {
        self.inner.set_lock(wanted)
    }

    fn as_file(&self) -> Option<&std::fs::File> {
        self.inner.as_file()
    }
}
