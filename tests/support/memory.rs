//! How much memory and time a piece of work takes: an allocator that counts what each thread asks for, and each thread's
//! own clock.
//!
//! Counted by thread, so that tests that run beside each other do not disturb each other; what a thread of the library's
//! own asks for is not seen.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Duration;

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    /// Bytes that this thread asked for and did not give back since it began to count, and the most there ever were.
    static HELD: Cell<(isize, isize)> = const { Cell::new((0, 0)) };
}

fn count(bytes: isize) {
    // A thread that is about to end no longer counts.
    let _ = HELD.try_with(|held| {
        let now = held.get().0 + bytes;
        held.set((now, held.get().1.max(now)));
    });
}

fn signed(bytes: usize) -> isize {
    isize::try_from(bytes).unwrap_or(isize::MAX)
}

// SAFETY: every call goes to the system's allocator as it came; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(signed(layout.size()));
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(signed(layout.size()));
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-signed(layout.size()));
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(signed(size) - signed(layout.size()));
        unsafe { System.realloc(at, layout, size) }
    }
}

/// Does some work and tells how many bytes this thread held at most while it did, beyond those that it held before.
pub fn peak<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = HELD.get().0;
    HELD.set((before, before));
    let done = work();
    (done, usize::try_from(HELD.get().1 - before).unwrap_or(0))
}

/// How long this thread has kept a processor busy so far; other programs on the machine do not count.
pub fn worked() -> Duration {
    let spent = std::fs::read_to_string("/proc/thread-self/schedstat").ok();
    let nanoseconds = spent.as_deref().and_then(|text| text.split(' ').next()?.parse().ok());
    nanoseconds.map_or_else(|| std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default(), Duration::from_nanos)
}

#[test]
fn work_takes_time_and_waiting_does_not() {
    let start = worked();
    std::thread::sleep(Duration::from_millis(50));
    let waited = worked() - start;
    let mut sum = 0_u64;
    while worked() - start < waited + Duration::from_millis(5) {
        sum = sum.wrapping_add((0..10_000).sum::<u64>());
    }
    assert!(sum > 0 && (!cfg!(target_os = "linux") || waited < Duration::from_millis(50)), "{waited:?}");
}

#[test]
fn what_is_held_is_counted() {
    let (kept, most) = peak(|| {
        drop(vec![1_u8; 3 << 20]);
        let mut grown = vec![1_u8; 1 << 20];
        grown.reserve_exact(1 << 20);
        grown
    });
    assert!((3 << 20..4 << 20).contains(&most), "{most}");
    assert_eq!(kept.capacity(), 2 << 20);
    let (_, most) = peak(|| drop(kept));
    assert_eq!(most, 0);
}
