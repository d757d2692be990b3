//! Writing back early: while a long merge copies, what it has copied already goes to the medium.
//!
//! The barriers of the merge stand where they stood; they find less left to do. Early syncs order nothing: what they make
//! durable is data that no mapping names yet, or that the layer above still covers.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use crate::storage::{self, Storage};

/// Merges of less data leave all to the barriers.
const WORTH_IT: u64 = 128 << 20;
/// How many early syncs there are at the most, however much is copied.
const SYNCS: u64 = 6;

/// A thread that syncs when it is told to.
#[derive(Debug, Default)]
pub(super) struct Writeback {
    thread: Option<(Sender<()>, JoinHandle<storage::Result<()>>)>,
    /// Bytes between two syncs.
    every: u64,
    since: u64,
}

impl Writeback {
    /// Prepares for a merge of so many bytes.
    pub(super) fn new(storage: &Arc<dyn Storage>, total: u64) -> Self {
        if total < WORTH_IT {
            return Self::default();
        }
        let (sender, receiver) = channel();
        let storage = Arc::clone(storage);
        let work = move || {
            while receiver.recv().is_ok() {
                storage.sync()?;
            }
            Ok(())
        };
        let thread = std::thread::Builder::new().name("writeback".to_owned()).spawn(work).ok();
        Self { thread: thread.map(|thread| (sender, thread)), every: total / SYNCS, since: 0 }
    }

    /// Tells of bytes that were written.
    pub(super) fn written(&mut self, len: u64) {
        let Some((sender, _)) = &self.thread else { return };
        self.since += len;
        if self.since >= self.every {
            self.since = 0;
            // Where the thread has ended, a sync has failed: `finish` tells.
            let _ = sender.send(());
        }
    }

    /// Waits for what is under way: no early sync comes between the barriers of the merge.
    ///
    /// # Errors
    /// That of the early sync that failed. A later one may succeed although the system has dropped what was written, so
    /// that the merge must not go on to its barriers.
    pub(super) fn finish(&mut self) -> storage::Result<()> {
        let Some((sender, thread)) = self.thread.take() else { return Ok(()) };
        drop(sender);
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for Writeback {
    /// Where a merge ends early: waits, so that nothing is synced behind the caller's back.
    fn drop(&mut self) {
        if let Some((sender, thread)) = self.thread.take() {
            drop(sender);
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::{WORTH_IT, Writeback};
    use crate::storage::{Error, MemoryStorage, Result, Storage};

    /// Fails the sync with this number, and forgets that it did.
    #[derive(Debug)]
    struct Forgetful {
        inner: MemoryStorage,
        failing: u64,
        syncs: AtomicU64,
    }

    impl Forgetful {
        fn new(failing: u64) -> Arc<Self> {
            Arc::new(Self { inner: MemoryStorage::new("forgetful"), failing, syncs: AtomicU64::new(0) })
        }
    }

    impl Storage for Forgetful {
        fn name(&self) -> &str {
            self.inner.name()
        }
        fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
            self.inner.read_at(buf, offset)
        }
        fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
            self.inner.write_at(buf, offset)
        }
        fn len(&self) -> Result<u64> {
            self.inner.len()
        }
        fn set_len(&self, len: u64) -> Result<()> {
            self.inner.set_len(len)
        }
        fn sync(&self) -> Result<()> {
            let number = self.syncs.fetch_add(1, Ordering::SeqCst);
            if number == self.failing { Err(Error::unsupported(self.name(), "this one sync")) } else { Ok(()) }
        }
    }

    fn run(storage: &Arc<Forgetful>, total: u64) -> Result<()> {
        let seam: Arc<dyn Storage> = storage.clone();
        let mut writeback = Writeback::new(&seam, total);
        for _ in 0..8 {
            writeback.written(total / 8);
        }
        writeback.finish()
    }

    #[test]
    fn an_early_sync_that_failed_fails_the_merge() {
        run(&Forgetful::new(1), WORTH_IT).expect_err("the second sync failed");
    }

    #[test]
    fn early_syncs_are_few_and_small_merges_have_none() {
        let storage = Forgetful::new(u64::MAX);
        run(&storage, 4 * WORTH_IT).expect("no sync fails");
        assert!((1..=super::SYNCS).contains(&storage.syncs.load(Ordering::SeqCst)));
        let storage = Forgetful::new(0);
        run(&storage, WORTH_IT / 2).expect("nothing is synced");
        assert_eq!(storage.syncs.load(Ordering::SeqCst), 0);
    }
}
