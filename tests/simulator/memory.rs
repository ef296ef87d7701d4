//! What a thread asks of the allocator while it does something: the most bytes it holds, and how often it
//! asks.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The system's allocator, counting bytes and requests by thread.
pub struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
    static REQUESTS: Cell<u64> = const { Cell::new(0) };
}

fn add(bytes: isize) {
    // A thread that ends may free after its counters have gone.
    let _ = HELD.try_with(|held| {
        held.set(held.get() + bytes);
        PEAK.with(|peak| peak.set(peak.get().max(held.get())));
    });
}

fn count() {
    let _ = REQUESTS.try_with(|requests| requests.set(requests.get() + 1));
}

fn signed(bytes: usize) -> isize {
    isize::try_from(bytes).expect("a layout has at most isize::MAX bytes")
}

// SAFETY: every call goes to the system's allocator unchanged, which keeps the contract; counting touches
// three cells that are initialised without allocating and never unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        add(signed(layout.size()));
        // SAFETY: the caller's layout, as it is.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        add(signed(layout.size()));
        // SAFETY: the caller's layout, as it is.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        add(signed(size) - signed(layout.size()));
        // SAFETY: the caller's block, layout and size, as they are.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        add(-signed(layout.size()));
        // SAFETY: the caller's block and layout, as they are.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Does something; the most bytes this thread held meanwhile, beyond what it held before.
pub fn peak_of<T>(work: impl FnOnce() -> T) -> (T, u64) {
    let before = HELD.get();
    PEAK.set(before);
    let result = work();
    (result, u64::try_from(PEAK.get() - before).expect("a peak is no less than its start"))
}

/// Does something; how often this thread asked for memory meanwhile.
pub fn requests_of<T>(work: impl FnOnce() -> T) -> (T, u64) {
    let before = REQUESTS.get();
    let result = work();
    (result, REQUESTS.get() - before)
}
