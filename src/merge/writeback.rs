//! Writing back early: while a long merge copies, what it has copied already goes to the medium.
//!
//! The barriers of the merge stand where they stood; they find less left to do. Nothing is ordered or promised here, and
//! nothing can fail: what the medium refuses, the barriers tell.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use crate::storage::Storage;

use super::transfer::Cached;

/// Merges of less data leave all to the barriers.
const WORTH_IT: u64 = 128 << 20;
/// What is gathered before it is passed on, so that it goes to the medium in long strokes.
const STROKE: u64 = 64 << 20;

/// A thread that tells storages what they need not keep: of the target that has what is dirty written out.
#[derive(Debug, Default)]
pub(super) struct Writeback {
    sender: Option<Sender<Vec<Cached>>>,
    thread: Option<JoinHandle<()>>,
    since: u64,
}

impl Writeback {
    /// Prepares for a merge of so many bytes.
    pub(super) fn new(sources: Vec<Arc<dyn Storage>>, target: Arc<dyn Storage>, total: u64) -> Self {
        if total < WORTH_IT {
            return Self::default();
        }
        let (sender, receiver) = channel();
        let work = move || {
            for cached in receiver {
                for Cached { layer, start, end } in joined(cached) {
                    let storage = layer.map_or(Some(&target), |layer| sources.get(layer));
                    if let Some(storage) = storage {
                        storage.will_not_need(start..end);
                    }
                }
            }
        };
        let thread = std::thread::Builder::new().name("writeback".to_owned()).spawn(work).ok();
        Self { sender: thread.is_some().then_some(sender), thread, since: 0 }
    }

    /// Tells of so many bytes that were written; the ranges are asked for where it is time to write them out.
    pub(super) fn written(&mut self, cached: impl FnOnce() -> Vec<Cached>, len: u64) {
        let Some(sender) = &self.sender else { return };
        self.since += len;
        if self.since >= STROKE {
            self.since = 0;
            // The thread ends when this end of the channel does, not before.
            let _ = sender.send(cached());
        }
    }
}

impl Drop for Writeback {
    /// Waits, so that nothing is touched behind the back of what comes next.
    fn drop(&mut self) {
        drop(self.sender.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Ranges in the order of their files, those that touch joined.
fn joined(mut ranges: Vec<Cached>) -> Vec<Cached> {
    ranges.sort_unstable();
    ranges.dedup_by(|next, last| {
        let touches = next.layer == last.layer && next.start <= last.end;
        if touches {
            last.end = last.end.max(next.end);
        }
        touches
    });
    ranges
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::sync::{Arc, Mutex};

    use super::super::transfer::Cached;
    use super::{STROKE, WORTH_IT, Writeback};
    use crate::storage::{MemoryStorage, Result, Storage};

    /// Notes what it need not keep.
    #[derive(Debug)]
    struct Noting {
        inner: MemoryStorage,
        heard: Mutex<Vec<Range<u64>>>,
    }

    impl Storage for Noting {
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
            self.inner.sync()
        }
        fn will_not_need(&self, range: Range<u64>) {
            self.heard.lock().unwrap().push(range);
        }
    }

    fn noting() -> Arc<Noting> {
        Arc::new(Noting { inner: MemoryStorage::new("noting"), heard: Mutex::default() })
    }

    fn heard(total: u64) -> [Vec<(u64, u64)>; 2] {
        let (source, target) = (noting(), noting());
        let mut writeback = Writeback::new(vec![source.clone()], target.clone(), total);
        let cached = |layer, start| Cached { layer, start, end: start + 10 };
        writeback.written(|| vec![cached(None, 10), cached(None, 0)], STROKE - 1);
        writeback.written(|| vec![cached(None, 130), cached(Some(0), 5), cached(None, 100), cached(None, 110)], 1);
        writeback.written(|| vec![cached(None, 200)], 1);
        drop(writeback);
        [source, target]
            .map(|storage| storage.heard.lock().unwrap().iter().map(|heard| (heard.start, heard.end)).collect())
    }

    #[test]
    fn ranges_are_passed_on_in_long_strokes() {
        assert_eq!(heard(WORTH_IT), [vec![(5, 15)], vec![(100, 120), (130, 140)]]);
        assert_eq!(heard(WORTH_IT - 1), [vec![], vec![]]);
    }
}
