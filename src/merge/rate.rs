//! So many bytes a second, and no more.

use std::time::{Duration, Instant};

/// A bucket that holds what may be copied in a tenth of a second, and fills all the time.
#[derive(Debug, Default)]
pub(super) struct Rate {
    limit: Option<Limit>,
}

#[derive(Debug)]
struct Limit {
    /// Bytes a second, not 0.
    rate: u64,
    /// When all that was copied so far would have been copied at that rate.
    due: Instant,
}

impl Rate {
    /// At most so many bytes a second; 0 and none do not limit.
    pub(super) fn new(rate: Option<u64>) -> Self {
        let limit = rate.filter(|&rate| rate > 0).map(|rate| Limit { rate, due: Instant::now() });
        Self { limit }
    }

    /// How much to copy at once: what a tenth of a second allows, at least 64 KiB, at most `most`.
    pub(super) fn step(&self, most: u64) -> u64 {
        self.limit.as_ref().map_or(most, |limit| (limit.rate / 10).max(64 << 10).min(most))
    }

    /// So many bytes were copied.
    pub(super) fn spend(&mut self, bytes: u64) {
        let Some(limit) = &mut self.limit else { return };
        // What was not used is lost, but for a tenth of a second.
        let earliest = Instant::now().checked_sub(Duration::from_millis(100)).unwrap_or(limit.due);
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(limit.rate);
        let cost = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let start = limit.due.max(earliest);
        limit.due = start.checked_add(cost).unwrap_or(start);
    }

    /// How long to wait until more may be copied.
    pub(super) fn owed(&self) -> Option<Duration> {
        let wait = self.limit.as_ref()?.due.saturating_duration_since(Instant::now());
        (!wait.is_zero()).then_some(wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_spent_is_owed() {
        let mut rate = Rate::new(Some(1 << 20));
        assert_eq!((rate.step(64 << 20), rate.owed()), ((1 << 20) / 10, None));
        rate.spend(10 << 20);
        assert!(rate.owed().is_some_and(|wait| wait > Duration::from_secs(9) && wait <= Duration::from_secs(10)));
        rate.spend(u64::MAX);
        assert!(rate.owed().is_some_and(|wait| wait > Duration::from_secs(10)));
    }

    #[test]
    fn no_limit_owes_nothing() {
        for limit in [None, Some(0)] {
            let mut rate = Rate::new(limit);
            rate.spend(u64::MAX);
            assert_eq!((rate.step(64 << 20), rate.owed()), (64 << 20, None));
        }
    }
}
