//! Writing back early: while a long merge copies, what it has copied already goes to the medium.
//!
//! The barriers of the merge stand where they stood; they find less left to do. Early syncs order nothing: what they make
//! durable is data that no mapping names yet, or that the layer above still covers.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use crate::storage::Storage;

/// Merges of less data leave all to the barriers.
const WORTH_IT: u64 = 128 << 20;
/// How many early syncs there are at the most, however much is copied.
const SYNCS: u64 = 6;

/// A thread that syncs when it is told to.
#[derive(Debug, Default)]
pub(super) struct Writeback {
    thread: Option<(Sender<()>, JoinHandle<()>)>,
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
                // A failure poisons the storage: the merge hears of it at its next write or barrier.
                let _ = storage.sync();
            }
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
            let _ = sender.send(());
        }
    }
}

impl Drop for Writeback {
    /// Waits for a sync under way: none may come between the barriers of the merge.
    fn drop(&mut self) {
        if let Some((sender, thread)) = self.thread.take() {
            drop(sender);
            let _ = thread.join();
        }
    }
}
